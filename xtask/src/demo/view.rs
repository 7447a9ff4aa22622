// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The live view: some lines that are drawn over again on a terminal, or one
//! line every few seconds where the output goes to a file.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::sample::Sample;
use crate::progress::{human_bytes, human_duration};

/// Between two lines that are not drawn over.
const PLAIN_INTERVAL: Duration = Duration::from_secs(5);
/// Width of the bar.
const BAR: usize = 36;

/// What is shown.
pub struct View {
    terminal: bool,
    drawn: usize,
    plain_last: Option<Instant>,
    capacity_bytes: u64,
}

impl View {
    /// A view of a pool of this size.
    pub fn new(capacity_bytes: u64) -> Self {
        Self {
            terminal: std::io::stdout().is_terminal(),
            drawn: 0,
            plain_last: None,
            capacity_bytes,
        }
    }

    /// Shows a sample.
    pub fn show(&mut self, phase: &str, sample: &Sample) {
        if self.terminal {
            let lines = self.lines(phase, sample);
            let mut text = String::new();
            if self.drawn > 0 {
                text.push_str(&format!("\x1b[{}A", self.drawn));
            }
            for line in &lines {
                text.push_str(&format!("\x1b[2K{line}\n"));
            }
            self.drawn = lines.len();
            put(&text);
        } else if self
            .plain_last
            .is_none_or(|last| last.elapsed() >= PLAIN_INTERVAL)
        {
            self.plain_last = Some(Instant::now());
            put(&plain(phase, sample));
        }
    }

    /// Leaves what is drawn where it is; a line after it begins afresh.
    pub fn end(&mut self) {
        self.drawn = 0;
    }

    fn lines(&self, phase: &str, sample: &Sample) -> Vec<String> {
        let (guest, host) = (&sample.guest, &sample.host);
        let time = human_duration(Duration::from_secs_f64(sample.at_s));
        vec![
            format!("  phase   {phase:<24} {time:>10}"),
            format!(
                "  pool    [{}] {} of {} held",
                bar(host.held_bytes, self.capacity_bytes),
                human_bytes(host.held_bytes),
                human_bytes(self.capacity_bytes)
            ),
            format!(
                "  pages   {} stored ({}), ratio {:.2}, {} same-filled",
                grouped(host.pages_stored),
                human_bytes(host.orig_bytes),
                host.ratio(),
                grouped(host.same_pages)
            ),
            format!(
                "  rate    {:>7.0} puts/s   {:>7.0} gets/s   {} refused",
                sample.puts_per_s,
                sample.gets_per_s,
                grouped(host.puts_refused)
            ),
            format!(
                "  guest   {} available, {} anonymous, {} swapped out",
                human_bytes(guest.available_bytes),
                human_bytes(guest.anon_bytes),
                human_bytes(guest.swapped_bytes)
            ),
            format!(
                "  beneath {} written to the swap disk",
                human_bytes(guest.disk_written_bytes)
            ),
        ]
    }
}

fn plain(phase: &str, sample: &Sample) -> String {
    let host = &sample.host;
    format!(
        "{:>6.1} s  {phase:<12} {:>8} pages stored, {:>8} held, ratio {:.2}, {:>6.0} puts/s, {:>6.0} gets/s, {} refused\n",
        sample.at_s,
        host.pages_stored,
        human_bytes(host.held_bytes),
        host.ratio(),
        sample.puts_per_s,
        sample.gets_per_s,
        host.puts_refused,
    )
}

fn put(text: &str) {
    let mut out = std::io::stdout().lock();
    // A view that nobody sees any more is no reason to stop.
    let _ = out.write_all(text.as_bytes());
    let _ = out.flush();
}

fn bar(part: u64, whole: u64) -> String {
    let whole = u128::from(whole.max(1));
    let scaled = u128::from(part) * BAR as u128 / whole;
    let filled = usize::try_from(scaled).unwrap_or(BAR).min(BAR);
    format!("{}{}", "#".repeat(filled), ".".repeat(BAR - filled))
}

/// "1,234,567".
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(1_234_567), "1,234,567");
    }

    #[test]
    fn the_bar_never_leaves_its_frame() {
        assert_eq!(bar(0, 100), ".".repeat(BAR));
        assert_eq!(bar(200, 100), "#".repeat(BAR));
        assert_eq!(bar(50, 0), "#".repeat(BAR));
        assert_eq!(bar(50, 100).matches('#').count(), BAR / 2);
    }
}
