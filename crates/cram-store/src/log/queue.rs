// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An account's ephemeral pages, in the order in which they will be evicted.
//!
//! The order is that of the log: pages that come in fill span after span, and
//! the oldest span is the first to be looked at. So the order costs nothing for
//! a page. There are two such sequences, after S3-FIFO (see `docs/store.md`):
//! *fresh* pages, most of which will never be asked for, and *proven* ones.

use std::collections::VecDeque;

use crate::arena::{Arena, Head, Role, SpanInfo};
use crate::machine::sync::Mutex;

/// Which of the two sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Fresh,
    Proven,
}

/// A span, in one of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Visit {
    pub(crate) span: u32,
    pub(crate) sequence: u64,
}

impl Visit {
    /// A reading of the span, if it is still what it was.
    pub(crate) fn info(self, arena: &Arena) -> Option<SpanInfo> {
        let info = arena.spans().info(self.span)?;
        (info.sequence == self.sequence).then_some(info)
    }
}

/// How far puts of a client have looked for its pages in shared pools.
#[derive(Debug, Default)]
pub(crate) struct SharedCursor {
    /// The pool's account, and which of its spans.
    pub(crate) account: u16,
    pub(crate) at: usize,
    /// Where in the span, if it is still that one.
    within: Option<(Visit, u32)>,
}

impl SharedCursor {
    /// The granule to go on from in a span.
    pub(crate) fn granule_in(&self, visit: Visit) -> u32 {
        match self.within {
            Some((known, granule)) if known == visit => granule,
            _ => 0,
        }
    }

    pub(crate) fn stay(&mut self, visit: Visit, granule: u32) {
        self.within = Some((visit, granule));
    }

    pub(crate) fn next_span(&mut self) {
        self.at += 1;
        self.within = None;
    }
}

/// Of the fresh spans, at least this share of all (as 1 / n) is kept before they are evicted from.
const FRESH_SHARE: usize = 10;

#[derive(Default)]
struct Order {
    fresh: VecDeque<Visit>,
    proven: VecDeque<Visit>,
}

impl Order {
    fn of(&mut self, class: Class) -> &mut VecDeque<Visit> {
        match class {
            Class::Fresh => &mut self.fresh,
            Class::Proven => &mut self.proven,
        }
    }
}

/// See the module's text.
pub(crate) struct Queue {
    fresh: Head,
    proven: Head,
    /// Where compaction puts what it moves: it keeps its place in the order.
    merged: [Head; 2],
    order: Mutex<Order>,
}

impl Queue {
    /// Of the account with this number.
    pub(crate) fn new(account: u16) -> Self {
        let head = |class| {
            Head::new(match class {
                Class::Fresh => Role::Fresh(account),
                Class::Proven => Role::Proven(account),
            })
        };
        Self {
            fresh: head(Class::Fresh),
            proven: head(Class::Proven),
            merged: [head(Class::Fresh), head(Class::Proven)],
            order: Mutex::default(),
        }
    }

    /// Where pages come in.
    pub(crate) fn head(&self, class: Class) -> &Head {
        match class {
            Class::Fresh => &self.fresh,
            Class::Proven => &self.proven,
        }
    }

    /// Where compaction puts them.
    pub(crate) fn merged(&self, class: Class) -> &Head {
        let [fresh, proven] = &self.merged;
        match class {
            Class::Fresh => fresh,
            Class::Proven => proven,
        }
    }

    /// All heads.
    pub(crate) fn heads(&self) -> impl Iterator<Item = &Head> {
        [&self.fresh, &self.proven].into_iter().chain(&self.merged)
    }

    /// A span has been opened for pages that come in.
    pub(crate) fn push(&self, class: Class, span: u32, arena: &Arena) {
        let Some(visit) = visit(span, arena) else {
            return;
        };
        let mut order = self.order.lock();
        let spans = order.of(class);
        // Spans leave by themselves when all that is in them is got or flushed.
        if spans.len() == spans.capacity() {
            spans.retain(|visit| visit.info(arena).is_some());
        }
        spans.push_back(visit);
    }

    /// A span has been opened for what compaction moves out of `from`.
    pub(crate) fn push_beside(&self, class: Class, from: Visit, span: u32, arena: &Arena) {
        let Some(visit) = visit(span, arena) else {
            return;
        };
        let mut order = self.order.lock();
        let spans = order.of(class);
        let at = spans.iter().position(|other| *other == from).unwrap_or(0);
        spans.insert(at, visit);
    }

    /// At recovery: spans are pushed in the order of their sequence numbers.
    pub(crate) fn adopt(&self, class: Class, info: &SpanInfo) {
        self.order.lock().of(class).push_back(Visit {
            span: info.span,
            sequence: info.sequence,
        });
    }

    /// The span that is to be evicted from next. It stays in its place.
    pub(crate) fn oldest(&self, arena: &Arena) -> Option<(Class, Visit, SpanInfo)> {
        // Before the order is locked: a head that opens a span locks in the other direction.
        let open_span = self.fresh.open_span();
        let mut order = self.order.lock();
        let Order { fresh, proven } = &mut *order;
        for spans in [&mut *fresh, &mut *proven] {
            while spans
                .front()
                .is_some_and(|visit| visit.info(arena).is_none())
            {
                spans.pop_front();
            }
        }
        // The span that is being filled has the youngest pages of all.
        let is_only_open = fresh.len() == 1 && open_span == fresh.front().map(|visit| visit.span);
        let is_fresh_first = fresh.len() * FRESH_SHARE > fresh.len() + proven.len();
        let (class, visit) =
            if !fresh.is_empty() && (proven.is_empty() || is_fresh_first && !is_only_open) {
                (Class::Fresh, *fresh.front()?)
            } else {
                (Class::Proven, *proven.front()?)
            };
        Some((class, visit, visit.info(arena)?))
    }

    /// Takes a span out of the order.
    pub(crate) fn remove(&self, class: Class, visit: Visit) {
        let mut order = self.order.lock();
        let spans = order.of(class);
        if let Some(at) = spans.iter().position(|other| *other == visit) {
            spans.remove(at);
        }
    }

    /// One of [`Self::all`].
    pub(crate) fn visit_at(&self, at: usize) -> Option<Visit> {
        let order = self.order.lock();
        order.fresh.iter().chain(&order.proven).nth(at).copied()
    }

    /// All spans, the oldest first, fresh ones before proven ones.
    pub(crate) fn all(&self) -> Vec<Visit> {
        let order = self.order.lock();
        order.fresh.iter().chain(&order.proven).copied().collect()
    }

    /// When the oldest span was filled, by which the ages of queues are compared.
    pub(crate) fn age(&self, arena: &Arena) -> Option<(u64, u64)> {
        self.oldest(arena)
            .map(|(_, _, info)| (info.born, info.sequence))
    }
}

fn visit(span: u32, arena: &Arena) -> Option<Visit> {
    arena.spans().info(span).map(|info| Visit {
        span,
        sequence: info.sequence,
    })
}
