// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that come, change and go while the daemon runs.

use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use anyhow::{Context, Result};
use cram_abi::wire::{pool_flag, result};
use cram_store::CAPACITY_BYTES_MIN;
use cram_tests::frontend::{Guest, Options, TestDaemon};
use serde_json::{Value, json};

use crate::{refusal, start};

/// A socket beside those of the guests that are there from the start.
fn beside(daemon: &TestDaemon, name: &str) -> PathBuf {
    daemon.socket(0).with_file_name(name)
}

fn named<'a>(stats: &'a Value, name: &str) -> Option<&'a Value> {
    let mut clients = stats["clients"].as_array()?.iter();
    clients.find(|client| client["name"] == name)
}

#[test]
fn a_guest_is_added_served_changed_and_removed_while_others_work() -> Result<()> {
    let daemon = start()?;
    let mut other = daemon.connect(0)?;
    other.new_pool(0, pool_flag::PERSISTENT)?;
    other.put(0, &[1, 2])?;

    let socket = beside(&daemon, "later.sock");
    let wanted = json!({
        "name": "later", "socket": socket, "quota": "12M", "weight": 50, "copies": "keep",
        "auto_squeeze": true,
    });
    let answer = daemon.call("guest.add", wanted)?;
    assert_eq!(answer["quota_bytes"], json!(12 << 20));
    assert_eq!(
        (
            &answer["weight"],
            &answer["copies"],
            &answer["auto_squeeze"]
        ),
        (&json!(50), &json!("keep"), &json!(true))
    );
    let mut later = Guest::connect(&socket, &Options::default())?;
    later.new_pool(0, pool_flag::PERSISTENT)?;
    assert_eq!(later.put(0, &[7, 8, 9])?, [result::OK; 3]);

    let change = json!({ "client": "later", "quota": 8 << 20, "frozen": true, "copies": "free" });
    let answer = daemon.call("guest.set", change)?;
    assert_eq!(
        (&answer["quota_bytes"], &answer["frozen"], &answer["weight"]),
        (&json!(8 << 20), &json!(true), &json!(50))
    );
    assert_ne!(later.put(0, &[10])?, [result::OK]);
    daemon.call("guest.set", json!({ "client": "later", "frozen": false }))?;
    assert_eq!(later.put(0, &[10])?, [result::OK]);

    let (code, message) = refusal(&daemon, "guest.remove", &json!({ "client": "later" }))?;
    assert!(
        code == -32602 && message.contains("is connected"),
        "{message}"
    );
    let forced = json!({ "client": "later", "force": true });
    assert_eq!(daemon.call("guest.remove", forced)?["pages"], json!(4));
    assert!(!socket.exists());
    assert!(named(&daemon.call("stats", json!({}))?, "later").is_none());
    // Its pages and settings wait for it.
    let clients = daemon.call("clients", json!({}))?;
    let entry = named(&clients, "later").context("forgotten")?;
    assert_eq!(entry["socket"], Value::Null);
    let answer = daemon.call("guest.add", json!({ "name": "later", "socket": socket }))?;
    assert_eq!(
        (&answer["pages"], &answer["weight"]),
        (&json!(4), &json!(50))
    );

    let forget = json!({ "client": "later", "forget": true, "force": true });
    daemon.call("guest.remove", forget)?;
    let clients = daemon.call("clients", json!({}))?;
    assert!(named(&clients, "later").is_none());
    assert_eq!(other.get(0, &[1, 2])?, [result::OK; 2]);
    daemon.check_store()
}

#[test]
fn what_cannot_be_added_is_refused_and_nothing_is_half_done() -> Result<()> {
    let daemon = start()?;
    let before = daemon.call("clients", json!({}))?;
    let good = beside(&daemon, "good.sock");
    let _theirs = UnixListener::bind(beside(&daemon, "theirs.sock"))?;
    std::fs::write(beside(&daemon, "file"), "x")?;
    let long = "n".repeat(256);
    let elsewhere = tempfile::tempdir()?;
    for (params, code, word) in [
        (json!({ "socket": good }), -32602, "missing field `name`"),
        (json!({ "name": "x" }), -32602, "missing field `socket`"),
        (
            json!({ "name": "x", "socket": good, "colour": 1 }),
            -32602,
            "unknown field `colour`",
        ),
        (
            json!({ "name": "", "socket": good }),
            -32602,
            "cannot be a guest's name",
        ),
        (
            json!({ "name": "a\nb", "socket": good }),
            -32602,
            "cannot be a guest's name",
        ),
        (
            json!({ "name": long, "socket": good }),
            -32602,
            "cannot be a guest's name",
        ),
        (
            json!({ "name": "guest0", "socket": good }),
            -32602,
            "already called guest0",
        ),
        (
            json!({ "name": "x", "socket": daemon.socket(1) }),
            -32602,
            "that of guest1",
        ),
        (
            json!({ "name": "x", "socket": daemon.control_socket() }),
            -32602,
            "that of cramctl",
        ),
        (
            json!({ "name": "x", "socket": elsewhere.path().join("x.sock") }),
            -32602,
            "--guest-folder",
        ),
        (
            json!({ "name": "x", "socket": good.parent().map(|folder| folder.join("../x.sock")) }),
            -32602,
            "--guest-folder",
        ),
        (
            json!({ "name": "x", "socket": beside(&daemon, "theirs.sock") }),
            -32602,
            "there is one already",
        ),
        (
            json!({ "name": "x", "socket": beside(&daemon, "file") }),
            -32602,
            "not a socket",
        ),
        (
            json!({ "name": "x", "socket": beside(&daemon, &"s".repeat(120)) }),
            -32602,
            "longer than 107 bytes",
        ),
        (
            json!({ "name": "x", "socket": good, "quota": "1T" }),
            -32602,
            "capacity of 64 MiB",
        ),
        (
            json!({ "name": "x", "socket": good, "quota": "12Q" }),
            -32602,
            "is not a size",
        ),
        (
            json!({ "name": "x", "socket": good, "quota": -1 }),
            -32602,
            "write a whole number",
        ),
        (
            json!({ "name": "x", "socket": good, "weight": "much" }),
            -32602,
            "invalid type",
        ),
        (
            json!({ "name": "x", "socket": good, "copies": "some" }),
            -32602,
            "unknown variant",
        ),
        (
            json!({ "name": "x", "socket": good, "quota": 0 }),
            -32603,
            "the store refused",
        ),
    ] {
        let (got, message) = refusal(&daemon, "guest.add", &params)?;
        assert!(
            got == code && message.contains(word),
            "{params}: {got} {message}"
        );
        assert!(!message.contains('\n'), "{message}");
        assert!(!good.exists(), "{params} left a socket behind");
    }
    for (params, code, word) in [
        (
            json!({ "client": "vm9", "weight": 1 }),
            -32001,
            "there are: guest0, guest1",
        ),
        (
            json!({ "client": "guest0", "weight": 7, "quota": "1T" }),
            -32602,
            "capacity of 64 MiB",
        ),
        (
            json!({ "client": "guest0", "frozen": 1 }),
            -32602,
            "invalid type",
        ),
    ] {
        let (got, message) = refusal(&daemon, "guest.set", &params)?;
        assert!(
            got == code && message.contains(word),
            "{params}: {got} {message}"
        );
    }
    let weight = daemon.call("client.weight", json!({ "client": "guest0" }))?;
    assert_eq!(weight["weight"], json!(100), "half of a change was made");
    let (code, _) = refusal(&daemon, "guest.remove", &json!({ "client": "vm9" }))?;
    assert_eq!(code, -32001);
    assert_eq!(daemon.call("clients", json!({}))?, before);
    Ok(())
}

/// Without a control socket's folder list nothing else is possible; with one, its folders are.
#[test]
fn guests_can_be_all_added_later() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let stale = folder.path().join("vm1.sock");
    drop(UnixListener::bind(&stale)?);
    let at = folder.path().to_owned();
    let daemon = TestDaemon::start_with(0, 8 * CAPACITY_BYTES_MIN, |options| {
        options.guest_folders.push(at);
    })?;
    assert!(!stale.exists(), "a socket of nobody was left");
    daemon.call("guest.add", json!({ "name": "vm1", "socket": stale }))?;
    let mut guest = Guest::connect(&stale, &Options::default())?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    assert_eq!(guest.put(0, &[1])?, [result::OK]);
    let histogram = daemon.call("stats.histogram", json!({ "client": "vm1" }))?;
    assert_eq!(histogram["clients"][0]["name"], json!("vm1"));
    Ok(())
}

#[test]
fn times_are_counted_for_each_guest() -> Result<()> {
    let daemon = start()?;
    let mut guest = daemon.connect(1)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    const ROUNDS: u32 = 200;
    for number in 0..ROUNDS {
        guest.put(0, &[number])?;
        guest.get(0, &[number])?;
    }
    let answer = daemon.call("stats.histogram", json!({}))?;
    let timed_one_in = answer["timed_one_in"].as_u64().context("no rate")?;
    let count = |client: usize, kind: &str| {
        let times = &answer["clients"][client][kind];
        let buckets = times["buckets"].as_array().into_iter().flatten();
        let sum: u64 = buckets.filter_map(|bucket| bucket["count"].as_u64()).sum();
        assert_eq!(times["count"], json!(sum), "{kind}");
        sum
    };
    // Requests of one queue are on one worker, which times each of so many.
    let timed = count(1, "put") + count(1, "get");
    let least = u64::from(2 * ROUNDS) / timed_one_in;
    assert!(timed >= least && timed <= least + 2, "{timed} for {least}");
    assert!(count(1, "put") > 0 && count(1, "get") > 0);
    assert_eq!(count(1, "queueing"), timed);
    let put = &answer["clients"][1]["put"];
    assert!(put["p50_ns"].as_u64() > Some(0));
    assert!(put["p50_ns"].as_u64() <= put["max_ns"].as_u64());
    assert_eq!(count(0, "put"), 0);
    assert_eq!(answer["clients"][0]["put"]["p50_ns"], Value::Null);
    Ok(())
}
