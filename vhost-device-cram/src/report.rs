// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Answers of the control socket as text for people: aligned, with units.
//!
//! Works on the JSON, so that a newer or older daemon is shown as far as it is understood.

use std::fmt::Write;
use std::time::Duration;

use serde_json::Value;

use crate::size;

const PAGE_SIZE: u64 = cram_abi::wire::PAGE_SIZE as u64;

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or_default()
}

fn text<'a>(value: &'a Value, name: &str) -> &'a str {
    value.get(name).and_then(Value::as_str).unwrap_or("?")
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

fn flag(value: &Value, name: &str) -> bool {
    value.get(name).and_then(Value::as_bool).unwrap_or_default()
}

/// Original bytes for one byte held, in hundredths; none while nothing is held.
fn ratio(value: &Value) -> String {
    let (original, held) = (
        number(value, "orig_data_size"),
        number(value, "mem_used_total"),
    );
    match (u128::from(original) * 100).checked_div(u128::from(held)) {
        Some(hundredths) if original > 0 => format!("{}.{:02}", hundredths / 100, hundredths % 100),
        _ => "-".to_owned(),
    }
}

fn percent(part: u64, whole: u64) -> String {
    match (u128::from(part) * 100).checked_div(u128::from(whole)) {
        Some(percent) => format!("{percent}%"),
        None => "-".to_owned(),
    }
}

/// A table whose first columns, of words, are aligned to the left, and the others to the right.
fn table(rows: &[Vec<String>], words: usize) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |k: usize| {
        rows.iter()
            .filter_map(|row| row.get(k))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (k, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let gap = if k == 0 { "" } else { "  " };
            if k < words {
                line.push_str(&format!("{gap}{cell:<width$}"));
            } else {
                line.push_str(&format!("{gap}{cell:>width$}"));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Events per second between two readings.
fn rate(now: &Value, before: &Value, time: Duration, name: &str) -> String {
    let events = number(now, name).saturating_sub(number(before, name));
    let micros = time.as_micros().max(1);
    ((u128::from(events) * 1_000_000 + micros / 2) / micros).to_string()
}

/// The answer to `stats`; with an earlier one, also what happened since.
pub fn stats(answer: &Value, earlier: Option<(Duration, &Value)>) -> String {
    let none = Value::Null;
    let store = answer.get("store").unwrap_or(&none);
    let past = earlier.map(|(time, before)| (time, before.get("store").unwrap_or(&none)));
    let rate_of = |name: &str| {
        past.map(|(time, before)| format!(", {}/s", rate(store, before, time, name)))
            .unwrap_or_default()
    };
    let shown = |name: &str| size::show(number(store, name));
    let (held, capacity) = (
        number(store, "mem_used_total"),
        number(store, "capacity_bytes"),
    );
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "held      {} of {} ({}), at most {}; pressure {} of 1000",
        shown("mem_used_total"),
        shown("capacity_bytes"),
        percent(held, capacity),
        shown("mem_used_max"),
        number(store, "pressure"),
    );
    let _ = writeln!(
        out,
        "pages     {} ({}), {} same-filled, {} incompressible, {} with the bytes of {} others, {} \
         compressed twice",
        number(store, "pages_stored"),
        shown("orig_data_size"),
        number(store, "same_pages"),
        number(store, "huge_pages"),
        number(store, "pages_sharing"),
        number(store, "pages_shared"),
        number(store, "recompressed_pages"),
    );
    let _ = writeln!(
        out,
        "ratio     {} (original to held; {} compressed)",
        ratio(store),
        shown("compr_data_size"),
    );
    let _ = writeln!(
        out,
        "puts      {}{}; {} refused: {} no space, {} over quota, {} frozen, {} incompressible",
        number(store, "puts"),
        rate_of("puts"),
        number(store, "puts_refused"),
        number(store, "refused_no_space"),
        number(store, "refused_over_quota"),
        number(store, "refused_frozen"),
        number(store, "refused_incompressible"),
    );
    let _ = writeln!(
        out,
        "gets      {}{}; {} missing, {} corrupt",
        number(store, "gets"),
        rate_of("gets"),
        number(store, "gets_missing"),
        number(store, "gets_corrupt"),
    );
    let _ = writeln!(
        out,
        "flushed   {}; {} evicted",
        number(store, "flushes"),
        number(store, "evicted_pages"),
    );

    let mut heading = vec![
        "client",
        "state",
        "pages",
        "held",
        "quota",
        "ratio",
        "pressure",
        "puts",
        "refused",
        "gets",
        "missing",
        "corrupt",
        "malformed",
    ];
    if earlier.is_some() {
        heading.extend(["puts/s", "gets/s"]);
    }
    let mut rows = vec![heading.into_iter().map(str::to_owned).collect::<Vec<_>>()];
    for client in list(answer, "clients") {
        rows.push(client_row(client, earlier));
    }
    out.push('\n');
    out.push_str(&table(&rows, 2));
    out.push_str(&guests_memory(answer));
    out
}

/// A table of the memory of those guests whose drivers tell of it; empty when none does.
fn guests_memory(answer: &Value) -> String {
    let mut rows = vec![
        ["client", "copies", "squeeze", "give back", "memory", "free"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for client in list(answer, "clients") {
        let Some(memory) = client.get("guest_memory").filter(|value| value.is_object()) else {
            continue;
        };
        let pages = |name| size::show(number(memory, name).saturating_mul(PAGE_SIZE));
        let brief = |name| {
            let errand = client.get(name).unwrap_or(&Value::Null);
            let (state, done) = (text(errand, "state"), number(errand, "done_pages"));
            match done {
                0 => state.to_owned(),
                _ => format!("{state}, {}", size::show(done.saturating_mul(PAGE_SIZE))),
            }
        };
        let copies = match flag(client, "auto_squeeze") {
            true => format!("{}, auto-squeeze", text(client, "copies")),
            false => text(client, "copies").to_owned(),
        };
        rows.push(vec![
            text(client, "name").to_owned(),
            copies,
            brief("squeeze"),
            brief("give_back"),
            pages("total_pages"),
            pages("free_pages"),
        ]);
    }
    match rows.len() {
        1 => String::new(),
        _ => format!("\n{}", table(&rows, 4)),
    }
}

/// How an errand of a client goes: a line for people, and whether it goes on. `None` when there is
/// no such client any more, or it is not connected.
pub fn errand(stats: &Value, client: &str, which: &str) -> Option<(String, bool)> {
    let client = list(stats, "clients")
        .iter()
        .find(|entry| text(entry, "name") == client && flag(entry, "connected"))?;
    let errand = client.get(which)?;
    let (asked, done) = (number(errand, "asked_pages"), number(errand, "done_pages"));
    let state = text(errand, "state");
    let held = size::show(number(client, "mem_used_total"));
    let line = format!(
        "{state}: {} of {} ({}), {held} held by the pool for it\n",
        size::show(done.saturating_mul(PAGE_SIZE)),
        size::show(asked.saturating_mul(PAGE_SIZE)),
        percent(done, asked),
    );
    Some((line, matches!(state, "asked" | "working" | "throttled")))
}

/// The answer to `client.policy`.
pub fn policy(answer: &Value) -> String {
    format!(
        "{}: copies {}, auto-squeeze {}\n",
        text(answer, "client"),
        text(answer, "copies"),
        if flag(answer, "auto_squeeze") {
            "on"
        } else {
            "off"
        },
    )
}

fn state(client: &Value) -> &'static str {
    match (flag(client, "connected"), flag(client, "frozen")) {
        (true, false) => "connected",
        (true, true) => "connected, frozen",
        (false, false) => "away",
        (false, true) => "away, frozen",
    }
}

fn client_row(client: &Value, earlier: Option<(Duration, &Value)>) -> Vec<String> {
    let count = |name: &str| number(client, name).to_string();
    let device = client.get("device").unwrap_or(&Value::Null);
    let mut row = vec![
        text(client, "name").to_owned(),
        state(client).to_owned(),
        count("pages_stored"),
        size::show(number(client, "mem_used_total")),
        size::show(number(client, "quota_bytes")),
        ratio(client),
        count("pressure"),
        count("puts"),
        count("puts_refused"),
        count("gets"),
        count("gets_missing"),
        count("gets_corrupt"),
        number(device, "malformed").to_string(),
    ];
    if let Some((time, before)) = earlier {
        let name = text(client, "name");
        let before = list(before, "clients")
            .iter()
            .find(|other| text(other, "name") == name);
        let before = before.unwrap_or(client);
        row.push(rate(client, before, time, "puts"));
        row.push(rate(client, before, time, "gets"));
    }
    row
}

/// The answer to `clients`.
pub fn clients(answer: &Value) -> String {
    let mut rows = vec![["client", "state", "socket"].map(str::to_owned).to_vec()];
    for client in list(answer, "clients") {
        rows.push(vec![
            text(client, "name").to_owned(),
            state(client).to_owned(),
            match client.get("socket") {
                Some(Value::Null) => "- (none any more)".to_owned(),
                _ => text(client, "socket").to_owned(),
            },
        ]);
    }
    table(&rows, 3)
}

/// The answer to `stats` as a list of guests: what they hold and may hold, and what they are told.
pub fn guests(answer: &Value) -> String {
    let heading = [
        "guest", "state", "copies", "pages", "held", "quota", "weight", "pressure", "reclaim",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for client in list(answer, "clients") {
        rows.push(vec![
            text(client, "name").to_owned(),
            state(client).to_owned(),
            text(client, "copies").to_owned(),
            number(client, "pages_stored").to_string(),
            size::show(number(client, "mem_used_total")),
            size::show(number(client, "quota_bytes")),
            number(client, "weight").to_string(),
            number(client, "pressure").to_string(),
            size::show(number(client, "reclaim_bytes")),
        ]);
    }
    table(&rows, 3)
}

/// The answer to `stats` as a list of pools, of one client or of all.
pub fn pools(answer: &Value, client: Option<&str>) -> String {
    let heading = [
        "client",
        "pool",
        "kind",
        "pages",
        "data",
        "compressed",
        "puts",
        "gets",
        "missing",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for owner in list(answer, "clients") {
        let name = text(owner, "name");
        if client.is_some_and(|client| client != name) {
            continue;
        }
        for pool in list(owner, "pools") {
            rows.push(vec![
                name.to_owned(),
                number(pool, "id").to_string(),
                text(pool, "kind").to_owned(),
                number(pool, "pages_stored").to_string(),
                size::show(number(pool, "orig_data_size")),
                size::show(number(pool, "compr_data_size")),
                number(pool, "puts").to_string(),
                number(pool, "gets").to_string(),
                number(pool, "gets_missing").to_string(),
            ]);
        }
    }
    table(&rows, 3)
}

/// The answer to `guest.add` and `guest.set`.
pub fn guest(answer: &Value) -> String {
    format!(
        "{}: {}, on {}; quota {}, weight {}, copies {}, auto-squeeze {}; {} pages\n",
        text(answer, "client"),
        state(answer),
        text(answer, "socket"),
        size::show(number(answer, "quota_bytes")),
        number(answer, "weight"),
        text(answer, "copies"),
        if flag(answer, "auto_squeeze") {
            "on"
        } else {
            "off"
        },
        number(answer, "pages"),
    )
}

/// The answer to `stats.histogram`.
pub fn histogram(answer: &Value) -> String {
    let heading = [
        "client", "what", "timed", "50%", "90%", "99%", "99.9%", "most",
    ];
    let mut rows = vec![heading.map(str::to_owned).to_vec()];
    for client in list(answer, "clients") {
        for kind in ["put", "get", "queueing"] {
            let times = client.get(kind).unwrap_or(&Value::Null);
            let mut row = vec![text(client, "name").to_owned(), kind.to_owned()];
            row.push(number(times, "count").to_string());
            for name in ["p50_ns", "p90_ns", "p99_ns", "p999_ns", "max_ns"] {
                row.push(match times.get(name).and_then(Value::as_u64) {
                    None => "-".to_owned(),
                    Some(ns) => format!("{}.{:03} us", ns / 1000, ns % 1000),
                });
            }
            rows.push(row);
        }
    }
    format!(
        "{}one request in {} is timed\n",
        table(&rows, 2),
        number(answer, "timed_one_in")
    )
}

/// The answer to `store.compact`.
pub fn compacted(answer: &Value) -> String {
    format!(
        "{} spans emptied; held {} before, {} now\n",
        number(answer, "spans_emptied"),
        size::show(number(answer, "held_before")),
        size::show(number(answer, "held")),
    )
}

/// The answer to `store.recompress`.
pub fn recompressed(answer: &Value) -> String {
    format!(
        "{} pages are compressed twice; {} before, {} now\n",
        number(answer, "recompressed_pages"),
        size::show(number(answer, "compr_data_size_before")),
        size::show(number(answer, "compr_data_size")),
    )
}

/// A bar of up to `width` characters for `part` of `whole`.
fn bar(part: u64, whole: u64, width: u64) -> String {
    let length = u128::from(part) * u128::from(width) / u128::from(whole.max(1));
    let length = usize::try_from(length).unwrap_or(0);
    "#".repeat(length.max(usize::from(part > 0)))
}

/// The answer to `store.anatomy`.
pub fn anatomy(answer: &Value) -> String {
    const WIDTH: u64 = 40;
    let mut out = String::new();
    let sizes = list(answer, "sizes");
    // Eight of the daemon's buckets to a line.
    let mut lines: Vec<(u64, u64)> = Vec::new();
    for entry in sizes {
        let line = number(entry, "bytes_max").div_ceil(512) * 512;
        let images = number(entry, "images");
        match lines.last_mut() {
            Some((last, sum)) if *last == line => *sum += images,
            _ => lines.push((line, images)),
        }
    }
    let most = lines.iter().map(|(_, images)| *images).max().unwrap_or(0);
    let _ = writeln!(out, "images by size");
    for (bytes, images) in lines {
        let bar = bar(images, most, WIDTH);
        let _ = writeln!(out, "  up to {bytes:>5} B  {images:>10}  {bar}");
    }
    let ages = list(answer, "ages");
    let most = ages
        .iter()
        .map(|age| number(age, "bytes"))
        .max()
        .unwrap_or(0);
    let _ = writeln!(out, "bytes by age");
    for age in ages {
        let (seconds, bytes) = (number(age, "age_s_max"), number(age, "bytes"));
        let bar = bar(bytes, most, WIDTH);
        let _ = writeln!(
            out,
            "  up to {:>7}  {:>10}  {bar}",
            show_seconds(seconds),
            size::show(bytes)
        );
    }
    let _ = writeln!(
        out,
        "metadata  {}\ndamage    {} records lost, {} flipped bits corrected",
        size::show(number(answer, "metadata_bytes")),
        number(answer, "damaged_records"),
        number(answer, "corrected_bits"),
    );
    if let Some(recovery) = answer.get("recovery").filter(|_| answer.is_object()) {
        let _ = writeln!(
            out,
            "found     {} pages at the start, in {} ms; {} discarded",
            number(recovery, "pages"),
            number(recovery, "took_us") / 1000,
            number(recovery, "discarded"),
        );
    }
    out
}

fn show_seconds(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// The answer to `methods`.
pub fn methods(answer: &Value) -> String {
    let mut out = String::new();
    for method in list(answer, "methods") {
        let _ = writeln!(out, "{}({})", text(method, "name"), text(method, "params"));
        let _ = writeln!(out, "    {}", text(method, "description"));
    }
    out
}

/// The answer to `version`.
pub fn version(answer: &Value) -> String {
    format!(
        "{} {}, protocol {}, schema {}\n",
        text(answer, "daemon"),
        text(answer, "version"),
        number(answer, "protocol"),
        number(answer, "schema"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reading(puts: u64) -> Value {
        json!({
            "store": { "mem_used_total": 2 << 20, "capacity_bytes": 8 << 20, "orig_data_size": 5 << 20, "puts": puts },
            "clients": [{ "name": "vm1", "connected": true, "quota_bytes": 4 << 20, "puts": puts }],
        })
    }

    #[test]
    fn stats_are_shown_with_units() {
        let text = stats(&reading(10), None);
        assert!(text.contains("held      2 MiB of 8 MiB (25%)"), "{text}");
        assert!(text.contains("ratio     2.50"), "{text}");
        assert!(text.contains("vm1     connected"), "{text}");
        assert!(!text.contains("/s"), "{text}");
    }

    #[test]
    fn rates_are_of_the_time_between() {
        let before = reading(10);
        let text = stats(&reading(1010), Some((Duration::from_millis(500), &before)));
        assert!(text.contains("puts      1010, 2000/s;"), "{text}");
        assert!(
            text.lines().last().unwrap().ends_with("2000       0"),
            "{text}"
        );
    }

    #[test]
    fn an_answer_that_is_not_understood_is_no_panic() {
        for odd in [
            Value::Null,
            json!([]),
            json!({ "store": 1, "clients": 2 }),
            json!({ "clients": [null, 3] }),
        ] {
            let _ = (
                stats(&odd, Some((Duration::ZERO, &odd))),
                clients(&odd),
                (
                    guests(&odd),
                    pools(&odd, None),
                    guest(&odd),
                    histogram(&odd),
                ),
                methods(&odd),
                version(&odd),
                anatomy(&odd),
                compacted(&odd),
                recompressed(&odd),
            );
        }
    }
}
