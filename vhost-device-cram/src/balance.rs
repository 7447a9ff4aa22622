// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where a guest's pages are wanted: in its own memory, in the pool, or in both for a while.
//!
//! The operator says what is wanted; the guest's driver does it and reports how far it got. What
//! a driver reports is shown to the operator and believed in nothing else.

use std::sync::atomic::{AtomicBool, Ordering};

use cram_abi::wire::{Report, event, policy, progress};
use parking_lot::Mutex;

/// What becomes of the pool's copy of a page that its guest loaded back.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum, serde::Deserialize, schemars::JsonSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Copies {
    /// It goes at once: a page is in one place.
    Free,
    /// It stays until the page is written to, so that a clean page need not be put again.
    Keep,
    /// It stays while the pool has room to spare.
    Adaptive,
}

impl Copies {
    /// As the operator writes it.
    pub fn name(self) -> &'static str {
        match self {
            Copies::Free => "free",
            Copies::Keep => "keep",
            Copies::Adaptive => "adaptive",
        }
    }
}

/// What the operator wants of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// What becomes of copies.
    pub copies: Copies,
    /// Whether the driver squeezes the guest by itself.
    pub auto_squeeze: bool,
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            copies: Copies::Free,
            auto_squeeze: false,
        }
    }
}

/// How full the pool is for one guest: what it holds, in permille of what it may.
pub type Fullness = u64;

/// An adaptive pool that is fuller than this keeps no copies ...
const KEEP_BELOW: Fullness = 600;
/// ... until it is emptier than this.
const KEEP_AGAIN_BELOW: Fullness = 500;

/// What the operator asked a guest for, and how it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Errand {
    /// Pages asked for; 0 when nothing was.
    pub asked: u32,
    /// Pages freed or taken back so far, as the driver says.
    pub done: u32,
    /// One of [`progress`], or 0 before the first report.
    pub state: u16,
}

impl Errand {
    /// What the state is called.
    pub fn state_name(&self) -> &'static str {
        match (self.state, self.asked) {
            (progress::WORKING, _) => "working",
            (progress::THROTTLED, _) => "throttled",
            (progress::DONE, _) => "done",
            (progress::STOPPED, _) => "stopped",
            (_, 0) => "none",
            _ => "asked",
        }
    }
}

/// The guest's own memory, in pages, as its driver last reported it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GuestMemory {
    /// Free pages.
    pub free: u32,
    /// All pages.
    pub total: u32,
}

#[derive(Debug, Default)]
struct State {
    policy: Policy,
    squeeze: Errand,
    give_back: Errand,
    memory: GuestMemory,
}

/// What is wanted of one guest, and what it does about it.
#[derive(Debug)]
pub struct Balance {
    state: Mutex<State>,
    /// Whether an adaptive pool keeps copies now.
    keeps: AtomicBool,
}

impl Balance {
    /// With a policy, and nothing asked for.
    pub fn new(policy: Policy) -> Self {
        Balance {
            state: Mutex::new(State {
                policy,
                ..State::default()
            }),
            keeps: AtomicBool::new(true),
        }
    }

    /// What the operator wants.
    pub fn policy(&self) -> Policy {
        self.state.lock().policy
    }

    /// The operator wants something else.
    pub fn set_policy(&self, policy: Policy) {
        self.state.lock().policy = policy;
    }

    /// The policy as the configuration space has it; how full the pool is, is asked only when it
    /// matters.
    pub fn bits(&self, fullness: impl FnOnce() -> Fullness) -> u32 {
        let wanted = self.policy();
        let keep = match wanted.copies {
            Copies::Free => false,
            Copies::Keep => true,
            Copies::Adaptive => self.adapt(fullness()),
        };
        let mut bits = 0;
        if keep {
            bits |= policy::KEEP_COPIES;
        }
        if wanted.auto_squeeze {
            bits |= policy::AUTO_SQUEEZE;
        }
        bits
    }

    /// With a gap between giving up and keeping again, lest the guest walk its copies all the time.
    fn adapt(&self, fullness: Fullness) -> bool {
        let limit = match self.keeps.load(Ordering::Relaxed) {
            true => KEEP_BELOW,
            false => KEEP_AGAIN_BELOW,
        };
        let keeps = fullness < limit;
        self.keeps.store(keeps, Ordering::Relaxed);
        keeps
    }

    /// Forgets what was asked and reported, but not what the operator wants.
    pub fn forget(&self) {
        let mut state = self.state.lock();
        *state = State {
            policy: state.policy,
            ..State::default()
        };
    }

    /// The guest was asked to free pages.
    pub fn squeeze_asked(&self, pages: u32) {
        self.state.lock().squeeze = Errand {
            asked: pages,
            ..Errand::default()
        };
    }

    /// The guest was asked to take pages back.
    pub fn give_back_asked(&self, pages: u32) {
        self.state.lock().give_back = Errand {
            asked: pages,
            ..Errand::default()
        };
    }

    /// The driver reports. A report about something that was asked for before counts no more, but
    /// for the guest's memory; so does one of an unknown kind.
    pub fn report(&self, report: &Report) {
        let mut state = self.state.lock();
        state.memory = GuestMemory {
            free: report.free.get(),
            total: report.total.get(),
        };
        let errand = match report.kind.get() {
            event::SQUEEZE => &mut state.squeeze,
            event::GIVE_BACK => &mut state.give_back,
            _ => return,
        };
        if errand.asked == report.asked.get() {
            errand.done = report.done.get();
            errand.state = report.state.get();
        }
    }

    /// How the last squeeze goes.
    pub fn squeeze(&self) -> Errand {
        self.state.lock().squeeze
    }

    /// How the last give-back goes.
    pub fn give_back(&self) -> Errand {
        self.state.lock().give_back
    }

    /// The guest's memory, as its driver last said; `None` before it did.
    pub fn memory(&self) -> Option<GuestMemory> {
        let memory = self.state.lock().memory;
        (memory.total > 0).then_some(memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with(copies: Copies) -> Balance {
        Balance::new(Policy {
            copies,
            auto_squeeze: false,
        })
    }

    #[test]
    fn adaptive_copies_go_when_the_pool_fills_and_return_when_it_is_half_empty() {
        let balance = with(Copies::Adaptive);
        let keeps = |fullness| balance.bits(|| fullness) & policy::KEEP_COPIES != 0;
        assert!(keeps(0) && keeps(599));
        assert!(!keeps(600));
        assert!(!keeps(599) && !keeps(500));
        assert!(keeps(499) && keeps(550));
        assert_eq!(with(Copies::Keep).bits(|| 1000), policy::KEEP_COPIES);
        assert_eq!(with(Copies::Free).bits(|| 0), 0);
    }

    #[test]
    fn reports_of_older_errands_do_not_count() {
        let balance = with(Copies::Free);
        balance.squeeze_asked(100);
        let report = |asked: u32, done: u32| Report {
            kind: event::SQUEEZE.into(),
            state: progress::WORKING.into(),
            asked: asked.into(),
            done: done.into(),
            free: 7.into(),
            total: 9.into(),
            ..Report::default()
        };
        assert_eq!(balance.squeeze().state_name(), "asked");
        balance.report(&report(50, 50));
        assert_eq!(balance.squeeze().done, 0);
        assert_eq!(balance.memory(), Some(GuestMemory { free: 7, total: 9 }));
        balance.report(&report(100, 30));
        let squeeze = balance.squeeze();
        assert_eq!((squeeze.done, squeeze.state_name()), (30, "working"));
        assert_eq!(balance.give_back().state_name(), "none");
    }
}
