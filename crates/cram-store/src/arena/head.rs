// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Heads: where records are appended.
//!
//! A head has one open span at most. Workers that put pages have a head each
//! (as far as there are enough), so they do not meet here.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed, Ordering::Release};
use std::time::{SystemTime, UNIX_EPOCH};

use super::record::{HEADER_BYTES, Header};
use super::span_header::Role;
use super::spans::Urgency;
use super::{Arena, Place};
use crate::machine::budget::Shortage;
use crate::machine::sync::Mutex;

/// A record to be appended.
#[derive(Clone, Copy)]
pub(crate) struct Record<'a> {
    /// `header.len` is the length of the payload.
    pub(crate) header: Header,
    pub(crate) payload: &'a [u8],
}

/// The open span of a head, and how far it is filled.
#[derive(Debug, Clone, Copy)]
struct Tail {
    span: u32,
    granule: u32,
    /// Pages came into it at the time that they were put, and not only such as are older.
    is_current: bool,
}

/// See the module's text.
pub(crate) struct Head {
    role: Role,
    tail: Mutex<Option<Tail>>,
    /// The place behind what was appended last, for [`Arena::prefetch_tail`]; 0 at first.
    next: AtomicU32,
}

impl Head {
    pub(crate) fn new(role: Role) -> Self {
        Self {
            role,
            tail: Mutex::new(None),
            next: AtomicU32::new(0),
        }
    }

    /// The span that is being filled.
    pub(crate) fn open_span(&self) -> Option<u32> {
        self.tail.lock().map(|tail| tail.span)
    }
}

/// Seconds of Unix time. The clock may be set at any time: nothing may hang on this but what is
/// compacted, or packed again, before what.
pub(crate) fn now() -> u64 {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    #[cfg(any(test, feature = "fault-injection"))]
    let now = now.saturating_add_signed(CLOCK_JUMP_S.load(std::sync::atomic::Ordering::Relaxed));
    now
}

#[cfg(any(test, feature = "fault-injection"))]
static CLOCK_JUMP_S: std::sync::atomic::AtomicI64 = std::sync::atomic::AtomicI64::new(0);

/// Has the clock go wrong by so many seconds, for all stores of the process.
#[cfg(any(test, feature = "fault-injection"))]
pub fn jump_clock(seconds: i64) {
    CLOCK_JUMP_S.store(seconds, std::sync::atomic::Ordering::Relaxed);
}

impl Arena {
    /// Appends a record. When this returns, it lives, and would be found after a crash: the caller
    /// holds the lock that its life hangs on, and enters it where it belongs before letting go.
    ///
    /// `born` is when the page came, in seconds of Unix time, if that is not now. `opened` is called
    /// with the span if one is opened on the way, with the head's lock held.
    pub(crate) fn append(
        &self,
        head: &Head,
        record: Record<'_>,
        born: Option<u64>,
        urgency: Urgency,
        opened: impl FnOnce(u32),
    ) -> Result<Place, Shortage> {
        debug_assert_eq!(record.header.len, record.payload.len());
        let granules = self.layout.granules(HEADER_BYTES + record.payload.len());
        let mut locked = head.tail.lock();
        let fits = |tail: &Tail| {
            granules <= self.layout.span_granules() - tail.granule
                && self
                    .spans
                    .ensure_populated(tail.span, tail.granule + granules, urgency)
                    .is_ok()
        };
        let tail = match locked.filter(fits) {
            Some(tail) => tail,
            None => {
                let fresh = Tail {
                    span: self
                        .spans
                        .take(head.role, born.unwrap_or_else(now), urgency)?,
                    granule: self.layout.first_granule(),
                    is_current: false,
                };
                opened(fresh.span);
                if let Some(full) = locked.replace(fresh) {
                    self.seal(full);
                }
                self.spans
                    .ensure_populated(fresh.span, fresh.granule + granules, urgency)?;
                self.terminate(fresh.span, fresh.granule);
                fresh
            }
        };
        let end = tail.granule + granules;
        let place = self.layout.place(tail.span, tail.granule);
        self.write_payload(place, record.payload);
        *locked = Some(Tail {
            granule: end,
            is_current: tail.is_current || born.is_none(),
            ..tail
        });
        head.next
            .store(self.layout.place(tail.span, end).0, Relaxed);
        self.spans.set_filled(tail.span, end);
        if let Some(born) = born {
            self.spans.rejuvenate(tail.span, born);
        }
        self.spans.life(tail.span).add_live(granules);
        self.terminate(tail.span, end);
        let salt = self.salt_of(place, self.spans.sequence(tail.span));
        let [first, second] = self.words(place);
        let words = record.header.pack(salt);
        second.store(words[1].to_le(), Release);
        // From here on it lives.
        first.store(words[0].to_le(), Release);
        Ok(place)
    }

    /// Marks the end of what is filled, before anything is: what stands there from an earlier life of
    /// the span must not look like a record. Memory that the host has yet to give is zero anyway.
    fn terminate(&self, span: u32, granule: u32) {
        if granule < self.spans.populated(span) {
            let [first, _] = self.words(self.layout.place(span, granule));
            first.store(0, Release);
        }
    }

    /// Fetches the memory that a record will be appended to soon.
    pub(crate) fn prefetch_tail(&self, head: &Head, bytes: usize) {
        let at = self.layout.offset(Place(head.next.load(Relaxed)));
        // The last one may end where the arena does.
        if at + bytes as u64 <= self.layout.len_bytes() {
            self.spans.region().prefetch(at, bytes);
        }
    }

    #[allow(unsafe_code)]
    fn write_payload(&self, place: Place, payload: &[u8]) {
        let at = self.layout.offset(place) + HEADER_BYTES as u64;
        // SAFETY: called with the lock of the head held whose open span this is, for the part of it
        // that was not handed out yet. Nobody has its place, so nobody reads it; the span was
        // free when the head took it, so no reader is left from an earlier life.
        let to = unsafe { self.spans.region().bytes_mut(at, payload.len()) };
        to.copy_from_slice(payload);
    }

    fn seal(&self, tail: Tail) {
        if tail.is_current {
            // Its youngest page came just now, or not much earlier.
            self.spans.rejuvenate(tail.span, now());
        }
        let freed = self.spans.life(tail.span).seal();
        self.spans.take_back(tail.span, freed);
    }

    /// Seals the span that a head is filling, so that it can be compacted or given back.
    pub(crate) fn seal_head(&self, head: &Head) {
        if let Some(tail) = head.tail.lock().take() {
            self.seal(tail);
        }
    }
}
