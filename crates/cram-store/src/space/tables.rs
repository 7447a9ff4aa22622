// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How the index's tables grow and shrink: every byte is reserved with the
//! [`Purse`] before it is allocated, the new table beside the old one while
//! both exist, and released after it was freed. `bytes` is always the running
//! sum of what the tables of one shard have allocated.

use hashbrown::HashTable;

use crate::ledger::account::Purse;
use crate::machine::budget::{Shortage, malloc_bytes};
use crate::space::leaf::{Leaf, slots_bytes};

/// What a table of so many leaves takes, in bytes.
pub(crate) fn leaves_bytes(capacity: usize) -> u64 {
    malloc_bytes(capacity * size_of::<Leaf>())
}

/// What a hash table takes, in bytes.
pub(crate) fn table_bytes<T>(table: &HashTable<T>) -> u64 {
    malloc_bytes(table.allocation_size())
}

/// Moves a leaf's slots to a table of another capacity, reserving it first.
pub(crate) fn resize_slots(
    leaf: &mut Leaf,
    capacity: usize,
    bytes: &mut u64,
    purse: &Purse<'_>,
) -> Result<(), Shortage> {
    let (old, new) = (leaf.held_bytes(), slots_bytes(capacity));
    purse.reserve_beside(new, old)?;
    if !leaf.set_capacity(capacity) {
        purse.cancel(new, old);
        return Err(Shortage::Store);
    }
    purse.release_replaced(new, old, new);
    *bytes = *bytes + new - old;
    Ok(())
}

/// Moves the leaves to a table half as large again as what is in it.
pub(crate) fn resize_leaves(
    leaves: &mut Vec<Leaf>,
    bytes: &mut u64,
    purse: &Purse<'_>,
) -> Result<(), Shortage> {
    let capacity = leaves.len() + (leaves.len() / 2).max(2);
    let (old, new) = (leaves_bytes(leaves.capacity()), leaves_bytes(capacity));
    purse.reserve_beside(new, old)?;
    let mut moved = Vec::new();
    if moved.try_reserve_exact(capacity).is_err() {
        purse.cancel(new, old);
        return Err(Shortage::Store);
    }
    moved.append(leaves);
    *leaves = moved;
    purse.release_replaced(new, old, new);
    *bytes = *bytes + new - old;
    Ok(())
}

/// Gives an empty table of leaves room for exactly so many.
pub(crate) fn reserve_leaves(
    leaves: &mut Vec<Leaf>,
    count: usize,
    bytes: &mut u64,
    purse: &Purse<'_>,
) -> Result<(), Shortage> {
    let new = leaves_bytes(count);
    purse.reserve(new)?;
    if leaves.try_reserve_exact(count).is_err() {
        purse.release(new);
        return Err(Shortage::Store);
    }
    *bytes += new;
    Ok(())
}

/// Gives an empty hash table room for exactly so many entries.
pub(crate) fn reserve_table<T>(
    table: &mut HashTable<T>,
    count: usize,
    bytes: &mut u64,
    purse: &Purse<'_>,
) -> Result<(), Shortage> {
    // As hashbrown has it: a power of two of which seven eighths are used, and a byte for each.
    let buckets = match count {
        0 => 0,
        1..4 => 4,
        4..8 => 8,
        8..15 => 16,
        _ => (count * 8 / 7).next_power_of_two(),
    };
    let most = malloc_bytes(buckets * (size_of::<T>() + 1) + 64);
    purse.reserve(most)?;
    let reserved = table.try_reserve(count, |_| 0);
    let new = table_bytes(table);
    debug_assert!(new <= most);
    purse.release(most - new.min(most));
    *bytes += new;
    reserved.map_err(|_| Shortage::Store)
}

/// What a table may take at the most when it next grows: it doubles, or starts with 16 entries.
fn grown_table_bytes<T>(table: &HashTable<T>) -> u64 {
    let least = 16 * (size_of::<T>() + 1) + 64;
    malloc_bytes((2 * table.allocation_size() + 64).max(least))
}

/// Room for one more entry.
pub(crate) fn grow_table<T>(
    table: &mut HashTable<T>,
    bytes: &mut u64,
    purse: &Purse<'_>,
    hasher: impl Fn(&T) -> u64,
) -> Result<(), Shortage> {
    if table.len() < table.capacity() {
        return Ok(());
    }
    let (old, most) = (table_bytes(table), grown_table_bytes(table));
    purse.reserve_beside(most, old)?;
    let grown = table.try_reserve(1, hasher);
    let new = table_bytes(table);
    debug_assert!(new <= most.max(old));
    purse.release_replaced(most, old, new);
    *bytes = *bytes + new - old;
    grown.map_err(|_| Shortage::Store)
}

/// Makes a table smaller when most of it is empty and there is room for the copy.
pub(crate) fn shrink_table<T>(
    table: &mut HashTable<T>,
    bytes: &mut u64,
    purse: &Purse<'_>,
    hasher: impl Fn(&T) -> u64,
) {
    if table.capacity() < 64 || table.len() >= table.capacity() / 8 {
        return;
    }
    let old = table_bytes(table);
    // A quarter of the capacity stays, rounded up to a power of two.
    let most = old / 2 + 64;
    if purse.reserve_beside(most, old).is_err() {
        return;
    }
    let mut smaller = HashTable::new();
    if smaller.try_reserve(table.len() * 2, &hasher).is_ok() {
        for entry in table.drain() {
            smaller.insert_unique(hasher(&entry), entry, &hasher);
        }
        *table = smaller;
    }
    let new = table_bytes(table);
    debug_assert!(new <= most || new == old);
    purse.release_replaced(most, old, new);
    *bytes = *bytes + new - old;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::account::{Account, Holder};
    use crate::machine::budget::Budget;

    fn payer() -> Account {
        Account::new(0, Holder::Client, "", None, 1)
    }

    #[test]
    fn a_table_that_is_made_at_once_is_no_larger_than_one_that_has_grown() {
        let hash = |number: &u32| u64::from(*number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for count in (0..200).chain([447, 448, 449, 1000, 3583, 3584, 3585]) {
            let (budget, payer) = (Budget::new(1 << 20), payer());
            let purse = Purse {
                budget: &budget,
                payer: &payer,
            };
            let (mut grown, mut bytes) = (HashTable::new(), 0);
            for number in 0..count {
                grow_table(&mut grown, &mut bytes, &purse, hash).unwrap();
                grown.insert_unique(hash(&number), number, hash);
            }
            let (mut made, mut made_bytes) = (HashTable::<u32>::new(), 0);
            purse.release(bytes);
            reserve_table(&mut made, count as usize, &mut made_bytes, &purse).unwrap();
            assert_eq!(
                (made_bytes, budget.held_bytes()),
                (table_bytes(&made), made_bytes)
            );
            assert!(
                made_bytes <= bytes && made.capacity() >= count as usize,
                "{count}"
            );
        }
    }

    /// Grows and shrinks a table step by step, and compares the bill with the allocation.
    #[test]
    fn a_hash_table_is_billed_for_what_it_allocates() {
        let (budget, payer) = (Budget::new(1 << 20), payer());
        let purse = Purse {
            budget: &budget,
            payer: &payer,
        };
        let hash = |number: &u32| u64::from(*number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let (mut table, mut bytes, mut number) = (HashTable::new(), 0, 0_u32);
        while grow_table(&mut table, &mut bytes, &purse, hash).is_ok() {
            table.insert_unique(hash(&number), number, hash);
            assert_eq!(
                (bytes, budget.held_bytes(), payer.used_bytes()),
                (table_bytes(&table), bytes, bytes)
            );
            number += 1;
        }
        assert!(number > 50_000, "{number}");
        for number in 0..number {
            table
                .find_entry(hash(&number), |entry| *entry == number)
                .unwrap()
                .remove();
            shrink_table(&mut table, &mut bytes, &purse, hash);
            assert_eq!(
                (bytes, budget.held_bytes(), payer.used_bytes()),
                (table_bytes(&table), bytes, bytes)
            );
        }
        assert!(bytes < 1000, "{bytes}");
        assert!(budget.held_bytes_max() <= 1 << 20);
    }
}
