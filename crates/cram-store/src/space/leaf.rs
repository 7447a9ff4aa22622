// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the index keeps for each run of 64 page numbers: a bit for each, and 4
//! bytes for each page that is there.

use crate::arena::Place;
use crate::machine::budget::malloc_bytes;
use crate::spec::ObjectId;

/// Page numbers that one leaf covers.
pub(crate) const PAGES_PER_LEAF: u32 = 64;
/// No leaf: ends a list.
pub(crate) const NONE: u32 = u32::MAX;

/// The pages of one object whose numbers differ in the lowest 6 bits only.
///
/// Invariant: `slots` holds one place for each bit of `present`, in the order of the bits.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) object: ObjectId,
    /// Page number / 64.
    pub(crate) region: u32,
    /// The object's number in the arena. (In a shared space, the one that the first to put a page
    /// of the object here has it under.)
    pub(crate) number: u32,
    /// The list of the object's leaves in this shard, in no order.
    pub(crate) sibling_prev: u32,
    pub(crate) sibling_next: u32,
    present: u64,
    slots: Vec<Place>,
}

/// Room for one more slot: doubled, so that a sparse leaf is small and a dense one has no waste.
fn next_capacity(len: usize) -> usize {
    (len + 1)
        .next_power_of_two()
        .clamp(1, PAGES_PER_LEAF as usize)
}

/// What a table of so many slots takes, in bytes.
pub(crate) fn slots_bytes(capacity: usize) -> u64 {
    malloc_bytes(capacity * size_of::<Place>())
}

impl Leaf {
    pub(crate) fn new(object: ObjectId, region: u32, number: u32) -> Self {
        Self {
            object,
            region,
            number,
            sibling_prev: NONE,
            sibling_next: NONE,
            present: 0,
            slots: Vec::new(),
        }
    }

    pub(crate) fn present(&self) -> u64 {
        self.present
    }

    pub(crate) fn slots(&self) -> &[Place] {
        &self.slots
    }

    pub(crate) fn held_bytes(&self) -> u64 {
        slots_bytes(self.slots.capacity())
    }

    /// Where the slot of a page number is, or would go.
    fn rank(&self, bit: u32) -> usize {
        (self.present & !(u64::MAX << bit)).count_ones() as usize
    }

    fn has(&self, bit: u32) -> bool {
        self.present >> bit & 1 == 1
    }

    /// Where the page is whose number's lowest 6 bits are `bit`.
    pub(crate) fn get(&self, bit: u32) -> Option<Place> {
        self.slots
            .get(self.rank(bit))
            .copied()
            .filter(|_| self.has(bit))
    }

    /// The capacity to grow to before this page number can come in; `None` when there is room.
    pub(crate) fn growth(&self, bit: u32) -> Option<usize> {
        let is_full = self.slots.len() == self.slots.capacity();
        (is_full && !self.has(bit)).then(|| next_capacity(self.slots.len()))
    }

    /// Moves to a table of that capacity; false when the host has no memory.
    pub(crate) fn set_capacity(&mut self, capacity: usize) -> bool {
        let mut slots = Vec::new();
        if slots.try_reserve_exact(capacity).is_err() {
            return false;
        }
        slots.append(&mut self.slots);
        self.slots = slots;
        true
    }

    /// Puts a page in and returns the one it replaces. There must be room, see [`Self::growth`].
    pub(crate) fn set(&mut self, bit: u32, place: Place) -> Option<Place> {
        let (rank, has) = (self.rank(bit), self.has(bit));
        match self.slots.get_mut(rank) {
            Some(old) if has => Some(std::mem::replace(old, place)),
            _ => {
                self.slots.insert(rank, place);
                self.present |= 1 << bit;
                None
            }
        }
    }

    pub(crate) fn remove(&mut self, bit: u32) -> Option<Place> {
        let place = self.get(bit)?;
        self.slots.remove(self.rank(bit));
        self.present &= !(1 << bit);
        Some(place)
    }

    /// The smaller capacity that would do after removals; `None` when the present one is right.
    pub(crate) fn shrinkage(&self) -> Option<usize> {
        let is_wide = self.slots.capacity() >= 16 && self.slots.len() <= self.slots.capacity() / 4;
        is_wide.then(|| next_capacity(self.slots.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_found_by_rank() {
        let mut leaf = Leaf::new(ObjectId([0; 3]), 0, 0);
        for bit in [63, 0, 31, 32, 7] {
            if let Some(capacity) = leaf.growth(bit) {
                assert!(leaf.set_capacity(capacity));
            }
            assert_eq!(leaf.set(bit, Place(bit)), None);
        }
        assert_eq!(leaf.set(31, Place(99)), Some(Place(31)));
        assert_eq!(leaf.remove(0), Some(Place(0)));
        assert_eq!(leaf.remove(0), None);
        assert_eq!(leaf.get(0), None);
        let places = [7, 31, 32, 63].map(|bit| leaf.get(bit).unwrap().0);
        assert_eq!(places, [7, 99, 32, 63]);
        assert_eq!(leaf.slots().len(), 4);
    }
}
