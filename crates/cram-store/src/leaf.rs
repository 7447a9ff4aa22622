// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the index keeps for each page, and for each run of 64 page numbers.

use crate::ObjectId;
use crate::PAGE_SIZE;
use crate::arena::Place;
use crate::budget::malloc_bytes;

/// Page numbers that one leaf covers.
pub(crate) const PAGES_PER_LEAF: u32 = 64;
/// No leaf: ends a list.
pub(crate) const NONE: u32 = u32::MAX;

/// A page: 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Slot {
    /// The page's checksum; of a same-filled page, the word.
    pub(crate) word: u64,
    /// Where the image is; of a same-filled page, the word's checksum.
    place: u32,
    /// Bytes of the image: 0 when same-filled, 4096 when raw, else an lz4 block. Plus [`REFRESHED`].
    len: u16,
    /// Who put it, as a number in its pool's list of members.
    pub(crate) owner: u16,
}

/// A mark beside the length: used since its leaf last came up for eviction.
const REFRESHED: u16 = 0x8000;
const _: () = assert!(size_of::<Slot>() == 16 && PAGE_SIZE < REFRESHED as usize);

impl Slot {
    pub(crate) fn filled(word: u64, checksum: u32, owner: u16) -> Self {
        Self {
            word,
            place: checksum,
            len: 0,
            owner,
        }
    }

    /// `len` is 1 to 4096.
    pub(crate) fn stored(checksum: u64, place: Place, len: usize, owner: u16) -> Self {
        let len = u16::try_from(len).unwrap_or(0);
        Self {
            word: checksum,
            place: place.0,
            len,
            owner,
        }
    }

    /// Bytes of the image in the arena.
    pub(crate) fn len(&self) -> usize {
        usize::from(self.len & !REFRESHED)
    }

    pub(crate) fn is_same_filled(&self) -> bool {
        self.len() == 0
    }

    /// Where the image is, if there is one.
    pub(crate) fn place(&self) -> Option<Place> {
        (!self.is_same_filled()).then_some(Place(self.place))
    }

    /// The checksum of a same-filled page's word.
    pub(crate) fn word_checksum(&self) -> u32 {
        self.place
    }

    /// Whether both are the same page: put by the same put, or by one that stored the same.
    pub(crate) fn is_same_page(&self, other: &Self) -> bool {
        (self.word, self.place, self.len()) == (other.word, other.place, other.len())
    }

    pub(crate) fn is_refreshed(&self) -> bool {
        self.len & REFRESHED != 0
    }

    pub(crate) fn set_refreshed(&mut self, is_refreshed: bool) {
        self.len = if is_refreshed {
            self.len | REFRESHED
        } else {
            self.len & !REFRESHED
        };
    }
}

/// The pages of one object whose numbers differ in the lowest 6 bits only.
///
/// Invariants: `slots` holds one slot for each bit of `present`, in the order of the bits; a leaf
/// with no page does not exist.
#[derive(Debug)]
pub(crate) struct Leaf {
    pub(crate) object: ObjectId,
    /// Page number / 64.
    pub(crate) region: u32,
    /// The list of the object's leaves in this shard, in no order.
    pub(crate) sibling_prev: u32,
    pub(crate) sibling_next: u32,
    /// The list of all leaves of this shard, the oldest first; unused in persistent pools.
    pub(crate) age_prev: u32,
    pub(crate) age_next: u32,
    /// When this leaf was made or last came up for eviction, on the store's clock.
    pub(crate) stamp: u64,
    present: u64,
    slots: Vec<Slot>,
}

/// Room for one more slot: doubled, so that a sparse leaf is small and a dense one has no waste.
fn next_capacity(len: usize) -> usize {
    (len + 1)
        .next_power_of_two()
        .clamp(1, PAGES_PER_LEAF as usize)
}

/// What a table of so many slots takes, in bytes.
pub(crate) fn slots_bytes(capacity: usize) -> u64 {
    malloc_bytes(capacity * size_of::<Slot>())
}

impl Leaf {
    pub(crate) fn new(object: ObjectId, region: u32) -> Self {
        Self {
            object,
            region,
            sibling_prev: NONE,
            sibling_next: NONE,
            age_prev: NONE,
            age_next: NONE,
            stamp: 0,
            present: 0,
            slots: Vec::new(),
        }
    }

    pub(crate) fn present(&self) -> u64 {
        self.present
    }

    pub(crate) fn slots(&self) -> &[Slot] {
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

    /// The slot of the page number whose lowest 6 bits are `bit`.
    pub(crate) fn get(&self, bit: u32) -> Option<&Slot> {
        self.slots.get(self.rank(bit)).filter(|_| self.has(bit))
    }

    pub(crate) fn get_mut(&mut self, bit: u32) -> Option<&mut Slot> {
        let (rank, has) = (self.rank(bit), self.has(bit));
        self.slots.get_mut(rank).filter(|_| has)
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

    /// Puts a slot in and returns the one it replaces. There must be room, see [`Self::growth`].
    pub(crate) fn set(&mut self, bit: u32, slot: Slot) -> Option<Slot> {
        if let Some(old) = self.get_mut(bit) {
            return Some(std::mem::replace(old, slot));
        }
        self.slots.insert(self.rank(bit), slot);
        self.present |= 1 << bit;
        None
    }

    pub(crate) fn remove(&mut self, bit: u32) -> Option<Slot> {
        let slot = *self.get(bit)?;
        self.slots.remove(self.rank(bit));
        self.present &= !(1 << bit);
        Some(slot)
    }

    /// The smaller capacity that would do after removals; `None` when the present one is right.
    pub(crate) fn shrinkage(&self) -> Option<usize> {
        let is_wide = self.slots.capacity() >= 8 && self.slots.len() <= self.slots.capacity() / 4;
        is_wide.then(|| next_capacity(self.slots.len()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_found_by_rank() {
        let mut leaf = Leaf::new(ObjectId([0; 3]), 0);
        let slot = |number: u64| Slot::filled(number, 0, 0);
        for bit in [63, 0, 31, 32, 7] {
            if let Some(capacity) = leaf.growth(bit) {
                assert!(leaf.set_capacity(capacity));
            }
            assert_eq!(leaf.set(bit, slot(u64::from(bit))), None);
        }
        assert_eq!(leaf.set(31, slot(99)), Some(slot(31)));
        assert_eq!(leaf.remove(0), Some(slot(0)));
        assert_eq!(leaf.remove(0), None);
        assert_eq!(leaf.get(0), None);
        assert_eq!(
            [7, 31, 32, 63].map(|bit| leaf.get(bit).unwrap().word),
            [7, 99, 32, 63]
        );
        assert_eq!(leaf.slots().len(), 4);
    }
}
