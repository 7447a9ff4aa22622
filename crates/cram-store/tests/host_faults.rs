// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host that refuses: memory, room in the file system, the disk, descriptors; and a clock that
//! jumps. What holds then is in docs/store.md, "When the host refuses".
//!
//! Faults are injected where they come from: a filter of system calls makes them fail, for the one
//! thread that has it.

#![cfg(target_os = "linux")]
#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss
)]

mod pages;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use cram_store::{
    Backing, GetResult, ObjectId, PAGE_SIZE, Pool, PoolId, PoolKind, PoolSpec, PutResult, Refusal,
    Scratch, Store, StoreConfig, StoreError, jump_clock,
};
use pages::superblock::{BOOT_ID_AT, CLEAN_AT, rewrite};
use pages::{Content, config_of, page_of};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, apply_filter,
};

const CAPACITY_BYTES: u64 = 24 << 20;
/// More pages than fit into what is there without another call for memory.
const ENOUGH: u64 = 100_000;
const OBJECT: ObjectId = ObjectId([1, 2, 3]);

/// A system call, with this argument if one is given, and how it fails.
#[derive(Clone, Copy)]
struct Fault {
    call: libc::c_long,
    argument: Option<Argument>,
    errno: i32,
}

/// An argument of type `int`, by its place.
#[derive(Clone, Copy)]
enum Argument {
    Is(u8, u64),
    IsNot(u8, u64),
}

const fn populate(errno: i32) -> Fault {
    Fault {
        call: libc::SYS_madvise,
        argument: Some(Argument::Is(2, libc::MADV_POPULATE_WRITE as u64)),
        errno,
    }
}

const fn always(call: libc::c_long, errno: i32) -> Fault {
    Fault {
        call,
        argument: None,
        errno,
    }
}

/// Mapping a file; memory of the C library's is no file.
const MAP: Fault = Fault {
    call: libc::SYS_mmap,
    argument: Some(Argument::IsNot(4, u32::MAX as u64)),
    errno: libc::ENOMEM,
};

impl Fault {
    fn filter(self) -> BpfProgram {
        let rules = self.argument.map(|argument| {
            let (place, operator, value) = match argument {
                Argument::Is(place, value) => (place, SeccompCmpOp::Eq, value),
                Argument::IsNot(place, value) => (place, SeccompCmpOp::Ne, value),
            };
            let length = SeccompCmpArgLen::Dword;
            let condition = SeccompCondition::new(place, length, operator, value).unwrap();
            SeccompRule::new(vec![condition]).unwrap()
        });
        let calls = [(self.call, rules.into_iter().collect())].into();
        let fails = SeccompAction::Errno(self.errno.unsigned_abs());
        let architecture = std::env::consts::ARCH.try_into().unwrap();
        let filter = SeccompFilter::new(calls, SeccompAction::Allow, fails, architecture);
        filter.unwrap().try_into().unwrap()
    }
}

/// Does something in a thread for which the host is like that.
fn with<T: Send>(faults: &[Fault], work: impl FnOnce() -> T + Send) -> T {
    let filters: Vec<_> = faults.iter().map(|fault| fault.filter()).collect();
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            rustix::thread::set_no_new_privs(true).unwrap();
            filters
                .iter()
                .for_each(|filter| apply_filter(filter).unwrap());
            work()
        });
        thread.join().unwrap()
    })
}

fn try_open(path: &Path) -> Result<Arc<Store>, StoreError> {
    Store::new(StoreConfig {
        backing: Backing::File(path.to_owned()),
        ..config_of(CAPACITY_BYTES)
    })
}

fn pool_of(store: &Store) -> Arc<Pool> {
    let client = match store.client("a") {
        Some(client) => client,
        None => store.add_client("a", None).unwrap(),
    };
    let spec = PoolSpec {
        kind: PoolKind::Persistent,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(0), spec).unwrap();
    client.pool(PoolId(0)).unwrap()
}

const CONTENT: Content = Content::Packs(30);

fn put(pool: &Pool, index: u64, content: Content) -> PutResult {
    let page = page_of(content, index);
    pool.put(OBJECT, index as u32, &page, &mut Scratch::new())
}

fn get(pool: &Pool, index: u64) -> (GetResult, [u8; PAGE_SIZE]) {
    let mut page = [0; PAGE_SIZE];
    let found = pool.get(OBJECT, index as u32, &mut page, &mut Scratch::new());
    (found, page)
}

fn is_there(pool: &Pool, index: u64, content: Content) -> bool {
    get(pool, index) == (GetResult::Found, page_of(content, index))
}

#[test]
fn a_host_without_memory_has_puts_refused_and_loses_nothing() {
    let faults: [&[Fault]; 5] = [
        &[populate(libc::ENOMEM)],
        // No room in the file system, and no huge page.
        &[populate(libc::EFAULT)],
        &[populate(libc::EIO)],
        &[populate(libc::EHWPOISON)],
        // Before Linux 5.14, and no room in the file system.
        &[
            populate(libc::EINVAL),
            always(libc::SYS_fallocate, libc::ENOSPC),
        ],
    ];
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    for (number, faults) in faults.into_iter().enumerate() {
        let path = folder.path().join(number.to_string());
        let store = try_open(&path).unwrap();
        let pool = pool_of(&store);
        for index in 0..500 {
            assert_eq!(put(&pool, index, CONTENT), PutResult::Stored);
        }
        let refused = with(faults, || {
            let refused = (500..ENOUGH).find(|index| {
                let result = put(&pool, *index, CONTENT);
                assert!(matches!(
                    result,
                    PutResult::Stored | PutResult::Refused(Refusal::NoSpace)
                ));
                result != PutResult::Stored
            });
            // A put is absolute, also this one: the older copy is gone.
            assert_eq!(
                put(&pool, 3, Content::Noise),
                PutResult::Refused(Refusal::NoSpace)
            );
            assert_eq!(get(&pool, 3).0, GetResult::Missing);
            refused.expect("a put that is refused")
        });
        assert!(refused < 12_000, "{refused} pages, and no call for memory");
        let all_are_there = |pool: &Pool| {
            let mut indexes = (0..refused).filter(|index| *index != 3);
            indexes.all(|index| is_there(pool, index, CONTENT))
        };
        assert!(all_are_there(&pool));
        assert_eq!(get(&pool, refused).0, GetResult::Missing);
        store.check().unwrap();

        // There is memory again.
        assert_eq!(put(&pool, refused, CONTENT), PutResult::Stored);
        assert_eq!(put(&pool, 3, Content::Noise), PutResult::Stored);
        store.check().unwrap();
        drop((pool, store));
        let store = try_open(&path).unwrap();
        let pool = pool_of(&store);
        assert_eq!(store.stats().pages_stored, refused + 1);
        assert!(all_are_there(&pool) && is_there(&pool, 3, Content::Noise));
        store.check().unwrap();
    }
}

#[test]
fn a_host_that_takes_no_memory_back_costs_no_page() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = try_open(&path).unwrap();
    let pool = pool_of(&store);
    let whole = (0..ENOUGH).take_while(|index| put(&pool, *index, CONTENT) == PutResult::Stored);
    let count = whole.count() as u64;
    with(&[always(libc::SYS_fallocate, libc::EIO)], || {
        for index in (0..count).filter(|index| index % 16 != 0) {
            pool.flush_page(OBJECT, index as u32, 1);
        }
        store.compact();
    });
    store.check().unwrap();
    assert!(
        (0..count)
            .step_by(16)
            .all(|at| is_there(&pool, at, CONTENT))
    );
    // What it kept is used again.
    assert!((0..count / 2).all(|at| put(&pool, at, CONTENT) == PutResult::Stored));
    store.check().unwrap();
}

#[test]
fn a_file_that_the_host_does_not_open_or_map_is_left_as_it_is() {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let store = try_open(&path).unwrap();
    let pool = pool_of(&store);
    assert!((0..100).all(|index| put(&pool, index, CONTENT) == PutResult::Stored));
    drop((pool, store));
    for (fault, complaint) in [
        (MAP, "cannot map"),
        (always(libc::SYS_openat, libc::EMFILE), "cannot open"),
        (always(libc::SYS_openat, libc::EIO), "cannot open"),
        (always(libc::SYS_flock, libc::ENOLCK), "cannot lock"),
        (populate(libc::EFAULT), "no memory for"),
    ] {
        let error = with(&[fault], || try_open(&path).err());
        let text = error.expect(complaint).to_string();
        assert!(text.contains(complaint), "{text}");
        assert!(text.contains(path.to_str().unwrap()), "{text}");
    }
    let store = try_open(&path).unwrap();
    let pool = pool_of(&store);
    assert_eq!(store.stats().pages_stored, 100);
    assert!((0..100).all(|index| is_there(&pool, index, CONTENT)));
}

#[test]
fn a_file_whose_disk_does_not_hear_that_it_is_open_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("arena");
    let store = try_open(&path).unwrap();
    let pool = pool_of(&store);
    assert!((0..100).all(|index| put(&pool, index, CONTENT) == PutResult::Stored));
    drop((pool, store));
    // Were it used, and the machine ended, the disk would say that it had been closed.
    let error = with(&[always(libc::SYS_msync, libc::EIO)], || {
        try_open(&path).err()
    });
    let text = error.expect("a refusal").to_string();
    assert!(text.contains("cannot write"), "{text}");
    let store = try_open(&path).unwrap();
    assert_eq!(store.stats().pages_stored, 100);
}

#[test]
fn a_file_that_does_not_reach_its_disk_is_not_said_to_be_closed() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("arena");
    let store = try_open(&path).unwrap();
    let pool = pool_of(&store);
    assert!((0..100).all(|index| put(&pool, index, CONTENT) == PutResult::Stored));
    with(&[always(libc::SYS_msync, libc::EIO)], || {
        drop((pool, store))
    });
    let file = File::open(&path).unwrap();
    let mut mark = [9; 4];
    file.read_exact_at(&mut mark, CLEAN_AT as u64).unwrap();
    assert_eq!(mark, [0; 4]);
    // The machine went on: everything is there.
    let store = try_open(&path).unwrap();
    let pool = pool_of(&store);
    assert!((0..100).all(|index| is_there(&pool, index, CONTENT)));
    with(&[always(libc::SYS_msync, libc::EIO)], || {
        drop((pool, store))
    });
    // It did not, and nothing is believed.
    rewrite(&path, BOOT_ID_AT, &[0x11; 16]);
    let store = try_open(&path).unwrap();
    assert!(store.recovery().is_lost);
    assert_eq!(store.stats().pages_stored, 0);
}

#[test]
fn a_clock_that_jumps_costs_no_page() {
    const YEAR_S: i64 = 365 * 24 * 3600;
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    let mut store = try_open(&path).unwrap();
    let mut pool = pool_of(&store);
    let mut newest = vec![0; 3000];
    // Back before 1970, into a future that no clock shows, and in between.
    let jumps = [0, -100, 1, -1, 100_000, 0, i64::MAX / YEAR_S];
    for (round, years) in jumps.into_iter().enumerate() {
        jump_clock(years * YEAR_S);
        for index in (round..newest.len()).step_by(3) {
            let content = Content::Packs(round as u8 * 7 + 3);
            assert_eq!(put(&pool, index as u64, content), PutResult::Stored);
            newest[index] = round as u8 * 7 + 3;
        }
        store.compact();
        store.recompress(Duration::from_secs(600));
        let ages: u64 = store.age_distribution().iter().map(|age| age.bytes).sum();
        assert!(ages > 0);
        store.check().unwrap();
        if round % 2 == 1 {
            drop((pool, store));
            store = try_open(&path).unwrap();
            pool = pool_of(&store);
        }
        for (index, share) in newest.iter().enumerate().filter(|(_, share)| **share > 0) {
            assert!(is_there(&pool, index as u64, Content::Packs(*share)));
        }
    }
    jump_clock(0);
}
