// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages for tests: every form in which the store keeps one, made from a number.

// Each test program uses its own part of this.
#![allow(dead_code, unreachable_pub)]

use std::sync::Arc;

use cram_store::{PAGE_SIZE, Page, Store, StoreConfig};
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

/// How a page is made; together with a number it says every byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// One repeated word.
    Filled,
    /// Compresses to about so many 64ths of its size.
    Packs(u8),
    /// Does not compress.
    Noise,
}

pub fn content() -> impl Strategy<Value = Content> {
    prop_oneof![
        1 => Just(Content::Filled),
        3 => (1_u8..60).prop_map(Content::Packs),
        1 => Just(Content::Noise),
    ]
}

/// The page of that kind and number. Pages of different numbers differ.
pub fn page_of(content: Content, number: u64) -> Page {
    let mut page = [0; PAGE_SIZE];
    let noise_bytes = match content {
        Content::Filled => 0,
        Content::Packs(share) => PAGE_SIZE * usize::from(share) / 64,
        Content::Noise => PAGE_SIZE,
    };
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bf0_3635;
    for word in page[..noise_bytes].chunks_mut(8) {
        // splitmix64: short, and compresses not at all.
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = (state ^ state >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(mixed ^ mixed >> 31).to_le_bytes()[..word.len()]);
    }
    for word in page[noise_bytes..].chunks_mut(8) {
        word.copy_from_slice(&number.to_le_bytes()[..word.len()]);
    }
    page
}

/// A content for a number, for tests that do not choose one by proptest.
pub fn some_content(number: u64) -> Content {
    match number % 10 {
        0 => Content::Filled,
        1 => Content::Noise,
        share => Content::Packs(u8::try_from(share * 6).unwrap_or(1)),
    }
}
