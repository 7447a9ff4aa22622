// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first bytes of an arena: what it is, how it is cut up, and its secret.
//!
//! Two copies, at 0 and at [`COPY_BYTES`], each with a checksum, so that no
//! flipped bit makes an arena unreadable. All integers are little-endian.
//!
//! ```text
//!   0  magic, "CRAMSTOR"              40  boot id of the machine (16 bytes)
//!   8  format version                 56  secret (192 bytes)
//!  12  span size, log2               248  XXH3-64 of the bytes before
//!  16  granule size, log2            256
//!  20  1: closed in an orderly way; else 0
//!  24  length of the arena in bytes
//!  32  generation of the store
//! ```

use twox_hash::XxHash3_64;

use super::Secret;
use super::region::Region;

/// The version of the format that this code writes, and the only one that it reads.
pub const FORMAT_VERSION: u32 = 2;
/// Bytes from one copy to the next; what lies between is unused.
const COPY_BYTES: usize = 2048;
/// Bytes of both copies with what is unused: not less than a page of the host.
pub(crate) const SUPERBLOCK_BYTES: u64 = 2 * COPY_BYTES as u64;

const MAGIC: [u8; 8] = *b"CRAMSTOR";
const BYTES: usize = 256;
const SUM_AT: usize = 248;

/// Bounds on what a superblock may say; beyond them it is damaged, or made by somebody else.
const SPAN_SHIFTS: std::ops::RangeInclusive<u32> = 14..=27;
const GRANULE_SHIFTS: std::ops::RangeInclusive<u32> = 4..=6;

/// What a superblock says.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Superblock {
    pub(crate) span_shift: u32,
    pub(crate) granule_shift: u32,
    pub(crate) len_bytes: u64,
    pub(crate) generation: u64,
    pub(crate) boot_id: [u8; 16],
    /// All that was written is on the disk, if there is one, and nothing was written since.
    pub(crate) is_clean: bool,
    pub(crate) secret: Secret,
}

/// Why there is no superblock to be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// Nothing, or what a maker left that was killed before it was done: the magic is written last.
    Blank,
    /// Something, but no arena.
    Foreign,
    /// An arena of another version of the format.
    Version(u32),
    /// An arena, but neither copy is whole.
    Damaged,
}

impl Superblock {
    fn to_bytes(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        let parts: [(usize, &[u8]); 9] = [
            (0, &MAGIC),
            (8, &FORMAT_VERSION.to_le_bytes()),
            (12, &self.span_shift.to_le_bytes()),
            (16, &self.granule_shift.to_le_bytes()),
            (20, &u32::from(self.is_clean).to_le_bytes()),
            (24, &self.len_bytes.to_le_bytes()),
            (32, &self.generation.to_le_bytes()),
            (40, &self.boot_id),
            (56, self.secret.bytes()),
        ];
        for (at, part) in parts {
            if let Some(to) = bytes.get_mut(at..at + part.len()) {
                to.copy_from_slice(part);
            }
        }
        let sum = XxHash3_64::oneshot(&bytes[..SUM_AT]);
        bytes[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8; BYTES]) -> Result<Self, Unreadable> {
        if bytes[..MAGIC.len()] == [0; MAGIC.len()] {
            return Err(Unreadable::Blank);
        }
        let u32_at = |at: usize| field(bytes, at).map(u32::from_le_bytes);
        let u64_at = |at: usize| field(bytes, at).map(u64::from_le_bytes);
        let (magic, version) = (field::<8>(bytes, 0)?, u32_at(8)?);
        let is_whole = u64_at(SUM_AT)? == XxHash3_64::oneshot(&bytes[..SUM_AT]);
        if !is_whole {
            return Err(if magic == MAGIC {
                Unreadable::Damaged
            } else {
                Unreadable::Foreign
            });
        }
        if magic != MAGIC {
            return Err(Unreadable::Foreign);
        }
        if version != FORMAT_VERSION {
            return Err(Unreadable::Version(version));
        }
        let read = Self {
            span_shift: u32_at(12)?,
            granule_shift: u32_at(16)?,
            len_bytes: u64_at(24)?,
            generation: u64_at(32)?,
            boot_id: field(bytes, 40)?,
            is_clean: u32_at(20)? == 1,
            secret: Secret::new(field(bytes, 56)?),
        };
        let is_sane = SPAN_SHIFTS.contains(&read.span_shift)
            && GRANULE_SHIFTS.contains(&read.granule_shift)
            && read.len_bytes.trailing_zeros() >= read.span_shift
            && read.len_bytes >> read.span_shift >= 2
            && read.len_bytes >> read.granule_shift <= 1 << u32::BITS
            && read.generation != 0;
        if is_sane {
            Ok(read)
        } else {
            Err(Unreadable::Damaged)
        }
    }

    /// Writes both copies, one after the other, each with its magic at last.
    pub(crate) fn write(&self, region: &Region) {
        let bytes = self.to_bytes();
        for copy in [0, COPY_BYTES as u64] {
            let words = (0..).step_by(8).zip(bytes.as_chunks::<8>().0);
            for (at, word) in words.collect::<Vec<_>>().into_iter().rev() {
                let word = u64::from_le_bytes(*word);
                region
                    .word(copy + at)
                    .store(word.to_le(), std::sync::atomic::Ordering::Release);
            }
        }
    }

    /// Puts both copies into the first bytes of an arena.
    #[cfg(fuzzing)]
    pub(crate) fn copy_to(&self, first_bytes: &mut [u8]) {
        for copy in [0, COPY_BYTES] {
            first_bytes[copy..copy + BYTES].copy_from_slice(&self.to_bytes());
        }
    }

    /// Reads the copy that is whole from the first bytes of an arena.
    pub(crate) fn read(first_bytes: &[u8]) -> Result<Self, Unreadable> {
        let copy = |at: usize| -> Result<Self, Unreadable> {
            let bytes = first_bytes.get(at..at + BYTES).ok_or(Unreadable::Foreign)?;
            Self::from_bytes(bytes.try_into().map_err(|_| Unreadable::Foreign)?)
        };
        match (copy(0), copy(COPY_BYTES)) {
            (Ok(read), _) | (_, Ok(read)) => Ok(read),
            (Err(Unreadable::Blank), Err(Unreadable::Blank)) => Err(Unreadable::Blank),
            (Err(Unreadable::Version(version)), _) | (_, Err(Unreadable::Version(version))) => {
                Err(Unreadable::Version(version))
            }
            (Err(Unreadable::Damaged), _) | (_, Err(Unreadable::Damaged)) => {
                Err(Unreadable::Damaged)
            }
            _ => Err(Unreadable::Foreign),
        }
    }
}

fn field<const N: usize>(bytes: &[u8; BYTES], at: usize) -> Result<[u8; N], Unreadable> {
    bytes
        .get(at..at + N)
        .and_then(|bytes| bytes.try_into().ok())
        .ok_or(Unreadable::Foreign)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn superblock() -> Superblock {
        Superblock {
            span_shift: 20,
            granule_shift: 4,
            len_bytes: 64 << 20,
            generation: 77,
            boot_id: [3; 16],
            is_clean: true,
            secret: Secret::new([5; Secret::BYTES]),
        }
    }

    fn copies(first: &Superblock) -> Vec<u8> {
        let mut bytes = vec![0; 2 * COPY_BYTES];
        for at in [0, COPY_BYTES] {
            bytes[at..at + BYTES].copy_from_slice(&first.to_bytes());
        }
        bytes
    }

    #[test]
    fn either_copy_will_do() {
        let whole = copies(&superblock());
        assert!(Superblock::read(&whole).is_ok_and(|read| read == superblock()));
        for bit in 0..whole.len() * 8 {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Superblock::read(&flipped).is_ok_and(|read| read == superblock()));
        }
    }

    #[test]
    fn what_cannot_be_read_is_told_apart() {
        let reading = |bytes: &[u8]| Superblock::read(bytes).err();
        assert_eq!(reading(&[0; 4096]), Some(Unreadable::Blank));
        assert_eq!(reading(&[7; 4096]), Some(Unreadable::Foreign));
        assert_eq!(reading(b"short"), Some(Unreadable::Foreign));
        let mut damaged = copies(&superblock());
        damaged[100] ^= 1;
        damaged[COPY_BYTES + 100] ^= 1;
        assert_eq!(reading(&damaged), Some(Unreadable::Damaged));
        let mut newer = superblock().to_bytes();
        newer[8] = 3;
        let sum = XxHash3_64::oneshot(&newer[..SUM_AT]);
        newer[SUM_AT..].copy_from_slice(&sum.to_le_bytes());
        let mut bytes = vec![0; 2 * COPY_BYTES];
        bytes[..BYTES].copy_from_slice(&newer);
        assert_eq!(reading(&bytes), Some(Unreadable::Version(3)));
        let absurd = Superblock {
            span_shift: 31,
            ..superblock()
        };
        assert_eq!(reading(&copies(&absurd)), Some(Unreadable::Damaged));
    }
}
