// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Connections come and go; pools and pages stay. Sections 2 to 5 and 7.3 of the protocol.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context, Result};
use cram_abi::wire::{MAX_BATCH, RESPONSE_SIZE, feature, pool_flag, result, state, status};
use cram_tests::frontend::{Guest, Options, PATIENCE, Piece, Request, TestDaemon, page};
use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

const CAPACITY: u64 = 64 << 20;

const GET_FEATURES: u32 = 1;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;
const GET_CONFIG: u32 = 24;

#[test]
fn the_device_is_what_the_protocol_says() -> Result<()> {
    let daemon =
        TestDaemon::start_with(1, CAPACITY, |options| options.quota_bytes = Some(9 << 20))?;
    let mut guest = daemon.connect(0)?;
    let virtio = 1 << 32 | 1 << 29 | 1 << 28;
    assert_eq!(guest.offered & !(1 << 30), virtio | feature::ALL);
    let config = guest.config()?;
    assert_eq!(config.version.get(), 1);
    assert_eq!(config.num_request_queues.get(), 2);
    assert_eq!(usize::from(config.max_batch.get()), MAX_BATCH);
    assert_eq!((config.page_shift, config.max_pools.get()), (12, 16));
    assert_eq!(
        (config.quota_bytes.get(), config.pressure.get()),
        (9 << 20, 0)
    );
    assert_eq!(config.state.get(), state::READY);
    assert_ne!(config.generation.get(), 0);
    assert!(config.reserved0 == [0; 3] && config.reserved1 == 0u32);
    assert!(config.policy == 0u32 && config.reserved2 == [0u64; 2]);

    // Part of it.
    let flags = VhostUserConfigFlags::empty();
    let (_, bytes) = guest.frontend().get_config(6, 3, flags, &[0; 3])?;
    assert_eq!(bytes, [64, 0, 12]);
    // It is read-only; who writes is ignored.
    let writable = VhostUserConfigFlags::WRITABLE;
    guest.frontend().set_config(0, writable, &[9; 8])?;
    assert_eq!(guest.config()?, config);
    Ok(())
}

#[test]
fn what_is_no_part_of_the_configuration_space_is_refused() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut stream = UnixStream::connect(daemon.socket(0))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut send = |request: u32, words: &[u32], answer: usize| -> Result<Vec<u8>> {
        let size = u32::try_from(4 * words.len())?;
        let message = [&[request, 1, size], words].concat();
        let bytes: Vec<u8> = message.iter().flat_map(|word| word.to_le_bytes()).collect();
        stream.write_all(&bytes)?;
        let mut header = vec![0; if answer > 0 { 12 } else { 0 }];
        stream.read_exact(&mut header)?;
        let mut body = vec![0; answer];
        stream.read_exact(&mut body)?;
        Ok(body)
    };
    send(GET_FEATURES, &[], 8)?;
    let features = send(GET_PROTOCOL_FEATURES, &[], 8)?;
    let features: Vec<u32> = features
        .as_chunks::<4>()
        .0
        .iter()
        .map(|word| u32::from_le_bytes(*word))
        .collect();
    send(SET_PROTOCOL_FEATURES, &features, 0)?;
    // A size of 0 in the reply says no.
    for (offset, len) in [(0, 68), (64, 4), (60, 8), (252, 4)] {
        let mut words = vec![offset, len, 0];
        words.resize(3 + usize::try_from(len / 4)?, 0);
        let reply = send(GET_CONFIG, &words, 12)?;
        assert_eq!(reply[4..8], [0; 4], "offset {offset}, length {len}");
    }
    let reply = send(GET_CONFIG, &[60, 4, 0, 0], 16)?;
    assert_eq!(reply[4..8], [4, 0, 0, 0]);
    Ok(())
}

#[test]
fn another_life_of_the_store_has_another_generation() -> Result<()> {
    let generation = || -> Result<u64> {
        Ok(TestDaemon::start(1, CAPACITY)?
            .connect(0)?
            .config()?
            .generation
            .get())
    };
    assert_ne!(generation()?, generation()?);
    Ok(())
}

#[test]
fn pages_are_found_after_a_reconnect() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let numbers: Vec<u32> = (0..60).collect();
    let mut guest = daemon.connect(0)?;
    let generation = guest.config()?.generation;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &numbers)?;
    for _ in 0..3 {
        drop(guest);
        guest = daemon.connect(0)?;
        assert_eq!(guest.config()?.generation, generation);
        assert_eq!(guest.new_pool(0, pool_flag::PERSISTENT)?, 60);
        assert!(guest.get(0, &numbers)?.iter().all(|&r| r == result::OK));
    }
    Ok(())
}

#[test]
fn what_was_in_flight_is_executed_after_a_reconnect() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let options = Options::default();
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[5])?;
    // Made available, but the daemon is not told before the connection is gone.
    let put = Request::put(0, 0, &[(1, page(1)), (2, page(2))]);
    let (first, _) = guest.submit(1, &put)?;
    let (second, buffer) = guest.submit(1, &Request::get(0, 0, &[1, 5]))?;
    let mut guest = guest.reconnect(&daemon.socket(0), &options)?;
    assert_eq!(guest.ring(1).wait_used(PATIENCE)?.0, first);
    let (done, used) = guest.ring(1).wait_used(PATIENCE)?;
    assert_eq!(done, second);
    let answer = guest.answer(used, buffer, 80 + 2 * 4096)?;
    assert_eq!(answer.response.status, status::OK);
    assert!(answer.page(0) == page(1) && answer.page(1) == page(5));
    assert_eq!(guest.get(0, &[2])?, [result::OK]);
    Ok(())
}

#[test]
fn pages_survive_a_reset() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1, 2])?;
    for options in [
        Options::default(),
        Options {
            event_idx: false,
            queue_size: 16,
            ..Options::default()
        },
    ] {
        guest.submit(1, &Request::get(0, 0, &[1]))?;
        guest.reset(&options)?;
        assert_eq!(guest.new_pool(0, pool_flag::PERSISTENT)?, 2);
        assert_eq!(guest.get(0, &[1, 2])?, [result::OK; 2]);
    }
    Ok(())
}

#[test]
fn memory_may_come_in_a_table_and_regions_may_go() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    for memory_slots in [false, true] {
        let options = Options {
            memory_slots,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        guest.new_pool(0, pool_flag::PERSISTENT)?;
        // The header is in one region, and the page in the other.
        let put = Request::put(0, 0, &[(1, page(1))]);
        let header = guest.memory.allocate(44, 8)?;
        let response = guest.memory.allocate(RESPONSE_SIZE, 8)?;
        let high = guest.memory.behind_the_hole();
        guest.memory.write(header, &put.readable[..44])?;
        guest.memory.write(high, &page(1))?;
        let piece = |address, len, writable| Piece {
            address,
            len,
            writable,
        };
        let pieces = [
            piece(header, 44, false),
            piece(high, 4096, false),
            piece(response, 80, true),
        ];
        let answer = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(answer.results(1), [result::OK]);
        assert_eq!(guest.get(0, &[1])?, [result::OK]);
        if !memory_slots {
            continue;
        }
        let region = guest.memory.regions().pop().context("no second region")?;
        guest.frontend().remove_mem_region(&region)?;
        let answer = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(answer.results(1), [result::BAD_PAGE]);
        assert_eq!(guest.get(0, &[1])?, [result::MISSING]);
    }
    Ok(())
}

#[test]
fn guests_do_not_see_each_other() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let (mut first, mut second) = (daemon.connect(0)?, daemon.connect(1)?);
    for guest in [&mut first, &mut second] {
        guest.new_pool(0, pool_flag::PERSISTENT)?;
    }
    first.call(1, &Request::put(0, 0, &[(1, page(1))]))?;
    second.call(1, &Request::put(0, 0, &[(1, page(2))]))?;
    second.call(1, &Request::put(0, 0, &[(9, page(9))]))?;
    assert_eq!(first.get(0, &[1, 9])?, [result::OK, result::MISSING]);
    first.call(1, &Request::flush_object(0, 0))?;
    first.call(1, &Request::destroy_pool(0))?;
    let answer = second.call(1, &Request::get(0, 0, &[1, 9]))?;
    assert!(answer.page(0) == page(2) && answer.page(1) == page(9));

    // One that dies amid its requests does not disturb the other.
    for _ in 0..20 {
        first.submit(1, &Request::get(0, 0, &[1]))?;
    }
    first.ring(1).notify()?;
    drop(first);
    assert_eq!(second.get(0, &[9])?, [result::OK]);
    Ok(())
}

#[test]
fn guests_work_at_the_same_time() -> Result<()> {
    const GUESTS: usize = 4;
    let daemon = TestDaemon::start(GUESTS, CAPACITY)?;
    std::thread::scope(|scope| {
        let work = |k: usize| {
            let mut guest = daemon.connect(k)?;
            guest.new_pool(0, pool_flag::PERSISTENT)?;
            for round in 0..20 {
                let first = u32::try_from(k * 10_000 + round * 32)?;
                let numbers: Vec<u32> = (first..first + 32).collect();
                assert_eq!(guest.put(0, &numbers)?, [result::OK; 32]);
                assert_eq!(guest.get(0, &numbers)?, [result::OK; 32]);
            }
            anyhow::Ok(())
        };
        let threads: Vec<_> = (0..GUESTS).map(|k| scope.spawn(move || work(k))).collect();
        threads.into_iter().try_for_each(|thread| {
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    })?;
    daemon.check_store()
}

#[test]
fn connections_leave_nothing_behind() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let count = |what: &str| -> Result<usize> {
        Ok(std::fs::read_dir(format!("/proc/self/{what}"))?.count())
    };
    // Other tests of this process come and go; what a leak would leave is far more.
    let (files, threads) = (count("fd")?, count("task")?);
    for _ in 0..100 {
        daemon.connect(0)?.config()?;
    }
    let (more_files, more_threads) = (count("fd")?, count("task")?);
    assert!(
        more_files < files + 200,
        "{files} descriptors became {more_files}"
    );
    assert!(
        more_threads < threads + 100,
        "{threads} threads became {more_threads}"
    );
    Ok(())
}

#[test]
fn fewer_and_smaller_queues_do() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    for (request_queues, queue_size, event_idx) in [(1, 2, true), (2, 8, false), (1, 256, false)] {
        let options = Options {
            request_queues,
            queue_size,
            event_idx,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        guest.new_pool(0, pool_flag::PERSISTENT)?;
        for k in 0..20 {
            assert_eq!(guest.put(0, &[k])?, [result::OK]);
            assert_eq!(guest.get(0, &[k])?, [result::OK]);
        }
    }
    Ok(())
}

#[test]
fn workers_may_poll_share_queues_and_be_pinned() -> Result<()> {
    let poll = Duration::from_micros(300);
    for (workers, poll, pin) in [
        (None, poll, vec![]),
        (Some(1), Duration::ZERO, vec![]),
        (Some(3), poll, vec![0]),
        // There is no such processor: they run where they like, and the log says so.
        (Some(9), poll, vec![1023]),
    ] {
        let daemon = TestDaemon::start_with(1, CAPACITY, |options| {
            options.offer.poll = poll;
            options.offer.workers = workers;
            options.offer.pin = pin.clone();
            options.offer.request_queues = 5;
        })?;
        let options = Options {
            request_queues: 5,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        guest.new_pool(0, pool_flag::PERSISTENT)?;
        for k in 0..200 {
            let queue = usize::try_from(k % 5 + 1)?;
            let answer = guest.call(queue, &Request::put(0, 0, &[(k, page(u64::from(k)))]))?;
            assert_eq!(answer.results(1), [result::OK]);
        }
        let wanted = if pin == [0] { 3 } else { 0 };
        assert_eq!(threads_on_processor_0()?, wanted, "{workers:?} {pin:?}");
    }
    Ok(())
}

/// Workers of this process that may run on processor 0 only. (What other tests start is pinned
/// nowhere.)
fn threads_on_processor_0() -> Result<usize> {
    let mut count = 0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        // A thread may have ended since.
        let status = std::fs::read_to_string(thread?.path().join("status")).unwrap_or_default();
        count += usize::from(status.contains("\nCpus_allowed_list:\t0\n"));
    }
    Ok(count)
}

#[test]
fn a_daemon_that_ends_hangs_up_and_removes_its_sockets() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let (socket, control) = (daemon.socket(0), daemon.control_socket());
    let mut guest = daemon.connect(0)?;
    let stuck = UnixStream::connect(&control)?;
    assert!(socket.exists() && control.exists());
    assert_eq!(daemon.client_stats(0)?["connected"], json!(true));
    drop(daemon);
    assert!(!socket.exists() && !control.exists());
    assert!(guest.config().is_err());
    drop(stuck);
    Ok(())
}
