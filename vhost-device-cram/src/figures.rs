// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest's workers count and time, at no cost that could be measured beside a page.
//!
//! Each worker has figures of its own, on cache lines of their own, which nobody else writes to: to
//! count is a load and a store, without a lock and without another processor's cache line. Whoever
//! reads adds up the workers', and takes nothing from them.
//!
//! One request of [`TIMED`] is timed, since a look at the clock costs a hundredth of a page. The
//! choice is independent of what is asked for, so the distribution is that of all requests.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// One request of so many is timed. A prime number, lest the choice keep step with a driver's batches.
pub const TIMED: u32 = 17;
/// Buckets for each doubling: a bucket is an eighth of a power of two wide, so its middle is off by
/// a sixteenth at the most.
const STEP_BITS: u32 = 3;
const STEPS: u64 = 1 << STEP_BITS;
/// The doublings above the first eight nanoseconds: up to a minute and more.
const DOUBLINGS: usize = 33;
const BUCKETS: usize = (DOUBLINGS + 1) << STEP_BITS;

/// A counter that one thread writes to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds. Only for the one thread that writes: two would lose what the other adds.
    pub fn add(&self, n: u64) {
        self.0.store(self.0.load(Relaxed).wrapping_add(n), Relaxed);
    }

    /// What it is now.
    pub fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }
}

/// Times of one kind, as one worker took them: log-linear, from nanoseconds to a minute.
pub struct Times {
    buckets: [Counter; BUCKETS],
    sum_ns: Counter,
}

impl Default for Times {
    fn default() -> Self {
        Times {
            buckets: std::array::from_fn(|_| Counter::default()),
            sum_ns: Counter::default(),
        }
    }
}

fn bucket_of(ns: u64) -> usize {
    if ns < STEPS {
        return usize::try_from(ns).unwrap_or_default();
    }
    let doubling = ns.ilog2() - STEP_BITS;
    let step = (ns >> doubling) - STEPS;
    let index = u64::from(doubling + 1) * STEPS + step;
    usize::try_from(index).unwrap_or(BUCKETS).min(BUCKETS - 1)
}

/// The greatest time, in nanoseconds, that a bucket counts.
fn bucket_max(index: usize) -> u64 {
    let (doubling, step) = (index as u64 / STEPS, index as u64 % STEPS);
    match doubling {
        0 => step,
        _ => ((STEPS + step + 1) << (doubling - 1)) - 1,
    }
}

impl Times {
    fn record(&self, ns: u64) {
        if let Some(bucket) = self.buckets.get(bucket_of(ns)) {
            bucket.add(1);
        }
        self.sum_ns.add(ns);
    }
}

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// From a put's being taken from the ring to its being answered.
    Put,
    /// The same of a get.
    Get,
    /// From a worker's seeing a request in the ring to its taking it: how long those before it took.
    /// What passes before a worker looks is not in it.
    Queueing,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 3] = [Kind::Put, Kind::Get, Kind::Queueing];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Put => "put",
            Kind::Get => "get",
            Kind::Queueing => "queueing",
        }
    }
}

/// What one worker counts. Aligned so that no two share a cache line, nor a pair of them that is
/// fetched together.
#[derive(Default)]
#[repr(align(128))]
pub struct WorkerFigures {
    /// Chains completed on request queues.
    pub requests: Counter,
    /// Of these, malformed ones.
    pub malformed: Counter,
    /// Interrupts sent.
    pub interrupts: Counter,
    /// Times that the worker was woken.
    pub wakeups: Counter,
    /// Events delivered.
    pub events: Counter,
    /// Made when the first request is timed, so that a guest that never connects costs nothing.
    times: OnceLock<Box<[Times; Kind::ALL.len()]>>,
}

impl WorkerFigures {
    /// Records how long something took.
    pub fn record(&self, kind: Kind, time: Duration) {
        let times = self.times.get_or_init(Box::default);
        let times = match kind {
            Kind::Put => &times[0],
            Kind::Get => &times[1],
            Kind::Queueing => &times[2],
        };
        times.record(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX));
    }
}

/// Which request is timed next.
#[derive(Debug, Default)]
pub struct Sampler(u32);

impl Sampler {
    /// Whether one of the next `n` is.
    pub fn picks_within(&self, n: u16) -> bool {
        self.0 + u32::from(n) >= TIMED
    }

    /// Whether this one is.
    pub fn picks(&mut self) -> bool {
        self.0 = (self.0 + 1) % TIMED;
        self.0 == 0
    }
}

/// What all workers of a guest counted.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Sums {
    /// Chains completed on request queues.
    pub requests: u64,
    /// Of these, malformed ones.
    pub malformed: u64,
    /// Interrupts sent.
    pub interrupts: u64,
    /// Times that a worker was woken.
    pub wakeups: u64,
    /// Events delivered.
    pub events: u64,
}

/// The figures of all workers of a guest. They outlive its connections, of which there is one at a
/// time.
pub struct Figures(Box<[WorkerFigures]>);

impl Figures {
    /// For so many workers.
    pub fn new(workers: usize) -> Self {
        Figures((0..workers).map(|_| WorkerFigures::default()).collect())
    }

    /// Those of worker `number`.
    pub fn of(&self, number: usize) -> &WorkerFigures {
        // There are as many as a device has workers, and at least one.
        let last = self.0.len().saturating_sub(1);
        &self.0[number.min(last)]
    }

    /// All of them together.
    pub fn sums(&self) -> Sums {
        let sum = |of: fn(&WorkerFigures) -> &Counter| self.0.iter().map(|one| of(one).get()).sum();
        Sums {
            requests: sum(|one| &one.requests),
            malformed: sum(|one| &one.malformed),
            interrupts: sum(|one| &one.interrupts),
            wakeups: sum(|one| &one.wakeups),
            events: sum(|one| &one.events),
        }
    }

    /// All times of one kind.
    pub fn histogram(&self, kind: Kind) -> Histogram {
        let mut sum = Histogram::default();
        for times in self.0.iter().filter_map(|one| one.times.get()) {
            let times = match kind {
                Kind::Put => &times[0],
                Kind::Get => &times[1],
                Kind::Queueing => &times[2],
            };
            sum.sum_ns += times.sum_ns.get();
            for (count, bucket) in sum.counts.iter_mut().zip(&times.buckets) {
                *count += bucket.get();
            }
        }
        sum
    }
}

/// Times that were counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Histogram {
    counts: Box<[u64]>,
    /// Of all times, in nanoseconds.
    pub sum_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Histogram {
            counts: vec![0; BUCKETS].into_boxed_slice(),
            sum_ns: 0,
        }
    }
}

impl Histogram {
    /// How many there are.
    pub fn count(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// The buckets that count something: the greatest time in nanoseconds, and how many.
    pub fn buckets(&self) -> impl Iterator<Item = (u64, u64)> {
        let counted = self.counts.iter().copied().enumerate();
        let some = counted.filter(|(_, count)| *count > 0);
        some.map(|(index, count)| (bucket_max(index), count))
    }

    /// The time, in nanoseconds, that so many permille of all do not exceed, or a little more.
    pub fn quantile_ns(&self, permille: u64) -> Option<u64> {
        let wanted = (self.count() * permille).div_ceil(1000).max(1);
        let mut seen = 0;
        self.buckets().find_map(|(most, count)| {
            seen += count;
            (seen >= wanted).then_some(most)
        })
    }

    /// How many took no longer than this, as far as the buckets tell.
    pub fn up_to(&self, ns: u64) -> u64 {
        let below = self.buckets().take_while(|(most, _)| *most <= ns);
        below.map(|(_, count)| count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_the_bucket_that_says_so() {
        let mut before = None;
        for index in 0..BUCKETS {
            let most = bucket_max(index);
            assert_eq!(bucket_of(most), index, "{most}");
            if let Some(before) = before {
                assert_eq!(bucket_of(before + 1), index);
                // An eighth wide: the middle is off by a sixteenth at the most.
                assert!(most - before <= most / STEPS + 1, "{before} to {most}");
            }
            before = Some(most);
        }
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
        assert!(before > Some(60_000_000_000));
    }

    #[test]
    fn workers_are_added_up() {
        let figures = Figures::new(3);
        for (worker, ns) in [(0, 100), (1, 100), (2, 5000), (2, 1_000_000)] {
            figures.of(worker).requests.add(1);
            figures
                .of(worker)
                .record(Kind::Put, Duration::from_nanos(ns));
        }
        assert_eq!(figures.sums().requests, 4);
        let puts = figures.histogram(Kind::Put);
        assert_eq!((puts.count(), puts.sum_ns), (4, 1_005_200));
        let median = puts.quantile_ns(500).unwrap();
        assert!((100..=112).contains(&median), "{median}");
        let most = puts.quantile_ns(1000).unwrap();
        assert!((1_000_000..=1_125_000).contains(&most), "{most}");
        assert_eq!((puts.up_to(4000), puts.up_to(10_000)), (2, 3));
        assert_eq!(figures.histogram(Kind::Get).quantile_ns(500), None);
    }

    #[test]
    fn one_request_of_so_many_is_picked() {
        let mut sampler = Sampler::default();
        let mut promised = 0;
        let picked = (0..TIMED * 10)
            .filter(|_| {
                promised += u32::from(sampler.picks_within(1));
                sampler.picks()
            })
            .count();
        assert_eq!(promised, 10);
        assert_eq!(picked, 10);
    }

    #[test]
    fn two_workers_share_no_cache_line() {
        assert!(align_of::<WorkerFigures>() >= 128);
        assert_eq!(size_of::<WorkerFigures>() % 128, 0);
    }
}
