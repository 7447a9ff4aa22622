// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How fast a store that was killed is there again.

use anyhow::{Context, Result, ensure};
use cram_store::{Backing, Scratch};

use super::{Extent, background, stamp, store_in};
use crate::bench::corpus;
use crate::bench::figures::{Figures, median};

const PAGES_OF_A_KIND: usize = 4000;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(PAGES_OF_A_KIND)?;
    let pages = corpus::mixed(&corpus);
    let folder = tempfile::tempdir_in("/dev/shm").context("cannot make a folder in /dev/shm")?;
    let backing = Backing::File(folder.path().join("arena"));
    let count = extent.pages * 2;
    let capacity = count as u64 * 3000 + (64 << 20);
    let filled = store_in(backing.clone(), capacity, Some(background()))?;
    let mut scratch = Scratch::new();
    for index in 0..count {
        let mut page = pages[index % pages.len()];
        stamp(&mut page, index as u64);
        filled.put(index, &page, &mut scratch)?;
    }
    drop(filled);
    let (mut rates, mut seconds) = (Vec::new(), Vec::new());
    for round in 0..=extent.rounds.min(5) {
        let filled = store_in(backing.clone(), capacity, None)?;
        let recovery = *filled.store.recovery();
        ensure!(
            recovery.pages == count as u64 && recovery.discarded == 0,
            "not everything was found: {recovery:?}"
        );
        if round > 0 {
            let took = recovery.took.as_secs_f64();
            #[allow(clippy::cast_precision_loss, reason = "figures for people")]
            rates.push(count as f64 / took / f64::from(recovery.threads));
            seconds.push(took);
        }
    }
    let mut figures = Figures::default();
    figures.set("recover_per_s_core", median(rates));
    figures.set("recover_s", median(seconds));
    Ok(figures)
}
