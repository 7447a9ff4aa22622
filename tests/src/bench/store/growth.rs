// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whether a page costs more when many are stored.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use cram_store::{GetResult, PutResult, Scratch};

use super::{Extent, Filled, OBJECT, Random, background, stamp, store_of};
use crate::bench::corpus::{self, PAGE_SIZE, Page};
use crate::bench::figures::{Figures, available_bytes, median};

const PAGES_OF_A_KIND: usize = 4000;
const FEW_PAGES: usize = 64_000;
/// Operations of one round on each store.
const OPERATIONS: usize = 60_000;
/// A page takes about so much, with what it takes to find it.
const PAGE_BYTES: u64 = 1900;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(PAGES_OF_A_KIND)?;
    let pages = corpus::mixed(&corpus);
    // Not more than the machine can hold, with something left for the others.
    let room = available_bytes()? / 10 * 8 / PAGE_BYTES;
    let many = extent.many_pages.min(usize::try_from(room)?);
    let stores = [filled_with(FEW_PAGES, &pages)?, filled_with(many, &pages)?];
    let mut scratches = [Scratch::new(), Scratch::new()];
    let mut random = Random(3);
    let mut number = 1 << 50;
    let [few_scratch, many_scratch] = &mut scratches;
    let (mut few_random, mut many_random) = (Random(random.next()), Random(random.next()));
    let mut cost = |filled: &Filled, count: usize, scratch: &mut Scratch, random: &mut Random| {
        number += OPERATIONS as u64;
        work(filled, count, &pages, number, scratch, random)
    };
    let mut few_times = Vec::new();
    let mut many_times = Vec::new();
    for round in 0..=extent.rounds {
        let few = cost(&stores[0], FEW_PAGES, few_scratch, &mut few_random);
        let many = cost(&stores[1], many, many_scratch, &mut many_random);
        if round > 0 {
            few_times.push(few.as_secs_f64());
            many_times.push(many.as_secs_f64());
        }
    }
    let ratios = many_times
        .iter()
        .zip(&few_times)
        .map(|(many, few)| many / few);
    let mut figures = Figures::default();
    figures.set("cost_growth", median(ratios.collect()));
    #[allow(clippy::cast_precision_loss, reason = "figures for people")]
    figures.set("cost_growth_pages", many as f64);
    Ok(figures)
}

fn filled_with(count: usize, pages: &[Page]) -> Result<Filled> {
    let capacity = count as u64 * PAGE_BYTES * 5 / 4 + (64 << 20);
    let filled = store_of(capacity, Some(background()))?;
    let mut scratch = Scratch::new();
    for index in 0..count {
        let mut page = pages[index % pages.len()];
        stamp(&mut page, index as u64);
        filled.put(index, &page, &mut scratch)?;
    }
    Ok(filled)
}

/// Replaces pages and gets others, in random order: a put and a get for each step.
fn work(
    filled: &Filled,
    count: usize,
    pages: &[Page],
    number: u64,
    scratch: &mut Scratch,
    random: &mut Random,
) -> Duration {
    let mut page = [0; PAGE_SIZE];
    let began = Instant::now();
    for step in 0..OPERATIONS {
        let at = random.below(count);
        page = pages[at % pages.len()];
        stamp(&mut page, number + step as u64);
        let index = u32::try_from(at).unwrap_or(0);
        let put = filled.pool.put(OBJECT, index, &page, scratch);
        assert!(put == PutResult::Stored, "a put was refused");
        let other = u32::try_from(random.below(count)).unwrap_or(0);
        let got = filled.pool.get(OBJECT, other, &mut page, scratch);
        assert!(got == GetResult::Found, "a page was not found");
    }
    black_box(&page);
    began.elapsed()
}
