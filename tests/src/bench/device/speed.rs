// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages in a second through the device, beside the codec's own, and beside a store that does nothing.

use std::cell::RefCell;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::json;

use super::Extent;
use super::rig::Rig;
use crate::bench::codec::{Codec, Images};
use crate::bench::figures::{Figures, Turns};
use crate::frontend::{Ask, Wait};

/// As the driver in the guest does it under load.
const BATCH: usize = 32;
/// Requests in flight: while one is executed, the next ones wait.
const LANES: usize = 4;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let mut rig = Rig::new(extent.pages_of_a_kind, Duration::from_micros(200))?;
    let mut figures = Figures::default();
    puts(&mut rig, extent, &mut figures)?;
    gets(&mut rig, extent, &mut figures)?;
    null(&mut rig, extent, &mut figures)?;
    Ok(figures)
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn per_second(pages: usize, seconds: f64) -> f64 {
    pages as f64 / seconds
}

/// Measures one act on the rig; what fails is told once all is over.
struct Act<'a> {
    rig: &'a mut Rig,
    round: u64,
    failed: Result<()>,
}

impl<'a> Act<'a> {
    fn on(rig: &'a mut Rig) -> Self {
        Self {
            rig,
            round: 0,
            failed: Ok(()),
        }
    }

    fn timed(&mut self, ask: Ask, batch: usize, wait: Wait) -> Duration {
        self.round += 1;
        let begun = if ask == Ask::Put {
            self.rig.stamp(self.round)
        } else {
            Ok(())
        };
        let began = Instant::now();
        let done = begun.and_then(|()| self.rig.drive(ask, batch, LANES, wait));
        let took = began.elapsed();
        let pages = self.rig.pages.len() as u64;
        match done {
            Ok(good) if good == pages => {}
            Ok(good) => self.failed = Err(anyhow::anyhow!("{good} of {pages} pages were good")),
            Err(error) => self.failed = Err(error),
        }
        took
    }
}

fn timed(act: impl FnOnce()) -> Duration {
    let began = Instant::now();
    act();
    began.elapsed()
}

fn puts(rig: &mut Rig, extent: Extent, figures: &mut Figures) -> Result<()> {
    let pages = rig.pages.clone();
    let mut codec = Codec::new();
    let act = RefCell::new(Act::on(rig));
    let turns = Turns::take_timed(
        extent.rounds,
        &mut [
            &mut || timed(|| codec.pack_all(&pages, true)),
            &mut || act.borrow_mut().timed(Ask::Put, BATCH, Wait::Spin),
            &mut || act.borrow_mut().timed(Ask::Put, BATCH, Wait::Sleep),
            &mut || act.borrow_mut().timed(Ask::Put, 1, Wait::Spin),
        ],
    );
    act.into_inner().failed?;
    figures.set("put_vs_codec", turns.first_over(1));
    figures.set("put_sleeping_vs_codec", turns.first_over(2));
    figures.set("put_1_vs_codec", turns.first_over(3));
    figures.set("put_per_s", per_second(pages.len(), turns.median_s(1)));
    figures.set(
        "codec_put_per_s",
        per_second(pages.len(), turns.median_s(0)),
    );
    Ok(())
}

fn gets(rig: &mut Rig, extent: Extent, figures: &mut Figures) -> Result<()> {
    let count = u32::try_from(rig.pages.len())?;
    let images = Images::of(&rig.pages);
    let act = RefCell::new(Act::on(rig));
    let turns = Turns::take_timed(
        extent.rounds,
        &mut [
            &mut || timed(|| images.unpack_all(&mut (0..count))),
            &mut || act.borrow_mut().timed(Ask::Get, BATCH, Wait::Spin),
            &mut || act.borrow_mut().timed(Ask::Get, BATCH, Wait::Sleep),
        ],
    );
    let act = act.into_inner();
    act.failed?;
    expect_same(act.rig)?;
    figures.set("get_vs_codec", turns.first_over(1));
    figures.set("get_sleeping_vs_codec", turns.first_over(2));
    figures.set("get_per_s", per_second(count as usize, turns.median_s(1)));
    figures.set(
        "codec_get_per_s",
        per_second(count as usize, turns.median_s(0)),
    );
    Ok(())
}

/// What came back is what was put. A fast answer that is wrong would be none.
fn expect_same(rig: &Rig) -> Result<()> {
    let bytes = rig.pages.len() * crate::bench::corpus::PAGE_SIZE;
    let memory = &rig.guest.memory;
    ensure!(
        memory.read(rig.from, bytes)? == memory.read(rig.to, bytes)?,
        "pages came back wrong"
    );
    Ok(())
}

/// A frozen guest's puts are refused by the store at once, after the device has read everything: what
/// is left is the transport.
fn null(rig: &mut Rig, extent: Extent, figures: &mut Figures) -> Result<()> {
    let client = rig.daemon.client_stats(0)?["name"].clone();
    // None of its pages is there, so none has to be removed.
    rig.guest
        .call(1, &crate::frontend::Request::destroy_pool(0))?;
    rig.guest
        .new_pool(0, cram_abi::wire::pool_flag::PERSISTENT)?;
    rig.daemon
        .call("client.freeze", json!({ "client": client }))?;
    let mut times = Vec::new();
    for _ in 0..=extent.rounds {
        let began = Instant::now();
        let good = rig.drive(Ask::Put, BATCH, LANES, Wait::Spin)?;
        times.push(began.elapsed().as_secs_f64());
        ensure!(good == 0, "a frozen guest's page was stored");
    }
    let seconds = crate::bench::figures::median(times);
    figures.set("null_pages_per_s", per_second(rig.pages.len(), seconds));
    Ok(())
}
