// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Keyed hashes of what guests choose.

use std::hash::{Hash, Hasher};

use siphasher::sip::SipHasher13;

/// The keys of a hash function that guests, who choose what is hashed, cannot foresee (SipHash-1-3).
/// They are the same whenever the arena is opened, since a page must come to the shard that its
/// object has its number for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HashKeys(pub(crate) u64, pub(crate) u64);

impl HashKeys {
    pub(crate) fn hash_one(self, value: impl Hash) -> u64 {
        let mut hasher = SipHasher13::new_with_keys(self.0, self.1);
        value.hash(&mut hasher);
        hasher.finish()
    }
}
