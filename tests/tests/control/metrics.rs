// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What Prometheus would read.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use cram_abi::wire::pool_flag;
use cram_tests::frontend::{PATIENCE, TestDaemon};
use serde_json::Value;
use vhost_device_cram::address::Address;

use crate::CAPACITY;

fn start(address: Address) -> Result<TestDaemon> {
    TestDaemon::start_with(2, CAPACITY, |options| options.metrics = Some(address))
}

fn on_a_port() -> Result<(TestDaemon, SocketAddr)> {
    let daemon = start(Address::Loopback(SocketAddr::from(([127, 0, 0, 1], 0))))?;
    let port = daemon.daemon().metrics_port().context("no port")?;
    Ok((daemon, port))
}

/// Asks, and splits the answer into its head and its body.
fn exchange(mut stream: impl Read + Write, ask: &str) -> Result<(String, String)> {
    stream.write_all(ask.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    let length = format!("Content-Length: {}", body.len());
    ensure!(head.contains(&length), "{head}");
    Ok((head.to_owned(), body.to_owned()))
}

const ASK: &str = "GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n";

#[derive(Default)]
struct Scraped {
    /// Names of families, and what they are.
    kinds: BTreeMap<String, String>,
    /// Values by name and labels.
    values: BTreeMap<String, f64>,
}

/// Reads OpenMetrics strictly: every family is described before it is used, and only once; every value
/// is a number; the end is marked.
fn parse(body: &str) -> Result<Scraped> {
    let mut scraped = Scraped::default();
    let mut helped = BTreeSet::new();
    let text = body.strip_suffix("# EOF\n").context("no end")?;
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            let mut words = comment.splitn(3, ' ');
            let (what, name) = (words.next(), words.next().context("no name")?);
            match what {
                Some("TYPE") => {
                    let kind = words.next().context("no type")?;
                    let old = scraped.kinds.insert(name.to_owned(), kind.to_owned());
                    ensure!(old.is_none(), "{name} is described twice");
                }
                Some("HELP") => ensure!(helped.insert(name.to_owned()), "{name}"),
                Some("UNIT") => {
                    let unit = words.next().context("no unit")?;
                    ensure!(name.ends_with(unit), "{line}");
                }
                _ => anyhow::bail!("{line}"),
            }
            continue;
        }
        let (series, value) = line.rsplit_once(' ').context("no value")?;
        let name = series.split('{').next().unwrap_or_default();
        let family = scraped.kinds.iter().find(|(family, kind)| {
            let suffixes: &[&str] = match kind.as_str() {
                "counter" => &["_total"],
                "gauge" => &[""],
                "histogram" => &["_bucket", "_sum", "_count"],
                "info" => &["_info"],
                _ => &[],
            };
            let rest = name.strip_prefix(family.as_str());
            rest.is_some_and(|rest| suffixes.contains(&rest))
        });
        ensure!(family.is_some(), "{line} is of no family");
        let old = scraped.values.insert(series.to_owned(), value.parse()?);
        ensure!(old.is_none(), "{series} is there twice");
    }
    ensure!(helped.len() == scraped.kinds.len());
    Ok(scraped)
}

#[test]
fn what_is_scraped_is_what_happened() -> Result<()> {
    let (daemon, port) = on_a_port()?;
    let mut guest = daemon.connect(1)?;
    guest.new_pool(3, pool_flag::PERSISTENT)?;
    for number in 0..100 {
        guest.put(3, &[number])?;
        guest.get(3, &[number])?;
    }
    let (head, body) = exchange(TcpStream::connect(port)?, ASK)?;
    ensure!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    ensure!(
        head.contains("application/openmetrics-text; version=1.0.0"),
        "{head}"
    );
    let scraped = parse(&body)?;
    let value = |series: &str| scraped.values.get(series).copied();
    for (series, wanted) in [
        ("cram_store_pages", 100.0),
        ("cram_store_puts_total", 100.0),
        ("cram_guests", 2.0),
        ("cram_guest_pages{guest=\"guest1\"}", 100.0),
        ("cram_guest_pages{guest=\"guest0\"}", 0.0),
        ("cram_guest_gets_total{guest=\"guest1\"}", 100.0),
        ("cram_guest_connected{guest=\"guest1\"}", 1.0),
        ("cram_guest_connected{guest=\"guest0\"}", 0.0),
        ("cram_store_limit_bytes", 67_108_864.0),
    ] {
        ensure!(
            value(series) == Some(wanted),
            "{series}: {:?}\n{body}",
            value(series)
        );
    }
    let times = "guest=\"guest1\",kind=\"put\"";
    let count = value(&format!("cram_guest_request_seconds_count{{{times}}}"));
    let all = value(&format!(
        "cram_guest_request_seconds_bucket{{le=\"+Inf\",{times}}}"
    ));
    ensure!(
        count > Some(0.0) && count == all,
        "{count:?} {all:?}\n{body}"
    );
    Ok(())
}

#[test]
fn a_unix_socket_serves_them_as_well() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("metrics.sock");
    let daemon = start(Address::Unix(path.clone()))?;
    let (head, body) = exchange(UnixStream::connect(&path)?, ASK)?;
    ensure!(head.starts_with("HTTP/1.1 200 OK"), "{head}");
    parse(&body)?;
    drop(daemon);
    ensure!(!path.exists());
    Ok(())
}

#[test]
fn who_asks_for_something_else_or_is_slow_hurts_nobody() -> Result<()> {
    let (daemon, port) = on_a_port()?;
    for (ask, status) in [
        ("GET / HTTP/1.1\r\n\r\n", "404"),
        ("DELETE /metrics HTTP/1.1\r\n\r\n", "405"),
        ("nonsense\r\n\r\n", "400"),
        (&format!("GET /{} HTTP/1.1\r\n", "x".repeat(9000)), "400"),
    ] {
        let mut stream = TcpStream::connect(port)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(ask.as_bytes())?;
        let mut answer = [0; 12];
        stream.read_exact(&mut answer)?;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        ensure!(answer == format!("HTTP/1.1 {status}"), "{ask}: {answer}");
    }
    // One says nothing, one hangs up, and then there is somebody with a question.
    let silent = TcpStream::connect(port)?;
    drop(TcpStream::connect(port)?);
    let begun = Instant::now();
    let (head, _) = exchange(TcpStream::connect(port)?, ASK)?;
    ensure!(
        head.starts_with("HTTP/1.1 200") && begun.elapsed() < PATIENCE,
        "{head}"
    );
    drop(silent);
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    ensure!(guest.put(0, &[1])? == [0]);
    Ok(())
}

/// Rules and dashboard ask for nothing that there is not.
#[test]
fn alerts_and_dashboard_name_metrics_that_exist() -> Result<()> {
    let (_daemon, port) = on_a_port()?;
    let (_, body) = exchange(TcpStream::connect(port)?, ASK)?;
    let scraped = parse(&body)?;
    let mut known: BTreeSet<String> = BTreeSet::new();
    for (family, kind) in &scraped.kinds {
        match kind.as_str() {
            "counter" => known.insert(format!("{family}_total")),
            "histogram" => ["_bucket", "_sum", "_count"]
                .iter()
                .all(|suffix| known.insert(format!("{family}{suffix}"))),
            "info" => known.insert(format!("{family}_info")),
            _ => known.insert(family.clone()),
        };
    }
    let ops = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../ops");
    for name in ["alerts.yml", "grafana.json"] {
        let text = std::fs::read_to_string(ops.join(name))?;
        let mut named = 0;
        for word in text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_') {
            if word.starts_with("cram_") {
                ensure!(
                    known.contains(word),
                    "{name} asks for {word}, which there is not"
                );
                named += 1;
            }
        }
        ensure!(named > 8, "{name} asks for {named}");
    }
    let dashboard: Value =
        serde_json::from_str(&std::fs::read_to_string(ops.join("grafana.json"))?)?;
    let panels = dashboard["panels"].as_array().context("no panels")?;
    let ids: BTreeSet<_> = panels
        .iter()
        .filter_map(|panel| panel["id"].as_u64())
        .collect();
    ensure!(ids.len() == panels.len() && panels.len() > 5);
    Ok(())
}
