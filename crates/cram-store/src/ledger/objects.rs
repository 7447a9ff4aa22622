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

use crate::arena::{NUMBERS, Place};
use crate::machine::budget::{Budget, Shortage, malloc_bytes};
use crate::machine::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::machine::sync::{RwLock, RwLockWriteGuard};
use crate::spec::ObjectId;

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
/// Entries of a chunk.
const CHUNK: u32 = 32;

#[derive(Debug, Clone, Copy)]
struct Entry {
    object: Object,
    /// Its records.
    copies: [Option<Place>; 2],
    /// The number under which the next owner has the object in this shard; among free entries the
    /// next free one of the chunk.
    next: u32,
    is_free: bool,
}

/// Entries of [`CHUNK`] consecutive numbers.
#[derive(Debug)]
struct Chunk {
    /// None at all while no number of it is in use.
    entries: Vec<Entry>,
    used: u32,
    first_free: u32,
    /// The next chunk that may have room, if this one is in that list.
    next_open: u32,
    is_open: bool,
}

/// In chunks, so that it grows without what is there being copied (everybody waits meanwhile), and
/// shrinks when one of many clients goes.
struct Table {
    chunks: Vec<Chunk>,
    /// The list of chunks that may have room.
    first_open: u32,
    used: u32,
    /// Bytes of it all.
    bytes: u64,
}

impl Default for Table {
    fn default() -> Self {
        Self {
            chunks: Vec::new(),
            first_open: NONE,
            used: 0,
            bytes: 0,
        }
    }
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
    /// What says that a record of the object is at `place`, and which of the two it is.
    pub(crate) fn copy_of(
        &mut self,
        number: u32,
        place: Place,
    ) -> Option<(usize, &mut Option<Place>)> {
        let entry = self.0.entry_mut(number)?;
        let copies = &mut entry.copies;
        copies
            .iter_mut()
            .enumerate()
            .find(|(_, copy)| **copy == Some(place))
            .filter(|_| !entry.is_free)
    }
}

fn chunks_bytes(capacity: usize) -> u64 {
    malloc_bytes(capacity * size_of::<Chunk>())
}

fn chunk_bytes() -> u64 {
    malloc_bytes(CHUNK as usize * size_of::<Entry>())
}

impl Table {
    fn entry(&self, number: u32) -> Option<&Entry> {
        let chunk = self.chunks.get((number / CHUNK) as usize)?;
        chunk.entries.get((number % CHUNK) as usize)
    }

    fn entry_mut(&mut self, number: u32) -> Option<&mut Entry> {
        let chunk = self.chunks.get_mut((number / CHUNK) as usize)?;
        chunk.entries.get_mut((number % CHUNK) as usize)
    }

    /// One more chunk, without entries yet, at the head of the list of those that have room.
    fn add_chunk(&mut self, budget: &Budget) -> Result<(), Shortage> {
        let at = u32::try_from(self.chunks.len())
            .ok()
            .filter(|at| *at < NUMBERS / CHUNK)
            .ok_or(Shortage::Store)?;
        if self.chunks.len() == self.chunks.capacity() {
            let more = (self.chunks.len() / 4).max(4);
            let (old, new) = (
                chunks_bytes(self.chunks.capacity()),
                chunks_bytes(self.chunks.len() + more),
            );
            budget.reserve(new)?;
            if self.chunks.try_reserve_exact(more).is_err() {
                budget.release(new);
                return Err(Shortage::Store);
            }
            budget.release(old);
            self.bytes += new - old;
        }
        self.chunks.push(Chunk {
            entries: Vec::new(),
            used: 0,
            first_free: NONE,
            next_open: self.first_open,
            is_open: true,
        });
        self.first_open = at;
        Ok(())
    }

    /// Gives a chunk its entries, all free, if it has none.
    fn furnish(&mut self, at: u32, budget: &Budget) -> Result<(), Shortage> {
        let Some(chunk) = self.chunks.get_mut(at as usize) else {
            return Err(Shortage::Store);
        };
        if !chunk.entries.is_empty() {
            return Ok(());
        }
        budget.reserve(chunk_bytes())?;
        if chunk.entries.try_reserve_exact(CHUNK as usize).is_err() {
            budget.release(chunk_bytes());
            return Err(Shortage::Store);
        }
        self.bytes += chunk_bytes();
        chunk.entries.extend((1..=CHUNK).map(|next| Entry {
            object: Object {
                space: 0,
                owner: 0,
                id: ObjectId([0; 3]),
            },
            copies: [None; 2],
            next: if next < CHUNK { next } else { NONE },
            is_free: true,
        }));
        chunk.first_free = 0;
        Ok(())
    }

    /// A number that is free. It stays so until [`Self::occupy`].
    fn free_number(&mut self, budget: &Budget) -> Result<u32, Shortage> {
        loop {
            let at = self.first_open;
            if at == NONE {
                self.add_chunk(budget)?;
                continue;
            }
            self.furnish(at, budget)?;
            let chunk = self.chunks.get_mut(at as usize).ok_or(Shortage::Store)?;
            if chunk.first_free != NONE {
                return Ok(at * CHUNK + chunk.first_free);
            }
            chunk.is_open = false;
            self.first_open = chunk.next_open;
        }
    }

    /// Enters an object under the number that [`Self::free_number`] said.
    fn occupy(&mut self, number: u32, entry: Entry) {
        if let Some(chunk) = self.chunks.get_mut((number / CHUNK) as usize)
            && let Some(free) = chunk.entries.get_mut((number % CHUNK) as usize)
        {
            chunk.first_free = free.next;
            *free = entry;
            chunk.used += 1;
            self.used += 1;
        }
    }

    /// Takes a number back. The next owner's, and the places of its records.
    fn vacate(&mut self, number: u32, budget: &Budget) -> Option<(u32, [Option<Place>; 2])> {
        let at = number / CHUNK;
        let chunk = self.chunks.get_mut(at as usize)?;
        let entry = chunk.entries.get_mut((number % CHUNK) as usize)?;
        if entry.is_free {
            return None;
        }
        entry.is_free = true;
        let next = std::mem::replace(&mut entry.next, chunk.first_free);
        let copies = std::mem::take(&mut entry.copies);
        chunk.first_free = number % CHUNK;
        chunk.used -= 1;
        self.used -= 1;
        if !chunk.is_open {
            chunk.is_open = true;
            chunk.next_open = self.first_open;
            self.first_open = at;
        }
        self.tidy(at, budget);
        Some((next, copies))
    }

    /// Gives the memory of a chunk back when nothing in it is used; and that of all, when nothing is.
    fn tidy(&mut self, at: u32, budget: &Budget) {
        if let Some(chunk) = self.chunks.get_mut(at as usize)
            && chunk.used == 0
            && !chunk.entries.is_empty()
        {
            chunk.entries = Vec::new();
            chunk.first_free = NONE;
            self.bytes -= chunk_bytes();
            budget.release(chunk_bytes());
        }
        if self.used == 0 {
            let freed = self.bytes;
            *self = Self::default();
            budget.release(freed);
        }
    }
}

impl Objects {
    /// What an entry takes, in bytes.
    pub(crate) const ENTRY_BYTES: u64 =
        (size_of::<Entry>() + size_of::<Chunk>() / CHUNK as usize) as u64;

    /// Bytes that the table takes.
    pub(crate) fn held_bytes(&self) -> u64 {
        self.bytes.load(Relaxed)
    }

    /// To be called before the lock is let go, whenever the table has grown or shrunk.
    fn publish(&self, table: &Table) {
        self.bytes.store(table.bytes, Relaxed);
    }

    pub(crate) fn get(&self, number: u32) -> Option<Object> {
        let table = self.table.read();
        let entry = table.entry(number)?;
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
        let number = table.free_number(budget);
        let assigned = number.and_then(|number| {
            let entry = Entry {
                object,
                copies: write(number).inspect_err(|_| table.tidy(number / CHUNK, budget))?,
                next: NONE,
                is_free: false,
            };
            table.occupy(number, entry);
            Ok(number)
        });
        self.publish(table);
        assigned
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
            while let Some(entry) = table.entry(number) {
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
        let next = table.entry(first).map_or(NONE, |entry| entry.next);
        if let Some(entry) = table.entry_mut(number) {
            entry.next = next;
        }
        if let Some(entry) = table.entry_mut(first) {
            entry.next = number;
        }
        Ok(number)
    }

    /// Takes back a number, and those of the same object's other owners; their records are handed
    /// to `gone`. The shard's lock is held.
    pub(crate) fn withdraw(&self, first: u32, budget: &Budget, mut gone: impl FnMut(Place)) {
        let mut table = self.table.write();
        let mut number = first;
        while let Some((next, copies)) = table.vacate(number, budget) {
            copies.into_iter().flatten().for_each(&mut gone);
            number = next;
        }
        self.publish(&table);
    }

    /// Keeps all numbers whose they are.
    pub(crate) fn lock(&self) -> LockedObjects<'_> {
        LockedObjects(self.table.write())
    }

    /// At recovery: enters an object under its number, or a second record of one that is there.
    /// False when it contradicts what is there, or is not `apart` from the first: in one span they
    /// could be lost together, so the second is worth nothing.
    pub(crate) fn adopt(
        &self,
        number: u32,
        object: Object,
        place: Place,
        apart: impl Fn(Place, Place) -> bool,
        budget: &Budget,
    ) -> Result<bool, Shortage> {
        let mut table = self.table.write();
        let at = number / CHUNK;
        let mut made = Ok(());
        while made.is_ok() && table.chunks.len() <= at as usize {
            made = table.add_chunk(budget);
        }
        made = made.and_then(|()| table.furnish(at, budget));
        self.publish(&table);
        made?;
        let Some(entry) = table.entry_mut(number) else {
            return Ok(false);
        };
        if entry.is_free {
            *entry = Entry {
                object,
                copies: [Some(place), None],
                next: NONE,
                is_free: false,
            };
            return Ok(true);
        }
        let is_apart = entry.copies[0].is_some_and(|first| apart(first, place));
        let is_second = entry.object == object && entry.copies[1].is_none() && is_apart;
        if is_second {
            entry.copies[1] = Some(place);
        }
        Ok(is_second)
    }

    /// At recovery: `number` is another owner's for the object that `first` stands for, in the same
    /// shard. False when it is another object's. Both must be wanted when [`Self::settle`] is called:
    /// a free number must be in no object's list.
    pub(crate) fn join(&self, first: u32, number: u32) -> bool {
        let mut table = self.table.write();
        let (Some(one), Some(other)) = (table.entry(first).copied(), table.entry(number).copied())
        else {
            return false;
        };
        let is_same = (one.object.space, one.object.id) == (other.object.space, other.object.id);
        if !is_same || one.is_free || other.is_free {
            return false;
        }
        let (mut at, mut steps) = (first, 0);
        while let Some(entry) = table.entry(at) {
            if at == number {
                return true;
            }
            // An owner has an object under one number only.
            if entry.object.owner == other.object.owner || steps > NUMBERS {
                return false;
            }
            (at, steps) = (entry.next, steps + 1);
        }
        if let Some(entry) = table.entry_mut(number) {
            entry.next = one.next;
        }
        if let Some(entry) = table.entry_mut(first) {
            entry.next = number;
        }
        true
    }

    /// At recovery, when all are entered: makes the lists of free numbers, and takes back those that
    /// `is_wanted` is false of. Their records are handed to `gone`.
    pub(crate) fn settle(
        &self,
        budget: &Budget,
        is_wanted: impl Fn(u32) -> bool,
        mut gone: impl FnMut(&Object, Place),
    ) {
        let mut table = self.table.write();
        table.first_open = NONE;
        table.used = 0;
        for at in (0..u32::try_from(table.chunks.len()).unwrap_or(0)).rev() {
            let first_open = table.first_open;
            let Some(chunk) = table.chunks.get_mut(at as usize) else {
                continue;
            };
            (chunk.used, chunk.first_free) = (0, NONE);
            for (offset, entry) in (0..CHUNK).zip(&mut chunk.entries).rev() {
                if !entry.is_free && is_wanted(at * CHUNK + offset) {
                    chunk.used += 1;
                    continue;
                }
                for place in entry.copies.iter_mut().filter_map(Option::take) {
                    gone(&entry.object, place);
                }
                entry.is_free = true;
                entry.next = chunk.first_free;
                chunk.first_free = offset;
            }
            (chunk.is_open, chunk.next_open) = (true, first_open);
            table.used += chunk.used;
            table.first_open = at;
        }
        for at in 0..u32::try_from(table.chunks.len()).unwrap_or(0) {
            table.tidy(at, budget);
        }
        self.publish(&table);
    }

    /// Every number in use, with its records, for checks.
    pub(crate) fn all(&self) -> Vec<(u32, Object, Vec<Place>)> {
        let table = self.table.read();
        let entries = table.chunks.iter().zip((0..).step_by(CHUNK as usize));
        entries
            .flat_map(|(chunk, first)| (first..).zip(&chunk.entries))
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

    #[test]
    fn the_table_shrinks_when_one_of_many_clients_goes() {
        let (objects, budget) = (Objects::default(), Budget::new(16 << 20));
        let place = |number: u32| Ok([Some(Place(number + 1)), None]);
        let numbers: Vec<_> = (0..20_000)
            .map(|id| objects.assign(object(id, 0), &budget, place).unwrap())
            .collect();
        let full = objects.held_bytes();
        assert_eq!(budget.held_bytes(), full);
        // All but one in a thousand.
        for number in numbers.iter().filter(|number| *number % 1000 != 0) {
            objects.withdraw(*number, &budget, |_| ());
        }
        assert_eq!(budget.held_bytes(), objects.held_bytes());
        assert!(objects.held_bytes() < full / 10, "{}", objects.held_bytes());
        assert_eq!(objects.all().len(), 20);
        for id in 0..19_980 {
            objects.assign(object(id, 1), &budget, place).unwrap();
        }
        assert_eq!(objects.held_bytes(), full);
        assert_eq!(objects.all().len(), 20_000);
    }
}
