// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Checksums: of what a record stands for, bound to whose it is.
//!
//! The sum of a page is taken over its 4096 bytes, before it is packed and after
//! it was unpacked: so it notices whatever went wrong in between, be it in
//! memory, in a codec or in this store. It is bound to the record's owner: an
//! intact image in the wrong place is as wrong as a damaged one. Everything is
//! keyed with the arena's secret. (Against somebody who can write to the host's
//! memory this is no protection.)

use twox_hash::XxHash3_64;

use crate::arena::{Arena, Header, Secret, mix};
use crate::spec::{PAGE_SIZE, Page};

/// The sum of a page's bytes. Equal pages have equal sums, whoever put them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Content(pub(crate) u32);

pub(crate) struct Sums {
    secret: Secret,
    binder: u64,
}

fn fold(hash: u64) -> u32 {
    // The upper half: in XXH3 either would do.
    u32::try_from(hash >> 32).unwrap_or(0)
}

impl Sums {
    pub(crate) fn new(arena: &Arena) -> Self {
        Self::keyed(arena.secret().clone())
    }

    pub(crate) fn keyed(secret: Secret) -> Self {
        Self {
            binder: secret.number(1),
            secret,
        }
    }

    fn hash(&self, bytes: &[u8]) -> u64 {
        // A secret of this length is never refused.
        XxHash3_64::oneshot_with_secret(self.secret.bytes(), bytes).unwrap_or(0)
    }

    fn bind(&self, number: u32, index: u32) -> u32 {
        fold(mix(self.binder
            ^ u64::from(number) << 32
            ^ u64::from(index)))
    }

    pub(crate) fn page(&self, page: &Page) -> Content {
        Content(fold(self.hash(page)))
    }

    /// The sum of a page that one word fills.
    pub(crate) fn filled(&self, word: u64) -> Content {
        Content(fold(mix(self.secret.number(2) ^ word)))
    }

    /// The sum of any payload but a page's.
    pub(crate) fn bytes(&self, bytes: &[u8]) -> Content {
        debug_assert_ne!(bytes.len(), PAGE_SIZE);
        Content(fold(self.hash(bytes)))
    }

    /// What goes into the header of a record with this content and owner.
    pub(crate) fn check(&self, content: Content, number: u32, index: u32) -> u32 {
        content.0 ^ self.bind(number, index)
    }

    /// The content that a record's header promises.
    pub(crate) fn promised(&self, header: &Header) -> Content {
        Content(header.check ^ self.bind(header.number, header.index))
    }
}
