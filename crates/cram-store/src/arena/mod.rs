// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arena: where everything is that has to outlive the process. A log of
//! records in one mapped file.
//!
//! The file is cut into *spans* (1 MiB in stores of some size). A *head* fills
//! one span after another with records from the beginning to the end; a record
//! is a [`record::Header`] and up to 4096 bytes. Nothing is overwritten but the
//! word that says whether a record lives. When all records of a span are dead
//! it is free; [`crate::compact`] moves the last ones out.
//!
//! What may be touched when:
//! - Words of headers are atomic, always.
//! - The bytes of a payload are written by who appends the record, before the
//!   record's word 0 is, and never again until the span was freed and taken
//!   anew. A span is not freed as long as a record in it lives or a [`Pin`] is on
//!   it. So a payload is plain, unchanging memory for whoever came by its place
//!   under a lock that keeps the record alive, and pinned the span there.
//! - Whoever holds the lock of a head is alone with the unused end of its span.

mod ecc;
mod file;
#[cfg(fuzzing)]
mod forge;
mod head;
mod layout;
mod record;
mod region;
mod span;
mod span_header;
mod spans;
mod superblock;
#[cfg(all(test, not(loom), not(shuttle)))]
mod tests;
mod walk;

pub use file::ArenaError;
pub(crate) use file::Opened;
#[cfg(fuzzing)]
pub(crate) use forge::{ForgedHeader, ForgedSpan, forge_record, forge_span, forge_superblock};
#[cfg(any(test, feature = "fault-injection"))]
pub use head::jump_clock;
pub(crate) use head::{Head, Record, now};
pub(crate) use layout::layout_for;
pub(crate) use record::{HEADER_BYTES, Header, Kind, NUMBERS, PAYLOAD_BYTES_MAX, is_newer};
pub(crate) use span_header::{Role, SpanHeader};
pub(crate) use spans::{SpanInfo, Urgency};
pub use superblock::FORMAT_VERSION;
pub(crate) use superblock::SUPERBLOCK_BYTES;
pub(crate) use walk::{Found, Trust};

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64 as PlainAtomicU64, Ordering};

use spans::Spans;

use crate::machine::sync::Mutex;
use crate::machine::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use superblock::Superblock;

/// Keys everything that a guest must not be able to foresee: hashes of pages, codes of headers.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret([u8; Secret::BYTES]);

impl Secret {
    /// As long as XXH3's own.
    pub(crate) const BYTES: usize = 192;

    pub(crate) fn new(bytes: [u8; Self::BYTES]) -> Self {
        Self(bytes)
    }

    pub(crate) fn bytes(&self) -> &[u8; Self::BYTES] {
        &self.0
    }

    /// A number for each purpose.
    pub(crate) fn number(&self, purpose: u8) -> u64 {
        let at = usize::from(purpose) * 8 % (Self::BYTES - 7);
        let bytes = self.0.get(at..at + 8).and_then(|b| b.try_into().ok());
        u64::from_le_bytes(bytes.unwrap_or_default())
    }
}

/// Mixes a number, so that every bit of the result hangs on every bit of it (the finalizer of
/// splitmix64; S. Vigna, <https://prng.di.unimi.it/splitmix64.c>).
pub(crate) fn mix(number: u64) -> u64 {
    let number = (number ^ number >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ number >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ number >> 31
}

/// Where a record is: granules from the beginning of the arena. Never 0, where the superblock is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Place(pub(crate) u32);

/// How the file is cut up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) span_shift: u32,
    pub(crate) granule_shift: u32,
    /// Spans, the one that the superblock is in included.
    pub(crate) spans: u32,
}

impl Layout {
    pub(crate) fn span_bytes(self) -> u64 {
        1 << self.span_shift
    }

    pub(crate) fn len_bytes(self) -> u64 {
        u64::from(self.spans) << self.span_shift
    }

    pub(crate) fn span_granules(self) -> u32 {
        1 << (self.span_shift - self.granule_shift)
    }

    /// Granules that so many bytes take.
    pub(crate) fn granules(self, bytes: usize) -> u32 {
        u32::try_from(bytes.div_ceil(1 << self.granule_shift)).unwrap_or(u32::MAX)
    }

    /// Whole granules in so many bytes.
    pub(crate) fn granules_of(self, bytes: u64) -> u32 {
        u32::try_from(bytes >> self.granule_shift).unwrap_or(u32::MAX)
    }

    /// Where a span begins, in bytes.
    pub(crate) fn span_at(self, span: u32) -> u64 {
        u64::from(span) << self.span_shift
    }

    /// Bytes of whole granules.
    pub(crate) fn bytes_of(self, granules: u32) -> u64 {
        u64::from(granules) << self.granule_shift
    }

    /// Granules at the beginning of a span that its own header takes.
    pub(crate) fn first_granule(self) -> u32 {
        self.granules(span_header::SPAN_HEADER_BYTES)
    }

    pub(crate) fn place(self, span: u32, granule: u32) -> Place {
        Place((span << (self.span_shift - self.granule_shift)).wrapping_add(granule))
    }

    pub(crate) fn span_of(self, place: Place) -> u32 {
        place.0 >> (self.span_shift - self.granule_shift)
    }

    pub(crate) fn granule_of(self, place: Place) -> u32 {
        place.0 & (self.span_granules() - 1)
    }

    pub(crate) fn offset(self, place: Place) -> u64 {
        self.bytes_of(place.0)
    }

    /// What a record with so many bytes of payload takes in the arena, in bytes.
    pub(crate) fn record_bytes(self, payload: usize) -> u64 {
        self.bytes_of(self.granules(record::HEADER_BYTES + payload))
    }
}

/// A record whose header is damaged beyond repair: memory was changed from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Damaged;

/// Binds a header to its place and to the life of its span.
fn salt_of(secret: u64, place: Place, sequence: u64) -> u16 {
    let mixed = mix(secret ^ mix(sequence) ^ u64::from(place.0));
    // The upper 16 bits.
    u16::try_from(mixed >> 48).unwrap_or(0)
}

/// See the module's text.
pub(crate) struct Arena {
    superblock: Superblock,
    /// What the file said when it was opened, if it was an arena.
    found: Option<Superblock>,
    /// Its contents were accepted, so that it may be written to.
    is_committed: AtomicBool,
    /// Headers that are to be corrected once it is.
    flipped: Mutex<Vec<Place>>,
    /// The file, if it has a name.
    path: Option<PathBuf>,
    layout: Layout,
    secret: Secret,
    salt: u64,
    spans: Spans,
    /// Records that were found damaged beyond repair. Their spans are never freed.
    damaged: AtomicU64,
    /// Bits that were found flipped and corrected.
    corrected: AtomicU64,
}

impl Arena {
    pub(crate) fn layout(&self) -> Layout {
        self.layout
    }

    pub(crate) fn secret(&self) -> &Secret {
        &self.secret
    }

    pub(crate) fn spans(&self) -> &Spans {
        &self.spans
    }

    /// The addresses at which it is mapped.
    pub(crate) fn mapping(&self) -> std::ops::Range<usize> {
        self.spans.region().addresses()
    }

    pub(crate) fn damaged_records(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    pub(crate) fn corrected_bits(&self) -> u64 {
        self.corrected.load(Ordering::Relaxed)
    }

    /// Bytes of this process's own memory for the arena's book-keeping.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        size_of::<Self>() as u64 + self.spans.table_bytes()
    }

    fn words(&self, place: Place) -> [&PlainAtomicU64; 2] {
        let at = self.layout.offset(place);
        [
            self.spans.region().word(at),
            self.spans.region().word(at + 8),
        ]
    }

    fn salt_of(&self, place: Place, sequence: u64) -> u16 {
        salt_of(self.salt, place, sequence)
    }

    /// Whether the mark is here that stands behind the last record of a span.
    fn is_end(&self, place: Place) -> bool {
        let [first, _] = self.words(place);
        first.load(Ordering::Acquire) == 0
    }

    fn read(&self, place: Place, sequence: u64) -> Option<record::Read> {
        let words = self
            .words(place)
            .map(|word| u64::from_le(word.load(Ordering::Acquire)));
        record::read(words, self.salt_of(place, sequence))
    }

    /// The header of the record at `place`, which the caller's lock keeps alive (or a pin keeps in
    /// its place). A flipped bit is corrected, now or when the arena may be written to.
    pub(crate) fn header(&self, place: Place) -> Result<Header, Damaged> {
        let sequence = self.spans.sequence(self.layout.span_of(place));
        let Some(read) = self.read(place, sequence) else {
            self.damaged.fetch_add(1, Ordering::Relaxed);
            return Err(Damaged);
        };
        if let Some(corrected) = read.corrected {
            if self.is_committed.load(Relaxed) {
                self.corrected.fetch_add(1, Ordering::Relaxed);
                let [first, second] = self.words(place);
                second.store(corrected[1].to_le(), Ordering::Release);
                first.store(corrected[0].to_le(), Ordering::Release);
            } else {
                self.flipped.lock().push(place);
            }
        }
        Ok(read.header)
    }

    /// Fetches a record's header.
    pub(crate) fn prefetch_header(&self, place: Place) {
        let at = self.layout.offset(place);
        self.spans.region().prefetch(at, record::HEADER_BYTES);
    }

    /// Notes that a page was got.
    pub(crate) fn mark_used(&self, place: Place) {
        let [_, second] = self.words(place);
        if u64::from_le(second.load(Ordering::Relaxed)) & record::USED == 0 {
            second.fetch_or(record::USED.to_le(), Ordering::Relaxed);
        }
    }

    /// Declares a record dead. The caller holds the lock that its life hangs on, and has taken out
    /// whatever led to it. Returns what it was.
    ///
    /// A record that is damaged beyond repair is declared dead too, but since it does not say how
    /// long it is, its span will never be free again: that is better than freeing what is another's.
    pub(crate) fn kill(&self, place: Place) -> Result<Header, Damaged> {
        match self.header(place) {
            Ok(header) => {
                self.kill_known(place, &header);
                Ok(header)
            }
            Err(Damaged) => {
                self.reject(place);
                Err(Damaged)
            }
        }
    }

    /// As [`Self::kill`], for who has read the record's header already.
    pub(crate) fn kill_known(&self, place: Place, header: &Header) {
        self.reject(place);
        let granules = self.layout.granules(header.record_bytes());
        let span = self.layout.span_of(place);
        let freed = self.spans.life(span).sub_live(granules);
        self.spans.take_back(span, freed);
    }

    /// At recovery: a record that was found stays.
    pub(crate) fn accept(&self, place: Place) -> Result<Header, Damaged> {
        let header = self.header(place)?;
        let granules = self.layout.granules(header.record_bytes());
        self.spans
            .life(self.layout.span_of(place))
            .add_live(granules);
        Ok(header)
    }

    /// A record is dead. At recovery: one that was found and not accepted.
    pub(crate) fn reject(&self, place: Place) {
        let [first, _] = self.words(place);
        let word = u64::from_le(first.load(Ordering::Relaxed));
        first.store(record::dead(word).to_le(), Ordering::Release);
    }

    /// Flips a bit of a record's payload (`bit` modulo its length), as failing memory would; of its
    /// header when it has none. Nobody may be reading it.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(crate) fn flip_payload_bit(&self, place: Place, bit: usize) -> bool {
        let Ok(header) = self.header(place) else {
            return false;
        };
        let at = match header.len {
            0 => 8 + bit / 8 % 4,
            len => record::HEADER_BYTES + bit / 8 % len,
        };
        self.flip_bit(self.layout.offset(place) + at as u64, bit % 8);
        true
    }

    /// Flips a bit of the byte at `offset` in the arena.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(crate) fn flip_bit(&self, offset: u64, bit: usize) {
        let byte = offset % 8;
        let mask = 1_u64 << (byte * 8 + bit as u64 % 8);
        let word = self.spans.region().word(offset - byte);
        word.fetch_xor(mask.to_le(), Ordering::Relaxed);
    }

    /// Pins the span of a place of which nothing is known, if it has been filled beyond it. Then what
    /// is there, be it a record or the middle of one, stays as it is as long as the pin does: a span
    /// is filled from its beginning on, and never twice in one life.
    pub(crate) fn pin_written(&self, place: Place) -> Option<Pin<'_>> {
        let pin = self.pin(place);
        let info = self.spans.info(pin.span)?;
        (self.layout.granule_of(place) < info.filled).then_some(pin)
    }

    /// The header at a place of [`Self::pin_written`], if it looks like one, and the record that it
    /// would be is written.
    pub(crate) fn header_at(&self, place: Place, pin: &Pin<'_>) -> Option<Header> {
        let info = self.spans.info(pin.span)?;
        let read = self.read(place, info.sequence)?;
        let granules = self.layout.granules(read.header.record_bytes());
        let is_written = granules <= info.filled - self.layout.granule_of(place).min(info.filled);
        (read.is_live && is_written).then_some(read.header)
    }

    /// Keeps the span of `place` from being freed. See [`span::Life::pin`] for when that means
    /// anything.
    pub(crate) fn pin(&self, place: Place) -> Pin<'_> {
        let span = self.layout.span_of(place);
        self.spans.life(span).pin();
        Pin { arena: self, span }
    }

    /// Whether a put could have another span.
    pub(crate) fn has_span(&self) -> bool {
        self.spans.has_free()
    }

    /// Gives spans that are free back to the host until at most `keep` wait to be used again. How
    /// many were given back.
    pub(crate) fn trim(&self, keep: usize) -> usize {
        self.spans.trim(keep)
    }

    /// Has one more span ready to be filled, without its taker having to wait for the host's
    /// memory. False when there are `wanted` already, or there is little room.
    pub(crate) fn prepare(&self, wanted: usize) -> bool {
        self.spans.prepare(wanted)
    }
}

/// Keeps a span from being freed as long as it is there.
pub(crate) struct Pin<'a> {
    arena: &'a Arena,
    span: u32,
}

impl Pin<'_> {
    /// The payload of a record in the pinned span, as long as `header` says.
    ///
    /// `place` and `header` must have been learnt in the way that the module's text describes:
    /// under the lock that keeps the record alive; or from [`Arena::header_at`] with this pin.
    pub(crate) fn payload(&self, place: Place, header: &Header) -> &[u8] {
        let arena = self.arena;
        assert_eq!(
            arena.layout.span_of(place),
            self.span,
            "another span's record"
        );
        let at = arena.layout.offset(place) + record::HEADER_BYTES as u64;
        arena.payload_at(at, header.len)
    }
}

impl Arena {
    #[allow(unsafe_code)]
    fn payload_at(&self, at: u64, len: usize) -> &[u8] {
        // SAFETY: only reached through a `Pin`, whose span was pinned while the record lived (or while
        // these bytes were known to be written): so it cannot have been freed since, and what is
        // written in a span is not written to again before it was. (A
        // process that maps the file as well and writes to it breaks this; the file is private, see
        // docs/threat-model.md.)
        unsafe { self.spans.region().bytes(at, len) }
    }
}

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        let freed = self.arena.spans.life(self.span).unpin();
        self.arena.spans.take_back(self.span, freed);
    }
}
