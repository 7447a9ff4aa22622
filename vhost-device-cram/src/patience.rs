// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long a worker watches its rings before it sleeps.
//!
//! Waking a thread costs more than compressing several pages, so it pays to watch for a while when
//! the next request is likely to come soon; and it burns a processor when it is not. So the time
//! adapts, in the way of KVM's halt polling (Linux, `virt/kvm/kvm_main.c`): a sleep that turned out
//! to be short makes the next watch longer, a long one ends watching. A device that is idle, or gets a
//! request now and then, is not watched at all.

use std::time::{Duration, Instant};

/// The first step up from nothing.
const FIRST: Duration = Duration::from_micros(10);

/// See the module's text.
#[derive(Debug)]
pub struct Patience {
    max: Duration,
    window: Duration,
    asleep_since: Option<Instant>,
}

impl Patience {
    /// Watches for `max` at the most; never, when that is zero.
    pub fn new(max: Duration) -> Self {
        Self {
            max,
            window: Duration::ZERO,
            asleep_since: None,
        }
    }

    /// How long to watch now.
    pub fn window(&self) -> Duration {
        self.window
    }

    /// The worker goes to sleep.
    pub fn sleeps(&mut self, now: Instant) {
        // Not at all worth a look at the clock: there is nothing to adapt.
        if !self.max.is_zero() {
            self.asleep_since = Some(now);
        }
    }

    /// It was woken by a request.
    pub fn wakes(&mut self, now: Instant) {
        let Some(since) = self.asleep_since.take() else {
            return;
        };
        let slept = now.saturating_duration_since(since);
        self.window = if slept <= self.max {
            (self.window * 2).max(FIRST).min(self.max)
        } else {
            Duration::ZERO
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn us(n: u64) -> Duration {
        Duration::from_micros(n)
    }

    fn nap(patience: &mut Patience, now: &mut Instant, length: Duration) {
        patience.sleeps(*now);
        *now += length;
        patience.wakes(*now);
    }

    #[test]
    fn short_sleeps_make_it_longer_and_a_long_one_ends_it() {
        let (mut patience, mut now) = (Patience::new(us(50)), Instant::now());
        assert_eq!(patience.window(), us(0));
        let mut windows = Vec::new();
        for _ in 0..4 {
            nap(&mut patience, &mut now, us(30));
            windows.push(patience.window());
        }
        assert_eq!(windows, [us(10), us(20), us(40), us(50)]);
        nap(&mut patience, &mut now, us(51));
        assert_eq!(patience.window(), us(0));
    }

    #[test]
    fn a_limit_of_nothing_is_nothing() {
        let (mut patience, mut now) = (Patience::new(us(0)), Instant::now());
        nap(&mut patience, &mut now, us(0));
        assert_eq!(patience.window(), us(0));
        let mut short = Patience::new(us(3));
        nap(&mut short, &mut now, us(1));
        assert_eq!(short.window(), us(3));
    }
}
