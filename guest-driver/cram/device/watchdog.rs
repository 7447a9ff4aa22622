// SPDX-License-Identifier: GPL-2.0

//! A back-end that takes requests and does not answer.
//!
//! The device's state says nothing of that: as long as the connection stands, READY is set. So
//! somebody looks now and then whether each queue gets on. One that has requests under way and has
//! answered none for `stall_ms` makes the device STALLED: pages are refused at once and go to the
//! swap device beneath, and loads that find no room are put off, so that no task is held up but
//! those that want the very pages that the back-end has. When that has lasted for
//! `load_timeout_ms`, the device is HUNG: who waits for a page gets an I/O error, now and later. Any
//! answer ends both.
//!
//! What is under way stays under way, since the device may read and write its memory until it has
//! answered or was reset. A reset is no way out: the carrier (QEMU) performs it by asking the very
//! back-end that does not answer, and the whole guest would wait with it. Nor is a copy of each
//! page, since it is the pages under way that need none:
//!
//! - Pages being stored stay under writeback. Reclaim passes over those (it activates them and
//!   takes others; see shrink_folio_list()), a task that faults on one maps it and goes on, and
//!   a process that ends leaves it behind. Only who waits for writeback is held up: swapoff,
//!   truncation of a tmpfs file, memory hot-unplug. There are at most [`SLOTS`] requests of 64
//!   pages on each queue.
//! - Pages being loaded are locked. At the end of the time frontswap unlocks them as pages that
//!   could not be read, with a reference of its own, so that their memory goes nowhere until the
//!   device is done with it.
//!
//! An answer that comes late is thus as good as one in time: a store ends its writeback, and
//! a loaded page that is still in the swap cache is what its slot holds.

use super::{state, Device};
#[allow(unused_imports)] // for the documentation
use crate::queue::SLOTS;
use kernel::{
    prelude::*,
    sync::{
        atomic::ordering::{Full, Relaxed},
        Arc, //
    },
    time::{Instant, Monotonic},
    workqueue::WorkItem, //
};

/// The shortest time between two looks.
const LOOK_MS: u32 = 10;

/// What was seen of a queue.
#[derive(Default)]
pub(super) struct Look {
    answered: u64,
    /// Since when there are requests under way and no more answers than these.
    since: Option<Instant<Monotonic>>,
}

impl Look {
    /// Looks again. Returns for how long the queue has not got on, in milliseconds; `None` when
    /// nothing is under way.
    fn update(&mut self, answered: u64, under_way: bool) -> Option<u64> {
        if !under_way {
            self.since = None;
            return None;
        }
        if self.since.is_none() || answered != self.answered {
            self.answered = answered;
            self.since = Some(Instant::now());
        }
        let since = self.since?;
        Some(since.elapsed().as_millis().max(0) as u64)
    }
}

/// How long until a queue that does not get on makes the device STALLED. Zero is never.
fn stall_ms() -> u64 {
    u64::from(crate::module_parameters::stall_ms.value())
}

impl WorkItem<3> for Device {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        let _noio = crate::work::NoIo::begin();
        this.watch_over();
    }
}

impl Device {
    /// A request is under way: have somebody look at it later. Any context.
    pub(super) fn arm_watchdog(self: &Arc<Self>) {
        // Nearly always it is armed already.
        if !self.watched.load(Relaxed) && !self.watched.xchg(true, Full) {
            self.schedule_watchdog();
        }
    }

    fn schedule_watchdog(self: &Arc<Self>) {
        let stall = crate::module_parameters::stall_ms.value();
        if stall != 0 && !self.gone.load(Relaxed) {
            self.workqueue.schedule::<_, 3>(
                self,
                kernel::time::msecs_to_jiffies((stall / 2).max(LOOK_MS)),
            );
        }
    }

    /// An answer has come: a device that was thought to be stuck is not. Any context.
    pub(super) fn answer_seen(self: &Arc<Self>) {
        let state = self.state.load(Relaxed);
        if (state == state::STALLED || state == state::HUNG) && !self.gone.load(Relaxed) {
            self.workqueue.schedule_now::<_, 3>(self);
        }
    }

    fn watch_over(self: &Arc<Self>) {
        let mut control = self.control.lock();
        // Who submits from here on arms it again; who did so before is seen below.
        self.watched.xchg(false, Full);
        let judged = self.is_judged();
        let mut stuck = None;
        for (queue, look) in self.queues.iter().zip(control.looks.iter_mut()) {
            if !judged {
                // What was not answered while there was no back-end does not count.
                *look = Look::default();
            }
            // An interrupt that is late, or was lost, is not the back-end's fault.
            self.reap(queue);
            let (answered, under_way) = queue.progress();
            stuck = stuck.max(look.update(answered, under_way));
        }
        if judged {
            self.judge(stuck);
        }
        if stuck.is_some() && !self.watched.xchg(true, Full) {
            self.schedule_watchdog();
        }
    }

    /// Is there a back-end that should answer?
    fn is_judged(&self) -> bool {
        let state = self.state.load(Relaxed);
        matches!(state, state::RUNNING | state::STALLED | state::HUNG)
    }

    /// The slowest queue has not got on for `stuck` milliseconds.
    fn judge(self: &Arc<Self>, stuck: Option<u64>) {
        let state = self.state.load(Relaxed);
        let index = self.virtio.index();
        let stuck = stuck.unwrap_or(0);
        if stuck < stall_ms() || stall_ms() == 0 {
            if state != state::RUNNING {
                pr_notice!("virtio{index}: the back-end answers again\n");
                self.set_state(state::RUNNING);
                self.schedule_flush();
            }
            return;
        }
        if state == state::RUNNING {
            pr_warn!("virtio{index}: the back-end does not answer, pages are refused\n");
            self.stats.stalls.add(1);
            self.set_state(state::STALLED);
        }
        let patience = u64::from(crate::module_parameters::load_timeout_ms.value());
        if stuck >= patience && state != state::HUNG {
            pr_err!("virtio{index}: the back-end still does not answer, its pages cannot be had\n");
            self.set_state(state::HUNG);
            for queue in self.queues.iter() {
                queue.give_up_loads();
            }
        }
    }
}
