// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The header of a record: 16 bytes before each payload in the arena, by which
//! it describes itself.
//!
//! ```text
//! word 0   63..60  59                  32 31                               0
//!         [state ][       number        ][              index              ]
//! word 1   63  62 61  60        49  48  47 45  44        32 31             0
//!         [used][gen][    code    ][zstd][kind][   length  ][    check     ]
//! ```
//!
//! `number` and `index` name the owner: for a page, the number of its object
//! and the page's index in it. `check` is a checksum of what the payload stands
//! for, bound to the owner. `code` is an error-correcting code (see
//! [`super::ecc`]) of everything but `state`, `gen` and `used`, which change
//! while the record lives; it is also bound to the place and to the span's
//! sequence number, so that what an earlier life of the span left behind is no
//! record. `state` is one of two words that differ in all four bits, so one
//! flipped bit does not change it.

use super::ecc::{self, CHECK_BITS, Verdict};

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 16;
/// The most bytes of a payload.
pub(crate) const PAYLOAD_BYTES_MAX: usize = 4096;
/// Numbers of owners are below this.
pub(crate) const NUMBERS: u32 = 1 << NUMBER_BITS;

const NUMBER_BITS: u32 = 28;
const STATE_SHIFT: u32 = 60;
const STATE_MASK: u64 = 0xf << STATE_SHIFT;
const LIVE: u64 = 0b1010;
const DEAD: u64 = 0b0101;

const LENGTH_SHIFT: u32 = 32;
const LENGTH_BITS: u32 = 13;
const KIND_SHIFT: u32 = LENGTH_SHIFT + LENGTH_BITS;
const ZSTD_SHIFT: u32 = KIND_SHIFT + 3;
const CODE_SHIFT: u32 = ZSTD_SHIFT + 1;
const GENERATION_SHIFT: u32 = CODE_SHIFT + CHECK_BITS;
const USED_SHIFT: u32 = GENERATION_SHIFT + 2;
const _: () = assert!(USED_SHIFT == 63 && PAYLOAD_BYTES_MAX < 1 << LENGTH_BITS);

/// The bits of word 1 that the code guards.
const GUARDED: u64 = (1 << CODE_SHIFT) - 1;
/// Says, in word 1, that the page was got since a background scan last looked.
pub(crate) const USED: u64 = 1 << USED_SHIFT;

/// What a record is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub(crate) enum Kind {
    /// A page's image, owned by its key. No payload: filled with zeroes. 8 bytes: filled with that
    /// word. 4096 bytes: as it is. Else compressed.
    Page = 1,
    /// An image that several pages of one domain have in common. `number` is the domain, `index`
    /// the image's number in it.
    Image = 2,
    /// A page that has its bytes from an image; the payload is the image's number.
    Alias = 3,
    /// Who may own pages: a client, a shared pool, a sharing group. `number` is its own.
    Account = 4,
    /// The pages of a pool, or of a shared one. `number` is its own.
    Space = 5,
    /// A client's pool: `number` is the client's account, `index` the pool's id.
    Pool = 6,
    /// An object of a space. `number` is its own.
    Object = 7,
}

impl Kind {
    fn of(word: u64) -> Option<Self> {
        // Masked to 3 bits.
        Self::numbered(u8::try_from(word >> KIND_SHIFT & 7).ok()?)
    }

    pub(super) fn numbered(number: u8) -> Option<Self> {
        Some(match number & 7 {
            1 => Self::Page,
            2 => Self::Image,
            3 => Self::Alias,
            4 => Self::Account,
            5 => Self::Space,
            6 => Self::Pool,
            7 => Self::Object,
            _ => return None,
        })
    }
}

/// A header, unpacked; without the state, which is the place's and not the record's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) kind: Kind,
    /// The owner's number, below [`NUMBERS`].
    pub(crate) number: u32,
    pub(crate) index: u32,
    /// Bytes of the payload, up to [`PAYLOAD_BYTES_MAX`].
    pub(crate) len: usize,
    /// The payload was compressed with zstd rather than lz4.
    pub(crate) is_zstd: bool,
    pub(crate) check: u32,
    /// Counts, modulo 4, how often the page was put since it was last absent: of two records of
    /// one page that a killed process left, the one that is one ahead is the newer.
    pub(crate) generation: u8,
    pub(crate) is_used: bool,
}

impl Header {
    /// Bytes of the whole record.
    pub(crate) fn record_bytes(&self) -> usize {
        HEADER_BYTES + self.len
    }

    /// The two words, live. `salt` binds them to their place.
    pub(crate) fn pack(&self, salt: u16) -> [u64; 2] {
        let guarded = [
            u64::from(self.index) | u64::from(self.number % NUMBERS) << 32,
            u64::from(self.check)
                | (self.len as u64) << LENGTH_SHIFT
                | (self.kind as u64) << KIND_SHIFT
                | u64::from(self.is_zstd) << ZSTD_SHIFT,
        ];
        let code = u64::from(ecc::code(guarded) ^ salt & ((1 << CHECK_BITS) - 1));
        [
            guarded[0] | LIVE << STATE_SHIFT,
            guarded[1]
                | code << CODE_SHIFT
                | u64::from(self.generation & 3) << GENERATION_SHIFT
                | u64::from(self.is_used) << USED_SHIFT,
        ]
    }
}

/// What two words are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) header: Header,
    pub(crate) is_live: bool,
    /// A flipped bit was corrected: the words as they should be.
    pub(crate) corrected: Option<[u64; 2]>,
}

/// Reads a header; `None` when it is none, or is damaged beyond repair.
pub(crate) fn read(words: [u64; 2], salt: u16) -> Option<Read> {
    let state = state(words[0])?;
    let mut guarded = [words[0] & !STATE_MASK, words[1] & GUARDED];
    let salt = salt & ((1 << CHECK_BITS) - 1);
    // Masked to 12 bits.
    let code = u16::try_from(words[1] >> CODE_SHIFT & ((1 << CHECK_BITS) - 1)).ok()?;
    let verdict = ecc::judge(guarded, code ^ salt);
    match verdict {
        Verdict::Intact | Verdict::CodeFlipped => (),
        Verdict::Flipped(bit) => {
            let word = guarded.get_mut(bit as usize / 64)?;
            *word ^= 1 << (bit % 64);
            // A bit that the code does not guard is always 0 in it.
            if guarded[0] & STATE_MASK != 0 || guarded[1] & !GUARDED != 0 {
                return None;
            }
        }
        Verdict::Damaged => return None,
    }
    let is_flipped = verdict != Verdict::Intact || state.is_flipped;
    let header = unpack(guarded, words[1])?;
    let corrected = is_flipped.then(|| {
        let [first, second] = header.pack(salt);
        let dead = first & !STATE_MASK | DEAD << STATE_SHIFT;
        [if state.is_live { first } else { dead }, second]
    });
    Some(Read {
        header,
        is_live: state.is_live,
        corrected,
    })
}

fn unpack(guarded: [u64; 2], flags: u64) -> Option<Header> {
    let low = |word: u64| u32::try_from(word & u64::from(u32::MAX)).ok();
    let len = guarded[1] >> LENGTH_SHIFT & ((1 << LENGTH_BITS) - 1);
    Some(Header {
        kind: Kind::of(guarded[1])?,
        number: low(guarded[0] >> 32)?,
        index: low(guarded[0])?,
        len: usize::try_from(len)
            .ok()
            .filter(|len| *len <= PAYLOAD_BYTES_MAX)?,
        is_zstd: guarded[1] >> ZSTD_SHIFT & 1 == 1,
        check: low(guarded[1])?,
        generation: u8::try_from(flags >> GENERATION_SHIFT & 3).ok()?,
        is_used: flags & USED != 0,
    })
}

struct State {
    is_live: bool,
    is_flipped: bool,
}

/// The state that word 0 is nearest to; `None` when it is as far from both.
fn state(word: u64) -> Option<State> {
    let state = word >> STATE_SHIFT;
    let wrong = (state ^ LIVE).count_ones();
    (wrong != 2).then_some(State {
        is_live: wrong < 2,
        is_flipped: wrong == 1 || wrong == 3,
    })
}

/// Word 0 of the same record once it is dead.
pub(crate) fn dead(word: u64) -> u64 {
    word & !STATE_MASK | DEAD << STATE_SHIFT
}

/// Whether `newer` was put one time more than `older`, for two generations of one page.
pub(crate) fn is_newer(newer: u8, older: u8) -> bool {
    newer.wrapping_sub(older) & 3 == 1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> Header {
        Header {
            kind: Kind::Page,
            number: 0x0abc_def1,
            index: 0x8765_4321,
            len: 4096,
            is_zstd: true,
            check: 0xdead_beef,
            generation: 3,
            is_used: true,
        }
    }

    #[test]
    fn headers_come_back_and_die() {
        for salt in [0, 0xfff, 0x1234] {
            let words = header().pack(salt);
            let found = read(words, salt).unwrap();
            assert_eq!((found.header, found.is_live), (header(), true));
            assert_eq!(found.corrected, None);
            let found = read([dead(words[0]), words[1]], salt).unwrap();
            assert_eq!((found.header, found.is_live), (header(), false));
        }
        assert_eq!(read([0, 0], 7), None, "memory that was never written");
    }

    #[test]
    fn any_one_flipped_bit_is_corrected_but_for_those_that_nothing_hangs_on() {
        let words = header().pack(0x5a5);
        for bit in 0..128_usize {
            let mut flipped = words;
            flipped[bit / 64] ^= 1 << (bit % 64);
            let found = read(flipped, 0x5a5).unwrap();
            assert!(found.is_live);
            if bit >= 64 + GENERATION_SHIFT as usize {
                let expected = Header {
                    generation: found.header.generation,
                    is_used: found.header.is_used,
                    ..header()
                };
                assert_eq!(found.header, expected);
            } else {
                assert_eq!(found.header, header(), "bit {bit}");
                assert_eq!(found.corrected, Some(words), "bit {bit}");
            }
        }
    }

    #[test]
    fn a_header_is_none_elsewhere() {
        let words = header().pack(0x5a5);
        let accepted = (0..1 << CHECK_BITS)
            .filter(|salt| read(words, *salt).is_some_and(|read| read.corrected.is_none()))
            .count();
        assert_eq!(accepted, 1);
    }

    #[test]
    fn generations_go_round() {
        assert!(is_newer(0, 3) && is_newer(1, 0) && is_newer(3, 2));
        assert!(!is_newer(0, 0) && !is_newer(3, 0) && !is_newer(0, 2));
    }
}
