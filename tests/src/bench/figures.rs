// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures: measured in turns, kept by name, shown beside what was aimed at.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

/// What a figure should be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// At least this.
    AtLeast(f64),
    /// At most this.
    AtMost(f64),
}

impl Target {
    /// Whether a value is as it should be.
    #[must_use]
    pub fn is_met(self, value: f64) -> bool {
        match self {
            Target::AtLeast(bound) => value >= bound,
            Target::AtMost(bound) => value <= bound,
        }
    }

    /// The bound itself.
    #[must_use]
    pub fn bound(self) -> f64 {
        match self {
            Target::AtLeast(bound) | Target::AtMost(bound) => bound,
        }
    }

    /// For people.
    #[must_use]
    pub fn text(self) -> String {
        match self {
            Target::AtLeast(bound) => format!("≥ {bound}"),
            Target::AtMost(bound) => format!("≤ {bound}"),
        }
    }
}

/// A figure that people should look at: its name, what it means, what it should be.
#[derive(Clone, Copy, Debug)]
pub struct Aim {
    /// As in the JSON file.
    pub name: &'static str,
    /// What it is.
    pub meaning: &'static str,
    /// What it should be, if anything was aimed at.
    pub target: Option<Target>,
}

pub(crate) const fn aim(name: &'static str, meaning: &'static str, target: Option<Target>) -> Aim {
    Aim {
        name,
        meaning,
        target,
    }
}

/// Figures by name.
#[derive(Clone, Debug, Default)]
pub struct Figures(BTreeMap<String, f64>);

impl Figures {
    /// Notes one.
    pub fn set(&mut self, name: impl Into<String>, value: f64) {
        self.0.insert(name.into(), value);
    }

    /// Looks one up.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<f64> {
        self.0.get(name).copied()
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0.iter().map(|(name, value)| (name.as_str(), *value))
    }

    /// Takes over those of another measurement.
    pub fn extend(&mut self, other: Figures) {
        self.0.extend(other.0);
    }

    /// One flat object.
    #[must_use]
    pub fn to_json(&self) -> String {
        let rounded: BTreeMap<_, _> = self
            .0
            .iter()
            .map(|(name, value)| (name, (value * 1e4).round() / 1e4))
            .collect();
        serde_json::to_string_pretty(&rounded).unwrap_or_default() + "\n"
    }

    /// Reads what [`Self::to_json`] wrote.
    ///
    /// # Errors
    /// When it is something else.
    pub fn from_json(text: &str) -> Result<Self> {
        Ok(Self(
            serde_json::from_str(text).context("no flat object of numbers")?,
        ))
    }

    /// Writes a file.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        fs::write(path, self.to_json()).with_context(|| format!("cannot write {}", path.display()))
    }

    /// Prints those that were aimed at something, and all that `aims` names, as a table.
    pub fn print(&self, aims: &[Aim]) {
        let width = aims.iter().map(|aim| aim.name.len()).max().unwrap_or(0);
        for aim in aims {
            let Some(value) = self.get(aim.name) else {
                continue;
            };
            let (wanted, verdict) = match aim.target {
                Some(target) if target.is_met(value) => (target.text(), "met"),
                Some(target) => (target.text(), "MISSED"),
                None => (String::new(), ""),
            };
            println!(
                "  {:<width$}  {:>10}  {wanted:>8} {verdict:<6}  {}",
                aim.name,
                show(value),
                aim.meaning
            );
        }
    }
}

/// A number with as many digits as mean something.
#[must_use]
pub fn show(value: f64) -> String {
    match value.abs() {
        size if size >= 10_000.0 => format!("{value:.0}"),
        size if size >= 100.0 => format!("{value:.1}"),
        _ => format!("{value:.3}"),
    }
}

/// Seconds that each of several acts takes, in turns: A B C A B C …, so that whatever slows the
/// machine down slows all of them. The best time of each, and the median of the ratios to the first.
pub struct Turns {
    times: Vec<Vec<f64>>,
}

impl Turns {
    /// Does `acts` in turns, `rounds` times, and once before that without looking at the clock.
    pub fn take(rounds: usize, acts: &mut [&mut dyn FnMut()]) -> Self {
        let mut times = vec![Vec::new(); acts.len()];
        for round in 0..=rounds {
            for (act, times) in acts.iter_mut().zip(&mut times) {
                let began = Instant::now();
                act();
                if round > 0 {
                    times.push(began.elapsed().as_secs_f64());
                }
            }
        }
        Self { times }
    }

    /// Acts that measure themselves: each returns what it took.
    pub fn take_timed(rounds: usize, acts: &mut [&mut dyn FnMut() -> Duration]) -> Self {
        let mut times = vec![Vec::new(); acts.len()];
        for round in 0..=rounds {
            for (act, times) in acts.iter_mut().zip(&mut times) {
                let took = act().as_secs_f64();
                if round > 0 {
                    times.push(took);
                }
            }
        }
        Self { times }
    }

    /// Seconds of the median round.
    #[must_use]
    pub fn median_s(&self, act: usize) -> f64 {
        median(self.times.get(act).cloned().unwrap_or_default())
    }

    /// How many times as long the first act took as this one, round by round: the median.
    #[must_use]
    pub fn first_over(&self, act: usize) -> f64 {
        let (Some(first), Some(other)) = (self.times.first(), self.times.get(act)) else {
            return f64::NAN;
        };
        median(
            first
                .iter()
                .zip(other)
                .map(|(first, other)| first / other)
                .collect(),
        )
    }
}

/// The middle one; of an even number the lower of the two.
#[must_use]
pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len().saturating_sub(1) / 2;
    values.get(middle).copied().unwrap_or(f64::NAN)
}

/// The value below which the given share (0 to 1) of the values lie.
#[must_use]
pub fn percentile(sorted: &[f64], share: f64) -> f64 {
    #[allow(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index of a list in memory"
    )]
    let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or(f64::NAN)
}

/// Has the allocator give back to the system what is free, so that what is measured next does not
/// find room in it.
#[allow(unsafe_code)]
pub fn give_back_free_memory() {
    // SAFETY: it takes a number and has no preconditions.
    unsafe { libc::malloc_trim(0) };
}

/// What the operating system counts as this process's memory, in bytes.
///
/// # Errors
/// When /proc does not say.
pub fn resident_bytes() -> Result<u64> {
    let status =
        fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let kib = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    Ok(kib.context("/proc/self/status has no VmRSS")? << 10)
}

/// Bytes that programs can still have without others being pushed out.
///
/// # Errors
/// When /proc does not say.
pub fn available_bytes() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo").context("cannot read /proc/meminfo")?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))
        .and_then(|rest| rest.split_whitespace().next())
        .and_then(|number| number.parse::<u64>().ok());
    Ok(kib.context("/proc/meminfo has no MemAvailable")? << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_targets() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
        assert!((percentile(&[1.0, 2.0, 3.0, 4.0], 0.99) - 4.0).abs() < f64::EPSILON);
        assert!(Target::AtLeast(0.9).is_met(0.9) && !Target::AtMost(0.9).is_met(1.0));
        let mut figures = Figures::default();
        figures.set("a", 1.5);
        let again = Figures::from_json(&figures.to_json()).unwrap();
        assert_eq!(again.get("a"), Some(1.5));
        assert!(Figures::from_json("[]").is_err());
    }
}
