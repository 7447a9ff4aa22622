// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Host bytes over time, from a thread of its own.

use std::fmt::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::host_swap::Gauge;
use crate::bench::figures::median;
use crate::guest::{HostBytes, Ledger};

/// Between two readings.
const EVERY: Duration = Duration::from_millis(100);
/// Between two exact ones, which cost more.
const EXACT_EVERY: Duration = Duration::from_secs(5);

/// One reading.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sample {
    /// Seconds since sampling began.
    pub(super) at_s: f64,
    pub(super) bytes: HostBytes,
    /// What the host's own compressed swap holds.
    pub(super) host_pool: u64,
}

impl Sample {
    pub(super) fn total(&self) -> u64 {
        self.bytes.total() + self.host_pool
    }
}

#[derive(Default)]
struct Taken {
    samples: Vec<Sample>,
    /// The greatest difference between an exact reading and the quick one before it, of the whole.
    error: f64,
    failure: Option<anyhow::Error>,
}

/// A thread that reads.
pub(super) struct Sampler {
    began: Instant,
    taken: Arc<Mutex<Taken>>,
    done: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Sampler {
    /// Starts reading.
    ///
    /// # Errors
    /// When a thread cannot be started.
    pub(super) fn start(mut ledger: Ledger, gauge: Option<Gauge>) -> Result<Self> {
        let began = Instant::now();
        let taken = Arc::new(Mutex::new(Taken::default()));
        let done = Arc::new(AtomicBool::new(false));
        let (told, asked) = (Arc::clone(&taken), Arc::clone(&done));
        let body = move || {
            let mut exact_at = began + EXACT_EVERY;
            let mut next = began;
            while !asked.load(Ordering::Relaxed) {
                let is_exact = Instant::now() >= exact_at;
                if is_exact {
                    exact_at = Instant::now() + EXACT_EVERY;
                }
                let read = read(&mut ledger, gauge.as_ref(), is_exact);
                let mut taken = told.lock().unwrap_or_else(PoisonError::into_inner);
                match read {
                    Ok((bytes, host_pool, error)) => {
                        taken.error = taken.error.max(error);
                        taken.samples.push(Sample {
                            at_s: began.elapsed().as_secs_f64(),
                            bytes,
                            host_pool,
                        });
                    }
                    Err(error) => {
                        taken.failure = Some(error);
                        return;
                    }
                }
                drop(taken);
                next = (next + EVERY).max(Instant::now());
                std::thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        };
        let thread = std::thread::Builder::new()
            .name("host bytes".to_owned())
            .spawn(body)?;
        Ok(Self {
            began,
            taken,
            done,
            thread: Some(thread),
        })
    }

    /// Seconds since it began.
    pub(super) fn now_s(&self) -> f64 {
        self.began.elapsed().as_secs_f64()
    }

    /// What was read in a stretch of time; the last reading before its end when that is all.
    pub(super) fn between(&self, from_s: f64, to_s: f64) -> Samples {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let mut upto = taken.samples.iter().filter(|sample| sample.at_s <= to_s);
        let mut within: Vec<_> = upto
            .clone()
            .filter(|sample| sample.at_s >= from_s)
            .copied()
            .collect();
        if within.is_empty() {
            within.extend(upto.next_back());
        }
        Samples(within)
    }

    fn stop(&mut self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }

    /// Ends reading.
    ///
    /// # Errors
    /// When it could not read at some time.
    pub(super) fn finish(mut self) -> Result<Course> {
        self.stop();
        let lasted_s = self.now_s();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(error) = taken.failure.take() {
            return Err(error.context("host bytes"));
        }
        Ok(Course {
            samples: Samples(std::mem::take(&mut taken.samples)),
            lasted_s,
            error: taken.error,
        })
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        // It has the guests' memory open, which must not outlive them.
        self.stop();
    }
}

fn read(
    ledger: &mut Ledger,
    gauge: Option<&Gauge>,
    is_exact: bool,
) -> Result<(HostBytes, u64, f64)> {
    let quick = ledger.quick()?;
    let (bytes, error) = if is_exact {
        let exact = ledger.exact()?;
        let difference = exact.total().abs_diff(quick.total());
        (exact, number(difference) / number(exact.total().max(1)))
    } else {
        (quick, 0.0)
    };
    let host_pool = gauge.map_or(Ok(0), Gauge::bytes)?;
    Ok((bytes, host_pool, error))
}

/// Readings of a stretch of time.
pub(super) struct Samples(pub(super) Vec<Sample>);

impl Samples {
    /// The greatest sum.
    pub(super) fn peak(&self) -> f64 {
        number(self.0.iter().map(Sample::total).max().unwrap_or(0))
    }

    /// The middle of something that each reading has.
    pub(super) fn middle(&self, of: impl Fn(&Sample) -> u64) -> f64 {
        median(self.0.iter().map(|sample| number(of(sample))).collect())
    }
}

/// A whole run.
pub(super) struct Course {
    pub(super) samples: Samples,
    lasted_s: f64,
    /// The greatest difference between an exact and a quick reading, of the whole.
    pub(super) error: f64,
}

impl Course {
    /// Readings a second.
    pub(super) fn rate(&self) -> f64 {
        number(self.samples.0.len() as u64) / self.lasted_s
    }

    /// One line for each reading.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let mut text = "seconds,guest,qemu,daemon,host_pool\n".to_owned();
        for sample in &self.samples.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{:.3},{},{},{},{}",
                sample.at_s,
                sample.bytes.guest,
                sample.bytes.qemu,
                sample.bytes.daemon,
                sample.host_pool
            );
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}

#[allow(clippy::cast_precision_loss, reason = "bytes for people")]
fn number(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Role;

    #[test]
    fn it_reads_on_until_it_is_told_to_stop() {
        let ledger = Ledger::new(&[(std::process::id(), Role::Daemon)]).unwrap();
        let sampler = Sampler::start(ledger, None).unwrap();
        while sampler.between(0.0, f64::INFINITY).0.len() < 3 {
            std::thread::yield_now();
        }
        let course = sampler.finish().unwrap();
        assert!(course.samples.peak() >= course.samples.middle(Sample::total));
        assert!(course.samples.middle(|sample| sample.bytes.daemon) > 0.0);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("course.csv");
        course.write(&path).unwrap();
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(text.lines().count(), course.samples.0.len() + 1);
    }

    #[test]
    fn a_process_that_ends_is_a_failure() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let ledger = Ledger::new(&[(child.id(), Role::Qemu)]).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let sampler = Sampler::start(ledger, None).unwrap();
        while !sampler.thread.as_ref().unwrap().is_finished() {
            std::thread::yield_now();
        }
        assert!(sampler.finish().is_err());
    }
}
