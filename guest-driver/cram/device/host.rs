// SPDX-License-Identifier: GPL-2.0

//! What the host wishes of the guest's memory, and how it hears of it. See [`crate::balance`].

use super::{state, Device};
use crate::{
    memory,
    request::Request,
    wire, //
};
use kernel::{
    sync::{atomic::ordering::Relaxed, Arc},
    time::msecs_to_jiffies, //
};

impl Device {
    pub(super) fn schedule_balance_now(self: &Arc<Self>) {
        if !self.leaving.load(Relaxed) {
            self.balance_queue.schedule_now::<_, 2>(self);
        }
    }

    /// One step towards what the host wishes of the guest's memory.
    pub(super) fn rebalance(self: &Arc<Self>) {
        if self.leaving.load(Relaxed) {
            return;
        }
        let works = self.state.load(Relaxed) == state::RUNNING;
        let step = self
            .balance
            .lock()
            .step(&self.wishes, works, self.accepts());
        self.stats.squeezed_pages.add(step.squeezed);
        self.stats.given_back_pages.add(step.given_back);
        if let Some(report) = step.report {
            if self.virtio.has_feature(wire::feature::SQUEEZE)
                && works
            {
                self.control_request(&Request::report(&report));
            }
        }
        if let Some(delay_ms) = step.next_ms {
            if !self.leaving.load(Relaxed) {
                self.balance_queue
                    .schedule::<_, 2>(self, msecs_to_jiffies(delay_ms));
            }
        }
    }

    /// Does as the host's operator wants. A device that has no policy wants no page twice.
    pub(super) fn follow(self: &Arc<Self>, policy: u32) {
        let policy = match self.virtio.has_feature(wire::feature::POLICY) {
            true => policy,
            false => 0,
        };
        let keeps = policy & wire::policy::KEEP_COPIES != 0;
        let kept = self.keeps_copies.xchg(keeps, Relaxed);
        memory::set_exclusive(!keeps);
        if kept && !keeps {
            self.wishes.drop_copies();
            self.schedule_balance_now();
        }
        if self
            .wishes
            .set_auto(policy & wire::policy::AUTO_SQUEEZE != 0)
        {
            self.schedule_balance_now();
        }
    }
}
