// SPDX-License-Identifier: GPL-2.0

//! What a device does for frontswap: pages out, pages in, slots freed.

use super::{state, Device};
use crate::{
    areas,
    frontswap::{self, Batch, Token},
    queue::{Flushed, RequestQueue, Submitted},
    request::{Purpose, Request, Transfer},
    wire, //
};
use kernel::{
    cpu::CpuId,
    prelude::*,
    sync::{atomic::ordering::Relaxed, Arc},
    time::{msecs_to_jiffies, Delta, Instant, Monotonic}, //
};

/// Freed slots are reported after this time, so that many go at once.
const FLUSH_DELAY_MS: u32 = 10;
/// How often a processor that watches for an answer pauses between two looks: a fraction of a
/// microsecond.
const PAUSES: u32 = 16;

impl Device {
    /// How many queues carry puts and flushes: they are the first. The others carry gets, so that
    /// no get stands behind the puts of others. That keeps the order of operations on one page:
    /// a get and a put or flush of the same slot are never under way at the same time, since each
    /// of them needs the folio in the swap cache, or that there is none. (A get that was given up
    /// may be under way still, but nobody looks at what it brings once its folio has left the swap
    /// cache.)
    fn put_queues(&self) -> usize {
        self.queues.len().div_ceil(2)
    }

    /// The queue that carries a put. The batch's slots are all of one region.
    fn put_queue(&self, batch: &Batch<'_>) -> Option<&RequestQueue> {
        let offset = batch.segments().next()?.offset as usize;
        let index = areas::queue_of(offset, self.put_queues());
        self.queues.get(index).map(|queue| &**queue)
    }

    /// The queue that carries a get.
    fn get_queue(&self) -> Option<&RequestQueue> {
        let puts = self.put_queues();
        let index = match self.queues.len() - puts {
            0 => 0,
            gets => puts + CpuId::current().as_u32() as usize % gets,
        };
        self.queues.get(index).map(|queue| &**queue)
    }

    /// May pages be put?
    pub(super) fn accepts(&self) -> bool {
        self.state.load(Relaxed) == state::RUNNING
            && self.pressure.load(Relaxed) < wire::PRESSURE_MAX
    }

    /// Tells the device about freed slots, as long as there is room on the queues. What is left
    /// waits for the flushes under way to end, or for the device to run again.
    pub(super) fn flush(self: &Arc<Self>) {
        if self.gone.load(Relaxed) || self.state.load(Relaxed) != state::RUNNING {
            return;
        }
        self.flush_objects();
        let nr = self.put_queues();
        for (index, queue) in self.queues.iter().take(nr).enumerate() {
            loop {
                let flushed = queue.submit_flush(
                    |flush| self.areas.take(index, nr, flush),
                    |flush| self.areas.put(flush, false),
                );
                match flushed {
                    Flushed::Yes(pages) => {
                        self.stats.flush_requests.add(1);
                        self.stats.pages_flushed.add(pages);
                        self.arm_watchdog();
                    }
                    Flushed::Nothing => break,
                    Flushed::NoRoom => {
                        // The next flush that ends makes room, or else there is some later.
                        self.flush_waits.store(true, Relaxed);
                        self.schedule_flush();
                        break;
                    }
                }
            }
        }
    }

    /// Flushes what swap devices that are gone have left.
    fn flush_objects(self: &Arc<Self>) {
        let Some(queue) = self.queues.first() else {
            return;
        };
        while let Some(object) = self.areas.take_object() {
            let request = Request::flush_object(object);
            let submitted = queue.submit_now(&request, Purpose::Object(object));
            if !matches!(submitted, Submitted::Yes(_)) {
                self.areas.put_object(object, false);
                self.schedule_flush();
                break;
            }
            self.stats.flush_requests.add(1);
            self.arm_watchdog();
        }
    }

    /// A flush has ended, and others wait for that.
    pub(super) fn flush_on(self: &Arc<Self>) {
        self.flush_waits.store(false, Relaxed);
        if !self.gone.load(Relaxed) {
            self.workqueue.schedule_now::<_, 0>(self);
        }
    }

    pub(super) fn schedule_flush(self: &Arc<Self>) {
        if !self.gone.load(Relaxed) {
            self.workqueue
                .schedule::<_, 0>(self, msecs_to_jiffies(FLUSH_DELAY_MS));
        }
    }

    /// Watches for the answer to request `number` for a short while.
    fn watch(self: &Arc<Self>, queue: &RequestQueue, number: u64) {
        let limit = Delta::from_micros(i64::from(crate::module_parameters::load_spin_us.value()));
        let since = Instant::<Monotonic>::now();
        while since.elapsed() < limit {
            // No answer is there at once.
            for _ in 0..PAUSES {
                kernel::processor::cpu_relax();
            }
            if queue.has_answer() {
                self.reap(queue);
            }
            if queue.answered() >= number {
                self.stats.gets_watched.add(1);
                break;
            }
        }
        while !queue.end_watch() {
            self.reap(queue);
        }
    }
}

impl frontswap::Backend for Device {
    fn init(self: &Arc<Self>, swap_type: u32, slots: usize) -> Result {
        self.areas.add(swap_type, slots)
    }

    fn exit(self: &Arc<Self>, swap_type: u32) {
        self.areas.remove(swap_type);
        self.schedule_flush();
    }

    fn store(self: &Arc<Self>, batch: &Batch<'_>, token: Token) -> Result<(), Token> {
        let Some(queue) = self.accepts().then(|| self.put_queue(batch)).flatten() else {
            self.stats.puts_not_tried.add(batch.pages());
            return Err(token);
        };
        let request = Request::put(self.areas.object(batch.swap_type()), batch);
        let purpose = Purpose::Store(Transfer::new(batch, token));
        let submitted = queue.submit(&request, purpose, batch, false, || {
            for segment in batch.segments() {
                self.areas
                    .unmark(batch.swap_type(), segment.offset as usize, segment.pages);
            }
        });
        match submitted {
            Submitted::Yes(_) => {
                self.stats.put_requests.add(1);
                self.arm_watchdog();
                Ok(())
            }
            Submitted::Later(purpose) | Submitted::No(purpose) => {
                self.stats.puts_not_tried.add(batch.pages());
                purpose.into_token().map_or(Ok(()), Err)
            }
        }
    }

    fn load(self: &Arc<Self>, batch: &Batch<'_>, token: Token) -> Result<(), Token> {
        let Some(queue) = self.get_queue() else {
            return Err(token);
        };
        let request = Request::get(self.areas.object(batch.swap_type()), batch);
        let purpose = Purpose::Load(Transfer::new(batch, token));
        let watch = crate::module_parameters::load_spin_us.value() != 0;
        batch.touch();
        match queue.submit(&request, purpose, batch, watch, || ()) {
            Submitted::Yes(number) => {
                self.stats.get_requests.add(1);
                self.arm_watchdog();
                if watch {
                    self.watch(queue, number);
                }
                Ok(())
            }
            Submitted::Later(purpose) => {
                self.stats.loads_again.add(1);
                if let Some(token) = purpose.into_token() {
                    token.again();
                }
                Ok(())
            }
            Submitted::No(purpose) => {
                self.stats.gets_failed.add(batch.pages());
                purpose.into_token().map_or(Ok(()), Err)
            }
        }
    }

    fn invalidate(self: &Arc<Self>, swap_type: u32, offset: usize, nr: usize) {
        self.areas.mark(swap_type, offset, nr);
        self.schedule_flush();
    }
}
