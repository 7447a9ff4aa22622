// SPDX-License-Identifier: GPL-2.0

//! Slots that were freed, and that the device has not heard of yet.
//!
//! Slots are freed in atomic context, one by one and many at a time; the device wants to hear of
//! ranges. So a freed slot becomes a bit, and a worker turns bits into requests. There is no
//! list that could overflow and nothing to allocate.
//!
//! A swap device that goes leaves a whole object to be flushed. Nobody waits for that: the next one
//! under the same number has an object of its own, so what is there still cannot be taken for its
//! pages. What could not be flushed stays owed.
//!
//! A flush must never undo a later put of the same slot. That holds because both the put (which
//! clears the slot's bit) and the worker (which takes bits and submits the flush) do so under the
//! lock of the slot's queue, and the device executes a queue in order. A flush that was lost in a
//! reset is repeated, for the slots that were not put since: a second bit says which those are.

use crate::{
    frontswap::{MAX_TYPES, REGION_SHIFT},
    wire, //
};
use kernel::{
    alloc::KVVec,
    new_spinlock_irq,
    prelude::*,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        SpinLockIrq, //
    },
};

const REGION: usize = 1 << REGION_SHIFT;
const WORD: usize = u64::BITS as usize;

/// What holds the pages of one swap device, from swapon to swapoff.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) struct Object {
    /// The swap device's number.
    pub(crate) swap_type: u32,
    /// Which of those that had that number.
    pub(crate) life: u64,
}

/// One swap device.
struct Area {
    life: u64,
    slots: usize,
    /// One bit per slot: it was freed, and the device has to hear of it.
    freed: KVVec<u64>,
    /// One bit per slot: a flush of it is under way, and it was not put since.
    flushing: KVVec<u64>,
    /// One bit per region: are there bits in `freed`?
    dirty: KVVec<u64>,
}

impl Area {
    fn new(life: u64, slots: usize) -> Result<Self> {
        let regions = slots.div_ceil(REGION);
        Ok(Self {
            life,
            slots,
            freed: KVVec::from_elem(0, regions * REGION / WORD, GFP_KERNEL)?,
            flushing: KVVec::from_elem(0, regions * REGION / WORD, GFP_KERNEL)?,
            dirty: KVVec::from_elem(0, regions.div_ceil(WORD), GFP_KERNEL)?,
        })
    }

    fn mark(&mut self, offset: usize, nr: usize) {
        for (word, mask) in words(offset, offset.saturating_add(nr).min(self.slots)) {
            set(&mut self.freed, word, mask);
        }
        for region in offset / REGION..=(offset + nr.max(1) - 1) / REGION {
            set(&mut self.dirty, region / WORD, 1 << (region % WORD));
        }
    }

    fn unmark(&mut self, offset: usize, nr: usize) {
        for (word, mask) in words(offset, offset.saturating_add(nr).min(self.slots)) {
            clear(&mut self.freed, word, mask);
            clear(&mut self.flushing, word, mask);
        }
    }

    /// The flush of a range has ended. When it was not executed, what was not put meanwhile is
    /// to be flushed once more.
    fn end_flush(&mut self, offset: usize, nr: usize, executed: bool) {
        let mut again = 0;
        for (word, mask) in words(offset, offset.saturating_add(nr).min(self.slots)) {
            let not_put = clear(&mut self.flushing, word, mask);
            if !executed {
                set(&mut self.freed, word, not_put);
                again |= not_put;
            }
        }
        if again != 0 {
            // A range is of one region.
            let region = offset / REGION;
            set(&mut self.dirty, region / WORD, 1 << (region % WORD));
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
            for (word, mask) in words(first, last) {
                clear(&mut self.freed, word, mask);
                set(&mut self.flushing, word, mask);
            }
            slot = last;
        }
        clear(&mut self.dirty, region / WORD, 1 << (region % WORD));
    }
}

/// The words that bits `first` to `end - 1` are in, each with a mask of those bits.
fn words(first: usize, end: usize) -> impl Iterator<Item = (usize, u64)> {
    (first / WORD..end.div_ceil(WORD)).filter_map(move |word| {
        let low = first.saturating_sub(word * WORD);
        let high = (end - word * WORD).min(WORD);
        (low < high).then(|| (word, u64::MAX >> (WORD - (high - low)) << low))
    })
}

fn set(bits: &mut [u64], word: usize, mask: u64) {
    if let Some(word) = bits.get_mut(word) {
        *word |= mask;
    }
}

/// Returns which of the bits were set.
fn clear(bits: &mut [u64], word: usize, mask: u64) -> u64 {
    let Some(word) = bits.get_mut(word) else {
        return 0;
    };
    let were = *word & mask;
    *word &= !mask;
    were
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
    fn new() -> Self {
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

    fn clear(&mut self) {
        self.len = 0;
        self.pages = 0;
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

/// What one flush_page is about.
pub(crate) struct Flush {
    /// Whose pages.
    pub(crate) object: Object,
    /// Which of them.
    pub(crate) ranges: Ranges,
}

impl Flush {
    /// About nothing yet.
    pub(crate) fn new() -> Self {
        Self {
            object: Object {
                swap_type: 0,
                life: 0,
            },
            ranges: Ranges::new(),
        }
    }
}

/// An object that is to be flushed.
struct Owed {
    object: Object,
    under_way: bool,
}

/// All swap devices.
#[pin_data]
pub(crate) struct Areas {
    #[pin]
    areas: [SpinLockIrq<Option<Area>>; MAX_TYPES],
    /// The life of the swap device of each number. It changes while nobody uses that.
    lives: [Atomic<u64>; MAX_TYPES],
    last_life: Atomic<u64>,
    /// There is always room for one more for each area that is there.
    #[pin]
    owed: SpinLockIrq<KVec<Owed>>,
}

impl Areas {
    /// None yet.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            areas <- pin_init::pin_init_array_from_fn(|_| new_spinlock_irq!(None)),
            lives: core::array::from_fn(|_| Atomic::new(0)),
            last_life: Atomic::new(0),
            owed <- new_spinlock_irq!(KVec::new()),
        })
    }

    /// A swap device appears. One at a time.
    pub(crate) fn add(&self, swap_type: u32, slots: usize) -> Result {
        let number = swap_type as usize;
        let place = self.areas.get(number).ok_or(EINVAL)?;
        let life = self.last_life.load(Relaxed) + 1;
        let area = Area::new(life, slots)?;
        self.make_room()?;
        self.last_life.store(life, Relaxed);
        if let Some(place) = self.lives.get(number) {
            place.store(life, Relaxed);
        }
        let old = place.lock().replace(area);
        drop(old);
        Ok(())
    }

    /// Makes room for every area that could leave.
    fn make_room(&self) -> Result {
        let needed = self.owed.lock().len() + MAX_TYPES;
        let mut room = KVec::with_capacity(needed, GFP_KERNEL)?;
        let mut owed = self.owed.lock();
        for item in owed.drain_all() {
            let _ = room.push_within_capacity(item);
        }
        // Memory is freed after the lock is.
        core::mem::swap(&mut *owed, &mut room);
        drop(owed);
        Ok(())
    }

    /// A swap device is gone: all that is left of it is owed a flush.
    pub(crate) fn remove(&self, swap_type: u32) {
        let Some(place) = self.areas.get(swap_type as usize) else {
            return;
        };
        // Memory is freed after the lock is, with interrupts enabled.
        let Some(area) = place.lock().take() else {
            return;
        };
        let object = Object {
            swap_type,
            life: area.life,
        };
        // `add` has made room.
        let _ = self.owed.lock().push_within_capacity(Owed {
            object,
            under_way: false,
        });
    }

    /// The object of a swap device that is in use.
    pub(crate) fn object(&self, swap_type: u32) -> Object {
        let life = self.lives.get(swap_type as usize);
        Object {
            swap_type,
            life: life.map_or(0, |life| life.load(Relaxed)),
        }
    }

    /// The next object that is to be flushed. It is under way from now on.
    pub(crate) fn take_object(&self) -> Option<Object> {
        let mut owed = self.owed.lock();
        let next = owed.iter_mut().find(|owed| !owed.under_way)?;
        next.under_way = true;
        Some(next.object)
    }

    /// The flush of an object has ended.
    pub(crate) fn put_object(&self, object: Object, done: bool) {
        let mut owed = self.owed.lock();
        if done {
            owed.retain(|owed| owed.object != object);
        } else if let Some(again) = owed.iter_mut().find(|owed| owed.object == object) {
            again.under_way = false;
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

    /// Fills a flush with ranges of one swap device that belong to queue `queue` of `queues`.
    /// Under the queue's lock. False when there is nothing left.
    pub(crate) fn take(&self, queue: usize, queues: usize, flush: &mut Flush) -> bool {
        let ranges = &mut flush.ranges;
        ranges.clear();
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
                flush.object = Object {
                    swap_type: swap_type as u32,
                    life: area.life,
                };
                return true;
            }
        }
        false
    }

    /// A flush has ended. What was not flushed is owed again, unless it was put meanwhile.
    pub(crate) fn put(&self, flush: &Flush, executed: bool) {
        let Some(place) = self.areas.get(flush.object.swap_type as usize) else {
            return;
        };
        let mut guard = place.lock();
        // What is gone is owed as a whole.
        let Some(area) = &mut *guard else { return };
        if area.life != flush.object.life {
            return;
        }
        for range in flush.ranges.items() {
            let (first, count) = (range.first.get(), range.count.get());
            area.end_flush(first as usize, count as usize, executed);
        }
    }
}

/// Which of `queues` queues carries a slot.
pub(crate) fn queue_of(offset: usize, queues: usize) -> usize {
    (offset >> REGION_SHIFT) % queues.max(1)
}
