// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that the driver has not touched before it gives it to the device. Section 6.1, and
//! docs/threat-model.md.

use anyhow::Result;
use cram_abi::wire::{PAGE_SIZE, RESPONSE_SIZE, pool_flag, result};
use cram_tests::frontend::{Answer, Guest, PATIENCE, Piece, Request, TestDaemon, page};
use serde_json::json;

const CAPACITY: u64 = 64 << 20;
const ALLOWED_PAGES: u32 = 24;

fn daemon() -> Result<TestDaemon> {
    TestDaemon::start_with(2, CAPACITY, |options| {
        options.offer.first_touch_bytes = u64::from(ALLOWED_PAGES) * PAGE_SIZE as u64;
    })
}

fn touched_pages(daemon: &TestDaemon) -> Result<u64> {
    let stats = daemon.client_stats(0)?;
    let bytes = stats["device"]["first_touch_bytes"].as_u64();
    Ok(bytes.unwrap_or(u64::MAX) / PAGE_SIZE as u64)
}

fn piece(address: u64, len: usize, writable: bool) -> Piece {
    Piece {
        address,
        len: u32::try_from(len).unwrap_or_default(),
        writable,
    }
}

/// So many pages where nobody was, also not with what was freed again.
fn untouched(guest: &Guest, pages: usize) -> Result<u64> {
    const BEHIND: usize = 4 << 20;
    let here = guest
        .memory
        .reserve(BEHIND + pages * PAGE_SIZE, PAGE_SIZE as u64)?;
    Ok(here + BEHIND as u64)
}

/// A get of page `number` to where nobody was before; the answer's own place was touched.
fn get_to(guest: &Guest, number: u32, page_at: u64) -> Result<([Piece; 3], u64)> {
    let request = Request::get(0, 0, &[number]);
    let head = guest.memory.allocate(request.readable.len(), 8)?;
    guest.memory.write(head, &request.readable)?;
    let response = guest.memory.allocate(RESPONSE_SIZE, 8)?;
    let pieces = [
        piece(head, request.readable.len(), false),
        piece(response, RESPONSE_SIZE, true),
        piece(page_at, PAGE_SIZE, true),
    ];
    Ok((pieces, response))
}

#[test]
fn what_the_driver_touched_costs_the_daemon_nothing() -> Result<()> {
    let daemon = daemon()?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    let numbers: Vec<u32> = (0..40).collect();
    for _ in 0..4 {
        // Buffers of their own each time, 160 pages in all.
        assert_eq!(guest.put(0, &numbers)?, vec![result::OK; 40]);
        assert_eq!(guest.get(0, &numbers)?, vec![result::OK; 40]);
    }
    assert_eq!(touched_pages(&daemon)?, 0);
    Ok(())
}

#[test]
fn a_guest_has_the_daemon_touch_so_much_and_no_more() -> Result<()> {
    let daemon = daemon()?;
    let mut other = daemon.connect(1)?;
    other.new_pool(0, pool_flag::PERSISTENT)?;
    other.put(0, &[1])?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1])?;
    // One half by gets, one by puts: what is read for the first time is charged, too.
    let half = ALLOWED_PAGES / 2;
    let base = untouched(&guest, 64)?;
    let place = |k: u32| base + u64::from(k) * PAGE_SIZE as u64;
    for k in 0..half {
        let (pieces, response) = get_to(&guest, 1, place(k))?;
        let Answer { response, .. } = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(response.result[0], result::OK);
        assert_eq!(guest.memory.read(place(k), PAGE_SIZE)?, page(1));
        assert_eq!(touched_pages(&daemon)?, u64::from(k) + 1);
    }
    let put_from = |guest: &mut Guest, k: u32| -> Result<u8> {
        let request = Request::put(0, 0, &[(100 + k, [0; PAGE_SIZE])]);
        let head_bytes = request.readable.len() - PAGE_SIZE;
        let head = guest.memory.allocate(head_bytes, 8)?;
        guest.memory.write(head, &request.readable[..head_bytes])?;
        let response = guest.memory.allocate(RESPONSE_SIZE, 8)?;
        let pieces = [
            piece(head, head_bytes, false),
            piece(place(k), PAGE_SIZE, false),
            piece(response, RESPONSE_SIZE, true),
        ];
        Ok(guest.call_pieces(2, &pieces, response)?.response.result[0])
    };
    for k in half..ALLOWED_PAGES {
        assert_eq!(put_from(&mut guest, k)?, result::OK);
    }
    assert_eq!(touched_pages(&daemon)?, u64::from(ALLOWED_PAGES));
    // Where the daemon was before it may go again.
    let (pieces, response) = get_to(&guest, 1, place(0))?;
    let answer = guest.call_pieces(1, &pieces, response)?;
    assert_eq!(answer.response.result[0], result::OK);

    // One more is one too many, and is not answered; nor is it for whoever comes again.
    for k in 0..2 {
        let (pieces, _) = get_to(&guest, 1, place(ALLOWED_PAGES + k))?;
        guest.ring(1).submit(&pieces)?;
        guest.ring(1).notify_always()?;
        guest.wait_hang_up()?;
        assert!(guest.ring(1).take_used()?.is_none(), "it was answered");
        assert_eq!(touched_pages(&daemon)?, u64::from(ALLOWED_PAGES));
        drop(guest);
        guest = daemon.connect(0)?;
    }
    // Who touches his memory himself goes on, and nothing was lost.
    assert_eq!(guest.get(0, &[1])?, [result::OK]);
    assert_eq!(other.get(0, &[1])?, [result::OK]);
    let puts: Vec<u32> = (100 + half..100 + ALLOWED_PAGES).collect();
    let zeroes = guest.call(1, &Request::get(0, 0, &puts))?;
    assert!(zeroes.rest.iter().all(|byte| *byte == 0));

    // The operator knows that the memory is gone.
    let name = "guest0";
    daemon.call("client.reset", json!({ "client": name, "force": true }))?;
    assert_eq!(touched_pages(&daemon)?, 0);
    daemon.check_store()
}

/// Two queues come to the same page at the same time.
#[test]
fn first_touches_at_the_same_time_are_counted_once() -> Result<()> {
    const ROUNDS: u32 = 200;
    // While two are at it, both are counted.
    const ALLOWED: u32 = ROUNDS + 1;
    let daemon = TestDaemon::start_with(1, CAPACITY, |options| {
        options.offer.first_touch_bytes = u64::from(ALLOWED) * PAGE_SIZE as u64;
        options.offer.workers = Some(2);
    })?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1])?;
    let base = untouched(&guest, ROUNDS as usize)?;
    for k in 0..ROUNDS {
        let place = base + u64::from(k) * PAGE_SIZE as u64;
        let mark = guest.memory.mark();
        let asked = [get_to(&guest, 1, place)?, get_to(&guest, 1, place)?];
        for (queue, (pieces, _)) in (1..).zip(&asked) {
            guest.ring(queue).submit(pieces)?;
            guest.ring(queue).notify_always()?;
        }
        for queue in [1, 2] {
            guest.ring(queue).wait_used(PATIENCE)?;
        }
        assert_eq!(guest.memory.read(place, PAGE_SIZE)?, page(1));
        guest.memory.release(mark);
    }
    assert_eq!(touched_pages(&daemon)?, u64::from(ROUNDS));
    Ok(())
}
