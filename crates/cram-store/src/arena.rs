// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The arena: where compressed bytes live. It knows nothing of pools or pages,
//! only byte strings of 1 to 4096 bytes at 32-bit places.
//!
//! It is cut into banks, each a mutex over its own chunks. A worker stores into
//! the bank that its [`crate::Scratch`] prefers, so workers seldom meet; when
//! that bank has no room and the store's budget allows no further chunk, any
//! bank's room serves. A place says bank, chunk and block, so a page is found
//! again without asking which worker stored it.
//!
//! Invariant: the budget has been charged `chunk_held_bytes` for every chunk
//! that exists, and [`ENTRY_BYTES`] for each entry of a bank's table.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::Mutex;

use crate::PAGE_SIZE;
use crate::budget::{Budget, Shortage};
use crate::chunk::{BLOCK_BYTES, BLOCKS_MAX, BrokenChain, Chunk, blocks_for, chunk_held_bytes};

const BANK_BITS: u32 = 3;
const CHUNK_BITS: u32 = 16;
const BLOCK_BITS: u32 = 13;
const _: () =
    assert!(BANK_BITS + CHUNK_BITS + BLOCK_BITS == u32::BITS && 1 << BLOCK_BITS == BLOCKS_MAX);

/// Bytes that places can reach, when chunks have their greatest size.
pub(crate) const REACH_BYTES: u64 = (1_u64 << u32::BITS) * BLOCK_BYTES as u64;

/// Blocks of a page that did not compress: a chunk with that many free ones takes any page.
const BLOCKS_PER_PAGE: usize = PAGE_SIZE / BLOCK_BYTES;

/// Chunks looked at, at the most, for one with just enough room, when no chunk takes any page: the
/// bank is locked meanwhile.
const SEARCHED_CHUNKS: usize = 256;

/// Bytes charged for each entry of a bank's table: four times its size, since a table that
/// doubles is there twice, and half empty, for a moment.
const ENTRY_BYTES: u64 = 4 * size_of::<Option<Chunk>>() as u64 + 1;

/// What one block costs its owner: its bytes and its link.
pub(crate) const BLOCK_COST_BYTES: u64 = (BLOCK_BYTES + size_of::<u16>()) as u64;

/// What storing `len` bytes is billed, in bytes.
pub(crate) fn cost_bytes(len: usize) -> u64 {
    blocks_for(len) as u64 * BLOCK_COST_BYTES
}

/// Where bytes are: bank, chunk and first block, packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) u32);

impl Place {
    /// `None` when a part is out of range.
    fn new(bank: usize, chunk: usize, block: u16) -> Option<Self> {
        let bank = u32::try_from(bank)
            .ok()
            .filter(|bank| *bank < 1 << BANK_BITS)?;
        let chunk = u32::try_from(chunk)
            .ok()
            .filter(|chunk| *chunk < 1 << CHUNK_BITS)?;
        Some(Self(
            bank << (CHUNK_BITS + BLOCK_BITS) | chunk << BLOCK_BITS | u32::from(block),
        ))
    }

    fn bank(self) -> usize {
        (self.0 >> (CHUNK_BITS + BLOCK_BITS)) as usize
    }

    fn chunk(self) -> usize {
        ((self.0 >> BLOCK_BITS) & ((1 << CHUNK_BITS) - 1)) as usize
    }

    fn block(self) -> u16 {
        // Masked to 13 bits.
        u16::try_from(self.0 & ((1 << BLOCK_BITS) - 1)).unwrap_or(u16::MAX)
    }
}

/// One bank: a table of chunks. `roomy` has a bit for each chunk that any page fits into, so that
/// the lowest such chunk is found at once: filling low chunks first lets high ones run empty.
#[derive(Default)]
struct Bank {
    chunks: Vec<Option<Chunk>>,
    roomy: Vec<u64>,
    /// Where the next search for a chunk that is not roomy begins.
    cursor: usize,
    free_blocks: usize,
    used_blocks: usize,
    /// How many chunks have no block in use.
    idle_chunks: usize,
}

impl Bank {
    fn note_room(&mut self, at: usize) {
        let is_roomy = matches!(self.chunks.get(at), Some(Some(chunk)) if chunk.free_blocks() >= BLOCKS_PER_PAGE);
        if let Some(word) = self.roomy.get_mut(at / 64) {
            let bit = 1 << (at % 64);
            *word = if is_roomy { *word | bit } else { *word & !bit };
        }
    }

    /// The lowest chunk that any page fits into; or else, among the next [`SEARCHED_CHUNKS`], one
    /// with `blocks` free ones.
    fn find_room(&mut self, blocks: usize) -> Option<usize> {
        if self.free_blocks < blocks {
            return None;
        }
        if let Some((at, word)) = self.roomy.iter().enumerate().find(|(_, word)| **word != 0) {
            return Some(at * 64 + word.trailing_zeros() as usize);
        }
        let chunks = self.chunks.len();
        for _ in 0..chunks.min(SEARCHED_CHUNKS) {
            self.cursor = if self.cursor + 1 < chunks {
                self.cursor + 1
            } else {
                0
            };
            let chunk = self.chunks.get(self.cursor).and_then(Option::as_ref);
            if chunk.is_some_and(|chunk| chunk.free_blocks() >= blocks) {
                return Some(self.cursor);
            }
        }
        None
    }

    fn store_at(&mut self, bank: usize, at: usize, bytes: &[u8]) -> Option<Place> {
        let chunk = self.chunks.get_mut(at)?.as_mut()?;
        let was_idle = chunk.used_blocks() == 0;
        let block = chunk.store(bytes)?;
        let blocks = blocks_for(bytes.len());
        self.idle_chunks -= usize::from(was_idle);
        self.free_blocks -= blocks;
        self.used_blocks += blocks;
        self.note_room(at);
        Place::new(bank, at, block)
    }

    fn free_at(&mut self, at: usize, block: u16, len: usize) -> Result<(), BrokenChain> {
        let chunk = self
            .chunks
            .get_mut(at)
            .and_then(Option::as_mut)
            .ok_or(BrokenChain)?;
        chunk.free(block, len)?;
        self.idle_chunks += usize::from(chunk.used_blocks() == 0);
        self.free_blocks += blocks_for(len);
        self.used_blocks -= blocks_for(len);
        self.note_room(at);
        Ok(())
    }

    /// Puts a chunk into the table's lowest gap; gives it back when the table is full or cannot grow.
    fn add(&mut self, chunk: Chunk, budget: &Budget) -> Result<usize, Chunk> {
        let at = self
            .chunks
            .iter()
            .position(Option::is_none)
            .unwrap_or(self.chunks.len());
        if at == self.chunks.len() {
            let is_word_new = at / 64 == self.roomy.len();
            if at >= 1 << CHUNK_BITS
                || self.chunks.try_reserve(1).is_err()
                || (is_word_new && self.roomy.try_reserve(1).is_err())
                || budget.reserve(ENTRY_BYTES).is_err()
            {
                return Err(chunk);
            }
            self.chunks.push(None);
            if is_word_new {
                self.roomy.push(0);
            }
        }
        self.free_blocks += chunk.free_blocks();
        self.idle_chunks += 1;
        if let Some(entry) = self.chunks.get_mut(at) {
            *entry = Some(chunk);
        }
        self.note_room(at);
        Ok(at)
    }

    /// Takes an idle chunk out if the bank does well without it: there is as much room elsewhere
    /// as half a chunk. (Else a store that swings about the edge of a chunk would map and unmap it
    /// all the time.)
    fn release_if_spare(&mut self, at: usize, budget: &Budget) -> Option<Chunk> {
        let chunk = self
            .chunks
            .get(at)?
            .as_ref()
            .filter(|chunk| chunk.used_blocks() == 0)?;
        let blocks = chunk.free_blocks();
        if self.free_blocks - blocks < blocks / 2 {
            None
        } else {
            self.release(at, budget)
        }
    }

    /// Takes any idle chunk out.
    fn release_any(&mut self, budget: &Budget) -> Option<Chunk> {
        if self.idle_chunks == 0 {
            return None;
        }
        let is_idle =
            |chunk: &Option<Chunk>| matches!(chunk, Some(chunk) if chunk.used_blocks() == 0);
        let at = self.chunks.iter().position(is_idle)?;
        self.release(at, budget)
    }

    fn release(&mut self, at: usize, budget: &Budget) -> Option<Chunk> {
        let released = self.chunks.get_mut(at)?.take()?;
        self.free_blocks -= released.free_blocks();
        self.idle_chunks -= 1;
        self.note_room(at);
        while matches!(self.chunks.last(), Some(None)) {
            self.chunks.pop();
            budget.release(ENTRY_BYTES);
        }
        self.roomy.truncate(self.chunks.len().div_ceil(64));
        if self.chunks.len() < self.chunks.capacity() / 4 {
            self.chunks.shrink_to(self.chunks.len() * 2);
        }
        Some(released)
    }
}

/// All banks. See the module's text.
pub(crate) struct Arena {
    banks: Box<[Mutex<Bank>]>,
    blocks_per_chunk: usize,
    chunks: AtomicU64,
    used_blocks: AtomicU64,
    /// Chains that were found broken and left alone; their blocks count as used for ever.
    broken_chains: AtomicU64,
}

impl Arena {
    /// Chunks of about a 256th of the capacity, 16 KiB to 1 MiB, and up to 8 banks: a small store
    /// must not strand a good part of itself in chunks that are half full.
    pub(crate) fn new(capacity_bytes: u64) -> Self {
        let chunk_bytes = (capacity_bytes / 256)
            .next_power_of_two()
            .clamp(16 << 10, 1 << 20);
        let banks = (capacity_bytes / (chunk_bytes * 32)).clamp(1, 1 << BANK_BITS);
        Self {
            banks: (0..banks).map(|_| Mutex::default()).collect(),
            blocks_per_chunk: usize::try_from(chunk_bytes).unwrap_or(1 << 20) / BLOCK_BYTES,
            chunks: AtomicU64::new(0),
            used_blocks: AtomicU64::new(0),
            broken_chains: AtomicU64::new(0),
        }
    }

    /// Bytes of the blocks in use, their links included.
    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_blocks.load(Relaxed) * BLOCK_COST_BYTES
    }

    /// Bytes that chunks hold and no page uses.
    pub(crate) fn idle_bytes(&self) -> u64 {
        let held = self.chunks.load(Relaxed) * chunk_held_bytes(self.blocks_per_chunk);
        held.saturating_sub(self.used_bytes())
    }

    /// Bytes that one more chunk takes, at the most.
    pub(crate) fn chunk_held_bytes(&self) -> u64 {
        chunk_held_bytes(self.blocks_per_chunk) + ENTRY_BYTES
    }

    /// Bytes of the structure itself, to be charged once.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        (self.banks.len() * size_of::<Mutex<Bank>>()) as u64
    }

    /// Stores 1 to 4096 bytes, in the preferred bank if it can.
    pub(crate) fn store(
        &self,
        preferred: usize,
        bytes: &[u8],
        budget: &Budget,
    ) -> Result<Place, Shortage> {
        let blocks = blocks_for(bytes.len());
        let place = (0..self.banks.len())
            .find_map(|step| {
                let number = (preferred + step) % self.banks.len();
                let mut bank = self.banks.get(number)?.lock();
                let room = bank.find_room(blocks);
                // Only the preferred bank grows; the others are asked for the room they have.
                let at = if step == 0 {
                    room.or_else(|| self.grow(&mut bank, budget))
                } else {
                    room
                };
                bank.store_at(number, at?, bytes)
            })
            .ok_or(Shortage::Store)?;
        self.used_blocks.fetch_add(blocks as u64, Relaxed);
        Ok(place)
    }

    fn grow(&self, bank: &mut Bank, budget: &Budget) -> Option<usize> {
        let bytes = chunk_held_bytes(self.blocks_per_chunk);
        budget.reserve_chunk(bytes).ok()?;
        let added = Chunk::new(self.blocks_per_chunk)
            .and_then(|chunk| bank.add(chunk, budget).map_err(drop).ok());
        match added {
            Some(_) => _ = self.chunks.fetch_add(1, Relaxed),
            None => budget.release(bytes),
        }
        added
    }

    /// Copies out what is stored at `place`; `out` has the length that was stored.
    pub(crate) fn load(&self, place: Place, out: &mut [u8]) -> Result<(), BrokenChain> {
        let bank = self.banks.get(place.bank()).ok_or(BrokenChain)?.lock();
        let chunk = bank
            .chunks
            .get(place.chunk())
            .and_then(Option::as_ref)
            .ok_or(BrokenChain)?;
        chunk.load(place.block(), out)
    }

    /// Frees what is stored at `place` with this length.
    pub(crate) fn free(&self, place: Place, len: usize, budget: &Budget) {
        if self.try_free(place, len, budget).is_err() {
            self.broken_chains.fetch_add(1, Relaxed);
        }
    }

    fn try_free(&self, place: Place, len: usize, budget: &Budget) -> Result<(), BrokenChain> {
        let entry = self.banks.get(place.bank()).ok_or(BrokenChain)?;
        let (released, is_bank_empty) = {
            let mut bank = entry.lock();
            bank.free_at(place.chunk(), place.block(), len)?;
            (
                bank.release_if_spare(place.chunk(), budget),
                bank.used_blocks == 0,
            )
        };
        self.used_blocks.fetch_sub(blocks_for(len) as u64, Relaxed);
        self.unmap(released, budget);
        if is_bank_empty {
            // The chunk that was kept idle for the next page is not worth keeping for none.
            self.trim_bank(entry, budget);
        }
        Ok(())
    }

    /// Unmaps first and tells the budget then, so that the figure never runs ahead of the truth.
    fn unmap(&self, chunk: Option<Chunk>, budget: &Budget) {
        if chunk.is_some() {
            drop(chunk);
            self.chunks.fetch_sub(1, Relaxed);
            budget.release(chunk_held_bytes(self.blocks_per_chunk));
        }
    }

    /// Gives every empty chunk back, for when the index needs the bytes. How many there were.
    pub(crate) fn trim(&self, budget: &Budget) -> usize {
        self.banks
            .iter()
            .map(|bank| self.trim_bank(bank, budget))
            .sum()
    }

    fn trim_bank(&self, bank: &Mutex<Bank>, budget: &Budget) -> usize {
        let mut trimmed = 0;
        loop {
            let released = bank.lock().release_any(budget);
            if released.is_none() {
                return trimmed;
            }
            trimmed += 1;
            self.unmap(released, budget);
        }
    }

    /// See [`Chunk::flip_bit`].
    #[cfg(any(test, feature = "fault-injection"))]
    pub(crate) fn flip_bit(&self, place: Place, len: usize, bit: usize) -> bool {
        let Some(bank) = self.banks.get(place.bank()) else {
            return false;
        };
        let mut bank = bank.lock();
        let chunk = bank.chunks.get_mut(place.chunk()).and_then(Option::as_mut);
        chunk.is_some_and(|chunk| chunk.flip_bit(place.block(), len, bit))
    }

    /// Checks that exactly the given (place, length) pairs are in use. Bytes held, if all is well.
    pub(crate) fn verify(&self, pages: &mut [(Place, usize)]) -> Result<u64, String> {
        if self.broken_chains.load(Relaxed) > 0 {
            return Err("broken chains were found and left alone".into());
        }
        pages.sort_unstable_by_key(|(place, _)| place.0);
        let (mut held, mut used) = (0, 0);
        let mut pages = pages.iter().peekable();
        for (number, bank) in self.banks.iter().enumerate() {
            let bank = bank.lock();
            held += bank.chunks.len() as u64 * ENTRY_BYTES;
            let (mut bank_free, mut bank_used, mut bank_idle) = (0, 0, 0);
            for (at, chunk) in bank.chunks.iter().enumerate() {
                let Some(chunk) = chunk else { continue };
                let mut seen = vec![false; self.blocks_per_chunk];
                while let Some((place, len)) =
                    pages.next_if(|(place, _)| (place.bank(), place.chunk()) == (number, at))
                {
                    chunk.mark(place.block(), *len, &mut seen)?;
                }
                chunk.verify(&seen)?;
                held += chunk_held_bytes(self.blocks_per_chunk);
                bank_free += chunk.free_blocks();
                bank_used += chunk.used_blocks();
                bank_idle += usize::from(chunk.used_blocks() == 0);
                let is_roomy = bank
                    .roomy
                    .get(at / 64)
                    .is_some_and(|word| word >> (at % 64) & 1 == 1);
                if is_roomy != (chunk.free_blocks() >= BLOCKS_PER_PAGE) {
                    return Err(format!(
                        "bank {number} is wrong about the room in chunk {at}"
                    ));
                }
            }
            if (bank_free, bank_used, bank_idle)
                != (bank.free_blocks, bank.used_blocks, bank.idle_chunks)
            {
                return Err(format!("bank {number} counts its blocks wrong"));
            }
            used += bank_used as u64;
        }
        if let Some((place, _)) = pages.next() {
            return Err(format!("a page is at {place:?}, where no chunk is"));
        }
        if used != self.used_blocks.load(Relaxed) {
            return Err(format!(
                "{used} blocks in use, but the arena counts {:?}",
                self.used_blocks
            ));
        }
        Ok(held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fills_to_the_last_block_over_all_banks_and_gives_everything_back() {
        let capacity = 8 << 20;
        let (arena, budget) = (Arena::new(capacity), Budget::new(capacity));
        assert!(arena.banks.len() > 1);
        let mut pages = Vec::new();
        let bytes = [7_u8; 1800];
        while let Ok(place) = arena.store(0, &bytes, &budget) {
            pages.push((place, bytes.len()));
        }
        assert!(budget.held_bytes() <= capacity);
        assert!(
            arena.used_bytes() > capacity * 9 / 10,
            "{} of {capacity}",
            arena.used_bytes()
        );
        assert_eq!(arena.verify(&mut pages).unwrap(), budget.held_bytes());
        // Every other one goes; what is left serves pages of any other size.
        let mut kept = Vec::new();
        for (at, (place, len)) in pages.drain(..).enumerate() {
            if at % 2 == 0 {
                arena.free(place, len, &budget)
            } else {
                kept.push((place, len))
            }
        }
        while let Ok(place) = arena.store(1, &[1; 333], &budget) {
            kept.push((place, 333));
        }
        assert!(
            arena.used_bytes() > capacity * 9 / 10,
            "{} of {capacity}",
            arena.used_bytes()
        );
        assert_eq!(arena.verify(&mut kept).unwrap(), budget.held_bytes());
        for (place, len) in kept.drain(..) {
            arena.free(place, len, &budget);
        }
        assert_eq!((arena.used_bytes(), budget.held_bytes()), (0, 0));
        assert_eq!(arena.verify(&mut kept), Ok(0));
    }

    #[test]
    fn an_idle_chunk_is_kept_for_the_next_page_but_not_when_trimmed() {
        let (arena, budget) = (Arena::new(1 << 20), Budget::new(1 << 20));
        let first = arena.store(0, &[1; 4096], &budget).unwrap();
        let mut others = Vec::new();
        while budget.held_bytes() < 2 * chunk_held_bytes(arena.blocks_per_chunk) {
            others.push(arena.store(0, &[1; 4096], &budget).unwrap());
        }
        let last = others.pop().unwrap();
        arena.free(last, 4096, &budget);
        let held = budget.held_bytes();
        assert_eq!(arena.trim(&budget), 1);
        assert!(budget.held_bytes() < held);
        let mut out = [0; 4096];
        assert_eq!(arena.load(last, &mut out), Err(BrokenChain));
        arena.load(first, &mut out).unwrap();
        assert_eq!(out, [1; 4096]);
    }
}
