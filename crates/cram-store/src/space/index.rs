// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One shard of a pool's index: which pages are there and where.
//!
//! Leaves of up to 64 consecutive pages stand in one dense table; a hash finds
//! a leaf by object and region (page number / 64), another finds the first of
//! an object's leaves. Leaves of an object are linked to each other. So a page
//! is found in one probe, a range costs the lesser of its width and what the
//! object stores, and destroying costs what is destroyed.
//!
//! Every byte that the tables allocate is reserved with the [`Purse`] before
//! it is allocated and released after it was freed; `bytes` is the sum.
//!
//! Invariants: each leaf is in `by_key` once, and in its object's list once; a
//! leaf without a page and an object without a leaf do not exist (but for the
//! moment between [`Index::prepare`] and [`Index::enter`]).
//! [`Index::verify`] checks them all.

use hashbrown::HashTable;
use siphasher::sip::SipHasher13;

use crate::arena::Place;
use crate::ledger::account::Purse;
use crate::ledger::hash::HashKeys;
use crate::machine::budget::Shortage;
use crate::space::leaf::{Leaf, NONE, PAGES_PER_LEAF};
use crate::space::tables::{
    grow_table, leaves_bytes, reserve_leaves, reserve_table, resize_leaves, resize_slots,
    shrink_table, table_bytes,
};
use crate::spec::ObjectId;

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

    fn bit(&self) -> u32 {
        self.index % PAGES_PER_LEAF
    }
}

/// All at once: the hasher's way of taking one number after the other is slower than the hash.
pub(crate) fn leaf_hash(keys: HashKeys, object: ObjectId, region: u32) -> u64 {
    let mut bytes = [0; 32];
    let words = object.0.into_iter().chain([u64::from(region)]);
    for (to, word) in bytes.as_chunks_mut::<8>().0.iter_mut().zip(words) {
        *to = word.to_le_bytes();
    }
    SipHasher13::new_with_keys(keys.0, keys.1).hash(&bytes)
}

/// Gives objects their numbers in the arena, and takes them back. Called with the shard's lock held.
pub(crate) trait Numbers {
    /// A number for an object that has its first leaf in a shard now.
    fn assign(&self, object: ObjectId) -> Result<u32, Shortage>;
    /// The object has no leaf in that shard any more.
    fn withdraw(&self, number: u32);
}

/// The first leaf of an object's list, the list's length, and the object's number.
#[derive(Debug)]
struct Object {
    id: ObjectId,
    first: u32,
    leaves: u32,
    number: u32,
}

/// Room made for a page: hand it to [`Index::enter`] or [`Index::cancel`], with the lock held.
#[derive(Debug, Clone, Copy)]
#[must_use]
pub(crate) struct Prepared {
    leaf: u32,
    bit: u32,
    /// Number of the page's object.
    pub(crate) number: u32,
    /// Where the page is now, if it is there.
    pub(crate) old: Option<Place>,
}

#[derive(Debug)]
pub(crate) struct Index {
    keys: HashKeys,
    leaves: Vec<Leaf>,
    by_key: HashTable<u32>,
    objects: HashTable<Object>,
    /// Set when the pool is destroyed: nothing comes in any more.
    pub(crate) is_dead: bool,
    bytes: u64,
}

impl Index {
    pub(crate) fn new(keys: HashKeys) -> Self {
        Self {
            keys,
            leaves: Vec::new(),
            by_key: HashTable::new(),
            objects: HashTable::new(),
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

    pub(crate) fn get(&self, hash: u64, key: &Key) -> Option<Place> {
        let at = self.find(hash, key.object, key.region())?;
        self.leaf(at)?.get(key.bit())
    }

    /// The page has moved: it is at `to` if it was at `from`, and true is returned.
    pub(crate) fn relocate(&mut self, hash: u64, key: &Key, from: Place, to: Place) -> bool {
        let at = self.find(hash, key.object, key.region());
        match at.and_then(|at| self.leaf_mut(at)) {
            Some(leaf) if leaf.get(key.bit()) == Some(from) => leaf.set(key.bit(), to).is_some(),
            _ => false,
        }
    }

    /// Makes room for a page. On a shortage nothing has changed.
    pub(crate) fn prepare(
        &mut self,
        hash: u64,
        key: &Key,
        numbers: &impl Numbers,
        purse: &Purse<'_>,
    ) -> Result<Prepared, Shortage> {
        let at = match self.find(hash, key.object, key.region()) {
            Some(at) => {
                let leaf = self.leaves.get_mut(at as usize).ok_or(Shortage::Store)?;
                if let Some(capacity) = leaf.growth(key.bit()) {
                    resize_slots(leaf, capacity, &mut self.bytes, purse)?;
                }
                at
            }
            None => self
                .add_leaf(hash, key, numbers, purse)
                .inspect_err(|_| self.shrink_if_empty(purse))?,
        };
        let leaf = self.leaf(at).ok_or(Shortage::Store)?;
        Ok(Prepared {
            leaf: at,
            bit: key.bit(),
            number: leaf.number,
            old: leaf.get(key.bit()),
        })
    }

    /// Puts a page in and returns the one it replaces.
    pub(crate) fn enter(&mut self, prepared: Prepared, place: Place) -> Option<Place> {
        self.leaf_mut(prepared.leaf)
            .and_then(|leaf| leaf.set(prepared.bit, place))
    }

    /// The page does not come after all.
    pub(crate) fn cancel(&mut self, prepared: Prepared, numbers: &impl Numbers, purse: &Purse<'_>) {
        self.tidy_leaf(prepared.leaf, numbers, purse);
    }

    /// At recovery, while it is empty: room for exactly so many leaves and objects.
    pub(crate) fn reserve_exact(
        &mut self,
        leaves: usize,
        objects: usize,
        purse: &Purse<'_>,
    ) -> Result<(), Shortage> {
        let bytes = &mut self.bytes;
        reserve_leaves(&mut self.leaves, leaves, bytes, purse)?;
        reserve_table(&mut self.by_key, leaves, bytes, purse)?;
        reserve_table(&mut self.objects, objects, bytes, purse)
    }

    /// Adds a leaf with room for a page, and links it. On a shortage no leaf was.
    fn add_leaf(
        &mut self,
        hash: u64,
        key: &Key,
        numbers: &impl Numbers,
        purse: &Purse<'_>,
    ) -> Result<u32, Shortage> {
        let at = u32::try_from(self.leaves.len())
            .ok()
            .filter(|at| *at != NONE);
        let at = at.ok_or(Shortage::Store)?;
        let (object, region) = (key.object, key.region());
        self.make_room(purse)?;
        let mut leaf = Leaf::new(object, region, 0);
        resize_slots(&mut leaf, 1, &mut self.bytes, purse)?;
        let object_hash = self.keys.hash_one(object);
        let known = self
            .objects
            .find_mut(object_hash, |entry| entry.id == object);
        let (number, first) = match known {
            Some(entry) => {
                entry.leaves += 1;
                (entry.number, std::mem::replace(&mut entry.first, at))
            }
            None => {
                let number = numbers.assign(object).inspect_err(|_| {
                    let freed = leaf.held_bytes();
                    self.bytes -= freed;
                    purse.release(freed);
                })?;
                let entry = Object {
                    id: object,
                    first: at,
                    leaves: 1,
                    number,
                };
                let keys = self.keys;
                self.objects
                    .insert_unique(object_hash, entry, |entry| keys.hash_one(entry.id));
                (number, NONE)
            }
        };
        leaf.number = number;
        leaf.sibling_next = first;
        self.leaves.push(leaf);
        let (leaves, keys) = (&self.leaves, self.keys);
        self.by_key
            .insert_unique(hash, at, |at| hash_of_leaf(keys, leaves, *at));
        if let Some(first) = self.leaf_mut(first) {
            first.sibling_prev = at;
        }
        Ok(at)
    }

    /// Room for one more leaf and object in all three tables.
    fn make_room(&mut self, purse: &Purse<'_>) -> Result<(), Shortage> {
        if self.leaves.len() == self.leaves.capacity() {
            resize_leaves(&mut self.leaves, &mut self.bytes, purse)?;
        }
        let (leaves, keys) = (&self.leaves, self.keys);
        grow_table(&mut self.by_key, &mut self.bytes, purse, |at| {
            hash_of_leaf(keys, leaves, *at)
        })?;
        grow_table(&mut self.objects, &mut self.bytes, purse, |entry| {
            keys.hash_one(entry.id)
        })
    }

    /// Takes a page out, if `is_it` is true of where it is, and hands that to `gone` (before its
    /// object's number may be withdrawn). Whether it was there.
    pub(crate) fn remove(
        &mut self,
        hash: u64,
        key: &Key,
        numbers: &impl Numbers,
        purse: &Purse<'_>,
        is_it: impl FnOnce(Place) -> bool,
        gone: impl FnOnce(Place),
    ) -> bool {
        let Some(at) = self.find(hash, key.object, key.region()) else {
            return false;
        };
        let removed = self
            .leaf_mut(at)
            .filter(|leaf| leaf.get(key.bit()).is_some_and(is_it))
            .and_then(|leaf| leaf.remove(key.bit()));
        let was_there = removed.is_some();
        if let Some(place) = removed {
            gone(place);
            self.tidy_leaf(at, numbers, purse);
        }
        was_there
    }

    /// Takes out the pages of one leaf whose bits are set in `mask`, handing each to `gone`.
    pub(crate) fn remove_masked(
        &mut self,
        hash: u64,
        (object, region, mask): (ObjectId, u32, u64),
        numbers: &impl Numbers,
        purse: &Purse<'_>,
        gone: impl FnMut(Place),
    ) {
        if let Some(at) = self.find(hash, object, region) {
            self.strip_leaf(at, mask, numbers, purse, gone);
        }
    }

    /// Takes out one whole leaf, any; false when there is none left.
    pub(crate) fn remove_last(
        &mut self,
        numbers: &impl Numbers,
        purse: &Purse<'_>,
        gone: impl FnMut(Place),
    ) -> bool {
        let Some(at) = self
            .leaves
            .len()
            .checked_sub(1)
            .and_then(|at| u32::try_from(at).ok())
        else {
            return false;
        };
        self.strip_leaf(at, u64::MAX, numbers, purse, gone);
        true
    }

    fn strip_leaf(
        &mut self,
        at: u32,
        mask: u64,
        numbers: &impl Numbers,
        purse: &Purse<'_>,
        mut gone: impl FnMut(Place),
    ) {
        let Some(leaf) = self.leaf_mut(at) else {
            return;
        };
        let mut left = leaf.present() & mask;
        while left != 0 {
            // From the top down, so that nothing has to be moved when all go.
            let bit = left.ilog2();
            left &= !(1 << bit);
            if let Some(place) = leaf.remove(bit) {
                gone(place);
            }
        }
        self.tidy_leaf(at, numbers, purse);
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

    /// After removals: the leaf shrinks, or goes when it is empty.
    fn tidy_leaf(&mut self, at: u32, numbers: &impl Numbers, purse: &Purse<'_>) {
        let Some(leaf) = self.leaves.get_mut(at as usize) else {
            return;
        };
        if leaf.present() == 0 {
            self.drop_leaf(at, numbers, purse);
        } else if let Some(capacity) = leaf.shrinkage() {
            // Needs the smaller table beside the larger one; without room it just stays wide.
            let _ = resize_slots(leaf, capacity, &mut self.bytes, purse);
        }
    }

    fn drop_leaf(&mut self, at: u32, numbers: &impl Numbers, purse: &Purse<'_>) {
        self.sibling_unlink(at, numbers);
        let Some(leaf) = self.leaf(at) else { return };
        let hash = leaf_hash(self.keys, leaf.object, leaf.region);
        if let Ok(entry) = self.by_key.find_entry(hash, |entry| *entry == at) {
            entry.remove();
        }
        let leaf = self.leaves.swap_remove(at as usize);
        let freed = leaf.held_bytes();
        drop(leaf);
        self.bytes -= freed;
        purse.release(freed);
        self.follow_moved(at);
        self.shrink(purse);
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
        let (object, hash) = (leaf.object, leaf_hash(self.keys, leaf.object, leaf.region));
        let (prev, next) = (leaf.sibling_prev, leaf.sibling_next);
        if let Some(entry) = self.by_key.find_mut(hash, |entry| *entry == old_at) {
            *entry = at;
        }
        match self.leaf_mut(prev) {
            Some(prev) => prev.sibling_next = at,
            None => self.set_first_sibling(object, at),
        }
        if let Some(next) = self.leaf_mut(next) {
            next.sibling_prev = at;
        }
    }

    fn set_first_sibling(&mut self, object: ObjectId, first: u32) {
        let hash = self.keys.hash_one(object);
        if let Some(entry) = self.objects.find_mut(hash, |entry| entry.id == object) {
            entry.first = first;
        }
    }

    fn sibling_unlink(&mut self, at: u32, numbers: &impl Numbers) {
        let Some(leaf) = self.leaf(at) else { return };
        let (object, prev, next) = (leaf.object, leaf.sibling_prev, leaf.sibling_next);
        let hash = self.keys.hash_one(object);
        if let Ok(mut entry) = self.objects.find_entry(hash, |entry| entry.id == object) {
            entry.get_mut().leaves -= 1;
            if entry.get().leaves == 0 {
                let (gone, _) = entry.remove();
                numbers.withdraw(gone.number);
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

    /// Tables that have grown for a leaf that did not come after all.
    fn shrink_if_empty(&mut self, purse: &Purse<'_>) {
        if self.leaves.is_empty() {
            self.shrink(purse);
        }
    }

    /// Gives memory back when most of it is unused, and all of it when nothing is left.
    fn shrink(&mut self, purse: &Purse<'_>) {
        if self.leaves.is_empty() {
            let freed = self.bytes;
            self.leaves = Vec::new();
            self.by_key = HashTable::new();
            self.objects = HashTable::new();
            self.bytes = 0;
            purse.release(freed);
            return;
        }
        if self.leaves.capacity() >= 64 && self.leaves.len() < self.leaves.capacity() / 4 {
            let _ = resize_leaves(&mut self.leaves, &mut self.bytes, purse);
        }
        let (leaves, keys) = (&self.leaves, self.keys);
        shrink_table(&mut self.by_key, &mut self.bytes, purse, |at| {
            hash_of_leaf(keys, leaves, *at)
        });
        shrink_table(&mut self.objects, &mut self.bytes, purse, |entry| {
            keys.hash_one(entry.id)
        });
    }

    /// Every page with the number of its leaf's object, for checks.
    pub(crate) fn pages(&self) -> impl Iterator<Item = (Key, u32, Place)> {
        self.leaves.iter().flat_map(|leaf| {
            (0..PAGES_PER_LEAF).filter_map(|bit| {
                let key = Key {
                    object: leaf.object,
                    index: leaf.region * PAGES_PER_LEAF + bit,
                };
                leaf.get(bit).map(|place| (key, leaf.number, place))
            })
        })
    }

    /// Every object's number, for checks.
    pub(crate) fn numbers(&self) -> impl Iterator<Item = (ObjectId, u32)> {
        self.objects.iter().map(|entry| (entry.id, entry.number))
    }

    /// Checks all invariants that the module's text names.
    pub(crate) fn verify(&self) -> Result<(), String> {
        let mut bytes = leaves_bytes(self.leaves.capacity())
            + table_bytes(&self.by_key)
            + table_bytes(&self.objects);
        for (at, leaf) in (0_u32..).zip(&self.leaves) {
            bytes += leaf.held_bytes();
            let hash = leaf_hash(self.keys, leaf.object, leaf.region);
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
        self.verify_objects()
    }

    fn verify_objects(&self) -> Result<(), String> {
        let mut linked = 0;
        for entry in &self.objects {
            let (mut at, mut prev, mut leaves) = (entry.first, NONE, 0);
            while let Some(leaf) = self.leaf(at) {
                let is_right = leaf.object == entry.id
                    && leaf.number == entry.number
                    && leaf.sibling_prev == prev;
                if !is_right || leaves > entry.leaves {
                    return Err(format!("leaf {at} is wrongly linked"));
                }
                (prev, at, leaves) = (at, leaf.sibling_next, leaves + 1);
            }
            if leaves == 0 || leaves != entry.leaves {
                return Err(format!("{:?} counts its leaves wrong", entry.id));
            }
            linked += leaves as usize;
        }
        if linked == self.leaves.len() {
            Ok(())
        } else {
            Err(format!(
                "{linked} leaves in the objects' lists of {}",
                self.leaves.len()
            ))
        }
    }
}

fn hash_of_leaf(keys: HashKeys, leaves: &[Leaf], at: u32) -> u64 {
    leaves
        .get(at as usize)
        .map_or(0, |leaf| leaf_hash(keys, leaf.object, leaf.region))
}
