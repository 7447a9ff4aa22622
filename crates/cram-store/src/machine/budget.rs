// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The store's hard limit: bytes are reserved here *before* anything is
//! allocated, and given back *after* it was freed. So the figure is never below
//! what is really held, and the limit holds at every moment, however many
//! threads put at once.

use crate::machine::sync::atomic::{AtomicU64, Ordering::Relaxed};

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
pub(crate) fn add_within(counter: &AtomicU64, bytes: u64, limit: u64) -> Option<u64> {
    counter
        .fetch_update(Relaxed, Relaxed, |now| {
            now.checked_add(bytes).filter(|sum| *sum <= limit)
        })
        .ok()
        .map(|before| before + bytes)
}

/// See [`Budget::keep_margin`].
const MARGIN_BYTES_MAX: u64 = 16 << 10;

/// The store's bytes. Invariant: `held_bytes <= capacity_bytes`, always.
#[derive(Debug)]
pub(crate) struct Budget {
    capacity_bytes: u64,
    /// Above this the arena takes no more spans; the rest is kept for the index, which must be
    /// able to grow when the data has taken everything else.
    arena_limit_bytes: u64,
    /// Above this there is only what opening the arena again needs beyond what is there now.
    limit_bytes: AtomicU64,
    held_bytes: AtomicU64,
    held_bytes_max: AtomicU64,
}

impl Budget {
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        Self {
            capacity_bytes,
            arena_limit_bytes: capacity_bytes - capacity_bytes / 64,
            limit_bytes: AtomicU64::new(capacity_bytes),
            held_bytes: AtomicU64::new(0),
            held_bytes_max: AtomicU64::new(0),
        }
    }

    /// To be called when a store has been opened: from now on a little is kept for the next time.
    /// While tables are made anew, one leaf of each thread stands beside a larger one.
    pub(crate) fn keep_margin(&self) {
        let margin = (self.capacity_bytes / 64).min(MARGIN_BYTES_MAX);
        self.limit_bytes
            .store(self.capacity_bytes - margin, Relaxed);
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
        self.reserve_below(bytes, self.limit_bytes.load(Relaxed))
    }

    /// Reserves bytes for a span of the arena, or says that there is no room.
    pub(crate) fn reserve_span(&self, bytes: u64) -> Result<(), Shortage> {
        self.reserve_below(bytes, self.arena_limit_bytes)
    }

    /// How many bytes more spans could take now.
    pub(crate) fn room_for_spans(&self) -> u64 {
        self.arena_limit_bytes.saturating_sub(self.held_bytes())
    }

    fn reserve_below(&self, bytes: u64, limit: u64) -> Result<(), Shortage> {
        let held = add_within(&self.held_bytes, bytes, limit).ok_or(Shortage::Store)?;
        // Most of the time a look is enough, and cheaper.
        if held > self.held_bytes_max.load(Relaxed) {
            self.held_bytes_max.fetch_max(held, Relaxed);
        }
        Ok(())
    }

    /// Gives back what was reserved and has been freed.
    pub(crate) fn release(&self, bytes: u64) {
        self.held_bytes.fetch_sub(bytes, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_exact_and_refusals_leave_no_trace() {
        let budget = Budget::new(6400);
        assert_eq!(budget.reserve_span(6301), Err(Shortage::Store));
        assert_eq!(budget.reserve_span(6300), Ok(()));
        assert_eq!(budget.reserve(101), Err(Shortage::Store));
        assert_eq!(budget.reserve(100), Ok(()));
        budget.release(6400);
        assert_eq!((budget.held_bytes(), budget.held_bytes_max()), (0, 6400));
        assert_eq!(budget.reserve(u64::MAX), Err(Shortage::Store));
    }

    #[test]
    fn malloc_sizes() {
        let sizes = [0, 1, 24, 25, 40, 41, 1024].map(malloc_bytes);
        assert_eq!(sizes, [0, 32, 32, 48, 48, 64, 1040]);
    }
}
