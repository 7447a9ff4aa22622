// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the first 64 bytes of a span say, twice, so that no flipped bit loses the
//! span. Little-endian words:
//!
//! ```text
//!   0  magic (32 bits), role (8), reserved (8), owner (16)
//!   8  sequence number: counts openings of spans, over the whole life of the arena
//!  16  when it was opened, in seconds of Unix time
//!  24  mixture of the secret, the span's number and the words before
//! ```

use std::sync::atomic::Ordering::{Acquire, Release};

use super::region::Region;
use super::{Layout, mix};

/// Bytes of both copies.
pub(crate) const SPAN_HEADER_BYTES: usize = 64;
const COPY_BYTES: u64 = 32;
const MAGIC: u64 = 0x6e70_5363;

/// What is in a span. Records of different roles are never mixed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Role {
    /// Pages that are never evicted, and images.
    Pages,
    /// Accounts, spaces, pools, objects.
    Catalogue,
    /// Ephemeral pages of an account that were put lately.
    Fresh(u16),
    /// Ephemeral pages of an account that have proved useful.
    Proven(u16),
}

impl Role {
    pub(super) fn to_word(self) -> u64 {
        let (role, owner) = match self {
            Self::Pages => (1, 0),
            Self::Catalogue => (2, 0),
            Self::Fresh(owner) => (3, owner),
            Self::Proven(owner) => (4, owner),
        };
        MAGIC | role << 32 | u64::from(owner) << 48
    }

    pub(super) fn from_word(word: u64) -> Option<Self> {
        let owner = u16::try_from(word >> 48).ok()?;
        let role = match word >> 32 & 0xff {
            1 => Self::Pages,
            2 => Self::Catalogue,
            3 => Self::Fresh(owner),
            4 => Self::Proven(owner),
            _ => return None,
        };
        (role.to_word() == word).then_some(role)
    }
}

/// A span's header, as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpanHeader {
    pub(crate) span: u32,
    pub(crate) role: Role,
    pub(crate) sequence: u64,
    pub(crate) born: u64,
}

fn sum(span: u32, words: [u64; 3], secret: u64) -> u64 {
    words
        .iter()
        .fold(mix(secret ^ u64::from(span)), |sum, word| mix(sum ^ word))
}

/// The words of one copy.
pub(super) fn header_words(header: &SpanHeader, secret: u64) -> [u64; 4] {
    let words = [header.role.to_word(), header.sequence, header.born];
    let [role, sequence, born] = words;
    [role, sequence, born, sum(header.span, words, secret)]
}

/// Writes both copies. The host must have given memory for them.
pub(super) fn write_header(region: &Region, layout: Layout, header: &SpanHeader, secret: u64) {
    let at = layout.span_at(header.span);
    let all = header_words(header, secret);
    for copy in [0, COPY_BYTES] {
        for (step, word) in (0..).step_by(8).zip(all) {
            region.word(at + copy + step).store(word.to_le(), Release);
        }
    }
}

/// Reads a span's header; `None` when neither copy is whole.
pub(super) fn read_header(
    region: &Region,
    layout: Layout,
    span: u32,
    secret: u64,
) -> Option<SpanHeader> {
    let at = layout.span_at(span);
    [0, COPY_BYTES].into_iter().find_map(|copy| {
        let word = |step: u64| u64::from_le(region.word(at + copy + step).load(Acquire));
        let words = [word(0), word(8), word(16)];
        if word(24) != sum(span, words, secret) {
            return None;
        }
        Some(SpanHeader {
            span,
            role: Role::from_word(words[0])?,
            sequence: words[1],
            born: words[2],
        })
    })
}
