// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The harness's end of `cram-workload pace`.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, anyhow, ensure};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::guest::{Guest, JobEvent, JobId, corpus_sum};

/// The longest that one step may take: several times what the slowest has been seen to take.
const STEP_LIMIT: Duration = Duration::from_secs(400);
/// How often the console is looked at while nothing else happens.
const LOOK: Duration = Duration::from_millis(500);
const PAGES_PER_MIB: u64 = 256;

/// What came of one step.
#[derive(Deserialize, Clone, Debug, Default)]
#[serde(default)]
pub(super) struct Done {
    pub(super) pages: u64,
    pub(super) touches: u64,
    pub(super) tree_pages: u64,
    pub(super) mismatches: u64,
    pub(super) lost: u64,
    pub(super) seconds: f64,
    pub(super) sum: String,
    pub(super) times_ns: Vec<(u64, u64)>,
    /// Pages that are not in the guest's memory.
    pub(super) away_pages: u64,
    wrong: Vec<String>,
    error: Option<String>,
}

/// Why a load did not come to its end.
#[derive(Debug)]
pub(super) enum Stop {
    /// The guest's kernel killed a process for want of memory.
    OutOfMemory,
    /// A step was not done in time.
    Stuck,
    /// Something is broken.
    Failed(Error),
}

impl From<Error> for Stop {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

/// The program in one guest.
pub(super) struct Pace<'a> {
    guest: &'a Guest,
    job: JobId,
    offset_mib: u64,
    mib: u64,
}

impl<'a> Pace<'a> {
    /// Starts the program, which waits to be asked.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub(super) fn start(guest: &'a Guest, offset_mib: u64, mib: u64) -> Result<Self> {
        let command = format!(
            "exec cram-workload pace --source /dev/vdc --offset-mib {offset_mib} --mib {mib}"
        );
        Ok(Self {
            guest,
            job: guest.agent()?.start(&command, Some("work"))?,
            offset_mib,
            mib,
        })
    }

    /// Pages of its memory.
    pub(super) fn pages(&self) -> u64 {
        self.mib * PAGES_PER_MIB
    }

    /// The guest that it runs in.
    pub(super) fn guest(&self) -> &Guest {
        self.guest
    }

    /// Fills its memory, `stamp_permille` of each thousand pages unlike those of other seeds.
    pub(super) fn ask_to_fill(&self, stamp_permille: u64, seed: u64) -> Result<()> {
        self.ask(&json!({ "fill": { "stamp_permille": stamp_permille, "seed": seed } }))
    }

    /// Notes the files that are read while it works.
    pub(super) fn ask_for_tree(&self, offset_mib: u64, mib: u64) -> Result<()> {
        self.ask(&json!({ "tree": { "offset_mib": offset_mib, "mib": mib } }))
    }

    /// Reads and compares every page.
    pub(super) fn ask_for_pass(&self, order: &str, seed: u64) -> Result<()> {
        self.ask(&json!({ "pass": { "order": order, "seed": seed } }))
    }

    /// Works on a part for a while.
    pub(super) fn ask_to_work(&self, work: &Work) -> Result<()> {
        self.ask(&json!({ "work": {
            "first": work.first, "pages": work.pages, "seconds": work.seconds, "seed": work.seed,
            "write_permille": work.write_permille, "with_tree": work.with_tree,
        } }))
    }

    fn ask(&self, ask: &Value) -> Result<()> {
        let line = format!("{ask}\n");
        self.guest.agent()?.send(self.job, Some(&line))
    }

    /// Waits for the answer to what was asked. A page with other bytes than it should have is
    /// a failure.
    pub(super) fn answer(&self, ahead: Duration) -> Result<Done, Stop> {
        let until = Instant::now() + ahead + STEP_LIMIT;
        loop {
            let event = self.guest.agent()?.poll_event(self.job, LOOK);
            if self.is_out_of_memory()? {
                return Err(Stop::OutOfMemory);
            }
            match event? {
                Some(JobEvent::Line(line)) => return Ok(good(&line)?),
                Some(JobEvent::ErrorLine(line)) => {
                    return Err(anyhow!("the load said: {line}").into());
                }
                Some(JobEvent::End(end)) => {
                    return Err(anyhow!("the load ended: {end:?}").into());
                }
                None => self.guest.expect_qemu_running()?,
            }
            if Instant::now() > until {
                return Err(Stop::Stuck);
            }
        }
    }

    /// Fails unless what was filled in is what the corpus holds.
    pub(super) fn check_fill(&self, done: &Done) -> Result<()> {
        let first = self.offset_mib * PAGES_PER_MIB;
        let expected = corpus_sum(self.guest.corpus(), first, self.pages())?;
        ensure!(
            done.sum == expected,
            "the guest was filled with other data than the corpus holds"
        );
        Ok(())
    }

    /// Whether the kernel has killed somebody. Any other complaint of its is a failure.
    fn is_out_of_memory(&self) -> Result<bool> {
        let splats = self.guest.console().splats()?;
        if splats.iter().any(|line| line.contains("Out of memory:")) {
            return Ok(true);
        }
        ensure!(
            splats.is_empty(),
            "the guest's kernel complained: {}",
            splats.join("; ")
        );
        Ok(false)
    }
}

fn good(line: &str) -> Result<Done> {
    let done: Done = serde_json::from_str(line).with_context(|| format!("the load said {line}"))?;
    if let Some(error) = &done.error {
        return Err(anyhow!("the load in the guest: {error}"));
    }
    ensure!(
        done.mismatches == 0 && done.lost == 0,
        "{} pages wrong, {} lost: {}",
        done.mismatches,
        done.lost,
        done.wrong.join("; ")
    );
    Ok(done)
}

/// Work on a part of the memory.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Work {
    pub(super) first: u64,
    pub(super) pages: u64,
    pub(super) seconds: f64,
    pub(super) seed: u64,
    pub(super) write_permille: u64,
    pub(super) with_tree: bool,
}

/// Times of touches, over several steps.
#[derive(Default)]
pub(super) struct Times(BTreeMap<u64, u64>);

impl Times {
    pub(super) fn add(&mut self, done: &Done) {
        for (ns, count) in &done.times_ns {
            *self.0.entry(*ns).or_default() += count;
        }
    }

    /// Microseconds below which so many of a thousand touches are; none when none was timed.
    pub(super) fn permille_us(&self, permille: u64) -> Option<f64> {
        let total: u64 = self.0.values().sum();
        let mut left = total * permille / 1000;
        for (ns, count) in &self.0 {
            if left < *count {
                return Some(Duration::from_nanos(*ns).as_secs_f64() * 1e6);
            }
            left -= count;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_a_middle_and_an_end() {
        let mut times = Times::default();
        assert_eq!(times.permille_us(500), None);
        let done = |times_ns| Done {
            times_ns,
            ..Done::default()
        };
        times.add(&done(vec![(1000, 90), (2000, 9)]));
        times.add(&done(vec![(50_000, 1)]));
        assert_eq!(times.permille_us(500), Some(1.0));
        assert_eq!(times.permille_us(950), Some(2.0));
        assert_eq!(times.permille_us(990), Some(50.0));
    }

    #[test]
    fn a_wrong_page_is_a_failure() {
        let line = r#"{"pages":3,"mismatches":1,"lost":0,"wrong":["page 2"],"error":null}"#;
        assert!(good(line).unwrap_err().to_string().contains("page 2"));
        assert_eq!(good(r#"{"pages":3}"#).unwrap().pages, 3);
    }
}
