// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Domains, inside which equal pages are stored once.
//!
//! Normally each client is one: what another client stores must not be learnt
//! from how fast, or in how much memory, a page is stored. Clients that the
//! operator puts into a sharing group are one together.
//!
//! The first page with some content is stored as any other. When a second one
//! comes, the bytes become an *image* of the domain, and both pages *aliases*,
//! records that only say which image they have their bytes from. An image lives
//! as long as a page needs it.

use std::sync::Arc;

use crate::arena::Place;
use crate::ledger::account::Account;
use crate::machine::budget::malloc_bytes;
use crate::machine::sync::Mutex;

/// Why an alias could not be followed: memory was damaged from outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoImage;

/// One image: where it is, and how many pages need it. `refs` 0: free, and `place` is the number
/// of the next free one.
#[derive(Debug, Clone, Copy)]
struct Image {
    place: u32,
    refs: u32,
}

const NONE: u32 = u32::MAX;

#[derive(Debug)]
pub(crate) struct Images {
    table: Vec<Image>,
    first_free: u32,
    used: u32,
}

/// See the module's text.
pub(crate) struct Domain {
    /// Pays for the images: the client, or the group's own.
    pub(crate) account: Arc<Account>,
    pub(crate) images: Mutex<Images>,
}

impl Domain {
    pub(crate) fn new(account: Arc<Account>) -> Self {
        Self {
            account,
            images: Mutex::new(Images {
                table: Vec::new(),
                first_free: NONE,
                used: 0,
            }),
        }
    }

    /// The number that records and the table of twins know it by.
    pub(crate) fn number(&self) -> u16 {
        self.account.number
    }
}

impl Images {
    /// Bytes that the table takes.
    pub(crate) fn held_bytes(&self) -> u64 {
        Self::bytes(self.table.capacity())
    }

    fn bytes(capacity: usize) -> u64 {
        malloc_bytes(capacity * size_of::<Image>())
    }

    /// Where the image is.
    pub(crate) fn place(&self, number: u32) -> Result<Place, NoImage> {
        match self.table.get(number as usize) {
            Some(image) if image.refs > 0 => Ok(Place(image.place)),
            _ => Err(NoImage),
        }
    }

    /// One more page needs the image that is at `place`; false when it is there no more.
    pub(crate) fn take_ref(&mut self, number: u32, place: Place) -> bool {
        match self.table.get_mut(number as usize) {
            Some(image) if image.refs > 0 && image.place == place.0 => {
                image.refs += 1;
                true
            }
            _ => false,
        }
    }

    /// One page less needs it. Where it was, when none does any more.
    pub(crate) fn drop_ref(&mut self, number: u32) -> Option<Place> {
        let image = self.table.get_mut(number as usize)?;
        image.refs = image.refs.checked_sub(1)?;
        if image.refs > 0 {
            return None;
        }
        let place = Place(std::mem::replace(&mut image.place, self.first_free));
        self.first_free = number;
        self.used -= 1;
        Some(place)
    }

    /// How many bytes the table would take after [`Self::add`], if that is more than now.
    pub(crate) fn growth(&self) -> Option<(usize, u64)> {
        if self.first_free != NONE || self.table.len() < self.table.capacity() {
            return None;
        }
        let capacity = self.table.len() + (self.table.len() / 2).max(8);
        Some((capacity, Self::bytes(capacity)))
    }

    /// Moves to a larger table; false when the host has no memory.
    pub(crate) fn grow(&mut self, capacity: usize) -> bool {
        let mut table = Vec::new();
        if table.try_reserve_exact(capacity).is_err() {
            return false;
        }
        table.append(&mut self.table);
        self.table = table;
        true
    }

    /// The number that the next image will have; `None` when there can be no more.
    pub(crate) fn next_number(&self) -> Option<u32> {
        if self.first_free != NONE {
            return Some(self.first_free);
        }
        u32::try_from(self.table.len())
            .ok()
            .filter(|number| *number < NONE)
    }

    /// Enters an image with [`Self::next_number`], which `refs` pages need.
    pub(crate) fn add(&mut self, place: Place, refs: u32) {
        let image = Image {
            place: place.0,
            refs,
        };
        self.used += 1;
        match self.table.get_mut(self.first_free as usize) {
            Some(free) => {
                self.first_free = free.place;
                *free = image;
            }
            None => self.table.push(image),
        }
    }

    /// The image was copied: it is at `to`, if it was at `from`.
    pub(crate) fn relocate(&mut self, number: u32, from: Place, to: Place) -> bool {
        match self.table.get_mut(number as usize) {
            Some(image) if image.refs > 0 && image.place == from.0 => {
                image.place = to.0;
                true
            }
            _ => false,
        }
    }

    /// Frees the table when it is empty; how many bytes it took.
    pub(crate) fn free_if_empty(&mut self) -> u64 {
        if self.used > 0 {
            return 0;
        }
        let freed = self.held_bytes();
        self.table = Vec::new();
        self.first_free = NONE;
        freed
    }

    /// At recovery, while it is empty: room for exactly so many numbers. What it then takes.
    pub(crate) fn bytes_for(numbers: u32) -> u64 {
        Self::bytes(numbers as usize)
    }

    /// At recovery: makes that room; false when the host has no memory.
    pub(crate) fn make_room_for(&mut self, numbers: u32) -> bool {
        if !self.grow(numbers as usize) {
            return false;
        }
        let empty = Image {
            place: NONE,
            refs: 0,
        };
        self.table.resize(numbers as usize, empty);
        true
    }

    /// At recovery: the entry of a number.
    fn entry(&mut self, number: u32) -> Option<&mut Image> {
        self.table.get_mut(number as usize)
    }

    /// At recovery: an image. False when its number is taken.
    pub(crate) fn adopt(&mut self, number: u32, place: Place) -> bool {
        match self.entry(number) {
            Some(image) if image.place == NONE => {
                image.place = place.0;
                true
            }
            _ => false,
        }
    }

    /// At recovery: a page that needs an image, whether that was entered already or not. False when
    /// no image has such a number.
    pub(crate) fn adopt_ref(&mut self, number: u32) -> bool {
        match self.entry(number) {
            Some(image) => {
                image.refs += 1;
                true
            }
            None => false,
        }
    }

    /// Takes back [`Self::adopt_ref`].
    pub(crate) fn unadopt_ref(&mut self, number: u32) {
        if let Some(image) = self.entry(number) {
            image.refs = image.refs.saturating_sub(1);
        }
    }

    /// At recovery, at last: images that no page needs are handed to `gone`. True when there are
    /// pages that need an image that is not there.
    pub(crate) fn settle(&mut self, mut gone: impl FnMut(Place)) -> bool {
        self.first_free = NONE;
        self.used = 0;
        let mut is_dangling = false;
        for number in (0..u32::try_from(self.table.len()).unwrap_or(0)).rev() {
            let first_free = self.first_free;
            let Some(image) = self.table.get_mut(number as usize) else {
                continue;
            };
            if image.refs > 0 && image.place != NONE {
                self.used += 1;
                continue;
            }
            is_dangling |= image.refs > 0;
            image.refs = 0;
            if image.place != NONE {
                gone(Place(image.place));
            }
            image.place = first_free;
            self.first_free = number;
        }
        is_dangling
    }

    /// Every image: its number, its place, how many pages need it. For checks.
    pub(crate) fn all(&self) -> impl Iterator<Item = (u32, Place, u32)> {
        (0..)
            .zip(&self.table)
            .filter(|(_, image)| image.refs > 0)
            .map(|(number, image)| (number, Place(image.place), image.refs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_live_as_long_as_they_are_needed() {
        let mut images = Images {
            table: Vec::new(),
            first_free: NONE,
            used: 0,
        };
        for number in 0..3 {
            assert_eq!(images.next_number(), Some(number));
            images.add(Place(number + 10), 2);
        }
        assert!(images.take_ref(1, Place(11)) && !images.take_ref(1, Place(12)));
        assert_eq!(images.drop_ref(1), None);
        assert_eq!(images.drop_ref(1), None);
        assert!(images.relocate(1, Place(11), Place(21)));
        assert!(!images.relocate(1, Place(11), Place(22)));
        assert_eq!(images.drop_ref(1), Some(Place(21)));
        assert_eq!((images.place(1), images.drop_ref(1)), (Err(NoImage), None));
        assert!(!images.take_ref(1, Place(21)));
        assert_eq!(images.next_number(), Some(1));
        images.add(Place(31), 1);
        assert_eq!(images.place(1), Ok(Place(31)));
        assert_eq!(images.free_if_empty(), 0);
        for number in [0, 0, 1, 2, 2] {
            images.drop_ref(number);
        }
        assert!(images.free_if_empty() > 0);
    }
}
