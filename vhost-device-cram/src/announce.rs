// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Telling guests that their pressure or quota changed, seldom enough to cost nothing.
//!
//! Workers poke when they have changed what the store holds. One thread then looks at every
//! guest, and announces what differs enough from what it announced last; it looks at most once
//! every [`INTERVAL`], and sleeps for ever while nobody pokes.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use cram_abi::wire::PRESSURE_MAX;

/// Shortest time between two announcements to a guest: ten a second, as the protocol asks.
pub const INTERVAL: Duration = Duration::from_millis(100);
/// A pressure is announced when it is this far from the one announced before.
const STEP: u32 = 100;
/// Having announced "nothing is taken any more", announce again only when there is some room.
const ROOM_AGAIN: u32 = PRESSURE_MAX - 50;

/// The bell between workers and the announcing thread.
#[derive(Debug, Default)]
pub struct Announcer {
    poked: AtomicBool,
    stopping: AtomicBool,
    thread: OnceLock<Thread>,
}

impl Announcer {
    /// Something changed. Called for each batch, so one load when it was poked already.
    pub fn poke(&self) {
        if !self.poked.load(Ordering::Relaxed)
            && !self.poked.swap(true, Ordering::AcqRel)
            && let Some(thread) = self.thread.get()
        {
            thread.unpark();
        }
    }

    /// Ends [`Announcer::run`].
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        if let Some(thread) = self.thread.get() {
            thread.unpark();
        }
    }

    /// Calls `round` after pokes until stopped. One thread only.
    pub fn run(&self, mut round: impl FnMut()) {
        // A second thread would find the place taken, and sleep without being woken.
        let _ = self.thread.set(thread::current());
        while !self.stopping.load(Ordering::Acquire) {
            if !self.poked.swap(false, Ordering::AcqRel) {
                thread::park();
                continue;
            }
            round();
            let until = Instant::now() + INTERVAL;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                if left.is_zero() || self.stopping.load(Ordering::Acquire) {
                    break;
                }
                thread::park_timeout(left);
            }
        }
    }
}

/// Whether a pressure of `now` is worth an interrupt when `announced` was announced last.
pub fn is_worth_announcing(announced: u32, now: u32) -> bool {
    if announced >= PRESSURE_MAX {
        return now <= ROOM_AGAIN;
    }
    now >= PRESSURE_MAX || (now == 0 && announced > 0) || now.abs_diff(announced) >= STEP
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coarse_steps_only() {
        assert!(!is_worth_announcing(0, 99));
        assert!(is_worth_announcing(0, 100));
        assert!(!is_worth_announcing(500, 401));
        assert!(is_worth_announcing(500, 400));
        assert!(is_worth_announcing(980, 1000));
        assert!(!is_worth_announcing(1000, 1000));
        assert!(!is_worth_announcing(1000, 960));
        assert!(is_worth_announcing(1000, 950));
        assert!(is_worth_announcing(50, 0));
        assert!(!is_worth_announcing(0, 0));
    }
}
