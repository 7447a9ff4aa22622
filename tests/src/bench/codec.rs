// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The codec alone: what everything else is measured beside.

use std::hint::black_box;

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use super::corpus::{PAGE_SIZE, Page};

/// Compresses pages, with a table that is used again.
pub(crate) struct Codec {
    table: CompressTable,
    pub(crate) image: Vec<u8>,
}

impl Codec {
    pub(crate) fn new() -> Self {
        Self {
            table: CompressTable::small(),
            image: vec![0; get_maximum_output_size(PAGE_SIZE)],
        }
    }

    /// Bytes of the page's image, or 4096 when it does not compress.
    pub(crate) fn pack(&mut self, page: &Page) -> usize {
        compress_into_with_table(page, &mut self.image, &mut self.table)
            .map_or(PAGE_SIZE, |len| len.min(PAGE_SIZE))
    }

    /// Compresses every page, for the time that it takes. As the device does it, each is copied to
    /// private memory first; not so when they are to come from memory that is in no cache.
    pub(crate) fn pack_all(&mut self, pages: &[Page], is_copied: bool) {
        let mut buffer = [0; PAGE_SIZE];
        for page in pages {
            if is_copied {
                buffer = *page;
                black_box(self.pack(black_box(&buffer)));
            } else {
                black_box(self.pack(page));
            }
        }
        black_box(&buffer);
    }
}

/// Images of pages, one behind the other.
pub(crate) struct Images {
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Images {
    pub(crate) fn of(pages: &[Page]) -> Self {
        let mut codec = Codec::new();
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for page in pages {
            let len = codec.pack(page);
            let image = if len < PAGE_SIZE {
                &codec.image
            } else {
                &page[..]
            };
            bytes.extend_from_slice(image.get(..len).unwrap_or(image));
            ends.push(bytes.len());
        }
        Self { bytes, ends }
    }

    /// Decompresses one of them.
    pub(crate) fn unpack(&self, at: usize, page: &mut Page) {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        let image = &self.bytes[start..self.ends[at]];
        if image.len() == PAGE_SIZE {
            page.copy_from_slice(image);
        } else {
            black_box(decompress_into(image, page).is_ok());
        }
    }

    /// Decompresses some of them, for the time that it takes.
    pub(crate) fn unpack_all(&self, order: &mut dyn Iterator<Item = u32>) {
        let mut page = [0; PAGE_SIZE];
        for at in order {
            self.unpack(at as usize, &mut page);
        }
        black_box(&page);
    }
}
