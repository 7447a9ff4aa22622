// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The orders in which pages are read back.
//!
//! Each order is a permutation of `0..pages`, computed page by page without a
//! table, so that it costs no memory in a guest that has none to spare.

use serde::{Deserialize, Serialize};

/// An order of reading.
#[derive(Serialize, Deserialize, Clone, Copy, Debug, PartialEq, Eq)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Order {
    /// Upwards, as readahead likes it.
    Sequential,
    /// Downwards.
    Reverse,
    /// Scattered, different for every seed.
    Random,
    /// Every 17th page, then the next ones: neighbours in memory are far apart in time.
    Stride,
}

const STRIDE: u64 = 17;

/// Spreads a seed over all bits (the finaliser of SplitMix64).
pub(crate) fn mix(seed: u64) -> u64 {
    let mut x = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

impl Order {
    /// The pages `0..pages` in this order, each exactly once.
    pub(crate) fn pages(self, pages: u64, seed: u64) -> impl Iterator<Item = u64> {
        // Walk the next power of two with a full-period generator and skip what lies beyond.
        let span = pages.next_power_of_two();
        let steps = if self == Order::Random { span } else { pages };
        let multiplier = (mix(seed) & !7) | 5; // 1 modulo 4: full period modulo a power of two
        let increment = mix(seed ^ 0xabcd) | 1;
        let mut state = mix(seed ^ 0x1234) & span.wrapping_sub(1);
        let mut stride_next = 0;
        (0..steps).filter_map(move |step| match self {
            Order::Sequential => Some(step),
            Order::Reverse => Some(pages - 1 - step),
            Order::Random => {
                state =
                    state.wrapping_mul(multiplier).wrapping_add(increment) & span.wrapping_sub(1);
                // Low bits of such a generator alternate; folding the high half in (a bijection) hides that.
                let page = scatter(state, span);
                (page < pages).then_some(page)
            }
            Order::Stride => {
                let page = stride_next;
                stride_next += STRIDE;
                if stride_next >= pages {
                    stride_next = stride_next % STRIDE + 1;
                }
                Some(page)
            }
        })
    }
}

/// A bijection of `0..span` (a power of two) that carries high bits into low ones.
fn scatter(state: u64, span: u64) -> u64 {
    let bits = span.trailing_zeros();
    if bits < 2 {
        return state;
    }
    let mask = span - 1;
    let half = bits / 2 + bits % 2;
    let x = state ^ (state >> half);
    (x.wrapping_mul(0x9e37_79b1) & mask) ^ ((x.wrapping_mul(0x9e37_79b1) & mask) >> half)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_order_visits_every_page_once() {
        for order in [
            Order::Sequential,
            Order::Reverse,
            Order::Random,
            Order::Stride,
        ] {
            for pages in [0, 1, 2, 3, 16, 17, 18, 19, 255, 1000, 4096] {
                for seed in 0..5 {
                    let visited: Vec<u64> = order.pages(pages, seed).collect();
                    assert_eq!(visited.len() as u64, pages, "{order:?} {pages}");
                    let distinct: BTreeSet<u64> = visited.iter().copied().collect();
                    assert_eq!(distinct.len() as u64, pages, "{order:?} {pages}");
                    assert!(distinct.iter().all(|&page| page < pages));
                }
            }
        }
    }

    #[test]
    fn random_is_scattered_and_follows_the_seed() {
        let first: Vec<u64> = Order::Random.pages(4096, 1).collect();
        let second: Vec<u64> = Order::Random.pages(4096, 2).collect();
        assert_ne!(first, second);
        assert_eq!(first, Order::Random.pages(4096, 1).collect::<Vec<_>>());
        let neighbours = first.windows(2).filter(|w| w[0].abs_diff(w[1]) < 8).count();
        assert!(neighbours < 100, "{neighbours} of 4096 steps are near");
    }
}
