// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The numbers of objects.
//!
//! A record's header has no room for an object's 192 bits, so each object has a
//! number in the arena, and a record of its own there that says which object of
//! which space it is. An object has a number for each shard of its space that
//! has pages of it, so that a number comes and goes under one shard's lock. In a
//! shared space it has one more for each further client that puts pages of it:
//! there, the number also says whose the page is.
//!
//! For a persistent space the record is written twice, so that damage to one
//! copy loses nothing.

use crate::ObjectId;
use crate::arena::{NUMBERS, Place};
use crate::budget::{Budget, Shortage, malloc_bytes};
use crate::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::sync::{RwLock, RwLockWriteGuard};

/// What a number stands for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) space: u32,
    /// The account that is billed for pages under this number.
    pub(crate) owner: u16,
    pub(crate) id: ObjectId,
}

/// No number: ends a list.
const NONE: u32 = u32::MAX;

#[derive(Debug, Clone, Copy)]
struct Entry {
    object: Object,
    /// Its records.
    copies: [Option<Place>; 2],
    /// The number under which the next owner has the object in this shard; among free entries the
    /// next free one.
    next: u32,
    is_free: bool,
}

#[derive(Default)]
struct Table {
    entries: Vec<Entry>,
    first_free: Option<u32>,
    used: u32,
}

/// See the module's text.
#[derive(Default)]
pub(crate) struct Objects {
    table: RwLock<Table>,
    bytes: AtomicU64,
}

/// See [`Objects::lock`].
pub(crate) struct LockedObjects<'a>(RwLockWriteGuard<'a, Table>);

impl LockedObjects<'_> {
    /// What says that a record of the object is at `place`.
    pub(crate) fn copy_of(&mut self, number: u32, place: Place) -> Option<&mut Option<Place>> {
        let entry = self.0.entries.get_mut(number as usize)?;
        let copies = &mut entry.copies;
        copies
            .iter_mut()
            .find(|copy| **copy == Some(place))
            .filter(|_| !entry.is_free)
    }
}

fn table_bytes(capacity: usize) -> u64 {
    malloc_bytes(capacity * size_of::<Entry>())
}

impl Objects {
    /// Bytes that the table takes.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    pub(crate) fn get(&self, number: u32) -> Option<Object> {
        let table = self.table.read();
        let entry = table.entries.get(number as usize)?;
        (!entry.is_free).then_some(entry.object)
    }

    /// Gives the object a number. `write` makes its records, and is called with the number.
    pub(crate) fn assign(
        &self,
        object: Object,
        budget: &Budget,
        write: impl FnOnce(u32) -> Result<[Option<Place>; 2], Shortage>,
    ) -> Result<u32, Shortage> {
        let mut table = self.table.write();
        self.assign_in(&mut table, object, budget, write)
    }

    fn assign_in(
        &self,
        table: &mut Table,
        object: Object,
        budget: &Budget,
        write: impl FnOnce(u32) -> Result<[Option<Place>; 2], Shortage>,
    ) -> Result<u32, Shortage> {
        let number = match table.first_free {
            Some(number) => number,
            None => {
                self.grow(table, budget)?;
                u32::try_from(table.entries.len())
                    .ok()
                    .filter(|number| *number < NUMBERS)
                    .ok_or(Shortage::Store)?
            }
        };
        let entry = Entry {
            object,
            copies: write(number)?,
            next: NONE,
            is_free: false,
        };
        match table.entries.get_mut(number as usize) {
            Some(free) => {
                table.first_free = (free.next != NONE).then_some(free.next);
                *free = entry;
            }
            None => table.entries.push(entry),
        }
        table.used += 1;
        Ok(number)
    }

    /// Room for one more entry.
    fn grow(&self, table: &mut Table, budget: &Budget) -> Result<(), Shortage> {
        if table.entries.len() < table.entries.capacity() {
            return Ok(());
        }
        let capacity = table.entries.len() + (table.entries.len() / 4).max(16);
        let (old, new) = (table_bytes(table.entries.capacity()), table_bytes(capacity));
        budget.reserve(new)?;
        let mut moved = Vec::new();
        if moved.try_reserve_exact(capacity).is_err() {
            budget.release(new);
            return Err(Shortage::Store);
        }
        moved.append(&mut table.entries);
        table.entries = moved;
        budget.release(old);
        self.bytes.store(new, Relaxed);
        Ok(())
    }

    /// The number under which `owner` has the same object as `first` stands for, given now if it
    /// has none yet. The shard's lock is held.
    pub(crate) fn of_owner(
        &self,
        first: u32,
        owner: u16,
        budget: &Budget,
        write: impl FnOnce(u32, Object) -> Result<[Option<Place>; 2], Shortage>,
    ) -> Result<u32, Shortage> {
        let find = |table: &Table| {
            let (mut number, mut last) = (first, None);
            while let Some(entry) = table.entries.get(number as usize) {
                if entry.object.owner == owner {
                    return Ok(number);
                }
                (last, number) = (Some(entry.object), entry.next);
            }
            Err(last)
        };
        if let Ok(number) = find(&self.table.read()) {
            return Ok(number);
        }
        let mut table = self.table.write();
        let object = match find(&table) {
            Ok(number) => return Ok(number),
            Err(object) => object.ok_or(Shortage::Store)?,
        };
        let object = Object { owner, ..object };
        let number = self.assign_in(&mut table, object, budget, |number| write(number, object))?;
        // Right behind the first.
        let entries = &mut table.entries;
        let next = entries.get(first as usize).map_or(NONE, |entry| entry.next);
        if let Some(entry) = entries.get_mut(number as usize) {
            entry.next = next;
        }
        if let Some(entry) = entries.get_mut(first as usize) {
            entry.next = number;
        }
        Ok(number)
    }

    /// Takes back a number, and those of the same object's other owners; their records are handed
    /// to `gone`. The shard's lock is held.
    pub(crate) fn withdraw(&self, first: u32, budget: &Budget, mut gone: impl FnMut(Place)) {
        let mut table = self.table.write();
        let mut number = first;
        loop {
            let first_free = table.first_free;
            let Some(entry) = table.entries.get_mut(number as usize) else {
                break;
            };
            if entry.is_free {
                break;
            }
            entry.copies.iter().flatten().copied().for_each(&mut gone);
            entry.is_free = true;
            let next = std::mem::replace(&mut entry.next, first_free.unwrap_or(NONE));
            table.first_free = Some(number);
            table.used -= 1;
            number = next;
        }
        if table.used == 0 {
            let freed = table_bytes(table.entries.capacity());
            *table = Table::default();
            budget.release(freed);
            self.bytes.store(0, Relaxed);
        }
    }

    /// Keeps all numbers whose they are.
    pub(crate) fn lock(&self) -> LockedObjects<'_> {
        LockedObjects(self.table.write())
    }

    /// At recovery: enters an object under its number, or a second record of one that is there.
    /// False when it contradicts what is there.
    pub(crate) fn adopt(
        &self,
        number: u32,
        object: Object,
        place: Place,
        budget: &Budget,
    ) -> Result<bool, Shortage> {
        let mut table = self.table.write();
        while table.entries.len() <= number as usize {
            self.grow(&mut table, budget)?;
            table.entries.push(Entry {
                object,
                copies: [None; 2],
                next: NONE,
                is_free: true,
            });
        }
        let Some(entry) = table.entries.get_mut(number as usize) else {
            return Ok(false);
        };
        if entry.is_free {
            entry.object = object;
            entry.copies = [Some(place), None];
            entry.is_free = false;
            table.used += 1;
            return Ok(true);
        }
        let is_second = entry.object == object && entry.copies[1].is_none();
        if is_second {
            entry.copies[1] = Some(place);
        }
        Ok(is_second)
    }

    /// At recovery: `number` is another owner's for the object that `first` stands for, in the same
    /// shard. False when it is another object's.
    pub(crate) fn join(&self, first: u32, number: u32) -> bool {
        let mut table = self.table.write();
        let entries = &mut table.entries;
        let (Some(one), Some(other)) = (
            entries.get(first as usize).copied(),
            entries.get(number as usize).copied(),
        ) else {
            return false;
        };
        let is_same = (one.object.space, one.object.id) == (other.object.space, other.object.id);
        if !is_same || one.is_free || other.is_free {
            return false;
        }
        let (mut at, mut steps) = (first, 0);
        while let Some(entry) = entries.get(at as usize) {
            if at == number {
                return true;
            }
            // An owner has an object under one number only.
            if entry.object.owner == other.object.owner || steps > entries.len() {
                return false;
            }
            (at, steps) = (entry.next, steps + 1);
        }
        if let Some(entry) = entries.get_mut(number as usize) {
            entry.next = one.next;
        }
        if let Some(entry) = entries.get_mut(first as usize) {
            entry.next = number;
        }
        true
    }

    /// At recovery, when all are entered: makes the list of free numbers, and takes back those that
    /// `is_wanted` is false of. Their records are handed to `gone`.
    pub(crate) fn settle(
        &self,
        budget: &Budget,
        is_wanted: impl Fn(u32) -> bool,
        mut gone: impl FnMut(Place),
    ) {
        let mut table = self.table.write();
        table.first_free = None;
        for number in (0..u32::try_from(table.entries.len()).unwrap_or(0)).rev() {
            let first_free = table.first_free;
            let Some(entry) = table.entries.get_mut(number as usize) else {
                continue;
            };
            let is_used = !entry.is_free && is_wanted(number);
            if is_used {
                continue;
            }
            if !entry.is_free {
                entry.copies.iter().flatten().copied().for_each(&mut gone);
                entry.is_free = true;
                table.used -= 1;
            }
            if let Some(entry) = table.entries.get_mut(number as usize) {
                entry.next = first_free.unwrap_or(NONE);
            }
            table.first_free = Some(number);
        }
        if table.used == 0 {
            let freed = table_bytes(table.entries.capacity());
            *table = Table::default();
            budget.release(freed);
            self.bytes.store(0, Relaxed);
        }
    }

    /// Every number in use, with its records, for checks.
    pub(crate) fn all(&self) -> Vec<(u32, Object, Vec<Place>)> {
        let table = self.table.read();
        (0..)
            .zip(&table.entries)
            .filter(|(_, entry)| !entry.is_free)
            .map(|(number, entry)| {
                let copies = entry.copies.iter().flatten().copied().collect();
                (number, entry.object, copies)
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn object(id: u64, owner: u16) -> Object {
        Object {
            space: 1,
            owner,
            id: ObjectId([id; 3]),
        }
    }

    #[test]
    fn numbers_are_given_taken_back_and_given_again() {
        let (objects, budget) = (Objects::default(), Budget::new(1 << 20));
        let place = |number: u32| Ok([Some(Place(number + 100)), None]);
        let a = objects.assign(object(1, 0), &budget, place).unwrap();
        let b = objects.assign(object(2, 0), &budget, place).unwrap();
        assert_eq!((a, b), (0, 1));
        let other = |owner| {
            objects
                .of_owner(a, owner, &budget, |number, _| place(number))
                .unwrap()
        };
        assert_eq!(other(0), a);
        let (c, d) = (other(7), other(8));
        assert_eq!((c, d, other(7), other(8)), (2, 3, c, d));
        assert_eq!(objects.get(c), Some(object(1, 7)));
        assert_eq!(objects.all().len(), 4);
        let mut gone = Vec::new();
        objects.withdraw(a, &budget, |place| gone.push(place.0));
        gone.sort_unstable();
        assert_eq!(gone, [100, 102, 103]);
        assert_eq!((objects.get(a), objects.get(c)), (None, None));
        let again = objects.assign(object(3, 0), &budget, place).unwrap();
        assert!([a, c, d].contains(&again));
        assert!(
            objects
                .assign(object(4, 0), &budget, |_| Err(Shortage::Store))
                .is_err()
        );
        for number in [b, again] {
            objects.withdraw(number, &budget, |_| ());
        }
        assert_eq!((budget.held_bytes(), objects.held_bytes()), (0, 0));
    }
}
