// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What all clients of a store have in common: the budget, the arena, the
//! store's counters, and the lists of ephemeral and of shared spaces.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use parking_lot::{Mutex, RwLock};

use crate::arena::Arena;
use crate::budget::Budget;
use crate::space::Space;
use crate::stats::{StoreStats, Tally};

/// A shared space and how many pools are open on it.
pub(crate) struct SharedSpace {
    pub(crate) space: Arc<Space>,
    pub(crate) opened: u32,
}

/// See the module's text.
///
/// Lock order, outermost first: the store's clients, a client's pools, `shared`, `ephemeral`, a
/// space's shard, a space's members, a bank of the arena. No two locks of one rank at a time.
pub(crate) struct Core {
    pub(crate) budget: Budget,
    pub(crate) arena: Arena,
    pub(crate) tally: Tally,
    pub(crate) shards_per_space: usize,
    /// Blocks of pages that may be evicted, in bytes.
    pub(crate) evictable_bytes: AtomicU64,
    pub(crate) shared: Mutex<HashMap<[u8; 16], SharedSpace>>,
    pub(crate) ephemeral: RwLock<Vec<Arc<Space>>>,
    /// Counts puts into ephemeral spaces; leaves are stamped with it.
    clock: AtomicU64,
    /// A put was refused for want of room, and nothing was freed since.
    is_full: AtomicBool,
}

impl Core {
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        let core = Self {
            budget: Budget::new(capacity_bytes),
            arena: Arena::new(capacity_bytes),
            tally: Tally::default(),
            shards_per_space: if capacity_bytes < 8 << 20 { 4 } else { 16 },
            evictable_bytes: AtomicU64::new(0),
            shared: Mutex::default(),
            ephemeral: RwLock::default(),
            clock: AtomicU64::new(0),
            is_full: AtomicBool::new(false),
        };
        // Cannot fail: the least capacity allowed is many times that.
        let _ = core.budget.reserve(core.fixed_bytes());
        core
    }

    /// Bytes of a store without clients.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        size_of::<Self>() as u64 + self.arena.fixed_bytes() + 512
    }

    /// The time for a page that comes in now.
    pub(crate) fn tick(&self) -> u64 {
        self.clock.fetch_add(1, Relaxed)
    }

    pub(crate) fn note_full(&self) {
        self.is_full.store(true, Relaxed);
    }

    pub(crate) fn note_freed(&self) {
        if self.is_full.load(Relaxed) {
            self.is_full.store(false, Relaxed);
        }
    }

    /// See [`crate::Store::pressure`].
    pub(crate) fn pressure(&self) -> u32 {
        if self.is_full.load(Relaxed) {
            return PRESSURE_MAX;
        }
        let free = self.arena.idle_bytes() + self.evictable_bytes.load(Relaxed);
        let committed = self.budget.held_bytes().saturating_sub(free);
        // What is above may be lost to chunks that cannot be filled to the last block.
        let high = self.budget.arena_limit_bytes() - 2 * self.arena.chunk_held_bytes();
        between(committed, low_watermark(self.budget.capacity_bytes()), high)
    }

    pub(crate) fn stats(&self) -> StoreStats {
        let budget = &self.budget;
        self.tally.read(
            budget.held_bytes(),
            budget.capacity_bytes(),
            budget.held_bytes_max(),
        )
    }
}

/// The greatest pressure: nothing is accepted.
pub(crate) const PRESSURE_MAX: u32 = 1000;

/// Below this share of a limit there is no pressure at all.
pub(crate) fn low_watermark(limit_bytes: u64) -> u64 {
    limit_bytes / 4 * 3
}

/// Pressure on the way from the low watermark (0) to the high one (1000).
pub(crate) fn between(bytes: u64, low: u64, high: u64) -> u32 {
    let span = u128::from(high.saturating_sub(low).max(1));
    let over = u128::from(bytes.saturating_sub(low));
    u32::try_from(over * u128::from(PRESSURE_MAX) / span)
        .unwrap_or(PRESSURE_MAX)
        .min(PRESSURE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_rises_between_the_watermarks() {
        let at = [0, 750, 751, 875, 1000, u64::MAX].map(|bytes| between(bytes, 750, 1000));
        assert_eq!(at, [0, 0, 4, 500, 1000, 1000]);
        assert_eq!(between(1, 0, 0), 1000);
        assert_eq!(between(0, 0, 0), 0);
    }
}
