// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All spans: what each is for, and how much of the host's memory it has.
//!
//! A span has memory from its beginning up to where it was populated, and
//! exactly that is charged to the budget, before it is taken. So a span that is
//! hardly filled holds hardly anything.

mod free;

use std::sync::Arc;
use std::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64 as PlainAtomicU64, Ordering::Acquire, Ordering::Relaxed,
    Ordering::Release,
};

pub(crate) use free::Urgency;

use free::FreeList;

use super::Layout;
use super::record::{HEADER_BYTES, PAYLOAD_BYTES_MAX};
use super::region::Region;
use super::span::Life;
use super::span_header::{Role, SpanHeader, write_header};
use crate::machine::budget::{Budget, Shortage};
use crate::machine::sync::Mutex;

/// How much of a span is populated at a time, in bytes: enough for one call to the host to be worth
/// its while, little enough not to hold memory that is not filled yet.
const POPULATE_BYTES: u64 = 128 << 10;

/// Bytes of the host's pages, normally.
const PAGE_BYTES: u64 = 4096;

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
    /// Granules that are charged.
    pub(crate) charged: u32,
    pub(crate) live: u32,
    pub(crate) is_sealed: bool,
}

impl SpanInfo {
    /// Granules of dead records; of a sealed span also those that will never be filled, but for what
    /// may be left at the end of any.
    pub(crate) fn dead(&self, layout: Layout) -> u32 {
        let unfilled = if self.is_sealed {
            let usual = layout.granules(HEADER_BYTES + PAYLOAD_BYTES_MAX);
            self.charged
                .saturating_sub(self.filled.saturating_add(usual))
        } else {
            0
        };
        self.filled
            .saturating_sub(layout.first_granule())
            .saturating_sub(self.live)
            .saturating_add(unfilled)
    }
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
    /// How many of the free ones have memory.
    warm: AtomicU32,
    /// Whether one of them is set aside.
    has_reserve: AtomicBool,
    /// Bytes of the host's pages.
    page_bytes: u64,
    /// Bytes that are populated at a time.
    step_bytes: u64,
    /// Granules charged in all.
    charged: PlainAtomicU64,
    next_sequence: PlainAtomicU64,
}

impl Spans {
    /// All free, and bare.
    pub(super) fn new(
        region: Region,
        layout: Layout,
        huge_page_bytes: Option<u64>,
        budget: Arc<Budget>,
        secret: u64,
    ) -> Self {
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
        Self {
            page_bytes: huge_page_bytes.unwrap_or(PAGE_BYTES),
            step_bytes: POPULATE_BYTES
                .max(huge_page_bytes.unwrap_or(0))
                .min(layout.span_bytes()),
            region,
            layout,
            budget,
            secret,
            table: table.collect(),
            free: Mutex::new(FreeList::new(layout.spans)),
            warm: AtomicU32::new(0),
            has_reserve: AtomicBool::new(false),
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
            charged: entry.charged.load(Relaxed),
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

    /// Takes a free span and writes its header.
    pub(super) fn take(&self, role: Role, born: u64, urgency: Urgency) -> Result<u32, Shortage> {
        let span = self.take_free(urgency)?;
        let entry = self.span(span);
        let sequence = self.next_sequence.fetch_add(1, Relaxed);
        entry.sequence.store(sequence, Release);
        entry.role.store(role.to_word(), Release);
        entry.born.store(born, Relaxed);
        entry.filled.store(self.layout.first_granule(), Release);
        if let Err(shortage) = self.ensure_populated(span, self.layout.first_granule(), urgency) {
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
    pub(super) fn ensure_populated(
        &self,
        span: u32,
        granules: u32,
        urgency: Urgency,
    ) -> Result<(), Shortage> {
        let entry = self.span(span);
        let populated = entry.populated.load(Relaxed);
        if granules <= populated {
            return Ok(());
        }
        let layout = self.layout;
        let to_bytes = layout
            .bytes_of(granules)
            .next_multiple_of(self.step_bytes)
            .min(layout.span_bytes());
        let to = layout.granules_of(to_bytes);
        if urgency == Urgency::Normal && !self.spares_the_reserve(span, to) {
            return Err(Shortage::Store);
        }
        self.charge(span, to)?;
        let from_bytes = layout.bytes_of(populated);
        self.region
            .populate(layout.span_at(span) + from_bytes, to_bytes - from_bytes)
            .map_err(|_| Shortage::Store)?;
        entry.populated.store(to, Relaxed);
        Ok(())
    }

    /// Whether the reserve is there, or could be made of what is left when a span is charged so far.
    fn spares_the_reserve(&self, span: u32, granules: u32) -> bool {
        let more = granules.saturating_sub(self.span(span).charged.load(Relaxed));
        let needed = self.layout.bytes_of(more) + self.layout.span_bytes();
        more == 0 || self.has_reserve.load(Relaxed) || self.budget.room_for_spans() >= needed
    }

    /// Granules from the beginning of a span on that have memory.
    pub(super) fn populated(&self, span: u32) -> u32 {
        self.span(span).populated.load(Relaxed)
    }

    /// At recovery, before anything else is done: what is known of the spans that were found. Nothing
    /// is charged yet, and nothing written.
    pub(super) fn recall(&self, found: &[(SpanHeader, u32)]) {
        for (header, granules) in found {
            let entry = self.span(header.span);
            entry.sequence.store(header.sequence, Release);
            entry.role.store(header.role.to_word(), Release);
            entry.born.store(header.born, Relaxed);
            entry.filled.store(*granules, Release);
            self.next_sequence
                .fetch_max(header.sequence.saturating_add(1), Relaxed);
        }
    }

    /// Granules that a span with so many filled ones keeps memory for.
    pub(crate) fn kept_granules(&self, filled: u32) -> u32 {
        let bytes = self.layout.bytes_of(filled);
        self.layout
            .granules_of(bytes.next_multiple_of(self.page_bytes))
            .min(self.layout.span_granules())
    }

    /// At recovery: charges a span that will be adopted for what it keeps.
    pub(crate) fn charge_kept(&self, span: u32, filled: u32) -> Result<(), Shortage> {
        let kept = self.kept_granules(filled);
        self.budget.reserve(self.layout.bytes_of(kept))?;
        self.span(span).charged.store(kept, Relaxed);
        self.charged.fetch_add(u64::from(kept), Relaxed);
        Ok(())
    }

    /// At recovery: these spans are in use, and have been charged. Others that have memory give it
    /// back, and these what is not filled.
    pub(crate) fn adopt(&self, kept: &[SpanHeader], others: &[u32]) {
        let mut is_used = vec![false; self.table.len()];
        for header in kept {
            let entry = self.span(header.span);
            let (layout, charged) = (self.layout, entry.charged.load(Relaxed));
            entry.populated.store(charged, Relaxed);
            entry.life.open();
            is_used[header.span as usize] = true;
            let (at, kept_bytes) = (layout.span_at(header.span), layout.bytes_of(charged));
            if kept_bytes < layout.span_bytes() {
                self.region
                    .punch(at + kept_bytes, layout.span_bytes() - kept_bytes);
            }
        }
        for span in others {
            self.span(*span).role.store(0, Release);
            let layout = self.layout;
            self.region
                .punch(layout.span_at(*span), layout.span_bytes());
        }
        self.free.lock().strike(&is_used);
    }

    /// At recovery: nothing more is added to it. It is free if nothing in it lives.
    pub(crate) fn seal_adopted(&self, span: u32) {
        let freed = self.life(span).seal();
        self.take_back(span, freed);
    }
}
