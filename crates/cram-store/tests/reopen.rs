// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opening an arena again: what fitted fits, what is refused is left alone, and
//! what a machine that ended in the middle has left is given up.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;

use cram_store::{
    Backing, GetResult, ObjectId, PAGE_SIZE, Pool, PoolId, PoolKind, PoolSpec, PutResult, Scratch,
    Store, StoreConfig, StoreError,
};
use pages::superblock::{BOOT_ID_AT, CLEAN_AT, rewrite};
use pages::{Content, config_of, page_of};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

const CAPACITY_BYTES: u64 = 24 << 20;

fn try_open(path: &Path, capacity_bytes: u64) -> Result<Arc<Store>, StoreError> {
    Store::new(StoreConfig {
        backing: Backing::File(path.to_owned()),
        ..config_of(capacity_bytes)
    })
}

fn open(path: &Path) -> Arc<Store> {
    try_open(path, CAPACITY_BYTES).unwrap()
}

fn pool_of(store: &Store, id: u32, kind: PoolKind) -> Arc<Pool> {
    let client = match store.client("a") {
        Some(client) => client,
        None => store.add_client("a", None).unwrap(),
    };
    let spec = PoolSpec {
        kind,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(id), spec).unwrap();
    client.pool(PoolId(id)).unwrap()
}

/// How pages are named and what is in them: the index or the arena may be what takes the room.
#[derive(Clone, Copy, Debug)]
struct Mix {
    pages_per_object: u64,
    /// Between the numbers of two pages.
    step: u32,
    content: Content,
}

impl Mix {
    fn name(self, number: u64) -> (ObjectId, u32) {
        let (object, page) = (
            number / self.pages_per_object,
            number % self.pages_per_object,
        );
        (ObjectId([object, 1, 1]), page as u32 * self.step)
    }

    fn put(self, pool: &Pool, number: u64, scratch: &mut Scratch) -> bool {
        let (object, index) = self.name(number);
        let page = page_of(self.content, number);
        pool.put(object, index, &page, scratch) == PutResult::Stored
    }

    /// Puts pages from this number on until one is refused; the number of that one.
    fn fill(self, pool: &Pool, mut number: u64) -> u64 {
        let mut scratch = Scratch::new();
        while self.put(pool, number, &mut scratch) {
            number += 1;
        }
        number
    }

    fn is_there(self, pool: &Pool, number: u64) -> bool {
        let (object, index) = self.name(number);
        let mut page = [0; PAGE_SIZE];
        let found = pool.get(object, index, &mut page, &mut Scratch::new());
        assert_ne!(found, GetResult::Corrupt);
        found == GetResult::Found && page == page_of(self.content, number)
    }
}

const DENSE: Mix = Mix {
    pages_per_object: u64::MAX,
    step: 1,
    content: Content::Packs(3),
};
const SPARSE: Mix = Mix {
    pages_per_object: u64::MAX,
    step: 64,
    content: Content::Filled,
};
const MANY_OBJECTS: Mix = Mix {
    pages_per_object: 1,
    step: 1,
    content: Content::Packs(1),
};
const LONG: Mix = Mix {
    content: Content::Noise,
    ..DENSE
};

/// Pages until a first mix is refused, then those of a second one: what the index has left, the
/// arena fills, and the other way round.
#[test]
fn what_fitted_fits_again() {
    let mixes = [
        [DENSE, LONG],
        [SPARSE, LONG],
        [LONG, SPARSE],
        [MANY_OBJECTS, DENSE],
        [DENSE, SPARSE],
    ];
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for (at, mixes) in mixes.into_iter().enumerate() {
        let path = folder.path().join(at.to_string());
        let store = open(&path);
        let pools = [0, 1].map(|id| pool_of(&store, id, PoolKind::Persistent));
        let filled: Vec<_> = (0..)
            .zip(mixes.into_iter().zip(&pools))
            .map(|(id, (mix, pool))| (id, mix, mix.fill(pool, 0)))
            .collect();
        drop(pools);
        let before = store.stats();
        drop(store);
        for round in 0..2 {
            let store = open(&path);
            let after = store.stats();
            assert_eq!(after.pages_stored, before.pages_stored, "{mixes:?}");
            assert!(after.mem_used_max <= CAPACITY_BYTES);
            // In this process its tables are as large as they must be, and no larger.
            assert!(
                after.mem_used_total <= before.mem_used_total,
                "{mixes:?}: {} after {}",
                after.mem_used_total,
                before.mem_used_total
            );
            for (id, mix, count) in &filled {
                let pool = pool_of(&store, *id, PoolKind::Persistent);
                let every = (count / 500).max(1);
                for number in (0..*count).step_by(every as usize) {
                    assert!(
                        mix.is_there(&pool, number),
                        "{mix:?} {number}, round {round}"
                    );
                }
            }
            store.check().unwrap();
        }
        std::fs::remove_file(path).unwrap();
    }
}

#[test]
fn a_refused_open_writes_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    let count = DENSE.fill(&pool, 0);
    pool_of(&store, 1, PoolKind::PrivateEphemeral);
    drop((pool, store));
    let whole = std::fs::read(&path).unwrap();
    let blocks = std::fs::metadata(&path).unwrap().blocks();
    let mut refused = 0;
    for hundredths in [5, 50, 80, 90, 95] {
        let opened = try_open(&path, CAPACITY_BYTES / 100 * hundredths);
        let Err(error) = opened else { continue };
        assert!(matches!(error, StoreError::DoesNotFit { .. }), "{error}");
        assert!(std::fs::read(&path).unwrap() == whole, "{hundredths}");
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), blocks);
        refused += 1;
    }
    assert!(refused >= 4, "{refused}");
    let store = open(&path);
    assert_eq!(store.stats().pages_stored, count);
    assert_eq!(store.client("a").unwrap().pools().len(), 2);
    store.check().unwrap();
}

/// Whatever it is that finds no room when an arena is opened: the open is refused, or all is there.
#[test]
fn nothing_is_left_out_to_make_it_fit() {
    const CLIENTS: u64 = 60;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = try_open(&path, 4 << 20).unwrap();
    for number in 0..CLIENTS {
        let client = store.add_client(&number.to_string(), None).unwrap();
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(0), spec).unwrap();
        let pool = client.pool(PoolId(0)).unwrap();
        assert!((0..4).all(|number| LONG.put(&pool, number, &mut Scratch::new())));
    }
    drop(store);
    // A flipped bit in the header of an account's record is put right, but not before all fits.
    let bytes = std::fs::read(&path).unwrap();
    let flipped = records_of(&bytes, 4)[0];
    let right = bytes[flipped];
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[right ^ 1], flipped as u64).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let mut refused = 0;
    let store = (512 << 10..4 << 20).step_by(2 << 10).find_map(|capacity| {
        let opened = try_open(&path, capacity);
        let Err(error) = opened else {
            return opened.ok();
        };
        assert!(matches!(error, StoreError::DoesNotFit { .. }), "{error}");
        assert!(std::fs::read(&path).unwrap() == whole, "{capacity}");
        refused += 1;
        None
    });
    let store = store.unwrap();
    assert!(refused > 0);
    assert_eq!(store.clients().len() as u64, CLIENTS);
    assert_eq!(store.stats().pages_stored, CLIENTS * 4);
    assert_eq!(store.damage(), (0, 1));
    assert_eq!(std::fs::read(&path).unwrap()[flipped], right);
    store.check().unwrap();
}

/// An alias says three times which image it has its bytes from, and no sum guards that.
#[test]
fn a_number_of_an_image_that_is_none_costs_its_page_and_no_more() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    let mut scratch = Scratch::new();
    for index in 0..20 {
        let page = page_of(Content::Text, 5);
        let put = pool.put(ObjectId([1; 3]), index, &page, &mut scratch);
        assert_eq!(put, PutResult::Stored);
    }
    assert_eq!(store.stats().pages_sharing, 20);
    drop((pool, store));
    // The one image is number 0, so an alias's payload is twelve zeroes, behind a header of 16 bytes
    // that says: an alias, of 12 bytes.
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let bytes = std::fs::read(&path).unwrap();
    let is_alias = |at: &usize| {
        let word = u64::from_le_bytes(bytes[at + 8..at + 16].try_into().unwrap());
        let first = u64::from_le_bytes(bytes[*at..at + 8].try_into().unwrap());
        first >> 60 == 0b1010
            && word >> 32 & 0xffff == (3 << 13 | 12)
            && bytes[at + 16..at + 28] == [0; 12]
    };
    let aliases: Vec<_> = (0..bytes.len() - 32).step_by(16).filter(is_alias).collect();
    assert_eq!(aliases.len(), 20);
    for at in &aliases[..3] {
        file.write_all_at(&[0xf0; 12], *at as u64 + 16).unwrap();
    }
    let store = open(&path);
    assert_eq!(store.stats().pages_stored, 17);
    assert!(store.stats().mem_used_max < 8 << 20);
    store.check().unwrap();
}

/// Where the live records of a kind are in an arena, by what their headers say.
fn records_of(bytes: &[u8], kind: u64) -> Vec<usize> {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    // Behind the superblock; the lengths of records of these kinds are not 0.
    let is_one = |at: &usize| {
        word(*at) >> 60 == 0b1010
            && word(at + 8) >> 45 & 7 == kind
            && word(at + 8) >> 32 & 0x1fff != 0
    };
    (4096..bytes.len() - 16)
        .step_by(16)
        .filter(is_one)
        .collect()
}

/// An image that is damaged takes the pages with it that need it, be they all that their objects have.
#[test]
fn an_object_whose_last_page_dangles_is_gone() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    let mut scratch = Scratch::new();
    let mut put = |pool: &Pool, object, content| {
        let page = page_of(content, 5);
        let put = pool.put(ObjectId([object; 3]), 0, &page, &mut scratch);
        assert_eq!(put, PutResult::Stored);
    };
    for object in 0..3 {
        put(&pool, object, Content::Text);
    }
    put(&pool, 3, Content::Packs(3));
    assert_eq!(store.stats().pages_sharing, 3);
    drop((pool, store));
    let images = records_of(&std::fs::read(&path).unwrap(), 2);
    assert_eq!(images.len(), 1);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0xff; 16], images[0] as u64 + 40)
        .unwrap();
    // So that every page is verified.
    rewrite(&path, BOOT_ID_AT, &[0x11; 16]);
    let store = open(&path);
    assert!(store.recovery().is_verified);
    assert_eq!(store.stats().pages_stored, 1);
    store.check().unwrap();
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    for object in 0..3 {
        put(&pool, object, Content::Text);
    }
    store.check().unwrap();
}

#[test]
fn after_the_machine_ended_only_what_was_closed_is_believed() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let generation = store.generation();
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    let mut scratch = Scratch::new();
    assert!((0..1000).all(|number| DENSE.put(&pool, number, &mut scratch)));

    // A machine that was switched off now: the file was not closed.
    let lost = folder.path().join("lost");
    std::fs::copy(&path, &lost).unwrap();
    rewrite(&lost, BOOT_ID_AT, &[0x11; 16]);
    // A process that was killed now, on a machine that went on.
    let killed = folder.path().join("killed");
    std::fs::copy(&path, &killed).unwrap();
    drop((pool, store));

    let store = open(&killed);
    assert_eq!(
        (store.generation(), store.stats().pages_stored),
        (generation, 1000)
    );
    assert!(!store.recovery().is_lost && !store.recovery().is_verified);

    let store = open(&lost);
    assert!(store.recovery().is_lost);
    assert_ne!(store.generation(), generation);
    assert_eq!((store.clients().len(), store.stats().pages_stored), (0, 0));
    assert!(store.stats().mem_used_total < 4 << 20);
    store.check().unwrap();
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    assert!(DENSE.put(&pool, 7, &mut scratch));
    drop((pool, store));
    // Nothing that it had before comes back.
    let store = open(&lost);
    assert_eq!(store.stats().pages_stored, 1);
    drop(store);

    // Closed, and then the machine was started anew: every page is verified.
    rewrite(&path, BOOT_ID_AT, &[0x11; 16]);
    let store = open(&path);
    assert!(store.recovery().is_verified && !store.recovery().is_lost);
    assert_eq!(
        (store.generation(), store.stats().pages_stored),
        (generation, 1000)
    );
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    assert!((0..1000).all(|number| DENSE.is_there(&pool, number)));
    // While it is open, it is not closed.
    let mut mark = [9; 4];
    let file = OpenOptions::new().read(true).open(&path).unwrap();
    file.read_exact_at(&mut mark, CLEAN_AT as u64).unwrap();
    assert_eq!(mark, [0; 4]);
    drop((pool, store));
    file.read_exact_at(&mut mark, CLEAN_AT as u64).unwrap();
    assert_eq!(mark, [1, 0, 0, 0]);
}

/// From now on the kernel does not write a file of this thread's to its disk: `msync` fails.
fn lose_the_disk() {
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_msync, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::EIO.unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}

/// What is believed after the machine ended hangs on a mark that is taken away before anything else
/// is written.
#[test]
fn an_arena_whose_mark_cannot_be_taken_away_is_not_opened() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    assert!((0..10).all(|number| DENSE.put(&pool, number, &mut Scratch::new())));
    drop((pool, store));
    rewrite(&path, BOOT_ID_AT, &[0x11; 16]);
    let whole = std::fs::read(&path).unwrap();
    let opening = path.clone();
    let opened = std::thread::spawn(move || {
        lose_the_disk();
        try_open(&opening, CAPACITY_BYTES).map(|_| ())
    });
    let error = opened.join().unwrap().unwrap_err().to_string();
    let expected = format!("cannot write {}: Input/output error", path.display());
    assert!(error.starts_with(&expected), "{error}");
    assert!(std::fs::read(&path).unwrap() == whole);
    let store = open(&path);
    assert!(store.recovery().is_verified);
    assert_eq!(store.stats().pages_stored, 10);
}

/// Spans that were made ready for puts, and never filled, are in the file too.
#[test]
fn memory_that_no_record_is_in_is_given_back() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = open(&path);
    let pool = pool_of(&store, 0, PoolKind::Persistent);
    let mut scratch = Scratch::new();
    assert!((0..100).all(|number| DENSE.put(&pool, number, &mut scratch)));
    drop((pool, store));
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    let length = file.metadata().unwrap().len();
    file.write_all_at(&[0; 1 << 20], length - (1 << 20))
        .unwrap();
    let store = open(&path);
    assert_eq!(store.stats().pages_stored, 100);
    let taken = file.metadata().unwrap().blocks() * 512;
    assert!(
        taken <= store.stats().mem_used_total,
        "{taken} bytes of {}",
        store.stats().mem_used_total
    );
}
