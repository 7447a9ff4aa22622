// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All runs, kept in a file as they come, and the figures made of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::arms::{Arm, Load};
use super::derive;
use super::run::{Ended, Values};
use crate::bench::figures::{Figures, median};

/// One run.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
struct Record {
    load: String,
    arm: String,
    /// `completed`, `out of memory`, `stuck`, or why it failed.
    ended: String,
    values: Values,
}

#[derive(Serialize, Deserialize, Default)]
struct Contents {
    /// Runs of different extents are not mixed.
    extent: String,
    runs: Vec<Record>,
    codec: Values,
}

/// The file.
pub(super) struct Records {
    path: PathBuf,
    contents: Contents,
}

const COMPLETED: &str = "completed";
const OUT_OF_MEMORY: &str = "out of memory";
const STUCK: &str = "stuck";

impl Records {
    /// Opens the file. What is in it stays, unless it is of another extent.
    ///
    /// # Errors
    /// When it is there and cannot be read.
    pub(super) fn open(folder: &Path, extent: &str) -> Result<Self> {
        let path = folder.join("density-runs.json");
        let contents = match fs::read_to_string(&path) {
            Ok(text) => serde_json::from_str(&text)
                .with_context(|| format!("{} is something else", path.display()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Contents::default(),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let mut records = Self { path, contents };
        if records.contents.extent != extent {
            records.contents = Contents {
                extent: extent.to_owned(),
                ..Contents::default()
            };
        }
        Ok(records)
    }

    /// Forgets the runs of an arm, which is about to be measured anew.
    pub(super) fn forget(&mut self, load: Load, arm: &Arm) {
        let is_it = |run: &Record| run.load == load.name() && run.arm == arm.name;
        self.contents.runs.retain(|run| !is_it(run));
    }

    /// Adds a run.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn add(&mut self, load: Load, arm: &Arm, run: &Result<Ended>) -> Result<()> {
        let (ended, values) = match run {
            Ok(Ended::Completed(values)) => (COMPLETED.to_owned(), values.clone()),
            Ok(Ended::OutOfMemory) => (OUT_OF_MEMORY.to_owned(), Values::new()),
            Ok(Ended::Stuck) => (STUCK.to_owned(), Values::new()),
            Err(error) => (format!("failed: {error:#}"), Values::new()),
        };
        self.contents.runs.push(Record {
            load: load.name().to_owned(),
            arm: arm.name.clone(),
            ended,
            values,
        });
        self.write()
    }

    /// Notes what the codecs came to.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn set_codec(&mut self, figures: &Figures) -> Result<()> {
        let figures = figures.iter();
        self.contents.codec = figures
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        self.write()
    }

    fn write(&self) -> Result<()> {
        let text = serde_json::to_string_pretty(&self.contents)?;
        fs::write(&self.path, text + "\n")
            .with_context(|| format!("cannot write {}", self.path.display()))
    }

    /// The figures: the median of each value over an arm's runs, and what follows from them.
    pub(super) fn figures(&self) -> Figures {
        let mut figures = Figures::default();
        for (name, value) in &self.contents.codec {
            figures.set(name.clone(), *value);
        }
        let mut values: BTreeMap<String, Vec<f64>> = BTreeMap::new();
        for run in &self.contents.runs {
            let of = |what: &str| figure_name(&run.load, &run.arm, what);
            for (name, value) in &run.values {
                values.entry(of(name)).or_default().push(*value);
            }
            let is = |ended: &str| f64::from(u8::from(run.ended == ended));
            values.entry(of("oom")).or_default().push(is(OUT_OF_MEMORY));
            values.entry(of("stuck")).or_default().push(is(STUCK));
        }
        for (name, values) in values {
            // Once is enough to say that it happens.
            let value = if name.ends_with("_oom") || name.ends_with("_stuck") {
                values.iter().copied().fold(0.0, f64::max)
            } else {
                median(values)
            };
            figures.set(name, value);
        }
        derive::derive(&mut figures);
        figures
    }
}

/// `cycle_cram_384_peak_mib`.
pub(super) fn figure_name(load: &str, arm: &str, what: &str) -> String {
    format!("{load}_{arm}_{what}").replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::super::arms::Swap;
    use super::*;

    fn arm() -> Arm {
        Arm {
            name: "cram-384".to_owned(),
            swap: Swap::Disk,
            memory_mib: 384,
            squeezed: false,
        }
    }

    fn completed(value: f64) -> Result<Ended> {
        Ok(Ended::Completed(Values::from([(
            "peak_mib".to_owned(),
            value,
        )])))
    }

    #[test]
    fn what_was_measured_is_there_after_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        let mut records = Records::open(folder.path(), "whole").unwrap();
        for value in [3.0, 1.0, 2.0] {
            records.add(Load::Cycle, &arm(), &completed(value)).unwrap();
        }
        let failed = Err(anyhow::anyhow!("no"));
        records.add(Load::Cycle, &arm(), &failed).unwrap();
        records
            .add(Load::Cold, &arm(), &Ok(Ended::OutOfMemory))
            .unwrap();
        let mut records = Records::open(folder.path(), "whole").unwrap();
        let figures = records.figures();
        assert_eq!(figures.get("cycle_cram_384_peak_mib"), Some(2.0));
        assert_eq!(figures.get("cycle_cram_384_oom"), Some(0.0));
        assert_eq!(figures.get("cold_cram_384_oom"), Some(1.0));
        // Measured anew.
        records.forget(Load::Cycle, &arm());
        assert_eq!(records.figures().get("cycle_cram_384_peak_mib"), None);
        // Of another extent.
        let other = Records::open(folder.path(), "quick").unwrap();
        assert_eq!(other.figures().get("cold_cram_384_oom"), None);
    }
}
