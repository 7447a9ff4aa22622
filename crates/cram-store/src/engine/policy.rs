// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How full the store is, and who should give something back.

use std::sync::Arc;

use crate::engine::Core;
use crate::ledger::account::{Account, Holder};
use crate::machine::sync::atomic::Ordering::Relaxed;
use crate::spec::PAGE_SIZE;

/// The greatest pressure: nothing is accepted.
pub(crate) const PRESSURE_MAX: u32 = 1000;

/// Of the arena's share of the capacity, the part (in 64ths) that records can fill. Beyond it
/// compaction would have to move more than 16 spans to free one.
const FILLABLE_64THS: u64 = 60;

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

/// What a client should take back into its own memory, so that the store can accept pages again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ReclaimTarget {
    /// Bytes of the client's bill that should go.
    pub bytes: u64,
    /// About so many of its persistent pages, at the size that they have on average.
    pub pages: u64,
}

/// What each client may use of a full store, by weight.
pub(crate) struct Shares {
    capacity_bytes: u64,
    weights: u64,
}

impl Shares {
    /// What an account uses beyond its share, in bytes.
    pub(crate) fn excess_bytes(&self, account: &Account) -> u64 {
        let share = u128::from(self.capacity_bytes) * u128::from(account.weight())
            / u128::from(self.weights.max(1));
        let share = u64::try_from(share).unwrap_or(u64::MAX);
        account.used_bytes().saturating_sub(share)
    }
}

impl Core {
    /// The shares of all clients.
    pub(crate) fn shares(&self, accounts: &[Arc<Account>]) -> Shares {
        let clients = accounts
            .iter()
            .filter(|account| account.holder == Holder::Client);
        Shares {
            capacity_bytes: self.budget.capacity_bytes(),
            weights: clients.map(|account| u64::from(account.weight())).sum(),
        }
    }

    /// What cannot be evicted: persistent pages, images and the catalogue, and all that is held
    /// outside of the arena.
    fn committed_bytes(&self) -> u64 {
        let outside = self
            .budget
            .held_bytes()
            .saturating_sub(self.arena.spans().held_bytes());
        let images = self.accounts.sum(|account| match account.holder {
            Holder::SharedPool => 0,
            _ => account.image_bytes.load(Relaxed),
        });
        let pages: u64 = self
            .spaces
            .read()
            .iter()
            .flatten()
            .filter(|space| !space.is_evictable())
            .map(|space| space.tally.billed_bytes())
            .sum();
        outside + images + pages + self.catalogue_bytes.load(Relaxed)
    }

    fn fillable_bytes(&self) -> u64 {
        self.budget.arena_limit_bytes() / 64 * FILLABLE_64THS
    }

    /// See [`crate::Store::pressure`].
    pub(crate) fn pressure(&self) -> u32 {
        if self.is_full() {
            return PRESSURE_MAX;
        }
        let low = low_watermark(self.budget.capacity_bytes());
        between(self.committed_bytes(), low, self.fillable_bytes())
    }

    /// See [`crate::Store::reclaim_target`].
    pub(crate) fn reclaim_target(&self, account: &Account) -> ReclaimTarget {
        let accounts = self.accounts.all();
        let clients: Vec<_> = accounts
            .iter()
            .filter(|account| account.holder == Holder::Client)
            .collect();
        let shares = self.shares(&accounts);
        let total: u64 = clients
            .iter()
            .map(|client| shares.excess_bytes(client))
            .sum();
        let low = low_watermark(self.budget.capacity_bytes());
        let wanted = self.committed_bytes().saturating_sub(low);
        // Who is over a share gives in proportion to what is over; when nobody is, all give in
        // proportion to what they have.
        let (mine, all) = if total > 0 {
            (shares.excess_bytes(account), total)
        } else {
            let used = clients.iter().map(|client| client.committed_bytes()).sum();
            (account.committed_bytes(), used)
        };
        let share = u128::from(wanted) * u128::from(mine) / u128::from(all.max(1));
        let over_quota = account
            .committed_bytes()
            .saturating_sub(account.quota_bytes());
        let bytes = u64::try_from(share)
            .unwrap_or(u64::MAX)
            .max(over_quota)
            .min(account.committed_bytes());
        ReclaimTarget {
            bytes,
            pages: bytes.div_ceil(self.bytes_per_page(account)),
        }
    }

    fn bytes_per_page(&self, account: &Account) -> u64 {
        let pages: u64 = self
            .all_spaces()
            .iter()
            .filter(|space| space.payer.number == account.number)
            .map(|space| space.tally.pages())
            .sum();
        (account.committed_bytes() / pages.max(1)).clamp(64, 2 * PAGE_SIZE as u64)
    }
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
