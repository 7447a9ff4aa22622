// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the demo found: `report.json`, and the summary for people.

use cram_tests::guest::{GuestReading, LoadReport};
use serde::Serialize;

use super::sample::{HostNumbers, Series};
use super::view::grouped;
use crate::progress::human_bytes;

/// The whole result. Field names are a promise: other programs read them.
#[derive(Serialize, Debug, Default)]
pub struct Report {
    /// Whether all went as it must.
    pub good: bool,
    /// What did not, in words.
    pub problems: Vec<String>,
    /// Pages that the device took.
    pub pages_put: u64,
    /// Pages that it gave back.
    pub pages_got: u64,
    /// Pages that it refused, and that went to the disk beneath.
    pub pages_refused: u64,
    /// Pages whose checksum did not match in the store.
    pub pages_corrupt: u64,
    /// Bytes of guest pages for each byte held by the store, its own needs included, when it held most.
    pub compression_ratio: f64,
    /// The same for the compressed images alone, pages that are one repeated word left out.
    pub codec_ratio: f64,
    /// Most pages that were in the store at one time, as sampled.
    pub pages_stored_max: u64,
    /// Most bytes that the store held.
    pub store_bytes_max: u64,
    /// Size of the pool.
    pub store_bytes_capacity: u64,
    /// Most memory of the daemon, the store included, the guest's own memory not.
    pub daemon_resident_bytes_max: u64,
    /// Most memory of the host that QEMU and the daemon had together.
    pub host_bytes_max: u64,
    /// Of this, QEMU with the guest's memory.
    pub host_bytes_qemu: u64,
    /// Most memory that the host would have needed for the same pages had all of them been in the guest:
    /// computed, QEMU's part and the pages that were in the store. At most: a page that is in both places
    /// for a moment counts twice.
    pub host_bytes_without_max: u64,
    /// Bytes that the guest wrote to the swap disk beneath.
    pub disk_swap_bytes: u64,
    /// From the start of the daemon to the end of the last check.
    pub wall_s: f64,
    /// `tcg` or `kvm`.
    pub accelerator: String,
    /// Release of the guest's kernel.
    pub kernel: String,
    /// Version of QEMU.
    pub qemu: String,
    /// The guest's memory.
    pub guest_memory_bytes: u64,
    /// What of it was free before the load.
    pub guest_free_bytes: u64,
    /// Processors of the guest.
    pub guest_cpus: u32,
    /// Data that was loaded.
    pub load_bytes: u64,
    /// Pages read back and compared by SHA-256, over all passes.
    pub pages_verified: u64,
    /// Pages with other bytes than were loaded.
    pub mismatches: u64,
    /// Pages that could not be read back.
    pub lost: u64,
    /// Each step of the load and its seconds.
    pub steps: Vec<(String, f64)>,
    /// The guest's own counts, for comparison.
    pub guest_pages_put: u64,
    /// As above.
    pub guest_pages_got: u64,
    /// As above.
    pub guest_pages_refused: u64,
    /// Pages that the guest's reclaim wrote to swap, wherever they went.
    pub guest_pswpout: u64,
    /// Pages that the guest read back from swap.
    pub guest_pswpin: u64,
    /// Whether `stress-ng --verify` found its memory whole.
    pub stress_ng_good: bool,
    /// Seed of the random orders.
    pub seed: u64,
}

/// Fewest pages that must travel each way in a demo of full size.
pub const PAGES_MIN: u64 = 100_000;

impl Report {
    /// Takes over what the load said.
    pub fn take_load(&mut self, load: &LoadReport) {
        self.load_bytes = load.bytes;
        self.pages_verified = load.pages_verified;
        self.mismatches = load.mismatches;
        self.lost = load.lost;
        self.steps.clone_from(&load.steps);
        if let Err(error) = load.expect_good() {
            self.problems.push(format!("{error:#}"));
        }
    }

    /// Takes over the last readings and the series.
    pub fn take_readings(&mut self, host: &HostNumbers, guest: &GuestReading, series: &Series) {
        self.pages_put = host.pages_put();
        self.pages_got = host.pages_got();
        self.pages_refused = host.puts_refused;
        self.pages_corrupt = host.gets_corrupt;
        self.store_bytes_max = host.held_max_bytes;
        self.disk_swap_bytes = guest.disk_written_bytes;
        self.guest_pages_put = guest.device.get_or_zero("puts_ok");
        self.guest_pages_got = guest.device.get_or_zero("gets_ok");
        self.guest_pages_refused = ["puts_no_space", "puts_over_quota", "puts_frozen"]
            .iter()
            .map(|name| guest.device.get_or_zero(name))
            .sum();
        self.guest_pswpout = guest.vmstat.get_or_zero("pswpout");
        self.guest_pswpin = guest.vmstat.get_or_zero("pswpin");
        let samples = || series.samples.iter().map(|sample| sample.host);
        self.daemon_resident_bytes_max = samples().map(|s| s.resident_bytes).max().unwrap_or(0);
        if let Some(peak) = samples().max_by_key(HostNumbers::needed_bytes) {
            self.host_bytes_max = peak.needed_bytes();
            self.host_bytes_qemu = peak.qemu_bytes;
        }
        let without = samples().map(|sample| sample.needed_without_bytes());
        self.host_bytes_without_max = without.max().unwrap_or(0);
        if let Some(fullest) = samples().max_by_key(|sample| sample.pages_stored) {
            self.pages_stored_max = fullest.pages_stored;
            self.compression_ratio = fullest.ratio();
            let imaged =
                (fullest.pages_stored - fullest.same_pages.min(fullest.pages_stored)) << 12;
            #[allow(clippy::cast_precision_loss, reason = "a ratio to show")]
            if fullest.compressed_bytes > 0 {
                self.codec_ratio = imaged as f64 / fullest.compressed_bytes as f64;
            }
        }
    }

    /// Decides whether all is well. `full_size`: whether the run was as large as it is by default.
    pub fn judge(&mut self, full_size: bool) {
        let mut problem = |bad: bool, text: String| {
            if bad {
                self.problems.push(text);
            }
        };
        problem(
            self.pages_corrupt > 0,
            format!("{} pages were corrupt in the store", self.pages_corrupt),
        );
        problem(
            self.pages_put == 0 || self.pages_got == 0,
            "no pages travelled through the device".to_owned(),
        );
        let (put, got) = (self.pages_put, self.pages_got);
        problem(
            full_size && (put < PAGES_MIN || got < PAGES_MIN),
            format!("only {put} pages put and {got} got, less than {PAGES_MIN}"),
        );
        for (what, guest, host) in [
            ("put", self.guest_pages_put, self.pages_put),
            ("got", self.guest_pages_got, self.pages_got),
        ] {
            problem(
                guest.abs_diff(host) > host / 100,
                format!("the guest says that it {what} {guest} pages, the host says {host}"),
            );
        }
        // Everything that reclaim wrote must have gone one way or the other.
        let accounted = self.guest_pages_put + self.disk_swap_bytes / 4096;
        problem(
            accounted < self.guest_pswpout - self.guest_pswpout / 50,
            format!(
                "reclaim swapped {} pages, but only {accounted} came to device and disk",
                self.guest_pswpout
            ),
        );
        problem(
            self.pages_refused == 0 && self.disk_swap_bytes > 0,
            format!(
                "{} bytes were swapped to the disk while the device had room",
                self.disk_swap_bytes
            ),
        );
        problem(
            !self.stress_ng_good,
            "stress-ng found an error, or did not end well".to_owned(),
        );
        self.good = self.problems.is_empty();
    }

    /// What the host needed, and would have needed.
    fn host_line(&self) -> String {
        let (with, without) = (self.host_bytes_max, self.host_bytes_without_max.max(1));
        let share = with * 100 / without;
        format!(
            "  host        needed {} at most: {} for QEMU with the guest, {} for the pool; with all of the\n\
             \x20             pages in the guest it would have needed up to {}: at least {} percent of that",
            human_bytes(with),
            human_bytes(self.host_bytes_qemu),
            human_bytes(with.saturating_sub(self.host_bytes_qemu)),
            human_bytes(without),
            share
        )
    }

    /// The summary for people.
    pub fn summary(&self) -> String {
        let mut lines = vec![
            format!(
                "  loaded      {} into a guest with {} free, read back as {} pages",
                human_bytes(self.load_bytes),
                human_bytes(self.guest_free_bytes),
                grouped(self.pages_verified)
            ),
            format!(
                "  compared    {} wrong, {} lost, {} corrupt (SHA-256 of every page); stress-ng --verify: {}",
                self.mismatches,
                self.lost,
                self.pages_corrupt,
                if self.stress_ng_good { "good" } else { "BAD" }
            ),
            format!(
                "  travelled   {} pages put, {} got back, {} refused",
                grouped(self.pages_put),
                grouped(self.pages_got),
                grouped(self.pages_refused)
            ),
            format!(
                "  held        {} at most for {} pages ({}): ratio {:.2}, the codec's own {:.2}",
                human_bytes(self.store_bytes_max),
                grouped(self.pages_stored_max),
                human_bytes(self.pages_stored_max << 12),
                self.compression_ratio,
                self.codec_ratio
            ),
            format!(
                "  disk        {} swapped to the disk beneath",
                human_bytes(self.disk_swap_bytes)
            ),
            format!(
                "  took        {:.0} s with {}, Linux {}, QEMU {}",
                self.wall_s, self.accelerator, self.kernel, self.qemu
            ),
        ];
        if self.accelerator == "tcg" {
            lines.push(
                "              Measured under TCG: guest code runs about ten times slower than on hardware,\n\
                 \x20             the host's side at full speed. The times say little; the counts are true."
                    .to_owned(),
            );
        }
        lines.push(self.host_line());
        for problem in &self.problems {
            lines.push(format!("  PROBLEM     {problem}"));
        }
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fine() -> Report {
        Report {
            pages_put: 200_000,
            pages_got: 300_000,
            guest_pages_put: 200_000,
            guest_pages_got: 300_000,
            guest_pswpout: 200_000,
            stress_ng_good: true,
            ..Report::default()
        }
    }

    #[test]
    fn a_fine_run_is_good() {
        let mut report = fine();
        report.judge(true);
        assert!(report.good, "{:?}", report.problems);
    }

    #[test]
    fn each_flaw_is_found() {
        let flaws: [fn(&mut Report); 7] = [
            |report| report.pages_corrupt = 1,
            |report| report.pages_got = 0,
            |report| report.guest_pages_put = 100_000,
            |report| report.disk_swap_bytes = 4096,
            |report| report.stress_ng_good = false,
            |report| report.guest_pswpout = 400_000,
            |report| {
                report.pages_put = 99_999;
                report.guest_pages_put = 99_999;
                report.guest_pswpout = 99_999;
            },
        ];
        for (number, flaw) in flaws.iter().enumerate() {
            let mut report = fine();
            flaw(&mut report);
            report.judge(true);
            assert!(!report.good, "flaw {number}");
        }
    }
}
