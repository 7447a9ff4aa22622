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
// Not shuttle's: what they say is of the test, and no place for another thread to go on.
use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
use std::time::Duration;

use cram_store::{
    Backing, Client, GetResult, ObjectId, PAGE_SIZE, Page, Pool, PoolId, PoolKind, PoolSpec,
    PutResult, Scratch, Store, StoreConfig,
};
use pages::{Content, config_of, page_of, store_of, times};
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
    // Whoever came too late has not touched it.
    assert!(result != GetResult::Missing || page == [0xaa; PAGE_SIZE]);
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

/// A store whose arena is in a file, and what a process that is killed now would leave of it.
struct Crashing {
    folder: tempfile::TempDir,
    store: Arc<Store>,
}

impl Crashing {
    fn new() -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = Self::open(&folder, "arena");
        Self { folder, store }
    }

    fn open(folder: &tempfile::TempDir, name: &str) -> Arc<Store> {
        Store::new(StoreConfig {
            backing: Backing::File(folder.path().join(name)),
            ..config_of(CAPACITY_BYTES)
        })
        .unwrap()
    }

    /// Kills the process, as it were: hands the store that is opened then to `look`, with what
    /// `note` said at that moment. Between the two no other thread runs.
    fn crash<T>(&self, note: impl FnOnce() -> T, look: impl FnOnce(&Store, T)) {
        // A thread is soon run for the first time, but the moment may be any.
        for _ in 0..shuttle::rand::Rng::gen_range(&mut shuttle::rand::thread_rng(), 0..200) {
            thread::yield_now();
        }
        let noted = note();
        let [from, to] = ["arena", "copy"].map(|name| self.folder.path().join(name));
        std::fs::copy(from, to).unwrap();
        let found = Self::open(&self.folder, "copy");
        found.check().unwrap();
        look(&found, noted);
    }
}

/// As [`under_schedules`], with a crash at any moment.
fn with_crashes(schedules: u64, scenario: fn(&Arc<Crashing>)) {
    let run = move || {
        let crashing = Arc::new(Crashing::new());
        scenario(&crashing);
        crashing.store.check().unwrap();
    };
    let schedules = times(schedules) as usize;
    shuttle::check_random(run, schedules / 2);
    shuttle::check_pct(run, schedules / 2, 4);
}

fn get_of(pool: &Pool, object: ObjectId, index: u32) -> Option<Page> {
    let mut page = [0xaa; PAGE_SIZE];
    match pool.get(object, index, &mut page, &mut Scratch::new()) {
        GetResult::Found => Some(page),
        GetResult::Missing => None,
        GetResult::Corrupt => panic!("a page is damaged"),
    }
}

fn object(id: u64) -> ObjectId {
    ObjectId([id, 7, 7])
}

/// Puts the first page of an object.
fn put_first(pool: &Pool, id: u64) {
    let page = page_of(Content::Packs(9), id);
    let put = pool.put(object(id), 0, &page, &mut Scratch::new());
    assert_eq!(put, PutResult::Stored);
}

/// An object's number goes from one client to another while its record is moved: whatever of it the
/// process leaves when it is killed, each client finds its own pages, and nobody else's.
#[test]
fn a_number_that_changes_hands_leads_to_nobody_elses_page() {
    with_crashes(4000, |crashing| {
        let store = &crashing.store;
        let clients = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
        let pools = clients.map(|client| pool(&client, 0, PoolKind::Persistent));
        let [a, b] = pools;
        for id in 0..30 {
            put_first(&a, id);
        }
        // What lets the catalogue be worth compacting.
        for id in 1..29 {
            a.flush_object(object(id));
        }
        let done = Arc::new(AtomicU32::new(0));
        let (mover, crashed) = (store.clone(), crashing.clone());
        let at = done.clone();
        all(vec![
            Box::new(move || _ = mover.compact()),
            Box::new(move || {
                a.flush_object(object(0));
                done.store(1, SeqCst);
                put_first(&b, 100);
                done.store(2, SeqCst);
            }),
            Box::new(move || {
                crashed.crash(
                    || at.load(SeqCst),
                    |found, done| {
                        let pool = |name| {
                            let client = found.client(name).unwrap();
                            client.pool(PoolId(0)).unwrap()
                        };
                        let (a, b) = (pool("a"), pool("b"));
                        let right = |id| Some(page_of(Content::Packs(9), id));
                        let first = get_of(&a, object(0), 0);
                        assert!(first.is_none() || done == 0 && first == right(0), "{done}");
                        assert!(get_of(&a, object(29), 0) == right(29));
                        let other = get_of(&b, object(100), 0);
                        assert!(other == right(100) || done < 2 && other.is_none());
                    },
                );
            }),
        ]);
    });
}

/// A page of a shared pool is overwritten by another client, and whoever opens the arena then gives the
/// numbers to others that were left over: nobody's page goes with another's.
#[test]
fn a_shared_page_that_changes_owners_takes_no_others_along() {
    with_crashes(2000, |crashing| {
        let store = &crashing.store;
        let [a, b] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
        pool(&a, 0, PoolKind::Persistent);
        let shared = PoolKind::SharedEphemeral { uuid: [1; 16] };
        let [ours, theirs] = [&a, &b].map(|client| pool(client, 1, shared));
        let put = |pool: &Pool, id: u64, number| {
            let page = page_of(Content::Noise, number);
            let put = pool.put(object(id), 0, &page, &mut Scratch::new());
            assert_eq!(put, PutResult::Stored);
        };
        // Two spans of three pages each; the page that is overwritten is in the second, and the first
        // is free again.
        for id in 1..7 {
            put(&ours, id, id);
        }
        for id in 1..4 {
            assert_eq!(ours.flush_object(object(id)), 1);
        }
        let done = Arc::new(AtomicU32::new(0));
        let (crashed, at) = (crashing.clone(), done.clone());
        all(vec![
            Box::new(move || {
                for (version, pool) in (1..).zip([&theirs, &ours]) {
                    put(pool, 4, 10 + u64::from(version));
                    done.store(version, SeqCst);
                }
            }),
            Box::new(move || {
                crashed.crash(
                    || at.load(SeqCst),
                    |found, done| {
                        let pool = |name, id| {
                            let client = found.client(name).unwrap();
                            client.pool(PoolId(id)).unwrap()
                        };
                        let (kept, theirs) = (pool("a", 0), pool("b", 1));
                        let page = get_of(&theirs, object(4), 0).unwrap();
                        let is_one = |number| page == page_of(Content::Noise, number);
                        let numbers = &[4, 11, 12][done as usize..3.min(done as usize + 2)];
                        assert!(numbers.iter().copied().any(is_one), "version {done}");
                        for id in 100..110 {
                            put_first(&kept, id);
                        }
                        assert_eq!(theirs.flush_object(object(4)), 1);
                        found.check().unwrap();
                        for id in 100..110 {
                            let kept = get_of(&kept, object(id), 0);
                            assert!(kept == Some(page_of(Content::Packs(9), id)), "{id}");
                        }
                    },
                );
            }),
        ]);
    });
}

/// Equal pages are shared, moved and packed anew, and overwritten: what was acknowledged is there
/// whenever the process is killed.
#[test]
fn what_was_acknowledged_is_there_whatever_moves_it() {
    with_crashes(1000, |crashing| {
        let store = &crashing.store;
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        for index in 0..8 {
            assert_eq!(put(&pages, index, Content::Text, 1), PutResult::Stored);
        }
        pages.flush_page(OBJECT, 1, 2);
        // How often page 0 was put, and page 64.
        let acknowledged = Arc::new(AtomicU32::new(0));
        let (mover, crashed, at) = (store.clone(), crashing.clone(), acknowledged.clone());
        all(vec![
            Box::new(move || {
                mover.recompress(Duration::ZERO);
                mover.compact();
            }),
            Box::new(move || {
                for (version, number) in (1..).zip([2, 1, 3]) {
                    assert_eq!(put(&pages, 0, Content::Text, number), PutResult::Stored);
                    acknowledged.store(version, SeqCst);
                }
            }),
            Box::new(move || {
                crashed.crash(
                    || at.load(SeqCst),
                    |found, version| {
                        let client = found.client("a").unwrap();
                        let pool = client.pool(PoolId(0)).unwrap();
                        let first = get_of(&pool, OBJECT, 0).unwrap();
                        let numbers = [1, 2, 1, 3];
                        let may_be =
                            &numbers[version as usize..numbers.len().min(version as usize + 2)];
                        let is_one = |number: &u64| first == page_of(Content::Text, *number);
                        assert!(may_be.iter().any(is_one), "version {version}");
                        for index in 3..8 {
                            let page = get_of(&pool, OBJECT, index);
                            assert!(page == Some(page_of(Content::Text, 1)), "{index}");
                        }
                        assert!(get_of(&pool, OBJECT, 1).is_none());
                    },
                );
            }),
        ]);
    });
}

/// A client is reset: a process that is killed leaves all of it, or nothing and another generation.
#[test]
fn a_reset_is_one_moment() {
    with_crashes(3000, |crashing| {
        let store = &crashing.store;
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        let others = pool(&client, 1, PoolKind::PrivateEphemeral);
        for index in 0..3 {
            assert_eq!(put(&pages, index, Content::Packs(9), 1), PutResult::Stored);
            assert_eq!(put(&others, index, Content::Packs(9), 1), PutResult::Stored);
        }
        let before = client.generation();
        let done = Arc::new(AtomicU32::new(0));
        let (crashed, at, mover) = (crashing.clone(), done.clone(), store.clone());
        all(vec![
            Box::new(move || {
                client.reset().unwrap();
                done.store(1, SeqCst);
                assert_eq!(client.stats().pages_stored, 0);
            }),
            Box::new(move || _ = mover.compact()),
            Box::new(move || {
                crashed.crash(
                    || at.load(SeqCst),
                    |found, done| {
                        let client = found.client("a").unwrap();
                        let is_old = client.generation() == before;
                        assert!(!is_old || done == 0);
                        let expected = if is_old { (2, 6) } else { (0, 0) };
                        let pages = client.stats().pages_stored;
                        assert_eq!((client.pools().len(), pages), expected);
                    },
                );
            }),
        ]);
    });
}

/// While a client's pages are dropped, whoever asks for its pools or figures has an answer.
#[test]
fn nobody_waits_for_a_reset() {
    static ANSWERED: AtomicU32 = AtomicU32::new(0);
    const PAGES: u64 = 12;
    under_schedules(400, |store| {
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        for index in 0..PAGES as u32 {
            let put = put(&pages, index * 64, Content::Packs(9), 1);
            assert_eq!(put, PutResult::Stored);
        }
        let (asked, asking) = (store.clone(), client.clone());
        all(vec![
            Box::new(move || _ = client.reset().unwrap()),
            Box::new(move || {
                let is_halfway = || (1..PAGES).contains(&asked.stats().pages_stored);
                for _ in 0..20 {
                    let was_halfway = is_halfway();
                    assert!(asking.pools().len() <= 1);
                    assert_eq!(asking.stats().mem_limit, 0);
                    if was_halfway && is_halfway() {
                        ANSWERED.fetch_add(1, SeqCst);
                    }
                }
            }),
        ]);
    });
    assert!(ANSWERED.load(SeqCst) > 0, "everybody waited");
}

/// A client is removed while a pool of it is destroyed, and another gets its account's number: what
/// is done at the end to the one's pool is not done to the other's.
#[test]
fn a_pool_that_ends_is_no_other_clients() {
    with_crashes(400, |crashing| {
        let store = &crashing.store;
        let client = store.add_client("a", None).unwrap();
        let pages = pool(&client, 0, PoolKind::Persistent);
        assert_eq!(put(&pages, 0, Content::Packs(9), 1), PutResult::Stored);
        let clients = store.clone();
        all(vec![
            Box::new(move || _ = client.destroy_pool(PoolId(0))),
            Box::new(move || {
                assert!(clients.remove_client("a"));
                let other = clients.add_client("b", None).unwrap();
                let pages = pool(&other, 0, PoolKind::Persistent);
                assert_eq!(put(&pages, 0, Content::Packs(9), 2), PutResult::Stored);
            }),
        ]);
        crashing.crash(
            || (),
            |found, ()| {
                let pages = found.client("b").unwrap().pool(PoolId(0)).unwrap();
                let page = get_of(&pages, OBJECT, 0);
                assert!(page == Some(page_of(Content::Packs(9), 2)));
            },
        );
    });
}

/// The account of a client that is gone is forgotten once, whoever notices that its last page is.
#[test]
fn an_account_is_forgotten_once() {
    under_schedules(2000, |store| {
        let [a, b] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
        let shared = PoolKind::SharedEphemeral { uuid: [1; 16] };
        let [ours, theirs] = [&a, &b].map(|client| pool(client, 0, shared));
        assert_eq!(put(&ours, 0, Content::Packs(9), 1), PutResult::Stored);
        store.remove_client("a");
        assert_eq!(theirs.flush_page(OBJECT, 0, 1), 1);
        let adder = store.clone();
        all(vec![
            Box::new(move || _ = adder.add_client("c", None).unwrap()),
            Box::new(move || _ = b.destroy_pool(PoolId(0)).unwrap()),
        ]);
    });
}
