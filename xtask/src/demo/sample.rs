// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Readings of guest and host, over time.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use cram_tests::guest::{Daemon, DaemonReading, Guest, Ledger};
use serde::Serialize;

/// Between two readings of the guest, which cost it some work.
const GUEST_INTERVAL: Duration = Duration::from_secs(1);

/// What the guest said last.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct GuestNumbers {
    /// Memory that programs could still have.
    pub available_bytes: u64,
    /// Anonymous memory in RAM.
    pub anon_bytes: u64,
    /// Swap in use, wherever it is.
    pub swapped_bytes: u64,
    /// Bytes written to the swap disk.
    pub disk_written_bytes: u64,
}

/// What the daemon said.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct HostNumbers {
    pub pages_stored: u64,
    pub same_pages: u64,
    pub orig_bytes: u64,
    pub held_bytes: u64,
    pub held_max_bytes: u64,
    pub compressed_bytes: u64,
    pub puts: u64,
    pub puts_refused: u64,
    pub gets: u64,
    pub gets_missing: u64,
    pub gets_corrupt: u64,
    /// Memory of the daemon in RAM, its store included, the guests' own memory not.
    pub resident_bytes: u64,
    /// What QEMU has in RAM, the guest's memory included.
    pub qemu_bytes: u64,
}

/// One moment.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Sample {
    /// Seconds since the load began.
    pub at_s: f64,
    pub puts_per_s: f64,
    pub gets_per_s: f64,
    pub guest: GuestNumbers,
    pub host: HostNumbers,
}

impl HostNumbers {
    /// Reads the daemon.
    pub fn read(daemon: &Daemon, ledger: &Ledger) -> Result<Self> {
        let stats: DaemonReading = daemon.control().stats()?;
        let bytes = ledger.quick()?;
        Ok(Self {
            pages_stored: stats.get("pages_stored")?,
            same_pages: stats.get("same_pages")?,
            orig_bytes: stats.get("orig_data_size")?,
            held_bytes: stats.get("mem_used_total")?,
            held_max_bytes: stats.get("mem_used_max")?,
            compressed_bytes: stats.get("compr_data_size")?,
            puts: stats.get("puts")?,
            puts_refused: stats.get("puts_refused")?,
            gets: stats.get("gets")?,
            gets_missing: stats.get("gets_missing")?,
            gets_corrupt: stats.get("gets_corrupt")?,
            resident_bytes: bytes.daemon,
            qemu_bytes: bytes.guest + bytes.qemu,
        })
    }

    /// What the host needs: QEMU and the daemon.
    pub fn needed_bytes(&self) -> u64 {
        self.qemu_bytes + self.resident_bytes
    }

    /// What the host would need for the same pages without the device: all of them in the guest. At
    /// most: a page that is in both places for a moment counts twice.
    pub fn needed_without_bytes(&self) -> u64 {
        self.qemu_bytes + self.orig_bytes
    }

    /// Pages taken.
    pub fn pages_put(&self) -> u64 {
        self.puts.saturating_sub(self.puts_refused)
    }

    /// Pages given back.
    pub fn pages_got(&self) -> u64 {
        self.gets
            .saturating_sub(self.gets_missing)
            .saturating_sub(self.gets_corrupt)
    }

    /// Bytes of guest pages for each byte held, with everything that the store needs for itself.
    pub fn ratio(&self) -> f64 {
        if self.held_bytes == 0 {
            return 0.0;
        }
        #[allow(clippy::cast_precision_loss, reason = "a ratio to show")]
        let ratio = self.orig_bytes as f64 / self.held_bytes as f64;
        ratio
    }
}

/// Asks the guest again and again, beside the main loop: a guest that swaps answers slowly,
/// and the view must not wait for it.
#[derive(Default)]
pub struct GuestPoller {
    last: Mutex<GuestNumbers>,
    over: AtomicBool,
}

impl GuestPoller {
    /// Runs until [`GuestPoller::stop`].
    pub fn run(&self, guest: &Guest) {
        while !self.over.load(Ordering::SeqCst) {
            if let Ok(numbers) = read_guest(guest) {
                *self.numbers_mut() = numbers;
            }
            let until = Instant::now() + GUEST_INTERVAL;
            while Instant::now() < until && !self.over.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }

    /// Ends [`GuestPoller::run`].
    pub fn stop(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// What the guest said last.
    pub fn numbers(&self) -> GuestNumbers {
        *self.numbers_mut()
    }

    fn numbers_mut(&self) -> MutexGuard<'_, GuestNumbers> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read_guest(guest: &Guest) -> Result<GuestNumbers> {
    let reading = guest.reading()?;
    let bytes = |name: &str| reading.meminfo.get(name).map(|kib| kib << 10);
    Ok(GuestNumbers {
        available_bytes: bytes("MemAvailable")?,
        anon_bytes: bytes("AnonPages")?,
        swapped_bytes: bytes("SwapTotal")?.saturating_sub(bytes("SwapFree")?),
        disk_written_bytes: reading.disk_written_bytes,
    })
}

/// All samples so far.
pub struct Series {
    begin: Instant,
    /// In the order of time.
    pub samples: Vec<Sample>,
    /// When each phase began, and its name.
    pub phases: Vec<(f64, String)>,
}

impl Series {
    /// An empty series that begins now.
    pub fn new() -> Self {
        Self {
            begin: Instant::now(),
            samples: Vec::new(),
            phases: Vec::new(),
        }
    }

    /// Seconds since the beginning.
    pub fn now_s(&self) -> f64 {
        self.begin.elapsed().as_secs_f64()
    }

    /// A phase begins.
    pub fn phase(&mut self, name: &str) {
        self.phases.push((self.now_s(), name.to_owned()));
    }

    /// Adds a sample, with the rates since the one before.
    pub fn add(&mut self, guest: GuestNumbers, host: HostNumbers) -> Sample {
        let at_s = self.now_s();
        let mut sample = Sample {
            at_s,
            guest,
            host,
            ..Sample::default()
        };
        if let Some(last) = self.samples.last() {
            let seconds = (at_s - last.at_s).max(0.001);
            #[allow(clippy::cast_precision_loss, reason = "a rate to show")]
            let rate = |now: u64, then: u64| now.saturating_sub(then) as f64 / seconds;
            sample.puts_per_s = rate(host.pages_put(), last.host.pages_put());
            sample.gets_per_s = rate(host.pages_got(), last.host.pages_got());
        }
        self.samples.push(sample);
        sample
    }
}
