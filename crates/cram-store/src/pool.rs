// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client's pool: put, get and flush, with tmem's semantics.

use std::sync::Arc;

use crate::arena::cost_bytes;
use crate::budget::{Account, Shortage};
use crate::client::PoolSpec;
use crate::codec::{Image, Scratch, fill};
use crate::core::Core;
use crate::evict::Whose;
use crate::index::{Key, Slot};
use crate::space::{Keeping, Space};
use crate::stats::{PoolStats, Refusal, Tally};
use crate::{ObjectId, PAGE_SIZE, Page};

/// What became of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use = "a refused page is not in the store, and neither is any older copy"]
pub enum PutResult {
    /// The page is in the store; an older copy is overwritten.
    Stored,
    /// The page is not in the store; an older copy has been removed.
    Refused(Refusal),
}

/// What became of a get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use = "only a page that was found is in the buffer"]
pub enum GetResult {
    /// The buffer holds the page that was put last.
    Found,
    /// The page is not there. The buffer is untouched.
    Missing,
    /// The page is there but damaged: its checksum is wrong. The buffer holds zeroes. The page
    /// stays, and is reported again, until it is flushed, overwritten or evicted.
    Corrupt,
}

/// How often a put makes room and tries again before it is refused.
const PUT_TRIES: u32 = 8;
/// How often an exclusive get starts again when the page changed while it was unpacked.
const GET_TRIES: u32 = 16;

/// What stood in the way of storing a page.
enum Obstacle {
    Quota,
    Blocks,
    Index,
    PoolGone,
}

/// One client's pool. Made by [`crate::Client::new_pool`]; a handle outlives the pool's
/// destruction, and then refuses every put and finds nothing.
///
/// All operations may be called from any number of threads at once. Object ids and page numbers
/// come from guests: every value is allowed.
pub struct Pool {
    core: Arc<Core>,
    spec: PoolSpec,
    space: Arc<Space>,
    account: Arc<Account>,
    owner: u16,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

impl Pool {
    pub(crate) fn new(
        core: Arc<Core>,
        spec: PoolSpec,
        space: Arc<Space>,
        account: Arc<Account>,
        owner: u16,
    ) -> Self {
        Self {
            core,
            spec,
            space,
            account,
            owner,
        }
    }

    pub(crate) fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// What the pool was made with.
    #[must_use]
    pub fn spec(&self) -> PoolSpec {
        self.spec
    }

    /// How many pages are in the pool; in a shared pool those of all clients.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.space.tally.pages_stored()
    }

    /// The pool's figures; in a shared pool those of all clients. Takes no lock.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.space.stats(&self.core)
    }

    fn count(&self, event: impl Fn(&Tally)) {
        [&self.space.tally, &self.account.tally, &self.core.tally]
            .into_iter()
            .for_each(event);
    }

    /// Puts a page. Whatever comes of it, an older copy is never seen again.
    pub fn put(
        &self,
        object: ObjectId,
        index: u32,
        page: &Page,
        scratch: &mut Scratch,
    ) -> PutResult {
        let key = Key { object, index };
        self.count(Tally::put);
        match self.try_put(&key, page, scratch) {
            Ok(()) => PutResult::Stored,
            Err(why) => {
                self.space.remove(&self.core, &key);
                self.count(|tally| tally.refused(why));
                PutResult::Refused(why)
            }
        }
    }

    fn try_put(&self, key: &Key, page: &Page, scratch: &mut Scratch) -> Result<(), Refusal> {
        if self.account.is_frozen() {
            return Err(Refusal::Frozen);
        }
        let bank = scratch.bank();
        let image = scratch.encode(page);
        if self.spec.refuse_incompressible
            && matches!(image, Image::Bytes(bytes) if bytes.len() == PAGE_SIZE)
        {
            return Err(Refusal::Incompressible);
        }
        let word = match image {
            Image::Filled(word) => word,
            Image::Bytes(_) => self.space.seal.page(key, page),
        };
        let mut tries = 1;
        loop {
            let Err(obstacle) = self.store(key, word, &image, bank) else {
                return Ok(());
            };
            // The older copy has to go in any case now, and may be all the room that is needed.
            let is_roomier = (tries == 1 && self.space.remove(&self.core, key))
                || self.make_room(&obstacle, &image, tries);
            if !is_roomier || tries == PUT_TRIES {
                return Err(self.refusal(&obstacle));
            }
            tries += 1;
        }
    }

    fn refusal(&self, obstacle: &Obstacle) -> Refusal {
        match obstacle {
            Obstacle::Quota => Refusal::OverQuota,
            Obstacle::PoolGone => Refusal::NoSpace,
            Obstacle::Blocks | Obstacle::Index => {
                self.count(Tally::limit_hit);
                self.core.note_full();
                Refusal::NoSpace
            }
        }
    }

    /// Tries to remove what stood in the way; false when there is nothing to be done.
    fn make_room(&self, obstacle: &Obstacle, image: &Image<'_>, tries: u32) -> bool {
        let len = if let Image::Bytes(bytes) = image {
            bytes.len()
        } else {
            0
        };
        // More each time: others may take what this call frees, and blocks of several chunks, or
        // bytes of several tables, may have to go before one chunk or table has room.
        let bytes = (cost_bytes(len) + 512) << (tries - 1).min(8);
        match obstacle {
            Obstacle::PoolGone => false,
            Obstacle::Quota => self.core.evict(Whose::Client(&self.account), bytes) > 0,
            Obstacle::Blocks => self.core.evict(Whose::Any, bytes) > 0,
            // The index needs bytes from the host, so empty chunks must go back to it.
            Obstacle::Index => {
                let evicted = if tries > 1 {
                    self.core.evict(Whose::Any, bytes)
                } else {
                    0
                };
                self.core.arena.trim(&self.core.budget) > 0 || evicted > 0 || tries == 1
            }
        }
    }

    /// Stores an image and enters it into the index, or leaves everything as it was.
    fn store(&self, key: &Key, word: u64, image: &Image<'_>, bank: usize) -> Result<(), Obstacle> {
        let core = &*self.core;
        let len = if let Image::Bytes(bytes) = image {
            bytes.len()
        } else {
            0
        };
        let bill = self.space.bill_bytes(len);
        self.account.reserve(bill).map_err(|_| Obstacle::Quota)?;
        let slot = match image {
            Image::Filled(_) => Ok(Slot::filled(
                word,
                self.space.seal.word(key, word),
                self.owner,
            )),
            Image::Bytes(bytes) => core
                .arena
                .store(bank, bytes, &core.budget)
                .map(|place| Slot::stored(word, place, len, self.owner)),
        };
        let entered = match slot {
            Err(_) => Err(Obstacle::Blocks),
            Ok(slot) => self.enter(key, slot).inspect_err(|_| {
                if let Some(place) = slot.place() {
                    core.arena.free(place, len, &core.budget);
                }
            }),
        };
        entered.inspect_err(|_| self.account.release(bill))
    }

    fn enter(&self, key: &Key, slot: Slot) -> Result<(), Obstacle> {
        let core = &*self.core;
        let now = if self.space.is_evictable() {
            core.tick()
        } else {
            0
        };
        let (shard, hash) = self.space.find(key.object, key.region());
        let mut index = shard.lock();
        if index.is_dead {
            return Err(Obstacle::PoolGone);
        }
        let old = index.insert(hash, key, slot, now, self.space.ledger(core));
        // On a shortage, too: some table may have grown before another could not.
        shard.publish(&index);
        let old = old.map_err(|shortage| match shortage {
            Shortage::Quota => Obstacle::Quota,
            Shortage::Store => Obstacle::Index,
        })?;
        self.space.page_in(core, &slot);
        if let Some(old) = old {
            self.space.page_out(core, &old);
        }
        Ok(())
    }

    /// Gets the page that was put last under this name.
    ///
    /// From a persistent pool it stays; from a private ephemeral one it is removed, once it was
    /// found intact; from a shared ephemeral one it stays and counts as used.
    pub fn get(
        &self,
        object: ObjectId,
        index: u32,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> GetResult {
        self.count(Tally::get);
        let key = Key { object, index };
        let result = self.try_get(&key, page, scratch);
        match result {
            GetResult::Found => (),
            GetResult::Missing => self.count(Tally::missing),
            GetResult::Corrupt => {
                page.fill(0);
                self.count(Tally::corrupt);
            }
        }
        result
    }

    fn try_get(&self, key: &Key, page: &mut Page, scratch: &mut Scratch) -> GetResult {
        for _ in 0..GET_TRIES {
            let Some((slot, is_loaded)) = self.copy_out(key, page, scratch) else {
                return GetResult::Missing;
            };
            if !is_loaded || !self.unpack(key, &slot, page, scratch) {
                return GetResult::Corrupt;
            }
            if self.space.keeping != Keeping::Exclusive || self.remove_same(key, &slot) {
                return GetResult::Found;
            }
            page.fill(0);
        }
        // Others change this page all the time. It may be evicted at any moment, so also now: then
        // it is missing, and stays so.
        self.space.remove(&self.core, key);
        GetResult::Missing
    }

    /// Copies a page's image, to the page itself if raw, else to the scratch buffer. `None` when
    /// the page is not there; false beside the slot when the image could not be read.
    fn copy_out(&self, key: &Key, page: &mut Page, scratch: &mut Scratch) -> Option<(Slot, bool)> {
        let (shard, hash) = self.space.find(key.object, key.region());
        let mut index = shard.lock();
        let slot = index.get(hash, key)?;
        if self.space.keeping == Keeping::Shared {
            index.refresh(hash, key);
        }
        let Some(place) = slot.place() else {
            return Some((slot, true));
        };
        let buffer = if slot.len() == PAGE_SIZE {
            Some(&mut page[..])
        } else {
            scratch.packed_mut(slot.len())
        };
        let is_loaded = buffer.is_some_and(|buffer| self.core.arena.load(place, buffer).is_ok());
        Some((slot, is_loaded))
    }

    /// Makes the page from its image and verifies it. No lock is held.
    fn unpack(&self, key: &Key, slot: &Slot, page: &mut Page, scratch: &Scratch) -> bool {
        if slot.is_same_filled() {
            fill(page, slot.word);
            return self.space.seal.word(key, slot.word) == slot.word_checksum();
        }
        (slot.len() == PAGE_SIZE || scratch.unpack(slot.len(), page))
            && self.space.seal.page(key, page) == slot.word
    }

    /// Takes the page out if it is still the one that was read. (When it was put again meanwhile,
    /// with the same bytes in the same place, it is as if the get had come after that put.)
    fn remove_same(&self, key: &Key, slot: &Slot) -> bool {
        let (shard, hash) = self.space.find(key.object, key.region());
        let mut index = shard.lock();
        let is_same = index
            .get(hash, key)
            .is_some_and(|now| now.is_same_page(slot));
        if is_same && let Some(slot) = index.remove(hash, key, self.space.ledger(&self.core)) {
            self.space.page_out(&self.core, &slot);
            shard.publish(&index);
        }
        is_same
    }

    /// Removes `count` pages from number `first` on, as far as they are there; how many were. A
    /// range that leaves the 32 bits of a page number ends with them. Acts also while frozen.
    pub fn flush_page(&self, object: ObjectId, first: u32, count: u64) -> u64 {
        let Some(more) = count.checked_sub(1) else {
            return 0;
        };
        let last = u32::try_from(u64::from(first).saturating_add(more)).unwrap_or(u32::MAX);
        let removed = self.space.remove_range(&self.core, object, first, last);
        self.count(|tally| tally.flushed(removed));
        removed
    }

    /// Removes all pages of an object; how many there were. Acts also while frozen.
    pub fn flush_object(&self, object: ObjectId) -> u64 {
        self.flush_page(object, 0, 1 << 32)
    }

    /// Flips one bit of a stored page's image (`bit` modulo its length), as failing memory would.
    /// False when the page is not there. For tests: a get must then say [`GetResult::Corrupt`].
    #[cfg(any(test, feature = "fault-injection"))]
    #[doc(hidden)]
    pub fn flip_stored_bit(&self, object: ObjectId, index: u32, bit: usize) -> bool {
        let key = Key { object, index };
        let (shard, hash) = self.space.find(key.object, key.region());
        let mut index = shard.lock();
        match index.get(hash, &key) {
            None => false,
            Some(slot) => match slot.place() {
                Some(place) => self.core.arena.flip_bit(place, slot.len(), bit),
                None => index.flip_word_bit(hash, &key, bit),
            },
        }
    }
}
