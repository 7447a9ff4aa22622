// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole guests: our device beside what else a guest can swap to, with the same image, memory and
//! load.
//!
//! Two things are measured, never at once. *Instructions* of the guest, which a plugin counts in
//! QEMU's emulation: they are nearly the same each time, on however busy a machine. *Seconds*,
//! without the plugin, of guests in turns.

mod aims;
mod instructions;
mod profile;
mod rig;
mod run;

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

pub(in crate::bench) use self::rig::{Backing, swap_on};
use self::rig::{CASES, Case, Rig};
use self::run::{Ended, Outcome, load_of};
use super::figures::{Figures, median};
use crate::guest::{Accelerator, Artifacts, Counting, Hold};

pub use self::aims::AIMS;

/// The sections, in the order in which they are run. One more, `profile`, runs when it is named.
pub const SECTIONS: [&str; 4] = ["instructions", "wall", "tight", "idle"];
const PROFILE: &str = "profile";

/// The longest that a load may take: several times what the slowest of them has been seen to take.
const LOAD_LIMIT: Duration = Duration::from_secs(400);
/// The longest that is waited for one in a guest that may be too small for it.
const TIGHT_LIMIT: Duration = Duration::from_secs(240);
/// How long an idle daemon is watched.
const IDLE: Duration = Duration::from_secs(20);
/// What the idle guest has in the pool meanwhile.
const IDLE_MIB: u64 = 64;
/// Time for what follows a load at once, such as compaction, before idling begins.
const SETTLE: Duration = Duration::from_secs(3);

/// How thorough to be.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Rounds of counted loads that are compared closely.
    pub rounds: usize,
    /// The same of loads that are compared by the clock, which says less.
    pub wall_rounds: usize,
    /// The load in MiB.
    pub load_mib: u64,
    /// Memory of a guest that has to swap for it.
    pub memory_mib: u32,
    /// Memory of a guest that has not.
    pub roomy_mib: u32,
    /// The load of a guest that is too small to keep it, even compressed.
    pub tight_load_mib: u64,
    /// Memory of that guest.
    pub tight_memory_mib: u32,
}

impl Extent {
    /// What the figures in the documentation are measured with.
    pub const WHOLE: Extent = Extent {
        rounds: 3,
        wall_rounds: 5,
        load_mib: 440,
        memory_mib: 384,
        roomy_mib: 1024,
        tight_load_mib: 384,
        tight_memory_mib: 256,
    };
    /// A look: smaller guests, once.
    pub const QUICK: Extent = Extent {
        rounds: 1,
        wall_rounds: 1,
        load_mib: 260,
        memory_mib: 256,
        roomy_mib: 768,
        tight_load_mib: 288,
        tight_memory_mib: 192,
    };
}

/// What there is to run with.
pub struct Bench<'a> {
    /// What was built.
    pub artifacts: &'a Artifacts,
    /// How thorough to be.
    pub extent: Extent,
    /// Where the results go.
    pub out: &'a Path,
}

impl Bench<'_> {
    /// Runs one section.
    ///
    /// # Errors
    /// When there is no such section, or it fails.
    pub fn section(&self, name: &str) -> Result<Figures> {
        match name {
            "instructions" => instructions::run(self),
            "wall" => self.wall(),
            "tight" => self.tight(),
            "idle" => self.idle(),
            PROFILE => profile::run(self),
            _ => bail!(
                "there is no section {name}; there are: {} {PROFILE}",
                SECTIONS.join(" ")
            ),
        }
    }

    /// How guests are run when nothing is counted.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        Accelerator::detect(self.artifacts)
    }

    /// Seconds, in turns. Those that are not compared by the clock have one turn.
    fn wall(&self) -> Result<Figures> {
        const IN_TURNS: [&str; 3] = ["cram", "vhost_user_blk", "disk"];
        let mut figures = Figures::default();
        let mut seconds = vec![Vec::new(); CASES.len()];
        for round in 0..self.extent.wall_rounds {
            for (case, seconds) in CASES.iter().zip(&mut seconds) {
                if round == 0 || IN_TURNS.contains(&case.name) {
                    let took = self.completed(case, self.extent.memory_mib, None, |outcome| {
                        Ok(outcome.wall_s)
                    })?;
                    seconds.push(took);
                }
            }
        }
        for (case, seconds) in CASES.iter().zip(&seconds) {
            figures.set(
                format!("guest_wall_s_{}", case.name),
                median(seconds.clone()),
            );
        }
        let of = |name: &str| CASES.iter().zip(&seconds).find(|(c, _)| c.name == name);
        if let (Some((_, ours)), Some((_, theirs))) = (of("cram"), of("vhost_user_blk")) {
            let ratios = ours.iter().zip(theirs).map(|(ours, theirs)| ours / theirs);
            let (least, most) = ratios
                .clone()
                .fold((f64::INFINITY, 0.0), |(least, most), r| {
                    (r.min(least), r.max(most))
                });
            figures.set("guest_wall_vs_vhost_user_blk", median(ratios.collect()));
            figures.set("guest_wall_vs_vhost_user_blk_least", least);
            figures.set("guest_wall_vs_vhost_user_blk_most", most);
        }
        Ok(figures)
    }

    /// Who can swap at all where what is compressed leaves no room in the guest.
    fn tight(&self) -> Result<Figures> {
        let mut figures = Figures::default();
        for case in CASES.iter().filter(|case| !case.large_folios) {
            let (mib, memory) = (self.extent.tight_load_mib, self.extent.tight_memory_mib);
            let outcome = self.attempt(case, mib, memory, None, TIGHT_LIMIT)?;
            let name = case.name;
            let is = |ended| if outcome.ended == ended { 1.0 } else { 0.0 };
            figures.set(format!("tight_{name}_oom"), is(Ended::OutOfMemory));
            figures.set(format!("tight_{name}_stuck"), is(Ended::Stuck));
            figures.set(format!("tight_{name}_wall_s"), outcome.wall_s);
        }
        Ok(figures)
    }

    /// What the daemon costs while its guest does nothing.
    fn idle(&self) -> Result<Figures> {
        eprint!("    cram, idle:");
        let mut rig = Rig::start(self.artifacts, &CASES[0], self.extent.memory_mib, None)?;
        // It ends with the guest.
        Hold::start(rig.guest(), &load_of(IDLE_MIB))?.page_out()?;
        std::thread::sleep(SETTLE);
        let (began, before) = (Instant::now(), rig.daemon()?.cpu_time()?);
        std::thread::sleep(IDLE);
        let used = rig.daemon()?.cpu_time()?.saturating_sub(before);
        let share = used.as_secs_f64() / began.elapsed().as_secs_f64();
        rig.guest().expect_alive()?;
        let mut figures = Figures::default();
        figures.set("idle_cpu", share);
        eprintln!(" {share:.6} of a processor");
        Ok(figures)
    }

    /// One load in one guest that must come to its end.
    fn completed<T>(
        &self,
        case: &Case,
        memory_mib: u32,
        counting: Option<Counting>,
        take: impl FnOnce(&Outcome) -> Result<T>,
    ) -> Result<T> {
        let outcome = self.attempt(case, self.extent.load_mib, memory_mib, counting, LOAD_LIMIT)?;
        ensure!(
            outcome.ended == Ended::Completed,
            "{}: the load ended otherwise: {:?}",
            case.name,
            outcome.ended
        );
        take(&outcome).with_context(|| case.name)
    }

    /// One load in one guest, with a line to standard error that grows as it goes.
    fn attempt(
        &self,
        case: &Case,
        load_mib: u64,
        memory_mib: u32,
        counting: Option<Counting>,
        limit: Duration,
    ) -> Result<Outcome> {
        let how = if counting.is_some() { ", counted" } else { "" };
        eprint!(
            "    {}, {load_mib} MiB in {memory_mib} MiB{how}:",
            case.name
        );
        let outcome = Rig::start(self.artifacts, case, memory_mib, counting)
            .and_then(|rig| run::run(&rig, &load_of(load_mib), limit))
            .with_context(|| case.name)?;
        let moved = outcome.moved;
        eprint!(" = {:.1} s", outcome.wall_s);
        match outcome.ended {
            Ended::Completed => {}
            Ended::OutOfMemory => eprint!(", OUT OF MEMORY"),
            Ended::Stuck => eprint!(", NOT DONE"),
        }
        eprint!("; {} pages out, {} in", moved.pages_out, moved.pages_in);
        if let Some(count) = outcome.instructions {
            eprint!("; {:.3} G instructions", exact(count) / 1e9);
        }
        eprintln!();
        Ok(outcome)
    }
}

/// A guest that has room for the load, and so no use for its swap.
fn roomy(large_folios: bool) -> Case {
    Case {
        name: if large_folios { "roomy_mthp" } else { "roomy" },
        backing: rig::Backing::Disk,
        large_folios,
    }
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn exact(count: u64) -> f64 {
    count as f64
}
