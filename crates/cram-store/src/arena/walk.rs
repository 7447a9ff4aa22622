// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Going through the records of a span, one after the other.
//!
//! Each record says how long it is, so the next one is found behind it; a zero
//! word stands behind the last one. Where there is neither a header nor that,
//! there is damage: from there on every granule is tried, and what is found that
//! way is only believed when its payload agrees with it too.

use super::record::HEADER_BYTES;
use super::{Arena, Header, Place};

/// How far what the walk found may be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trust {
    /// It stands where the record before it ended, and needed no correction.
    Header,
    /// Not before its payload was verified.
    Nothing,
}

/// A record that the walk came by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Found {
    pub(crate) place: Place,
    pub(crate) header: Header,
    pub(crate) is_live: bool,
    pub(crate) trust: Trust,
}

/// See the module's text.
pub(crate) struct Walk<'a> {
    arena: &'a Arena,
    span: u32,
    sequence: u64,
    granule: u32,
    end: u32,
    /// No chain of lengths leads to `granule`.
    is_lost: bool,
    was_lost: bool,
}

impl Arena {
    /// Walks the first `end` granules of a span. The span must not be filled meanwhile, and be kept
    /// from being freed: by being sealed with something alive in it that only the caller takes out,
    /// or by being pinned.
    pub(crate) fn walk(&self, span: u32, end: u32) -> Walk<'_> {
        self.walk_from(span, 0, end)
    }

    /// As [`Self::walk`], from a granule on where a walk of the same life of the span was.
    pub(crate) fn walk_from(&self, span: u32, granule: u32, end: u32) -> Walk<'_> {
        Walk {
            arena: self,
            span,
            sequence: self.spans.sequence(span),
            granule: granule.max(self.layout.first_granule()),
            end: end.min(self.layout.span_granules()),
            is_lost: false,
            was_lost: false,
        }
    }
}

impl Walk<'_> {
    /// The granule behind what was found last.
    pub(crate) fn granule(&self) -> u32 {
        self.granule
    }

    /// Whether there was damage on the way.
    pub(crate) fn was_lost(&self) -> bool {
        self.was_lost
    }

    /// The caller has verified (or could not verify) what was found while lost: the chain goes on
    /// behind it, or else every granule is tried as before.
    pub(crate) fn verified(&mut self, found: &Found, is_right: bool) {
        let granules = self.arena.layout.granules(found.header.record_bytes());
        let start = self.arena.layout.granule_of(found.place);
        if is_right {
            self.granule = start + granules;
            self.is_lost = false;
        } else {
            self.granule = start + 1;
            self.is_lost = true;
            self.was_lost = true;
        }
    }
}

impl Iterator for Walk<'_> {
    type Item = Found;

    fn next(&mut self) -> Option<Found> {
        let layout = self.arena.layout;
        let header_granules = layout.granules(HEADER_BYTES);
        while self.granule < self.end && header_granules <= self.end - self.granule {
            let place = layout.place(self.span, self.granule);
            if !self.is_lost && self.arena.is_end(place) {
                return None;
            }
            let read = self.arena.read(place, self.sequence);
            let fits = read.filter(|read| {
                layout.granules(read.header.record_bytes()) <= self.end - self.granule
            });
            let Some(read) = fits else {
                self.is_lost = true;
                self.was_lost = true;
                self.granule += 1;
                continue;
            };
            let is_sure = !self.is_lost && read.corrected.is_none();
            self.granule += layout.granules(read.header.record_bytes());
            return Some(Found {
                place,
                header: read.header,
                is_live: read.is_live,
                trust: if is_sure {
                    Trust::Header
                } else {
                    Trust::Nothing
                },
            });
        }
        None
    }
}
