// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The control socket: good questions, bad ones, and people who do not read the answers.

mod guests;
mod metrics;
mod peers;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use cram_abi::wire::pool_flag;
use cram_tests::frontend::{PATIENCE, TestDaemon};
use serde_json::{Value, json};
use vhost_device_cram::control::client::{CallError, Caller};
use vhost_device_cram::control::{CONNECTIONS_MAX, LINE_MAX};

const CAPACITY: u64 = 64 << 20;

fn start() -> Result<TestDaemon> {
    TestDaemon::start(2, CAPACITY)
}

/// The code with which a call is refused.
fn refusal(daemon: &TestDaemon, method: &str, params: &Value) -> Result<(i64, String)> {
    match Caller::connect(&daemon.control_socket())?.call(method, params) {
        Err(CallError::Refused { code, message }) => Ok((code, message)),
        other => anyhow::bail!("{method} {params} was answered {other:?}"),
    }
}

#[test]
fn every_method_is_listed_and_answers() -> Result<()> {
    let daemon = start()?;
    let answer = daemon.call("methods", json!({}))?;
    let methods = answer["methods"].as_array().context("no list")?;
    let names: Vec<_> = methods
        .iter()
        .filter_map(|method| method["name"].as_str())
        .collect();
    for name in [
        "methods",
        "rpc.discover",
        "guest.add",
        "guest.set",
        "guest.remove",
        "stats.histogram",
        "version",
        "stats",
        "clients",
        "client.quota",
        "client.freeze",
        "client.thaw",
        "client.flush",
        "client.give_back",
        "client.squeeze",
        "client.policy",
        "pool.authorise",
        "client.weight",
        "client.remove",
        "store.compact",
        "store.recompress",
        "store.anatomy",
    ] {
        assert!(names.contains(&name), "{name} is not listed");
    }
    for method in methods {
        assert!(
            method["description"]
                .as_str()
                .is_some_and(|text| text.len() > 10)
        );
        let name = method["name"].as_str().unwrap_or_default();
        // All of them know the guest, or take nothing.
        let params =
            json!({ "client": "guest0", "pages": 1, "uuid": "0123456789abcdef0123456789abcdef" });
        let params = match name {
            "methods" | "rpc.discover" | "version" | "stats" | "clients" | "store.compact"
            | "store.recompress" | "store.anatomy" => json!({}),
            "guest.add" => json!({
                "name": "later",
                "socket": daemon.socket(0).with_file_name("later.sock"),
            }),
            "guest.remove" => json!({ "client": "later" }),
            "client.give_back" | "client.squeeze" => json!({ "client": "guest0", "pages": 1 }),
            "pool.authorise" => json!({ "client": "guest0", "uuid": params["uuid"] }),
            _ => json!({ "client": "guest0" }),
        };
        let answer = daemon.call(name, params).with_context(|| name.to_owned());
        if name == "client.remove" {
            // A client that has a socket stays: its guest may come back.
            assert!(answer.is_err(), "guest0 was removed from under its socket");
        } else if name == "client.squeeze" {
            assert!(answer.is_err(), "there is no driver that could be squeezed");
        } else {
            answer?;
        }
    }
    let version = daemon.call("version", json!({}))?;
    assert_eq!(
        (&version["protocol"], &version["schema"]),
        (&json!(1), &json!(1))
    );
    Ok(())
}

#[test]
fn stats_tell_of_store_clients_and_pools() -> Result<()> {
    let daemon = start()?;
    // Also while no guest was ever there.
    let stats = daemon.call("stats", json!({}))?;
    assert_eq!(stats["store"]["capacity_bytes"], json!(CAPACITY));
    assert_eq!(stats["clients"][1]["connected"], json!(false));
    assert_eq!(stats["clients"][1]["pools"], json!([]));

    let mut guest = daemon.connect(1)?;
    guest.new_pool(3, pool_flag::PERSISTENT)?;
    guest.new_pool(4, 0)?;
    guest.put(3, &[1, 2, 3])?;
    guest.put(4, &[1])?;
    guest.get(3, &[1, 9])?;
    let stats = daemon.call("stats", json!({}))?;
    let client = &stats["clients"][1];
    assert_eq!(stats["clients"][0]["pages_stored"], json!(0));
    for place in [&stats["store"], client] {
        for (name, value) in [
            ("pages_stored", 4),
            ("orig_data_size", 4 * 4096),
            ("puts", 4),
            ("puts_refused", 0),
            ("gets", 2),
            ("gets_missing", 1),
            ("gets_corrupt", 0),
        ] {
            assert_eq!(place[name], json!(value), "{name}");
        }
        let bytes = |name: &str| place[name].as_u64().unwrap_or_default();
        assert!(bytes("compr_data_size") > 0);
        assert!(bytes("mem_used_total") > bytes("compr_data_size"));
        assert!(bytes("mem_used_max") >= bytes("mem_used_total"));
    }
    assert_eq!(client["name"], json!("guest1"));
    assert_eq!(client["connected"], json!(true));
    assert_eq!(client["pools"][0]["id"], json!(3));
    assert_eq!(client["pools"][0]["kind"], json!("persistent"));
    assert_eq!(client["pools"][0]["pages_stored"], json!(3));
    assert_eq!(client["pools"][1]["kind"], json!("ephemeral"));
    assert!(client["device"]["requests"].as_u64() >= Some(5));

    // Ephemeral pages may be dropped, and only these.
    let dropped = daemon.call("client.flush", json!({ "client": "guest1" }))?;
    assert_eq!(dropped["pages"], json!(1));
    assert_eq!(guest.get(3, &[1, 2, 3])?, [0, 0, 0]);
    assert_eq!(guest.get(4, &[1])?, [1]);
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_and_says_why() -> Result<()> {
    let daemon = start()?;
    for (method, params, code, word) in [
        ("nonsense", json!({}), -32601, "\"methods\" lists them"),
        ("stats", json!({ "x": 1 }), -32602, "unknown field `x`"),
        ("client.quota", json!({}), -32602, "missing field `client`"),
        (
            "client.quota",
            json!({ "client": 7 }),
            -32602,
            "expected a string",
        ),
        (
            "client.quota",
            json!({ "client": "vm9" }),
            -32001,
            "there are: guest0, guest1",
        ),
        (
            "client.quota",
            json!({ "client": "guest0", "bytes": "12Q" }),
            -32602,
            "is not a size",
        ),
        (
            "client.quota",
            json!({ "client": "guest0", "bytes": -1 }),
            -32602,
            "",
        ),
        (
            "client.quota",
            json!({ "client": "guest0", "bytes": "1T" }),
            -32602,
            "capacity of 64 MiB",
        ),
        (
            "client.give_back",
            json!({ "client": "guest0", "pages": 1u64 << 32 }),
            -32602,
            "",
        ),
        (
            "client.give_back",
            json!({ "client": "guest0", "pages": 1, "bytes": "4K" }),
            -32602,
            "either bytes or pages",
        ),
        (
            "client.squeeze",
            json!({ "client": "guest0" }),
            -32602,
            "either bytes or pages",
        ),
        (
            "client.policy",
            json!({ "client": "guest0", "copies": "some" }),
            -32602,
            "unknown variant",
        ),
        (
            "pool.authorise",
            json!({ "client": "guest0", "uuid": "x" }),
            -32602,
            "is not a uuid",
        ),
        (
            "pool.authorise",
            json!({ "client": "guest0", "uuid": "0".repeat(32) }),
            -32602,
            "uuid",
        ),
    ] {
        let (got, message) = refusal(&daemon, method, &params)?;
        assert_eq!(got, code, "{method} {params}: {message}");
        assert!(message.contains(word), "{method} {params}: {message}");
        assert!(!message.contains('\n'));
    }
    Ok(())
}

#[test]
fn lines_that_are_no_request_are_answered_and_the_connection_goes_on() -> Result<()> {
    let daemon = start()?;
    let mut caller = Caller::connect(&daemon.control_socket())?;
    for (line, code) in [
        ("{", -32700),
        ("\u{7f}\u{0}", -32700),
        ("[]", -32600),
        ("17", -32600),
        (r#"{"jsonrpc":"2.0","id":1}"#, -32600),
        (r#"{"jsonrpc":"2.0","id":[],"method":"stats"}"#, -32600),
        (
            r#"{"jsonrpc":"2.0","id":1,"method":"stats","params":[1]}"#,
            -32602,
        ),
    ] {
        let answer = caller.exchange(format!("{line}\n").as_bytes())?;
        assert_eq!(answer["error"]["code"], json!(code), "{line}");
    }
    let deep = format!("{}{}\n", "[".repeat(20_000), "]".repeat(20_000));
    assert_eq!(
        caller.exchange(deep.as_bytes())?["error"]["code"],
        json!(-32700)
    );
    assert_eq!(
        caller.exchange(b"\xff\xfe\n")?["error"]["code"],
        json!(-32700)
    );
    assert_eq!(caller.call("version", &json!({}))?["schema"], json!(1));

    // Several in one piece, one in several pieces, one without an answer, empty ones.
    let ask = |id| format!("{{\"jsonrpc\":\"2.0\",\"id\":{id},\"method\":\"version\"}}\n");
    let silent = "{\"jsonrpc\":\"2.0\",\"method\":\"version\"}\n\n\r\n";
    let mut stream = UnixStream::connect(daemon.control_socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(format!("{}{silent}{}", ask(1), ask(2)).as_bytes())?;
    for piece in ask(3).as_bytes().chunks(5) {
        stream.write_all(piece)?;
        std::thread::sleep(Duration::from_millis(1));
    }
    let mut lines = BufReader::new(stream).lines();
    for id in 1..=3 {
        let answer: Value = serde_json::from_str(&lines.next().context("no answer")??)?;
        assert_eq!(answer["id"], json!(id));
    }
    Ok(())
}

#[test]
fn a_line_without_end_is_cut_off() -> Result<()> {
    let daemon = start()?;
    let mut caller = Caller::connect(&daemon.control_socket())?;
    // The longest that is taken: blanks, and a request.
    let ask = r#"{"jsonrpc":"2.0","id":1,"method":"version"}"#;
    let longest = format!("{}{ask}\n", " ".repeat(LINE_MAX - ask.len()));
    assert_eq!(
        caller.exchange(longest.as_bytes())?["result"]["schema"],
        json!(1)
    );

    let mut stream = UnixStream::connect(daemon.control_socket())?;
    stream.set_read_timeout(Some(PATIENCE))?;
    // The daemon hangs up before it has all of it.
    let _ = stream.write_all(&vec![b' '; 4 * LINE_MAX]);
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    assert!(answer.is_empty() || answer.contains("-32600"), "{answer}");
    assert_eq!(daemon.call("version", json!({}))?["schema"], json!(1));
    Ok(())
}

#[test]
fn only_this_user_may_connect() -> Result<()> {
    let daemon = start()?;
    let mode = std::fs::metadata(daemon.control_socket())?
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    Ok(())
}

#[test]
fn those_who_do_not_read_hurt_nobody() -> Result<()> {
    let daemon = start()?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    // Asks and asks, and never reads.
    let ask = b"{\"jsonrpc\":\"2.0\",\"id\":1,\"method\":\"stats\"}\n";
    let mut deaf = UnixStream::connect(daemon.control_socket())?;
    deaf.set_nonblocking(true)?;
    while deaf.write(ask).is_ok() {}
    // Connects, and says nothing, or half of something.
    let mut idle = Vec::new();
    for _ in 0..CONNECTIONS_MAX - 2 {
        let mut stream = UnixStream::connect(daemon.control_socket())?;
        stream.write_all(b"{")?;
        idle.push(stream);
    }
    let begun = Instant::now();
    assert_eq!(daemon.call("version", json!({}))?["schema"], json!(1));
    assert_eq!(guest.put(0, &[1])?, [0]);
    assert!(begun.elapsed() < PATIENCE / 2);

    // Whether the daemon has seen by now that the others went is its own affair, so which one of
    // the crowd is refused is open; that one of them is, is not.
    drop((deaf, idle));
    let mut crowd = Vec::new();
    for _ in 0..=CONNECTIONS_MAX {
        let stream = UnixStream::connect(daemon.control_socket())?;
        stream.set_nonblocking(true)?;
        crowd.push(stream);
    }
    let until = Instant::now() + PATIENCE;
    let mut answer = String::new();
    while answer.is_empty() {
        assert!(Instant::now() < until, "nobody of the crowd was refused");
        for stream in &mut crowd {
            // Those who were let in have nothing to read.
            let _ = stream.read_to_string(&mut answer);
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(answer.contains("too many control connections"), "{answer}");
    // And then there is room again.
    drop(crowd);
    let until = Instant::now() + PATIENCE;
    while daemon.call("version", json!({})).is_err() {
        assert!(Instant::now() < until);
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
