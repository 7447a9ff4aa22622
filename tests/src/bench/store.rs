// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The store's benchmarks, in sections. Each section runs in a process of its own, so that none
//! measures what another one left behind.

mod evict;
mod growth;
mod memory;
mod recover;
mod speed;
mod zstd;

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use cram_store::{
    Background, Backing, ObjectId, Pool, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store,
    StoreConfig,
};

use super::codec::Codec;
use super::corpus::Page;
use super::figures::{Aim, Figures, Target, aim};

/// The sections, in the order in which they are run.
pub const SECTIONS: [&str; 6] = ["speed", "memory", "growth", "recover", "zstd", "evict"];

/// How thorough to be.
#[derive(Clone, Copy, Debug)]
pub struct Extent {
    /// Rounds of what is measured in turns.
    pub rounds: usize,
    /// Pages to fill a store with.
    pub pages: usize,
    /// Pages of a large store.
    pub many_pages: usize,
}

impl Extent {
    /// What the figures in the documentation are measured with.
    pub const WHOLE: Extent = Extent {
        rounds: 9,
        pages: 500_000,
        many_pages: 8_000_000,
    };
    /// A look, in a minute.
    pub const QUICK: Extent = Extent {
        rounds: 3,
        pages: 60_000,
        many_pages: 400_000,
    };
}

/// What the store's figures are, and what was aimed at.
pub const AIMS: &[Aim] = &[
    aim(
        "put_vs_codec",
        "puts / raw lz4_flex, pages per second, one thread",
        Some(Target::AtLeast(0.90)),
    ),
    aim(
        "get_vs_codec",
        "gets / raw lz4_flex, pages per second, one thread",
        Some(Target::AtLeast(0.85)),
    ),
    aim(
        "put_cold_vs_codec",
        "the same for pages that are in no cache",
        None,
    ),
    aim(
        "put_fill_vs_codec",
        "the same into memory that the host has yet to give",
        None,
    ),
    aim("get_random_vs_codec", "gets in random order", None),
    aim("put_us", "microseconds for a put", None),
    aim("get_us", "microseconds for a get", None),
    aim(
        "codec_put_us",
        "microseconds for lz4_flex to compress",
        None,
    ),
    aim("codec_get_us", "microseconds for it to decompress", None),
    aim(
        "scaling_2",
        "puts by two threads / by one",
        Some(Target::AtLeast(1.8)),
    ),
    aim(
        "held_vs_compressed",
        "process memory / compressed bytes, filled",
        Some(Target::AtMost(1.05)),
    ),
    aim(
        "held_vs_compressed_churned",
        "the same after twice as many replacements, half freed, compacted",
        Some(Target::AtMost(1.08)),
    ),
    aim(
        "held_vs_compressed_one_size",
        "the same with images all of about 2,084 bytes",
        Some(Target::AtMost(1.06)),
    ),
    aim(
        "metadata_bytes_per_page",
        "bytes of metadata for each page",
        Some(Target::AtMost(24.0)),
    ),
    aim(
        "rss_after_empty_vs_peak",
        "process memory when all is flushed / at its peak",
        Some(Target::AtMost(0.05)),
    ),
    aim(
        "hash_map_vs_compressed",
        "a hash map of boxed images: process memory / compressed bytes",
        None,
    ),
    aim(
        "zbud_vs_compressed",
        "a model of zbud on the same images",
        None,
    ),
    aim(
        "zsmalloc_vs_compressed",
        "a model of zsmalloc on the same images",
        None,
    ),
    aim(
        "zbud_vs_compressed_half",
        "… after a random half was freed",
        None,
    ),
    aim(
        "zsmalloc_vs_compressed_half",
        "… after a random half was freed",
        None,
    ),
    aim(
        "cost_growth",
        "time for a page, many stored / few stored",
        Some(Target::AtMost(1.15)),
    ),
    aim("cost_growth_pages", "how many were stored", None),
    aim(
        "recover_per_s_core",
        "pages found again by one processor in a second",
        Some(Target::AtLeast(1e6)),
    ),
    aim(
        "zstd_gain",
        "share of bytes less on cold ELF pages",
        Some(Target::AtLeast(0.20)),
    ),
    aim(
        "zstd_put_slowdown",
        "puts slowed by recompression in the background",
        Some(Target::AtMost(0.03)),
    ),
    aim(
        "misses_store",
        "gets missed by the store's ephemeral pages, traces of programs",
        None,
    ),
    aim("misses_lru", "the same of a model of plain LRU", None),
    aim("misses_sieve", "the same of a model of SIEVE", None),
    aim("misses_s3fifo", "the same of a model of S3-FIFO", None),
    aim("misses_fifo", "the same of a model of FIFO", None),
];

/// Runs one section.
///
/// # Errors
/// When there is no such section, or it fails.
pub fn run(section: &str, extent: Extent) -> Result<Figures> {
    match section {
        "speed" => speed::run(extent),
        "memory" => memory::run(extent),
        "hash-map" => memory::run_hash_map(extent),
        "growth" => growth::run(extent),
        "recover" => recover::run(extent),
        "zstd" => zstd::run(extent),
        "evict" => evict::run(),
        _ => bail!(
            "there is no section {section}; there are: {}",
            SECTIONS.join(", ")
        ),
    }
}

/// A store with one client and one pool.
struct Filled {
    store: Arc<Store>,
    pool: Arc<Pool>,
}

const OBJECT: ObjectId = ObjectId([1, 0, 0]);

fn store_of(capacity_bytes: u64, background: Option<Background>) -> Result<Filled> {
    store_in(Backing::Memory, capacity_bytes, background)
}

fn store_in(
    backing: Backing,
    capacity_bytes: u64,
    background: Option<Background>,
) -> Result<Filled> {
    let store = Store::new(StoreConfig {
        capacity_bytes,
        background,
        backing,
        ..StoreConfig::default()
    })?;
    let client = match store.client("guest") {
        Some(client) => client,
        None => store.add_client("guest", None)?,
    };
    let spec = PoolSpec {
        kind: PoolKind::Persistent,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(0), spec)?;
    let pool = client.pool(PoolId(0)).context("the pool is there")?;
    Ok(Filled { store, pool })
}

impl Filled {
    fn put(&self, index: usize, page: &Page, scratch: &mut Scratch) -> Result<()> {
        let put = self.pool.put(OBJECT, u32::try_from(index)?, page, scratch);
        ensure!(put == PutResult::Stored, "a put was refused: {put:?}");
        Ok(())
    }
}

/// Makes a page unlike any other by a number in its middle.
pub(crate) fn stamp(page: &mut Page, number: u64) {
    if let Some(place) = page.get_mut(2048..2056) {
        place.copy_from_slice(&number.to_le_bytes());
    }
}

/// splitmix64: the same choices each time.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % limit.max(1) as u64).unwrap_or(0)
    }

    pub(crate) fn shuffle<T>(&mut self, list: &mut [T]) {
        for at in (1..list.len()).rev() {
            let other = self.below(at + 1);
            list.swap(at, other);
        }
    }
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn ratio(bytes: u64, of: u64) -> f64 {
    bytes as f64 / of.max(1) as f64
}

/// What a background thread does in a benchmark that is not about cold pages.
fn background() -> Background {
    Background {
        cold_after: None,
        ..Background::default()
    }
}
