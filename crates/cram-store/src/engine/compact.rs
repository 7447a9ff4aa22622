// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Compaction: moving the records that live out of spans in which most are
//! dead, so that the spans are free.
//!
//! One span at a time, whoever does it: the background thread, as long as it is
//! worth it; a put that finds no room; the operator. Each record is moved under
//! the lock that its life hangs on, which is held for a copy of at most 4 KiB.
//! Nobody else waits.
//!
//! What is moved goes with its like: to a head for its age (J. Rosenblum's and
//! S. Rumble's cleaners find that data of like age dies together: "The Design
//! and Implementation of a Log-Structured File System", SOSP 1991;
//! "Log-structured Memory for DRAM-based Storage", FAST 2014), or beside the
//! span that it comes from in a queue of ephemeral pages.

use crate::arena::{Layout, Role, SpanInfo, Trust, now};
use crate::engine::Core;
use crate::engine::evict::Whose;
use crate::ledger::replace::How;
use crate::log::Target;
use crate::log::queue::{Class, Visit};
use crate::machine::budget::Shortage;
use crate::machine::sync::atomic::Ordering::Relaxed;

/// Dead bytes below this share of a span (as 1 / n) are not worth moving the rest.
const WORTH: u32 = 16;
/// The same, when the operator wants every byte.
const WORTH_ALL: u32 = 64;
/// Spans that one put empties at the most: as many as it takes to fill another one, if each is just
/// worth it.
const PUT_SPANS: u32 = 2 * WORTH;

/// What is looked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    /// The span that frees most at least cost.
    Soonest,
    /// The one that pays best in the long run: cold ones sooner, since what is warm will be dead
    /// soon, and need not be moved at all.
    Best,
}

/// What one step of compaction did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Step {
    /// A span was emptied.
    Emptied,
    /// No span is worth it.
    Nothing,
    /// There is no room to move anything to.
    NoRoom,
}

impl Core {
    /// Makes room for a span: evicts what may be evicted, else compacts. False when all is in vain.
    ///
    /// Takes all kinds of locks: call it with none held.
    pub(crate) fn make_span(&self) -> bool {
        if self.has_span() {
            return true;
        }
        // One after the other: who has waited may find what it wants.
        let _making = self.making.lock();
        if self.has_span() {
            return true;
        }
        if self.is_futile() && self.evictable_bytes.load(Relaxed) == 0 {
            return false;
        }
        // What is freed from here on says that it is not.
        self.set_futile(true);
        let is_made = self.try_to_make_span();
        if is_made {
            self.set_futile(false);
        }
        is_made
    }

    fn try_to_make_span(&self) -> bool {
        if self.evictable_bytes.load(Relaxed) > 0 && self.evict(Whose::Any) > 0 && self.has_span() {
            return true;
        }
        let mut is_sealed = false;
        for _ in 0..PUT_SPANS {
            if self.has_span() {
                return true;
            }
            match self.compact_one(Wish::Soonest, WORTH) {
                Step::Emptied => (),
                Step::NoRoom => break,
                Step::Nothing if is_sealed => break,
                Step::Nothing => {
                    // What is dead in spans that are being filled.
                    self.seal_worthwhile();
                    is_sealed = true;
                }
            }
        }
        self.has_span()
    }

    /// One step for the background thread.
    pub(crate) fn compact_best(&self) -> Step {
        self.compact_one(Wish::Best, WORTH)
    }

    /// Compacts as far as it goes. How many spans were emptied.
    pub(crate) fn compact_all(&self) -> u64 {
        self.seal_worthwhile();
        let mut emptied = 0;
        // Each step frees at least a 64th of a span, so it ends; the bound is for when others put
        // and flush all the time.
        let most = 2 * u64::from(WORTH_ALL) * u64::from(self.arena.layout().spans);
        while emptied < most && self.compact_one(Wish::Soonest, WORTH_ALL) == Step::Emptied {
            emptied += 1;
        }
        self.arena.trim(0);
        emptied
    }

    /// Seals the spans that are being filled if much in them is dead.
    fn seal_worthwhile(&self) {
        let layout = self.arena.layout();
        let accounts = self.accounts.all();
        let queues = accounts.iter().flat_map(|account| account.queue.heads());
        for head in self.log_heads().chain(queues) {
            let info = head
                .open_span()
                .and_then(|span| self.arena.spans().info(span));
            if info.is_some_and(|info| info.live == 0 || is_worth(&info, layout, WORTH_ALL)) {
                self.arena.seal_head(head);
            }
        }
    }

    /// Seals the spans of persistent pages that are being filled.
    pub(crate) fn seal_heads(&self) {
        for head in self.log_heads() {
            self.arena.seal_head(head);
        }
    }

    /// Empties one span that is worth it.
    fn compact_one(&self, wish: Wish, worth: u32) -> Step {
        let mut compactor = self.compactor.lock();
        let layout = self.arena.layout();
        let spans = self.arena.spans();
        compactor
            .stuck
            .retain(|visit| visit.info(&self.arena).is_some());
        let time = now();
        let victim = spans
            .in_use()
            .filter(|info| info.is_sealed && is_worth(info, layout, worth))
            .filter(|info| !compactor.stuck.contains(&visit_of(info)))
            .max_by_key(|info| match wish {
                Wish::Soonest => u64::from(info.dead(layout)),
                Wish::Best => benefit(info, layout, time),
            });
        let Some(victim) = victim else {
            return Step::Nothing;
        };
        let is_done = self.empty_span(&victim, time);
        match is_done {
            Err(Shortage::Store | Shortage::Quota) => Step::NoRoom,
            Ok(()) => {
                let left = visit_of(&victim).info(&self.arena);
                if left.is_some_and(|info| info.live > 0) {
                    compactor.stuck.push(visit_of(&victim));
                }
                Step::Emptied
            }
        }
    }

    /// Moves everything that lives out of a span.
    fn empty_span(&self, victim: &SpanInfo, time: u64) -> Result<(), Shortage> {
        let _pin = self.arena.pin(self.arena.layout().place(victim.span, 0));
        let visit = visit_of(victim);
        if visit.info(&self.arena).is_none() {
            return Ok(());
        }
        let owner = match victim.role {
            Role::Fresh(owner) | Role::Proven(owner) => self.accounts.get(owner),
            Role::Pages | Role::Catalogue => None,
        };
        let age = time.saturating_sub(victim.born);
        let target = match (victim.role, &owner) {
            // Which of the two each record says.
            (Role::Catalogue, _) => Target::Catalogue(0),
            (Role::Fresh(_), Some(owner)) => Target::Beside(&owner.queue, Class::Fresh, visit),
            (Role::Proven(_), Some(owner)) => Target::Beside(&owner.queue, Class::Proven, visit),
            _ if self.arena.spans().is_settled(victim.span) => Target::Cold,
            _ => Target::Log(self.aged_head(age)),
        };
        let how = How::moved(target, Some(victim.born));
        let mut walk = self.arena.walk(victim.span, victim.filled);
        while let Some(found) = walk.next() {
            let is_real = found.is_live && self.relocate(&found, found.header, how)?;
            if found.trust == Trust::Nothing {
                walk.verified(&found, is_real);
            }
        }
        Ok(())
    }
}

fn visit_of(info: &SpanInfo) -> Visit {
    Visit {
        span: info.span,
        sequence: info.sequence,
    }
}

fn is_worth(info: &SpanInfo, layout: Layout, worth: u32) -> bool {
    let dead = info.dead(layout);
    dead > 0 && dead >= layout.span_granules() / worth
}

/// What is freed, over what it costs, times how long it will stay so: Rosenblum's rule.
fn benefit(info: &SpanInfo, layout: Layout, time: u64) -> u64 {
    let age = time.saturating_sub(info.born).saturating_add(1);
    let cost = u64::from(info.live) + u64::from(layout.span_granules());
    u64::from(info.dead(layout))
        .saturating_mul(age.min(1 << 24))
        .saturating_mul(1024)
        / cost
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use crate::{
        ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store, StoreConfig,
    };

    /// A put that cannot be helped is refused without a look at the spans, for which it would need
    /// the compactor: held here, so that it would wait for ever.
    #[test]
    fn a_refusal_looks_at_no_span() {
        let store = Store::new(StoreConfig {
            capacity_bytes: 2 << 20,
            background: None,
            ..StoreConfig::default()
        })
        .unwrap();
        let client = store.add_client("a", None).unwrap();
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(0), spec).unwrap();
        let (pool, mut scratch) = (client.pool(PoolId(0)).unwrap(), Scratch::new());
        let (mut page, mut state) = ([0; PAGE_SIZE], 0_u64);
        let mut put = |index: u32| {
            for word in page.as_chunks_mut::<8>().0 {
                state = crate::arena::mix(state.wrapping_add(1));
                *word = state.to_le_bytes();
            }
            pool.put(ObjectId([0; 3]), index, &page, &mut scratch)
        };
        let mut index = 0;
        while put(index) == PutResult::Stored {
            index += 1;
        }
        let compactor = store.core.compactor.lock();
        for more in 1..100 {
            assert_ne!(put(index + more), PutResult::Stored);
        }
        drop(compactor);
        // What is freed is found again.
        assert_eq!(pool.flush_page(ObjectId([0; 3]), 0, 40), 40);
        assert_eq!(put(0), PutResult::Stored);
        store.check().unwrap();
    }
}
