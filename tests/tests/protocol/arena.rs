// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Section 4.1, of a daemon that keeps its pages in a file: the next one has the same generation,
//! and every page and pool.

use anyhow::Result;
use cram_abi::wire::{Limits, pool_flag, result, status};
use cram_tests::frontend::{Guest, Request, TestDaemon};

const CAPACITY: u64 = 64 << 20;
const PAGES: std::ops::Range<u32> = 0..40;

fn limits(guest: &mut Guest) -> Result<Limits> {
    guest.call(1, &Request::query())?.limits()
}

#[test]
fn the_next_daemon_has_the_same_pages() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let arena = folder.path().join("arena");
    let start = || {
        TestDaemon::start_with(2, CAPACITY, |options| {
            options.store.arena = Some(arena.clone());
        })
    };
    let numbers: Vec<u32> = PAGES.collect();

    let daemon = start()?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(2, pool_flag::PERSISTENT)?;
    assert_eq!(guest.put(2, &numbers)?, [result::OK; 40]);
    let flush = Request::flush_page(2, 0, &[(10, 5)]);
    assert_eq!(guest.call(1, &flush)?.response.pages.get(), 5);
    let before = limits(&mut guest)?;
    // Another client's pages are not to be mixed up with these.
    let mut other = daemon.connect(1)?;
    other.new_pool(2, pool_flag::PERSISTENT)?;
    other.put(2, &[1000])?;
    drop((guest, other, daemon));

    let daemon = start()?;
    daemon.check_store()?;
    let mut guest = daemon.connect(0)?;
    let after = limits(&mut guest)?;
    assert_eq!(after.generation, before.generation);
    assert_eq!(after.stored_pages.get(), 35);
    // Without new_pool: the pool is there.
    let results = guest.get(2, &numbers)?;
    for (number, result) in numbers.iter().zip(results) {
        let is_flushed = (10..15).contains(number);
        assert_eq!(result == result::OK, !is_flushed, "page {number}");
    }
    assert_eq!(guest.new_pool(2, pool_flag::PERSISTENT)?, 35);
    let answer = guest.call(1, &Request::get(2, 0, &[1000]))?;
    assert_eq!(answer.response.status, status::OK);
    assert_eq!(answer.response.result[0], result::MISSING);
    let mut other = daemon.connect(1)?;
    assert_eq!(other.get(2, &[1000])?, [result::OK]);
    Ok(())
}

#[test]
fn without_a_file_the_next_daemon_is_another_store() -> Result<()> {
    let generation = || -> Result<u64> {
        let daemon = TestDaemon::start(1, CAPACITY)?;
        Ok(limits(&mut daemon.connect(0)?)?.generation.get())
    };
    assert_ne!(generation()?, generation()?);
    Ok(())
}
