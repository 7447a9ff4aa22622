// SPDX-License-Identifier: GPL-2.0

//! How much of the guest's memory is in the guest: what the host wishes, done step by step.
//!
//! Three things are done here, by one work item, one step at a time:
//!
//! - a *squeeze*: cold pages go to the device, and what becomes free goes to the host by the
//!   balloon's free page reporting;
//! - a *give-back*: pages of the device are taken back into free memory;
//! - a gentle squeeze without end, when the host's policy says so.
//!
//! A squeeze takes its speed from how long tasks wait for memory (PSI), after senpai (Weiner et
//! al., "TMO: Transparent Memory Offloading in Datacenters", ASPLOS 2022): it doubles its step while
//! nobody waits, and pauses while somebody does.

use crate::{
    memory,
    wire::{self, progress}, //
};
use kernel::{
    sync::atomic::{ordering::Relaxed, Atomic},
    time::{Instant, Monotonic}, //
};

/// Time between two steps.
const STEP_MS: u32 = 50;
/// Pages of the first step, and of each after a pause.
const STEP_PAGES_MIN: usize = 256;
/// Pages of a step at the most.
const STEP_PAGES_MAX: usize = 8192;
/// A squeeze that somebody asked for pauses while tasks wait for more than this share of the time.
const STALL_PERMILLE_MAX: u64 = 100;
/// So many steps without a free page end an errand.
const STEPS_IN_VAIN_MAX: u32 = 40;
/// The driver reports after so many steps.
const REPORT_STEPS: u32 = 10;

/// Time between two steps of the squeeze without end.
const AUTO_MS: u32 = 2000;
/// Each of its steps is at most this part of all memory.
const AUTO_PART: usize = 400;
/// It does less the longer tasks wait, and nothing from this share of the time on.
const AUTO_STALL_PPM_MAX: u64 = 1000;
/// It reports after so many steps.
const AUTO_REPORT_STEPS: u32 = 5;

/// A wish is stored with this bit, so that a wish for nothing is one, too.
const WISHED: u64 = 1 << 32;

/// What the host wishes, as events and the configuration space tell it. Any context.
pub(crate) struct Wishes {
    squeeze: Atomic<u64>,
    give_back: Atomic<u64>,
    auto: Atomic<bool>,
    drop_copies: Atomic<bool>,
}

impl Wishes {
    /// None.
    pub(crate) fn new() -> Self {
        Self {
            squeeze: Atomic::new(0),
            give_back: Atomic::new(0),
            auto: Atomic::new(false),
            drop_copies: Atomic::new(false),
        }
    }

    /// The host wishes `pages` pages of the guest's memory to be freed.
    pub(crate) fn squeeze(&self, pages: u32) {
        self.squeeze.store(WISHED | u64::from(pages), Relaxed);
    }

    /// The host wishes `pages` pages to be taken back.
    pub(crate) fn give_back(&self, pages: u32) {
        self.give_back.store(WISHED | u64::from(pages), Relaxed);
    }

    /// The host wishes a squeeze without end, or no longer. True when that is new.
    pub(crate) fn set_auto(&self, auto: bool) -> bool {
        self.auto.xchg(auto, Relaxed) != auto
    }

    /// The host wants no page that is in the guest's memory as well.
    pub(crate) fn drop_copies(&self) {
        self.drop_copies.store(true, Relaxed);
    }

    fn take(wish: &Atomic<u64>) -> Option<u32> {
        let taken = wish.xchg(0, Relaxed);
        (taken & WISHED != 0).then_some(taken as u32)
    }
}

/// What was asked for, and how far it got.
struct Errand {
    asked: usize,
    done: usize,
    state: u16,
    step: usize,
    steps_in_vain: u32,
    steps: u32,
}

impl Errand {
    fn new(asked: u32) -> Self {
        Self {
            asked: asked as usize,
            done: 0,
            state: progress::WORKING,
            step: STEP_PAGES_MIN,
            steps_in_vain: 0,
            steps: 0,
        }
    }

    fn goes_on(&self) -> bool {
        matches!(self.state, progress::WORKING | progress::THROTTLED)
    }

    /// Pages of the next step.
    fn wanted(&self) -> usize {
        self.step.min(self.asked.saturating_sub(self.done))
    }

    fn pause(&mut self) {
        self.state = progress::THROTTLED;
        self.step = STEP_PAGES_MIN;
    }

    fn advance(&mut self, pages: usize) {
        self.done += pages;
        self.state = progress::WORKING;
        if pages == 0 {
            self.steps_in_vain += 1;
        } else {
            self.steps_in_vain = 0;
            self.step = (self.step * 2).min(STEP_PAGES_MAX);
        }
        if self.done >= self.asked {
            self.state = progress::DONE;
        } else if self.steps_in_vain >= STEPS_IN_VAIN_MAX {
            self.state = progress::STOPPED;
        }
    }

    fn report(&self, kind: u16) -> wire::Report {
        let size = memory::size();
        let clamp = |pages: usize| u32::try_from(pages).unwrap_or(u32::MAX);
        wire::Report {
            kind: kind.into(),
            state: self.state.into(),
            asked: clamp(self.asked).into(),
            done: clamp(self.done).into(),
            free: clamp(size.free).into(),
            total: clamp(size.total).into(),
            ..Default::default()
        }
    }

    /// Counts a step. True when it is time to report.
    fn is_report_due(&mut self, every: u32) -> bool {
        self.steps += 1;
        self.steps % every == 1 || !self.goes_on()
    }
}

/// What came of a step.
pub(crate) struct Step {
    /// To be sent to the device.
    pub(crate) report: Option<wire::Report>,
    /// When to make the next step, in milliseconds; `None` when there is nothing to do.
    pub(crate) next_ms: Option<u32>,
    /// Pages that were freed.
    pub(crate) squeezed: usize,
    /// Pages that the device does not keep any more.
    pub(crate) given_back: usize,
}

/// What is being done.
pub(crate) struct Balance {
    squeeze: Option<Errand>,
    give_back: Option<Errand>,
    auto: Errand,
    looked: Instant<Monotonic>,
    stall_ns: u64,
}

impl Balance {
    /// Nothing.
    pub(crate) fn new() -> Self {
        Self {
            squeeze: None,
            give_back: None,
            auto: Errand::new(0),
            looked: Instant::now(),
            stall_ns: 0,
        }
    }

    /// One step. `works` says whether the device answers, and `accepts` whether it takes pages now.
    /// May sleep, for long.
    pub(crate) fn step(&mut self, wishes: &Wishes, works: bool, accepts: bool) -> Step {
        let mut step = Step {
            report: None,
            next_ms: None,
            squeezed: 0,
            given_back: 0,
        };
        if let Some(pages) = Wishes::take(&wishes.squeeze) {
            self.squeeze = Some(Errand::new(pages));
            self.stall_ppm();
        }
        if let Some(pages) = Wishes::take(&wishes.give_back) {
            let mut errand = Errand::new(pages);
            if pages > 0 {
                // Pages that are in memory as well go first, since that costs nothing.
                errand.done = memory::drop_copies();
                step.given_back += errand.done;
            }
            self.give_back = Some(errand);
        }
        if wishes.drop_copies.xchg(false, Relaxed) {
            step.given_back += memory::drop_copies();
        }
        if self.squeeze.is_some() {
            self.squeeze_step(&mut step, accepts);
        } else if self.give_back.is_some() {
            self.give_back_step(&mut step, works);
        } else if wishes.auto.load(Relaxed) {
            self.auto_step(&mut step, accepts);
        }
        step
    }

    /// The share of the time since the last call in which some task waited for memory, in parts
    /// per million.
    fn stall_ppm(&mut self) -> u64 {
        let stall_ns = memory::stall_ns();
        let passed_us = self.looked.elapsed().as_micros_ceil().max(1) as u64;
        let stalled_us = stall_ns.saturating_sub(self.stall_ns) / 1000;
        self.looked = Instant::now();
        self.stall_ns = stall_ns;
        stalled_us.saturating_mul(1_000_000) / passed_us
    }

    fn squeeze_step(&mut self, step: &mut Step, accepts: bool) {
        let stall_ppm = self.stall_ppm();
        let Some(errand) = &mut self.squeeze else {
            return;
        };
        if !accepts {
            // What the device refuses would go to the disk, and nobody asked for that.
            errand.state = progress::STOPPED;
        } else if stall_ppm > STALL_PERMILLE_MAX * 1000 {
            errand.pause();
        } else {
            let freed = match errand.wanted() {
                0 => 0,
                pages => memory::shrink(pages),
            };
            errand.advance(freed);
            step.squeezed = freed;
        }
        if errand.is_report_due(REPORT_STEPS) {
            step.report = Some(errand.report(wire::event::SQUEEZE));
        }
        step.next_ms = Some(STEP_MS);
        if !errand.goes_on() {
            self.squeeze = None;
        }
    }

    fn give_back_step(&mut self, step: &mut Step, works: bool) {
        let Some(errand) = &mut self.give_back else {
            return;
        };
        if works {
            let brought = match errand.wanted() {
                0 => 0,
                pages => memory::bring_back(pages),
            };
            errand.advance(brought);
            step.given_back += brought;
        } else {
            // Each page would cost an error, or a wait for a back-end that may not come back.
            errand.state = progress::STOPPED;
        }
        if errand.is_report_due(REPORT_STEPS) {
            step.report = Some(errand.report(wire::event::GIVE_BACK));
        }
        step.next_ms = Some(STEP_MS);
        if !errand.goes_on() {
            self.give_back = None;
        }
    }

    fn auto_step(&mut self, step: &mut Step, accepts: bool) {
        let stall_ppm = self.stall_ppm().min(AUTO_STALL_PPM_MAX);
        let most = memory::size().total / AUTO_PART;
        let room = (AUTO_STALL_PPM_MAX - stall_ppm) as usize;
        let pages = most * room / AUTO_STALL_PPM_MAX as usize;
        self.auto.state = progress::THROTTLED;
        if accepts && pages > 0 {
            let freed = memory::shrink(pages);
            self.auto.done += freed;
            self.auto.state = progress::WORKING;
            step.squeezed = freed;
        }
        if self.auto.is_report_due(AUTO_REPORT_STEPS) {
            step.report = Some(self.auto.report(wire::event::SQUEEZE));
        }
        step.next_ms = Some(AUTO_MS);
    }
}
