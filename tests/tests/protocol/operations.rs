// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! put, get, flush_page, flush_object: section 6.2 of the protocol, and order (7.1).

use anyhow::{Context, Result};
use cram_abi::wire::{MAX_BATCH, PAGE_SIZE, RESPONSE_SIZE, pool_flag, result, status};
use cram_store::{ObjectId, PoolId};
use cram_tests::frontend::{Guest, Options, PATIENCE, Piece, Request, TestDaemon, page};
use serde_json::json;

const CAPACITY: u64 = 64 << 20;
const PERSISTENT: u32 = pool_flag::PERSISTENT;
const EPHEMERAL: u32 = 0;

fn start() -> Result<(TestDaemon, Guest)> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, PERSISTENT)?;
    guest.new_pool(1, EPHEMERAL)?;
    Ok((daemon, guest))
}

/// A page that no codec can shorten.
fn noise(seed: u64) -> [u8; PAGE_SIZE] {
    let mut noise = page(seed);
    let (low, high) = (page(seed ^ 1 << 40), PAGE_SIZE / 2);
    noise[high..].copy_from_slice(&low[..high]);
    noise
}

#[test]
fn pages_come_back_byte_for_byte_in_batches_of_any_size() -> Result<()> {
    let (daemon, mut guest) = start()?;
    for count in [1, 2, 3, 31, 32, MAX_BATCH] {
        let base = u32::try_from(count * 1000)?;
        let numbers: Vec<u32> = (base..).take(count).collect();
        let pages: Vec<_> = numbers.iter().map(|&k| (k, page(u64::from(k)))).collect();
        let answer = guest.call(2, &Request::put(0, 9, &pages))?;
        assert_eq!(
            (answer.response.status, answer.used as usize),
            (status::OK, RESPONSE_SIZE)
        );
        assert_eq!(answer.response.count.get() as usize, count);
        assert!(answer.results(count).iter().all(|&r| r == result::OK));
        assert!(
            answer.response.result[count..]
                .iter()
                .all(|&r| r == result::NOT_DONE)
        );

        // As often as one likes: the pool is persistent.
        for queue in [1, 2] {
            let answer = guest.call(queue, &Request::get(0, 9, &numbers))?;
            assert_eq!(answer.used as usize, RESPONSE_SIZE + count * PAGE_SIZE);
            assert_eq!(answer.response.count.get() as usize, count);
            for (k, (_, page)) in pages.iter().enumerate() {
                assert!(answer.page(k) == page);
            }
        }
    }
    daemon.check_store()
}

#[test]
fn every_kind_of_content_comes_back() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let mut almost = [7; PAGE_SIZE];
    almost[PAGE_SIZE - 1] = 8;
    let mut words = [0; PAGE_SIZE];
    words.as_chunks_mut::<8>().0.fill(*b"repeated");
    let pages = [
        [0; PAGE_SIZE],
        [0xff; PAGE_SIZE],
        words,
        almost,
        page(5),
        noise(6),
    ];
    let named: Vec<_> = (0..).zip(pages).collect();
    let answer = guest.call(1, &Request::put(0, 0, &named))?;
    assert_eq!(answer.results(6), [result::OK; 6]);
    let answer = guest.call(1, &Request::get(0, 0, &[5, 4, 3, 2, 1, 0]))?;
    for (k, page) in pages.iter().rev().enumerate() {
        assert!(answer.page(k) == page, "page {k} from the end");
    }
    let stats = daemon.client_stats(0)?;
    assert_eq!(
        (&stats["same_pages"], &stats["huge_pages"]),
        (&json!(3), &json!(1))
    );
    Ok(())
}

#[test]
fn names_are_told_apart() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    guest.new_pool(2, PERSISTENT)?;
    let names = [
        (0, 0, 0),
        (0, 0, u32::MAX),
        (0, u64::MAX, 0),
        (0, 1 << 63, 5),
        (2, 0, 0),
    ];
    for (k, &(pool, object, index)) in (0..).zip(&names) {
        guest.call(1, &Request::put(pool, object, &[(index, page(k))]))?;
    }
    let mut far = Request::put(0, 0, &[(0, page(100))]);
    far.readable[24..32].fill(0xee);
    guest.call(1, &far)?;
    for (k, &(pool, object, index)) in (0..).zip(&names) {
        let answer = guest.call(1, &Request::get(pool, object, &[index]))?;
        assert!(
            answer.page(0) == page(k),
            "{:?}",
            names[usize::try_from(k)?]
        );
    }
    Ok(())
}

#[test]
fn a_put_overwrites_and_the_last_of_a_batch_wins() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    guest.call(1, &Request::put(0, 0, &[(7, page(1))]))?;
    guest.call(
        1,
        &Request::put(0, 0, &[(7, page(2)), (7, page(3)), (7, noise(4))]),
    )?;
    let answer = guest.call(1, &Request::get(0, 0, &[7, 7]))?;
    assert!(answer.page(0) == noise(4) && answer.page(1) == noise(4));
    assert_eq!(
        guest
            .call(1, &Request::flush_object(0, 0))?
            .response
            .pages
            .get(),
        1
    );
    Ok(())
}

#[test]
fn a_get_takes_pages_out_of_a_private_ephemeral_pool() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    guest.put(1, &[1, 2, 3])?;
    assert_eq!(
        guest.get(1, &[1, 1, 2])?,
        [result::OK, result::MISSING, result::OK]
    );
    assert_eq!(
        guest.get(1, &[1, 2, 3])?,
        [result::MISSING, result::MISSING, result::OK]
    );
    guest.put(1, &[1])?;
    assert_eq!(guest.get(1, &[1])?, [result::OK]);
    Ok(())
}

#[test]
fn a_page_that_is_missing_leaves_its_buffer_alone() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    guest.put(0, &[2])?;
    let answer = guest.call(1, &Request::get(0, 0, &[1, 2, 3]))?;
    assert_eq!(
        answer.results(3),
        [result::MISSING, result::OK, result::MISSING]
    );
    assert_eq!(answer.used as usize, RESPONSE_SIZE + 3 * PAGE_SIZE);
    for k in [0, 2] {
        assert!(answer.page(k).iter().all(|&b| b == 0xa5));
    }
    Ok(())
}

#[test]
fn a_refused_put_removes_the_older_copy() -> Result<()> {
    let (daemon, mut guest) = start()?;
    guest.new_pool(2, PERSISTENT | pool_flag::REFUSE_INCOMPRESSIBLE)?;
    guest.put(0, &[1, 2])?;
    guest.put(2, &[1])?;

    let answer = guest.call(1, &Request::put(2, 0, &[(1, noise(1))]))?;
    assert_eq!(answer.results(1), [result::INCOMPRESSIBLE]);
    assert_eq!(guest.get(2, &[1])?, [result::MISSING]);

    daemon.call("client.freeze", json!({ "client": "guest0" }))?;
    assert_eq!(guest.put(0, &[1])?, [result::FROZEN]);
    assert_eq!(guest.get(0, &[1, 2])?, [result::MISSING, result::OK]);
    assert_eq!(
        guest
            .call(1, &Request::flush_page(0, 0, &[(2, 1)]))?
            .response
            .pages
            .get(),
        1
    );
    assert_eq!(guest.config()?.pressure.get(), 1000);
    daemon.call("client.thaw", json!({ "client": "guest0" }))?;
    assert_eq!(guest.put(0, &[1])?, [result::OK]);
    daemon.check_store()
}

#[test]
fn capacity_and_quota_are_never_exceeded() -> Result<()> {
    for (quota, refusal) in [
        (None, result::NO_SPACE),
        (Some(1 << 20), result::OVER_QUOTA),
    ] {
        let capacity = 2 << 20;
        let daemon = TestDaemon::start_with(1, capacity, |options| options.quota_bytes = quota)?;
        let limit = quota.unwrap_or(capacity);
        let mut guest = daemon.connect(0)?;
        guest.new_pool(0, PERSISTENT)?;
        let (mut stored, mut refused) = (Vec::new(), Vec::new());
        for first in (0..2048).step_by(32) {
            let numbers: Vec<u32> = (first..first + 32).collect();
            for (number, result) in numbers.iter().zip(guest.put(0, &numbers)?) {
                match result {
                    result::OK => stored.push(*number),
                    other => {
                        assert_eq!(other, refusal);
                        refused.push(*number);
                    }
                }
            }
            let limits = guest.call(1, &Request::query())?.limits()?;
            assert!(limits.held_bytes.get() <= limit);
        }
        assert!(
            stored.len() > 100 && refused.len() > 100,
            "{} stored",
            stored.len()
        );
        for numbers in stored.chunks(MAX_BATCH) {
            assert!(guest.get(0, numbers)?.iter().all(|&r| r == result::OK));
        }
        for numbers in refused.chunks(MAX_BATCH) {
            assert!(guest.get(0, numbers)?.iter().all(|&r| r == result::MISSING));
        }
        daemon.check_store()?;
        let stats = daemon.client_stats(0)?;
        assert_eq!(stats["puts_refused"], json!(refused.len()));
    }
    Ok(())
}

#[test]
fn a_corrupt_page_is_said_to_be_one_until_it_is_put_again() -> Result<()> {
    let (daemon, mut guest) = start()?;
    guest.put(0, &[1, 2])?;
    let guests = daemon.daemon().shared().guests.list();
    let account = &guests[0].account;
    let pool = account.pool(PoolId(0)).context("no pool")?;
    assert!(pool.flip_stored_bit(ObjectId([0; 3]), 1, 12_345));
    for _ in 0..2 {
        let answer = guest.call(1, &Request::get(0, 0, &[1, 2]))?;
        assert_eq!(answer.results(2), [result::CORRUPT, result::OK]);
        assert!(answer.page(0).iter().all(|&b| b == 0xa5));
    }
    assert_eq!(daemon.client_stats(0)?["gets_corrupt"], json!(2));
    guest.put(0, &[1])?;
    assert_eq!(guest.get(0, &[1, 2])?, [result::OK; 2]);
    Ok(())
}

#[test]
fn flushes_remove_what_is_there_and_only_that() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let numbers: Vec<u32> = (0..64).collect();
    guest.put(0, &numbers)?;
    guest.call(1, &Request::put(0, 5, &[(1, page(1))]))?;
    let mut flush = |ranges: &[(u32, u32)]| -> Result<u64> {
        let response = guest.call(1, &Request::flush_page(0, 0, ranges))?.response;
        assert_eq!(response.status, status::OK);
        assert_eq!(response.count.get() as usize, ranges.len());
        assert!(response.result.iter().all(|&r| r == result::NOT_DONE));
        Ok(response.pages.get())
    };
    assert_eq!(flush(&[(10, 1)])?, 1);
    assert_eq!(flush(&[(10, 1), (1000, 5)])?, 0);
    assert_eq!(flush(&[(0, 4), (2, 4), (63, u32::MAX - 63)])?, 7);
    assert_eq!(flush(&[(u32::MAX, 1)])?, 0);
    assert_eq!(flush(&[(0, u32::MAX); MAX_BATCH])?, 64 - 8);
    assert_eq!(
        guest
            .call(1, &Request::flush_object(0, 0))?
            .response
            .pages
            .get(),
        0
    );
    assert_eq!(
        guest
            .call(1, &Request::flush_object(0, 5))?
            .response
            .pages
            .get(),
        1
    );
    assert_eq!(daemon.client_stats(0)?["pages_stored"], json!(0));
    daemon.check_store()
}

#[test]
fn without_a_pool_nothing_is_done() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    for pool in [9, 16, u32::MAX] {
        for request in [
            Request::put(pool, 0, &[(0, page(0))]),
            Request::get(pool, 0, &[0]),
            Request::flush_page(pool, 0, &[(0, 1)]),
            Request::flush_object(pool, 0),
            Request::destroy_pool(pool),
        ] {
            let answer = guest.call(1, &request)?;
            assert_eq!(answer.response.status, status::NO_POOL);
            assert_eq!(answer.used as usize, RESPONSE_SIZE);
            assert!(
                answer
                    .response
                    .result
                    .iter()
                    .all(|&r| r == result::NOT_DONE)
            );
        }
    }
    Ok(())
}

#[test]
fn a_page_outside_of_memory_is_a_bad_page_and_no_more() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    guest.put(0, &[1, 2])?;
    guest.put(1, &[1, 2])?;
    let head = guest.memory.allocate(4096, 4096)?;
    let response = guest.memory.allocate(RESPONSE_SIZE, 8)?;
    let buffer = guest.memory.allocate(PAGE_SIZE, 4096)?;
    let piece = |address, len: usize, writable| Piece {
        address,
        len: u32::try_from(len).unwrap_or_default(),
        writable,
    };
    // One in the hole, and one that begins in memory and ends in the hole.
    for bad in [guest.memory.unmapped(), guest.memory.before_the_hole(100)] {
        guest.put(0, &[1, 2])?;
        let put = Request::put(0, 0, &[(1, page(7)), (2, page(8))]);
        guest.memory.write(head, &put.readable[..48])?;
        guest.memory.write(buffer, &page(8))?;
        let pieces = [
            piece(head, 48, false),
            piece(bad, PAGE_SIZE, false),
            piece(buffer, PAGE_SIZE, false),
            piece(response, RESPONSE_SIZE, true),
        ];
        let answer = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(answer.response.status, status::OK);
        assert_eq!(answer.results(2), [result::BAD_PAGE, result::OK]);
        let answer = guest.call(1, &Request::get(0, 0, &[1, 2]))?;
        assert_eq!(answer.results(2), [result::MISSING, result::OK]);
        assert!(answer.page(1) == page(8));

        // A get that cannot deliver must not take the page out of its pool.
        guest.put(1, &[1, 2])?;
        guest
            .memory
            .write(head, &Request::get(1, 0, &[1, 2]).readable)?;
        let pieces = [
            piece(head, 48, false),
            piece(response, RESPONSE_SIZE, true),
            piece(bad, PAGE_SIZE, true),
            piece(buffer, PAGE_SIZE, true),
        ];
        let answer = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(answer.response.status, status::OK);
        assert_eq!(answer.results(2), [result::BAD_PAGE, result::OK]);
        assert_eq!(answer.used as usize, RESPONSE_SIZE + 2 * PAGE_SIZE);
        assert!(guest.memory.read(buffer, PAGE_SIZE)? == page(2));
        assert_eq!(guest.get(1, &[1, 2])?, [result::OK, result::MISSING]);
    }
    Ok(())
}

#[test]
fn buffers_are_looked_at_before_anything_else() -> Result<()> {
    let (daemon, mut guest) = start()?;
    guest.put(0, &[1, 2])?;
    daemon.call("client.freeze", serde_json::json!({"client": "guest0"}))?;
    let head = guest.memory.allocate(4096, 4096)?;
    let response = guest.memory.allocate(RESPONSE_SIZE, 8)?;
    let buffer = guest.memory.allocate(PAGE_SIZE, 4096)?;
    let bad = guest.memory.unmapped();
    let piece = |address, len: usize, writable| Piece {
        address,
        len: u32::try_from(len).unwrap_or_default(),
        writable,
    };
    // Of a page that is not there, and for a frozen client, which gets what it has.
    let get = Request::get(0, 0, &[9, 2]);
    guest.memory.write(head, &get.readable)?;
    let pieces = [
        piece(head, get.readable.len(), false),
        piece(response, RESPONSE_SIZE, true),
        piece(bad, PAGE_SIZE, true),
        piece(buffer, PAGE_SIZE, true),
    ];
    let answer = guest.call_pieces(1, &pieces, response)?;
    assert_eq!(answer.results(2), [result::BAD_PAGE, result::OK]);
    // A put of a frozen client from nowhere, and one from memory: either way nothing is left.
    let put = Request::put(0, 0, &[(1, page(7)), (2, page(8))]);
    guest.memory.write(head, &put.readable[..48])?;
    let pieces = [
        piece(head, 48, false),
        piece(bad, PAGE_SIZE, false),
        piece(buffer, PAGE_SIZE, false),
        piece(response, RESPONSE_SIZE, true),
    ];
    let answer = guest.call_pieces(1, &pieces, response)?;
    assert_eq!(answer.results(2), [result::BAD_PAGE, result::FROZEN]);
    assert_eq!(guest.get(0, &[1, 2])?, [result::MISSING; 2]);
    Ok(())
}

#[test]
fn descriptors_may_cut_a_request_anywhere() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    // With and without indirect tables; 136 descriptors at most.
    for cut in [1usize, 2, 3, 7, 39, 41, 63, 100, 4095, 4097, 9000] {
        let put = Request::put(0, 0, &[(1, page(1)), (2, page(2))]);
        let get = Request::get(0, 0, &[1, 2]);
        for request in [put, get] {
            let readable = guest.memory.allocate(request.readable.len(), 1)?;
            guest.memory.write(readable, &request.readable)?;
            let writable = guest.memory.allocate(request.writable, 1)?;
            let mut pieces = Vec::new();
            for (at, len, is_writable) in [
                (readable, request.readable.len(), false),
                (writable, request.writable, true),
            ] {
                // Small pieces first, and what is left in one, so that there are not too many.
                let mut done = 0;
                for k in 0..60 {
                    let take = if k == 59 {
                        len - done
                    } else {
                        cut.min(len - done)
                    };
                    let address = at + done as u64;
                    let len = u32::try_from(take)?;
                    pieces.push(Piece {
                        address,
                        len,
                        writable: is_writable,
                    });
                    done += take;
                }
            }
            let head = guest.ring(1).submit(&pieces)?;
            let answer = guest.finish(1, head, writable, request.writable)?;
            assert_eq!(answer.response.status, status::OK, "cut {cut}");
            assert_eq!(answer.results(2), [result::OK; 2]);
            if request.writable > RESPONSE_SIZE {
                assert!(
                    answer.page(0) == page(1) && answer.page(1) == page(2),
                    "cut {cut}"
                );
            }
        }
    }
    Ok(())
}

#[test]
fn a_queue_completes_in_order_and_interrupts_seldom() -> Result<()> {
    for (event_idx, indirect) in [(true, true), (true, false), (false, true), (false, false)] {
        let daemon = TestDaemon::start(1, CAPACITY)?;
        let options = Options {
            event_idx,
            indirect,
            queue_size: 256,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        guest.new_pool(0, PERSISTENT)?;
        // Sixty versions of one page: the last put must win, so order matters.
        let mut heads = Vec::new();
        for version in 0..60 {
            let request = Request::put(0, 0, &[(1, page(version))]);
            heads.push(guest.submit(1, &request)?.0);
        }
        guest.ring(1).notify()?;
        for head in heads {
            assert_eq!(guest.ring(1).wait_used(PATIENCE)?.0, head);
        }
        let answer = guest.call(1, &Request::get(0, 0, &[1]))?;
        assert!(answer.page(0) == page(59));
        let stats = daemon.client_stats(0)?;
        let interrupts = stats["device"]["interrupts"].as_u64().unwrap_or(u64::MAX);
        assert!(interrupts < 40, "{interrupts} interrupts for 62 requests");
    }
    Ok(())
}

#[test]
fn ring_indexes_wrap() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let options = Options {
        queue_size: 64,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    guest.new_pool(0, PERSISTENT)?;
    let request = Request::flush_object(0, 1);
    let readable = guest.memory.allocate(request.readable.len(), 8)?;
    guest.memory.write(readable, &request.readable)?;
    let writable = guest.memory.allocate(RESPONSE_SIZE, 8)?;
    let pieces = [
        Piece {
            address: readable,
            len: u32::try_from(request.readable.len())?,
            writable: false,
        },
        Piece {
            address: writable,
            len: u32::try_from(RESPONSE_SIZE)?,
            writable: true,
        },
    ];
    let mark = guest.memory.mark();
    // More than 65,536, by full rings.
    for _ in 0..1100 {
        let ring = guest.ring(1);
        for _ in 0..64 {
            ring.submit(&pieces)?;
        }
        ring.notify()?;
        for _ in 0..64 {
            assert_eq!(ring.wait_used(PATIENCE)?.1 as usize, RESPONSE_SIZE);
        }
        guest.memory.release(mark);
    }
    assert_eq!(guest.put(0, &[1])?, [result::OK]);
    Ok(())
}
