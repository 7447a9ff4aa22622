// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All spans: which are free, what the others are for, and how much of the
//! host's memory they have.
//!
//! A span has memory from its beginning up to where it was populated, and
//! exactly that is charged to the budget, before it is taken. So a span that is
//! hardly filled holds hardly anything.

use std::sync::Arc;
use std::sync::atomic::{
    AtomicU32, AtomicU64 as PlainAtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release,
};

use super::Layout;
use super::region::Region;
use super::span::{Freed, Life};
use super::span_header::{Role, SpanHeader, write_header};
use crate::budget::{Budget, Shortage};
use crate::sync::Mutex;

/// How much of a span is populated at a time, in bytes: enough for one call to the host to be worth
/// its while, little enough not to hold memory that is not filled yet.
const POPULATE_BYTES: u64 = 128 << 10;

/// Who asks for a span.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// A put. Leaves the reserve alone.
    Normal,
    /// What will free more than it takes: compaction and eviction.
    Making,
}

/// With room for no more spans than this, one is set aside as the reserve.
const LAST_SPANS: u64 = 3;

/// One span's book-keeping.
struct Span {
    life: Life,
    sequence: PlainAtomicU64,
    role: PlainAtomicU64,
    /// When the youngest page in it came, in seconds of Unix time.
    born: PlainAtomicU64,
    /// Granules that are filled.
    filled: AtomicU32,
    /// Granules from the beginning on that the host has given memory for.
    populated: AtomicU32,
    /// Granules that are charged to the budget; not less than those populated.
    charged: AtomicU32,
    /// The sequence number of the life in which damage was found in it, so that not all of it is
    /// records.
    damaged: PlainAtomicU64,
    /// The sequence number of the life in which its pages were looked at for recompression.
    settled: PlainAtomicU64,
}

/// A reading of a span that is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpanInfo {
    pub(crate) span: u32,
    pub(crate) role: Role,
    pub(crate) sequence: u64,
    pub(crate) born: u64,
    pub(crate) filled: u32,
    pub(crate) live: u32,
    pub(crate) is_sealed: bool,
}

impl SpanInfo {
    /// Granules of dead records.
    pub(crate) fn dead(&self, layout: Layout) -> u32 {
        self.filled
            .saturating_sub(layout.first_granule())
            .saturating_sub(self.live)
    }
}

struct FreeList {
    /// Free, and with memory.
    warm: Vec<u32>,
    /// Free, and without.
    bare: Vec<u32>,
    /// One that is charged as a whole and left for compaction and eviction, so that they can make
    /// room when there is none.
    reserve: Option<u32>,
}

/// See the module's text.
pub(crate) struct Spans {
    region: Region,
    layout: Layout,
    budget: Arc<Budget>,
    /// Keys the spans' headers.
    secret: u64,
    table: Box<[Span]>,
    free: Mutex<FreeList>,
    /// How many are in `FreeList::warm`.
    warm: AtomicU32,
    /// Granules charged in all.
    charged: PlainAtomicU64,
    next_sequence: PlainAtomicU64,
}

impl Spans {
    /// All free, and bare.
    pub(super) fn new(region: Region, layout: Layout, budget: Arc<Budget>, secret: u64) -> Self {
        let table = (0..layout.spans).map(|_| Span {
            life: Life::new(),
            sequence: PlainAtomicU64::new(0),
            role: PlainAtomicU64::new(0),
            born: PlainAtomicU64::new(0),
            filled: AtomicU32::new(0),
            populated: AtomicU32::new(0),
            charged: AtomicU32::new(0),
            damaged: PlainAtomicU64::new(0),
            settled: PlainAtomicU64::new(0),
        });
        let mut warm = Vec::new();
        warm.reserve_exact(layout.spans as usize);
        Self {
            region,
            layout,
            budget,
            secret,
            table: table.collect(),
            free: Mutex::new(FreeList {
                warm,
                // The lowest is taken first; span 0 has the superblock.
                bare: (1..layout.spans).rev().collect(),
                reserve: None,
            }),
            warm: AtomicU32::new(0),
            charged: PlainAtomicU64::new(0),
            next_sequence: PlainAtomicU64::new(1),
        }
    }

    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    pub(super) fn table_bytes(&self) -> u64 {
        (self.table.len() * (size_of::<Span>() + 2 * size_of::<u32>())) as u64
    }

    fn span(&self, span: u32) -> &Span {
        &self.table[span as usize]
    }

    pub(crate) fn life(&self, span: u32) -> &Life {
        &self.span(span).life
    }

    pub(crate) fn sequence(&self, span: u32) -> u64 {
        self.span(span).sequence.load(Acquire)
    }

    pub(crate) fn set_filled(&self, span: u32, granules: u32) {
        self.span(span).filled.store(granules, Release);
    }

    /// A reading; `None` of a span that is free.
    pub(crate) fn info(&self, span: u32) -> Option<SpanInfo> {
        let entry = self.table.get(span as usize)?;
        if entry.life.is_free() {
            return None;
        }
        Some(SpanInfo {
            span,
            role: Role::from_word(entry.role.load(Acquire))?,
            sequence: entry.sequence.load(Acquire),
            born: entry.born.load(Relaxed),
            filled: entry.filled.load(Acquire),
            live: entry.life.live_granules(),
            is_sealed: entry.life.is_sealed(),
        })
    }

    /// Readings of all spans that are in use.
    pub(crate) fn in_use(&self) -> impl Iterator<Item = SpanInfo> {
        (0_u32..)
            .take(self.table.len())
            .filter_map(|span| self.info(span))
    }

    /// A page as young as this came into the span.
    pub(crate) fn rejuvenate(&self, span: u32, born: u64) {
        self.span(span).born.fetch_max(born, Relaxed);
    }

    /// Whether not all of it is records.
    pub(crate) fn is_damaged(&self, span: u32) -> bool {
        let entry = self.span(span);
        entry.damaged.load(Relaxed) == entry.sequence.load(Relaxed)
    }

    /// It is so, in the present life of the span.
    pub(crate) fn note_damage(&self, span: u32) {
        let entry = self.span(span);
        entry.damaged.store(entry.sequence.load(Relaxed), Relaxed);
    }

    /// Whether the span's pages were looked at for recompression.
    pub(crate) fn is_settled(&self, span: u32) -> bool {
        let entry = self.span(span);
        entry.settled.load(Relaxed) == entry.sequence.load(Relaxed)
    }

    /// They were, in that life of the span.
    pub(crate) fn settle(&self, span: u32, sequence: u64) {
        self.span(span).settled.store(sequence, Relaxed);
    }

    /// Bytes that are charged to the budget for spans.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.charged.load(Relaxed) << self.layout.granule_shift
    }

    /// Free spans that have memory.
    pub(crate) fn warm(&self) -> usize {
        self.warm.load(Relaxed) as usize
    }

    /// How many more whole spans there could be.
    fn room(&self, free: &FreeList) -> u64 {
        let bare = self.budget.room_for_spans() / self.layout.span_bytes();
        free.warm.len() as u64 + bare.min(free.bare.len() as u64)
    }

    /// See [`super::Arena::has_span`].
    pub(super) fn has_free(&self) -> bool {
        let free = self.free.lock();
        // The last one would become the reserve.
        self.room(&free) > u64::from(free.reserve.is_none())
    }

    /// Takes a free span and writes its header.
    pub(super) fn take(&self, role: Role, born: u64, urgency: Urgency) -> Result<u32, Shortage> {
        let span = self.take_free(urgency)?;
        let entry = self.span(span);
        let sequence = self.next_sequence.fetch_add(1, Relaxed);
        entry.sequence.store(sequence, Release);
        entry.role.store(role.to_word(), Release);
        entry.born.store(born, Relaxed);
        entry.filled.store(self.layout.first_granule(), Release);
        if let Err(shortage) = self.ensure_populated(span, self.layout.first_granule()) {
            self.put_back(span);
            return Err(shortage);
        }
        let header = SpanHeader {
            span,
            role,
            sequence,
            born,
        };
        write_header(&self.region, self.layout, &header, self.secret);
        entry.life.open();
        Ok(span)
    }

    fn take_free(&self, urgency: Urgency) -> Result<u32, Shortage> {
        let mut free = self.free.lock();
        if free.reserve.is_none() && self.room(&free) <= LAST_SPANS {
            self.set_reserve(&mut free);
        }
        let is_scarce = free.reserve.is_none() && self.room(&free) <= LAST_SPANS;
        let span = match urgency {
            // What is left is for those who make room.
            Urgency::Normal if is_scarce => None,
            Urgency::Normal => self.obtain(&mut free),
            Urgency::Making => self.obtain(&mut free).or_else(|| free.reserve.take()),
        };
        self.publish(&free);
        span.ok_or(Shortage::Store)
    }

    /// Takes a span off the list that can be filled at least in part.
    fn obtain(&self, free: &mut FreeList) -> Option<u32> {
        if let Some(span) = free.warm.pop() {
            return Some(span);
        }
        let span = free.bare.pop()?;
        let least = self.layout.granules_of(POPULATE_BYTES);
        if self
            .charge(span, least.min(self.layout.span_granules()))
            .is_err()
        {
            free.bare.push(span);
            return None;
        }
        Some(span)
    }

    fn set_reserve(&self, free: &mut FreeList) {
        let Some(span) = free.warm.pop().or_else(|| free.bare.pop()) else {
            return;
        };
        if self.charge(span, self.layout.span_granules()).is_ok() {
            free.reserve = Some(span);
        } else if self.span(span).charged.load(Relaxed) > 0 {
            free.warm.push(span);
        } else {
            free.bare.push(span);
        }
    }

    /// To be called before the list is let go, whenever it was changed.
    fn publish(&self, free: &FreeList) {
        let warm = u32::try_from(free.warm.len()).unwrap_or(u32::MAX);
        self.warm.store(warm, Relaxed);
    }

    /// Gives back a span that has no memory (any more).
    fn put_back(&self, span: u32) {
        let entry = self.span(span);
        entry.role.store(0, Release);
        entry.populated.store(0, Relaxed);
        let charged = entry.charged.swap(0, Relaxed);
        let mut free = self.free.lock();
        free.bare.push(span);
        self.publish(&free);
        drop(free);
        self.charged.fetch_sub(u64::from(charged), Relaxed);
        self.budget.release(self.layout.bytes_of(charged));
    }

    /// Charges the first `granules` of a span to the budget.
    fn charge(&self, span: u32, granules: u32) -> Result<(), Shortage> {
        let entry = self.span(span);
        let more = granules.saturating_sub(entry.charged.load(Relaxed));
        if more > 0 {
            self.budget.reserve_span(self.layout.bytes_of(more))?;
            entry.charged.store(granules, Relaxed);
            self.charged.fetch_add(u64::from(more), Relaxed);
        }
        Ok(())
    }

    /// Sees to it that the host has given memory for the first `granules` of a span. Only one thread
    /// does so for one span: who fills it.
    pub(super) fn ensure_populated(&self, span: u32, granules: u32) -> Result<(), Shortage> {
        let entry = self.span(span);
        let populated = entry.populated.load(Relaxed);
        if granules <= populated {
            return Ok(());
        }
        let layout = self.layout;
        let to_bytes = layout
            .bytes_of(granules)
            .next_multiple_of(POPULATE_BYTES)
            .min(layout.span_bytes());
        let to = layout.granules_of(to_bytes);
        self.charge(span, to)?;
        let from_bytes = layout.bytes_of(populated);
        self.region
            .populate(layout.span_at(span) + from_bytes, to_bytes - from_bytes)
            .map_err(|_| Shortage::Store)?;
        entry.populated.store(to, Relaxed);
        Ok(())
    }

    /// Granules from the beginning of a span on that have memory.
    pub(super) fn populated(&self, span: u32) -> u32 {
        self.span(span).populated.load(Relaxed)
    }

    /// Takes note that a span is free, if it is the caller who has to.
    pub(super) fn take_back(&self, span: u32, Freed(is_mine): Freed) {
        if is_mine {
            self.span(span).role.store(0, Release);
            let mut free = self.free.lock();
            free.warm.push(span);
            self.publish(&free);
        }
    }

    /// See [`super::Arena::trim`].
    pub(super) fn trim(&self, keep: usize) -> usize {
        let mut trimmed = 0;
        while let Some(span) = self.take_to_trim(keep) {
            let at = self.layout.span_at(span);
            if !self.region.punch(at, self.layout.span_bytes()) {
                let mut free = self.free.lock();
                free.warm.push(span);
                self.publish(&free);
                break;
            }
            self.put_back(span);
            trimmed += 1;
        }
        trimmed
    }

    /// The span that has been free for longest, if more than `keep` are; and when nothing at all is
    /// stored, the reserve too. While it is punched it is in no list.
    fn take_to_trim(&self, keep: usize) -> Option<u32> {
        let mut free = self.free.lock();
        let is_all_free = free.warm.len() + free.bare.len() + 2 == self.table.len();
        let span = if free.warm.len() > keep {
            Some(free.warm.remove(0))
        } else if keep == 0 && is_all_free {
            free.reserve.take()
        } else {
            None
        };
        self.publish(&free);
        span
    }

    /// See [`super::Arena::prepare`].
    pub(super) fn prepare(&self, wanted: usize) -> bool {
        let span = {
            let mut free = self.free.lock();
            if free.warm.len() >= wanted || self.room(&free) <= LAST_SPANS {
                return false;
            }
            let Some(span) = free.bare.pop() else {
                return false;
            };
            span
        };
        let granules = self.layout.span_granules();
        if self.ensure_populated(span, granules).is_err() {
            self.put_back(span);
            return false;
        }
        let mut free = self.free.lock();
        // At the far end: what was in use a moment ago is warmer still.
        free.warm.insert(0, span);
        self.publish(&free);
        true
    }

    /// At recovery, before anything else is done: these spans are in use, each with memory for so
    /// many granules.
    pub(super) fn adopt(&self, found: &[(SpanHeader, u32)]) -> Result<(), Shortage> {
        let mut is_used = vec![false; self.table.len()];
        for (header, granules) in found {
            let entry = self.span(header.span);
            entry.sequence.store(header.sequence, Release);
            entry.role.store(header.role.to_word(), Release);
            entry.born.store(header.born, Relaxed);
            entry.filled.store(*granules, Release);
            self.budget.reserve(self.layout.bytes_of(*granules))?;
            entry.charged.store(*granules, Relaxed);
            entry.populated.store(*granules, Relaxed);
            self.charged.fetch_add(u64::from(*granules), Relaxed);
            entry.life.open();
            is_used[header.span as usize] = true;
            self.next_sequence
                .fetch_max(header.sequence.saturating_add(1), Relaxed);
        }
        self.free
            .lock()
            .bare
            .retain(|span| !is_used[*span as usize]);
        Ok(())
    }

    /// At recovery: nothing more is added to it. It is free if nothing in it lives.
    pub(crate) fn seal_adopted(&self, span: u32) {
        let freed = self.life(span).seal();
        self.take_back(span, freed);
    }
}
