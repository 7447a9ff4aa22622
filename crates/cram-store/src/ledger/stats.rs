// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counters, under the names that people know from zram, zswap, KSM and tmem.
//!
//! Every event is counted where it happens, once: at the pool; in a shared pool
//! also at the client that did it. A client's and the store's figures are sums.
//! A [`Tally`] has a few cells, and each thread counts in one of them, so that
//! threads do not fight for the counters. The sums are exact when all is quiet;
//! while pages come and go a reading may miss what happened since it began.

use std::cell::Cell;
use std::sync::atomic::AtomicUsize;

use crate::arena::{Header, Kind};
use crate::codec::is_filled;
use crate::machine::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::spec::PAGE_SIZE;

/// Why a put did not keep the page. No error: the page goes to the next tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// The store is full and nothing may be evicted for this page. Also what a put gets that
    /// meets the destruction of its pool.
    NoSpace,
    /// The client's quota is used up.
    OverQuota,
    /// The client is frozen.
    Frozen,
    /// The page does not compress and the pool refuses such pages.
    Incompressible,
}

macro_rules! statistics {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// A reading of the counters of a store, a client or a pool. All but the first five only
        /// ever count events or pages; those five are bytes.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        pub struct Stats { $($(#[$doc])* pub $name: u64,)* }

        impl Stats {
            /// Every figure with its name, in the order of the fields.
            #[must_use]
            pub fn named(&self) -> Vec<(&'static str, u64)> {
                vec![$((stringify!($name), self.$name),)*]
            }
        }
    };
}

statistics! {
    /// Bytes of the stored pages as their owners see them: `pages_stored` × 4096 (zram).
    orig_data_size,
    /// Bytes of their compressed images; of pages that have an image in common, once (zram).
    compr_data_size,
    /// Bytes held. For the store: everything taken from the host, metadata and room not in use
    /// included. For a client: what its quota is measured by. For a pool: what its pages are
    /// billed, metadata included (zram).
    mem_used_total,
    /// The limit on `mem_used_total`: capacity or quota; 0 where there is none (zram).
    mem_limit,
    /// The greatest `mem_used_total` so far; 0 for a pool (zram).
    mem_used_max,
    /// Pages that are one repeated 64-bit word (zram).
    same_pages,
    /// Pages that did not compress and are stored as they are (zram).
    huge_pages,
    /// Pages that are there (zswap's `stored_pages`).
    pages_stored,
    /// Images that several pages have in common (KSM); 0 for a pool.
    pages_shared,
    /// Pages that have their bytes from such an image (KSM).
    pages_sharing,
    /// Pages and images that were packed once more, with zstd, after they had been cold for long.
    recompressed_pages,
    /// Puts asked for, whatever came of them. A client's count what it did, also in shared pools.
    puts,
    /// Puts refused, for any reason.
    puts_refused,
    /// … because the store was full.
    refused_no_space,
    /// … because the client's quota was used up.
    refused_over_quota,
    /// … because the client was frozen.
    refused_frozen,
    /// … because the page did not compress and the pool refuses such pages.
    refused_incompressible,
    /// Gets asked for, whatever came of them.
    gets,
    /// Gets that found nothing.
    gets_missing,
    /// Gets that found a page whose checksum was wrong, and returned no data.
    gets_corrupt,
    /// Pages removed by flush_page and flush_object.
    flushes,
    /// Ephemeral pages evicted to make room; counted for those who put them.
    evicted_pages,
    /// Times that a put met the store's capacity (zswap).
    pool_limit_hit,
}

/// A store's figures.
pub type StoreStats = Stats;
/// A client's figures.
pub type ClientStats = Stats;
/// A pool's figures, over all clients that share it.
pub type PoolStats = Stats;

/// What is counted, each with its place in a cell.
#[derive(Debug, Clone, Copy)]
#[repr(usize)]
pub(crate) enum Event {
    Put,
    RefusedNoSpace,
    RefusedOverQuota,
    RefusedFrozen,
    RefusedIncompressible,
    Get,
    Missing,
    Corrupt,
    Flush,
    Evicted,
    LimitHit,
}

impl From<Refusal> for Event {
    fn from(why: Refusal) -> Self {
        match why {
            Refusal::NoSpace => Self::RefusedNoSpace,
            Refusal::OverQuota => Self::RefusedOverQuota,
            Refusal::Frozen => Self::RefusedFrozen,
            Refusal::Incompressible => Self::RefusedIncompressible,
        }
    }
}

const EVENTS: usize = Event::LimitHit as usize + 1;

/// One thread's share of the counters. Aligned so that no two share a cache line.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Share {
    events: [AtomicU64; EVENTS],
    stored: Amounts<AtomicU64>,
}

/// What is there. Added to and taken from by different threads, so a share may be below zero; only
/// the sum means something.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Amounts<T> {
    pub(crate) pages: T,
    pub(crate) image_bytes: T,
    pub(crate) billed_bytes: T,
    pub(crate) same: T,
    pub(crate) huge: T,
    pub(crate) shared: T,
    pub(crate) sharing: T,
    pub(crate) recompressed: T,
}

impl Amounts<u64> {
    /// What a record adds to the figures.
    pub(crate) fn of(header: &Header, billed_bytes: u64) -> Self {
        let is_page = matches!(header.kind, Kind::Page | Kind::Alias);
        let is_alias = header.kind == Kind::Alias;
        let flag = u64::from;
        Self {
            pages: flag(is_page),
            image_bytes: if is_alias || is_filled(header.len) {
                0
            } else {
                header.len as u64
            },
            billed_bytes,
            same: flag(header.kind == Kind::Page && is_filled(header.len)),
            huge: flag(!is_alias && header.len == PAGE_SIZE),
            shared: flag(header.kind == Kind::Image),
            sharing: flag(is_alias),
            recompressed: flag(header.is_zstd),
        }
    }
}

impl<T> Amounts<T> {
    fn each<'a, U: 'a>(&'a self, other: &'a Amounts<U>) -> [(&'a T, &'a U); 8] {
        [
            (&self.pages, &other.pages),
            (&self.image_bytes, &other.image_bytes),
            (&self.billed_bytes, &other.billed_bytes),
            (&self.same, &other.same),
            (&self.huge, &other.huge),
            (&self.shared, &other.shared),
            (&self.sharing, &other.sharing),
            (&self.recompressed, &other.recompressed),
        ]
    }
}

/// A few shares, and which of them is this thread's.
#[derive(Debug)]
pub(crate) struct Tally {
    shares: Box<[Share]>,
}

fn thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static NUMBER: Cell<usize> = Cell::new(NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed));
    }
    // A thread that is ending has none any more; any will do.
    NUMBER.try_with(Cell::get).unwrap_or(0)
}

/// This thread's, of `count` of anything.
pub(crate) fn stripe(count: usize) -> usize {
    thread_number() % count.max(1)
}

impl Tally {
    pub(crate) fn new(stripes: usize) -> Self {
        Self {
            shares: (0..stripes.max(1)).map(|_| Share::default()).collect(),
        }
    }

    /// Bytes that its shares take.
    pub(crate) fn bytes(stripes: usize) -> usize {
        stripes.max(1) * size_of::<Share>()
    }

    fn share(&self) -> &Share {
        &self.shares[stripe(self.shares.len())]
    }

    pub(crate) fn count(&self, event: Event, times: u64) {
        self.share().events[event as usize].fetch_add(times, Relaxed);
    }

    /// Something came.
    pub(crate) fn add(&self, amounts: &Amounts<u64>) {
        for (counter, amount) in self.share().stored.each(amounts) {
            if *amount != 0 {
                counter.fetch_add(*amount, Relaxed);
            }
        }
    }

    /// Something came in the place of something else: most of it is the same.
    pub(crate) fn exchange(&self, old: &Amounts<u64>, new: &Amounts<u64>) {
        let stored = &self.share().stored;
        for ((counter, new), (_, old)) in stored.each(new).into_iter().zip(stored.each(old)) {
            let more = new.wrapping_sub(*old);
            if more != 0 {
                counter.fetch_add(more, Relaxed);
            }
        }
    }

    /// Something went.
    pub(crate) fn sub(&self, amounts: &Amounts<u64>) {
        for (counter, amount) in self.share().stored.each(amounts) {
            if *amount != 0 {
                counter.fetch_sub(*amount, Relaxed);
            }
        }
    }

    pub(crate) fn pages(&self) -> u64 {
        let sum = self.shares.iter().fold(0_u64, |sum, share| {
            sum.wrapping_add(share.stored.pages.load(Relaxed))
        });
        not_below_zero(sum)
    }

    pub(crate) fn billed_bytes(&self) -> u64 {
        let sum = self.shares.iter().fold(0_u64, |sum, share| {
            sum.wrapping_add(share.stored.billed_bytes.load(Relaxed))
        });
        not_below_zero(sum)
    }

    /// All figures.
    pub(crate) fn sum(&self) -> Sum {
        let mut sum = Sum::default();
        for share in &self.shares {
            for (total, counter) in sum.events.iter_mut().zip(&share.events) {
                *total = total.wrapping_add(counter.load(Relaxed));
            }
            sum.stored = sum
                .stored
                .plus(&share.stored, |counter| counter.load(Relaxed));
        }
        sum
    }

    /// Counts what another tally has counted.
    pub(crate) fn absorb(&self, sum: &Sum) {
        for (counter, times) in self.share().events.iter().zip(sum.events) {
            counter.fetch_add(times, Relaxed);
        }
        self.add(&sum.stored);
    }
}

impl Amounts<u64> {
    fn plus<T>(&self, other: &Amounts<T>, read: impl Fn(&T) -> u64) -> Self {
        let add = |mine: u64, theirs: &T| mine.wrapping_add(read(theirs));
        Self {
            pages: add(self.pages, &other.pages),
            image_bytes: add(self.image_bytes, &other.image_bytes),
            billed_bytes: add(self.billed_bytes, &other.billed_bytes),
            same: add(self.same, &other.same),
            huge: add(self.huge, &other.huge),
            shared: add(self.shared, &other.shared),
            sharing: add(self.sharing, &other.sharing),
            recompressed: add(self.recompressed, &other.recompressed),
        }
    }
}

/// A reader may have seen a page go and not have seen it come.
fn not_below_zero(sum: u64) -> u64 {
    if sum > u64::MAX / 2 { 0 } else { sum }
}

/// The sum of tallies, at one time.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sum {
    events: [u64; EVENTS],
    pub(crate) stored: Amounts<u64>,
}

impl Sum {
    pub(crate) fn plus(&self, other: &Self) -> Self {
        let mut events = self.events;
        for (total, more) in events.iter_mut().zip(other.events) {
            *total = total.wrapping_add(more);
        }
        Self {
            events,
            stored: self.stored.plus(&other.stored, |amount| *amount),
        }
    }

    /// As people read it; the caller adds what it knows of bytes held.
    pub(crate) fn read(&self, mem_used_total: u64, mem_limit: u64, mem_used_max: u64) -> Stats {
        let event = |event: Event| self.events[event as usize];
        let stored = &self.stored;
        let pages_stored = not_below_zero(stored.pages);
        Stats {
            orig_data_size: pages_stored * PAGE_SIZE as u64,
            compr_data_size: not_below_zero(stored.image_bytes),
            mem_used_total,
            mem_limit,
            mem_used_max,
            same_pages: not_below_zero(stored.same),
            huge_pages: not_below_zero(stored.huge),
            pages_stored,
            pages_shared: not_below_zero(stored.shared),
            pages_sharing: not_below_zero(stored.sharing),
            recompressed_pages: not_below_zero(stored.recompressed),
            puts: event(Event::Put),
            puts_refused: event(Event::RefusedNoSpace)
                + event(Event::RefusedOverQuota)
                + event(Event::RefusedFrozen)
                + event(Event::RefusedIncompressible),
            refused_no_space: event(Event::RefusedNoSpace),
            refused_over_quota: event(Event::RefusedOverQuota),
            refused_frozen: event(Event::RefusedFrozen),
            refused_incompressible: event(Event::RefusedIncompressible),
            gets: event(Event::Get),
            gets_missing: event(Event::Missing),
            gets_corrupt: event(Event::Corrupt),
            flushes: event(Event::Flush),
            evicted_pages: event(Event::Evicted),
            pool_limit_hit: event(Event::LimitHit),
        }
    }
}

/// Buckets of [`Sizes`].
const SIZES: usize = 65;

/// How many images there are of each size, in buckets of 64 bytes.
#[derive(Debug)]
pub(crate) struct Sizes {
    shares: Box<[[AtomicU64; SIZES]]>,
}

impl Sizes {
    pub(crate) fn new(stripes: usize) -> Self {
        let share = |_| std::array::from_fn(|_| AtomicU64::new(0));
        Self {
            shares: (0..stripes.max(1)).map(share).collect(),
        }
    }

    pub(crate) fn bytes(stripes: usize) -> usize {
        stripes.max(1) * SIZES * 8
    }

    fn bucket(&self, len: usize) -> &AtomicU64 {
        &self.shares[stripe(self.shares.len())][len.div_ceil(64).min(SIZES - 1)]
    }

    pub(crate) fn add(&self, len: usize) {
        self.bucket(len).fetch_add(1, Relaxed);
    }

    pub(crate) fn sub(&self, len: usize) {
        self.bucket(len).fetch_sub(1, Relaxed);
    }

    pub(crate) fn exchange(&self, old: usize, new: usize) {
        let (old, new) = (self.bucket(old), self.bucket(new));
        if !std::ptr::eq(old, new) {
            old.fetch_sub(1, Relaxed);
            new.fetch_add(1, Relaxed);
        }
    }

    /// For each bucket with anything in it: the greatest size in bytes, and how many there are.
    pub(crate) fn read(&self) -> Vec<(u64, u64)> {
        (0..SIZES)
            .map(|bucket| {
                let sum = self.shares.iter().fold(0_u64, |sum, share| {
                    sum.wrapping_add(share[bucket].load(Relaxed))
                });
                (bucket as u64 * 64, not_below_zero(sum))
            })
            .filter(|(_, count)| *count > 0)
            .collect()
    }
}
