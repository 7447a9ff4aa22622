// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Stores that are nearly full: what is dead in them must never keep out what is new.

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

use cram_store::{
    Background, Backing, ObjectId, PAGE_SIZE, Page, Pool, PoolId, PoolKind, PoolSpec, PutResult,
    Scratch, Store, StoreConfig,
};
use pages::{Random, config_of, seed, times};

const OBJECT: ObjectId = ObjectId([7, 0, 0]);

fn pool_of(store: &Store, kind: PoolKind) -> Arc<Pool> {
    let client = match store.client("a") {
        Some(client) => client,
        None => store.add_client("a", None).unwrap(),
    };
    let id = PoolId(u32::from(kind != PoolKind::Persistent));
    let spec = PoolSpec {
        kind,
        refuse_incompressible: false,
    };
    client.new_pool(id, spec).unwrap();
    client.pool(id).unwrap()
}

/// A page that lz4 makes about `words` · 8 bytes of.
fn page_with(words: u64, random: &mut Random) -> Page {
    let mut page = [7; PAGE_SIZE];
    for word in page.as_chunks_mut::<8>().0.iter_mut().take(words as usize) {
        *word = random.below(u64::MAX).to_le_bytes();
    }
    page
}

/// Fills a store up to a share of its capacity (in hundredths), then puts other pages in the place of
/// those, many times. None may be refused.
fn churn(config: StoreConfig, hundredths: u64, words: u64, kind: PoolKind, random: &mut Random) {
    let (capacity_bytes, is_quiet) = (config.capacity_bytes, config.background.is_none());
    let store = Store::new(config).unwrap();
    let pool = pool_of(&store, kind);
    let mut scratch = Scratch::new();
    let mut put = |index: u32, random: &mut Random| {
        let words = random.below(words) + 1;
        let page = page_with(words, random);
        let put = pool.put(OBJECT, index, &page, &mut scratch);
        let stats = store.stats();
        assert_eq!(
            put,
            PutResult::Stored,
            "of {capacity_bytes} bytes, {} were held, and {} needed",
            stats.mem_used_total,
            stats.compr_data_size
        );
        stats.compr_data_size + 32 * stats.pages_stored
    };
    let mut count = 0;
    while put(count, random) < capacity_bytes / 100 * hundredths {
        count += 1;
    }
    for _ in 0..6 * u64::from(count) {
        put(random.below(u64::from(count)) as u32, random);
    }
    if is_quiet {
        store.check().unwrap();
    }
}

#[test]
fn what_was_replaced_makes_room_for_what_replaces_it() {
    let mut random = Random(seed());
    for _ in 0..times(1) {
        for (capacity_bytes, hundredths) in [(2 << 20, 70), (12 << 20, 80), (48 << 20, 88)] {
            for background in [None, Some(Background::default())] {
                for words in [3, 100, 430] {
                    let config = StoreConfig {
                        background,
                        ..config_of(capacity_bytes)
                    };
                    // The index of tiny pages is most of what they take.
                    let hundredths = if words == 3 { 40 } else { hundredths };
                    churn(config, hundredths, words, PoolKind::Persistent, &mut random);
                }
            }
        }
    }
}

/// More threads than processors, each replacing pages of its own, in a store with little room.
#[test]
fn many_threads_replace_pages_in_a_store_that_is_nearly_full() {
    const THREADS: u32 = 16;
    const CAPACITY_BYTES: u64 = 48 << 20;
    let seed = seed();
    for background in [None, Some(Background::default())] {
        let store = Store::new(StoreConfig {
            background,
            ..config_of(CAPACITY_BYTES)
        })
        .unwrap();
        let pool = pool_of(&store, PoolKind::Persistent);
        let mut random = Random(seed);
        let (mut count, mut scratch) = (0, Scratch::new());
        while store.stats().compr_data_size + 32 * store.stats().pages_stored
            < CAPACITY_BYTES / 100 * 86
        {
            let page = page_with(random.below(430) + 1, &mut random);
            let put = pool.put(OBJECT, count, &page, &mut scratch);
            assert_eq!(put, PutResult::Stored);
            count += 1;
        }
        let share = count / THREADS;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let pool = &pool;
                scope.spawn(move || {
                    let mut random = Random(seed ^ u64::from(thread + 1));
                    let mut scratch = Scratch::new();
                    for _ in 0..4 * share {
                        let index = thread * share + random.below(share.into()) as u32;
                        let page = page_with(random.below(430) + 1, &mut random);
                        let put = pool.put(OBJECT, index, &page, &mut scratch);
                        assert_eq!(put, PutResult::Stored);
                    }
                });
            }
        });
        if background.is_none() {
            store.check().unwrap();
        }
    }
}

#[test]
fn ephemeral_pages_are_never_refused() {
    let mut random = Random(seed());
    for capacity_bytes in [2 << 20, 12 << 20, 48 << 20] {
        let store = Store::new(config_of(capacity_bytes)).unwrap();
        let kept = pool_of(&store, PoolKind::Persistent);
        let pool = pool_of(&store, PoolKind::PrivateEphemeral);
        let mut scratch = Scratch::new();
        let mut page = [0; PAGE_SIZE];
        for step in 0..capacity_bytes / 256 {
            let index = random.below(capacity_bytes / 512) as u32;
            let words = random.below(430) + 1;
            let new = page_with(words, &mut random);
            assert_eq!(
                pool.put(OBJECT, index, &new, &mut scratch),
                PutResult::Stored
            );
            let _ = pool.get(
                OBJECT,
                random.below(capacity_bytes / 512) as u32,
                &mut page,
                &mut scratch,
            );
            // A third of the store is others', and changes all the time.
            if step % 4 == 0 {
                let index = random.below(capacity_bytes / 3 / 2048) as u32;
                assert_eq!(
                    kept.put(OBJECT, index, &new, &mut scratch),
                    PutResult::Stored
                );
            }
        }
        assert!(store.stats().evicted_pages > 0);
        store.check().unwrap();
    }
}

#[test]
fn most_of_a_store_can_be_filled() {
    let mut random = Random(seed());
    for (capacity_bytes, hundredths) in [(2 << 20, 75), (12 << 20, 85), (48 << 20, 92)] {
        let store = Store::new(config_of(capacity_bytes)).unwrap();
        let pool = pool_of(&store, PoolKind::Persistent);
        let mut scratch = Scratch::new();
        let mut index = 0;
        while pool.put(OBJECT, index, &page_with(256, &mut random), &mut scratch)
            == PutResult::Stored
        {
            index += 1;
        }
        let filled = store.stats().compr_data_size;
        assert!(
            filled >= capacity_bytes / 100 * hundredths,
            "{filled} of {capacity_bytes}"
        );
    }
}

#[test]
fn opening_a_store_often_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let config = StoreConfig {
        backing: Backing::File(folder.path().join("arena")),
        ..config_of(64 << 20)
    };
    let mut random = Random(seed());
    let mut index = 0;
    let mut held = Vec::new();
    for _ in 0..50 {
        let store = Store::new(config.clone()).unwrap();
        held.push(store.stats().mem_used_total);
        let pool = pool_of(&store, PoolKind::Persistent);
        let mut scratch = Scratch::new();
        for _ in 0..10 {
            let page = page_with(128, &mut random);
            assert_eq!(
                pool.put(OBJECT, index, &page, &mut scratch),
                PutResult::Stored
            );
            index += 1;
        }
        assert_eq!(pool.pages(), u64::from(index));
        store.check().unwrap();
    }
    // 490 pages of about 1 KiB each, and for each time a host's page that is not full.
    let grown = held[49] - held[0];
    assert!(grown < 490 * 1100 + 50 * 4096 * 2 + (64 << 10), "{grown}");
}
