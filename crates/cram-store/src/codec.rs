// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How a page becomes bytes and bytes become a page again: same-filled test,
//! lz4, checksum. Nothing here takes a lock or touches the store.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::chunk::BLOCK_BYTES;
use crate::index::Key;
use crate::{PAGE_SIZE, Page};

/// Longer images are not worth it: they would take as many blocks as the page itself.
const PACKED_BYTES_MAX: usize = PAGE_SIZE - BLOCK_BYTES;

/// A worker's private buffers (about 13 KiB): one for each thread that puts or gets, used again for
/// every page, so that nothing is allocated on the way.
///
/// It belongs to no store or client, and keeps nothing between calls that could leak: a page's
/// image is overwritten or read back exactly as long as it was written.
pub struct Scratch {
    packed: Box<[u8]>,
    table: CompressTable,
    bank: usize,
}

impl Default for Scratch {
    fn default() -> Self {
        Self::new()
    }
}

impl Scratch {
    /// Allocates the buffers. Workers are spread over the arena's banks in the order of these calls.
    #[must_use]
    pub fn new() -> Self {
        static NEXT_BANK: AtomicUsize = AtomicUsize::new(0);
        Self {
            packed: vec![0; get_maximum_output_size(PAGE_SIZE)].into_boxed_slice(),
            table: CompressTable::small(),
            bank: NEXT_BANK.fetch_add(1, Relaxed),
        }
    }

    /// The bank of the arena that this worker's pages go to first.
    pub(crate) fn bank(&self) -> usize {
        self.bank
    }

    /// The buffer for an image of `len` bytes; `None` when no image is that long.
    pub(crate) fn packed_mut(&mut self, len: usize) -> Option<&mut [u8]> {
        self.packed.get_mut(..len)
    }

    /// Makes a page from the image of `len` bytes in the buffer. False when it is none.
    pub(crate) fn unpack(&self, len: usize, page: &mut Page) -> bool {
        self.packed
            .get(..len)
            .is_some_and(|image| matches!(decompress_into(image, page), Ok(PAGE_SIZE)))
    }

    /// Chooses the form in which a page is stored.
    pub(crate) fn encode<'a>(&'a mut self, page: &'a Page) -> Image<'a> {
        if let Some(word) = filled_with(page) {
            return Image::Filled(word);
        }
        match compress_into_with_table(page, &mut self.packed, &mut self.table) {
            Ok(len) if len <= PACKED_BYTES_MAX => {
                Image::Bytes(self.packed.get(..len).unwrap_or(page))
            }
            _ => Image::Bytes(page),
        }
    }
}

/// The form in which a page is stored.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Image<'a> {
    /// One 64-bit word, repeated: lives in the index alone.
    Filled(u64),
    /// An lz4 block; or, when 4096 bytes long, the page itself.
    Bytes(&'a [u8]),
}

/// The word that fills the page, if one does.
fn filled_with(page: &Page) -> Option<u64> {
    let (words, _) = page.as_chunks::<8>();
    let (first, rest) = words.split_first()?;
    rest.iter()
        .all(|word| word == first)
        .then(|| u64::from_ne_bytes(*first))
}

/// Writes a word all over a page.
pub(crate) fn fill(page: &mut Page, word: u64) {
    let (words, _) = page.as_chunks_mut::<8>();
    words.fill(word.to_ne_bytes());
}

/// Binds checksums to the place they were made for: an image that turns up under another key, in
/// another pool or another store, is as wrong as a damaged one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seal {
    seed: u64,
}

impl Seal {
    /// `seed` is secret and differs for each pool.
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed }
    }

    fn key_hash(self, key: &Key) -> u64 {
        let mut bytes = [0; 28];
        let [first, second, third] = key.object.0;
        let parts = [first, second, third, u64::from(key.index)];
        for (to, part) in bytes.chunks_mut(8).zip(parts) {
            let part = part.to_le_bytes();
            to.copy_from_slice(part.get(..to.len()).unwrap_or(&[0; 4]));
        }
        xxh3_64_with_seed(&bytes, self.seed)
    }

    /// The checksum of a whole page stored under `key`.
    pub(crate) fn page(self, key: &Key, page: &Page) -> u64 {
        xxh3_64(page) ^ self.key_hash(key)
    }

    /// The checksum of a same-filled page's word; 32 bits, since it guards 8 bytes of the index.
    pub(crate) fn word(self, key: &Key, word: u64) -> u32 {
        let sum = xxh3_64(&word.to_le_bytes()) ^ self.key_hash(key);
        // Either half would do.
        u32::try_from(sum >> 32).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ObjectId;

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
        assert_eq!(scratch.encode(&page), Image::Filled(0));
        fill(&mut page, 0x0123_4567_89ab_cdef);
        assert_eq!(scratch.encode(&page), Image::Filled(0x0123_4567_89ab_cdef));
        page[4095] ^= 1;
        let Image::Bytes(image) = scratch.encode(&page) else {
            panic!("not filled any more")
        };
        let len = image.len();
        assert!(len < 100);
        let mut back = [9; PAGE_SIZE];
        assert!(scratch.unpack(len, &mut back));
        assert_eq!(back, page);
        let noise = noise(5);
        assert_eq!(scratch.encode(&noise), Image::Bytes(&noise));
    }

    #[test]
    fn damaged_images_are_no_pages_or_fail_their_checksum() {
        let mut scratch = Scratch::new();
        let mut page = noise(9);
        page[600..3000].fill(3);
        let key = Key {
            object: ObjectId([1, 2, 3]),
            index: 4,
        };
        let seal = Seal::new(99);
        let sum = seal.page(&key, &page);
        let Image::Bytes(image) = scratch.encode(&page) else {
            panic!("not filled")
        };
        let image = image.to_vec();
        let mut back = [0; PAGE_SIZE];
        for bit in 0..image.len() * 8 {
            let packed = scratch.packed_mut(image.len()).unwrap();
            packed.copy_from_slice(&image);
            packed[bit / 8] ^= 1 << (bit % 8);
            let is_page = scratch.unpack(image.len(), &mut back);
            assert!(
                !is_page || back == page || seal.page(&key, &back) != sum,
                "bit {bit}"
            );
        }
    }

    #[test]
    fn a_checksum_fits_one_key_of_one_pool_only() {
        let (seal, page) = (Seal::new(1), [5; PAGE_SIZE]);
        let key = Key {
            object: ObjectId([1, 2, 3]),
            index: 4,
        };
        let moved = Key {
            object: key.object,
            index: 5,
        };
        let other = Key {
            object: ObjectId([1, 2, 4]),
            index: 4,
        };
        assert_ne!(seal.page(&key, &page), seal.page(&moved, &page));
        assert_ne!(seal.page(&key, &page), seal.page(&other, &page));
        assert_ne!(seal.page(&key, &page), Seal::new(2).page(&key, &page));
        assert_ne!(seal.word(&key, 7), seal.word(&moved, 7));
    }
}
