// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages for tests: every form in which the store keeps one, made from a number.

// Each test program uses its own part of this.
#![allow(dead_code, unreachable_pub)]

#[cfg(not(fuzzing))]
pub mod superblock;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::sync::Arc;

use cram_store::{PAGE_SIZE, Page, Store, StoreConfig};
#[cfg(not(fuzzing))]
use proptest::prelude::*;

/// A configuration without a background thread: with one, a store is never quite at rest, which
/// [`Store::check`] wants it to be.
pub fn config_of(capacity_bytes: u64) -> StoreConfig {
    StoreConfig {
        capacity_bytes,
        background: None,
        ..StoreConfig::default()
    }
}

pub fn store_of(capacity_bytes: u64) -> Arc<Store> {
    Store::new(config_of(capacity_bytes)).unwrap()
}

/// xorshift: enough to choose by.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// The seed of a test that draws lots, printed so that it can be repeated: `CRAM_SEED`, or any.
pub fn seed() -> u64 {
    let given = std::env::var("CRAM_SEED").ok();
    let seed = given.map_or_else(
        || RandomState::new().hash_one(0),
        |text| text.parse().expect("CRAM_SEED is a number"),
    );
    println!("CRAM_SEED={seed}");
    seed.max(1)
}

/// How often something is repeated: `usual` times, or as much more often as `CRAM_LONG` says.
pub fn times(usual: u64) -> u64 {
    let factor = std::env::var("CRAM_LONG").ok();
    usual * factor.map_or(1, |text| text.parse().expect("CRAM_LONG is a number"))
}

/// How a page is made; together with a number it says every byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub enum Content {
    /// One repeated word.
    Filled,
    /// Compresses to about so many 64ths of its size.
    Packs(u8),
    /// Text of a few words: zstd packs it better than lz4.
    Text,
    /// Does not compress.
    Noise,
}

#[cfg(not(fuzzing))]
pub fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        1 => Just(Content::Filled),
        3 => (1_u8..60).prop_map(Content::Packs),
        1 => Just(Content::Text),
        1 => Just(Content::Noise),
    ]
}

/// The page of that kind and number. Pages of different numbers differ.
pub fn page_of(content: Content, number: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let noise_bytes = match content {
        Content::Filled => 0,
        Content::Text => return text(number),
        Content::Packs(share) => PAGE_SIZE * usize::from(share % 60) / 64,
        Content::Noise => PAGE_SIZE,
    };
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bf0_3635;
    for word in page[..noise_bytes].chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        word.copy_from_slice(&mixed(state).to_le_bytes()[..word.len()]);
    }
    for word in page[noise_bytes..].chunks_mut(8) {
        word.copy_from_slice(&number.to_le_bytes()[..word.len()]);
    }
    page
}

fn mixed(state: u64) -> u64 {
    // splitmix64: short, and compresses not at all.
    let mut mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ mixed >> 31
}

fn text(number: u64) -> Page {
    const WORDS: [&[u8]; 16] = [
        b"page ", b"memory ", b"the ", b"of ", b"a ", b"guest ", b"host ", b"swap ", b"cold ",
        b"is ", b"kept ", b"in ", b"and ", b"comes ", b"back ", b"when.\n",
    ];
    let mut page = [0; PAGE_SIZE];
    let (mut at, mut step) = (0, 0);
    while at < PAGE_SIZE {
        step += 1;
        let word = WORDS[(mixed(number.wrapping_mul(7919).wrapping_add(step)) % 16) as usize];
        let len = word.len().min(PAGE_SIZE - at);
        page[at..at + len].copy_from_slice(&word[..len]);
        at += len;
    }
    // Numbers that differ give pages that do.
    page[PAGE_SIZE - 8..].copy_from_slice(&number.to_le_bytes());
    page
}

/// A content for a number, for tests that do not choose one by proptest.
pub fn some_content(number: u64) -> Content {
    match number % 10 {
        0 => Content::Filled,
        1 => Content::Noise,
        2 => Content::Text,
        share => Content::Packs(u8::try_from(share * 6).unwrap_or(1)),
    }
}
