// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A page's record takes another's place in two steps. A process that is killed
//! between them leaves both, and who opens the arena again must end up as if one
//! had never been there.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use cram_store::{
    Backing, Client, GetResult, ObjectId, PAGE_SIZE, Page, Pool, PoolId, PoolKind, PoolSpec,
    PutResult, Scratch, Store, StoreConfig,
};
use pages::{Content, config_of, page_of};

const SHARED: PoolKind = PoolKind::SharedEphemeral { uuid: [1; 16] };

fn open(path: &Path) -> Arc<Store> {
    Store::new(StoreConfig {
        backing: Backing::File(path.to_owned()),
        ..config_of(1 << 20)
    })
    .unwrap()
}

fn pool_of(client: &Client, id: u32, kind: PoolKind) -> Arc<Pool> {
    client.authorise([1; 16]);
    let spec = PoolSpec {
        kind,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(id), spec).unwrap();
    client.pool(PoolId(id)).unwrap()
}

fn object(id: u64) -> ObjectId {
    ObjectId([id, 2, 3])
}

fn put(pool: &Pool, id: u64, page: &Page) {
    let put = pool.put(object(id), 0, page, &mut Scratch::new());
    assert_eq!(put, PutResult::Stored);
}

fn get(pool: &Pool, id: u64) -> Option<Page> {
    let mut page = [0; PAGE_SIZE];
    match pool.get(object(id), 0, &mut page, &mut Scratch::new()) {
        GetResult::Found => Some(page),
        GetResult::Missing => None,
        GetResult::Corrupt => panic!("a page is damaged"),
    }
}

/// Undoes in a file the death of the one record that lived in `before` and is dead in it.
fn revive(path: &Path, before: &[u8]) {
    let state = |bytes: &[u8]| bytes[7] >> 4;
    let after = std::fs::read(path).unwrap();
    let words = (0..)
        .step_by(16)
        .zip(before.chunks(16).zip(after.chunks(16)));
    let killed: Vec<_> = words
        .filter(|(_, (before, after))| state(before) == 0b1010 && state(after) == 0b0101)
        .filter(|(_, (before, after))| before[8..] == after[8..])
        .collect();
    assert_eq!(killed.len(), 1);
    let (at, (before, _)) = killed[0];
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&before[..8], at).unwrap();
}

/// In a shared pool each owner of an object has a number for it, and an older page's number is free
/// when the newer page is found first.
#[test]
fn an_older_page_leaves_its_number_to_nobody() {
    const NOISE: Content = Content::Noise;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let [a, b] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
    let kept = pool_of(&a, 0, PoolKind::Persistent);
    let [shared, others] = [&a, &b].map(|client| pool_of(client, 1, SHARED));
    // Three such pages fill a span. What follows the first three goes to a later one, and what comes
    // at last to the first again: so there the newer record is found first.
    for id in 1..4 {
        put(&shared, id, &page_of(NOISE, id));
    }
    for id in [10, 11, 12] {
        put(&shared, id, &page_of(NOISE, id));
    }
    for id in 1..4 {
        assert_eq!(shared.flush_object(object(id)), 1);
    }
    let before = std::fs::read(&path).unwrap();
    put(&others, 10, &page_of(NOISE, 20));
    // Killed before the older record was declared dead.
    let killed = folder.path().join("killed");
    std::fs::copy(&path, &killed).unwrap();
    revive(&killed, &before);
    drop((kept, shared, others, a, b, store));

    let store = open(&killed);
    assert_eq!(store.recovery().discarded, 1);
    let pool = |store: &Store, name, id| store.client(name).unwrap().pool(PoolId(id)).unwrap();
    let others = pool(&store, "b", 1);
    assert!(get(&others, 10) == Some(page_of(NOISE, 20)));
    let kept = pool(&store, "a", 0);
    for id in 100..120 {
        put(&kept, id, &page_of(Content::Packs(3), id));
    }
    assert_eq!(others.flush_object(object(10)), 1);
    store.check().unwrap();
    drop((kept, others, store));

    let store = open(&killed);
    let kept = pool(&store, "a", 0);
    for id in 100..120 {
        assert!(
            get(&kept, id) == Some(page_of(Content::Packs(3), id)),
            "{id}"
        );
    }
    store.check().unwrap();
}
