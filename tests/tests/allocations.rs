// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A request allocates nothing: what workers need they have from the beginning. (The store's index
//! grows and shrinks with what is stored, so here as much is flushed as is put again, leaf by leaf.)

#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use anyhow::{Result, ensure};
use cram_abi::wire::{PAGE_SIZE, pool_flag};
use cram_tests::frontend::{Ask, Guest, Options, Request, TestDaemon, Wait, page};

/// Counts what the threads in [`WORKERS`] allocate.
struct Counting;

const WORKERS_MAX: usize = 16;
static WORKERS: [AtomicI32; WORKERS_MAX] = [const { AtomicI32::new(0) }; WORKERS_MAX];
static COUNT: AtomicU64 = AtomicU64::new(0);

fn count() {
    // SAFETY: takes nothing and cannot fail.
    let thread = unsafe { libc::gettid() };
    if WORKERS.iter().any(|worker| worker.load(Relaxed) == thread) {
        COUNT.fetch_add(1, Relaxed);
    }
}

// SAFETY: everything is handed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's promises are the ones that this needs.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(block, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Looks for the workers among the threads of this process.
fn find_workers() -> Result<usize> {
    let mut found = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let thread = thread?;
        let name = std::fs::read_to_string(thread.path().join("comm"))?;
        if name.trim_end() == "worker" {
            let number = thread.file_name().to_string_lossy().parse()?;
            WORKERS[found].store(number, Relaxed);
            found += 1;
        }
    }
    Ok(found)
}

#[test]
fn requests_allocate_nothing() -> Result<()> {
    const PAGES: u32 = 2000;
    let daemon = TestDaemon::start_with(1, 64 << 20, |options| {
        options.offer.poll = Duration::from_micros(50);
    })?;
    let options = Options {
        memory_bytes: 32 << 20,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    let from = guest.memory.allocate(PAGES as usize * PAGE_SIZE, 4096)?;
    let at = |number: u32| from + u64::from(number) * PAGE_SIZE as u64;
    let round = |guest: &mut Guest, salt: u64| -> Result<()> {
        for number in 0..PAGES {
            // Some are equal to each other, some are what they were.
            let bytes = page(u64::from(number % 1500) + salt / 2 * 10_000);
            guest.memory.write(at(number), &bytes)?;
        }
        for ask in [Ask::Put, Ask::Get] {
            let mut number = 0;
            let mark = guest.memory.mark();
            let memory = guest.memory.clone();
            let mut flow = guest.flow(1, 0, 3, 32, Wait::Sleep)?;
            let good = flow.drive(ask, |pages| {
                let until = PAGES.min(number + 32);
                pages.extend((number..until).map(|number| (number, at(number))));
                number = until;
                !pages.is_empty()
            })?;
            ensure!(good == u64::from(PAGES), "{good} pages");
            memory.release(mark);
        }
        for request in [
            Request::query(),
            Request::get(0, 0, &[PAGES + 1]),
            Request::flush_page(0, 0, &[(3, 1), (700, 1)]),
            Request::flush_object(0, 5),
            Request::put(9, 0, &[(1, page(1))]),
        ] {
            guest.call(2, &request)?;
        }
        Ok(())
    };

    // The first rounds make tables grow.
    for salt in 0..4 {
        round(&mut guest, salt)?;
    }
    let workers = find_workers()?;
    // One of them has the event queue.
    ensure!(workers == 3 || workers == 2, "{workers} workers");
    for salt in 4..10 {
        round(&mut guest, salt)?;
    }
    let count = COUNT.load(Relaxed);
    assert_eq!(count, 0, "allocations in {} requests", 6 * (2 * 63 + 5));

    // The counter counts: a leaf that loses most of its pages is made smaller.
    guest.call(2, &Request::flush_page(0, 0, &[(0, 60)]))?;
    assert_ne!(COUNT.load(Relaxed), 0);
    Ok(())
}
