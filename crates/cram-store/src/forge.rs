// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Arenas made by hand, for fuzzing: everything may be wrong in them but the
//! codes and sums, so that what is behind these is reached.

use crate::arena::{ForgedHeader, ForgedSpan, forge_record, forge_span, forge_superblock};
use crate::codec::{Scratch, filled_word};
use crate::ledger::sums::Sums;
use crate::spec::{PAGE_SIZE, Page};

/// What is made.
pub struct Forge {
    bytes: Vec<u8>,
    capacity_bytes: u64,
    sums: Sums,
    span: Option<ForgedSpan>,
    scratch: Scratch,
}

/// A record to be made.
pub struct Forged<'a> {
    /// As in the header, modulo 8; 0 is none.
    pub kind: u8,
    /// The owner's number.
    pub number: u32,
    /// The owner's index.
    pub index: u32,
    /// The payload is zstd's.
    pub is_zstd: bool,
    /// Modulo 4.
    pub generation: u8,
    /// It lives.
    pub is_live: bool,
    /// The check is that of the page that the payload stands for, or of the payload.
    pub is_right: bool,
    /// Up to 4096 bytes count.
    pub payload: &'a [u8],
}

impl Forge {
    /// An empty arena for this capacity.
    #[must_use]
    pub fn new(capacity_bytes: u64) -> Self {
        let (bytes, secret) = forge_superblock(capacity_bytes);
        Self {
            bytes,
            capacity_bytes,
            sums: Sums::keyed(secret),
            span: None,
            scratch: Scratch::new(),
        }
    }

    /// Begins a span; `role` modulo 5, 0 is none.
    pub fn span(&mut self, span: u32, role: u8, owner: u16, sequence: u64) {
        let wanted = ForgedSpan::new(self.capacity_bytes, span, role, owner, sequence);
        forge_span(&mut self.bytes, &wanted);
        self.span = Some(wanted);
    }

    /// Appends a record to the span that was begun last, if there is room.
    pub fn record(&mut self, forged: &Forged<'_>) {
        let payload = forged.payload.get(..PAGE_SIZE).unwrap_or(forged.payload);
        let content = match filled_word(payload) {
            Some(word) if forged.kind % 8 == 1 => self.sums.filled(word),
            _ if payload.len() == PAGE_SIZE || matches!(forged.kind % 8, 1 | 2) => {
                let mut page: Page = [0; PAGE_SIZE];
                let _ = self.scratch.unpack(payload, forged.is_zstd, &mut page);
                self.sums.page(&page)
            }
            _ => self.sums.bytes(payload),
        };
        let check = self.sums.check(content, forged.number, forged.index);
        let header = ForgedHeader {
            kind: forged.kind,
            number: forged.number,
            index: forged.index,
            is_zstd: forged.is_zstd,
            check: check ^ u32::from(!forged.is_right),
            generation: forged.generation,
            is_live: forged.is_live,
        };
        if let Some(span) = &mut self.span {
            forge_record(&mut self.bytes, span, &header, payload);
        }
    }

    /// Flips a bit.
    pub fn flip(&mut self, bit: u64) {
        let at = usize::try_from(bit / 8).unwrap_or(0) % self.bytes.len();
        if let Some(byte) = self.bytes.get_mut(at) {
            *byte ^= 1 << (bit % 8);
        }
    }

    /// The file's bytes.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}
