// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What packing cold pages once more saves, and what it costs those who put meanwhile.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cram_store::{Background, Scratch};

use super::{Extent, Filled, ratio, stamp, store_of};
use crate::bench::corpus::{self, Kind, Page};
use crate::bench::figures::{Figures, median};

const PAGES_OF_A_KIND: usize = 12_000;
const CAPACITY_BYTES: u64 = 1 << 30;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(PAGES_OF_A_KIND)?;
    let elf = corpus
        .iter()
        .find(|pages| pages.kind == Kind::Elf)
        .context("there are programs")?;
    let mut figures = Figures::default();
    for kind in &corpus {
        let gain = gain(&kind.pages)?;
        if kind.kind == Kind::Elf {
            figures.set("zstd_gain", gain);
        }
        figures.set(format!("zstd_gain_{}", kind.kind.name()), gain);
    }
    slowdown(&elf.pages, extent, &mut figures)?;
    Ok(figures)
}

/// The share of bytes less.
fn gain(pages: &[Page]) -> Result<f64> {
    let filled = store_of(CAPACITY_BYTES, None)?;
    let mut scratch = Scratch::new();
    for (index, page) in pages.iter().enumerate() {
        filled.put(index, page, &mut scratch)?;
    }
    let before = filled.store.stats().compr_data_size;
    filled.store.recompress(Duration::ZERO);
    let after = filled.store.stats().compr_data_size;
    Ok(1.0 - ratio(after, before))
}

/// Puts on one thread, in a store whose background thread finds everything cold, and in one where it
/// never does.
fn slowdown(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    let store = |cold_after| {
        store_of(
            CAPACITY_BYTES,
            Some(Background {
                cold_after,
                ..Background::default()
            }),
        )
    };
    let stores = [store(None)?, store(Some(Duration::ZERO))?];
    let mut number = 0;
    let mut ratios = Vec::new();
    for round in 0..=extent.rounds {
        let [without, with] = &stores;
        let mut times = [0.0; 2];
        for (filled, time) in [without, with].into_iter().zip(&mut times) {
            number += pages.len() as u64;
            *time = put_all(filled, pages, number)?;
            // Long enough without puts for the store to be idle, and the thread at work.
            std::thread::sleep(Duration::from_millis(400));
        }
        if round > 0 {
            ratios.push(times[1] / times[0]);
        }
    }
    figures.set("zstd_put_slowdown", median(ratios) - 1.0);
    let recompressed = stores[1].store.stats().recompressed_pages;
    figures.set("zstd_pages_recompressed_meanwhile", ratio(recompressed, 1));
    Ok(())
}

fn put_all(filled: &Filled, pages: &[Page], number: u64) -> Result<f64> {
    let mut scratch = Scratch::new();
    let began = Instant::now();
    for (index, page) in pages.iter().enumerate() {
        let mut page = *page;
        stamp(&mut page, number + index as u64);
        filled.put(index, &page, &mut scratch)?;
    }
    Ok(began.elapsed().as_secs_f64())
}
