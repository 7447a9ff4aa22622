// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a page becomes bytes and bytes become a page again. Nothing here takes a
//! lock or touches the store.
//!
//! Pages come in through [`Lz4`]; those that have been cold for long are packed
//! once more with [`Zstd`], which takes three times as long and a fifth fewer
//! bytes.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};

use crate::spec::{PAGE_SIZE, Page};

/// Longer images are not worth it: the page itself is unpacked faster.
const PACKED_BYTES_MAX: usize = PAGE_SIZE - 128;
/// Level 3 is zstd's own default: level 1 packs 2% less on ELF pages, level 6 2% more at three
/// times the time (docs/performance.md).
const ZSTD_LEVEL: i32 = 3;

/// Packs and unpacks pages. Output beyond what is returned is left as it happens to be.
pub(crate) trait Codec {
    /// Packs a page; `None` when that is not worth it. The image's length is never 0 nor 8, which
    /// stand for pages that one word fills.
    fn pack(&mut self, page: &Page, image: &mut [u8]) -> Option<usize>;
    /// Makes a page from an image. False when it is none; the page's bytes are then anything.
    fn unpack(&mut self, image: &[u8], page: &mut Page) -> bool;
}

/// LZ4's block format.
pub(crate) struct Lz4 {
    table: CompressTable,
}

impl Codec for Lz4 {
    fn pack(&mut self, page: &Page, image: &mut [u8]) -> Option<usize> {
        compress_into_with_table(page, image, &mut self.table)
            .ok()
            .filter(|len| (9..=PACKED_BYTES_MAX).contains(len))
    }

    fn unpack(&mut self, image: &[u8], page: &mut Page) -> bool {
        matches!(decompress_into(image, page), Ok(PAGE_SIZE))
    }
}

/// Zstandard frames (RFC 8878), without dictionary. Its memory (some 100 KiB to unpack, more to
/// pack) is taken when it is first needed.
#[derive(Default)]
pub(crate) struct Zstd {
    packer: Option<zstd::bulk::Compressor<'static>>,
    unpacker: Option<zstd::bulk::Decompressor<'static>>,
}

impl Codec for Zstd {
    fn pack(&mut self, page: &Page, image: &mut [u8]) -> Option<usize> {
        if self.packer.is_none() {
            let mut packer = zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?;
            // The length is known, and the checksum is ours.
            packer.include_contentsize(false).ok()?;
            packer.include_checksum(false).ok()?;
            self.packer = Some(packer);
        }
        let len = self.packer.as_mut()?.compress_to_buffer(page, image).ok()?;
        (9..=PACKED_BYTES_MAX).contains(&len).then_some(len)
    }

    fn unpack(&mut self, image: &[u8], page: &mut Page) -> bool {
        if self.unpacker.is_none() {
            self.unpacker = zstd::bulk::Decompressor::new().ok();
        }
        self.unpacker.as_mut().is_some_and(|unpacker| {
            matches!(
                unpacker.decompress_to_buffer(image, &mut page[..]),
                Ok(PAGE_SIZE)
            )
        })
    }
}

/// A worker's private memory (some 17 KiB, and zstd's when it first comes by an image of zstd's):
/// one for each thread that puts or gets, used again for every page, so that nothing is allocated
/// on the way.
///
/// It belongs to no store or client, and keeps nothing between calls that could leak.
pub struct Scratch {
    packed: Box<[u8]>,
    /// For a page to compare with, or to unpack before it is known whether it is wanted.
    other: Option<Box<Page>>,
    lz4: Lz4,
    zstd: Zstd,
    head: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// Allocates the buffers. Workers are spread over the arena's heads in the order of these calls.
    #[must_use]
    pub fn new() -> Self {
        static NEXT_HEAD: AtomicUsize = AtomicUsize::new(0);
        Self {
            packed: vec![0; get_maximum_output_size(PAGE_SIZE)].into_boxed_slice(),
            other: Some(Box::new([0; PAGE_SIZE])),
            lz4: Lz4 {
                table: CompressTable::small(),
            },
            zstd: Zstd::default(),
            head: NEXT_HEAD.fetch_add(1, Relaxed),
        }
    }

    /// The head of the arena's log that this worker's pages go to.
    pub(crate) fn head(&self) -> usize {
        self.head
    }

    /// Chooses the form in which a page is stored; not looking whether one word fills it.
    pub(crate) fn pack<'a>(&'a mut self, page: &'a Page) -> &'a [u8] {
        match self.lz4.pack(page, &mut self.packed) {
            Some(len) => self.packed.get(..len).unwrap_or(page),
            None => page,
        }
    }

    /// Packs a page with zstd.
    pub(crate) fn repack(&mut self, page: &Page) -> Option<&[u8]> {
        let len = self.zstd.pack(page, &mut self.packed)?;
        self.packed.get(..len)
    }

    /// Makes a page of a payload. False when it is none; then the page's bytes are anything.
    pub(crate) fn unpack(&mut self, payload: &[u8], is_zstd: bool, page: &mut Page) -> bool {
        unpack(&mut self.lz4, &mut self.zstd, payload, is_zstd, page)
    }

    /// Whether a payload stands for this very page.
    pub(crate) fn is_image_of(&mut self, payload: &[u8], is_zstd: bool, page: &Page) -> bool {
        let mut other = self.take_other();
        let is_page = unpack(&mut self.lz4, &mut self.zstd, payload, is_zstd, &mut other);
        let is_image = is_page && *other == *page;
        self.return_other(other);
        is_image
    }

    /// The worker's own page, of whatever content, until [`Self::return_other`].
    pub(crate) fn take_other(&mut self) -> Box<Page> {
        self.other
            .take()
            .unwrap_or_else(|| Box::new([0; PAGE_SIZE]))
    }

    pub(crate) fn return_other(&mut self, other: Box<Page>) {
        self.other = Some(other);
    }
}

fn unpack(lz4: &mut Lz4, zstd: &mut Zstd, payload: &[u8], is_zstd: bool, page: &mut Page) -> bool {
    match *payload {
        [] => page.fill(0),
        [a, b, c, d, e, f, g, h] => fill(page, u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ if payload.len() == PAGE_SIZE => page.copy_from_slice(payload),
        _ if is_zstd => return zstd.unpack(payload, page),
        _ => return lz4.unpack(payload, page),
    }
    true
}

/// The word that fills the page, if one does.
pub(crate) fn filled_with(page: &Page) -> Option<u64> {
    let (words, _) = page.as_chunks::<8>();
    let (first, rest) = words.split_first()?;
    rest.iter()
        .all(|word| word == first)
        .then(|| u64::from_le_bytes(*first))
}

/// The payload that stands for a page filled with `word`.
pub(crate) fn filled_payload(word: &[u8; 8]) -> &[u8] {
    if *word == [0; 8] { &[] } else { word }
}

/// The word that a payload of [`filled_payload`] stands for.
pub(crate) fn filled_word(payload: &[u8]) -> Option<u64> {
    match *payload {
        [] => Some(0),
        [a, b, c, d, e, f, g, h] => Some(u64::from_le_bytes([a, b, c, d, e, f, g, h])),
        _ => None,
    }
}

/// Whether a payload of that length stands for a page that one word fills.
pub(crate) fn is_filled(len: usize) -> bool {
    matches!(len, 0 | 8)
}

/// Writes a word all over a page.
pub(crate) fn fill(page: &mut Page, word: u64) {
    let (words, _) = page.as_chunks_mut::<8>();
    words.fill(word.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64) -> Page {
        let mut page = [0; PAGE_SIZE];
        let mut state = seed | 1;
        for byte in &mut page {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            *byte = state.to_le_bytes()[7];
        }
        page
    }

    #[test]
    fn each_kind_of_page_takes_its_form_and_comes_back() {
        let mut scratch = Scratch::new();
        let mut page = [0; PAGE_SIZE];
        assert_eq!(filled_with(&page), Some(0));
        fill(&mut page, 0x0123_4567_89ab_cdef);
        assert_eq!(filled_with(&page), Some(0x0123_4567_89ab_cdef));
        for word in [0, 0x0123_4567_89ab_cdef_u64] {
            let bytes = word.to_le_bytes();
            let payload = filled_payload(&bytes);
            assert!(is_filled(payload.len()));
            assert_eq!(filled_word(payload), Some(word));
            let mut back = [7; PAGE_SIZE];
            assert!(scratch.unpack(payload, false, &mut back));
            assert_eq!(filled_with(&back), Some(word));
        }
        page[4095] ^= 1;
        assert_eq!(filled_with(&page), None);
        let mut back = [9; PAGE_SIZE];
        let image = scratch.pack(&page).to_vec();
        assert!(image.len() < 100);
        assert!(scratch.unpack(&image, false, &mut back));
        assert_eq!(back, page);
        assert!(scratch.is_image_of(&image, false, &page));
        let image = scratch.repack(&page).unwrap().to_vec();
        assert!(scratch.unpack(&image, true, &mut back));
        assert_eq!(back, page);
        let noise = noise(5);
        assert_eq!(scratch.pack(&noise), noise);
        assert_eq!(scratch.repack(&noise), None);
        assert!(!scratch.is_image_of(&image, true, &noise));
    }

    #[test]
    fn damaged_images_are_no_pages_or_other_ones() {
        let mut scratch = Scratch::new();
        let mut page = noise(9);
        page[600..3000].fill(3);
        let mut back = [0; PAGE_SIZE];
        for is_zstd in [false, true] {
            let image = if is_zstd {
                scratch.repack(&page).unwrap().to_vec()
            } else {
                scratch.pack(&page).to_vec()
            };
            for bit in 0..image.len() * 8 {
                let mut flipped = image.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                // Whatever comes out, it is a page's worth or refused, and never more.
                let _ = scratch.unpack(&flipped, is_zstd, &mut back);
                let _ = scratch.unpack(&image[..bit / 8], is_zstd, &mut back);
            }
        }
    }
}
