// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How much of the host's memory guests take, all told: guests with our device beside guests with
//! enough RAM, with other things to swap to, and above a host that swaps itself.
//!
//! What counts is what the host has to have: the emulators, the daemon and its pool, and what the
//! host's own compressed swap holds, each page once ([`crate::guest::Ledger`]). Loads keep real data and compare
//! every page of it ([`run`]). What was measured is in a file as soon as it is known, so a part that
//! fails takes nothing with it ([`records`]).

mod aims;
mod arms;
mod codec;
mod derive;
mod host_swap;
mod pace;
mod records;
mod rig;
mod run;
mod sampler;
mod tables;

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use self::arms::{Abilities, Arm, LeftOut, Load};
use self::records::Records;
use self::run::Ended;
use super::figures::Figures;
use crate::guest::{Accelerator, Artifacts, Counting, Daemon, DaemonOptions};

pub use self::aims::AIMS;
pub(in crate::bench) use self::derive::{Family, arms_of};
pub use self::tables::tables;

/// The part that needs no guest.
const CODEC: &str = "codec";

/// How thorough to be. Sizes are in MiB.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    name: &'static str,
    is_quick: bool,
    rounds: usize,
    /// Rounds in which instructions are counted, and nothing else.
    counted_rounds: usize,
    cycle_mib: u64,
    cycle_roomy_mib: u32,
    cycle_memory_mib: &'static [u32],
    cycle_inside_mib: u32,
    cycle_limits_mib: &'static [u64],
    cold_mib: u64,
    cold_roomy_mib: u32,
    cold_memory_mib: &'static [u32],
    cold_inside_mib: u32,
    cold_limits_mib: &'static [u64],
    hot_s: f64,
    phase_s: f64,
    cache_own_mib: u64,
    cache_tree_mib: u64,
    cache_roomy_mib: u32,
    cache_memory_mib: u32,
    twins_mib: u64,
    twins_roomy_mib: u32,
    twins_memory_mib: u32,
    squeeze_mib: u64,
    squeeze_memory_mib: u32,
    codec_pages: usize,
    codec_rounds: usize,
}

impl Extent {
    /// What the figures in the documentation are measured with.
    pub const WHOLE: Extent = Extent {
        name: "whole",
        is_quick: false,
        rounds: 2,
        counted_rounds: 1,
        cycle_mib: 440,
        cycle_roomy_mib: 1024,
        cycle_memory_mib: &[192, 256, 320, 384],
        cycle_inside_mib: 384,
        cycle_limits_mib: &[400, 440, 480],
        cold_mib: 1024,
        cold_roomy_mib: 1536,
        cold_memory_mib: &[384, 448, 640],
        cold_inside_mib: 640,
        cold_limits_mib: &[480, 560, 720],
        hot_s: 60.0,
        phase_s: 30.0,
        cache_own_mib: 160,
        cache_tree_mib: 192,
        cache_roomy_mib: 1024,
        cache_memory_mib: 256,
        twins_mib: 320,
        twins_roomy_mib: 512,
        twins_memory_mib: 256,
        squeeze_mib: 640,
        squeeze_memory_mib: 1024,
        codec_pages: 12_000,
        codec_rounds: 7,
    };
    /// A look, in five minutes: smaller guests, once.
    pub const QUICK: Extent = Extent {
        name: "quick",
        is_quick: true,
        rounds: 1,
        counted_rounds: 0,
        cycle_mib: 260,
        cycle_roomy_mib: 512,
        cycle_memory_mib: &[256],
        cycle_inside_mib: 256,
        cycle_limits_mib: &[320],
        cold_mib: 400,
        cold_roomy_mib: 640,
        cold_memory_mib: &[256],
        cold_inside_mib: 320,
        cold_limits_mib: &[320],
        hot_s: 8.0,
        phase_s: 8.0,
        cache_own_mib: 96,
        cache_tree_mib: 128,
        cache_roomy_mib: 512,
        cache_memory_mib: 192,
        twins_mib: 160,
        twins_roomy_mib: 320,
        twins_memory_mib: 160,
        squeeze_mib: 256,
        squeeze_memory_mib: 512,
        codec_pages: 2_560,
        codec_rounds: 3,
    };
}

/// What there is to run with.
pub struct Bench<'a> {
    /// What was built; none where only the codecs are measured.
    pub artifacts: Option<&'a Artifacts>,
    /// How thorough to be.
    pub extent: Extent,
    /// Where the results go.
    pub out: &'a Path,
}

/// Whether these words ask for guests at all.
#[must_use]
pub fn needs_guests(words: &[String]) -> bool {
    words.is_empty() || words.iter().any(|word| word != CODEC)
}

impl Bench<'_> {
    /// Runs what the words ask for, or everything, and has `tell` write each time there is more. Gives
    /// the figures, and the names of the parts that failed.
    ///
    /// # Errors
    /// When a word means nothing, or the results cannot be written.
    pub fn run(
        &self,
        words: &[String],
        tell: impl Fn(&Figures) -> Result<()>,
    ) -> Result<(Figures, Vec<String>)> {
        let mut records = Records::open(self.out, self.extent.name)?;
        let mut failed = Vec::new();
        if words.is_empty() || words.iter().any(|word| word == CODEC) {
            match codec::run(self.extent) {
                Ok(figures) => records.set_codec(&figures)?,
                Err(error) => failed.push(complain(CODEC, &error)),
            }
            tell(&records.figures())?;
        }
        if needs_guests(words) {
            let chosen = self.chosen(words)?;
            let mut renewed = HashSet::new();
            let plain = std::iter::repeat_n(None, self.extent.rounds);
            let counted = std::iter::repeat_n(Some(Counting::Blocks), self.extent.counted_rounds);
            for counting in plain.chain(counted) {
                for (load, arm) in &chosen {
                    if counting.is_some() && !is_counted(*load) {
                        continue;
                    }
                    let run = self.attempt(*load, arm, counting);
                    // What was measured before stays until there is something to take its place.
                    if run.is_ok() && renewed.insert((*load, arm.name.clone())) {
                        records.forget(*load, arm);
                    }
                    records.add(*load, arm, &run)?;
                    if let Err(error) = &run {
                        failed.push(complain(&format!("{}:{}", load.name(), arm.name), error));
                    }
                    tell(&records.figures())?;
                }
            }
            eprintln!(
                "  guests ran under {}",
                Accelerator::detect(self.artifacts()?).name()
            );
        }
        Ok((records.figures(), failed))
    }

    fn artifacts(&self) -> Result<&Artifacts> {
        self.artifacts
            .context("no guest was built: run cargo xtask bench density")
    }

    fn chosen(&self, words: &[String]) -> Result<Vec<(Load, Arm)>> {
        let abilities = abilities(self.artifacts()?)?;
        let mut left_out = LeftOut::new();
        let all: Vec<_> = Load::ALL
            .iter()
            .filter(|load| {
                // Who asks for one load is not told what others lack.
                let is_load = |word: &String| {
                    let name = word.split(':').next().unwrap_or(word);
                    Load::ALL.iter().all(|load| load.name() != name) || name == load.name()
                };
                words.is_empty() || words.iter().any(is_load)
            })
            .map(|load| {
                let arms = arms::arms(*load, &self.extent, &abilities, &mut left_out);
                (*load, arms)
            })
            .collect();
        for line in left_out {
            eprintln!("    left out: {line}");
        }
        arms::check(words, &all)?;
        let pairs = all
            .into_iter()
            .flat_map(|(load, arms)| arms.into_iter().map(move |arm| (load, arm)));
        Ok(pairs
            .filter(|(load, arm)| arms::chosen(words, *load, arm))
            .collect())
    }

    /// One run, with a line to standard error that grows as it goes.
    fn attempt(&self, load: Load, arm: &Arm, counting: Option<Counting>) -> Result<Ended> {
        let how = if counting.is_some() { ", counted" } else { "" };
        eprint!(
            "    {} {} ({} MiB{how}):",
            load.name(),
            arm.name,
            arm.memory_mib
        );
        let run = run::run(self, load, arm, counting);
        match &run {
            Ok(Ended::Completed(values)) => {
                let get = |name: &str| values.get(name).copied().unwrap_or(f64::NAN);
                eprintln!(
                    " = peak {:.0} MiB, steady {:.0} MiB, {:.1} s",
                    get("peak_mib"),
                    get("steady_mib"),
                    get("load_s")
                );
            }
            Ok(Ended::OutOfMemory) => eprintln!(" OUT OF MEMORY"),
            Ok(Ended::Stuck) => eprintln!(" NOT DONE"),
            Err(_) => eprintln!(" FAILED"),
        }
        // Counting slows a guest down, so only the count is kept.
        run.map(|ended| match ended {
            Ended::Completed(mut values) if counting.is_some() => {
                values.retain(|name, _| name.contains("insn"));
                Ended::Completed(values)
            }
            other => other,
        })
    }

    /// Where the bytes of a run over time are written: of several runs the last one's.
    fn course_path(&self, load: Load, arm: &Arm) -> Result<PathBuf> {
        let folder = self.out.join("density");
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder.join(format!("{}-{}.csv", load.name(), arm.name)))
    }
}

/// Loads whose instructions are counted: those that the device is judged by.
fn is_counted(load: Load) -> bool {
    matches!(load, Load::Cycle | Load::Cold)
}

fn complain(what: &str, error: &anyhow::Error) -> String {
    eprintln!("    {what} failed: {error:#}");
    what.to_owned()
}

/// Asks a daemon what it can do.
fn abilities(artifacts: &Artifacts) -> Result<Abilities> {
    let folder = tempfile::tempdir().context("a folder")?;
    let daemon = Daemon::start(artifacts, folder.path(), DaemonOptions::default())?;
    let methods = daemon.control().call("methods", Value::Null)?;
    let is_squeeze = |method: &Value| method["name"] == "client.squeeze";
    let stats = daemon.control().stats()?.raw;
    Ok(Abilities {
        copies: stats["clients"][0]["copies"].as_str().map(str::to_owned),
        squeeze: methods["methods"]
            .as_array()
            .is_some_and(|methods| methods.iter().any(is_squeeze)),
    })
}
