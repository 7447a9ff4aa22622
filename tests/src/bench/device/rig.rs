// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A daemon, a guest of it, and pages of a corpus in the guest's memory.

use std::time::Duration;

use anyhow::{Context, Result};
use cram_abi::wire::{MAX_BATCH, pool_flag};

use crate::bench::corpus::{self, PAGE_SIZE, Page};
use crate::frontend::{Ask, Flow, Guest, Options, TestDaemon, Wait};

const CAPACITY_BYTES: u64 = 1 << 30;
/// The pool that everything goes to.
const POOL: u32 = 0;
/// The queue that everything goes through.
const QUEUE: usize = 1;

pub(super) struct Rig {
    pub(super) daemon: TestDaemon,
    pub(super) guest: Guest,
    pub(super) pages: Vec<Page>,
    /// Where the pages lie in the guest's memory, and where they come back to.
    pub(super) from: u64,
    pub(super) to: u64,
}

impl Rig {
    /// A device that polls for so long.
    pub(super) fn new(pages_of_a_kind: usize, poll: Duration) -> Result<Self> {
        let pages = corpus::mixed(&corpus::gather(pages_of_a_kind)?);
        let daemon = TestDaemon::start_with(1, CAPACITY_BYTES, |options| {
            options.offer.poll = poll;
            options.store.background.cold_after = None;
        })?;
        let bytes = pages.len() * PAGE_SIZE;
        let options = Options {
            memory_bytes: 2 * bytes as u64 + (16 << 20),
            request_queues: 1,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        guest.new_pool(POOL, pool_flag::PERSISTENT)?;
        let from = guest.memory.allocate(bytes, 4096)?;
        let to = guest.memory.allocate(bytes, 4096)?;
        for (at, page) in (from..).step_by(PAGE_SIZE).zip(&pages) {
            guest.memory.write(at, page)?;
        }
        Ok(Self {
            daemon,
            guest,
            pages,
            from,
            to,
        })
    }

    /// Makes every page in the guest's memory unlike all before.
    pub(super) fn stamp(&self, round: u64) -> Result<()> {
        for (at, number) in (self.from + 2048..)
            .step_by(PAGE_SIZE)
            .zip(0..self.pages.len() as u64)
        {
            let number = number | round << 32;
            self.guest.memory.write(at, &number.to_le_bytes())?;
        }
        Ok(())
    }

    /// Puts or gets every page once, so many at a time; how many were.
    pub(super) fn drive(
        &mut self,
        ask: Ask,
        batch: usize,
        lanes: usize,
        wait: Wait,
    ) -> Result<u64> {
        let base = if ask == Ask::Put { self.from } else { self.to };
        let count = u32::try_from(self.pages.len())?;
        let step = u32::try_from(batch.min(MAX_BATCH))?;
        let mut number = 0;
        let mut flow = self.flow(lanes, batch, wait)?;
        flow.drive(ask, |pages| {
            let until = count.min(number + step);
            pages.extend((number..until).map(|number| (number, place(base, number))));
            number = until;
            !pages.is_empty()
        })
    }

    /// A driver. (What it took from the guest's memory is used again by the next one.)
    pub(super) fn flow(&mut self, lanes: usize, batch: usize, wait: Wait) -> Result<Flow<'_>> {
        let behind = self.to + (self.pages.len() * PAGE_SIZE) as u64;
        self.guest.memory.release(behind);
        self.guest
            .flow(QUEUE, POOL, lanes, batch, wait)
            .context("no room for the driver")
    }
}

/// Where a page lies.
pub(super) fn place(base: u64, number: u32) -> u64 {
    base + u64::from(number) * PAGE_SIZE as u64
}
