// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A space: the pages of one pool. A private pool has a space of its own; the
//! clients of a shared pool have one together.
//!
//! A space is cut into shards by the hash of object and region, each with its
//! own lock and part of the index. Locks are held for a look-up and a copy of
//! at most 4 KiB, never while a page is packed or unpacked, and long work
//! (flushing a range, destroying) takes them anew for each leaf.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use parking_lot::{Mutex, MutexGuard, RwLock};

use crate::ObjectId;
use crate::arena::cost_bytes;
use crate::budget::{Account, Ledger, Shortage};
use crate::codec::Seal;
use crate::core::Core;
use crate::index::{Index, Key, Slot, leaf_hash};
use crate::leaf::PAGES_PER_LEAF;
use crate::stats::{PoolStats, Tally};

/// What becomes of the pages of a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Keeping {
    /// Kept until flushed.
    Persistent,
    /// May be evicted; a get takes the page out.
    Exclusive,
    /// May be evicted; a get leaves the page and makes it young again.
    Shared,
}

/// What a client is billed for a page in a shared pool beyond the page's blocks, in bytes: its
/// share of the index, at a flat rate, since nobody can say whose page made a table grow.
pub(crate) const SHARED_PAGE_BYTES: u64 = 64;

/// One shard. The numbers beside the lock mirror what is inside it, for readers in a hurry.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Shard {
    index: Mutex<Index>,
    oldest_stamp: AtomicU64,
    index_bytes: AtomicU64,
}

impl Shard {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock()
    }

    pub(crate) fn oldest_stamp(&self) -> u64 {
        self.oldest_stamp.load(Relaxed)
    }

    /// To be called before the lock is let go, whenever pages came or went.
    pub(crate) fn publish(&self, index: &Index) {
        self.oldest_stamp.store(index.oldest_stamp(), Relaxed);
        self.index_bytes.store(index.held_bytes(), Relaxed);
    }
}

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Space {
    pub(crate) keeping: Keeping,
    pub(crate) seal: Seal,
    keys: RandomState,
    shards: Box<[Shard]>,
    pub(crate) tally: Tally,
    /// Blocks of its pages, in bytes.
    block_bytes: AtomicU64,
    /// Pays for the index and these structures: the client, if the space is private. A shared space
    /// has an account of its own, without a quota, or else the quota of the client that came first
    /// would decide for all; its members pay [`SHARED_PAGE_BYTES`] for each of their pages instead.
    pub(crate) payer: Arc<Account>,
    /// Of a shared space: all who ever joined, by the numbers that slots carry, less one.
    members: RwLock<Vec<Arc<Account>>>,
}

impl Space {
    /// Makes an empty space, whose structures `payer` pays for.
    pub(crate) fn new(
        core: &Core,
        keeping: Keeping,
        payer: Arc<Account>,
    ) -> Result<Self, Shortage> {
        Ledger {
            budget: &core.budget,
            account: &payer,
        }
        .reserve(Self::fixed_bytes(core))?;
        let keys = RandomState::new();
        let shard = |_| Shard {
            index: Mutex::new(Index::new(keys.clone(), keeping != Keeping::Persistent)),
            oldest_stamp: AtomicU64::new(u64::MAX),
            index_bytes: AtomicU64::new(0),
        };
        Ok(Self {
            keeping,
            seal: Seal::new(keys.hash_one("seal")),
            shards: (0..core.shards_per_space).map(shard).collect(),
            keys,
            tally: Tally::default(),
            block_bytes: AtomicU64::new(0),
            payer,
            members: RwLock::default(),
        })
    }

    /// Bytes of an empty space and of one client's handle on it.
    pub(crate) fn fixed_bytes(core: &Core) -> u64 {
        (size_of::<Self>()
            + size_of::<Account>()
            + core.shards_per_space * size_of::<Shard>()
            + 512) as u64
    }

    pub(crate) fn is_evictable(&self) -> bool {
        self.keeping != Keeping::Persistent
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// A page's shard and the hash to look it up with.
    pub(crate) fn find(&self, object: ObjectId, region: u32) -> (&Shard, u64) {
        let hash = leaf_hash(&self.keys, object, region);
        // Bits that the tables inside the shard do not look at.
        let at = usize::try_from(hash >> 32 & 0xff_ffff).unwrap_or(0) % self.shards.len();
        (&self.shards[at], hash)
    }

    pub(crate) fn ledger<'a>(&'a self, core: &'a Core) -> Ledger<'a> {
        Ledger {
            budget: &core.budget,
            account: &self.payer,
        }
    }

    /// What a page with an image of so many bytes is billed to the client that put it.
    pub(crate) fn bill_bytes(&self, len: usize) -> u64 {
        let is_shared = self.keeping == Keeping::Shared;
        cost_bytes(len) + if is_shared { SHARED_PAGE_BYTES } else { 0 }
    }

    /// Of a shared space: the number that slots of this client's pages carry; it joins if it is not a member. `None`
    /// when numbers have run out.
    pub(crate) fn join(&self, account: &Arc<Account>) -> Option<u16> {
        let mut members = self.members.write();
        let known = members
            .iter()
            .position(|member| Arc::ptr_eq(member, account));
        // The number of a client that is gone, with all its pages, may be used again.
        let at = known.unwrap_or_else(|| {
            let is_gone = |member: &Arc<Account>| {
                Arc::strong_count(member) == 1 && member.tally.pages_stored() == 0
            };
            members.iter().position(is_gone).unwrap_or(members.len())
        });
        let number = u16::try_from(at + 1).ok()?;
        match members.get_mut(at) {
            Some(member) => *member = account.clone(),
            None => members.push(account.clone()),
        }
        Some(number)
    }

    /// This client's number, if it is a member.
    pub(crate) fn member_number(&self, account: &Arc<Account>) -> Option<u16> {
        let members = self.members.read();
        let at = members
            .iter()
            .position(|member| Arc::ptr_eq(member, account))?;
        u16::try_from(at + 1).ok()
    }

    /// The client with this number.
    pub(crate) fn owner(&self, owner: u16) -> Option<Arc<Account>> {
        match usize::from(owner).checked_sub(1) {
            None => Some(self.payer.clone()),
            Some(at) => self.members.read().get(at).cloned(),
        }
    }

    /// As [`Self::owner`], without counting a reference.
    pub(crate) fn with_owner(&self, owner: u16, act: impl FnOnce(&Account)) {
        match usize::from(owner).checked_sub(1) {
            None => act(&self.payer),
            Some(at) => {
                if let Some(member) = self.members.read().get(at) {
                    act(member);
                }
            }
        }
    }

    /// Counts a page that has come. With the shard's lock held.
    pub(crate) fn page_in(&self, core: &Core, slot: &Slot) {
        let bytes = cost_bytes(slot.len());
        self.block_bytes.fetch_add(bytes, Relaxed);
        self.tally.page_in(slot);
        core.tally.page_in(slot);
        let is_evictable = self.is_evictable();
        if is_evictable {
            core.evictable_bytes.fetch_add(bytes, Relaxed);
        }
        self.with_owner(slot.owner, |account| {
            account.tally.page_in(slot);
            if is_evictable {
                account.evictable_bytes.fetch_add(bytes, Relaxed);
            }
        });
    }

    /// Frees the image of a page that has left the index, and counts it out. With the shard's
    /// lock held: the arena's locks come after it.
    pub(crate) fn page_out(&self, core: &Core, slot: &Slot) {
        let bytes = cost_bytes(slot.len());
        if let Some(place) = slot.place() {
            core.arena.free(place, slot.len(), &core.budget);
        }
        self.block_bytes.fetch_sub(bytes, Relaxed);
        self.tally.page_out(slot);
        core.tally.page_out(slot);
        let is_evictable = self.is_evictable();
        if is_evictable {
            core.evictable_bytes.fetch_sub(bytes, Relaxed);
        }
        self.with_owner(slot.owner, |account| {
            account.tally.page_out(slot);
            account.release(self.bill_bytes(slot.len()));
            if is_evictable {
                account.evictable_bytes.fetch_sub(bytes, Relaxed);
            }
        });
        core.note_freed();
    }

    /// Takes one page out. Whether it was there.
    pub(crate) fn remove(&self, core: &Core, key: &Key) -> bool {
        let (shard, hash) = self.find(key.object, key.region());
        let mut index = shard.lock();
        let slot = index.remove(hash, key, self.ledger(core));
        if let Some(slot) = &slot {
            self.page_out(core, slot);
            shard.publish(&index);
        }
        slot.is_some()
    }

    /// Takes out all pages of an object whose numbers are in `first..=last`; how many there were.
    /// Costs the lesser of the range's width and what the object stores.
    pub(crate) fn remove_range(&self, core: &Core, object: ObjectId, first: u32, last: u32) -> u64 {
        let (low, high) = (first / PAGES_PER_LEAF, last / PAGES_PER_LEAF);
        let width = high - low + 1;
        // A narrow range is tried number by number; else the object's own lists tell what is there.
        let shards = u32::try_from(self.shards.len()).unwrap_or(u32::MAX);
        let is_narrow = width <= shards || {
            let leaves = |shard: &Shard| u64::from(shard.lock().leaves_of(object));
            u64::from(width) <= self.shards.iter().map(leaves).sum()
        };
        let mut removed = 0;
        let mut strip = |region: u32| {
            let from = if region == low {
                first % PAGES_PER_LEAF
            } else {
                0
            };
            let to = if region == high {
                last % PAGES_PER_LEAF
            } else {
                PAGES_PER_LEAF - 1
            };
            let mask = (u64::MAX << from) & (u64::MAX >> (PAGES_PER_LEAF - 1 - to));
            removed += self.remove_masked(core, object, region, mask);
        };
        if is_narrow {
            (low..=high).for_each(strip);
        } else {
            let mut regions = Vec::new();
            for shard in &self.shards {
                shard.lock().regions_of(object, low, high, &mut regions);
                regions.drain(..).for_each(&mut strip);
            }
        }
        removed
    }

    fn remove_masked(&self, core: &Core, object: ObjectId, region: u32, mask: u64) -> u64 {
        let (shard, hash) = self.find(object, region);
        let mut removed = 0;
        let mut index = shard.lock();
        index.remove_masked(hash, object, region, mask, self.ledger(core), |slot| {
            self.page_out(core, &slot);
            removed += 1;
        });
        if removed > 0 {
            shard.publish(&index);
        }
        removed
    }

    /// Takes everything out, for good: nothing comes in any more. How many pages there were.
    pub(crate) fn destroy(&self, core: &Core) -> u64 {
        let mut removed = 0;
        for shard in &self.shards {
            shard.lock().is_dead = true;
            let mut is_more = true;
            while is_more {
                let mut index = shard.lock();
                is_more = index.remove_last(self.ledger(core), |slot| {
                    self.page_out(core, &slot);
                    removed += 1;
                });
                shard.publish(&index);
            }
        }
        self.ledger(core).release(Self::fixed_bytes(core));
        removed
    }

    /// Bytes of its blocks, its index and its structures.
    pub(crate) fn held_bytes(&self, core: &Core) -> u64 {
        let index: u64 = self
            .shards
            .iter()
            .map(|shard| shard.index_bytes.load(Relaxed))
            .sum();
        self.block_bytes.load(Relaxed) + index + Self::fixed_bytes(core)
    }

    pub(crate) fn stats(&self, core: &Core) -> PoolStats {
        self.tally.read(self.held_bytes(core), 0, 0)
    }
}
