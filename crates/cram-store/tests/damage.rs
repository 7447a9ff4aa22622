// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A flipped bit anywhere in the arena is an error for the page that it is in,
//! or nothing; never wrong bytes, and never another page's loss. Be it flipped
//! while the store is closed or while it is open.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cram_store::{
    ArenaError, Backing, FORMAT_VERSION, GetResult, ObjectId, PAGE_SIZE, Page, PoolId, PoolKind,
    PoolSpec, PutResult, Scratch, Store, StoreConfig, StoreError,
};
use pages::{Content, Random, config_of, page_of, seed, times};
use rustix::fs::{SeekFrom, seek};

const CAPACITY_BYTES: u64 = 512 << 10;
const UUID: [u8; 16] = [3; 16];
const KINDS: [PoolKind; 3] = [
    PoolKind::Persistent,
    PoolKind::PrivateEphemeral,
    PoolKind::SharedEphemeral { uuid: UUID },
];
const CLIENTS: [&str; 2] = ["a", "b"];
/// Pages under indexes that leave the same rest by it are equal.
const DIFFERENT: u32 = 9;

fn open(path: &Path) -> Result<Arc<Store>, StoreError> {
    Store::new(StoreConfig {
        backing: Backing::File(path.to_owned()),
        ..config_of(CAPACITY_BYTES)
    })
}

/// The page under an index. Some compress, some do not, some are one word, and some are the same.
fn page_under(client: usize, index: u32) -> Page {
    let number = u64::from(index % DIFFERENT) + client as u64 * 100;
    let content = match index % DIFFERENT {
        0 => Content::Filled,
        1 => Content::Noise,
        2 | 3 => Content::Text,
        share => Content::Packs(share as u8 * 3),
    };
    page_of(content, number)
}

/// An arena with some of everything, and every page's name.
fn fill(path: &Path) -> Vec<(usize, u32, u32)> {
    let store = open(path).unwrap();
    let mut scratch = Scratch::new();
    let mut names = Vec::new();
    for (client, name) in CLIENTS.iter().enumerate() {
        let handle = store.add_client(name, None).unwrap();
        handle.authorise(UUID);
        for (id, kind) in (0..).zip(KINDS) {
            let spec = PoolSpec {
                kind,
                refuse_incompressible: false,
            };
            handle.new_pool(PoolId(id), spec).unwrap();
            let pool = handle.pool(PoolId(id)).unwrap();
            // In the shared pool each client has pages of its own.
            let first = client as u32 * 1000;
            for index in first..first + DIFFERENT * 2 {
                let page = page_under(client, index);
                let put = pool.put(ObjectId([1; 3]), index, &page, &mut scratch);
                assert_eq!(put, PutResult::Stored);
                names.push((client, id, index));
            }
        }
    }
    store.recompress(Duration::ZERO);
    store.check().unwrap();
    assert!(store.stats().pages_sharing > 0 && store.stats().recompressed_pages > 0);
    names
}

/// Where the file has anything at all.
fn data(file: &File) -> Vec<(u64, u64)> {
    let (mut at, mut pieces) = (0, Vec::new());
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        pieces.push((start, at));
    }
    pieces
}

fn copy(from: &File, to: &Path) {
    let copy = File::create(to).unwrap();
    copy.set_len(from.metadata().unwrap().len()).unwrap();
    for (start, end) in data(from) {
        let mut bytes = vec![0; (end - start) as usize];
        from.read_exact_at(&mut bytes, start).unwrap();
        copy.write_all_at(&bytes, start).unwrap();
    }
}

fn flip(path: &Path, bit: u64) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, bit / 8).unwrap();
    byte[0] ^= 1 << (bit % 8);
    file.write_all_at(&byte, bit / 8).unwrap();
}

/// Gets everything; how many pages were lost. (Exclusive gets take what they find.)
fn harmed(store: &Store, names: &[(usize, u32, u32)], moment: &str) -> usize {
    let mut scratch = Scratch::new();
    names
        .iter()
        .filter(|(client, id, index)| {
            let pool = store.client(CLIENTS[*client]).unwrap();
            let pool = pool.pool(PoolId(*id)).unwrap();
            let mut page = [0xee; PAGE_SIZE];
            let object = ObjectId([1; 3]);
            match pool.get(object, *index, &mut page, &mut scratch) {
                GetResult::Found => {
                    assert!(
                        page == page_under(*client, *index),
                        "{moment}: wrong bytes of {client} {id} {index}"
                    );
                    false
                }
                // May happen to an ephemeral page at any time; so an ephemeral object has one record
                // only, and with it its pages may go.
                GetResult::Missing => *id == 0,
                GetResult::Corrupt => true,
            }
        })
        .count()
}

/// How many pages may have their bytes from one place: two of one client in each of its pools.
const SHARERS: usize = 4;

#[test]
fn a_flipped_bit_is_an_error_for_its_page_or_nothing() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let (whole, arena) = (folder.path().join("whole"), folder.path().join("arena"));
    let names = fill(&whole);
    let file = File::open(&whole).unwrap();
    let pieces = data(&file);
    let bits: u64 = pieces.iter().map(|(start, end)| (end - start) * 8).sum();
    let mut random = Random(seed());
    let (mut harmless, mut harmful) = (0, 0);
    for round in 0..times(1500) {
        let mut bit = random.below(bits);
        let piece = pieces.iter().find(|(start, end)| {
            let length = (end - start) * 8;
            let is_here = bit < length;
            if !is_here {
                bit -= length;
            }
            is_here
        });
        let bit = piece.unwrap().0 * 8 + bit;
        copy(&file, &arena);
        let is_open = round % 2 == 1;
        let moment = format!("bit {bit}, while open: {is_open}");
        if !is_open {
            flip(&arena, bit);
        }
        let store = open(&arena).unwrap_or_else(|error| panic!("{moment}: {error}"));
        if is_open {
            flip(&arena, bit);
        }
        // Whatever moves pages about meets the flipped bit too.
        if round % 3 == 0 {
            store.recompress(Duration::ZERO);
            store.compact();
        }
        let lost = harmed(&store, &names, &moment);
        assert!(lost <= SHARERS, "{moment}: {lost} pages were lost");
        if lost == 0 {
            harmless += 1;
        } else {
            harmful += 1;
        }
        // It goes on working: every page is put again, and is there.
        if round % 10 == 0 {
            drop(store);
            let store = open(&arena).unwrap();
            put_again(&store, &names, &moment);
        }
    }
    println!("{harmless} flips did nothing, {harmful} were an error for their page");
    assert!(harmless > 0 && harmful > 0);
}

fn put_again(store: &Store, names: &[(usize, u32, u32)], moment: &str) {
    let mut scratch = Scratch::new();
    for (client, id, index) in names {
        let pool = store.client(CLIENTS[*client]).unwrap();
        let pool = pool.pool(PoolId(*id)).unwrap();
        let page = page_under(*client, *index);
        let put = pool.put(ObjectId([1; 3]), *index, &page, &mut scratch);
        assert_eq!(put, PutResult::Stored, "{moment}");
    }
    assert_eq!(harmed(store, names, moment), 0, "{moment}, put again");
    let stats = store.stats();
    assert_eq!(stats.gets_missing, 0, "{moment}, put again");
}

#[test]
fn what_is_no_arena_is_refused_and_left_alone() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let refusal = |path: &Path| match open(path) {
        Err(StoreError::Arena(error)) => error,
        other => panic!("{other:?}"),
    };
    for foreign in [&b"important"[..], &[7; 100_000], &[0; 100]] {
        std::fs::write(&path, foreign).unwrap();
        assert!(matches!(refusal(&path), ArenaError::Foreign(_)));
        assert_eq!(std::fs::read(&path).unwrap(), foreign);
    }
    std::fs::remove_file(&path).unwrap();
    fill(&path);
    let file = File::open(&path).unwrap();

    // In use.
    let first = open(&path).unwrap();
    assert!(matches!(refusal(&path), ArenaError::InUse(_)));
    drop(first);

    // Cut short.
    let cut = folder.path().join("cut");
    copy(&file, &cut);
    let cut_file = OpenOptions::new().write(true).open(&cut).unwrap();
    cut_file.set_len(200_000).unwrap();
    assert!(matches!(refusal(&cut), ArenaError::Damaged { .. }));

    // Of another version: both copies say so, with their sums.
    let newer = folder.path().join("newer");
    copy(&file, &newer);
    let newer_file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(&newer)
        .unwrap();
    for at in [0, 2048] {
        let mut bytes = [0; 256];
        newer_file.read_exact_at(&mut bytes, at).unwrap();
        bytes[8] = 77;
        let sum = twox_hash::XxHash3_64::oneshot(&bytes[..248]);
        bytes[248..].copy_from_slice(&sum.to_le_bytes());
        newer_file.write_all_at(&bytes, at).unwrap();
    }
    let error = refusal(&newer);
    assert!(matches!(error, ArenaError::Version { found: 77, .. }));
    assert!(error.to_string().contains(&FORMAT_VERSION.to_string()));

    // Of another capacity: larger is welcome, smaller is not while something is stored beyond it.
    let config = |capacity_bytes| StoreConfig {
        backing: Backing::File(path.clone()),
        ..config_of(capacity_bytes)
    };
    let larger = Store::new(config(CAPACITY_BYTES * 4)).unwrap();
    assert!(larger.stats().pages_stored > 0);
    drop(larger);
    let smaller = Store::new(config(cram_store::CAPACITY_BYTES_MIN));
    assert!(smaller.is_ok() || matches!(smaller, Err(StoreError::DoesNotFit { .. })));
    // A folder and a device are no places for an arena.
    for path in [folder.path(), Path::new("/dev/null")] {
        assert!(matches!(refusal(path), ArenaError::System { .. }));
    }
}
