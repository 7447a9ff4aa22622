// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One shard of a pool's index: which pages are there and where.
//!
//! Leaves of up to 64 consecutive pages stand in one dense table; a hash finds
//! a leaf by object and region (page number / 64), another finds the first of
//! an object's leaves. Leaves of an object are linked to each other, and in
//! ephemeral pools all leaves are linked by age. So a page is found in one
//! probe, a range costs the lesser of its width and what the object stores,
//! and destroying costs what is destroyed.
//!
//! Every byte that the tables allocate is reserved with the [`Ledger`] before
//! it is allocated and released after it was freed; `bytes` is the sum.
//!
//! Invariants: each leaf is in `by_key` once, in its object's list once, and
//! in the age list once (ephemeral pools) or never; an object without a leaf
//! does not exist. [`Index::verify`] checks them all.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

use hashbrown::HashTable;

use crate::ObjectId;
use crate::budget::{Ledger, Shortage};
use crate::leaf::{Leaf, NONE, PAGES_PER_LEAF};
use crate::tables::{
    grow_table, leaves_bytes, resize_leaves, resize_slots, shrink_table, table_bytes,
};

pub(crate) use crate::leaf::Slot;

/// A page's name inside its pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) object: ObjectId,
    pub(crate) index: u32,
}

impl Key {
    pub(crate) fn region(&self) -> u32 {
        self.index / PAGES_PER_LEAF
    }

    pub(crate) fn bit(&self) -> u32 {
        self.index % PAGES_PER_LEAF
    }
}

/// Secretly keyed, since guests choose what is hashed.
pub(crate) fn leaf_hash(keys: &RandomState, object: ObjectId, region: u32) -> u64 {
    keys.hash_one((object, region))
}

/// What eviction thinks of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// Evict it.
    Yes,
    /// Not this one.
    No,
    /// Not this one, nor any after it.
    Enough,
}

/// How many puts into ephemeral pools a leaf may be older than a page that comes into it, before
/// the page is marked, so that the leaf's age does not count for it.
const LEAF_AGE_MAX: u64 = 64;

/// The first leaf of an object's list, and the list's length.
#[derive(Debug)]
struct Object {
    id: ObjectId,
    first: u32,
    leaves: u32,
}

#[derive(Debug)]
pub(crate) struct Index {
    keys: RandomState,
    leaves: Vec<Leaf>,
    by_key: HashTable<u32>,
    objects: HashTable<Object>,
    is_aged: bool,
    oldest: u32,
    youngest: u32,
    /// Set when the pool is destroyed: nothing comes in any more.
    pub(crate) is_dead: bool,
    bytes: u64,
}

impl Index {
    /// An empty index; `is_aged` when its pages may be evicted.
    pub(crate) fn new(keys: RandomState, is_aged: bool) -> Self {
        Self {
            keys,
            leaves: Vec::new(),
            by_key: HashTable::new(),
            objects: HashTable::new(),
            is_aged,
            oldest: NONE,
            youngest: NONE,
            is_dead: false,
            bytes: 0,
        }
    }

    /// Bytes that the tables have allocated.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.bytes
    }

    fn leaf(&self, at: u32) -> Option<&Leaf> {
        self.leaves.get(at as usize)
    }

    fn leaf_mut(&mut self, at: u32) -> Option<&mut Leaf> {
        self.leaves.get_mut(at as usize)
    }

    /// Which leaf holds a region of an object; `hash` is its [`leaf_hash`].
    fn find(&self, hash: u64, object: ObjectId, region: u32) -> Option<u32> {
        let is_it = |at: &u32| {
            self.leaf(*at)
                .is_some_and(|leaf| (leaf.object, leaf.region) == (object, region))
        };
        self.by_key.find(hash, is_it).copied()
    }

    pub(crate) fn get(&self, hash: u64, key: &Key) -> Option<Slot> {
        let at = self.find(hash, key.object, key.region())?;
        self.leaf(at)?.get(key.bit()).copied()
    }

    /// Marks a page as used, which spares it when its leaf next comes up for eviction.
    pub(crate) fn refresh(&mut self, hash: u64, key: &Key) {
        let at = self.find(hash, key.object, key.region());
        if let Some(slot) = at
            .and_then(|at| self.leaf_mut(at))
            .and_then(|leaf| leaf.get_mut(key.bit()))
        {
            slot.set_refreshed(true);
        }
    }

    /// Flips a bit of a same-filled page's word, to show in tests that it is noticed.
    #[cfg(any(test, feature = "fault-injection"))]
    pub(crate) fn flip_word_bit(&mut self, hash: u64, key: &Key, bit: usize) -> bool {
        let at = self.find(hash, key.object, key.region());
        let slot = at
            .and_then(|at| self.leaf_mut(at))
            .and_then(|leaf| leaf.get_mut(key.bit()));
        slot.map(|slot| slot.word ^= 1 << (bit % 64)).is_some()
    }

    /// Puts a page in and returns the one it replaces. `now` is the store's clock. On a shortage
    /// no page has changed, and this one was not there: replacing needs no memory.
    pub(crate) fn insert(
        &mut self,
        hash: u64,
        key: &Key,
        mut slot: Slot,
        now: u64,
        ledger: Ledger<'_>,
    ) -> Result<Option<Slot>, Shortage> {
        let at = match self.find(hash, key.object, key.region()) {
            Some(at) => {
                let leaf = self.leaves.get_mut(at as usize).ok_or(Shortage::Store)?;
                if let Some(capacity) = leaf.growth(key.bit()) {
                    resize_slots(leaf, capacity, &mut self.bytes, ledger)?;
                }
                // A leaf made long ago must not drag down a page that came just now.
                slot.set_refreshed(self.is_aged && now.saturating_sub(leaf.stamp) > LEAF_AGE_MAX);
                at
            }
            None => self.add_leaf(hash, key, now, ledger).inspect_err(|_| {
                // Tables that have grown for a leaf that did not come after all.
                if self.leaves.is_empty() {
                    self.shrink(ledger);
                }
            })?,
        };
        Ok(self.leaf_mut(at).and_then(|leaf| leaf.set(key.bit(), slot)))
    }

    /// Adds a leaf with room for a page, and links it. On a shortage no leaf was.
    fn add_leaf(
        &mut self,
        hash: u64,
        key: &Key,
        now: u64,
        ledger: Ledger<'_>,
    ) -> Result<u32, Shortage> {
        let at = u32::try_from(self.leaves.len())
            .ok()
            .filter(|at| *at != NONE);
        let at = at.ok_or(Shortage::Store)?;
        let (object, region) = (key.object, key.region());
        let object_hash = self.keys.hash_one(object);
        self.make_room(ledger)?;
        let mut leaf = Leaf::new(object, region);
        resize_slots(&mut leaf, 1, &mut self.bytes, ledger)?;
        leaf.stamp = now;
        self.leaves.push(leaf);
        let leaves = &self.leaves;
        let keys = &self.keys;
        self.by_key
            .insert_unique(hash, at, |at| hash_of_leaf(keys, leaves, *at));
        let first = match self
            .objects
            .find_mut(object_hash, |entry| entry.id == object)
        {
            Some(entry) => {
                entry.leaves += 1;
                std::mem::replace(&mut entry.first, at)
            }
            None => {
                let entry = Object {
                    id: object,
                    first: at,
                    leaves: 1,
                };
                self.objects
                    .insert_unique(object_hash, entry, |entry| keys.hash_one(entry.id));
                NONE
            }
        };
        if let Some(leaf) = self.leaf_mut(at) {
            leaf.sibling_next = first;
        }
        if let Some(first) = self.leaf_mut(first) {
            first.sibling_prev = at;
        }
        self.age_append(at);
        Ok(at)
    }

    /// Room for one more leaf and object in all three tables.
    fn make_room(&mut self, ledger: Ledger<'_>) -> Result<(), Shortage> {
        if self.leaves.len() == self.leaves.capacity() {
            resize_leaves(&mut self.leaves, &mut self.bytes, ledger)?;
        }
        let (leaves, keys) = (&self.leaves, &self.keys);
        grow_table(&mut self.by_key, &mut self.bytes, ledger, |at| {
            hash_of_leaf(keys, leaves, *at)
        })?;
        grow_table(&mut self.objects, &mut self.bytes, ledger, |entry| {
            keys.hash_one(entry.id)
        })
    }

    /// Takes a page out.
    pub(crate) fn remove(&mut self, hash: u64, key: &Key, ledger: Ledger<'_>) -> Option<Slot> {
        let at = self.find(hash, key.object, key.region())?;
        let slot = self.leaf_mut(at)?.remove(key.bit())?;
        self.tidy_leaf(at, ledger);
        Some(slot)
    }

    /// Takes out the pages of one leaf whose bits are set in `mask`, handing each to `gone`.
    pub(crate) fn remove_masked(
        &mut self,
        hash: u64,
        object: ObjectId,
        region: u32,
        mask: u64,
        ledger: Ledger<'_>,
        gone: impl FnMut(Slot),
    ) {
        if let Some(at) = self.find(hash, object, region) {
            self.strip_leaf(at, mask, ledger, gone);
        }
    }

    /// Takes out one whole leaf, any; false when there is none left.
    pub(crate) fn remove_last(&mut self, ledger: Ledger<'_>, gone: impl FnMut(Slot)) -> bool {
        let Some(at) = self
            .leaves
            .len()
            .checked_sub(1)
            .and_then(|at| u32::try_from(at).ok())
        else {
            return false;
        };
        self.strip_leaf(at, u64::MAX, ledger, gone);
        true
    }

    fn strip_leaf(&mut self, at: u32, mask: u64, ledger: Ledger<'_>, mut gone: impl FnMut(Slot)) {
        let Some(leaf) = self.leaf_mut(at) else {
            return;
        };
        let mut left = leaf.present() & mask;
        while left != 0 {
            // From the top down, so that nothing has to be moved when all go.
            let bit = left.ilog2();
            left &= !(1 << bit);
            if let Some(slot) = leaf.remove(bit) {
                gone(slot);
            }
        }
        self.tidy_leaf(at, ledger);
    }

    /// How many leaves of an object are in this shard.
    pub(crate) fn leaves_of(&self, object: ObjectId) -> u32 {
        let hash = self.keys.hash_one(object);
        self.objects
            .find(hash, |entry| entry.id == object)
            .map_or(0, |entry| entry.leaves)
    }

    /// The regions of an object that are in this shard and within `first..=last`, added to `out`.
    pub(crate) fn regions_of(&self, object: ObjectId, first: u32, last: u32, out: &mut Vec<u32>) {
        let hash = self.keys.hash_one(object);
        let entry = self.objects.find(hash, |entry| entry.id == object);
        let mut at = entry.map_or(NONE, |entry| entry.first);
        while let Some(leaf) = self.leaf(at) {
            if (first..=last).contains(&leaf.region) {
                out.push(leaf.region);
            }
            at = leaf.sibling_next;
        }
    }

    /// When the oldest leaf was made; `u64::MAX` when there is none or nothing may be evicted.
    pub(crate) fn oldest_stamp(&self) -> u64 {
        self.leaf(self.oldest).map_or(u64::MAX, |leaf| leaf.stamp)
    }

    /// Looks at the oldest leaf for pages to evict: those that `is_wanted` (asked in the order of
    /// the page numbers) and that were not used since the last time, unless `is_forced`. They are
    /// handed to `gone`. What is left of the leaf becomes the youngest, at time `now`, once all of
    /// it was looked at. False when there is no leaf.
    pub(crate) fn evict_oldest(
        &mut self,
        now: u64,
        is_forced: bool,
        ledger: Ledger<'_>,
        mut is_wanted: impl FnMut(&Slot) -> Wanted,
        mut gone: impl FnMut(Slot),
    ) -> bool {
        let at = self.oldest;
        let Some(leaf) = self.leaf_mut(at) else {
            return false;
        };
        let mut left = leaf.present();
        let mut is_done = true;
        while left != 0 {
            let bit = left.trailing_zeros();
            left &= left - 1;
            let Some(slot) = leaf.get_mut(bit) else {
                continue;
            };
            match is_wanted(slot) {
                Wanted::Enough => {
                    is_done = false;
                    break;
                }
                Wanted::No => (),
                Wanted::Yes if slot.is_refreshed() && !is_forced => slot.set_refreshed(false),
                Wanted::Yes => {
                    if let Some(slot) = leaf.remove(bit) {
                        gone(slot);
                    }
                }
            }
        }
        if is_done && leaf.present() != 0 {
            leaf.stamp = now;
            self.age_unlink(at);
            self.age_append(at);
        }
        self.tidy_leaf(at, ledger);
        true
    }

    /// After removals: the leaf shrinks, or goes when it is empty.
    fn tidy_leaf(&mut self, at: u32, ledger: Ledger<'_>) {
        let Some(leaf) = self.leaves.get_mut(at as usize) else {
            return;
        };
        if leaf.present() == 0 {
            self.drop_leaf(at, ledger);
        } else if let Some(capacity) = leaf.shrinkage() {
            // Needs the smaller table beside the larger one; without room it just stays wide.
            let _ = resize_slots(leaf, capacity, &mut self.bytes, ledger);
        }
    }

    fn drop_leaf(&mut self, at: u32, ledger: Ledger<'_>) {
        self.age_unlink(at);
        self.sibling_unlink(at);
        let Some(leaf) = self.leaf(at) else { return };
        let hash = leaf_hash(&self.keys, leaf.object, leaf.region);
        if let Ok(entry) = self.by_key.find_entry(hash, |entry| *entry == at) {
            entry.remove();
        }
        let leaf = self.leaves.swap_remove(at as usize);
        let freed = leaf.held_bytes();
        drop(leaf);
        self.bytes -= freed;
        ledger.release(freed);
        self.follow_moved(at);
        self.shrink(ledger);
    }

    /// The last leaf has taken the place `at` of one that went: whatever pointed to it follows.
    fn follow_moved(&mut self, at: u32) {
        let Some(old_at) = u32::try_from(self.leaves.len())
            .ok()
            .filter(|last| *last != at)
        else {
            return;
        };
        let Some(leaf) = self.leaf(at) else { return };
        let (object, hash) = (leaf.object, leaf_hash(&self.keys, leaf.object, leaf.region));
        let siblings = (leaf.sibling_prev, leaf.sibling_next);
        let ages = (leaf.age_prev, leaf.age_next);
        if let Some(entry) = self.by_key.find_mut(hash, |entry| *entry == old_at) {
            *entry = at;
        }
        match self.leaf_mut(siblings.0) {
            Some(prev) => prev.sibling_next = at,
            None => self.set_first_sibling(object, at),
        }
        if let Some(next) = self.leaf_mut(siblings.1) {
            next.sibling_prev = at;
        }
        if self.is_aged {
            match self.leaf_mut(ages.0) {
                Some(prev) => prev.age_next = at,
                None => self.oldest = at,
            }
            match self.leaf_mut(ages.1) {
                Some(next) => next.age_prev = at,
                None => self.youngest = at,
            }
        }
    }

    fn set_first_sibling(&mut self, object: ObjectId, first: u32) {
        let hash = self.keys.hash_one(object);
        if let Some(entry) = self.objects.find_mut(hash, |entry| entry.id == object) {
            entry.first = first;
        }
    }

    fn sibling_unlink(&mut self, at: u32) {
        let Some(leaf) = self.leaf(at) else { return };
        let (object, prev, next) = (leaf.object, leaf.sibling_prev, leaf.sibling_next);
        let hash = self.keys.hash_one(object);
        if let Ok(mut entry) = self.objects.find_entry(hash, |entry| entry.id == object) {
            entry.get_mut().leaves -= 1;
            if entry.get().leaves == 0 {
                entry.remove();
            } else if prev == NONE {
                entry.get_mut().first = next;
            }
        }
        if let Some(prev) = self.leaf_mut(prev) {
            prev.sibling_next = next;
        }
        if let Some(next) = self.leaf_mut(next) {
            next.sibling_prev = prev;
        }
    }

    fn age_append(&mut self, at: u32) {
        if !self.is_aged {
            return;
        }
        let youngest = std::mem::replace(&mut self.youngest, at);
        // Two threads may have read the clock in one order and come here in the other.
        let stamp = self.leaf(youngest).map_or(0, |leaf| leaf.stamp);
        if let Some(leaf) = self.leaf_mut(at) {
            (leaf.age_prev, leaf.age_next) = (youngest, NONE);
            leaf.stamp = leaf.stamp.max(stamp);
        }
        match self.leaf_mut(youngest) {
            Some(youngest) => youngest.age_next = at,
            None => self.oldest = at,
        }
    }

    fn age_unlink(&mut self, at: u32) {
        let Some(leaf) = self.leaf(at).filter(|_| self.is_aged) else {
            return;
        };
        let (prev, next) = (leaf.age_prev, leaf.age_next);
        match self.leaf_mut(prev) {
            Some(prev) => prev.age_next = next,
            None => self.oldest = next,
        }
        match self.leaf_mut(next) {
            Some(next) => next.age_prev = prev,
            None => self.youngest = prev,
        }
    }

    /// Tables that have become far too wide are made smaller, and freed when the index is empty.
    fn shrink(&mut self, ledger: Ledger<'_>) {
        if self.leaves.is_empty() {
            let freed = leaves_bytes(self.leaves.capacity())
                + table_bytes(&self.by_key)
                + table_bytes(&self.objects);
            self.leaves = Vec::new();
            self.by_key = HashTable::new();
            self.objects = HashTable::new();
            self.bytes -= freed;
            ledger.release(freed);
            return;
        }
        if self.leaves.capacity() > 16 && self.leaves.len() < self.leaves.capacity() / 4 {
            // As with a leaf: without room for the copy it stays wide.
            let _ = resize_leaves(&mut self.leaves, &mut self.bytes, ledger);
        }
        let (leaves, keys) = (&self.leaves, &self.keys);
        shrink_table(&mut self.by_key, &mut self.bytes, ledger, |at| {
            hash_of_leaf(keys, leaves, *at)
        });
        shrink_table(&mut self.objects, &mut self.bytes, ledger, |entry| {
            keys.hash_one(entry.id)
        });
    }

    /// Every page, for checks.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (Key, &Slot)> {
        self.leaves.iter().flat_map(|leaf| {
            (0..PAGES_PER_LEAF).filter_map(|bit| {
                let key = Key {
                    object: leaf.object,
                    index: leaf.region * PAGES_PER_LEAF + bit,
                };
                leaf.get(bit).map(|slot| (key, slot))
            })
        })
    }

    /// Checks all invariants that the module's text names.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let mut bytes = leaves_bytes(self.leaves.capacity())
            + table_bytes(&self.by_key)
            + table_bytes(&self.objects);
        for (at, leaf) in (0_u32..).zip(&self.leaves) {
            bytes += leaf.held_bytes();
            let hash = leaf_hash(&self.keys, leaf.object, leaf.region);
            if self.find(hash, leaf.object, leaf.region) != Some(at) {
                return Err(format!("leaf {at} is not found by its key"));
            }
            if leaf.present() == 0 || leaf.present().count_ones() as usize != leaf.slots().len() {
                return Err(format!("leaf {at} has wrong slots"));
            }
        }
        if bytes != self.bytes {
            return Err(format!(
                "an index holds {bytes} bytes but counts {}",
                self.bytes
            ));
        }
        if self.by_key.len() != self.leaves.len() {
            return Err(format!(
                "{} keys for {} leaves",
                self.by_key.len(),
                self.leaves.len()
            ));
        }
        let mut linked = 0;
        for entry in &self.objects {
            let mut regions = Vec::new();
            self.regions_of(entry.id, 0, u32::MAX, &mut regions);
            if regions.is_empty() || regions.len() != entry.leaves as usize {
                return Err(format!("{:?} counts its leaves wrong", entry.id));
            }
            linked += regions.len();
        }
        if linked != self.leaves.len() {
            return Err(format!(
                "{linked} leaves in the objects' lists of {}",
                self.leaves.len()
            ));
        }
        self.verify_ages()
    }

    fn verify_ages(&self) -> Result<(), String> {
        let (mut at, mut prev, mut aged, mut stamp) = (self.oldest, NONE, 0, 0);
        while let Some(leaf) = self.leaf(at) {
            if leaf.age_prev != prev || aged >= self.leaves.len() {
                return Err(format!("the age list is broken at leaf {at}"));
            }
            if leaf.stamp < stamp {
                return Err(format!("leaf {at} is older than the one before it"));
            }
            (prev, at, stamp) = (at, leaf.age_next, leaf.stamp);
            aged += 1;
        }
        let expected = if self.is_aged { self.leaves.len() } else { 0 };
        if aged != expected || self.youngest != prev {
            return Err(format!("{aged} leaves in the age list of {expected}"));
        }
        Ok(())
    }
}

fn hash_of_leaf(keys: &RandomState, leaves: &[Leaf], at: u32) -> u64 {
    leaves
        .get(at as usize)
        .map_or(0, |leaf| leaf_hash(keys, leaf.object, leaf.region))
}
