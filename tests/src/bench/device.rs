// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device's benchmarks: the real daemon, over a real socket, with real rings in shared memory,
//! driven at full speed by the front-end of the tests. Sections, as of the store's.

mod block;
mod idle;
mod latency;
mod neighbour;
mod rig;
mod speed;

use anyhow::{Result, bail};

use super::figures::{Aim, Figures, Target, aim};

/// The sections, in the order in which they are run.
pub const SECTIONS: [&str; 5] = ["speed", "blk", "latency", "neighbour", "idle"];

/// How thorough to be.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Rounds of what is measured in turns.
    pub rounds: usize,
    /// Pages of each kind.
    pub pages_of_a_kind: usize,
    /// Requests whose time is taken one by one.
    pub samples: usize,
    /// Seconds to watch an idle device.
    pub idle_s: u64,
}

impl Extent {
    /// What the figures in the documentation are measured with.
    pub const WHOLE: Extent = Extent {
        rounds: 15,
        pages_of_a_kind: 6000,
        samples: 200_000,
        idle_s: 30,
    };
    /// A look.
    pub const QUICK: Extent = Extent {
        rounds: 5,
        pages_of_a_kind: 2000,
        samples: 20_000,
        idle_s: 5,
    };
}

/// What the device's figures are, and what was aimed at.
pub const AIMS: &[Aim] = &[
    aim(
        "put_vs_codec",
        "puts through the device / raw lz4_flex, pages per second, one queue, batches of 32",
        Some(Target::AtLeast(0.90)),
    ),
    aim(
        "get_vs_codec",
        "gets through the device / raw lz4_flex",
        Some(Target::AtLeast(0.80)),
    ),
    aim("put_per_s", "pages put in a second", None),
    aim("get_per_s", "pages got in a second", None),
    aim(
        "put_sleeping_vs_codec",
        "puts with a driver and a device that sleep and wake each other",
        None,
    ),
    aim("put_1_vs_codec", "puts in batches of one page", None),
    aim(
        "null_pages_per_s",
        "pages in a second when the store refuses each: what the transport does",
        None,
    ),
    aim(
        "blk_write_pages_per_s",
        "pages written in a second to a RAM disk of qemu-storage-daemon by vhost-user-blk",
        None,
    ),
    aim("blk_read_pages_per_s", "… read", None),
    aim(
        "vs_vhost_user_blk",
        "our transport / that one, requests of a page each there",
        Some(Target::AtLeast(1.0)),
    ),
    aim(
        "vs_vhost_user_blk_merged",
        "… with 32 neighbouring pages in each request there",
        None,
    ),
    aim(
        "put_vs_blk_write",
        "pages put, compressed / pages written there, as they are",
        None,
    ),
    aim("get_vs_blk_read", "pages got / pages read there", None),
    aim(
        "get_qd1_over_codec_us",
        "one get at a time, polling: median beyond the raw decompression, in microseconds",
        Some(Target::AtMost(3.0)),
    ),
    aim("get_qd1_p50_us", "one get at a time, polling: median", None),
    aim("get_qd1_p99_us", "… of 99 in a hundred at the most", None),
    aim("get_qd1_p999_us", "… of 999 in a thousand", None),
    aim(
        "get_qd1_sleeping_p50_us",
        "one get at a time, both sides sleeping: median",
        None,
    ),
    aim(
        "get_qd1_sleeping_p99_us",
        "… of 99 in a hundred at the most",
        None,
    ),
    aim("put_qd1_p50_us", "one put at a time, polling: median", None),
    aim(
        "neighbour_share",
        "puts beside two guests of ill will / alone; two thirds of a processor are its share",
        Some(Target::AtLeast(0.5)),
    ),
    aim(
        "idle_cpu",
        "share of a processor that a connected, idle guest costs",
        Some(Target::AtMost(0.001)),
    ),
];

/// Figures that come from several sections, as far as they were run.
pub fn combine(figures: &mut Figures) {
    let over = |figures: &Figures, ours: &str, theirs: &str| {
        Some(figures.get(ours)? / figures.get(theirs)?)
    };
    for (name, ours, theirs) in [
        (
            "vs_vhost_user_blk",
            "null_pages_per_s",
            "blk_write_pages_per_s",
        ),
        (
            "vs_vhost_user_blk_merged",
            "null_pages_per_s",
            "blk_merged_write_pages_per_s",
        ),
        ("get_vs_blk_read", "get_per_s", "blk_read_pages_per_s"),
        ("put_vs_blk_write", "put_per_s", "blk_write_pages_per_s"),
    ] {
        if let Some(ratio) = over(figures, ours, theirs) {
            figures.set(name, ratio);
        }
    }
}

/// Runs one section.
///
/// # Errors
/// When something fails, or there is no such section.
pub fn run(section: &str, extent: Extent) -> Result<Figures> {
    match section {
        "speed" => speed::run(extent),
        "blk" => block::run(extent),
        "latency" => latency::run(extent),
        "neighbour" => neighbour::run(extent),
        "idle" => idle::run(extent),
        _ => bail!(
            "there is no section {section:?}; there are: {}",
            SECTIONS.join(", ")
        ),
    }
}
