// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The store's hard limit and each client's quota: bytes are reserved here
//! *before* anything is allocated, and given back *after* it was freed. So the
//! figures are never below what is really held, and the limit holds at every
//! moment, however many threads put at once.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use crate::stats::Tally;

/// Stands for "no quota" where a quota is kept as a number.
pub(crate) const NO_QUOTA: u64 = u64::MAX;

/// Which limit stood in the way of a reservation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Shortage {
    /// The store's capacity, or the host's own memory.
    Store,
    /// The client's quota.
    Quota,
}

/// What the general-purpose allocator takes for a request of `bytes`: a header of 8, granules of
/// 16, 32 at the least (glibc's malloc; others are no worse by more than a rounding).
pub(crate) fn malloc_bytes(bytes: usize) -> u64 {
    if bytes == 0 {
        0
    } else {
        (bytes as u64).saturating_add(8 + 15).max(32) & !15
    }
}

/// Adds `bytes` to `counter` unless that would pass `limit`; the new value if it was done.
fn add_within(counter: &AtomicU64, bytes: u64, limit: u64) -> Option<u64> {
    counter
        .fetch_update(Relaxed, Relaxed, |now| {
            now.checked_add(bytes).filter(|sum| *sum <= limit)
        })
        .ok()
        .map(|before| before + bytes)
}

/// The store's bytes. Invariant: `held_bytes <= capacity_bytes`, always.
#[derive(Debug)]
pub(crate) struct Budget {
    capacity_bytes: u64,
    /// Above this the arena takes no more chunks; the rest is kept for the index, which must be
    /// able to grow when the data has taken everything else.
    arena_limit_bytes: u64,
    held_bytes: AtomicU64,
    held_bytes_max: AtomicU64,
}

impl Budget {
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            arena_limit_bytes: capacity_bytes - capacity_bytes / 64,
            held_bytes: AtomicU64::new(0),
            held_bytes_max: AtomicU64::new(0),
        }
    }

    pub(crate) fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    pub(crate) fn arena_limit_bytes(&self) -> u64 {
        self.arena_limit_bytes
    }

    pub(crate) fn held_bytes(&self) -> u64 {
        self.held_bytes.load(Relaxed)
    }

    pub(crate) fn held_bytes_max(&self) -> u64 {
        self.held_bytes_max.load(Relaxed)
    }

    /// Reserves bytes for metadata, or says that there is no room.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), Shortage> {
        self.reserve_below(bytes, self.capacity_bytes)
    }

    /// Reserves bytes for a chunk of the arena, or says that there is no room.
    pub(crate) fn reserve_chunk(&self, bytes: u64) -> Result<(), Shortage> {
        self.reserve_below(bytes, self.arena_limit_bytes)
    }

    fn reserve_below(&self, bytes: u64, limit: u64) -> Result<(), Shortage> {
        let held = add_within(&self.held_bytes, bytes, limit).ok_or(Shortage::Store)?;
        self.held_bytes_max.fetch_max(held, Relaxed);
        Ok(())
    }

    /// Gives back what was reserved and has been freed.
    pub(crate) fn release(&self, bytes: u64) {
        self.held_bytes.fetch_sub(bytes, Relaxed);
    }
}

/// One client's bill: the pages that it put, and its private pools' metadata. (Or the metadata of a
/// shared pool, which has an account of its own.)
///
/// Invariant: `used_bytes <= quota_bytes`, except after the quota was lowered beneath what
/// persistent pages take.
#[derive(Debug)]
pub(crate) struct Account {
    quota_bytes: AtomicU64,
    used_bytes: AtomicU64,
    used_bytes_max: AtomicU64,
    /// Blocks of its pages that may be evicted, in bytes; part of `used_bytes`.
    pub(crate) evictable_bytes: AtomicU64,
    is_frozen: AtomicBool,
    pub(crate) tally: Tally,
}

impl Account {
    pub(crate) fn new(quota_bytes: Option<u64>) -> Self {
        Self {
            quota_bytes: AtomicU64::new(quota_bytes.unwrap_or(NO_QUOTA)),
            used_bytes: AtomicU64::new(0),
            used_bytes_max: AtomicU64::new(0),
            evictable_bytes: AtomicU64::new(0),
            is_frozen: AtomicBool::new(false),
            tally: Tally::default(),
        }
    }

    pub(crate) fn quota_bytes(&self) -> u64 {
        self.quota_bytes.load(Relaxed)
    }

    pub(crate) fn set_quota(&self, quota_bytes: Option<u64>) {
        self.quota_bytes
            .store(quota_bytes.unwrap_or(NO_QUOTA), Relaxed);
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Relaxed)
    }

    pub(crate) fn used_bytes_max(&self) -> u64 {
        self.used_bytes_max.load(Relaxed)
    }

    pub(crate) fn is_over_quota(&self) -> bool {
        self.used_bytes() > self.quota_bytes()
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.is_frozen.load(Relaxed)
    }

    pub(crate) fn set_frozen(&self, is_frozen: bool) {
        self.is_frozen.store(is_frozen, Relaxed);
    }

    /// What it uses and could not be made to give up by eviction, in bytes.
    pub(crate) fn committed_bytes(&self) -> u64 {
        self.used_bytes()
            .saturating_sub(self.evictable_bytes.load(Relaxed))
    }

    /// Bills bytes to the client, or says that its quota does not allow them.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), Shortage> {
        let used =
            add_within(&self.used_bytes, bytes, self.quota_bytes()).ok_or(Shortage::Quota)?;
        self.used_bytes_max.fetch_max(used, Relaxed);
        Ok(())
    }

    /// Takes bytes off the bill.
    pub(crate) fn release(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Relaxed);
    }
}

/// The store's budget and a client's account together, for metadata, which counts against both.
#[derive(Clone, Copy)]
pub(crate) struct Ledger<'a> {
    pub(crate) budget: &'a Budget,
    pub(crate) account: &'a Account,
}

impl Ledger<'_> {
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), Shortage> {
        self.account.reserve(bytes)?;
        self.budget
            .reserve(bytes)
            .inspect_err(|_| self.account.release(bytes))
    }

    pub(crate) fn release(&self, bytes: u64) {
        self.account.release(bytes);
        self.budget.release(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_exact_and_refusals_leave_no_trace() {
        let budget = Budget::new(6400);
        assert_eq!(budget.reserve_chunk(6301), Err(Shortage::Store));
        assert_eq!(budget.reserve_chunk(6300), Ok(()));
        assert_eq!(budget.reserve(101), Err(Shortage::Store));
        assert_eq!(budget.reserve(100), Ok(()));
        budget.release(6400);
        assert_eq!((budget.held_bytes(), budget.held_bytes_max()), (0, 6400));
        assert_eq!(budget.reserve(u64::MAX), Err(Shortage::Store));
    }

    #[test]
    fn a_ledger_that_fails_on_the_store_does_not_bill_the_client() {
        let (budget, account) = (Budget::new(1000), Account::new(Some(2000)));
        let ledger = Ledger {
            budget: &budget,
            account: &account,
        };
        assert_eq!(ledger.reserve(1500), Err(Shortage::Store));
        assert_eq!(ledger.reserve(2500), Err(Shortage::Quota));
        assert_eq!((account.used_bytes(), budget.held_bytes()), (0, 0));
    }

    #[test]
    fn malloc_sizes() {
        let sizes = [0, 1, 24, 25, 40, 41, 1024].map(malloc_bytes);
        assert_eq!(sizes, [0, 32, 32, 48, 48, 64, 1040]);
    }
}
