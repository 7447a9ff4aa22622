// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an arena will need when it is opened, found out before anything in it is
//! touched: so what does not fit is refused and left as it was, and what does
//! gets its tables at their final size, since there is no room for a table and
//! one twice as large beside it when a store was full.
//!
//! Of ephemeral pages nothing is promised, so nothing is counted: their tables
//! grow as they come, as far as there is room.

use std::collections::{BTreeMap, HashMap};

use hashbrown::HashTable;

use super::{Needed, Reader};
use crate::arena::{Found, Kind, Role, SpanHeader, Trust, mix};
use crate::codec::Scratch;
use crate::ledger::account::{Account, Holder, Purse};
use crate::machine::budget::Shortage;
use crate::machine::sync::Mutex;
use crate::machine::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::space::leaf::{PAGES_PER_LEAF, slots_bytes};
use crate::space::tables::{grow_table, table_bytes};
use crate::spec::PAGE_SIZE;

/// What was seen of one leaf: its object's number (28 bits), its region (26) and how many pages it has
/// (7), in one word.
#[derive(Clone, Copy)]
struct SeenLeaf(u64);

impl SeenLeaf {
    fn new(number: u32, index: u32) -> Self {
        Self(u64::from(number) << 33 | u64::from(index / PAGES_PER_LEAF) << 7)
    }

    fn name(self) -> u64 {
        self.0 >> 7
    }

    fn hash(self) -> u64 {
        mix(self.name())
    }

    fn number(self) -> u32 {
        u32::try_from(self.0 >> 33).unwrap_or(u32::MAX)
    }

    fn region(self) -> u32 {
        u32::try_from(self.name() & ((1 << 26) - 1)).unwrap_or(u32::MAX)
    }

    fn pages(self) -> usize {
        // Masked to 7 bits.
        usize::try_from(self.0 & 0x7f).unwrap_or(0)
    }

    /// With more pages: of those that a killed process left twice, it has one.
    fn plus(self, pages: u64) -> Self {
        let sum = (self.0 & 0x7f) + pages;
        Self(self.0 & !0x7f | sum.min(u64::from(PAGES_PER_LEAF)))
    }
}

/// Several, so that threads do not wait for each other.
const TABLES: usize = 16;

#[derive(Default)]
struct Seen {
    leaves: HashTable<SeenLeaf>,
    bytes: u64,
}

/// See the module's text.
pub(super) struct Survey {
    /// The spans in which something lives.
    pub(super) kept: Vec<(SpanHeader, u32)>,
    /// The others.
    pub(super) dead: Vec<u32>,
    seen: Vec<Mutex<Seen>>,
    /// For each domain, a number above that of every image.
    images: Mutex<BTreeMap<u32, u32>>,
}

impl Survey {
    fn note_leaf(&self, leaf: SeenLeaf, pages: u64, purse: &Purse<'_>) -> Result<(), Shortage> {
        let hash = leaf.hash();
        // Bits that the table inside does not look at.
        let at = usize::try_from(hash >> 32 & 0xffff).unwrap_or(0) % TABLES;
        let Some(seen) = self.seen.get(at) else {
            return Ok(());
        };
        let Seen { leaves, bytes } = &mut *seen.lock();
        if let Some(known) = leaves.find_mut(hash, |known| known.name() == leaf.name()) {
            *known = known.plus(pages);
            return Ok(());
        }
        grow_table(leaves, bytes, purse, |leaf| leaf.hash())?;
        leaves.insert_unique(hash, leaf.plus(pages), |leaf| leaf.hash());
        Ok(())
    }

    fn note_image(&self, domain: u32, number: u32) {
        let mut images = self.images.lock();
        let numbers = images.entry(domain).or_default();
        *numbers = (*numbers).max(number.saturating_add(1));
    }

    fn held_bytes(&self) -> u64 {
        let tables = self.seen.iter();
        tables.map(|seen| table_bytes(&seen.lock().leaves)).sum()
    }
}

/// Pages of one leaf that follow each other in the log, which they mostly do: noted at once.
struct Run<'a> {
    survey: &'a Survey,
    purse: Purse<'a>,
    leaf: SeenLeaf,
    pages: u64,
    shortage: Result<(), Shortage>,
}

impl Run<'_> {
    fn page(&mut self, number: u32, index: u32) {
        let leaf = SeenLeaf::new(number, index);
        if self.leaf.name() != leaf.name() {
            self.end();
            self.leaf = leaf;
        }
        self.pages += 1;
    }

    fn end(&mut self) {
        let pages = std::mem::take(&mut self.pages);
        if pages > 0 && self.shortage.is_ok() {
            self.shortage = self.survey.note_leaf(self.leaf, pages, &self.purse);
        }
    }
}

impl Reader<'_> {
    /// Walks all spans, on so many threads, and charges what they will keep. Writes nothing.
    pub(super) fn survey(
        &self,
        found: &[(SpanHeader, u32)],
        threads: usize,
    ) -> Result<Survey, Shortage> {
        let survey = Survey {
            kept: Vec::new(),
            dead: Vec::new(),
            seen: (0..TABLES).map(|_| Mutex::default()).collect(),
            images: Mutex::default(),
        };
        let is_kept: Vec<_> = found.iter().map(|_| AtomicU64::new(0)).collect();
        let next = AtomicU64::new(0);
        // The tables are gone before anybody is there to be billed.
        let nobody = Account::new(0, Holder::Gone, "", None, 1);
        let work = || -> Result<(), Shortage> {
            let mut run = Run {
                survey: &survey,
                purse: Purse {
                    budget: &self.core.budget,
                    payer: &nobody,
                },
                leaf: SeenLeaf(u64::MAX),
                pages: 0,
                shortage: Ok(()),
            };
            loop {
                let at = usize::try_from(next.fetch_add(1, Relaxed)).unwrap_or(usize::MAX);
                let (Some(span), Some(kept)) = (found.get(at), is_kept.get(at)) else {
                    run.end();
                    return run.shortage;
                };
                if let Some(filled) = self.survey_span(span, &mut run) {
                    kept.store(1, Relaxed);
                    self.arena().spans().charge_kept(span.0.span, filled)?;
                }
            }
        };
        in_parallel(threads, work)?;
        let mut survey = survey;
        for (span, kept) in found.iter().zip(is_kept) {
            if kept.load(Relaxed) == 1 {
                survey.kept.push(*span);
            } else {
                survey.dead.push(span.0.span);
            }
        }
        Ok(survey)
    }

    /// How far a span is filled, in granules; `None` when nothing in it lives.
    fn survey_span(&self, (span, granules): &(SpanHeader, u32), run: &mut Run<'_>) -> Option<u32> {
        let arena = self.arena();
        let layout = arena.layout();
        let (mut filled, mut is_alive) = (layout.first_granule(), false);
        let mut walk = arena.walk(span.span, *granules);
        while let Some(found) = walk.next() {
            let header = &found.header;
            if found.trust == Trust::Nothing {
                // It may be a record or not; nothing behind it is missed either way.
                walk.verified(&found, false);
            }
            let end = layout.granule_of(found.place) + layout.granules(header.record_bytes());
            filled = filled.max(end);
            is_alive |= found.is_live;
            if found.is_live && span.role == Role::Pages {
                self.survey_record(&found, run);
            }
        }
        if walk.was_lost() {
            filled = *granules;
        }
        is_alive.then_some(filled)
    }

    fn survey_record(&self, found: &Found, run: &mut Run<'_>) {
        let header = &found.header;
        match header.kind {
            Kind::Page | Kind::Alias => run.page(header.number, header.index),
            Kind::Image => {
                // A number that is wrong must not make a table of any size.
                let is_sure = found.trust == Trust::Header
                    || self.is_whole(found, &mut Scratch::new(), &mut [0; PAGE_SIZE]);
                if is_sure {
                    run.survey.note_image(header.number, header.index);
                }
            }
            Kind::Account | Kind::Space | Kind::Pool | Kind::Object => (),
        }
    }

    /// Makes all tables of persistent pages at their final size. The objects have been entered.
    pub(super) fn make_tables(
        &self,
        survey: &mut Survey,
        objects: &Needed,
    ) -> Result<(), Shortage> {
        let core = self.core;
        let mut extents: HashMap<(u32, usize), (usize, usize)> = HashMap::new();
        let mut slots = 0;
        for seen in &survey.seen {
            for leaf in &seen.lock().leaves {
                let Some(object) = core.objects.get(leaf.number()) else {
                    continue;
                };
                let Some(space) = core
                    .space(object.space)
                    .filter(|space| !space.is_evictable())
                else {
                    continue;
                };
                let shard = space.shard_of(object.id, leaf.region());
                let is_first = !objects.is_claimed(leaf.number());
                if !objects.claim(leaf.number(), shard) {
                    continue;
                }
                let (leaves, numbers) = extents.entry((object.space, shard)).or_default();
                *leaves += 1;
                *numbers += usize::from(is_first);
                slots += slots_bytes(leaf.pages().next_power_of_two());
            }
        }
        for ((space, shard), (leaves, numbers)) in extents {
            if let Some(space) = core.space(space)
                && let Some(shard) = space.shards().get(shard)
            {
                let mut index = shard.lock();
                index.reserve_exact(leaves, numbers, &space.purse(core))?;
                shard.publish(&index);
            }
        }
        for (domain, numbers) in std::mem::take(&mut *survey.images.lock()) {
            let domain = u16::try_from(domain).ok();
            if let Some(domain) = domain.and_then(|number| core.domain(number)) {
                self.make_images(&domain, numbers)?;
            }
        }
        let held = survey.held_bytes();
        survey.seen.clear();
        core.budget.release(held);
        // Taken leaf by leaf later, and nobody takes it before.
        core.budget.reserve(slots)?;
        core.budget.release(slots);
        Ok(())
    }

    fn make_images(
        &self,
        domain: &crate::ledger::domain::Domain,
        numbers: u32,
    ) -> Result<(), Shortage> {
        let budget = &self.core.budget;
        let bytes = crate::ledger::domain::Images::bytes_for(numbers);
        budget.reserve(bytes)?;
        if domain.images.lock().make_room_for(numbers) {
            Ok(())
        } else {
            budget.release(bytes);
            Err(Shortage::Store)
        }
    }
}

/// Does the work on so many threads.
pub(super) fn in_parallel(
    threads: usize,
    work: impl Fn() -> Result<(), Shortage> + Sync,
) -> Result<(), Shortage> {
    if threads == 1 {
        return work();
    }
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(&work)).collect();
        let mut results = workers.into_iter().map(|worker| worker.join());
        results.try_for_each(|result| result.unwrap_or(Err(Shortage::Store)))
    })
}
