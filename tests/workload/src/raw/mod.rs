// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `conform`: the table of conformance from inside the guest. A driver in user space takes the cram
//! device, which no driver of the kernel may have, and sends each request of the table through it, as
//! no well-behaved driver ever would.
//!
//! `attack` has the same driver lie about everything that is a driver's to say, again and again, and be
//! honest in between: see [`attack`].
//!
//! It needs no module: the device's registers are mapped from sysfs, its queue lies in locked memory
//! whose physical addresses `/proc/self/pagemap` tells, and the used ring is watched, so there are no
//! interrupts. (Without an IOMMU that is all there is to it; it is as dangerous as it sounds, and fit
//! for nothing but a test guest.)

mod attack;
mod device;
mod mapped;
mod pci;

use std::process::ExitCode;

use anyhow::Result;

use crate::arguments::Arguments;

/// Runs `conform`.
pub(crate) fn conform(words: &[String]) -> Result<ExitCode> {
    Arguments::parse(words, &[], &[])?;
    let mut device = device::Device::open()?;
    let cases = cram_conformance::run(&mut device)?;
    println!("{{\"cases\":{cases}}}");
    Ok(ExitCode::SUCCESS)
}

/// Runs `attack`.
pub(crate) fn attack(words: &[String]) -> Result<ExitCode> {
    let arguments = Arguments::parse(words, &["seed", "rounds"], &[])?;
    let seed = arguments.number_or("seed", 1)?;
    let rounds = arguments.number_or("rounds", 1)?;
    let mut device = device::Device::open()?;
    let attacks = attack::run(&mut device, seed, rounds)?;
    println!("{{\"attacks\":{attacks}}}");
    Ok(ExitCode::SUCCESS)
}
