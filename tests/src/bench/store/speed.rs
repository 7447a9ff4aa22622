// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Microseconds for a page, beside the codec's own.
//!
//! As the device does it, each page is copied to a private buffer first, and what is done with it
//! then, by the codec or by the store, is done with that. (`put_cold_vs_codec` is without the copy.)

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::Result;
use cram_store::{GetResult, PutResult, Scratch};

use super::{Extent, Filled, OBJECT, Random, background, stamp, store_of};
use crate::bench::codec::{Codec, Images};
use crate::bench::corpus::{self, Kind, PAGE_SIZE, Page, Pages};
use crate::bench::figures::{Figures, Turns};

const PAGES_OF_A_KIND: usize = 12_000;
const CAPACITY_BYTES: u64 = 2 << 30;

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(PAGES_OF_A_KIND)?;
    let mut figures = Figures::default();
    let pages = corpus::mixed(&corpus);
    puts(&pages, extent, &mut figures)?;
    gets(&pages, extent, &mut figures)?;
    fills(&pages, extent, &mut figures)?;
    scaling(&pages, extent, &mut figures)?;
    for kind in &corpus {
        of_kind(kind, extent, &mut figures)?;
    }
    Ok(figures)
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn microseconds(seconds: f64, pages: usize) -> f64 {
    seconds * 1e6 / pages.max(1) as f64
}

fn timed(act: impl FnOnce()) -> Duration {
    let began = Instant::now();
    act();
    began.elapsed()
}

/// Puts every page. A refusal would be no speed.
fn put_all(pages: &[Page], filled: &Filled, scratch: &mut Scratch, is_cold: bool) {
    let mut buffer = [0; PAGE_SIZE];
    for (index, page) in (0..).zip(pages) {
        let put = if is_cold {
            filled.pool.put(OBJECT, index, page, scratch)
        } else {
            buffer = *page;
            filled.pool.put(OBJECT, index, black_box(&buffer), scratch)
        };
        assert!(put == PutResult::Stored, "a put was refused");
    }
    black_box(&buffer);
}

/// Replacing pages in a store that has its memory.
fn puts(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    let filled = store_of(CAPACITY_BYTES, Some(background()))?;
    let (mut codec, mut scratch) = (Codec::new(), Scratch::new());
    let (mut fresh, mut cold) = (Stamped::new(pages), Stamped::new(pages));
    let mut cold_codec = Codec::new();
    let mut cold_scratch = Scratch::new();
    let turns = Turns::take_timed(
        extent.rounds,
        &mut [
            &mut || timed(|| codec.pack_all(pages, true)),
            &mut || {
                let pages = fresh.next();
                timed(|| put_all(pages, &filled, &mut scratch, false))
            },
            &mut || timed(|| cold_codec.pack_all(pages, false)),
            &mut || {
                let pages = cold.next();
                timed(|| put_all(pages, &filled, &mut cold_scratch, true))
            },
        ],
    );
    figures.set("put_vs_codec", turns.first_over(1));
    figures.set("put_cold_vs_codec", turns.median_s(2) / turns.median_s(3));
    figures.set("codec_put_us", microseconds(turns.median_s(0), pages.len()));
    figures.set("put_us", microseconds(turns.median_s(1), pages.len()));
    Ok(())
}

/// Pages that are new each time: nothing is ever put again as it was.
struct Stamped {
    pages: Vec<Page>,
    number: u64,
}

impl Stamped {
    fn new(pages: &[Page]) -> Self {
        let pages = pages.to_vec();
        // Where these numbers begin, so that two lists have none in common.
        let place = pages.as_ptr().addr() as u64;
        Self {
            pages,
            number: place.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        }
    }

    fn next(&mut self) -> &[Page] {
        for page in &mut self.pages {
            self.number = self.number.wrapping_add(1);
            stamp(page, self.number);
        }
        &self.pages
    }
}

fn gets(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    let filled = store_of(CAPACITY_BYTES, Some(background()))?;
    let mut scratch = Scratch::new();
    put_all(pages, &filled, &mut scratch, false);
    let images = Images::of(pages);
    let mut order: Vec<u32> = (0..u32::try_from(pages.len())?).collect();
    Random(5).shuffle(&mut order);
    let get_all = |indexes: &mut dyn Iterator<Item = u32>, scratch: &mut Scratch| {
        let mut page = [0; PAGE_SIZE];
        for index in indexes {
            let got = filled.pool.get(OBJECT, index, &mut page, scratch);
            assert!(got == GetResult::Found, "a page was not found");
        }
        black_box(&page);
    };
    let mut other_scratch = Scratch::new();
    let all = || 0..u32::try_from(pages.len()).unwrap_or(0);
    let turns = Turns::take(
        extent.rounds,
        &mut [
            &mut || images.unpack_all(&mut all()),
            &mut || get_all(&mut all(), &mut scratch),
            &mut || images.unpack_all(&mut order.iter().copied()),
            &mut || get_all(&mut order.iter().copied(), &mut other_scratch),
        ],
    );
    figures.set("get_vs_codec", turns.first_over(1));
    figures.set("get_random_vs_codec", turns.median_s(2) / turns.median_s(3));
    figures.set("codec_get_us", microseconds(turns.median_s(0), pages.len()));
    figures.set("get_us", microseconds(turns.median_s(1), pages.len()));
    Ok(())
}

/// Filling a store that has no memory yet, with its background thread to fetch it.
fn fills(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    let (mut codec, mut scratch) = (Codec::new(), Scratch::new());
    let mut failed = None;
    let turns = Turns::take_timed(
        extent.rounds.min(5),
        &mut [
            &mut || timed(|| codec.pack_all(pages, true)),
            &mut || match store_of(CAPACITY_BYTES, Some(background())) {
                Ok(filled) => timed(|| put_all(pages, &filled, &mut scratch, false)),
                Err(error) => {
                    failed = Some(error);
                    Duration::ZERO
                }
            },
        ],
    );
    if let Some(error) = failed {
        return Err(error);
    }
    figures.set("put_fill_vs_codec", turns.first_over(1));
    Ok(())
}

/// Two threads into one pool, each with pages of its own, and one thread with the same work.
fn scaling(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    let filled = store_of(CAPACITY_BYTES, Some(background()))?;
    let half = pages.len() / 2;
    let mut lists = [
        Stamped::new(&pages[..half]),
        Stamped::new(&pages[half..2 * half]),
    ];
    let put = |number: u32, pages: &[Page]| {
        let mut scratch = Scratch::new();
        let mut buffer = [0; PAGE_SIZE];
        let first = number * u32::try_from(half).unwrap_or(0);
        for (index, page) in (first..).zip(pages) {
            buffer = *page;
            let put = filled
                .pool
                .put(OBJECT, index, black_box(&buffer), &mut scratch);
            assert!(put == PutResult::Stored, "a put was refused");
        }
        black_box(&buffer);
    };
    let mut one = Vec::new();
    let mut two = Vec::new();
    for round in 0..=extent.rounds {
        lists.iter_mut().for_each(|list| _ = list.next());
        let alone = timed(|| {
            put(0, &lists[0].pages);
            put(1, &lists[1].pages);
        });
        lists.iter_mut().for_each(|list| _ = list.next());
        let together = timed(|| {
            std::thread::scope(|scope| {
                let [first, second] = &lists;
                scope.spawn(|| put(0, &first.pages));
                scope.spawn(|| put(1, &second.pages));
            });
        });
        if round > 0 {
            one.push(alone.as_secs_f64());
            two.push(together.as_secs_f64());
        }
    }
    let ratios = one.iter().zip(&two).map(|(one, two)| one / two).collect();
    figures.set("scaling_2", crate::bench::figures::median(ratios));
    figures.set("scaling_2_of_codec", codec_scaling(pages, extent));
    Ok(())
}

/// What two threads of this machine are worth to the codec alone: the store cannot do better.
fn codec_scaling(pages: &[Page], extent: Extent) -> f64 {
    let (first, second) = pages.split_at(pages.len() / 2);
    let turns = Turns::take(
        extent.rounds,
        &mut [
            &mut || {
                let mut codec = Codec::new();
                codec.pack_all(first, true);
                codec.pack_all(second, true);
            },
            &mut || {
                std::thread::scope(|scope| {
                    scope.spawn(|| Codec::new().pack_all(first, true));
                    scope.spawn(|| Codec::new().pack_all(second, true));
                });
            },
        ],
    );
    turns.first_over(1)
}

/// The same, kind by kind, and how well each compresses.
fn of_kind(kind: &Pages, extent: Extent, figures: &mut Figures) -> Result<()> {
    let filled = store_of(CAPACITY_BYTES, Some(background()))?;
    let (mut codec, mut scratch) = (Codec::new(), Scratch::new());
    let mut fresh = Stamped::new(&kind.pages);
    let turns = Turns::take_timed(
        extent.rounds.min(5),
        &mut [
            &mut || timed(|| codec.pack_all(&kind.pages, true)),
            &mut || {
                let pages = fresh.next();
                timed(|| put_all(pages, &filled, &mut scratch, false))
            },
        ],
    );
    let stats = filled.store.stats();
    let name = Kind::name(kind.kind);
    figures.set(format!("put_vs_codec_{name}"), turns.first_over(1));
    figures.set(
        format!("ratio_{name}"),
        super::ratio(stats.orig_data_size, stats.compr_data_size),
    );
    Ok(())
}
