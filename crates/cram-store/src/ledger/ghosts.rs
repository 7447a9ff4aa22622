// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the store remembers of ephemeral pages that are gone: 16 bits for each.
//!
//! A page that comes back soon after it was evicted, or was got out, is worth
//! more than one that is seen for the first time; it goes where pages stay for
//! longer. (The ghost queue of S3-FIFO: J. Yang et al., "FIFO Queues are All You
//! Need for Cache Eviction", SOSP 2023; here also for pages that a get removed,
//! since that is how an exclusive cache is hit.) The table has a fixed size, and
//! a new entry takes the place of the oldest one in its set.

use crate::machine::sync::atomic::{AtomicU16, Ordering::Relaxed};

/// Entries of a set, which with the number of the oldest fills a cache line.
const WAYS: u16 = 31;
/// Bytes of the store for each entry: about as many entries as pages.
const BYTES_PER_ENTRY: u64 = 2 << 10;

#[repr(align(64))]
struct Set {
    tags: [AtomicU16; WAYS as usize],
    oldest: AtomicU16,
}

/// See the module's text.
pub(crate) struct Ghosts {
    sets: Box<[Set]>,
}

impl Ghosts {
    fn count(capacity_bytes: u64) -> u64 {
        (capacity_bytes / BYTES_PER_ENTRY / u64::from(WAYS)).max(1)
    }

    pub(crate) fn bytes(capacity_bytes: u64) -> u64 {
        Self::count(capacity_bytes) * size_of::<Set>() as u64
    }

    pub(crate) fn new(capacity_bytes: u64) -> Self {
        let set = |_| Set {
            tags: std::array::from_fn(|_| AtomicU16::new(0)),
            oldest: AtomicU16::new(0),
        };
        Self {
            sets: (0..Self::count(capacity_bytes)).map(set).collect(),
        }
    }

    fn spot(&self, hash: u64) -> (&Set, u16) {
        let tag = u16::try_from(hash & 0xffff).unwrap_or(0).max(1);
        let at = usize::try_from(hash >> 16).unwrap_or(0) % self.sets.len();
        (&self.sets[at], tag)
    }

    /// Remembers a page by the hash of its name.
    pub(crate) fn remember(&self, hash: u64) {
        let (set, tag) = self.spot(hash);
        // Two threads may use one place; one of them is forgotten then.
        let at = set.oldest.load(Relaxed);
        set.oldest.store((at + 1) % WAYS, Relaxed);
        set.tags[usize::from(at)].store(tag, Relaxed);
    }

    /// Whether the page is remembered; then it is so no longer.
    pub(crate) fn recall(&self, hash: u64) -> bool {
        let (set, tag) = self.spot(hash);
        set.tags.iter().any(|entry| {
            entry.load(Relaxed) == tag && entry.compare_exchange(tag, 0, Relaxed, Relaxed).is_ok()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::mix;

    #[test]
    fn the_young_are_remembered_and_the_old_forgotten() {
        let ghosts = Ghosts::new(1 << 20);
        assert!(!ghosts.recall(mix(1)));
        (0..400).for_each(|number| ghosts.remember(mix(number)));
        assert!(
            (300..400)
                .filter(|number| ghosts.recall(mix(*number)))
                .count()
                > 95
        );
        assert!(!ghosts.recall(mix(399)), "recalled once");
        (1000..11_000).for_each(|number| ghosts.remember(mix(number)));
        assert!(
            (0..300)
                .filter(|number| ghosts.recall(mix(*number)))
                .count()
                < 10
        );
    }
}
