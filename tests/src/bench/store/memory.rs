// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Bytes held for bytes stored, as the operating system counts the process's memory.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use cram_store::Scratch;

use super::{Codec, Extent, Filled, OBJECT, Random, background, ratio, stamp, store_of};
use crate::bench::corpus::{self, Page};
use crate::bench::figures::{Figures, give_back_free_memory, resident_bytes};
use crate::bench::rivals;

const PAGES_OF_A_KIND: usize = 12_000;
/// Images of a one-size mix are this long, give or take a sixteenth.
const ONE_SIZE: usize = 2084;

/// Room for so many pages like these, and a sixth to spare.
fn capacity_for(pages: &[Page], count: usize) -> u64 {
    let mut codec = Codec::new();
    let sum: usize = pages.iter().map(|page| codec.pack(page)).sum();
    let image = (sum / pages.len().max(1)) as u64;
    (count as u64 * image * 7 / 6).max(64 << 20)
}

pub(super) fn run(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(PAGES_OF_A_KIND)?;
    let pages = corpus::mixed(&corpus);
    let mut figures = Figures::default();
    mixed(&pages, extent, &mut figures)?;
    one_size(&pages, extent, &mut figures)?;
    Ok(figures)
}

/// Pages of a corpus under indexes, each other than all before.
struct Churn<'a> {
    pages: &'a [Page],
    filled: &'a Filled,
    scratch: Scratch,
    codec: Codec,
    number: u64,
    /// Bytes of the image under each index.
    sizes: Vec<usize>,
}

impl Churn<'_> {
    fn put(&mut self, index: usize) -> Result<()> {
        self.number += 1;
        let mut page = self.pages[index % self.pages.len()];
        stamp(&mut page, self.number);
        let size = self.codec.pack(&page);
        if index == self.sizes.len() {
            self.sizes.push(size);
        } else {
            self.sizes[index] = size;
        }
        self.filled.put(index, &page, &mut self.scratch)
    }

    fn compressed_bytes(&self) -> u64 {
        self.sizes.iter().map(|size| *size as u64).sum()
    }
}

fn mixed(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    give_back_free_memory();
    let before = resident_bytes()?;
    let held = || -> Result<u64> { Ok(resident_bytes()?.saturating_sub(before)) };
    let filled = store_of(capacity_for(pages, extent.pages), Some(background()))?;
    let mut churn = Churn {
        pages,
        filled: &filled,
        scratch: Scratch::new(),
        codec: Codec::new(),
        number: 0,
        sizes: Vec::with_capacity(extent.pages),
    };
    for index in 0..extent.pages {
        churn.put(index)?;
    }
    // The list of sizes is the benchmark's own.
    let own = extent.pages as u64 * 8;
    settle();
    let full = held()? - own;
    figures.set("held_vs_compressed", ratio(full, churn.compressed_bytes()));
    figures.set(
        "metadata_bytes_per_page",
        ratio(filled.store.metadata_bytes(), extent.pages as u64),
    );
    for model in [rivals::zbud(&churn.sizes), rivals::zsmalloc(&churn.sizes)] {
        let sizes = churn.sizes.iter().skip(1).step_by(2);
        let half: u64 = sizes.map(|size| *size as u64).sum();
        let name = model.name;
        figures.set(
            format!("{name}_vs_compressed"),
            ratio(model.full_bytes, churn.compressed_bytes()),
        );
        figures.set(
            format!("{name}_vs_compressed_half"),
            ratio(model.half_bytes, half),
        );
    }

    let mut random = Random(11);
    for _ in 0..2 * extent.pages {
        churn.put(random.below(extent.pages))?;
    }
    let mut order: Vec<usize> = (0..extent.pages).collect();
    random.shuffle(&mut order);
    for index in order.drain(..extent.pages / 2) {
        filled.pool.flush_page(OBJECT, u32::try_from(index)?, 1);
        churn.sizes[index] = 0;
    }
    drop(order);
    let uncompacted = held()?.saturating_sub(own);
    figures.set(
        "held_vs_compressed_churned_uncompacted",
        ratio(uncompacted, churn.compressed_bytes()),
    );
    filled.store.compact();
    let compacted = held()?.saturating_sub(own);
    figures.set(
        "held_vs_compressed_churned",
        ratio(compacted, churn.compressed_bytes()),
    );

    filled.pool.flush_object(OBJECT);
    filled.store.compact();
    let empty = held()?.saturating_sub(own);
    figures.set("rss_after_empty_vs_peak", ratio(empty, full));
    figures.set("peak_bytes", ratio(full, 1));
    Ok(())
}

/// Spans that were had ready for puts are given back when none come any more.
fn settle() {
    std::thread::sleep(std::time::Duration::from_millis(2500));
}

fn one_size(pages: &[Page], extent: Extent, figures: &mut Figures) -> Result<()> {
    let mut codec = Codec::new();
    let near = ONE_SIZE - ONE_SIZE / 16..=ONE_SIZE + ONE_SIZE / 16;
    let chosen: Vec<Page> = pages
        .iter()
        .filter(|page| near.contains(&codec.pack(page)))
        .copied()
        .collect();
    ensure!(!chosen.is_empty(), "no page compresses to half");
    let count = extent.pages / 5;
    give_back_free_memory();
    let before = resident_bytes()?;
    let filled = store_of(capacity_for(&chosen, count), Some(background()))?;
    let mut churn = Churn {
        pages: &chosen,
        filled: &filled,
        scratch: Scratch::new(),
        codec,
        number: 1 << 40,
        sizes: Vec::with_capacity(count),
    };
    for index in 0..count {
        churn.put(index)?;
    }
    settle();
    let held = resident_bytes()?.saturating_sub(before + count as u64 * 8);
    figures.set(
        "held_vs_compressed_one_size",
        ratio(held, churn.compressed_bytes()),
    );
    for model in [rivals::zbud(&churn.sizes), rivals::zsmalloc(&churn.sizes)] {
        figures.set(
            format!("{}_vs_compressed_one_size", model.name),
            ratio(model.full_bytes, churn.compressed_bytes()),
        );
    }
    Ok(())
}

/// A plain hash map of boxed images, in a process of its own.
pub(super) fn run_hash_map(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(PAGES_OF_A_KIND)?;
    let pages = corpus::mixed(&corpus);
    give_back_free_memory();
    let before = resident_bytes()?;
    let mut codec = Codec::new();
    let mut map: HashMap<(u64, u32), Box<[u8]>> = HashMap::new();
    let mut compressed = 0;
    for index in 0..extent.pages {
        let mut page = pages[index % pages.len()];
        stamp(&mut page, index as u64);
        let len = codec.pack(&page);
        compressed += len as u64;
        let image = codec.image.get(..len).unwrap_or(&page);
        map.insert((1, u32::try_from(index)?), image.into());
    }
    let held = resident_bytes()?.saturating_sub(before);
    ensure!(map.len() == extent.pages, "the map is whole");
    let mut figures = Figures::default();
    figures.set("hash_map_vs_compressed", ratio(held, compressed));
    Ok(figures)
}
