// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where to look for a page that is the same as one that comes in.
//!
//! A table of the places of records, found by the sum of their content and the
//! domain inside which equal pages are stored once. It has a fixed size and
//! forgets: a set of [`WAYS`] entries fills one cache line, and a new entry takes
//! the place of the oldest one in its set. So pages that came lately are found
//! by their twins, at four fifths of a byte for each KiB of the store.
//!
//! An entry is a hint and no more: nobody removes it when its record dies. What
//! it leads to may be the middle of another record. So whoever follows it pins
//! the span, makes sure that the place has been written (see
//! [`Arena::pin_written`]: then it stays as it is), compares the bytes, and in
//! the end asks the index whether they still are some page's. No lock is taken.

use crate::arena::{Arena, Pin, Place, mix};
use crate::ledger::sums::Content;
use crate::machine::prefetch::prefetch;
use crate::machine::sync::atomic::{AtomicU16, AtomicU32, Ordering::Relaxed};

/// Entries of a set.
const WAYS: usize = 10;
/// Bytes of the store for each entry.
const BYTES_PER_ENTRY: u64 = 8 << 10;
/// Entries followed for one page, at the most; more would only cost time.
const TRIES: usize = 3;
/// No place.
const NONE: u32 = 0;

#[derive(Debug)]
#[repr(align(64))]
struct Set {
    places: [AtomicU32; WAYS],
    /// Part of the hash, to tell most entries apart without looking at their records.
    tags: [AtomicU16; WAYS],
    next: AtomicU16,
}

const _: () = assert!(size_of::<Set>() == 64 || cfg!(shuttle));

/// See the module's text.
pub(crate) struct Twins {
    sets: Box<[Set]>,
}

/// Where entries for a content are, and how they are marked.
struct Spot<'a> {
    set: &'a Set,
    tag: u16,
}

impl Twins {
    fn count(capacity_bytes: u64) -> u64 {
        (capacity_bytes / BYTES_PER_ENTRY / WAYS as u64).max(1)
    }

    /// Bytes that the table takes, to be charged once.
    pub(crate) fn bytes(capacity_bytes: u64) -> u64 {
        Self::count(capacity_bytes) * size_of::<Set>() as u64
    }

    pub(crate) fn new(capacity_bytes: u64) -> Self {
        let set = |_| Set {
            places: std::array::from_fn(|_| AtomicU32::new(NONE)),
            tags: std::array::from_fn(|_| AtomicU16::new(0)),
            next: AtomicU16::new(0),
        };
        Self {
            sets: (0..Self::count(capacity_bytes)).map(set).collect(),
        }
    }

    fn spot(&self, domain: u16, content: Content) -> Spot<'_> {
        let hash = mix(u64::from(domain) << 32 | u64::from(content.0));
        // The tag from the lowest bits, the set from the highest, by a multiplication instead of a
        // division: the number of sets is well below 32 bits.
        let tag = u16::try_from(hash & 0xffff).unwrap_or(0);
        let at = ((hash >> 32) * self.sets.len() as u64) >> 32;
        Spot {
            set: &self.sets[usize::try_from(at).unwrap_or(0)],
            tag,
        }
    }

    /// Fetches the memory that [`Self::find`] will look at.
    pub(crate) fn prefetch(&self, domain: u16, content: Content) {
        prefetch(std::ptr::from_ref(self.spot(domain, content).set).cast());
    }

    /// A record with this content is at `place`.
    pub(crate) fn insert(&self, domain: u16, content: Content, place: Place) {
        let Spot { set, tag } = self.spot(domain, content);
        // Two threads may use one place; one of them is forgotten then.
        let at = set.next.load(Relaxed);
        set.next.store(at.wrapping_add(1), Relaxed);
        let at = usize::from(at) % WAYS;
        set.tags[at].store(tag, Relaxed);
        set.places[at].store(place.0, Relaxed);
    }

    /// Hands places that may have a record with this content to `look`, pinned and written, until it
    /// returns something.
    pub(crate) fn find<T>(
        &self,
        arena: &Arena,
        domain: u16,
        content: Content,
        mut look: impl FnMut(Place, &Pin<'_>) -> Option<T>,
    ) -> Option<T> {
        let Spot { set, tag } = self.spot(domain, content);
        let entries = set.places.iter().zip(&set.tags);
        entries
            .filter(|(_, entry_tag)| entry_tag.load(Relaxed) == tag)
            .map(|(entry, _)| entry.load(Relaxed))
            .filter(|place| *place != NONE)
            .take(TRIES)
            .find_map(|place| {
                let pin = arena.pin_written(Place(place))?;
                look(Place(place), &pin)
            })
    }
}
