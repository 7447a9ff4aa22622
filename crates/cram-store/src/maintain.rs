// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The background thread: what keeps a store dense and ready, at a bounded share
//! of one processor.
//!
//! In this order: it has spans ready, so that puts need not wait for the host's
//! memory; it gives spans back that are free and not needed; it compacts as long
//! as enough is dead; and it packs cold pages once more, at half its share while
//! the store is busy: a guest that always does something has cold pages, too.
//! After each piece of work it sleeps as long as its share demands. With nothing
//! to do it wakes once a second, for microseconds.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::engine::Core;
use crate::engine::compact::Step;
use crate::engine::recompress::Repacker;
use crate::machine::sync::atomic::Ordering;
use crate::spec::Background;

/// How long the thread sleeps when there is nothing to do.
const REST: Duration = Duration::from_secs(1);
/// Over which time it looks whether the store is idle.
const WATCH: Duration = Duration::from_millis(100);
/// With fewer puts and gets than this in a second the store is idle.
const IDLE_OPERATIONS_PER_S: u64 = 1000;
/// Records packed before it rests: a millisecond's work.
const RECORDS: usize = 32;
/// Spans that are kept ready while puts come in.
const READY_SPANS: usize = 3;
/// Of all that is held, this share (as 1 / n) may be dead before compaction begins.
const DEAD_SHARE: u64 = 24;

/// The thread; dropping it ends it.
pub(crate) struct Keeper {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Keeper {
    /// `None` when the system has no thread to give: puts then do by themselves what must be done.
    pub(crate) fn start(core: &Arc<Core>, background: Background) -> Option<Self> {
        let own = core.clone();
        let thread = thread::Builder::new()
            .name("cram-keeper".into())
            .spawn(move || run(&own, background))
            .ok()?;
        core.waker.has_thread.store(true, Ordering::Relaxed);
        Some(Self {
            core: core.clone(),
            thread: Some(thread),
        })
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.core.waker.has_thread.store(false, Ordering::Relaxed);
        self.core.waker.ring(true);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(core: &Core, background: Background) {
    // Whatever else runs on the machine goes first.
    let _ = rustix::process::nice(10);
    let mut round = Round::new(background);
    while !core.waker.sleep(round.work(core)) {}
}

/// How long to rest after so much work, so that it is `cpu_percent` of the time.
fn rest_after(worked: Duration, cpu_percent: u32) -> Duration {
    let share = cpu_percent.clamp(1, 100);
    worked * (100 - share) / share
}

/// What a step was.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Done {
    Nothing,
    Compacted,
    Recompressed,
}

/// What the thread remembers from one round to the next.
struct Round {
    background: Background,
    repacker: Repacker,
    /// Before that, its share of the processor is used up.
    rested_at: Instant,
    seen: Instant,
    operations: u64,
    is_idle: bool,
}

impl Round {
    fn new(background: Background) -> Self {
        Self {
            background,
            repacker: Repacker::new(),
            rested_at: Instant::now(),
            seen: Instant::now(),
            operations: 0,
            is_idle: false,
        }
    }

    /// Does a piece of work, if there is any; how long to sleep after it.
    fn work(&mut self, core: &Core) -> Duration {
        let opened = core.waker.opened.swap(0, Ordering::Relaxed);
        self.make_ready(core, opened);
        self.watch(core);
        let began = Instant::now();
        // It may have been woken for the spans above.
        let debt = self.rested_at.saturating_duration_since(began);
        if !debt.is_zero() {
            return debt;
        }
        let done = self.tidy(core);
        // What was worked (to look whether there is work is some, too), the share allows; the rest
        // is slept.
        let rest = rest_after(began.elapsed(), self.share(done));
        self.rested_at = Instant::now() + rest;
        match done {
            Done::Nothing => rest.max(REST),
            Done::Compacted | Done::Recompressed => rest,
        }
    }

    /// In percent of one processor.
    fn share(&self, done: Done) -> u32 {
        match done {
            Done::Recompressed if !self.is_idle => self.background.cpu_percent.div_ceil(2),
            _ => self.background.cpu_percent,
        }
    }

    /// Has spans ready while puts come in, and gives back what is too many.
    fn make_ready(&self, core: &Core, opened: u64) {
        let spans = core.arena.layout().spans as usize;
        let ready = READY_SPANS.min(spans / 64);
        if opened > 0 {
            while core.arena.prepare(ready) {}
        }
        // A store that swings a little must not give back and take again all the time.
        let spare = ready.max(spans / 64);
        core.arena.trim(if opened > 0 { spare } else { 1 });
    }

    /// Looks how many puts and gets there were.
    fn watch(&mut self, core: &Core) {
        let elapsed = self.seen.elapsed();
        if elapsed < WATCH {
            return;
        }
        let operations = core.operations();
        let done = operations.saturating_sub(self.operations);
        let limit =
            u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX) * IDLE_OPERATIONS_PER_S / 1000;
        self.is_idle = done <= limit.max(1);
        self.operations = operations;
        self.seen = Instant::now();
    }

    /// One step of compaction or recompression.
    fn tidy(&mut self, core: &Core) -> Done {
        if core.is_worth_compacting() && core.compact_best() == Step::Emptied {
            return Done::Compacted;
        }
        match self.background.cold_after {
            Some(cold_after) if core.recompress_some(&mut self.repacker, cold_after, RECORDS) => {
                Done::Recompressed
            }
            _ => Done::Nothing,
        }
    }
}

impl Core {
    fn operations(&self) -> u64 {
        let stats = self.sum().read(0, 0, 0);
        stats.puts + stats.gets
    }

    /// Whether so much is dead that compaction should begin: a 24th of what is held, and more than
    /// a few spans.
    fn is_worth_compacting(&self) -> bool {
        let layout = self.arena.layout();
        let (mut dead, mut filled) = (0_u64, 0_u64);
        for info in self.arena.spans().in_use().filter(|info| info.is_sealed) {
            dead += u64::from(info.dead(layout));
            filled += u64::from(info.filled);
        }
        dead > 2 * u64::from(layout.span_granules()) && dead > filled / DEAD_SHARE
    }
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use super::*;
    use crate::{
        ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store, StoreConfig,
    };

    /// Spans that are opened wake the thread all the time: that must not make its share larger.
    #[test]
    fn who_is_woken_early_works_no_more_than_its_share() {
        let store = Store::new(StoreConfig {
            capacity_bytes: 16 << 20,
            background: None,
            ..StoreConfig::default()
        })
        .unwrap();
        let client = store.add_client("a", None).unwrap();
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(0), spec).unwrap();
        let (pool, mut scratch) = (client.pool(PoolId(0)).unwrap(), Scratch::new());
        let (mut page, mut state) = ([0; PAGE_SIZE], 0_u64);
        for index in 0..5000_u32 {
            for word in page[..2048].as_chunks_mut::<8>().0 {
                state = crate::arena::mix(state.wrapping_add(1));
                *word = state.to_le_bytes();
            }
            let put = pool.put(ObjectId([0; 3]), index, &page, &mut scratch);
            assert_eq!(put, PutResult::Stored);
        }
        for index in (0..5000).step_by(2) {
            pool.flush_page(ObjectId([0; 3]), index, 1);
        }
        let core = &store.core;
        assert!(core.is_worth_compacting());
        let mut round = Round::new(Background {
            cpu_percent: 1,
            cold_after: None,
        });
        let began = Instant::now();
        let rest = round.work(core);
        assert!(rest > Duration::ZERO && rest <= began.elapsed() * 99);
        assert!(round.rested_at >= began + rest);
        // As often as it is woken before that time is over, it does nothing.
        round.rested_at = Instant::now() + Duration::from_secs(3600);
        let held = core.arena.spans().in_use().count();
        for _ in 0..10 {
            assert!(round.work(core) > Duration::from_secs(60));
            assert_eq!(core.arena.spans().in_use().count(), held);
        }
    }

    #[test]
    fn cold_pages_are_packed_again_also_while_the_store_is_busy() {
        let store = Store::new(StoreConfig {
            background: None,
            ..StoreConfig::default()
        })
        .unwrap();
        let client = store.add_client("guest", None).unwrap();
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(0), spec).unwrap();
        let (pool, mut scratch) = (client.pool(PoolId(0)).unwrap(), Scratch::new());
        let (mut page, mut state) = ([0; PAGE_SIZE], 0_u64);
        let mut round = Round::new(Background {
            cpu_percent: 100,
            cold_after: Some(Duration::ZERO),
        });
        for index in 0..5000_u32 {
            // Letters: lz4 leaves most of it, zstd does not.
            for byte in &mut page {
                state = crate::arena::mix(state.wrapping_add(1));
                *byte = b'a' + (state % 4) as u8;
            }
            let put = pool.put(ObjectId([0; 3]), index, &page, &mut scratch);
            assert_eq!(put, PutResult::Stored);
        }
        round.is_idle = false;
        round.seen = Instant::now() + Duration::from_secs(3600);
        assert_eq!(round.share(Done::Recompressed), 50);
        assert_eq!(round.share(Done::Compacted), 100);
        let core = &store.core;
        while store.stats().recompressed_pages == 0 {
            round.rested_at = Instant::now();
            assert!(round.work(core) < REST, "nothing was found to do");
        }
        assert!(!round.is_idle);
    }
}
