// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The rules of tmem one by one, and what the operator relies on.

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
use std::time::{Duration, Instant};

use cram_store::{
    CAPACITY_BYTES_MIN, Client, GetResult, NoPool, ObjectId, PAGE_SIZE, Pool, PoolError, PoolId,
    PoolKind, PoolSpec, PutResult, Refusal, Scratch, Store, StoreConfig, StoreError,
};
use pages::{Content, config_of, page_of, store_of};

const UUID: [u8; 16] = [4; 16];
const PERSISTENT: PoolKind = PoolKind::Persistent;
const PRIVATE: PoolKind = PoolKind::PrivateEphemeral;
const SHARED: PoolKind = PoolKind::SharedEphemeral { uuid: UUID };
const OBJECT: ObjectId = ObjectId([1, 0, u64::MAX]);

fn pool_of(client: &Client, id: u32, kind: PoolKind) -> Arc<Pool> {
    client.authorise(UUID);
    let spec = PoolSpec {
        kind,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(id), spec).unwrap();
    client.pool(PoolId(id)).unwrap()
}

fn put(pool: &Pool, index: u32, content: Content) -> PutResult {
    pool.put(
        OBJECT,
        index,
        &page_of(content, u64::from(index)),
        &mut Scratch::new(),
    )
}

/// Gets, and checks that what was found is what [`put`] puts there.
fn get(pool: &Pool, index: u32, content: Content) -> GetResult {
    let mut page = [0xcc; PAGE_SIZE];
    let result = pool.get(OBJECT, index, &mut page, &mut Scratch::new());
    match result {
        GetResult::Found => assert_eq!(page, page_of(content, u64::from(index))),
        GetResult::Missing => assert_eq!(page, [0xcc; PAGE_SIZE]),
        GetResult::Corrupt => panic!("corrupt"),
    }
    result
}

const SOME: Content = Content::Packs(30);

#[test]
fn a_get_keeps_or_removes_by_the_kind_of_pool() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    for (id, kind) in [(0, PERSISTENT), (1, PRIVATE), (2, SHARED)] {
        let pool = pool_of(&client, id, kind);
        for content in [Content::Filled, SOME, Content::Noise] {
            assert_eq!(put(&pool, 9, content), PutResult::Stored);
            assert_eq!(get(&pool, 9, content), GetResult::Found);
            let again = if kind == PRIVATE {
                GetResult::Missing
            } else {
                GetResult::Found
            };
            assert_eq!(get(&pool, 9, content), again);
            assert_eq!(get(&pool, 9, content), again);
        }
    }
    store.check().unwrap();
}

#[test]
fn a_shared_pool_needs_permission_and_lives_as_long_as_anybody_has_it() {
    let store = store_of(4 << 20);
    let [a, b] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
    let spec = PoolSpec {
        kind: SHARED,
        refuse_incompressible: false,
    };
    assert_eq!(b.new_pool(PoolId(0), spec), Err(PoolError::Denied));
    let from_a = pool_of(&a, 0, SHARED);
    assert_eq!(put(&from_a, 1, SOME), PutResult::Stored);
    b.authorise(UUID);
    assert_eq!(b.new_pool(PoolId(5), spec), Ok(1));
    let from_b = b.pool(PoolId(5)).unwrap();
    assert_eq!(get(&from_b, 1, SOME), GetResult::Found);
    // The page is on its putter's bill, whoever reads it.
    assert_eq!((a.stats().pages_stored, b.stats().pages_stored), (1, 0));
    assert!(store.remove_client("a"));
    store.check().unwrap();
    assert_eq!(get(&from_b, 1, SOME), GetResult::Found);
    assert_eq!(b.destroy_pool(PoolId(5)), Ok(1));
    assert_eq!(store.stats().pages_stored, 0);
    store.check().unwrap();
    b.revoke(&UUID);
    assert_eq!(b.new_pool(PoolId(5), spec), Err(PoolError::Denied));
    assert_eq!(
        a.new_pool(PoolId(1), spec),
        Err(PoolError::Denied),
        "a removed client"
    );
}

#[test]
fn new_pool_may_be_repeated_and_ids_are_bounded() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    let spec = PoolSpec {
        kind: PERSISTENT,
        refuse_incompressible: false,
    };
    let pool = pool_of(&client, 3, PERSISTENT);
    assert_eq!(put(&pool, 1, SOME), PutResult::Stored);
    assert_eq!(client.new_pool(PoolId(3), spec), Ok(1));
    for other in [
        PoolSpec {
            kind: PRIVATE,
            ..spec
        },
        PoolSpec {
            refuse_incompressible: true,
            ..spec
        },
    ] {
        assert_eq!(client.new_pool(PoolId(3), other), Err(PoolError::Exists));
    }
    for id in [16, 17, u32::MAX] {
        assert_eq!(client.new_pool(PoolId(id), spec), Err(PoolError::BadId));
        assert_eq!(client.destroy_pool(PoolId(id)), Err(NoPool));
        assert!(client.pool(PoolId(id)).is_none());
    }
    assert_eq!(client.destroy_pool(PoolId(3)), Ok(1));
    // A handle from before is of no use, and of no harm.
    assert_eq!(put(&pool, 1, SOME), PutResult::Refused(Refusal::NoSpace));
    assert_eq!(get(&pool, 1, SOME), GetResult::Missing);
    assert_eq!(client.new_pool(PoolId(3), spec), Ok(0));
    assert_eq!(store.pressure(), 0);
    store.check().unwrap();
}

#[test]
fn frozen_refuses_puts_and_nothing_else() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    let pool = pool_of(&client, 0, PERSISTENT);
    for index in 0..3 {
        assert_eq!(put(&pool, index, SOME), PutResult::Stored);
    }
    client.freeze(true);
    assert_eq!(client.pressure(), 1000);
    assert_eq!(put(&pool, 0, SOME), PutResult::Refused(Refusal::Frozen));
    assert_eq!(
        get(&pool, 0, SOME),
        GetResult::Missing,
        "a duplicate put flushes"
    );
    assert_eq!(get(&pool, 1, SOME), GetResult::Found);
    assert_eq!(pool.flush_page(OBJECT, 1, 1), 1);
    client.freeze(false);
    assert_eq!(put(&pool, 0, SOME), PutResult::Stored);
    assert_eq!(pool.pages(), 2);
}

#[test]
fn flushes_take_exactly_the_range_however_wide() {
    let store = store_of(64 << 20);
    let client = store.add_client("a", None).unwrap();
    let pool = pool_of(&client, 0, PERSISTENT);
    let numbers = [
        0,
        1,
        62,
        63,
        64,
        65,
        127,
        128,
        1 << 20,
        u32::MAX - 64,
        u32::MAX - 1,
        u32::MAX,
    ];
    let ranges = [
        (0, 0),
        (0, 1),
        (63, 2),
        (1, 64),
        (62, 1 << 16),
        (65, u64::MAX),
        (128, (1 << 32) - 129),
        (u32::MAX, 1),
        (u32::MAX, u64::MAX),
        (0, 1 << 32),
    ];
    for (first, count) in ranges {
        for index in numbers {
            assert_eq!(put(&pool, index, Content::Filled), PutResult::Stored);
        }
        let end = u64::from(first).saturating_add(count);
        let is_hit = |index: u32| (u64::from(first)..end).contains(&u64::from(index));
        let hits = numbers.iter().filter(|index| is_hit(**index)).count() as u64;
        assert_eq!(
            pool.flush_page(OBJECT, first, count),
            hits,
            "{first} + {count}"
        );
        assert_eq!(pool.flush_page(OBJECT, first, count), 0);
        for index in numbers {
            let found = get(&pool, index, Content::Filled) == GetResult::Found;
            assert_eq!(found, !is_hit(index), "{index} of {first} + {count}");
        }
    }
    // The widest ranges cost next to nothing where little is stored, whatever else the pool has.
    for index in 0..50_000 {
        let _ = pool.put(
            ObjectId([9; 3]),
            index * 64,
            &[1; PAGE_SIZE],
            &mut Scratch::new(),
        );
    }
    let began = Instant::now();
    for _ in 0..1000 {
        assert_eq!(put(&pool, 77, Content::Filled), PutResult::Stored);
        assert_eq!(pool.flush_page(OBJECT, 0, 1 << 32), 1);
        assert_eq!(pool.flush_object(OBJECT), 0);
    }
    assert!(
        began.elapsed() < Duration::from_secs(2),
        "{:?}",
        began.elapsed()
    );
    store.check().unwrap();
}

#[test]
fn the_oldest_ephemeral_pages_make_room_and_persistent_ones_never_do() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    let persistent = pool_of(&client, 0, PERSISTENT);
    let ephemeral = pool_of(&client, 1, PRIVATE);
    for index in 0..300 {
        assert_eq!(put(&persistent, index, Content::Noise), PutResult::Stored);
    }
    for index in 0..5000 {
        assert_eq!(put(&ephemeral, index, Content::Noise), PutResult::Stored);
    }
    assert!(
        store.pressure() < 1000,
        "what can be evicted is not in the way"
    );
    assert!(ephemeral.stats().evicted_pages > 4000);
    assert_eq!(get(&ephemeral, 0, Content::Noise), GetResult::Missing);
    assert_eq!(get(&ephemeral, 4999, Content::Noise), GetResult::Found);
    let kept =
        (0..4999).filter(|index| get(&ephemeral, *index, Content::Noise) == GetResult::Found);
    assert!(
        kept.min() > Some(4000),
        "old pages were kept and newer ones evicted"
    );
    // Persistent pages push out the rest, until there is nothing left to push.
    let stored =
        (300..5000).take_while(|i| put(&persistent, *i, Content::Noise) == PutResult::Stored);
    let stored = 300 + stored.count() as u64;
    assert_eq!((persistent.pages(), ephemeral.pages()), (stored, 0));
    assert!(stored * 4096 > (4 << 20) * 17 / 20, "{stored} pages");
    assert_eq!(store.pressure(), 1000);
    for index in 0..300 {
        assert_eq!(get(&persistent, index, Content::Noise), GetResult::Found);
    }
    assert_eq!(persistent.flush_page(OBJECT, 0, 300), 300);
    assert!(store.pressure() < 1000);
    store.check().unwrap();
}

#[test]
fn pages_in_use_of_a_shared_pool_outlive_others_as_old() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    let pool = pool_of(&client, 0, SHARED);
    for index in 0..20_000 {
        assert_eq!(put(&pool, index, SOME), PutResult::Stored);
        for used in [3, 64] {
            if index > used {
                assert_eq!(get(&pool, used, SOME), GetResult::Found, "at {index}");
            }
        }
    }
    assert_eq!(get(&pool, 4, SOME), GetResult::Missing);
}

#[test]
fn who_is_over_quota_gives_way_first() {
    let store = store_of(4 << 20);
    let [modest, greedy] = ["modest", "greedy"].map(|name| store.add_client(name, None).unwrap());
    let (older, newer) = (pool_of(&modest, 0, PRIVATE), pool_of(&greedy, 0, PRIVATE));
    let persistent = pool_of(&greedy, 1, PERSISTENT);
    for index in 0..200 {
        assert_eq!(put(&older, index, Content::Noise), PutResult::Stored);
    }
    for index in 0..300 {
        assert_eq!(put(&newer, index, Content::Noise), PutResult::Stored);
    }
    for index in 0..100 {
        assert_eq!(put(&persistent, index, Content::Noise), PutResult::Stored);
    }
    // The quota is lowered below what is persistent: all that can go goes, the rest stays.
    greedy.set_quota(Some(100_000));
    assert_eq!(
        (newer.pages(), persistent.pages(), older.pages()),
        (0, 100, 200)
    );
    assert_eq!(
        put(&persistent, 0, SOME),
        PutResult::Refused(Refusal::OverQuota)
    );
    assert_eq!(persistent.pages(), 99);
    // With a quota it evicts its own pages, not the older ones of others.
    greedy.set_quota(Some(1 << 20));
    for index in 0..500 {
        assert_eq!(put(&newer, index, Content::Noise), PutResult::Stored);
        assert!(greedy.stats().mem_used_total <= 1 << 20);
    }
    assert_eq!(older.pages(), 200);
    assert!(newer.pages() > 100);
    assert_eq!(modest.evict(10 << 20), 200);
    store.check().unwrap();
}

#[test]
fn figures_are_exact() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", Some(1 << 20)).unwrap();
    let pool = pool_of(&client, 0, PERSISTENT);
    for (index, content) in (0..).zip([Content::Filled, SOME, Content::Noise, Content::Noise]) {
        assert_eq!(put(&pool, index, content), PutResult::Stored);
    }
    assert_eq!(put(&pool, 3, Content::Filled), PutResult::Stored);
    assert_eq!(get(&pool, 2, Content::Noise), GetResult::Found);
    assert_eq!(get(&pool, 8, Content::Noise), GetResult::Missing);
    assert_eq!(pool.flush_page(OBJECT, 1, 100), 3);
    for stats in [store.stats(), client.stats(), pool.stats()] {
        assert_eq!(
            (
                stats.puts,
                stats.puts_refused,
                stats.gets,
                stats.gets_missing
            ),
            (5, 0, 2, 1)
        );
        assert_eq!(
            (stats.pages_stored, stats.orig_data_size, stats.flushes),
            (1, 4096, 3)
        );
        assert_eq!(
            (stats.same_pages, stats.huge_pages, stats.compr_data_size),
            (1, 0, 0)
        );
    }
    assert_eq!(store.stats().mem_limit, 4 << 20);
    assert_eq!(client.stats().mem_limit, 1 << 20);
    assert!(store.stats().mem_used_total >= client.stats().mem_used_total);
    assert!(client.stats().mem_used_total > pool.stats().mem_used_total);
    let names: Vec<_> = pool
        .stats()
        .named()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert!(names.starts_with(&["orig_data_size", "compr_data_size", "mem_used_total"]));
}

#[test]
fn wrong_configurations_and_clients_are_refused_with_a_reason() {
    let config = |change: fn(&mut StoreConfig)| {
        let mut config = config_of(1 << 30);
        change(&mut config);
        Store::new(config).err()
    };
    let small = config(|config| config.capacity_bytes = CAPACITY_BYTES_MIN - 1);
    assert!(matches!(small, Some(StoreError::CapacityTooSmall { .. })));
    let large = config(|config| config.capacity_bytes = u64::MAX);
    assert!(matches!(large, Some(StoreError::CapacityTooLarge { .. })));
    assert!(config(|config| config.max_clients = 0).is_some());
    assert!(config(|config| config.max_pools_per_client = u32::MAX).is_some());

    let config = StoreConfig {
        max_clients: 2,
        ..config_of(CAPACITY_BYTES_MIN)
    };
    let store = Store::new(config).unwrap();
    let client = store.add_client("a", None).unwrap();
    assert!(matches!(
        store.add_client("a", None),
        Err(StoreError::ClientExists { .. })
    ));
    assert!(matches!(
        store.add_client("b", Some(10)),
        Err(StoreError::NoRoom)
    ));
    store.add_client("b", None).unwrap();
    assert!(matches!(
        store.add_client("c", None),
        Err(StoreError::TooManyClients { limit: 2 })
    ));
    assert!(store.remove_client("b") && !store.remove_client("b"));
    client.set_quota(Some(1));
    let spec = PoolSpec {
        kind: PERSISTENT,
        refuse_incompressible: false,
    };
    assert_eq!(client.new_pool(PoolId(0), spec), Err(PoolError::NoSpace));
    assert_ne!(store.generation(), 0);
    store.check().unwrap();
}

#[test]
fn destroying_a_large_pool_stops_nobody() {
    let store = store_of(256 << 20);
    let client = store.add_client("a", None).unwrap();
    let (doomed, other) = (
        pool_of(&client, 0, PERSISTENT),
        pool_of(&client, 1, PERSISTENT),
    );
    let mut scratch = Scratch::new();
    let page = page_of(Content::Packs(4), 1);
    for index in 0..150_000 {
        assert_eq!(
            doomed.put(OBJECT, index, &page, &mut scratch),
            PutResult::Stored
        );
    }
    assert_eq!(put(&other, 1, SOME), PutResult::Stored);
    let (mut longest, mut rounds) = (Duration::ZERO, 0);
    std::thread::scope(|scope| {
        let destroyer = scope.spawn(|| client.destroy_pool(PoolId(0)));
        while !destroyer.is_finished() {
            let began = Instant::now();
            assert_eq!(get(&other, 1, SOME), GetResult::Found);
            assert_eq!(put(&other, 2, SOME), PutResult::Stored);
            longest = longest.max(began.elapsed());
            rounds += 1;
        }
        assert_eq!(destroyer.join().unwrap(), Ok(150_000));
    });
    // Generous, for a machine that does other things too.
    assert!(
        longest < Duration::from_millis(500),
        "{longest:?} in {rounds} rounds"
    );
    store.check().unwrap();
}

#[test]
fn who_is_in_a_sharing_group_stays_there() {
    let folder = tempfile::tempdir().unwrap();
    let config = StoreConfig {
        backing: cram_store::Backing::File(folder.path().join("arena")),
        ..config_of(4 << 20)
    };
    let store = Store::new(config.clone()).unwrap();
    let inside = store.add_client_to_group("inside", None, "some").unwrap();
    let outside = store.add_client("outside", None).unwrap();
    assert!(inside.is_in_sharing_group() && !outside.is_in_sharing_group());
    drop((inside, outside, store));
    let store = Store::new(config).unwrap();
    let is_inside = |name| store.client(name).unwrap().is_in_sharing_group();
    assert!(is_inside("inside") && !is_inside("outside"));
}

#[test]
fn ephemeral_pages_are_never_stored_together() {
    let store = store_of(8 << 20);
    let client = store.add_client("a", None).unwrap();
    let pool = pool_of(&client, 0, PRIVATE);
    let page = |index: u32| page_of(Content::Noise, u64::from(index) % 10);
    let mut scratch = Scratch::new();
    for index in 0..200 {
        let put = pool.put(OBJECT, index, &page(index), &mut scratch);
        assert_eq!(put, PutResult::Stored);
    }
    let stats = store.stats();
    assert_eq!((stats.pages_sharing, stats.pages_shared), (0, 0));
    // So each page that is evicted makes as much room as it takes.
    let evicted = client.evict(200_000);
    assert!((40..=60).contains(&evicted), "{evicted}");
    store.check().unwrap();
}

#[test]
fn an_incompressible_page_is_refused_though_an_equal_one_is_kept_elsewhere() {
    let store = store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    let keeps = pool_of(&client, 0, PERSISTENT);
    let spec = PoolSpec {
        kind: PERSISTENT,
        refuse_incompressible: true,
    };
    client.new_pool(PoolId(1), spec).unwrap();
    let refuses = client.pool(PoolId(1)).unwrap();
    let refused = PutResult::Refused(Refusal::Incompressible);
    // Nowhere, as a page, as an image.
    for round in 0..3 {
        let page = page_of(Content::Noise, 5);
        let put = refuses.put(OBJECT, 0, &page, &mut Scratch::new());
        assert_eq!(put, refused);
        let put = keeps.put(OBJECT, round, &page, &mut Scratch::new());
        assert_eq!(put, PutResult::Stored);
    }
    assert_eq!(store.stats().pages_sharing, 3);
    // What compresses may still share.
    assert_eq!(put(&keeps, 7, SOME), PutResult::Stored);
    assert_eq!(put(&refuses, 7, SOME), PutResult::Stored);
    assert_eq!(store.stats().pages_sharing, 5);
}

#[test]
fn a_handle_on_a_shared_pool_ends_when_its_client_leaves() {
    let store = store_of(4 << 20);
    let [a, b] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
    let [left, other] = [&a, &b].map(|client| pool_of(client, 0, SHARED));
    assert_eq!(put(&left, 1, SOME), PutResult::Stored);
    assert_eq!(put(&other, 2, SOME), PutResult::Stored);
    a.destroy_pool(PoolId(0)).unwrap();
    assert!(store.remove_client("a"));
    // Its page goes, and with it its account; the next client gets its number.
    assert_eq!(other.flush_page(OBJECT, 1, 1), 1);
    let c = store.add_client("c", None).unwrap();
    assert_ne!(put(&left, 3, SOME), PutResult::Stored);
    assert_eq!(get(&left, 2, SOME), GetResult::Missing);
    assert_eq!(left.flush_object(OBJECT), 0);
    assert_eq!(c.stats().pages_stored, 0);
    assert_eq!(get(&other, 2, SOME), GetResult::Found);
    store.check().unwrap();
}
