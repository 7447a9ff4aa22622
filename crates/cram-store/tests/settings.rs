// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the arena keeps of a client beside its pages: settings, generation,
//! instance; and the end of one life of its pages.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::sync::Arc;

use cram_store::{
    AUTHORISED_MAX, Backing, Client, DEFAULT_WEIGHT, GetResult, ObjectId, PAGE_SIZE, Pool, PoolId,
    PoolKind, PoolSpec, PutResult, Scratch, Store, StoreConfig, StoreError,
};
use pages::{config_of, page_of, some_content};

const OBJECT: ObjectId = ObjectId([1, 2, 3]);
const UUID: [u8; 16] = [9; 16];

fn open(path: &Path) -> Arc<Store> {
    Store::new(StoreConfig {
        backing: Backing::File(path.to_owned()),
        ..config_of(4 << 20)
    })
    .unwrap()
}

fn pool(client: &Client, id: u32, kind: PoolKind) -> Arc<Pool> {
    let spec = PoolSpec {
        kind,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(id), spec).unwrap();
    client.pool(PoolId(id)).unwrap()
}

fn put(pool: &Pool, index: u32) -> PutResult {
    let page = page_of(some_content(index.into()), index.into());
    pool.put(OBJECT, index, &page, &mut Scratch::new())
}

fn get(pool: &Pool, index: u32) -> GetResult {
    pool.get(OBJECT, index, &mut [0; PAGE_SIZE], &mut Scratch::new())
}

#[test]
fn settings_are_there_again_when_a_store_is_opened_again() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let client = store.add_client("a", Some(3 << 20)).unwrap();
    let other = store.add_client_to_group("b", None, "group").unwrap();
    assert_eq!(client.settings().weight, DEFAULT_WEIGHT);
    let mut settings = client.settings();
    settings.quota_bytes = Some(2 << 20);
    settings.weight = 7;
    settings.is_frozen = true;
    settings.authorised = BTreeSet::from([UUID, [3; 16]]);
    client.set_settings(&settings).unwrap();
    assert_eq!(client.settings(), settings);
    client.set_instance([5; 16]).unwrap();
    // One by one, too.
    other.set_quota(Some(1 << 20));
    other.set_weight(3);
    other.freeze(true);
    assert!(other.authorise(UUID));
    let generations = [client.generation(), other.generation()];
    assert!(generations[0] != generations[1] && !generations.contains(&0));
    let others = other.settings();
    drop((store, client, other));

    let store = open(&path);
    let (client, other) = (store.client("a").unwrap(), store.client("b").unwrap());
    assert_eq!((client.settings(), other.settings()), (settings, others));
    assert_eq!([client.generation(), other.generation()], generations);
    assert_eq!((client.instance(), other.instance()), ([5; 16], [0; 16]));
    assert!(other.is_in_sharing_group() && !client.is_in_sharing_group());
    client.freeze(false);
    other.revoke(&UUID);
    drop((store, client, other));
    let store = open(&path);
    assert!(!store.client("a").unwrap().is_frozen());
    assert!(store.client("b").unwrap().settings().authorised.is_empty());
    store.check().unwrap();
}

#[test]
fn pages_beyond_a_lowered_quota_are_there_again() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let client = store.add_client("a", None).unwrap();
    let kept = pool(&client, 0, PoolKind::Persistent);
    for index in 0..100 {
        assert_eq!(put(&kept, index), PutResult::Stored);
    }
    client.set_quota(Some(1000));
    drop((kept, client, store));
    let store = open(&path);
    let client = store.client("a").unwrap();
    assert_eq!(client.quota_bytes(), Some(1000));
    let kept = client.pool(PoolId(0)).unwrap();
    assert!((0..100).all(|index| get(&kept, index) == GetResult::Found));
    assert_ne!(put(&kept, 100), PutResult::Stored);
    store.check().unwrap();
}

#[test]
fn a_client_is_authorised_for_so_many_pools_and_no_more() {
    let store = pages::store_of(4 << 20);
    let client = store.add_client("a", None).unwrap();
    let uuid = |number: usize| [number as u8; 16];
    assert!((0..AUTHORISED_MAX).all(|number| client.authorise(uuid(number))));
    assert!(!client.authorise(uuid(AUTHORISED_MAX)) && client.authorise(uuid(0)));
    let before = client.settings();
    let mut settings = before.clone();
    settings.authorised.insert(uuid(AUTHORISED_MAX));
    settings.weight = 1;
    let refused = client.set_settings(&settings);
    assert!(matches!(refused, Err(StoreError::TooManyAuthorised)));
    assert_eq!(client.settings(), before);
}

#[test]
fn a_reset_client_has_nothing_and_another_generation() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let [client, other] = ["a", "b"].map(|name| store.add_client(name, None).unwrap());
    let shared = PoolKind::SharedEphemeral { uuid: UUID };
    assert!(client.authorise(UUID) && other.authorise(UUID));
    client.set_weight(3);
    client.set_instance([4; 16]).unwrap();
    let mine = [PoolKind::Persistent, PoolKind::PrivateEphemeral, shared];
    let mine = [0, 1, 2].map(|id| pool(&client, id, mine[id as usize]));
    let theirs = [(0, PoolKind::Persistent), (1, shared)].map(|(id, kind)| pool(&other, id, kind));
    for index in 0..50 {
        for pool in &mine {
            assert_eq!(put(pool, index), PutResult::Stored);
        }
        for pool in &theirs {
            assert_eq!(put(pool, 100 + index), PutResult::Stored);
        }
    }
    let mut seen = HashSet::from([client.generation()]);
    for _ in 0..3 {
        let generation = client.reset().unwrap();
        assert!(seen.insert(generation));
        assert_eq!(client.generation(), generation);
        assert!(client.pools().is_empty());
        assert_eq!(client.stats().pages_stored, 0);
        store.check().unwrap();
    }
    for pool in &mine {
        assert_eq!(get(pool, 1), GetResult::Missing);
        assert_ne!(put(pool, 1), PutResult::Stored);
    }
    // What it put into a pool that others have open is gone; theirs is not.
    assert_eq!(get(&theirs[1], 1), GetResult::Missing);
    assert!((100..150).all(|index| get(&theirs[1], index) == GetResult::Found));
    assert_eq!((client.weight(), client.instance()), (3, [4; 16]));
    let again = pool(&client, 0, PoolKind::Persistent);
    assert_eq!((again.pages(), put(&again, 9)), (0, PutResult::Stored));
    let generation = client.generation();
    store.check().unwrap();
    drop((mine, theirs, again, client, other, store));
    let store = open(&path);
    let client = store.client("a").unwrap();
    assert_eq!(client.generation(), generation);
    assert_eq!(client.stats().pages_stored, 1);
    assert_eq!(store.client("b").unwrap().stats().pages_stored, 100);
    store.check().unwrap();
}

/// The number under which a client was on record may be another's once it was removed.
#[test]
fn a_handle_on_a_client_that_is_gone_changes_nobodys_record() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let gone = store.add_client("a", None).unwrap();
    assert!(store.remove_client("a"));
    let client = store.add_client("b", None).unwrap();
    let pages = pool(&client, 0, PoolKind::Persistent);
    assert_eq!(put(&pages, 1), PutResult::Stored);
    let generation = client.generation();
    gone.set_quota(Some(1));
    gone.authorise(UUID);
    gone.revoke(&UUID);
    let is_refused = |done: Result<(), StoreError>| {
        let error = done.unwrap_err();
        assert!(
            matches!(&error, StoreError::ClientGone { name } if name == "a"),
            "{error}"
        );
    };
    is_refused(gone.set_settings(&gone.settings()));
    is_refused(gone.set_instance([1; 16]));
    is_refused(gone.reset().map(|_| ()));
    store.check().unwrap();
    drop((pages, client, gone, store));
    let store = open(&path);
    assert!(store.client("a").is_none());
    let client = store.client("b").unwrap();
    assert_eq!(
        (client.generation(), client.quota_bytes()),
        (generation, None)
    );
    assert_eq!(client.stats().pages_stored, 1);
}
