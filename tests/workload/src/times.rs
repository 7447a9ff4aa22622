// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How long things took: counts by duration, each step an eighth of a power of two.

use std::time::Duration;

/// Steps of each power of two, as a power of two.
const STEP_BITS: u32 = 3;
const STEPS: u64 = 1 << STEP_BITS;
/// More than there are powers of two.
const STEPS_OF_ALL: usize = 64 << STEP_BITS;

/// Counts by duration.
#[derive(Debug)]
pub(crate) struct Times(Vec<u32>);

impl Times {
    pub(crate) fn new() -> Self {
        Self(vec![0; STEPS_OF_ALL])
    }

    pub(crate) fn note(&mut self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        if let Some(count) = self.0.get_mut(step_of(ns)) {
            *count = count.saturating_add(1);
        }
    }

    /// The steps that have something: where each begins, in nanoseconds, and its count.
    pub(crate) fn counts(&self) -> Vec<(u64, u32)> {
        let steps = self.0.iter().enumerate();
        steps
            .filter(|(_, count)| **count > 0)
            .map(|(step, count)| (begin_of(step as u64), *count))
            .collect()
    }
}

fn step_of(ns: u64) -> usize {
    let step = if ns < STEPS {
        ns
    } else {
        let power = ns.ilog2() - STEP_BITS;
        let within = (ns >> power) & (STEPS - 1);
        u64::from(power + 1) * STEPS + within
    };
    usize::try_from(step).unwrap_or(usize::MAX)
}

fn begin_of(step: u64) -> u64 {
    let (power, within) = (step / STEPS, step % STEPS);
    match power {
        0 => within,
        _ => (STEPS + within) << (power - 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_begins_at_or_an_eighth_below_what_is_in_it() {
        for ns in (0..3000).chain([1 << 20, (1 << 40) + 12345, u64::MAX]) {
            let begin = begin_of(step_of(ns) as u64);
            assert!(begin <= ns && ns - begin <= ns / 8, "{ns} is in {begin}");
        }
    }

    #[test]
    fn what_is_noted_is_counted() {
        let mut times = Times::new();
        for ns in [5, 5, 1000] {
            times.note(Duration::from_nanos(ns));
        }
        assert_eq!(times.counts(), [(5, 2), (960, 1)]);
    }
}
