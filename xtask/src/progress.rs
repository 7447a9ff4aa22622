// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a person sees while something takes long: the step's name, the time
//! since it began, a bar when an end is in sight. Everything that the step's
//! programs say goes to a log file; its last lines are shown when it fails.
//! Without a terminal there are plain lines, few enough for a CI log.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};

use crate::cache::Cache;

/// Lines of the log that are shown when a step fails.
const TAIL_LINES: usize = 30;
/// Between two plain lines of one step.
const PLAIN_INTERVAL: Duration = Duration::from_secs(60);
/// A step that takes less than this leaves no line behind.
const WORTH_A_LINE: Duration = Duration::from_secs(1);

/// One step under way. Dropped without [`Step::finish`] it counts as failed.
pub struct Step {
    name: String,
    started: Instant,
    bar: Option<ProgressBar>,
    bar_has_total: bool,
    plain_last: Instant,
    log: File,
    log_path: PathBuf,
    tail: VecDeque<String>,
    finished: bool,
}

impl Step {
    /// Begins a step; its log is named after it.
    pub fn begin(cache: &Cache, name: &str) -> Result<Self> {
        let log_path = cache.log_path(name)?;
        let log = File::create(&log_path)
            .with_context(|| format!("cannot write the log {}", log_path.display()))?;
        let now = Instant::now();
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            bar.set_style(style("{spinner} {prefix:<28} {elapsed:>5} {wide_msg}"));
            bar.set_prefix(name.to_owned());
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        Ok(Self {
            name: name.to_owned(),
            started: now,
            bar,
            bar_has_total: false,
            plain_last: now,
            log,
            log_path,
            tail: VecDeque::new(),
            finished: false,
        })
    }

    /// The step's name, under which its usual size is remembered.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Writes one line of a program's output to the log.
    pub fn log(&mut self, line: &str) {
        // A full disk shows itself in the step's own work; the log is not worth failing for.
        let _ = writeln!(self.log, "{line}");
        if self.tail.len() == TAIL_LINES {
            self.tail.pop_front();
        }
        self.tail.push_back(line.to_owned());
        self.plain(None);
    }

    /// Says in a few words what is being done just now.
    pub fn say(&mut self, what: &str) {
        let _ = writeln!(self.log, "== {what}");
        if let Some(bar) = &self.bar {
            bar.set_message(what.to_owned());
        }
    }

    /// Shows how far the step is.
    pub fn advance(&mut self, done: u64, total: u64) {
        if total == 0 {
            return;
        }
        if let Some(bar) = &self.bar {
            if !self.bar_has_total {
                bar.set_style(style(
                    "{spinner} {prefix:<28} {elapsed:>5} [{bar:30}] {percent:>3}% {wide_msg}",
                ));
                self.bar_has_total = true;
            }
            bar.set_length(total);
            bar.set_position(done.min(total));
        }
        self.plain(Some((done, total)));
    }

    /// Ends the step well.
    pub fn finish(mut self) {
        self.finished = true;
        let took = self.started.elapsed();
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        if took >= WORTH_A_LINE {
            eprintln!("  {:<28} {:>7}", self.name, human_duration(took));
        }
    }

    fn plain(&mut self, progress: Option<(u64, u64)>) {
        if self.bar.is_some() || self.plain_last.elapsed() < PLAIN_INTERVAL {
            return;
        }
        self.plain_last = Instant::now();
        let percent = progress.map_or(String::new(), |(done, total)| {
            format!(", {} %", done.min(total) * 100 / total)
        });
        eprintln!(
            "  {} … {}{percent}",
            self.name,
            human_duration(self.started.elapsed())
        );
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
        eprintln!(
            "  {:<28} FAILED after {}",
            self.name,
            human_duration(self.started.elapsed())
        );
        for line in &self.tail {
            eprintln!("    {line}");
        }
        eprintln!("    (all of it: {})", self.log_path.display());
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file; a wrong one would only look plain.
    ProgressStyle::with_template(template)
        .unwrap_or_else(|_| ProgressStyle::default_bar())
        .progress_chars("#> ")
}

/// "9m 05s", "4.2 s".
pub fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds >= 60 {
        format!("{}m {:02}s", seconds / 60, seconds % 60)
    } else {
        format!("{:.1} s", duration.as_secs_f64())
    }
}

/// "1.4 GiB", "320 KiB".
pub fn human_bytes(bytes: u64) -> String {
    let units = ["KiB", "MiB", "GiB", "TiB"];
    let mut whole = bytes;
    let mut rest = 0;
    let mut unit = "B";
    for next in units {
        if whole < 1024 {
            break;
        }
        rest = whole % 1024;
        whole /= 1024;
        unit = next;
    }
    if whole < 10 && unit != "B" {
        format!("{whole}.{} {unit}", rest * 10 / 1024)
    } else {
        format!("{whole} {unit}")
    }
}
