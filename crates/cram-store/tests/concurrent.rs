// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Many threads at once: nobody ever gets wrong bytes, the limit holds at every
//! moment, and when all is quiet the store agrees with itself.

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
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

use cram_store::{
    Client, GetResult, ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store,
};
use pages::{Content, Random, page_of, some_content, store_of};

const UUID: [u8; 16] = [3; 16];
const KINDS: [PoolKind; 3] = [
    PoolKind::Persistent,
    PoolKind::PrivateEphemeral,
    PoolKind::SharedEphemeral { uuid: UUID },
];

fn client_of(store: &Store, name: &str, quota: Option<u64>) -> Arc<Client> {
    let client = store.add_client(name, quota).unwrap();
    client.authorise(UUID);
    for (id, kind) in (0..).zip(KINDS) {
        let spec = PoolSpec {
            kind,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(id), spec).unwrap();
    }
    client
}

/// A page whose last words say its key, a version, and a sum over both: whoever gets it can tell
/// that it is whole, and what it is.
fn signed_page(object: u64, index: u32, version: u64) -> [u8; PAGE_SIZE] {
    let number = version << 32 | object << 24 | u64::from(index);
    page_of(some_content(number), number)
}

/// Runs `work` in threads while another one watches the figure that must never be exceeded.
fn under_watch(store: &Arc<Store>, threads: u64, work: impl Fn(u64) + Sync) {
    let is_done = AtomicBool::new(false);
    let seen_max = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !is_done.load(Relaxed) {
                let stats = store.stats();
                assert!(stats.mem_used_total <= store.capacity_bytes());
                assert!(stats.mem_used_max <= store.capacity_bytes());
                assert!(store.pressure() <= 1000);
                seen_max.fetch_max(stats.mem_used_total, Relaxed);
                thread::yield_now();
            }
        });
        let work = &work;
        let workers: Vec<_> = (0..threads)
            .map(|number| scope.spawn(move || work(number)))
            .collect();
        let results: Vec<_> = workers
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        is_done.store(true, Relaxed);
        assert!(results.iter().all(Result::is_ok));
    });
    assert!(seen_max.load(Relaxed) > 0);
    store.check().unwrap();
}

/// Each thread has objects of its own, so it knows exactly what must be there; the store is too
/// small for all of them.
#[test]
fn threads_with_their_own_objects_find_exactly_what_they_put() {
    let store = store_of(3 << 20);
    let clients = [
        client_of(&store, "a", None),
        client_of(&store, "b", Some(1 << 20)),
    ];
    under_watch(&store, 4, |thread| {
        let mut random = Random(thread + 1);
        let mut scratch = Scratch::new();
        let client = &clients[thread as usize % 2];
        let pools = [0, 1, 2].map(|id| client.pool(PoolId(id)).unwrap());
        let mut versions = std::collections::HashMap::new();
        let mut page = [0; PAGE_SIZE];
        for version in 1..20_000 {
            let which = random.below(3) as usize;
            let (pool, object) = (&pools[which], thread * 4 + random.below(2));
            let id = ObjectId([object, 0, 0]);
            let index = random.below(400) as u32;
            let key = (which, object, index);
            match random.below(20) {
                0..9 => match pool.put(
                    id,
                    index,
                    &signed_page(object, index, version),
                    &mut scratch,
                ) {
                    PutResult::Stored => _ = versions.insert(key, version),
                    PutResult::Refused(_) => _ = versions.remove(&key),
                },
                9..18 => match pool.get(id, index, &mut page, &mut scratch) {
                    GetResult::Found => {
                        let version = versions
                            .get(&key)
                            .copied()
                            .expect("nothing should be there");
                        assert!(page == signed_page(object, index, version), "wrong bytes");
                        if which == 1 {
                            versions.remove(&key);
                        }
                    }
                    GetResult::Missing => {
                        let was_there = versions.remove(&key).is_some();
                        assert!(which != 0 || !was_there, "a persistent page is lost");
                    }
                    GetResult::Corrupt => panic!("corrupt"),
                },
                18 => {
                    let count = random.below(100);
                    pool.flush_page(id, index, count);
                    versions.retain(|(at, its, number), _| {
                        let is_in = (u64::from(index)..u64::from(index) + count)
                            .contains(&u64::from(*number));
                        (*at, *its) != (which, object) || !is_in
                    });
                }
                _ => {
                    if random.below(20) == 0 {
                        pool.flush_object(id);
                        versions.retain(|(at, its, _), _| (*at, *its) != (which, object));
                    }
                }
            }
        }
    });
}

/// All threads fight for the same few keys, and some destroy the pools beneath the others.
#[test]
fn threads_on_the_same_keys_see_whole_pages_only() {
    let store = store_of(1 << 20);
    let client = client_of(&store, "a", None);
    under_watch(&store, 4, |thread| {
        let mut random = Random(thread + 77);
        let mut scratch = Scratch::new();
        let mut page = [0; PAGE_SIZE];
        for version in 0..15_000 {
            let id = random.below(3) as u32;
            let Some(pool) = client.pool(PoolId(id)) else {
                continue;
            };
            let index = random.below(40) as u32;
            match random.below(100) {
                0..45 => {
                    let page = page_of(some_content(version), u64::from(index) << 40 | version);
                    let _ = pool.put(ObjectId([0; 3]), index, &page, &mut scratch);
                }
                45..90 => match pool.get(ObjectId([0; 3]), index, &mut page, &mut scratch) {
                    GetResult::Found => assert!(is_whole(&page, index), "torn, or another page"),
                    GetResult::Missing => (),
                    GetResult::Corrupt => panic!("corrupt"),
                },
                90..98 => _ = pool.flush_page(ObjectId([0; 3]), index, 3),
                _ if thread == 0 => {
                    let _ = client.destroy_pool(PoolId(id));
                    let spec = PoolSpec {
                        kind: KINDS[id as usize],
                        refuse_incompressible: false,
                    };
                    client.new_pool(PoolId(id), spec).unwrap();
                }
                _ => _ = client.evict(10_000),
            }
        }
    });
    store.remove_client("a");
    store.check().unwrap();
    assert_eq!(store.stats().pages_stored, 0);
}

/// A get that removes gives each page to one thread only, however many ask at once.
#[test]
fn each_page_of_a_private_ephemeral_pool_is_found_once() {
    let store = store_of(64 << 20);
    let client = client_of(&store, "a", None);
    let pool = client.pool(PoolId(1)).unwrap();
    let found = AtomicU64::new(0);
    let mut scratch = Scratch::new();
    for index in 0..4000 {
        let put = pool.put(
            ObjectId([0; 3]),
            index,
            &signed_page(0, index, 1),
            &mut scratch,
        );
        assert_eq!(put, PutResult::Stored);
    }
    under_watch(&store, 4, |_| {
        let mut scratch = Scratch::new();
        let mut page = [0; PAGE_SIZE];
        for index in 0..4000 {
            if pool.get(ObjectId([0; 3]), index, &mut page, &mut scratch) == GetResult::Found {
                assert!(page == signed_page(0, index, 1));
                found.fetch_add(1, Relaxed);
            }
        }
    });
    assert_eq!(found.load(Relaxed), 4000);
    assert_eq!(pool.pages(), 0);
}

/// Whether this is a page that some thread put under this index.
fn is_whole(page: &[u8; PAGE_SIZE], index: u32) -> bool {
    let last = u64::from_le_bytes(page[PAGE_SIZE - 8..].try_into().unwrap());
    if last >> 40 == u64::from(index) {
        let version = last & ((1 << 40) - 1);
        return *page == page_of(some_content(version), last);
    }
    // A page of noise does not end with its number; try all that are noise.
    (1..15_000).step_by(10).any(|version| {
        let number = u64::from(index) << 40 | version;
        some_content(version) == Content::Noise
            && page[..64] == page_of(Content::Noise, number)[..64]
    })
}
