// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One load in one guest, and what came of it.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::rig::{Moved, Rig};
use crate::guest::{LoadEvent, LoadOptions, LoadReport, LoadRun};

/// How long a guest may take to become idle, before and after a load.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How often the console is looked at while nothing else happens.
const LOOK: Duration = Duration::from_millis(500);

/// How a load ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ended {
    /// Every page was read back as often as was asked for, and each was as it should be.
    Completed,
    /// The guest's kernel killed a process for want of memory.
    OutOfMemory,
    /// It was not done in time.
    Stuck,
}

/// What came of a load.
#[derive(Clone, Copy, Debug)]
pub(super) struct Outcome {
    /// How it ended.
    pub(super) ended: Ended,
    /// Seconds from its start to its end, by the host's clock.
    pub(super) wall_s: f64,
    /// Instructions that the guest executed, when they are counted.
    pub(super) instructions: Option<u64>,
    /// Pages that went out and came back.
    pub(super) moved: Moved,
}

/// The load that everything is compared with: one process fills memory with real data, reads all
/// of it in order and once more at random, and compares each page with its checksum.
pub(super) fn load_of(mib: u64) -> LoadOptions {
    LoadOptions {
        mib,
        processes: 1,
        passes: "sequential,random".to_owned(),
        rewrite_permille: 0,
        ..LoadOptions::default()
    }
}

/// Runs a load, with a word to standard error at each of its steps.
///
/// # Errors
/// When the guest does not answer, or a page was not as it should be.
pub(super) fn run(rig: &Rig, load: &LoadOptions, limit: Duration) -> Result<Outcome> {
    let counter = rig.guest().counter().ok();
    let instructions = || counter.map(|c| c.total_when_idle(IDLE_LIMIT)).transpose();
    let moved_before = rig.moved()?;
    let before = instructions()?;
    let began = Instant::now();
    let (ended, report) = watch(rig, load, limit)?;
    let wall_s = began.elapsed().as_secs_f64();
    let Some(report) = report else {
        // Such a guest may not even answer any more.
        let moved = rig.moved().unwrap_or(moved_before).since(moved_before);
        return Ok(Outcome {
            ended,
            wall_s,
            instructions: None,
            moved,
        });
    };
    let after = instructions()?;
    report.expect_good()?;
    load.check_sums(rig.guest().corpus(), &report.sums)?;
    Ok(Outcome {
        ended,
        wall_s,
        instructions: after.zip(before).map(|(after, before)| after - before),
        moved: rig.moved()?.since(moved_before),
    })
}

/// Waits for the load's end; a load that completed has a report.
fn watch(rig: &Rig, load: &LoadOptions, limit: Duration) -> Result<(Ended, Option<LoadReport>)> {
    let guest = rig.guest();
    let until = Instant::now() + limit;
    let mut run = LoadRun::start(guest, load)?;
    loop {
        let event = match run.poll(LOOK) {
            Ok(event) => event,
            Err(error) if out_of_memory(rig)? => {
                log::debug!("out of memory: {error:#}");
                return Ok((Ended::OutOfMemory, None));
            }
            Err(error) => return Err(error),
        };
        match event {
            Some(LoadEvent::Step(step, seconds)) => eprint!(" {step} {seconds:.1} s"),
            Some(LoadEvent::Finished(_)) if out_of_memory(rig)? => {
                return Ok((Ended::OutOfMemory, None));
            }
            Some(LoadEvent::Finished(report)) => {
                return Ok((Ended::Completed, Some(report)));
            }
            None if out_of_memory(rig)? => return Ok((Ended::OutOfMemory, None)),
            None => guest.expect_qemu_running()?,
        }
        if Instant::now() > until {
            return Ok((Ended::Stuck, None));
        }
    }
}

/// Whether the kernel has killed somebody. Any other complaint of its ends the benchmark.
fn out_of_memory(rig: &Rig) -> Result<bool> {
    let splats = rig.guest().console().splats()?;
    if splats.iter().any(|line| line.contains("Out of memory:")) {
        return Ok(true);
    }
    if let Some(line) = splats.first() {
        bail!("the guest's kernel complained: {line}");
    }
    Ok(false)
}
