// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! An error-correcting code for the two words of a record's header: any one
//! flipped bit is corrected, any two are noticed.
//!
//! A page's own checksum cannot guard its header, since the header says how
//! long the page is and whose. So the header has a code of its own, of the kind
//! that memory modules use (M. Y. Hsiao, "A Class of Optimal Minimum
//! Odd-weight-column SEC-DED Codes", IBM Journal of Research and Development,
//! 1970): each data bit has a column of three of the [`CHECK_BITS`] check bits;
//! the code is the sum of the columns of all bits that are set. Columns of odd
//! weight differ from each other in an even number of places, so the sum of two
//! of them is never a column, and two errors never look like one.

/// Bits of a code.
pub(crate) const CHECK_BITS: u32 = 12;
const CHECK_MASK: u16 = (1 << CHECK_BITS) - 1;
const BITS: usize = 128;

/// The column of each bit of the two words.
const COLUMNS: [u16; BITS] = columns();
/// The sum of columns for each value of each byte, so that a code is 16 look-ups.
const TABLES: [[u16; 256]; 16] = tables();

/// 128 of the 220 numbers of 12 bits in which three bits are set, evenly chosen, so that every
/// check bit does its share.
const fn columns() -> [u16; BITS] {
    let mut columns = [0; BITS];
    let (mut filled, mut seen, mut number) = (0, 0, 0_u16);
    while filled < BITS {
        if number.count_ones() == 3 {
            if seen == filled * 220 / BITS {
                columns[filled] = number;
                filled += 1;
            }
            seen += 1;
        }
        number += 1;
    }
    assert!(number <= 1 << CHECK_BITS);
    columns
}

const fn tables() -> [[u16; 256]; 16] {
    let mut tables = [[0; 256]; 16];
    let mut byte = 0;
    while byte < 16 {
        let mut value = 1_usize;
        while value < 256 {
            // One bit more than a smaller value whose sum is known.
            let bit = value.trailing_zeros() as usize;
            tables[byte][value] = tables[byte][value & (value - 1)] ^ COLUMNS[byte * 8 + bit];
            value += 1;
        }
        byte += 1;
    }
    tables
}

/// The code of two words.
pub(crate) fn code(words: [u64; 2]) -> u16 {
    let [first, second] = words.map(u64::to_le_bytes);
    first
        .iter()
        .chain(&second)
        .zip(&TABLES)
        .fold(0, |sum, (byte, table)| sum ^ table[usize::from(*byte)])
}

/// What two words and their code, as they were found, stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// They agree.
    Intact,
    /// The code itself has a flipped bit.
    CodeFlipped,
    /// This bit (0 to 127) of the words was flipped.
    Flipped(u32),
    /// More than one bit is wrong.
    Damaged,
}

/// Compares words with a code.
pub(crate) fn judge(words: [u64; 2], found: u16) -> Verdict {
    let syndrome = (code(words) ^ found) & CHECK_MASK;
    match syndrome.count_ones() {
        0 => Verdict::Intact,
        1 => Verdict::CodeFlipped,
        _ => (0..)
            .zip(COLUMNS)
            .find(|(_, column)| *column == syndrome)
            .map_or(Verdict::Damaged, |(bit, _)| Verdict::Flipped(bit)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORDS: [u64; 2] = [0x0123_4567_89ab_cdef, 0xfedc_ba98_7654_3210];

    fn flip(words: [u64; 2], bit: u32) -> [u64; 2] {
        let mut words = words;
        words[(bit / 64) as usize] ^= 1 << (bit % 64);
        words
    }

    #[test]
    fn one_flipped_bit_is_found_wherever_it_is() {
        let right = code(WORDS);
        assert_eq!(judge(WORDS, right), Verdict::Intact);
        for bit in 0..128 {
            assert_eq!(judge(flip(WORDS, bit), right), Verdict::Flipped(bit));
        }
        for bit in 0..CHECK_BITS {
            assert_eq!(judge(WORDS, right ^ 1 << bit), Verdict::CodeFlipped);
        }
    }

    #[test]
    fn two_flipped_bits_are_never_taken_for_one_or_none() {
        let right = code(WORDS);
        for first in 0..128 {
            for second in 0..first {
                let words = flip(flip(WORDS, first), second);
                assert_eq!(judge(words, right), Verdict::Damaged, "{first} {second}");
            }
            for bit in 0..CHECK_BITS {
                let verdict = judge(flip(WORDS, first), right ^ 1 << bit);
                assert_eq!(verdict, Verdict::Damaged, "{first} and {bit} of the code");
            }
        }
    }
}
