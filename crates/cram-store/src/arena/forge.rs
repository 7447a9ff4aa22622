// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! See [`crate::forge`].

use super::record::{self, HEADER_BYTES, Header, NUMBERS};
use super::span_header::{Role, SPAN_HEADER_BYTES, SpanHeader, header_words};
use super::superblock::Superblock;
use super::{Layout, Place, Secret, salt_of};
use crate::core::layout_for;

/// The span that is being filled.
pub(crate) struct ForgedSpan {
    layout: Layout,
    header: SpanHeader,
    is_real: bool,
    granule: u32,
}

/// A header that need not make sense.
pub(crate) struct ForgedHeader {
    pub(crate) kind: u8,
    pub(crate) number: u32,
    pub(crate) index: u32,
    pub(crate) is_zstd: bool,
    pub(crate) check: u32,
    pub(crate) generation: u8,
    pub(crate) is_live: bool,
}

fn secret() -> Secret {
    let mut bytes = [0; Secret::BYTES];
    for (at, byte) in (0_u8..).zip(&mut bytes) {
        *byte = at.wrapping_mul(37);
    }
    Secret::new(bytes)
}

pub(crate) fn forge_superblock(capacity_bytes: u64) -> (Vec<u8>, Secret) {
    let layout = layout_for(capacity_bytes);
    let superblock = Superblock {
        span_shift: layout.span_shift,
        granule_shift: layout.granule_shift,
        len_bytes: layout.len_bytes(),
        generation: 1,
        boot_id: super::file::boot_id(),
        is_clean: false,
        secret: secret(),
    };
    let len = usize::try_from(layout.len_bytes()).unwrap_or(0);
    let mut bytes = vec![0; len];
    superblock.copy_to(&mut bytes);
    (bytes, secret())
}

impl ForgedSpan {
    pub(crate) fn new(capacity_bytes: u64, span: u32, role: u8, owner: u16, sequence: u64) -> Self {
        let layout = layout_for(capacity_bytes);
        let role = match role % 5 {
            1 => Role::Pages,
            2 => Role::Catalogue,
            3 => Role::Fresh(owner),
            _ => Role::Proven(owner),
        };
        Self {
            header: SpanHeader {
                span: 1 + span % (layout.spans - 1),
                role,
                sequence,
                born: 0,
            },
            layout,
            is_real: true,
            granule: layout.first_granule(),
        }
    }
}

fn put(bytes: &mut [u8], at: u64, new: &[u8]) {
    let at = usize::try_from(at).unwrap_or(usize::MAX);
    if let Some(to) = bytes.get_mut(at..at.saturating_add(new.len())) {
        to.copy_from_slice(new);
    }
}

pub(crate) fn forge_span(bytes: &mut [u8], span: &ForgedSpan) {
    let at = span.layout.span_at(span.header.span);
    // Whatever was there before in this image belongs to no life any more.
    put(bytes, at, &[0; SPAN_HEADER_BYTES]);
    if span.is_real {
        let words = header_words(&span.header, secret().number(0));
        for copy in [0, 32] {
            for (step, word) in (0..).step_by(8).zip(words) {
                put(bytes, at + copy + step, &word.to_le_bytes());
            }
        }
    }
}

pub(crate) fn forge_record(
    bytes: &mut [u8],
    span: &mut ForgedSpan,
    forged: &ForgedHeader,
    payload: &[u8],
) {
    let layout = span.layout;
    let granules = layout.granules(HEADER_BYTES + payload.len());
    if granules > layout.span_granules() - span.granule {
        return;
    }
    let place: Place = layout.place(span.header.span, span.granule);
    let Some(kind) = record::Kind::numbered(forged.kind) else {
        return;
    };
    let header = Header {
        kind,
        number: forged.number % NUMBERS,
        index: forged.index,
        len: payload.len(),
        is_zstd: forged.is_zstd,
        check: forged.check,
        generation: forged.generation & 3,
        is_used: false,
    };
    let salt = salt_of(secret().number(0), place, span.header.sequence);
    let [mut first, second] = header.pack(salt);
    if !forged.is_live {
        first = record::dead(first);
    }
    let at = layout.offset(place);
    put(bytes, at, &first.to_le_bytes());
    put(bytes, at + 8, &second.to_le_bytes());
    put(bytes, at + HEADER_BYTES as u64, payload);
    span.granule += granules;
}
