// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a guest costs that does nothing.

use std::time::Duration;

use anyhow::Result;

use super::Extent;
use super::rig::Rig;
use crate::bench::figures::Figures;
use crate::frontend::{Ask, Wait};

/// As the daemon has it when nothing else is said.
const POLL: Duration = Duration::from_micros(50);
/// Time for what was put to be settled: spans made ready, memory given back.
const SETTLE: Duration = Duration::from_secs(2);

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let mut rig = Rig::new(extent.pages_of_a_kind, POLL)?;
    rig.drive(Ask::Put, 32, 4, Wait::Spin)?;
    std::thread::sleep(SETTLE);
    let before = processor_s()?;
    // All threads of this process are the daemon's but this one, which sleeps.
    std::thread::sleep(Duration::from_secs(extent.idle_s));
    let used = processor_s()? - before;
    let mut figures = Figures::default();
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    figures.set("idle_cpu", used / extent.idle_s as f64);
    Ok(figures)
}

/// Seconds of processor time that this process has had.
fn processor_s() -> Result<f64> {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    let whole = Duration::new(u64::try_from(time.tv_sec)?, u32::try_from(time.tv_nsec)?);
    Ok(whole.as_secs_f64())
}
