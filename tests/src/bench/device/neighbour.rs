// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What one guest loses when two others do all that they can: a queue kept full each, with requests
//! that cost the device most. Three workers then want the two processors, so two thirds are its share,
//! less what the drivers take.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cram_abi::wire::{MAX_BATCH, pool_flag};

use super::Extent;
use super::rig::place;
use crate::bench::corpus::{self, PAGE_SIZE, Page};
use crate::bench::figures::{Figures, median};
use crate::frontend::{Ask, Guest, Options, TestDaemon, Wait};

const CAPACITY_BYTES: u64 = 512 << 20;
const POLL: Duration = Duration::from_micros(50);
const BATCH: usize = 32;
const LANES: usize = 4;
/// Pages that each of the neighbour's threads puts, again and again.
const FLOOD_PAGES: u32 = 512;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let pages = corpus::mixed(&corpus::gather(extent.pages_of_a_kind / 2)?);
    let daemon = TestDaemon::start_with(3, CAPACITY_BYTES, |options| {
        options.offer.poll = POLL;
        options.store.background.cold_after = None;
    })?;
    let (mut guest, from) = connect(&daemon, 0, &pages)?;
    let mut rates = [Vec::new(), Vec::new()];
    for round in 0..=extent.rounds as u64 {
        let alone = timed(&mut guest, from, &pages, 2 * round)?;
        let beside = beside_neighbour(&daemon, &pages, || {
            timed(&mut guest, from, &pages, 2 * round + 1)
        })?;
        if round > 0 {
            rates[0].push(alone);
            rates[1].push(beside);
        }
    }
    let [alone, beside] = rates.map(median);
    let mut figures = Figures::default();
    figures.set("neighbour_share", alone / beside);
    Ok(figures)
}

fn connect(daemon: &TestDaemon, number: usize, pages: &[Page]) -> Result<(Guest, u64)> {
    let bytes = pages.len() * PAGE_SIZE;
    let options = Options {
        memory_bytes: bytes as u64 + (16 << 20),
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(number), &options)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    let from = guest.memory.allocate(bytes, 4096)?;
    for (at, page) in (from..).step_by(PAGE_SIZE).zip(pages) {
        guest.memory.write(at, page)?;
    }
    Ok((guest, from))
}

/// Seconds for putting all pages, each new.
fn timed(guest: &mut Guest, from: u64, pages: &[Page], round: u64) -> Result<f64> {
    let count = u32::try_from(pages.len())?;
    for number in 0..count {
        let stamp = u64::from(number) | round << 32;
        let at = place(from, number) + 2048;
        guest.memory.write(at, &stamp.to_le_bytes())?;
    }
    let mark = guest.memory.mark();
    let memory = guest.memory.clone();
    let began = Instant::now();
    let good = put_all(guest, 1, from, count, BATCH)?;
    let took = began.elapsed().as_secs_f64();
    ensure!(good == u64::from(count), "{good} of {count} pages were put");
    memory.release(mark);
    Ok(took)
}

fn put_all(guest: &mut Guest, queue: usize, from: u64, count: u32, batch: usize) -> Result<u64> {
    let step = u32::try_from(batch)?;
    let mut number = 0;
    let mut flow = guest.flow(queue, 0, LANES, batch, Wait::Sleep)?;
    flow.drive(Ask::Put, |pages| {
        let until = count.min(number + step);
        pages.extend((number..until).map(|number| (number, place(from, number))));
        number = until;
        !pages.is_empty()
    })
}

/// Measures while two other guests of ill will keep a queue full each.
fn beside_neighbour(
    daemon: &TestDaemon,
    pages: &[Page],
    measure: impl FnOnce() -> Result<f64>,
) -> Result<f64> {
    let is_over = AtomicBool::new(false);
    let flood = |number: usize| -> Result<()> {
        let some = pages.get(..FLOOD_PAGES as usize).unwrap_or(pages);
        let (mut guest, from) = connect(daemon, number, some)?;
        let mark = guest.memory.mark();
        let mut stamp = 0_u64;
        while !is_over.load(Relaxed) {
            for number in 0..FLOOD_PAGES {
                stamp += 1;
                let at = place(from, number) + 2048;
                guest.memory.write(at, &stamp.to_le_bytes())?;
            }
            put_all(&mut guest, 1, from, FLOOD_PAGES, MAX_BATCH)?;
            guest.memory.release(mark);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let floods = [1, 2].map(|number| scope.spawn(move || flood(number)));
        // Until they are at it.
        std::thread::sleep(Duration::from_millis(100));
        let measured = measure();
        is_over.store(true, Relaxed);
        for flood in floods {
            let ended = flood.join().ok().context("a neighbour panicked")?;
            ended?;
        }
        measured
    })
}
