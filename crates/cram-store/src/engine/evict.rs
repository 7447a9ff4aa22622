// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Eviction of ephemeral pages: of a client that is over its quota first, then
//! of the one that has most beyond its share; persistent pages never.
//!
//! Pages go span by span, the oldest first (see [`crate::log::queue`]): those that
//! were used since the last look are moved to the proven ones, the others go. A
//! span is walked without any lock; each page is taken out under its shard's.

use std::sync::Arc;

use crate::arena::{Found, Header, Kind, Role, SpanInfo, Trust};
use crate::engine::Core;
use crate::ledger::account::{Account, Holder};
use crate::ledger::replace::How;
use crate::ledger::stats::Event;
use crate::log::Target;
use crate::log::queue::{Class, SharedCursor, Visit};
use crate::machine::sync::atomic::Ordering::Relaxed;
use crate::space::Space;
use crate::space::index::Key;

/// Spans looked at in one call before pages in use go too: a put must not walk the whole store.
const KIND_SPANS: u32 = 8;
/// Spans looked at in one call, at the most.
const SPANS_MAX: u32 = 64;

/// Records of shared pools that one put looks at, at the most.
const SHARED_RECORDS: u32 = 256;
/// Spans that it looks into.
const SHARED_SPANS: u32 = 4;

/// Whose pages may go.
#[derive(Clone, Copy)]
pub(crate) enum Whose<'a> {
    /// Anybody's: to make room for a span.
    Any,
    /// Only this client's, until that many bytes are off its bill.
    Client(&'a Account, u64),
    /// The same, for a put that waits: of what the client has among others' pages, it looks at a
    /// little, and the next put at what is behind it.
    Put(&'a Account, u64),
}

/// What to do with the pages of a span.
struct Sweep<'a> {
    /// Only pages of this account.
    only: Option<u16>,
    /// Pages in use go too.
    is_forced: bool,
    /// The span at hand is one of fresh pages.
    is_fresh: bool,
    /// Enough is what was asked for, or else the whole span.
    bytes: u64,
    done: &'a mut Evicted,
}

#[derive(Default)]
struct Evicted {
    bytes: u64,
    pages: u64,
}

impl Core {
    /// Evicts what `whose` says, as far as it may be. How many pages went.
    ///
    /// Takes the shards' locks: call it with none of them held.
    pub(crate) fn evict(&self, whose: Whose<'_>) -> u64 {
        let mut done = Evicted::default();
        match whose {
            Whose::Client(account, bytes) => {
                self.evict_own(account, bytes, &mut done);
                self.evict_shared(account, bytes, &mut done);
            }
            Whose::Put(account, bytes) => {
                self.evict_own(account, bytes, &mut done);
                self.evict_shared_some(account, bytes, &mut done);
            }
            Whose::Any => {
                for round in 0..SPANS_MAX {
                    let Some(account) = self.victim().filter(|_| !self.has_span()) else {
                        break;
                    };
                    let sweep = Sweep {
                        only: None,
                        is_forced: round >= KIND_SPANS,
                        is_fresh: false,
                        bytes: u64::MAX,
                        done: &mut done,
                    };
                    if !self.evict_oldest(&account, sweep) {
                        break;
                    }
                }
            }
        }
        done.pages
    }

    /// From the client's own queue.
    fn evict_own(&self, account: &Account, bytes: u64, done: &mut Evicted) {
        // All of them, if need be: the operator may ask for any amount.
        let mut round = 0;
        while done.bytes < bytes {
            let sweep = Sweep {
                only: None,
                is_forced: round >= KIND_SPANS,
                is_fresh: false,
                bytes,
                done,
            };
            if !self.evict_oldest(account, sweep) {
                break;
            }
            round += 1;
        }
    }

    /// What the client put into shared pools.
    fn evict_shared(&self, account: &Account, bytes: u64, done: &mut Evicted) {
        if account.evictable_bytes.load(Relaxed) == 0 {
            return;
        }
        let shared = self.accounts.all();
        let shared = shared
            .iter()
            .filter(|account| account.holder == Holder::SharedPool);
        for visit in shared.flat_map(|shared| shared.queue.all()) {
            if done.bytes >= bytes {
                break;
            }
            let Some(info) = visit.info(&self.arena) else {
                continue;
            };
            let mut sweep = Sweep {
                only: Some(account.number),
                is_forced: true,
                is_fresh: false,
                bytes,
                done,
            };
            self.sweep(visit, &info, &mut sweep);
        }
    }

    /// As [`Self::evict_shared`], but looks at [`SHARED_RECORDS`] records at the most, from where the
    /// last call ended.
    fn evict_shared_some(&self, account: &Account, bytes: u64, done: &mut Evicted) {
        if done.bytes >= bytes || account.evictable_bytes.load(Relaxed) == 0 {
            return;
        }
        let mut cursor = account.shared_cursor.lock();
        let mut left = SHARED_RECORDS;
        for _ in 0..SHARED_SPANS {
            let Some((visit, granule)) = self.shared_span(&mut cursor) else {
                return;
            };
            let _pin = self.arena.pin(self.arena.layout().place(visit.span, 0));
            let Some(info) = visit.info(&self.arena) else {
                cursor.next_span();
                continue;
            };
            let mut sweep = Sweep {
                only: Some(account.number),
                is_forced: true,
                is_fresh: matches!(info.role, Role::Fresh(_)),
                bytes,
                done,
            };
            let mut walk = self.arena.walk_from(visit.span, granule, info.filled);
            while let Some(found) = walk.next() {
                if found.trust == Trust::Nothing {
                    walk.verified(&found, false);
                } else if found.is_live {
                    self.evict_record(&found, &mut sweep);
                }
                left -= 1;
                if left == 0 || sweep.done.bytes >= bytes {
                    cursor.stay(visit, walk.granule());
                    return;
                }
            }
            cursor.next_span();
        }
    }

    /// The span of a shared pool that the cursor is at, and the granule in it.
    fn shared_span(&self, cursor: &mut SharedCursor) -> Option<(Visit, u32)> {
        // Once around: from the cursor to the last, and from the first.
        for _ in 0..2 {
            let found = self.accounts.find_from(cursor.account, |account| {
                if account.number != cursor.account {
                    (cursor.account, cursor.at) = (account.number, 0);
                }
                (account.holder == Holder::SharedPool)
                    .then(|| account.queue.visit_at(cursor.at))
                    .flatten()
            });
            if let Some(visit) = found {
                return Some((visit, cursor.granule_in(visit)));
            }
            *cursor = SharedCursor::default();
        }
        None
    }

    /// Who is to give pages up: who is over quota; else who uses most beyond a share by weight; else
    /// who has the oldest page.
    fn victim(&self) -> Option<Arc<Account>> {
        let all = self.accounts.all();
        let candidates: Vec<_> = all
            .iter()
            .filter_map(|account| Some((account.queue.age(&self.arena)?, account)))
            .collect();
        let over_quota = candidates
            .iter()
            .filter(|(_, account)| account.is_over_quota())
            .min_by_key(|(age, _)| *age);
        let shares = self.shares(&all);
        let most = || {
            candidates
                .iter()
                .map(|(_, account)| (shares.excess_bytes(account), account))
                .filter(|(excess, _)| *excess > 0)
                .max_by_key(|(excess, _)| *excess)
                .map(|(_, account)| Arc::clone(account))
        };
        let oldest = || {
            candidates
                .iter()
                .min_by_key(|(age, _)| *age)
                .map(|(_, account)| Arc::clone(account))
        };
        over_quota
            .map(|(_, account)| Arc::clone(account))
            .or_else(most)
            .or_else(oldest)
    }

    /// Evicts from an account's oldest span. False when it has none.
    fn evict_oldest(&self, account: &Account, mut sweep: Sweep<'_>) -> bool {
        let queue = &account.queue;
        let Some((class, visit, info)) = queue.oldest(&self.arena) else {
            return false;
        };
        if !info.is_sealed {
            // Nothing else is left: what is being filled is the oldest.
            for head in queue.heads() {
                if head.open_span() == Some(visit.span) {
                    self.arena.seal_head(head);
                }
            }
        }
        if self.sweep(visit, &info, &mut sweep) {
            queue.remove(class, visit);
        }
        true
    }

    /// Evicts from one span until there is enough. True when the whole span was looked at.
    fn sweep(&self, visit: Visit, info: &SpanInfo, sweep: &mut Sweep<'_>) -> bool {
        let _pin = self.arena.pin(self.arena.layout().place(visit.span, 0));
        let Some(now) = visit.info(&self.arena) else {
            return true;
        };
        sweep.is_fresh = matches!(now.role, Role::Fresh(_));
        if !now.is_sealed && sweep.only.is_none() {
            // Sealed a moment ago and opened anew cannot be, since the sequence number is the same:
            // another thread is filling it.
            return true;
        }
        let mut walk = self.arena.walk(visit.span, info.filled.max(now.filled));
        while let Some(found) = walk.next() {
            if found.trust == Trust::Nothing {
                // Whose page it is cannot be relied on; the index still leads to it.
                walk.verified(&found, false);
                continue;
            }
            if found.is_live {
                self.evict_record(&found, sweep);
            }
            if sweep.done.bytes >= sweep.bytes {
                return false;
            }
        }
        true
    }

    fn evict_record(&self, found: &Found, sweep: &mut Sweep<'_>) {
        if !matches!(found.header.kind, Kind::Page | Kind::Alias) {
            return;
        }
        let Some(object) = self.objects.get(found.header.number) else {
            return;
        };
        if sweep.only.is_some_and(|only| only != object.owner) {
            return;
        }
        let Some(space) = self.space(object.space) else {
            return;
        };
        let key = Key {
            object: object.id,
            index: found.header.index,
        };
        if !space.is_evictable() {
            return;
        }
        let is_spared = found.header.is_used && !sweep.is_forced;
        if is_spared && self.prove(&space, found) {
            return;
        }
        if !space.remove(self, &key, |place| place == found.place) {
            return;
        }
        // A proven page has had its chance.
        if let Some(ghosts) = self.ghosts().filter(|_| sweep.is_fresh) {
            ghosts.remember(space.ghost_hash(&key));
        }
        space.tally.count(Event::Evicted, 1);
        if space.is_shared() {
            self.accounts
                .with(object.owner, |owner| owner.tally.count(Event::Evicted, 1));
        }
        sweep.done.pages += 1;
        sweep.done.bytes += space.bill_bytes(self, found.header.len);
    }

    /// Moves a page that was used to the proven ones. False when there is no room.
    fn prove(&self, space: &Space, found: &Found) -> bool {
        let header = Header {
            is_used: false,
            ..found.header
        };
        let target = Target::Queue(&space.payer.queue, Class::Proven);
        self.relocate(found, header, How::moved(target, None))
            .is_ok()
    }
}
