// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The spans that are free, and the memory that they have.
//!
//! Whatever happens, compaction must be able to empty a span, or else a store that is full of dead
//! records would refuse everything. So when room gets short one span, with all its memory, is set
//! aside as the *reserve*: only compaction and eviction take it. As long as it is away, puts get no
//! memory that it could be made of anew.

use std::sync::atomic::Ordering::{Relaxed, Release};

use super::Spans;
use crate::arena::span::Freed;
use crate::machine::budget::Shortage;

/// Who asks for a span, or for memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Urgency {
    /// A put. Leaves the reserve alone.
    Normal,
    /// What will free more than it takes: compaction and eviction.
    Making,
}

/// With room for no more spans than this, one is set aside as the reserve.
const LAST_SPANS: u64 = 3;

/// See the module's text.
pub(super) struct FreeList {
    /// Free, and with memory.
    warm: Vec<u32>,
    /// Free, and without.
    bare: Vec<u32>,
    /// Charged as a whole.
    reserve: Option<u32>,
}

impl FreeList {
    /// All spans but the first, which has the superblock.
    pub(super) fn new(spans: u32) -> Self {
        let mut warm = Vec::new();
        warm.reserve_exact(spans as usize);
        Self {
            warm,
            // The lowest is taken first.
            bare: (1..spans).rev().collect(),
            reserve: None,
        }
    }

    /// Strikes the spans out that are in use.
    pub(super) fn strike(&mut self, is_used: &[bool]) {
        self.bare
            .retain(|span| is_used.get(*span as usize) == Some(&false));
    }
}

impl Spans {
    /// How many more whole spans there could be.
    fn room(&self, free: &FreeList) -> u64 {
        let bare = self.budget.room_for_spans() / self.layout.span_bytes();
        free.warm.len() as u64 + bare.min(free.bare.len() as u64)
    }

    /// Whether a put may have a span: there is one beside the reserve, or more than enough.
    fn is_open_to_puts(&self, free: &mut FreeList) -> bool {
        if free.reserve.is_none() && self.room(free) <= LAST_SPANS {
            self.set_reserve(free);
        }
        if free.reserve.is_none() {
            return self.room(free) > LAST_SPANS;
        }
        let is_chargeable = self.budget.room_for_spans() >= self.step_bytes;
        !free.warm.is_empty() || !free.bare.is_empty() && is_chargeable
    }

    /// See [`super::super::Arena::has_span`].
    pub(in crate::arena) fn has_free(&self) -> bool {
        let mut free = self.free.lock();
        let is_open = self.is_open_to_puts(&mut free);
        self.publish(&free);
        is_open
    }

    pub(super) fn take_free(&self, urgency: Urgency) -> Result<u32, Shortage> {
        let mut free = self.free.lock();
        let is_open = self.is_open_to_puts(&mut free);
        let span = match urgency {
            Urgency::Normal if !is_open => None,
            Urgency::Normal => self.obtain(&mut free),
            // Not one that may turn out to have less memory than what is to be moved needs.
            Urgency::Making if free.warm.is_empty() && self.room(&free) == 0 => free.reserve.take(),
            Urgency::Making => self.obtain(&mut free).or_else(|| free.reserve.take()),
        };
        self.publish(&free);
        span.ok_or(Shortage::Store)
    }

    /// Takes a span off the lists that can be filled at least in part.
    fn obtain(&self, free: &mut FreeList) -> Option<u32> {
        if let Some(span) = free.warm.pop() {
            return Some(span);
        }
        let span = free.bare.pop()?;
        if self
            .charge(span, self.layout.granules_of(self.step_bytes))
            .is_err()
        {
            free.bare.push(span);
            return None;
        }
        Some(span)
    }

    /// Sets a span aside, if there is one, and memory for it: of the warm ones the one that has
    /// most; what it lacks comes from the host, or from the other ones.
    fn set_reserve(&self, free: &mut FreeList) {
        let fullest =
            (0..free.warm.len()).max_by_key(|at| self.span(free.warm[*at]).charged.load(Relaxed));
        let Some(span) = fullest
            .map(|at| free.warm.remove(at))
            .or_else(|| free.bare.pop())
        else {
            return;
        };
        while self.charge(span, self.layout.span_granules()).is_err() {
            let Some(other) = free.warm.pop() else {
                self.list(free, span);
                return;
            };
            if self.strip(other) {
                free.bare.push(other);
            } else {
                free.warm.push(other);
                self.list(free, span);
                return;
            }
        }
        free.reserve = Some(span);
    }

    /// Puts a free span on the list where it belongs.
    fn list(&self, free: &mut FreeList, span: u32) {
        if self.span(span).charged.load(Relaxed) > 0 {
            free.warm.push(span);
        } else {
            free.bare.push(span);
        }
    }

    /// To be called before the list is let go, whenever it was changed.
    fn publish(&self, free: &FreeList) {
        let warm = u32::try_from(free.warm.len()).unwrap_or(u32::MAX);
        self.warm.store(warm, Relaxed);
        self.has_reserve.store(free.reserve.is_some(), Relaxed);
    }

    /// Takes its memory away from a free span that is in no list. False when the host does not take
    /// it.
    fn strip(&self, span: u32) -> bool {
        let is_stripped = self
            .region
            .punch(self.layout.span_at(span), self.layout.span_bytes());
        if is_stripped {
            self.uncharge(span);
        }
        is_stripped
    }

    fn uncharge(&self, span: u32) {
        let entry = self.span(span);
        entry.populated.store(0, Relaxed);
        let charged = entry.charged.swap(0, Relaxed);
        self.charged.fetch_sub(u64::from(charged), Relaxed);
        self.budget.release(self.layout.bytes_of(charged));
    }

    /// Gives back a span that was taken and got no memory, or not all that it should.
    pub(super) fn put_back(&self, span: u32) {
        let entry = self.span(span);
        entry.role.store(0, Release);
        // The host may have given a part before it refused; as long as it keeps that, it is charged.
        entry.populated.store(0, Relaxed);
        self.strip(span);
        let mut free = self.free.lock();
        self.list(&mut free, span);
        self.publish(&free);
    }

    /// Takes note that a span is free, if it is the caller who has to.
    pub(in crate::arena) fn take_back(&self, span: u32, Freed(is_mine): Freed) {
        if is_mine {
            self.span(span).role.store(0, Release);
            let mut free = self.free.lock();
            free.warm.push(span);
            self.publish(&free);
        }
    }

    /// See [`super::super::Arena::trim`].
    pub(in crate::arena) fn trim(&self, keep: usize) -> usize {
        let mut trimmed = 0;
        // While a span is stripped it is in no list, so that nobody waits for the host.
        while let Some(span) = self.take_to_trim(keep) {
            let is_stripped = self.strip(span);
            let mut free = self.free.lock();
            self.list(&mut free, span);
            self.publish(&free);
            drop(free);
            if !is_stripped {
                break;
            }
            trimmed += 1;
        }
        trimmed
    }

    /// The span that has been free for longest, if more than `keep` are; and when nothing at all is
    /// stored, the reserve too.
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

    /// See [`super::super::Arena::prepare`].
    pub(in crate::arena) fn prepare(&self, wanted: usize) -> bool {
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
        if self
            .ensure_populated(span, granules, Urgency::Normal)
            .is_err()
        {
            self.put_back(span);
            return false;
        }
        let mut free = self.free.lock();
        // At the far end: what was in use a moment ago is warmer still.
        free.warm.insert(0, span);
        self.publish(&free);
        true
    }
}
