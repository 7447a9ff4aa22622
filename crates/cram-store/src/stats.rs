// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counters, under the names that people know from zram, zswap and tmem.
//!
//! Every event is counted three times, for the pool, the client and the store,
//! each in a [`Tally`] of relaxed atomics: exact, and readable without any
//! lock of the data path. What counts pages that are there now is changed
//! under the lock of the page's own shard, so it never dips below zero.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::PAGE_SIZE;
use crate::index::Slot;

/// Why a put did not keep the page. No error: the page goes to the next tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The store is full and nothing may be evicted for this page. Also what a put gets that
    /// meets the destruction of its pool.
    NoSpace,
    /// The client's quota is used up.
    OverQuota,
    /// The client is frozen.
    Frozen,
    /// The page does not compress and the pool refuses such pages.
    Incompressible,
}

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A reading of the counters of a store, a client or a pool. All but the first five only
        /// ever count events or pages; those five are bytes.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Stats {
            /// Every figure with its name, in the order of the fields.
            #[must_use]
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

statistics! {
    /// Bytes of the stored pages as their owners see them: `pages_stored` × 4096 (zram).
    orig_data_size,
    /// Bytes of their compressed images; same-filled pages have none (zram).
    compr_data_size,
    /// Bytes held. For the store: everything taken from the host, metadata and room not in use
    /// included. For a client: what its quota is measured by. For a pool: its pages' blocks, its
    /// index and its own structures (zram).
    mem_used_total,
    /// The limit on `mem_used_total`: capacity or quota; 0 where there is none (zram).
    mem_limit,
    /// The greatest `mem_used_total` so far; 0 for a pool (zram).
    mem_used_max,
    /// Pages that are one repeated 64-bit word and live in the index alone (zram).
    same_pages,
    /// Pages that did not compress and are stored as they are (zram).
    huge_pages,
    /// Pages that are there (zswap's `stored_pages`).
    pages_stored,
    /// Puts asked for, whatever came of them. A client's count what it did, also in shared pools.
    puts,
    /// Puts refused, for any reason.
    puts_refused,
    /// … because the store was full.
    refused_no_space,
    /// … because the client's quota was used up.
    refused_over_quota,
    /// … because the client was frozen.
    refused_frozen,
    /// … because the page did not compress and the pool refuses such pages.
    refused_incompressible,
    /// Gets asked for, whatever came of them.
    gets,
    /// Gets that found nothing.
    gets_missing,
    /// Gets that found a page whose checksum was wrong, and returned no data.
    gets_corrupt,
    /// Pages removed by flush_page and flush_object.
    flushes,
    /// Ephemeral pages evicted to make room; counted for those who put them.
    evicted_pages,
    /// Times that a put met the store's capacity (zswap).
    pool_limit_hit,
}

/// A store's figures.
pub type StoreStats = Stats;
/// A client's figures.
pub type ClientStats = Stats;
/// A pool's figures, over all clients that share it.
pub type PoolStats = Stats;

/// The atomic form. Aligned so that two tallies never share a cache line.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Tally {
    pages_stored: AtomicU64,
    compr_data_size: AtomicU64,
    same_pages: AtomicU64,
    huge_pages: AtomicU64,
    puts: AtomicU64,
    refused: [AtomicU64; 4],
    gets: AtomicU64,
    gets_missing: AtomicU64,
    gets_corrupt: AtomicU64,
    flushes: AtomicU64,
    evicted_pages: AtomicU64,
    pool_limit_hit: AtomicU64,
}

fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Relaxed);
}

impl Tally {
    pub(crate) fn pages_stored(&self) -> u64 {
        self.pages_stored.load(Relaxed)
    }

    pub(crate) fn put(&self) {
        count(&self.puts, 1);
    }

    pub(crate) fn refused(&self, why: Refusal) {
        let [no_space, over_quota, frozen, incompressible] = &self.refused;
        count(
            match why {
                Refusal::NoSpace => no_space,
                Refusal::OverQuota => over_quota,
                Refusal::Frozen => frozen,
                Refusal::Incompressible => incompressible,
            },
            1,
        );
    }

    pub(crate) fn get(&self) {
        count(&self.gets, 1);
    }

    pub(crate) fn missing(&self) {
        count(&self.gets_missing, 1);
    }

    pub(crate) fn corrupt(&self) {
        count(&self.gets_corrupt, 1);
    }

    pub(crate) fn flushed(&self, pages: u64) {
        count(&self.flushes, pages);
    }

    pub(crate) fn evicted(&self, pages: u64) {
        count(&self.evicted_pages, pages);
    }

    pub(crate) fn limit_hit(&self) {
        count(&self.pool_limit_hit, 1);
    }

    /// A page came. Call with the shard's lock held.
    pub(crate) fn page_in(&self, slot: &Slot) {
        count(&self.pages_stored, 1);
        count(&self.compr_data_size, slot.len() as u64);
        count(&self.same_pages, u64::from(slot.is_same_filled()));
        count(&self.huge_pages, u64::from(slot.len() == PAGE_SIZE));
    }

    /// A page went. Call with the shard's lock held.
    pub(crate) fn page_out(&self, slot: &Slot) {
        self.pages_stored.fetch_sub(1, Relaxed);
        self.compr_data_size.fetch_sub(slot.len() as u64, Relaxed);
        self.same_pages
            .fetch_sub(u64::from(slot.is_same_filled()), Relaxed);
        self.huge_pages
            .fetch_sub(u64::from(slot.len() == PAGE_SIZE), Relaxed);
    }

    /// Reads everything; the caller adds what it knows of bytes held.
    pub(crate) fn read(&self, mem_used_total: u64, mem_limit: u64, mem_used_max: u64) -> Stats {
        let refused = [0, 1, 2, 3].map(|why: usize| self.refused[why].load(Relaxed));
        let pages_stored = self.pages_stored();
        Stats {
            orig_data_size: pages_stored * PAGE_SIZE as u64,
            compr_data_size: self.compr_data_size.load(Relaxed),
            mem_used_total,
            mem_limit,
            mem_used_max,
            same_pages: self.same_pages.load(Relaxed),
            huge_pages: self.huge_pages.load(Relaxed),
            pages_stored,
            puts: self.puts.load(Relaxed),
            puts_refused: refused.iter().sum(),
            refused_no_space: refused[0],
            refused_over_quota: refused[1],
            refused_frozen: refused[2],
            refused_incompressible: refused[3],
            gets: self.gets.load(Relaxed),
            gets_missing: self.gets_missing.load(Relaxed),
            gets_corrupt: self.gets_corrupt.load(Relaxed),
            flushes: self.flushes.load(Relaxed),
            evicted_pages: self.evicted_pages.load(Relaxed),
            pool_limit_hit: self.pool_limit_hit.load(Relaxed),
        }
    }
}
