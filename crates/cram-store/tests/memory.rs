// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the store says it holds is what the operating system says the process
//! has. Alone in its file: the process must have nothing else to do.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]
#![cfg(target_os = "linux")]

mod pages;

use cram_store::{ObjectId, PoolId, PoolKind, PoolSpec, PutResult, Scratch};
use pages::{page_of, some_content, store_of};

const CAPACITY_BYTES: u64 = 32 << 20;
/// What the process may take beyond the store: stacks, the test's own pages, the allocator's slack.
const SLACK_BYTES: u64 = 3 << 20;

/// The process's resident memory, in bytes.
fn resident_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmRSS:"))
        .unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
        << 10
}

#[test]
fn held_bytes_are_what_the_process_takes() {
    let store = store_of(CAPACITY_BYTES);
    let client = store.add_client("a", None).unwrap();
    let spec = PoolSpec {
        kind: PoolKind::Persistent,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(0), spec).unwrap();
    let pool = client.pool(PoolId(0)).unwrap();
    let mut scratch = Scratch::new();
    let before = resident_bytes();

    let mut number = 0_u64;
    let mut churn = |rounds: u64| {
        let mut refused = 0;
        for _ in 0..rounds {
            number += 1;
            // Scattered over three objects, dense and sparse; every third put replaces or follows
            // a flush.
            let place = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 20;
            let (object, index) = (place % 3, (place / 3 % 30_000) as u32);
            if place.is_multiple_of(5) {
                pool.flush_page(ObjectId([object; 3]), index, place % 8);
            }
            let page = page_of(some_content(number), number);
            let put = pool.put(ObjectId([object; 3]), index, &page, &mut scratch);
            refused += u64::from(put != PutResult::Stored);
            assert!(store.stats().mem_used_total <= CAPACITY_BYTES);
        }
        refused
    };
    assert!(churn(60_000) > 0, "the store must become full");
    churn(60_000);
    let (held, resident) = (store.stats().mem_used_total, resident_bytes() - before);
    assert!(
        resident <= CAPACITY_BYTES + SLACK_BYTES,
        "{resident} bytes resident"
    );
    assert!(
        resident <= held + SLACK_BYTES,
        "{held} bytes held, {resident} resident"
    );
    assert!(
        held <= resident + SLACK_BYTES,
        "{held} bytes held, {resident} resident"
    );

    client.destroy_pool(PoolId(0)).unwrap();
    let left = resident_bytes().saturating_sub(before);
    assert!(
        left <= SLACK_BYTES,
        "{left} bytes resident in an empty store"
    );
    store.check().unwrap();
}
