// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A chunk: one anonymous mapping cut into blocks of 128 bytes, and the chains
//! of blocks in it that are compressed pages.
//!
//! Any free block serves any page, so freeing at random never leaves holes
//! that nothing fits into; the price is up to 127 unused bytes at a chain's
//! end and 2 bytes of link for each block. Blocks are handed out in ascending
//! order as long as the chunk is fresh, and most chains are then one straight
//! run, copied at once. Memory of blocks that were never used is never
//! touched, so the host has not given it yet.
//!
//! Invariants: `links[b]` is the next block of a chain, or `END`; free blocks
//! below `fresh` form one chain from `free_head` and carry `FREE`; those from
//! `fresh` on were never used; `free` counts both.

use memmap2::MmapMut;

use crate::budget::malloc_bytes;

/// Bytes of a block.
pub(crate) const BLOCK_BYTES: usize = 128;
/// The most blocks in a chunk: block numbers have 13 bits, and the links' upper bits are marks.
pub(crate) const BLOCKS_MAX: usize = 1 << 13;

const END: u16 = 0x7fff;
const FREE: u16 = 0x8000;
const NUMBER: u16 = 0x7fff;

/// How many blocks hold `len` bytes.
pub(crate) fn blocks_for(len: usize) -> usize {
    len.div_ceil(BLOCK_BYTES)
}

/// What a chunk of so many blocks takes from the host, in bytes.
pub(crate) fn chunk_held_bytes(blocks: usize) -> u64 {
    (blocks * BLOCK_BYTES) as u64 + malloc_bytes(blocks * size_of::<u16>())
}

/// A chain that is not what its slot says: memory was damaged from outside.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct BrokenChain;

pub(crate) struct Chunk {
    data: MmapMut,
    links: Box<[u16]>,
    free_head: u16,
    fresh: u16,
    free: u16,
}

impl Chunk {
    /// Maps a chunk of `blocks` blocks; `None` when the host has no memory for it.
    pub(crate) fn new(blocks: usize) -> Option<Self> {
        debug_assert!((1..=BLOCKS_MAX).contains(&blocks));
        let free = u16::try_from(blocks).ok()?;
        let data = MmapMut::map_anon(blocks * BLOCK_BYTES).ok()?;
        let mut links = Vec::new();
        links.try_reserve_exact(blocks).ok()?;
        links.resize(blocks, FREE | END);
        Some(Self {
            data,
            links: links.into_boxed_slice(),
            free_head: END,
            fresh: 0,
            free,
        })
    }

    pub(crate) fn free_blocks(&self) -> usize {
        usize::from(self.free)
    }

    pub(crate) fn used_blocks(&self) -> usize {
        self.links.len() - self.free_blocks()
    }

    /// Takes one free block. `None` also when the free chain is damaged.
    fn take(&mut self) -> Option<u16> {
        let block = if self.free_head == END {
            let block = self.fresh;
            self.links.get(usize::from(block))?;
            self.fresh += 1;
            block
        } else {
            let block = self.free_head;
            let link = *self.links.get(usize::from(block))?;
            if link & FREE == 0 {
                return None;
            }
            self.free_head = link & NUMBER;
            block
        };
        self.free = self.free.checked_sub(1)?;
        Some(block)
    }

    /// Copies `bytes` (not empty) into a new chain and returns its first block. `None` when there
    /// is no room; then nothing has changed.
    pub(crate) fn store(&mut self, bytes: &[u8]) -> Option<u16> {
        if bytes.is_empty() || blocks_for(bytes.len()) > self.free_blocks() {
            return None;
        }
        let mut first = END;
        let mut last: Option<u16> = None;
        for piece in bytes.chunks(BLOCK_BYTES) {
            let block = self.take()?;
            let at = usize::from(block) * BLOCK_BYTES;
            self.data
                .get_mut(at..at + piece.len())?
                .copy_from_slice(piece);
            *self.links.get_mut(usize::from(block))? = END;
            match last {
                None => first = block,
                Some(last) => *self.links.get_mut(usize::from(last))? = block,
            }
            last = Some(block);
        }
        Some(first)
    }

    /// Follows a chain of `count` blocks, handing each straight run to `visit` as
    /// (first block, number of blocks).
    fn runs(
        &self,
        first: u16,
        count: usize,
        mut visit: impl FnMut(usize, usize),
    ) -> Result<(), BrokenChain> {
        let (mut start, mut length, mut block) = (usize::from(first), 1, first);
        for left in (0..count).rev() {
            let link = *self.links.get(usize::from(block)).ok_or(BrokenChain)?;
            let is_end = left == 0;
            if link & FREE != 0 || (link == END) != is_end {
                return Err(BrokenChain);
            }
            if !is_end && link == block + 1 {
                length += 1;
            } else {
                visit(start, length);
                (start, length) = (usize::from(link), 1);
            }
            block = link;
        }
        Ok(())
    }

    /// Copies a chain's bytes to `out`, whose length is the one that was stored.
    pub(crate) fn load(&self, first: u16, out: &mut [u8]) -> Result<(), BrokenChain> {
        let mut done = 0;
        self.runs(first, blocks_for(out.len()), |start, length| {
            let take = (length * BLOCK_BYTES).min(out.len() - done);
            let at = start * BLOCK_BYTES;
            if let (Some(to), Some(from)) =
                (out.get_mut(done..done + take), self.data.get(at..at + take))
            {
                to.copy_from_slice(from);
            }
            done += take;
        })?;
        if done == out.len() {
            Ok(())
        } else {
            Err(BrokenChain)
        }
    }

    /// Frees the chain of a page of `len` bytes. A broken chain is left as it is: its blocks are
    /// lost to the store until it ends, which is better than freeing somebody else's.
    pub(crate) fn free(&mut self, first: u16, len: usize) -> Result<(), BrokenChain> {
        let count = blocks_for(len);
        self.runs(first, count, |_, _| ())?;
        let mut block = first;
        for _ in 0..count {
            let link = self.links.get_mut(usize::from(block)).ok_or(BrokenChain)?;
            let next = std::mem::replace(link, FREE);
            // The whole chain keeps its order and goes before what was free: the next page that
            // is stored finds straight runs straight again.
            *link = FREE | if next == END { self.free_head } else { next };
            block = next;
        }
        self.free_head = first;
        // At most BLOCKS_MAX blocks exist, so neither the conversion nor the sum can be out of range.
        self.free += u16::try_from(count).map_err(|_| BrokenChain)?;
        Ok(())
    }

    /// Flips one bit of a stored chain, to show in tests that it is noticed.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(crate) fn flip_bit(&mut self, first: u16, len: usize, bit: usize) -> bool {
        let (mut at, mut seen, wanted) = (None, 0, (bit / 8) % len.max(1));
        let followed = self.runs(first, blocks_for(len), |start, length| {
            if at.is_none() && wanted < seen + length * BLOCK_BYTES {
                at = Some(start * BLOCK_BYTES + wanted - seen);
            }
            seen += length * BLOCK_BYTES;
        });
        match at
            .filter(|_| followed.is_ok())
            .and_then(|at| self.data.get_mut(at))
        {
            Some(byte) => {
                *byte ^= 1 << (bit % 8);
                true
            }
            None => false,
        }
    }

    /// Marks the blocks of a chain in `seen`, and complains of any seen before.
    pub(crate) fn mark(&self, first: u16, len: usize, seen: &mut [bool]) -> Result<(), String> {
        let mut twice = None;
        self.runs(first, blocks_for(len), |start, length| {
            for (at, mark) in seen.iter_mut().enumerate().skip(start).take(length) {
                if std::mem::replace(mark, true) {
                    twice = Some(at);
                }
            }
        })
        .map_err(|BrokenChain| format!("the chain from block {first} is broken"))?;
        twice.map_or(Ok(()), |at| Err(format!("block {at} belongs to two pages")))
    }

    /// Walks the free chain; `seen` holds the blocks in use and must be its exact complement.
    pub(crate) fn verify(&self, seen: &[bool]) -> Result<(), String> {
        let (mut block, mut free) = (self.free_head, 0_usize);
        while block != END {
            let link = *self
                .links
                .get(usize::from(block))
                .ok_or("the free chain leaves the chunk")?;
            if link & FREE == 0 || seen.get(usize::from(block)) != Some(&false) {
                return Err(format!("block {block} is in the free chain and in use"));
            }
            free += 1;
            if free > self.links.len() {
                return Err("the free chain is circular".into());
            }
            block = link & NUMBER;
        }
        let never_used = self.links.len() - usize::from(self.fresh);
        let used = seen.iter().filter(|seen| **seen).count();
        if free + never_used != self.free_blocks() || used != self.used_blocks() {
            return Err(format!(
                "{free} free and {never_used} fresh and {used} used blocks, but the count of free ones is {}",
                self.free
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(seed: u8, len: usize) -> Vec<u8> {
        (0..len)
            .map(|at| u8::try_from(at % 251).unwrap().wrapping_mul(seed))
            .collect()
    }

    #[test]
    fn chains_come_back_and_every_block_is_used() {
        let mut chunk = Chunk::new(64).unwrap();
        let lens = [1, 127, 128, 129, 1000, 4096];
        let places: Vec<_> = lens
            .iter()
            .map(|&len| chunk.store(&bytes(3, len)).unwrap())
            .collect();
        let left = 64 - lens.iter().map(|&len| blocks_for(len)).sum::<usize>();
        assert_eq!(chunk.free_blocks(), left);
        assert_eq!(chunk.store(&bytes(5, left * BLOCK_BYTES + 1)), None);
        for (&len, &at) in lens.iter().zip(&places) {
            let mut out = vec![0; len];
            chunk.load(at, &mut out).unwrap();
            assert_eq!(out, bytes(3, len));
        }
        // Free every other one: a chain made of the scattered rest must come back just the same.
        for at in [0, 2, 4] {
            chunk.free(places[at], lens[at]).unwrap();
        }
        let len = chunk.free_blocks() * BLOCK_BYTES;
        let at = chunk.store(&bytes(7, len)).unwrap();
        let mut out = vec![0; len];
        chunk.load(at, &mut out).unwrap();
        assert_eq!(out, bytes(7, len));
        let mut seen = vec![false; 64];
        chunk.mark(at, len, &mut seen).unwrap();
        for at in [1, 3, 5] {
            chunk.mark(places[at], lens[at], &mut seen).unwrap();
        }
        chunk.verify(&seen).unwrap();
    }

    #[test]
    fn a_wrong_place_or_length_is_an_error_and_frees_nothing() {
        let mut chunk = Chunk::new(32).unwrap();
        let at = chunk.store(&bytes(3, 300)).unwrap();
        let mut out = [0; 128];
        assert_eq!(
            chunk.load(at, &mut out),
            Err(BrokenChain),
            "shorter than its chain"
        );
        assert_eq!(chunk.load(31, &mut out), Err(BrokenChain), "a free block");
        assert_eq!(
            chunk.load(4000, &mut out),
            Err(BrokenChain),
            "beyond the chunk"
        );
        assert_eq!(chunk.free(at, 500), Err(BrokenChain));
        assert_eq!(chunk.free(at, 100), Err(BrokenChain));
        assert_eq!(chunk.free_blocks(), 29);
        assert_eq!(chunk.free(at, 300), Ok(()));
        assert_eq!(chunk.free(at, 300), Err(BrokenChain), "twice");
        chunk.verify(&[false; 32]).unwrap();
    }
}
