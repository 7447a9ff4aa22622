// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The log: which head a record is appended to, and who is told when that opens
//! another span.

pub(crate) mod queue;
pub(crate) mod waker;

use crate::arena::{Arena, Head, Place, Record, Role, Urgency};
use crate::log::queue::{Class, Queue, Visit};
use crate::log::waker::Waker;
use crate::machine::budget::Shortage;

/// Where a record is appended.
#[derive(Clone, Copy)]
pub(crate) enum Target<'a> {
    /// To a head of no order.
    Log(&'a Head),
    /// To the head for one of an entry's two records.
    Catalogue(usize),
    /// To the head of what was looked at for recompression.
    Cold,
    /// To the end of an account's queue.
    Queue(&'a Queue, Class),
    /// Into an account's queue, beside the span that it is moved out of.
    Beside(&'a Queue, Class, Visit),
}

/// An arena, and the heads that no account has.
pub(crate) struct Log {
    pub(crate) arena: Arena,
    /// Where persistent pages and images come in.
    pub(crate) heads: Box<[Head]>,
    /// Where compaction puts them, by age: see [`Log::aged_head`].
    pub(crate) aged: Box<[Head]>,
    /// Where those go that were looked at for recompression.
    pub(crate) cold: Head,
    /// One for each of an entry's two records: so they are never in one span.
    catalogue_heads: [Head; 2],
    /// Told of every span that is opened for pages.
    pub(crate) waker: Waker,
}

/// Ages up to so many seconds go to one head of [`Ledger::aged`] each.
const AGES: [u64; 3] = [60, 600, 3600];

impl Log {
    pub(crate) fn new(arena: Arena) -> Self {
        let spans = arena.layout().spans as usize;
        let heads = (spans / 64).clamp(1, 8);
        let aged = if spans < 256 { 1 } else { AGES.len() + 1 };
        let pages_heads = |count: usize| (0..count).map(|_| Head::new(Role::Pages)).collect();
        Self {
            arena,
            heads: pages_heads(heads),
            aged: pages_heads(aged),
            cold: Head::new(Role::Pages),
            catalogue_heads: [(); 2].map(|()| Head::new(Role::Catalogue)),
            waker: Waker::default(),
        }
    }

    /// Bytes that its heads have allocated.
    pub(crate) fn heads_bytes(&self) -> usize {
        (self.heads.len() + self.aged.len()) * size_of::<Head>()
    }

    /// The head for persistent pages that worker number `worker` puts.
    pub(crate) fn put_head(&self, worker: usize) -> &Head {
        &self.heads[worker % self.heads.len()]
    }

    /// The head for what compaction moves, by its age in seconds: pages of like age die together,
    /// and cold ones are found together.
    pub(crate) fn aged_head(&self, age_s: u64) -> &Head {
        let class = AGES.iter().filter(|limit| age_s > **limit).count();
        &self.aged[class.min(self.aged.len() - 1)]
    }

    /// Every head that no queue has.
    pub(crate) fn log_heads(&self) -> impl Iterator<Item = &Head> {
        self.heads
            .iter()
            .chain(&self.aged)
            .chain([&self.cold])
            .chain(&self.catalogue_heads)
    }

    /// Appends a record; see [`Arena::append`] for what that takes.
    pub(crate) fn append(
        &self,
        target: Target<'_>,
        record: Record<'_>,
        born: Option<u64>,
        urgency: Urgency,
    ) -> Result<Place, Shortage> {
        let arena = &self.arena;
        let (head, opened): (&Head, &dyn Fn(u32)) = match target {
            Target::Catalogue(copy) => (&self.catalogue_heads[copy], &|_| ()),
            Target::Log(head) => (head, &|_| self.waker.wake()),
            Target::Cold => (&self.cold, &move |span| {
                arena.spans().settle(span, arena.spans().sequence(span));
            }),
            Target::Queue(queue, class) => (queue.head(class), &move |span| {
                queue.push(class, span, arena);
            }),
            Target::Beside(queue, class, from) => (queue.merged(class), &move |span| {
                queue.push_beside(class, from, span, arena);
            }),
        };
        arena.append(head, record, born, urgency, opened)
    }
}
