// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver at full speed: requests that are laid out once, and sent again and again.
//!
//! A [`Flow`] has a queue for itself and some *lanes*, each a place for one request in flight: header,
//! page numbers and answer in buffers of its own, and a table of descriptors that lead to the pages
//! where they lie. To send a request again costs the driver a few hundred bytes; pages are never
//! copied by it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cram_abi::wire::{HEADER_SIZE, MAX_BATCH, PAGE_SIZE, RESPONSE_SIZE, op, result, status};
use zerocopy::IntoBytes;

use super::PATIENCE;
use super::memory::Memory;
use super::ring::{Piece, Ring};
use cram_conformance::Request;

/// What a lane asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// The pages are stored.
    Put,
    /// The pages are fetched.
    Get,
}

/// How the driver waits for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// It watches the ring. Interrupts are not asked for.
    Spin,
    /// It sleeps until it is interrupted.
    Sleep,
}

struct Lane {
    /// Header and page numbers.
    head: u64,
    answer: u64,
    /// Descriptors: one for `head`, one for the answer, one for each page.
    table: u64,
    batch: usize,
}

/// A completed request.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    /// The lane that is free again.
    pub lane: usize,
    /// How many pages were stored or found.
    pub good: usize,
}

/// See the module's text.
pub struct Flow<'a> {
    memory: Arc<Memory>,
    ring: &'a mut Ring,
    pool: u32,
    wait: Wait,
    lanes: Vec<Lane>,
    /// The lane of each chain in flight, by its head.
    lane_of: Vec<Option<usize>>,
}

impl<'a> Flow<'a> {
    /// `lanes` lanes for requests of up to `batch` pages. The ring must be idle, and in the manner of
    /// indirect descriptors.
    ///
    /// # Errors
    ///
    /// When the memory has no room.
    pub fn new(
        memory: Arc<Memory>,
        ring: &'a mut Ring,
        pool: u32,
        lanes: usize,
        batch: usize,
        wait: Wait,
    ) -> Result<Self> {
        ensure!(batch <= MAX_BATCH, "a batch has {MAX_BATCH} pages at most");
        let lane = || -> Result<Lane> {
            Ok(Lane {
                head: memory.allocate(HEADER_SIZE + 4 * batch, 64)?,
                answer: memory.allocate(RESPONSE_SIZE, 64)?,
                table: memory.allocate(16 * (batch + 2), 16)?,
                batch,
            })
        };
        let lanes: Vec<Lane> = (0..lanes).map(|_| lane()).collect::<Result<_>>()?;
        ring.watch(wait == Wait::Spin)?;
        let size = usize::from(ring.size());
        Ok(Self {
            memory,
            ring,
            pool,
            wait,
            lanes,
            lane_of: vec![None; size],
        })
    }

    /// Sends a request on a free lane: for each page its number, and where it lies (or shall lie) in
    /// memory. The device is not notified yet.
    ///
    /// # Errors
    ///
    /// When the ring is full.
    pub fn send(&mut self, lane: usize, ask: Ask, pages: &[(u32, u64)]) -> Result<()> {
        let place = &self.lanes[lane];
        ensure!(pages.len() <= place.batch, "the lane is too small");
        let code = if ask == Ask::Put { op::PUT } else { op::GET };
        let header = Request::header(code, self.pool, 0, pages.len());
        let mut head = [0; HEADER_SIZE + 4 * MAX_BATCH];
        let head = &mut head[..HEADER_SIZE + 4 * pages.len()];
        head[..HEADER_SIZE].copy_from_slice(header.as_bytes());
        for (to, (number, _)) in head[HEADER_SIZE..].chunks_exact_mut(4).zip(pages) {
            to.copy_from_slice(&number.to_le_bytes());
        }
        self.memory.write(place.head, head)?;

        let head_piece = piece(place.head, head.len(), false);
        let answer = piece(place.answer, RESPONSE_SIZE, true);
        let is_get = ask == Ask::Get;
        let bodies = pages.iter().map(|(_, at)| piece(*at, PAGE_SIZE, is_get));
        let mut table = [0; 16 * (MAX_BATCH + 2)];
        let table = &mut table[..16 * (pages.len() + 2)];
        if is_get {
            Ring::lay_out(&mut [head_piece, answer].into_iter().chain(bodies), table);
        } else {
            Ring::lay_out(
                &mut [head_piece].into_iter().chain(bodies).chain([answer]),
                table,
            );
        }
        self.memory.write(place.table, table)?;
        let entries = pages.len() + 2;
        let head = self.ring.submit_table(place.table, entries)?;
        self.lane_of[usize::from(head)] = Some(lane);
        Ok(())
    }

    /// Notifies the device of what was sent, if it wants to know.
    ///
    /// # Errors
    ///
    /// When it cannot.
    pub fn notify(&mut self) -> Result<()> {
        self.ring.notify().map(drop)
    }

    /// The next completed request.
    ///
    /// # Errors
    ///
    /// When there is none in time, or it was not done.
    pub fn wait(&mut self) -> Result<Done> {
        let (head, _) = match self.wait {
            Wait::Sleep => self.ring.wait_used(PATIENCE)?,
            Wait::Spin => self.ring.watch_used(PATIENCE)?,
        };
        let lane = self.lane_of[usize::from(head)].take();
        let lane = lane.context("a chain was completed that was not sent")?;
        self.done(lane)
    }

    fn done(&self, lane: usize) -> Result<Done> {
        let mut answer = [0; RESPONSE_SIZE];
        self.memory
            .read_into(self.lanes[lane].answer, &mut answer)?;
        let (first, results) = answer.split_at(RESPONSE_SIZE - MAX_BATCH);
        ensure!(
            first[0] == status::OK,
            "a request was answered {}",
            first[0]
        );
        let good = results.iter().filter(|one| **one == result::OK).count();
        Ok(Done { lane, good })
    }

    /// Sends requests, as many at a time as there are lanes, until `next` has no more, and waits for
    /// the last. Returns how many pages were stored or found.
    ///
    /// # Errors
    ///
    /// When one is not done.
    pub fn drive(
        &mut self,
        ask: Ask,
        mut next: impl FnMut(&mut Vec<(u32, u64)>) -> bool,
    ) -> Result<u64> {
        let mut pages = Vec::with_capacity(MAX_BATCH);
        let mut good = 0;
        let mut free: Vec<usize> = (0..self.lanes.len()).collect();
        let all = free.len();
        let mut is_more = true;
        loop {
            while is_more && let Some(lane) = free.last().copied() {
                pages.clear();
                is_more = next(&mut pages);
                if is_more {
                    free.pop();
                    self.send(lane, ask, &pages)?;
                }
            }
            self.notify()?;
            if free.len() == all {
                return Ok(good);
            }
            let done = self.wait()?;
            good += done.good as u64;
            free.push(done.lane);
        }
    }

    /// How long one request takes, from before it is sent until its answer was read.
    ///
    /// # Errors
    ///
    /// When it is not done.
    pub fn time_one(&mut self, ask: Ask, pages: &[(u32, u64)]) -> Result<Duration> {
        let began = Instant::now();
        self.send(0, ask, pages)?;
        self.notify()?;
        let done = self.wait()?;
        let took = began.elapsed();
        ensure!(done.good == pages.len(), "not every page was there");
        Ok(took)
    }
}

fn piece(address: u64, len: usize, writable: bool) -> Piece {
    Piece {
        address,
        // A request of 64 pages has not so many bytes.
        len: u32::try_from(len).unwrap_or(u32::MAX),
        writable,
    }
}
