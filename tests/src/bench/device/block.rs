// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The same pages to and from a disk in memory that `qemu-storage-daemon` exports by vhost-user-blk:
//! what a well-kept device of the same transport does with them, by doing nothing to them.

use std::time::Instant;

use anyhow::Result;

use super::Extent;
use crate::bench::corpus::PAGE_SIZE;
use crate::bench::figures::{Figures, median};
use crate::frontend::{Disk, Transfer};
use crate::guest::RamDisk;

const PAGES: u64 = 16 << 10;
/// Pages in flight, as in the section on speed: four requests of 32.
const IN_FLIGHT: usize = 128;
/// Pages of one request, when neighbours are asked for together as a file system would.
const MERGED: usize = 32;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let folder = tempfile::tempdir()?;
    let ram = RamDisk::start(folder.path(), (PAGES * PAGE_SIZE as u64) >> 20)?;
    let mut figures = Figures::default();
    for (name, pages) in [("blk", 1), ("blk_merged", MERGED)] {
        let bytes = PAGES * PAGE_SIZE as u64;
        let mut disk = Disk::connect(ram.socket(), bytes + (4 << 20), IN_FLIGHT / pages)?;
        let base = disk.memory.allocate(usize::try_from(bytes)?, 4096)?;
        for is_write in [true, false] {
            let mut times = Vec::new();
            for round in 0..=extent.rounds {
                let step = pages * PAGE_SIZE;
                let mut transfers = (0..bytes).step_by(step).map(|at| Transfer {
                    at,
                    address: base + at,
                    bytes: step,
                });
                let began = Instant::now();
                disk.drive(is_write, &mut transfers)?;
                if round > 0 {
                    times.push(began.elapsed().as_secs_f64());
                }
            }
            let what = if is_write { "write" } else { "read" };
            #[allow(clippy::cast_precision_loss, reason = "figures for people")]
            let rate = PAGES as f64 / median(times);
            figures.set(format!("{name}_{what}_pages_per_s"), rate);
        }
    }
    Ok(figures)
}
