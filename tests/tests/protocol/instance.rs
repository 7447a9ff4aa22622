// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whose page is it: sections 4.1 and 12.1.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use cram_abi::wire::{CONFIG_SIZE, event, pool_flag, result, status};
use cram_tests::frontend::{Guest, Options, PATIENCE, RawFrontend, Request, TestDaemon};
use serde_json::json;

const CAPACITY: u64 = 64 << 20;
const VERSION_1: u64 = 1 << 32;
const GET_CONFIG: u32 = 24;
const SET_CONFIG: u32 = 25;

const ONE: Option<[u8; 16]> = Some([1; 16]);
const OTHER: Option<[u8; 16]> = Some([2; 16]);

fn connect(daemon: &TestDaemon, instance: Option<[u8; 16]>) -> Result<Guest> {
    let options = Options {
        instance,
        ..Options::default()
    };
    Guest::connect(&daemon.socket(0), &options)
}

/// Puts two pages as `instance`. The generation.
fn leave_pages(daemon: &TestDaemon, instance: Option<[u8; 16]>) -> Result<u64> {
    let mut guest = connect(daemon, instance)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    ensure!(guest.put(0, &[1, 2])? == [result::OK; 2]);
    Ok(guest.config()?.generation.get())
}

/// Whether `instance` finds the two pages under that generation; if not, it must find nothing at all.
fn finds_them(daemon: &TestDaemon, instance: Option<[u8; 16]>, generation: u64) -> Result<bool> {
    let mut guest = connect(daemon, instance)?;
    let is_same = guest.config()?.generation.get() == generation;
    let limits = guest.call(1, &Request::query())?.limits()?;
    ensure!((limits.generation.get() == generation) == is_same);
    let answer = guest.call(1, &Request::get(0, 0, &[1, 2]))?;
    if is_same {
        ensure!(answer.results(2) == [result::OK; 2]);
    } else {
        ensure!(answer.response.status == status::NO_POOL);
        ensure!(limits.stored_pages.get() == 0);
        ensure!(guest.new_pool(0, pool_flag::PERSISTENT)? == 0);
        ensure!(guest.get(0, &[1, 2])? == [result::MISSING; 2]);
    }
    daemon.check_store()?;
    Ok(is_same)
}

#[test]
fn the_same_virtual_machine_finds_its_pages_and_another_one_none() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let generation = leave_pages(&daemon, ONE)?;
    assert!(finds_them(&daemon, ONE, generation)?);
    assert!(!finds_them(&daemon, OTHER, generation)?);
    // They are gone at once, and not only hidden.
    assert_eq!(daemon.client_stats(0)?["pages_stored"], json!(0));
    assert!(!finds_them(&daemon, ONE, generation)?);
    Ok(())
}

#[test]
fn a_front_end_that_does_not_say_has_a_new_virtual_machine() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let generation = leave_pages(&daemon, ONE)?;
    assert!(!finds_them(&daemon, None, generation)?);
    // And so has the next one.
    let generation = leave_pages(&daemon, None)?;
    assert!(!finds_them(&daemon, None, generation)?);
    let generation = leave_pages(&daemon, None)?;
    assert!(!finds_them(&daemon, ONE, generation)?);
    Ok(())
}

#[test]
fn an_operator_may_trust_a_socket() -> Result<()> {
    let daemon = TestDaemon::start_with(1, CAPACITY, |options| {
        options.guests[0].trusts_socket = true;
    })?;
    let generation = leave_pages(&daemon, None)?;
    for instance in [None, ONE, OTHER, None] {
        assert!(finds_them(&daemon, instance, generation)?, "{instance:?}");
    }
    Ok(())
}

#[test]
fn whose_the_pages_are_outlives_the_daemon() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let start = || {
        let arena = folder.path().join("arena");
        TestDaemon::start_with(1, CAPACITY, |options| options.store.arena = Some(arena))
    };
    let daemon = start()?;
    let generation = leave_pages(&daemon, ONE)?;
    drop(daemon);
    let daemon = start()?;
    assert!(finds_them(&daemon, ONE, generation)?);
    drop(daemon);
    assert!(!finds_them(&start()?, OTHER, generation)?);
    Ok(())
}

#[test]
fn what_an_operator_has_set_outlives_the_daemon_and_the_virtual_machine() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let try_start = || {
        let arena = folder.path().join("arena");
        TestDaemon::start_with(1, CAPACITY, |options| {
            options.store.arena = Some(arena);
            options.quota_bytes = Some(32 << 20);
        })
    };
    // Threads that answered on the control socket may be about to end, with the arena still open.
    let start = || {
        let until = Instant::now() + PATIENCE;
        loop {
            match try_start() {
                Err(error) if error.to_string().contains("in use") && Instant::now() < until => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                started => return started,
            }
        }
    };
    let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    let daemon = start()?;
    for (method, params) in [
        (
            "client.quota",
            json!({"client": "guest0", "bytes": 9 << 20}),
        ),
        ("client.weight", json!({"client": "guest0", "weight": 7})),
        ("client.freeze", json!({"client": "guest0"})),
        ("pool.authorise", json!({"client": "guest0", "uuid": uuid})),
    ] {
        daemon.call(method, params)?;
    }
    drop(daemon);
    let daemon = start()?;
    for instance in [ONE, OTHER] {
        let mut guest = connect(&daemon, instance)?;
        guest.new_pool(0, pool_flag::PERSISTENT)?;
        let refused = guest.call(
            1,
            &Request::put(0, 0, &[(1, cram_tests::frontend::page(1))]),
        )?;
        assert_eq!(refused.results(1), [result::FROZEN]);
        let uuid = u128::from_str_radix(&uuid.replace('-', ""), 16)?.to_be_bytes();
        let shared = Request::new_pool(1, pool_flag::SHARED, uuid);
        assert_eq!(guest.call(1, &shared)?.response.status, status::OK);
        let stats = daemon.client_stats(0)?;
        assert_eq!(stats["quota_bytes"], json!(9 << 20));
        assert_eq!(stats["weight"], json!(7));
    }
    Ok(())
}

#[test]
fn an_operator_drops_what_a_client_has() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let generation = leave_pages(&daemon, ONE)?;
    let mut guest = connect(&daemon, ONE)?;
    // Not under a guest that is there, unless he means it.
    let reset = |force| daemon.call("client.reset", json!({"client": "guest0", "force": force}));
    assert!(reset(false).is_err());
    assert_eq!(guest.get(0, &[1, 2])?, [result::OK; 2]);
    assert_eq!(reset(true)?["pages"], json!(2));
    // It is told, and finds another life.
    assert!(guest.wait_config_change(PATIENCE)?);
    assert_ne!(guest.config()?.generation.get(), generation);
    let answer = guest.call(1, &Request::get(0, 0, &[1]))?;
    assert_eq!(answer.response.status, status::NO_POOL);
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[3])?;
    drop(guest);
    wait_disconnected(&daemon)?;
    assert_eq!(reset(false)?["pages"], json!(1));
    assert!(!finds_them(&daemon, ONE, generation)?);
    Ok(())
}

fn wait_disconnected(daemon: &TestDaemon) -> Result<()> {
    let until = Instant::now() + PATIENCE;
    while daemon.client_stats(0)?["connected"] != json!(false) {
        ensure!(Instant::now() < until, "it stays connected");
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[test]
fn pages_of_a_virtual_machine_that_does_not_come_back_are_dropped_in_time() -> Result<()> {
    let daemon = TestDaemon::start_with(1, CAPACITY, |options| {
        options.keep = Some(Duration::from_millis(1));
    })?;
    // As long as it is there they stay, however long that is.
    let mut guest = connect(&daemon, ONE)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1, 2])?;
    let generation = guest.config()?.generation.get();
    assert!(!guest.wait_config_change(Duration::from_millis(1500))?);
    assert_eq!(guest.get(0, &[1, 2])?, [result::OK; 2]);
    drop(guest);
    let until = Instant::now() + PATIENCE;
    while daemon.client_stats(0)?["pages_stored"] != json!(0) {
        ensure!(Instant::now() < until, "they stay");
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!finds_them(&daemon, ONE, generation)?);
    Ok(())
}

fn cookie(at: u32, bytes: &[u8]) -> Result<Vec<u8>> {
    let head = [at, u32::try_from(bytes.len())?, 0].map(u32::to_le_bytes);
    Ok([head.as_flattened(), bytes].concat())
}

#[test]
fn a_cookie_that_comes_late_or_wrongly_is_refused() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let generation = leave_pages(&daemon, ONE)?;
    let place = u32::try_from(CONFIG_SIZE)?;
    let mine = cookie(place, &[1; 16])?;
    let negotiate = |socket: &Path| RawFrontend::negotiate(socket, Some(VERSION_1));
    for (what, bad) in [
        ("no cookie", cookie(place, &[0; 16])?),
        ("a short one", cookie(place, &[1; 15])?),
        ("a long one", cookie(place, &[1; 17])?),
        ("one at another place", cookie(place + 4, &[1; 16])?),
        (
            "one that begins in what the guest sees",
            cookie(place - 8, &[1; 16])?,
        ),
    ] {
        let mut raw = negotiate(&daemon.socket(0))?;
        assert!(!raw.set(SET_CONFIG, &bad, &[])?, "{what}");
        raw.wait_hang_up()?;
    }
    // Twice the same is no harm; another one is.
    let mut raw = negotiate(&daemon.socket(0))?;
    assert!(raw.set(SET_CONFIG, &mine, &[])? && raw.set(SET_CONFIG, &mine, &[])?);
    assert!(!raw.set(SET_CONFIG, &cookie(place, &[2; 16])?, &[])?);
    raw.wait_hang_up()?;
    // None of these was another virtual machine, and nor is one that only looks at the features.
    drop(RawFrontend::negotiate(&daemon.socket(0), None)?);
    assert!(finds_them(&daemon, ONE, generation)?);
    // One that has read its configuration has said that it is a new one.
    let mut raw = negotiate(&daemon.socket(0))?;
    raw.ask(GET_CONFIG, &cookie(0, &[0; 64])?)?;
    assert!(!raw.set(SET_CONFIG, &mine, &[])?);
    raw.wait_hang_up()?;
    assert!(!finds_them(&daemon, ONE, generation)?);
    Ok(())
}

/// A wish of the operator is for the virtual machine that was there, and so is what that one told.
#[test]
fn what_was_asked_of_one_is_not_asked_of_the_next() -> Result<()> {
    let has_pages: fn(&TestDaemon) -> Result<()> = |daemon| leave_pages(daemon, ONE).map(drop);
    let was_there: fn(&TestDaemon) -> Result<()> = |daemon| connect(daemon, None).map(drop);
    for first in [has_pages, was_there] {
        let daemon = TestDaemon::start(1, CAPACITY)?;
        first(&daemon)?;
        let asked = json!({ "client": "guest0", "pages": 5 });
        daemon.call("client.give_back", asked)?;
        let state =
            || Ok::<_, anyhow::Error>(daemon.client_stats(0)?["give_back"]["state"].clone());
        assert_eq!(state()?, json!("asked"));

        let mut guest = connect(&daemon, OTHER)?;
        assert_eq!(state()?, json!("none"));
        let buffers = guest.give_event_buffers(2)?;
        daemon.call("client.quota", json!({ "client": "guest0", "bytes": "3M" }))?;
        guest.wait_event(event::QUOTA, &buffers)?;
        // The device delivers the older kinds first, so a wish would have come before.
        let events = daemon.client_stats(0)?["device"]["events"].clone();
        assert_eq!(events, json!(1), "the wish was delivered");
    }
    Ok(())
}
