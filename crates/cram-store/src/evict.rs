// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Eviction of ephemeral pages: of a client that is over its quota first, else
//! the oldest; persistent pages never.
//!
//! Age is kept for leaves of 64 pages. The oldest leaf is looked at first, and
//! of it those pages go that were not used since the leaf was last looked at;
//! then it is the youngest. Which shard has the oldest leaf is read from
//! numbers beside the locks, so choosing a victim stops nobody.

use std::sync::Arc;

use crate::arena::cost_bytes;
use crate::budget::Account;
use crate::core::Core;
use crate::index::{Slot, Wanted};
use crate::space::{Keeping, Shard, Space};

/// Leaves looked at in one call before pages in use go too: a put must not walk the whole store.
const KIND_LEAVES: u32 = 256;
/// Leaves looked at in one call, at the most.
const LEAVES_MAX: u32 = 2048;

/// Whose pages may go.
#[derive(Clone, Copy)]
pub(crate) enum Whose<'a> {
    /// Anybody's.
    Any,
    /// Only this client's.
    Client(&'a Arc<Account>),
}

impl Core {
    /// Evicts until about `bytes` were freed. How many pages went: 0 when none may be evicted.
    ///
    /// Takes the lists' and the shards' locks: call it with none of them held.
    pub(crate) fn evict(&self, whose: Whose<'_>, bytes: u64) -> u64 {
        let spaces = self.ephemeral.read();
        let mut done = Evicted::default();
        for round in 0..LEAVES_MAX {
            if done.bytes >= bytes {
                break;
            }
            let Some((space, shard)) = choose(&spaces, whose) else {
                break;
            };
            self.evict_leaf(space, shard, whose, round >= KIND_LEAVES, bytes, &mut done);
        }
        done.pages
    }

    /// Looks at the oldest leaf of one shard.
    fn evict_leaf(
        &self,
        space: &Space,
        shard: &Shard,
        whose: Whose<'_>,
        is_forced: bool,
        bytes: u64,
        done: &mut Evicted,
    ) {
        let only = match whose {
            Whose::Client(account) if space.keeping == Keeping::Shared => {
                space.member_number(account)
            }
            _ => None,
        };
        let (so_far, now) = (std::cell::Cell::new(done.bytes), self.tick());
        let mut pages = 0;
        let mut index = shard.lock();
        let is_wanted = |slot: &Slot| {
            if so_far.get() >= bytes {
                Wanted::Enough
            } else if only.is_some_and(|owner| owner != slot.owner) {
                Wanted::No
            } else {
                Wanted::Yes
            }
        };
        index.evict_oldest(now, is_forced, space.ledger(self), is_wanted, |slot| {
            so_far.set(so_far.get() + cost_bytes(slot.len()) + size_of::<Slot>() as u64);
            pages += 1;
            space.with_owner(slot.owner, |account| account.tally.evicted(1));
            space.page_out(self, &slot);
        });
        shard.publish(&index);
        drop(index);
        space.tally.evicted(pages);
        self.tally.evicted(pages);
        done.bytes = so_far.get();
        done.pages += pages;
    }
}

#[derive(Default)]
struct Evicted {
    bytes: u64,
    pages: u64,
}

/// The shard with the oldest leaf among those concerned.
fn choose<'a>(spaces: &'a [Arc<Space>], whose: Whose<'_>) -> Option<(&'a Space, &'a Shard)> {
    let oldest = |is_concerned: &dyn Fn(&Space) -> bool| {
        spaces
            .iter()
            .filter(|space| is_concerned(space))
            .flat_map(|space| space.shards().iter().map(move |shard| (&**space, shard)))
            .filter(|(_, shard)| shard.oldest_stamp() != u64::MAX)
            .min_by_key(|(_, shard)| shard.oldest_stamp())
    };
    let is_private = |space: &Space| space.keeping == Keeping::Exclusive;
    match whose {
        Whose::Any => oldest(&|space| is_private(space) && space.payer.is_over_quota())
            .or_else(|| oldest(&|_| true)),
        Whose::Client(account) => oldest(&|space| {
            is_private(space) && Arc::ptr_eq(&space.payer, account)
        })
        .or_else(|| oldest(&|space| !is_private(space) && space.member_number(account).is_some())),
    }
}
