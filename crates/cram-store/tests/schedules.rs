// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The whole store under schedules drawn by lot: every lock and every atomic is a
//! place where another thread may go on (shuttle; S. Burckhardt et al., "A
//! Randomized Scheduler with Probabilistic Guarantees of Finding Bugs", ASPLOS
//! 2010). Run by `cargo xtask test`, and with
//! `RUSTFLAGS="--cfg shuttle" cargo test -p cram-store --release --test schedules`.

#![cfg(shuttle)]
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
use std::time::Duration;

use cram_store::{
    Client, GetResult, ObjectId, PAGE_SIZE, Pool, PoolId, PoolKind, PoolSpec, PutResult, Scratch,
    Store,
};
use pages::{Content, page_of, store_of, times};
use shuttle::thread;

const OBJECT: ObjectId = ObjectId([3, 1, 4]);
const CAPACITY_BYTES: u64 = 256 << 10;

fn pool(client: &Client, id: u32, kind: PoolKind) -> Arc<Pool> {
    client.authorise([1; 16]);
    let spec = PoolSpec {
        kind,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(id), spec).unwrap();
    client.pool(PoolId(id)).unwrap()
}

fn put(pool: &Pool, index: u32, content: Content, number: u64) -> PutResult {
    let page = page_of(content, number);
    pool.put(OBJECT, index, &page, &mut Scratch::new())
}

fn get(pool: &Pool, index: u32) -> (GetResult, [u8; PAGE_SIZE]) {
    let mut page = [0xaa; PAGE_SIZE];
    let result = pool.get(OBJECT, index, &mut page, &mut Scratch::new());
    (result, page)
}

/// Runs a scenario under many schedules. It gets a new store each time, and leaves it at rest.
fn under_schedules(schedules: u64, scenario: fn(&Arc<Store>)) {
    let run = move || {
        let store = store_of(CAPACITY_BYTES);
        scenario(&store);
        store.check().unwrap();
    };
    let schedules = times(schedules) as usize;
    shuttle::check_random(run, schedules / 2);
    shuttle::check_pct(run, schedules / 2, 3);
}

fn all(acts: Vec<Box<dyn FnOnce() + Send>>) {
    let threads: Vec<_> = acts.into_iter().map(thread::spawn).collect();
    threads
        .into_iter()
        .for_each(|thread| thread.join().unwrap());
}

/// Pages are read and overwritten while compaction moves them about.
#[test]
fn pages_that_are_moved_are_whole() {
    under_schedules(6000, |store| {
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        for index in 0..6 {
            assert_eq!(put(&pages, index, Content::Packs(40), 1), PutResult::Stored);
        }
        pages.flush_page(OBJECT, 1, 3);
        let (reader, writer, mover) = (pages.clone(), pages.clone(), store.clone());
        all(vec![
            Box::new(move || {
                for index in [0, 4, 5, 0] {
                    let (found, page) = get(&reader, index);
                    assert_eq!(found, GetResult::Found);
                    let is_one = [1, 2].map(|number| page == page_of(Content::Packs(40), number));
                    assert!(is_one.contains(&true), "torn");
                }
            }),
            Box::new(move || {
                for index in [0, 5] {
                    let put = put(&writer, index, Content::Packs(40), 2);
                    assert_eq!(put, PutResult::Stored);
                    let (found, page) = get(&writer, index);
                    assert_eq!(found, GetResult::Found);
                    assert!(page == page_of(Content::Packs(40), 2), "older");
                }
            }),
            Box::new(move || {
                mover.compact();
                mover.recompress(Duration::ZERO);
            }),
        ]);
    });
}

/// Equal pages come and go: images are made, needed, and gone at the right moment.
#[test]
fn equal_pages_come_and_go() {
    under_schedules(6000, |store| {
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        let acts = (0..3_u32).map(|thread| -> Box<dyn FnOnce() + Send> {
            let (pages, mover) = (pages.clone(), store.clone());
            Box::new(move || {
                let own = thread * 64;
                assert_eq!(put(&pages, own, Content::Text, 9), PutResult::Stored);
                assert_eq!(put(&pages, own + 1, Content::Text, 9), PutResult::Stored);
                if thread == 0 {
                    mover.compact();
                }
                let (found, page) = get(&pages, own + 1);
                assert_eq!(found, GetResult::Found);
                assert!(page == page_of(Content::Text, 9));
                assert_eq!(pages.flush_page(OBJECT, own, 1), 1);
                assert_eq!(put(&pages, own + 1, Content::Noise, 3), PutResult::Stored);
            })
        });
        all(acts.collect());
        assert_eq!(pages.pages(), 3);
        // Those that met found each other; all, when nobody came at the same moment.
        assert!([0, 2, 3].contains(&store.stats().pages_sharing));
    });
}

/// A page that a get takes out is got once, however many ask, evict or put it meanwhile.
#[test]
fn exclusive_pages_are_got_once() {
    under_schedules(6000, |store| {
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::PrivateEphemeral);
        assert_eq!(put(&pages, 7, Content::Packs(9), 1), PutResult::Stored);
        let found = Arc::new(shuttle::sync::atomic::AtomicU32::new(0));
        let getters = (0..2).map(|_| -> Box<dyn FnOnce() + Send> {
            let (pages, found) = (pages.clone(), found.clone());
            Box::new(move || {
                let (result, page) = get(&pages, 7);
                if result == GetResult::Found {
                    assert!(page == page_of(Content::Packs(9), 1));
                    found.fetch_add(1, shuttle::sync::atomic::Ordering::SeqCst);
                }
            })
        });
        let mut acts: Vec<_> = getters.collect();
        let evicter = client.clone();
        acts.push(Box::new(move || _ = evicter.evict(1)));
        all(acts);
        assert!(found.load(shuttle::sync::atomic::Ordering::SeqCst) <= 1);
        assert_eq!(get(&pages, 7).0, GetResult::Missing);
    });
}

/// A store that is full: puts evict and compact for each other, and nobody waits for ever.
#[test]
fn a_full_store_makes_room_for_everybody() {
    under_schedules(1000, |store| {
        let [a, b] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
        let kept = pool(&a, 0, PoolKind::Persistent);
        let shared = PoolKind::SharedEphemeral { uuid: [1; 16] };
        let pools = [pool(&a, 1, shared), pool(&b, 1, shared)];
        for index in 0..25 {
            let _ = put(&kept, index, Content::Noise, index.into());
        }
        let before = kept.pages();
        let acts = pools.into_iter().enumerate();
        let acts = acts.map(|(thread, pages)| -> Box<dyn FnOnce() + Send> {
            Box::new(move || {
                for index in 0..12 {
                    let index = index + thread as u32 * 100;
                    let _ = put(&pages, index, Content::Noise, index.into());
                    let (found, page) = get(&pages, index);
                    if found == GetResult::Found {
                        assert!(page == page_of(Content::Noise, index.into()));
                    }
                }
            })
        });
        all(acts.collect());
        assert_eq!(kept.pages(), before, "a persistent page is lost");
        assert!(store.stats().mem_used_max <= CAPACITY_BYTES);
    });
}

/// A pool is destroyed while others use it.
#[test]
fn a_pool_ends_under_its_users() {
    under_schedules(4000, |store| {
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        for index in 0..3 {
            assert_eq!(put(&pages, index, Content::Text, 5), PutResult::Stored);
        }
        let user = pages.clone();
        let mover = store.clone();
        let ender = client.clone();
        all(vec![
            Box::new(move || {
                for index in 0..4 {
                    let _ = put(&user, index, Content::Text, 5);
                    let (found, page) = get(&user, index);
                    assert_ne!(found, GetResult::Corrupt);
                    if found == GetResult::Found {
                        assert!(page == page_of(Content::Text, 5));
                    }
                }
            }),
            Box::new(move || {
                ender.destroy_pool(PoolId(0)).unwrap();
            }),
            Box::new(move || _ = mover.compact()),
        ]);
        assert_eq!(store.stats().pages_stored, 0);
    });
}
