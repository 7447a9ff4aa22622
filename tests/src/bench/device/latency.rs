// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One request at a time: how long a guest waits for a page.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::Extent;
use super::rig::{Rig, place};
use crate::bench::codec::Images;
use crate::bench::corpus::PAGE_SIZE;
use crate::bench::figures::{Figures, percentile};
use crate::bench::store::Random;
use crate::frontend::{Ask, Wait};

/// Requests that take so long because somebody sleeps: fewer will do.
const SLEEPING_SHARE: usize = 10;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let mut figures = Figures::default();
    let mut rig = Rig::new(extent.pages_of_a_kind, Duration::from_millis(1))?;
    rig.stamp(1)?;
    rig.drive(Ask::Put, 32, 4, Wait::Spin)?;
    let codec = decompressions(&rig, extent.samples);
    figures.set("codec_get_p50_us", percentile(&codec, 0.5));
    let gets = times(&mut rig, Ask::Get, Wait::Spin, extent.samples)?;
    distribution(&mut figures, "get_qd1", &gets);
    figures.set(
        "get_qd1_over_codec_us",
        percentile(&gets, 0.5) - percentile(&codec, 0.5),
    );
    let puts = times(&mut rig, Ask::Put, Wait::Spin, extent.samples)?;
    distribution(&mut figures, "put_qd1", &puts);
    drop(rig);

    let mut rig = Rig::new(extent.pages_of_a_kind, Duration::ZERO)?;
    rig.stamp(1)?;
    rig.drive(Ask::Put, 32, 4, Wait::Spin)?;
    let gets = times(
        &mut rig,
        Ask::Get,
        Wait::Sleep,
        extent.samples / SLEEPING_SHARE,
    )?;
    distribution(&mut figures, "get_qd1_sleeping", &gets);
    Ok(figures)
}

fn microseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

/// Sorted, in microseconds.
fn sorted(mut times: Vec<f64>) -> Vec<f64> {
    times.sort_by(f64::total_cmp);
    times
}

fn distribution(figures: &mut Figures, name: &str, sorted: &[f64]) {
    for (part, share) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999)] {
        figures.set(format!("{name}_{part}_us"), percentile(sorted, share));
    }
}

/// Of pages in random order, as they are asked for below.
fn decompressions(rig: &Rig, samples: usize) -> Vec<f64> {
    let images = Images::of(&rig.pages);
    let mut random = Random(11);
    let mut page = [0; PAGE_SIZE];
    let times = (0..samples).map(|_| {
        let at = random.below(rig.pages.len());
        let began = Instant::now();
        images.unpack(at, &mut page);
        microseconds(began.elapsed())
    });
    sorted(times.collect())
}

fn times(rig: &mut Rig, ask: Ask, wait: Wait, samples: usize) -> Result<Vec<f64>> {
    let base = if ask == Ask::Put { rig.from } else { rig.to };
    let count = rig.pages.len();
    let mut random = Random(11);
    let memory = rig.guest.memory.clone();
    let mut flow = rig.flow(1, 1, wait)?;
    let mut times = Vec::with_capacity(samples);
    for stamp in 0..samples as u64 {
        let number = u32::try_from(random.below(count))?;
        if ask == Ask::Put {
            // A page that is what it was would cost next to nothing.
            memory.write(place(base, number) + 2048, &(stamp | 1 << 62).to_le_bytes())?;
        }
        let took = flow.time_one(ask, &[(number, place(base, number))])?;
        times.push(microseconds(took));
    }
    Ok(sorted(times))
}
