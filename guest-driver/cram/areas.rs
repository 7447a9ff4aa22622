// SPDX-License-Identifier: GPL-2.0

//! Slots that were freed, and that the device has not heard of yet.
//!
//! Slots are freed in atomic context, one by one and many at a time; the device wants to hear of
//! ranges. So a freed slot becomes a bit, and a worker turns bits into requests. There is no
//! list that could overflow and nothing to allocate.
//!
//! A flush must never undo a later put of the same slot. That holds because both the put (which
//! clears the slot's bit) and the worker (which takes bits and submits the flush) do so under the
//! lock of the slot's queue, and the device executes a queue in order.

use crate::{
    frontswap::{MAX_TYPES, REGION_SHIFT},
    wire, //
};
use kernel::{
    alloc::KVVec,
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq, //
};

const REGION: usize = 1 << REGION_SHIFT;
const WORD: usize = u64::BITS as usize;

/// One swap device.
struct Area {
    slots: usize,
    /// One bit per slot.
    freed: KVVec<u64>,
    /// One bit per region: are there bits in `freed`?
    dirty: KVVec<u64>,
}

impl Area {
    fn new(slots: usize) -> Result<Self> {
        let regions = slots.div_ceil(REGION);
        Ok(Self {
            slots,
            freed: KVVec::from_elem(0, regions * REGION / WORD, GFP_KERNEL)?,
            dirty: KVVec::from_elem(0, regions.div_ceil(WORD), GFP_KERNEL)?,
        })
    }

    fn mark(&mut self, offset: usize, nr: usize) {
        for slot in offset..offset.saturating_add(nr).min(self.slots) {
            set(&mut self.freed, slot);
        }
        for region in offset / REGION..=(offset + nr.max(1) - 1) / REGION {
            set(&mut self.dirty, region);
        }
    }

    fn unmark(&mut self, offset: usize, nr: usize) {
        for slot in offset..offset.saturating_add(nr).min(self.slots) {
            clear(&mut self.freed, slot);
        }
    }

    /// Takes ranges out of one region, as long as there is room for them.
    fn take(&mut self, region: usize, ranges: &mut Ranges) {
        let end = (region + 1) * REGION;
        let mut slot = region * REGION;
        while let Some(first) = next(&self.freed, slot, end, true) {
            let last = next(&self.freed, first, end, false).unwrap_or(end);
            if !ranges.push(first, last - first) {
                return;
            }
            self.unmark(first, last - first);
            slot = last;
        }
        clear(&mut self.dirty, region);
    }
}

fn set(bits: &mut [u64], bit: usize) {
    if let Some(word) = bits.get_mut(bit / WORD) {
        *word |= 1 << (bit % WORD);
    }
}

fn clear(bits: &mut [u64], bit: usize) {
    if let Some(word) = bits.get_mut(bit / WORD) {
        *word &= !(1 << (bit % WORD));
    }
}

/// The first bit from `from` on that is `value`, if it is before `end`.
fn next(bits: &[u64], from: usize, end: usize, value: bool) -> Option<usize> {
    let mut bit = from;
    while bit < end {
        let word = *bits.get(bit / WORD)?;
        let word = (if value { word } else { !word }) >> (bit % WORD);
        if word != 0 {
            bit += word.trailing_zeros() as usize;
            return (bit < end).then_some(bit);
        }
        bit = (bit / WORD + 1) * WORD;
    }
    None
}

/// Ranges for one flush_page.
pub(crate) struct Ranges {
    items: [wire::Range; wire::MAX_BATCH],
    len: usize,
    pages: usize,
}

impl Ranges {
    /// No ranges.
    pub(crate) fn new() -> Self {
        Self {
            items: [wire::Range::default(); wire::MAX_BATCH],
            len: 0,
            pages: 0,
        }
    }

    /// The ranges.
    pub(crate) fn items(&self) -> &[wire::Range] {
        self.items.get(..self.len).unwrap_or_default()
    }

    /// Pages in all of them.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    fn push(&mut self, first: usize, count: usize) -> bool {
        let Some(item) = self.items.get_mut(self.len) else {
            return false;
        };
        *item = wire::Range {
            first: (first as u32).into(),
            count: (count as u32).into(),
        };
        self.len += 1;
        self.pages += count;
        true
    }
}

/// All swap devices.
#[pin_data]
pub(crate) struct Areas {
    #[pin]
    areas: [SpinLockIrq<Option<Area>>; MAX_TYPES],
}

impl Areas {
    /// None yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            areas <- pin_init::pin_init_array_from_fn(|_| new_spinlock_irq!(None)),
        })
    }

    /// A swap device appears.
    pub(crate) fn add(&self, swap_type: u32, slots: usize) -> Result {
        let area = Area::new(slots)?;
        let place = self.areas.get(swap_type as usize).ok_or(EINVAL)?;
        let old = place.lock().replace(area);
        drop(old);
        Ok(())
    }

    /// A swap device is gone, and nothing needs to be flushed for it any more.
    pub(crate) fn remove(&self, swap_type: u32) {
        if let Some(place) = self.areas.get(swap_type as usize) {
            // Memory is freed after the lock is, with interrupts enabled.
            let old = place.lock().take();
            drop(old);
        }
    }

    /// Slots were freed. Atomic context.
    pub(crate) fn mark(&self, swap_type: u32, offset: usize, nr: usize) {
        if let Some(place) = self.areas.get(swap_type as usize) {
            if let Some(area) = &mut *place.lock() {
                area.mark(offset, nr);
            }
        }
    }

    /// Slots are put again: whatever was there is replaced anyway. Under the slots' queue's lock.
    pub(crate) fn unmark(&self, swap_type: u32, offset: usize, nr: usize) {
        if let Some(place) = self.areas.get(swap_type as usize) {
            if let Some(area) = &mut *place.lock() {
                area.unmark(offset, nr);
            }
        }
    }

    /// Takes ranges of one swap device that belong to queue `queue` of `queues`. Under the
    /// queue's lock. Returns the swap type, unless there is nothing left.
    pub(crate) fn take(&self, queue: usize, queues: usize, ranges: &mut Ranges) -> Option<u32> {
        for (swap_type, place) in self.areas.iter().enumerate() {
            let mut guard = place.lock();
            let Some(area) = &mut *guard else { continue };
            let regions = area.slots.div_ceil(REGION);
            let mut from = 0;
            while let Some(region) = next(&area.dirty, from, regions, true) {
                if region % queues == queue {
                    area.take(region, ranges);
                    if ranges.len == ranges.items.len() {
                        break;
                    }
                }
                from = region + 1;
            }
            if ranges.len != 0 {
                return Some(swap_type as u32);
            }
        }
        None
    }

    /// Gives ranges back that could not be submitted. Under the same hold of the queue's lock.
    pub(crate) fn untake(&self, swap_type: u32, ranges: &Ranges) {
        for range in ranges.items() {
            self.mark(
                swap_type,
                range.first.get() as usize,
                range.count.get() as usize,
            );
        }
    }
}

/// Which of `queues` queues carries a slot.
pub(crate) fn queue_of(offset: usize, queues: usize) -> usize {
    (offset >> REGION_SHIFT) % queues.max(1)
}
