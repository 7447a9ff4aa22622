// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a client is billed is what it takes, and neither its quota nor the
//! store's capacity is passed, whatever kind of pages it puts.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use std::sync::Arc;

use cram_store::{ObjectId, Pool, PoolId, PoolKind, PoolSpec, PutResult, Refusal, Scratch, Store};
use pages::{Content, page_of, store_of};

/// How pages are named: which object, which index.
type Naming = fn(u64) -> (u64, u32);

const NAMINGS: [(&str, Naming); 3] = [
    ("dense", |number| (0, number as u32)),
    ("sparse", |number| (0, number as u32 * 64)),
    ("an object each", |number| (number, 0)),
];

fn pool_of(store: &Store, name: &str, quota_bytes: Option<u64>) -> Arc<Pool> {
    let client = store.add_client(name, quota_bytes).unwrap();
    let spec = PoolSpec {
        kind: PoolKind::Persistent,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(0), spec).unwrap();
    client.pool(PoolId(0)).unwrap()
}

/// Puts pages until `refusals` of them were refused in all, looking after each at what is held.
fn fill(
    pool: &Pool,
    content: Content,
    naming: Naming,
    refusals: u32,
    why: Refusal,
    look: impl Fn(),
) {
    let (mut scratch, mut number, mut refused) = (Scratch::new(), 0, 0);
    while refused < refusals {
        let (object, index) = naming(number);
        let page = page_of(content, 5);
        match pool.put(ObjectId([object, 0, 0]), index, &page, &mut scratch) {
            PutResult::Stored => (),
            PutResult::Refused(given) => {
                assert_eq!(given, why);
                refused += 1;
            }
        }
        look();
        number += 1;
    }
}

#[test]
fn without_a_quota_a_client_has_no_more_than_the_store() {
    for capacity_bytes in [8 << 20, 16 << 20] {
        for (how, naming) in NAMINGS {
            let store = store_of(capacity_bytes);
            let pool = pool_of(&store, "a", None);
            let client = store.client("a").unwrap();
            let look = || {
                let (used, held) = (client.stats().mem_used_total, store.stats().mem_used_total);
                assert!(used <= held, "{how}: {used} of {held} bytes");
                assert!(held <= capacity_bytes, "{how}: {held} bytes");
            };
            fill(&pool, Content::Filled, naming, 50, Refusal::NoSpace, look);
            let used = client.stats().mem_used_total;
            assert!(
                used > capacity_bytes / 100 * 80,
                "{how}: {used} of {capacity_bytes} bytes"
            );
            store.check().unwrap();
        }
    }
}

#[test]
fn a_quota_holds_at_every_moment_for_every_kind_of_page() {
    const QUOTA_BYTES: u64 = 4 << 20;
    let contents = [Content::Filled, Content::Packs(20), Content::Text];
    for content in contents {
        for (how, naming) in NAMINGS {
            let store = store_of(32 << 20);
            let pool = pool_of(&store, "a", Some(QUOTA_BYTES));
            let client = store.client("a").unwrap();
            let look = || {
                let stats = client.stats();
                assert!(stats.mem_used_max <= QUOTA_BYTES, "{how} {content:?}");
            };
            fill(&pool, content, naming, 50, Refusal::OverQuota, look);
            let used = client.stats().mem_used_total;
            assert!(used > QUOTA_BYTES / 100 * 90, "{how} {content:?}: {used}");
            store.check().unwrap();
        }
    }
}

#[test]
fn a_bill_is_the_truth_within_two_hundredths() {
    const CAPACITY_BYTES: u64 = 128 << 20;
    for (content, pages) in [(Content::Filled, 200_000), (Content::Packs(12), 60_000)] {
        for (how, naming) in NAMINGS {
            let store = store_of(CAPACITY_BYTES);
            let pool = pool_of(&store, "a", None);
            let client = store.client("a").unwrap();
            let before = (client.stats().mem_used_total, store.stats().mem_used_total);
            let mut scratch = Scratch::new();
            for number in 0..pages {
                let (object, index) = naming(number);
                let page = page_of(content, number + 1);
                let put = pool.put(ObjectId([object, 0, 0]), index, &page, &mut scratch);
                assert_eq!(put, PutResult::Stored);
            }
            store.compact();
            let billed = client.stats().mem_used_total - before.0;
            let held = store.stats().mem_used_total - before.1;
            assert!(
                billed <= held / 100 * 102 && held <= billed / 100 * 102,
                "{how} {content:?}: {billed} bytes billed, {held} held"
            );
        }
    }
}
