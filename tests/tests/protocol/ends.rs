// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How queues stop and connections end: soon, cleanly, and never silently. Sections 6.1.1, 7.3 and 12.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cram_abi::wire::{PAGE_SIZE, RESPONSE_SIZE, event, feature, pool_flag, result};
use cram_tests::frontend::{
    Guest, Memory, Options, PATIENCE, Piece, RawFrontend, Request, TestDaemon, page,
};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

use serde_json::json;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VringConfigData};

const CAPACITY: u64 = 64 << 20;

const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
const SET_VRING_BASE: u32 = 10;
const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
const SET_VRING_ERR: u32 = 14;
const SET_PROTOCOL_FEATURES: u32 = 16;
const SET_VRING_ENABLE: u32 = 18;

const VERSION_1: u64 = 1 << 32;
const PROTOCOL_FEATURES: u64 = 1 << 30;

/// Waits until so many queues were stopped. (When all memory is gone, the event queue may be another.)
pub(crate) fn stopped(daemon: &TestDaemon, wanted: u64) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    loop {
        let stats = daemon.client_stats(0)?;
        let count = stats["device"]["queues_stopped"].as_u64();
        if count.context("the daemon does not say")? >= wanted {
            return Ok(());
        }
        ensure!(Instant::now() < until, "the queue was not stopped");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn ring_message(ring: u32, number: u32) -> Vec<u8> {
    [ring.to_le_bytes(), number.to_le_bytes()].concat()
}

/// A put of page 2 whose bytes are said to be somewhere.
fn put_with_page_at(guest: &Guest, page_at: u64) -> Result<[Piece; 3]> {
    let request = Request::put(0, 0, &[(2, page(2))]);
    let head_bytes = request.readable.len() - PAGE_SIZE;
    let head = guest.memory.allocate(head_bytes, 8)?;
    let writable = guest.memory.allocate(RESPONSE_SIZE, 8)?;
    guest.memory.write(head, &request.readable[..head_bytes])?;
    let piece = |address, len, writable| -> Result<Piece> {
        Ok(Piece {
            address,
            len: u32::try_from(len)?,
            writable,
        })
    };
    Ok([
        piece(head, head_bytes, false)?,
        piece(page_at, PAGE_SIZE, false)?,
        piece(writable, RESPONSE_SIZE, true)?,
    ])
}

#[test]
fn memory_that_is_gone_ends_the_connection_and_nothing_else() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let mut other = daemon.connect(1)?;
    other.new_pool(0, pool_flag::PERSISTENT)?;
    for all in [false, true] {
        let mut guest = daemon.connect(0)?;
        guest.new_pool(0, pool_flag::PERSISTENT)?;
        guest.put(0, &[1, 2])?;
        // A put of page 2 whose bytes are behind the hole.
        let pieces = put_with_page_at(&guest, guest.memory.behind_the_hole())?;
        guest.ring(2).submit(&pieces)?;
        guest.memory.take_away(all)?;
        guest.ring(2).notify_always()?;
        guest.wait_hang_up()?;
        if !all {
            assert!(guest.ring(2).take_used()?.is_none(), "it was answered");
        }
        assert_eq!(other.put(0, &[1])?, [result::OK]);
        drop(guest);
        let mut guest = daemon.connect(0)?;
        // It was never executed.
        assert_eq!(guest.get(0, &[1, 2])?, [result::OK; 2]);
    }
    assert_eq!(other.get(0, &[1])?, [result::OK]);
    daemon.check_store()
}

#[test]
fn what_was_read_while_memory_was_gone_is_believed_by_no_queue() -> Result<()> {
    let daemon = TestDaemon::start_with(1, CAPACITY, |options| options.offer.workers = Some(2))?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    // Queue 1 meets with missing memory; queue 2 comes to the same place when it is there again.
    let high = guest.memory.behind_the_hole();
    let pieces = put_with_page_at(&guest, high)?;
    guest.memory.take_away(false)?;
    guest.ring(1).submit(&pieces)?;
    guest.ring(1).notify_always()?;
    stopped(&daemon, 1)?;
    guest.memory.give_back()?;
    guest.memory.write(high, &page(2))?;
    let pieces = put_with_page_at(&guest, high)?;
    guest.ring(2).submit(&pieces)?;
    guest.ring(2).notify_always()?;
    guest.wait_hang_up()?;
    assert!(guest.ring(2).take_used()?.is_none(), "it was answered");
    // The next connection has the memory mapped that is there, and executes both.
    let mut guest = guest.reconnect(&daemon.socket(0), &Options::default())?;
    for queue in [1, 2] {
        guest.ring(queue).wait_used(PATIENCE)?;
    }
    assert_eq!(guest.get(0, &[2])?, [result::OK]);
    daemon.check_store()
}

#[test]
fn a_chain_that_met_a_fault_is_still_there_when_the_queue_stops() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    // The used ring lies in a region that goes away when three requests are completed.
    let used = guest.memory.behind_the_hole();
    let (descriptors, available, _) = guest.ring(2).addresses();
    let config = VringConfigData {
        queue_max_size: guest.ring(2).size(),
        queue_size: guest.ring(2).size(),
        flags: 0,
        desc_table_addr: Memory::user_address(descriptors),
        used_ring_addr: Memory::user_address(used),
        avail_ring_addr: Memory::user_address(available),
        log_addr: None,
    };
    guest.frontend().set_vring_addr(2, &config)?;
    for _ in 0..3 {
        guest.submit(2, &Request::query())?;
    }
    guest.ring(2).notify_always()?;
    let until = Instant::now() + PATIENCE;
    while guest.memory.load(used + 2)? < 3 {
        ensure!(Instant::now() < until, "the requests were not completed");
        std::thread::sleep(Duration::from_millis(1));
    }
    let region = guest.memory.regions().pop().context("no second region")?;
    guest.frontend().remove_mem_region(&region)?;
    guest.submit(2, &Request::query())?;
    guest.ring(2).notify_always()?;
    stopped(&daemon, 1)?;
    guest.frontend().set_vring_enable(2, false)?;
    assert_eq!(guest.frontend().get_vring_base(2)?, 3);
    Ok(())
}

#[test]
fn a_front_end_hears_of_a_queue_that_was_stopped() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    let error = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let mut raw = guest.raw()?;
    assert!(raw.set(SET_VRING_ERR, &2u64.to_le_bytes(), &[error.as_fd()])?);
    guest.ring(2).make_available(256)?;
    guest.ring(2).notify_always()?;
    stopped(&daemon, 1)?;
    let mut fds = [PollFd::new(&error, PollFlags::IN)];
    assert_eq!(poll(&mut fds, Some(&PATIENCE.try_into()?))?, 1);
    Ok(())
}

/// A descriptor that is readable when `event` is, and cannot be read.
fn readable_but_unread(event: &OwnedFd) -> Result<OwnedFd> {
    let outer = epoll::create(CreateFlags::CLOEXEC)?;
    epoll::add(&outer, event, EventData::new_u64(0), EventFlags::IN)?;
    Ok(outer)
}

#[test]
fn a_kick_that_cannot_be_read_ends_no_worker() -> Result<()> {
    let daemon = TestDaemon::start_with(1, CAPACITY, |options| options.offer.workers = Some(1))?;
    let mut guest = daemon.connect(0)?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let kick = readable_but_unread(&event)?;
    let mut raw = guest.raw()?;
    let base = guest.frontend().get_vring_base(1)?;
    guest.frontend().set_vring_base(1, u16::try_from(base)?)?;
    assert!(raw.set(SET_VRING_KICK, &1u64.to_le_bytes(), &[kick.as_fd()])?);
    rustix::io::write(&event, &1u64.to_ne_bytes())?;
    // The worker that had to do with it has both queues, and goes on.
    for queue in [2, 2] {
        let answer = guest.call(queue, &Request::query())?;
        assert_eq!(answer.used as usize, RESPONSE_SIZE + 64);
    }
    Ok(())
}

#[test]
fn a_ring_that_runs_can_be_kicked_by_another_descriptor() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    guest.call(1, &Request::query())?;
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let mut raw = guest.raw()?;
    assert!(raw.set(SET_VRING_KICK, &1u64.to_le_bytes(), &[kick.as_fd()])?);
    // Whatever the change woke: this is completed by the first kick, that by the second.
    for _ in 0..2 {
        guest.submit(1, &Request::query())?;
        rustix::io::write(&kick, &1u64.to_ne_bytes())?;
        guest.ring(1).wait_used(PATIENCE)?;
    }
    Ok(())
}

#[test]
fn what_is_no_eventfd_notifies_nobody() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let (reader, writer) = std::io::pipe()?;
    let file = std::fs::File::open("/dev/null")?;
    let (socket, _) = std::os::unix::net::UnixStream::pair()?;
    for fd in [reader.as_fd(), writer.as_fd(), file.as_fd(), socket.as_fd()] {
        for code in [SET_VRING_KICK, SET_VRING_CALL, SET_VRING_ERR] {
            let mut raw = RawFrontend::negotiate(&daemon.socket(0), None)?;
            assert!(!raw.set(code, &1u64.to_le_bytes(), &[fd])?, "{code}");
            raw.wait_hang_up()?;
        }
    }
    Ok(())
}

#[test]
fn a_notifier_that_blocks_holds_up_its_own_queue_only() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let mut other = daemon.connect(1)?;
    for ends_with_the_daemon in [false, true] {
        let mut guest = daemon.connect(0)?;
        // Full to the last, and made a blocking one again after the daemon has seen it.
        let call = eventfd(0, EventfdFlags::CLOEXEC)?;
        let mut raw = guest.raw()?;
        assert!(raw.set(SET_VRING_CALL, &2u64.to_le_bytes(), &[call.as_fd()])?);
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes())?;
        fcntl_setfl(&call, fcntl_getfl(&call)? - OFlags::NONBLOCK)?;
        let (head, _) = guest.submit(2, &Request::query())?;
        guest.ring(2).notify_always()?;
        assert_eq!(guest.ring(2).watch_used(PATIENCE)?.0, head);
        // Everything else goes on; messages about this very ring, too.
        assert_eq!(guest.call(1, &Request::query())?.used, 144);
        guest.frontend().set_vring_enable(2, false)?;
        assert_eq!(other.call(1, &Request::query())?.used, 144);
        if !ends_with_the_daemon {
            drop((raw, guest));
            continue;
        }
        // It takes as long as it takes to notice; the test hangs where it never does.
        drop(daemon);
        assert!(guest.config().is_err());
        return Ok(());
    }
    Ok(())
}

#[test]
fn a_front_end_that_takes_no_answers_is_hung_up_on() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let raw = RawFrontend::connect(&daemon.socket(0))?;
    let mut stream = raw.stream();
    stream.set_nonblocking(true)?;
    let question = [GET_FEATURES, 1, 0].map(u32::to_le_bytes);
    let until = Instant::now() + PATIENCE;
    // Until the daemon cannot answer, and so does not read.
    let ended = loop {
        match stream.write(question.as_flattened()) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(error) => break error,
            Ok(_) => {}
        }
        ensure!(Instant::now() < until, "nobody hung up");
    };
    assert_eq!(ended.kind(), std::io::ErrorKind::BrokenPipe);
    daemon.connect(0)?.config()?;
    Ok(())
}

#[test]
fn a_wish_from_before_the_features_is_told_when_they_are_there() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    // A front-end that is there, and has not said yet whether its driver wants events.
    let mut raw = RawFrontend::negotiate(&daemon.socket(0), None)?;
    daemon.call("client.give_back", json!({"client": "guest0", "pages": 77}))?;
    for _ in 0..50 {
        raw.ask(GET_FEATURES, &[])?;
    }
    drop(raw);
    let mut guest = daemon.connect(0)?;
    let buffers = guest.give_event_buffers(4)?;
    let told = guest.wait_event(event::GIVE_BACK, &buffers)?;
    assert_eq!(told.value.get(), 77);
    Ok(())
}

#[test]
fn what_makes_no_sense_is_refused_and_ends_the_connection() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let features = |bits: u64| (SET_FEATURES, (VERSION_1 | bits).to_le_bytes().to_vec());
    let ring = |code, ring, number| (code, ring_message(ring, number));
    let number = |code, number: u64| (code, number.to_le_bytes().to_vec());
    for (what, (code, body)) in [
        ("no VERSION_1", number(SET_FEATURES, PROTOCOL_FEATURES)),
        ("SHARED without EPHEMERAL", features(feature::SHARED)),
        ("features that were not offered", features(1 << 34)),
        (
            "unknown protocol features",
            number(SET_PROTOCOL_FEATURES, 1 << 40),
        ),
        ("three entries", ring(SET_VRING_NUM, 1, 3)),
        ("no entries", ring(SET_VRING_NUM, 1, 0)),
        ("too many entries", ring(SET_VRING_NUM, 1, 512)),
        ("an index beyond 16 bits", ring(SET_VRING_BASE, 1, 1 << 16)),
        ("a ring beyond the last", ring(SET_VRING_NUM, 3, 16)),
        ("neither on nor off", ring(SET_VRING_ENABLE, 1, 2)),
        (
            "a kick without descriptor",
            number(SET_VRING_KICK, 1 << 8 | 1),
        ),
        ("a missing descriptor", number(SET_VRING_CALL, 1)),
        ("no regions", number(SET_MEM_TABLE, 0)),
    ] {
        let mut raw = RawFrontend::negotiate(&daemon.socket(0), None)?;
        // What cannot even be read is not answered.
        let answer = raw.set(code, &body, &[]);
        assert!(!matches!(answer, Ok(true)), "{what}");
        raw.wait_hang_up().context(what)?;
    }
    let mut raw = RawFrontend::negotiate(&daemon.socket(0), Some(VERSION_1))?;
    assert!(raw.set(SET_VRING_NUM, &ring_message(1, 128), &[])?);
    let all = VERSION_1 | feature::SHARED | feature::EPHEMERAL;
    assert!(raw.set(SET_FEATURES, &all.to_le_bytes(), &[])?);
    Ok(())
}

#[test]
fn descriptors_that_belong_to_no_message_are_not_kept() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    for count in [1, 33, 60] {
        let (reader, writer) = std::io::pipe()?;
        let mut raw = RawFrontend::negotiate(&daemon.socket(0), None)?;
        raw.send(GET_FEATURES, &[], &vec![writer.as_fd(); count])?;
        raw.wait_hang_up()?;
        drop(writer);
        // The pipe hangs up when the last descriptor that writes to it is closed.
        let mut fds = [PollFd::new(&reader, PollFlags::IN)];
        let closed = poll(&mut fds, Some(&PATIENCE.try_into()?))?;
        assert_eq!(closed, 1, "descriptors of {count} were kept");
    }
    daemon.connect(0)?.config()?;
    Ok(())
}

#[test]
fn rings_in_memory_that_was_taken_away_use_up_nothing() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mappings =
        || -> Result<usize> { Ok(std::fs::read_to_string("/proc/self/maps")?.lines().count()) };
    let before = mappings()?;
    for _ in 0..500 {
        let mut guest = daemon.connect(0)?;
        guest.memory.take_away(true)?;
        guest.ring(1).notify_always()?;
        guest.wait_hang_up()?;
    }
    // Other tests of this process come and go; what a leak would leave is far more.
    let after = mappings()?;
    assert!(after < before + 400, "{before} mappings became {after}");
    Ok(())
}
