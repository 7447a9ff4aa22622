// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be asked for on the control socket.
//!
//! The table below is what `methods` answers with; a method that is not in it does not exist.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use cram_abi::wire;
use cram_store::{PoolId, PoolKind};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};

use crate::balance::{Copies, Errand};
use crate::client::{Guest, NO_INSTANCE};
use crate::control::rpc::{Error, INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND, NOT_FOUND};
use crate::server::Shared;
use crate::size;

/// Version of the answers' shapes. Fields may be added within one; none go, and none change.
pub const SCHEMA: u32 = 1;

struct Method {
    name: &'static str,
    params: &'static str,
    description: &'static str,
    run: fn(&Shared, &Map<String, Value>) -> Result<Value, Error>,
}

const METHODS: &[Method] = &[
    Method {
        name: "methods",
        params: "",
        description: "List the methods.",
        run: |_, params| none(params).map(|()| list()),
    },
    Method {
        name: "version",
        params: "",
        description: "The daemon's version, the protocol's, and that of these answers (schema).",
        run: |_, params| none(params).map(|()| version()),
    },
    Method {
        name: "stats",
        params: "",
        description: "Figures of the store, of each client and of each pool.",
        run: |shared, params| none(params).map(|()| stats(shared)),
    },
    Method {
        name: "clients",
        params: "",
        description: "The clients: name, socket, whether connected.",
        run: |shared, params| none(params).map(|()| clients(shared)),
    },
    Method {
        name: "client.quota",
        params: "client, bytes (number or size such as \"512M\"; optional)",
        description: "Tell a client's quota, or set it. Pages above a smaller quota stay.",
        run: quota,
    },
    Method {
        name: "client.weight",
        params: "client, weight (number; optional)",
        description: "Tell what a client counts for when the store is full, or set it. 100 is \
                      usual; who uses more than a share by weight gives way first.",
        run: weight,
    },
    Method {
        name: "client.reset",
        params: "client, force (true or false; optional)",
        description: "Drop all pools and pages of a client, which gets another generation. Its \
                      settings stay. With force also while it is connected: it loses what it has \
                      there.",
        run: reset,
    },
    Method {
        name: "client.remove",
        params: "client",
        description: "Forget a client that the arena knows and that has no socket, with its pages.",
        run: remove,
    },
    Method {
        name: "store.compact",
        params: "",
        description: "Move what is stored together, and give all that is free back to the host.",
        run: |shared, params| none(params).map(|()| compact(shared)),
    },
    Method {
        name: "store.recompress",
        params: "cold_after_s (number of seconds; optional: 0)",
        description: "Compress pages once more, and better, that were cold for so long.",
        run: recompress,
    },
    Method {
        name: "store.anatomy",
        params: "",
        description: "How large the stored images are (a count for each 64 bytes), how cold how \
                      much is, what is metadata, what was damaged, what was found at the start.",
        run: |shared, params| none(params).map(|()| anatomy(shared)),
    },
    Method {
        name: "client.freeze",
        params: "client",
        description: "Refuse all further puts of a client. Gets and flushes go on.",
        run: |shared, params| freeze(shared, params, true),
    },
    Method {
        name: "client.thaw",
        params: "client",
        description: "Undo client.freeze.",
        run: |shared, params| freeze(shared, params, false),
    },
    Method {
        name: "client.flush",
        params: "client, bytes (number or size; optional: all)",
        description: "Drop ephemeral pages of a client, which it expects at any time. Persistent \
                      pages are never dropped.",
        run: flush,
    },
    Method {
        name: "client.squeeze",
        params: "client, bytes (number or size) or pages (number); 0 ends it",
        description: "Ask a client to free so much of its own memory: its cold pages come to the \
                      pool, slower while its tasks wait for memory. \"stats\" says how it goes.",
        run: squeeze,
    },
    Method {
        name: "client.give_back",
        params: "client, bytes (number or size) or pages (number); 0 ends it",
        description: "Ask a client to take pages back into its own memory, as far as it has free \
                      memory for them. \"stats\" says how it goes.",
        run: give_back,
    },
    Method {
        name: "client.policy",
        params: "client, copies (\"free\", \"keep\" or \"adaptive\"; optional), auto_squeeze \
                 (true or false; optional)",
        description: "Tell, or set, what becomes of the pool's copy of a page that the client \
                      loaded back, and whether it frees by itself what it does not use.",
        run: policy,
    },
    Method {
        name: "pool.authorise",
        params: "client, uuid, revoke (true or false; optional)",
        description: "Let a client make the shared pool of that uuid, or with revoke no longer.",
        run: authorise,
    },
];

/// Calls a method.
pub fn call(shared: &Shared, name: &str, params: &Map<String, Value>) -> Result<Value, Error> {
    match METHODS.iter().find(|method| method.name == name) {
        Some(method) => (method.run)(shared, params),
        None => Err(Error::new(
            METHOD_NOT_FOUND,
            format!("there is no method \"{name}\"; \"methods\" lists them"),
        )),
    }
}

fn params<P: DeserializeOwned>(params: &Map<String, Value>) -> Result<P, Error> {
    serde_json::from_value(Value::Object(params.clone()))
        .map_err(|error| Error::new(INVALID_PARAMS, error.to_string()))
}

fn none(given: &Map<String, Value>) -> Result<(), Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {}
    params::<Params>(given).map(|Params {}| ())
}

fn guest<'a>(shared: &'a Shared, name: &str) -> Result<&'a Arc<Guest>, Error> {
    shared.guest(name).ok_or_else(|| {
        let names: Vec<_> = shared
            .guests
            .iter()
            .map(|guest| guest.name.as_str())
            .collect();
        Error::new(
            NOT_FOUND,
            format!(
                "there is no client \"{name}\"; there are: {}",
                names.join(", ")
            ),
        )
    })
}

fn list() -> Value {
    let entry = |method: &Method| json!({ "name": method.name, "params": method.params, "description": method.description });
    json!({ "methods": METHODS.iter().map(entry).collect::<Vec<_>>() })
}

fn version() -> Value {
    json!({
        "daemon": env!("CARGO_PKG_NAME"),
        "version": env!("CARGO_PKG_VERSION"),
        "protocol": wire::VERSION,
        "schema": SCHEMA,
    })
}

fn object(named: Vec<(&'static str, u64)>) -> Map<String, Value> {
    named
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value.into()))
        .collect()
}

fn with(mut figures: Map<String, Value>, more: Value) -> Value {
    if let Value::Object(more) = more {
        figures.extend(more);
    }
    Value::Object(figures)
}

fn stats(shared: &Shared) -> Value {
    let store = with(
        object(shared.store.stats().named()),
        json!({
            "capacity_bytes": shared.store.capacity_bytes(),
            "pressure": shared.store.pressure(),
            "generation": write_generation(shared.store.generation()),
        }),
    );
    let clients: Vec<_> = shared
        .guests
        .iter()
        .map(|guest| client_stats(guest))
        .collect();
    json!({
        "schema": SCHEMA,
        "uptime_ms": u64::try_from(shared.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        "store": store,
        "clients": clients,
    })
}

fn client_stats(guest: &Guest) -> Value {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let counters = &guest.counters;
    let reclaim = guest.store.reclaim_target(&guest.account);
    let policy = guest.balance.policy();
    let pools = guest.account.pools().into_iter();
    let pools: Vec<_> = pools
        .map(|(PoolId(id), pool)| {
            let (kind, uuid) = match pool.spec().kind {
                PoolKind::Persistent => ("persistent", None),
                PoolKind::PrivateEphemeral => ("ephemeral", None),
                PoolKind::SharedEphemeral { uuid } => ("shared", Some(write_uuid(&uuid))),
            };
            let about = json!({
                "id": id,
                "kind": kind,
                "uuid": uuid,
                "refuse_incompressible": pool.spec().refuse_incompressible,
            });
            with(object(pool.stats().named()), about)
        })
        .collect();
    let about = json!({
        "name": guest.name,
        "socket": guest.socket,
        "connected": guest.is_connected(),
        "frozen": guest.account.is_frozen(),
        "generation": write_generation(guest.account.generation()),
        "identified": guest.account.instance() != NO_INSTANCE,
        "quota_bytes": guest.quota_bytes(),
        "weight": guest.account.weight(),
        "pressure": guest.pressure(),
        "copies": policy.copies.name(),
        "auto_squeeze": policy.auto_squeeze,
        "squeeze": errand(&guest.balance.squeeze()),
        "give_back": errand(&guest.balance.give_back()),
        "guest_memory": guest.balance.memory().map(|memory| {
            json!({ "free_pages": memory.free, "total_pages": memory.total })
        }),
        "reclaim_bytes": reclaim.bytes,
        "reclaim_pages": reclaim.pages,
        "device": {
            "connections": read(&counters.connections),
            "requests": read(&counters.requests),
            "malformed": read(&counters.malformed),
            "interrupts": read(&counters.interrupts),
            "wakeups": read(&counters.wakeups),
            "queues_stopped": read(&counters.queues_stopped),
            "events": read(&counters.events),
            "first_touch_bytes": guest.first_touch.touched_bytes(),
        },
        "pools": pools,
    });
    with(object(guest.account.stats().named()), about)
}

fn clients(shared: &Shared) -> Value {
    let entry = |guest: &Arc<Guest>| {
        json!({
            "name": guest.name,
            "socket": guest.socket,
            "connected": guest.is_connected(),
            "frozen": guest.account.is_frozen(),
        })
    };
    let mut clients: Vec<_> = shared.guests.iter().map(entry).collect();
    for client in shared.store.clients() {
        if shared.guest(client.name()).is_none() {
            clients.push(json!({
                "name": client.name(),
                "socket": null,
                "connected": false,
                "frozen": client.is_frozen(),
            }));
        }
    }
    json!({ "clients": clients })
}

fn weight(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        client: String,
        weight: Option<u32>,
    }
    let wanted: Params = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    if let Some(weight) = wanted.weight {
        guest.account.set_weight(weight);
        log::info!("{}: weight set to {weight}", guest.name);
    }
    Ok(json!({ "client": guest.name, "weight": guest.account.weight() }))
}

fn reset(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        client: String,
        #[serde(default)]
        force: bool,
    }
    let wanted: Params = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    let pages = guest
        .reset(wanted.force)
        .map_err(|error| Error::new(INTERNAL_ERROR, error.to_string()))?
        .ok_or_else(|| {
            let name = &guest.name;
            let message = format!(
                "\"{name}\" is connected, and would lose what it has in its pages; \"force\" does \
                 it all the same"
            );
            Error::new(INVALID_PARAMS, message)
        })?;
    Ok(json!({
        "client": guest.name,
        "pages": pages,
        "generation": write_generation(guest.account.generation()),
    }))
}

fn remove(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    let wanted: OnlyClient = params(given)?;
    let name = wanted.client;
    if shared.guest(&name).is_some() {
        return Err(Error::new(
            INVALID_PARAMS,
            format!(
                "\"{name}\" has a socket; only clients without one can be removed, and \
                 \"client.reset\" drops the pages of the others"
            ),
        ));
    }
    let pages = shared
        .store
        .client(&name)
        .map(|client| client.stats().pages_stored);
    match pages {
        Some(pages) if shared.store.remove_client(&name) => {
            tell_of_room(shared);
            log::info!("{name}: removed, with {pages} pages");
            Ok(json!({ "client": name, "pages": pages }))
        }
        _ => Err(Error::new(
            NOT_FOUND,
            format!("the arena knows no client \"{name}\""),
        )),
    }
}

/// There may be room for the guests that were told that there is none.
fn tell_of_room(shared: &Shared) {
    if let Some(guest) = shared.guests.first() {
        guest.announcer.poke();
    }
}

fn compact(shared: &Shared) -> Value {
    let before = shared.store.stats().mem_used_total;
    let spans = shared.store.compact();
    tell_of_room(shared);
    let after = shared.store.stats().mem_used_total;
    log::info!(
        "compacted: {} held before, {} now",
        size::show(before),
        size::show(after)
    );
    json!({ "spans_emptied": spans, "held_before": before, "held": after })
}

fn recompress(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        #[serde(default)]
        cold_after_s: u32,
    }
    let wanted: Params = params(given)?;
    let before = shared.store.stats();
    let cold_after = Duration::from_secs(wanted.cold_after_s.into());
    shared.store.recompress(cold_after);
    tell_of_room(shared);
    let after = shared.store.stats();
    Ok(json!({
        "recompressed_pages": after.recompressed_pages,
        "compr_data_size_before": before.compr_data_size,
        "compr_data_size": after.compr_data_size,
    }))
}

fn anatomy(shared: &Shared) -> Value {
    let store = &shared.store;
    let sizes: Vec<_> = store
        .size_histogram()
        .into_iter()
        .map(|(bytes_max, images)| json!({ "bytes_max": bytes_max, "images": images }))
        .collect();
    let ages: Vec<_> = store
        .age_distribution()
        .into_iter()
        .map(|age| json!({ "age_s_max": age.age_s_max, "bytes": age.bytes }))
        .collect();
    let (damaged_records, corrected_bits) = store.damage();
    let recovery = store.recovery();
    json!({
        "metadata_bytes": store.metadata_bytes(),
        "sizes": sizes,
        "ages": ages,
        "damaged_records": damaged_records,
        "corrected_bits": corrected_bits,
        "recovery": {
            "pages": recovery.pages,
            "discarded": recovery.discarded,
            "verified": recovery.is_verified,
            "threads": recovery.threads,
            "took_us": u64::try_from(recovery.took.as_micros()).unwrap_or(u64::MAX),
        },
    })
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Bytes {
    Number(u64),
    Text(String),
}

impl Bytes {
    fn read(self) -> Result<u64, Error> {
        match self {
            Bytes::Number(bytes) => Ok(bytes),
            Bytes::Text(text) => {
                size::parse(&text).map_err(|error| Error::new(INVALID_PARAMS, error))
            }
        }
    }
}

fn quota(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        client: String,
        bytes: Option<Bytes>,
    }
    let wanted: Params = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    if let Some(bytes) = wanted.bytes.map(Bytes::read).transpose()? {
        let capacity = shared.store.capacity_bytes();
        if bytes > capacity {
            return Err(Error::new(
                INVALID_PARAMS,
                format!(
                    "{} is more than the store's capacity of {}",
                    size::show(bytes),
                    size::show(capacity)
                ),
            ));
        }
        guest.account.set_quota(Some(bytes));
        guest.announcer.poke();
        log::info!("{}: quota set to {}", guest.name, size::show(bytes));
    }
    Ok(json!({ "client": guest.name, "quota_bytes": guest.quota_bytes() }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct OnlyClient {
    client: String,
}

fn freeze(shared: &Shared, given: &Map<String, Value>, frozen: bool) -> Result<Value, Error> {
    let wanted: OnlyClient = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    guest.account.freeze(frozen);
    guest.announcer.poke();
    log::info!(
        "{}: {}",
        guest.name,
        if frozen { "frozen" } else { "thawed" }
    );
    Ok(json!({ "client": guest.name, "frozen": frozen }))
}

fn flush(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        client: String,
        bytes: Option<Bytes>,
    }
    let wanted: Params = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    let bytes = wanted.bytes.map(Bytes::read).transpose()?;
    let pages = guest.account.evict(bytes.unwrap_or(u64::MAX));
    guest.announcer.poke();
    log::info!("{}: {pages} ephemeral pages dropped", guest.name);
    Ok(json!({ "client": guest.name, "pages": pages }))
}

/// A client, and so much of its memory.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Amount {
    client: String,
    bytes: Option<Bytes>,
    pages: Option<u32>,
}

impl Amount {
    /// In pages, rounded down.
    fn pages(&mut self) -> Result<u32, Error> {
        match (self.bytes.take(), self.pages) {
            (Some(bytes), None) => {
                let pages = bytes.read()? / wire::PAGE_SIZE as u64;
                Ok(u32::try_from(pages).unwrap_or(u32::MAX))
            }
            (None, Some(pages)) => Ok(pages),
            _ => Err(Error::new(INVALID_PARAMS, "give either bytes or pages")),
        }
    }
}

fn give_back(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    let mut wanted: Amount = params(given)?;
    let pages = wanted.pages()?;
    let guest = guest(shared, &wanted.client)?;
    guest.ask_to_give_back(pages);
    log::info!("{}: asked to take back {pages} pages", guest.name);
    Ok(json!({
        "client": guest.name,
        "pages": pages,
        "connected": guest.is_connected(),
    }))
}

fn squeeze(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    let mut wanted: Amount = params(given)?;
    let pages = wanted.pages()?;
    let guest = guest(shared, &wanted.client)?;
    if !guest.ask_to_shrink(pages) {
        return Err(Error::new(
            INVALID_PARAMS,
            format!(
                "{} is not connected, or its driver is too old to be squeezed",
                guest.name
            ),
        ));
    }
    log::info!("{}: asked to free {pages} pages", guest.name);
    Ok(json!({ "client": guest.name, "pages": pages }))
}

fn policy(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        client: String,
        copies: Option<Copies>,
        auto_squeeze: Option<bool>,
    }
    let wanted: Params = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    let mut now = guest.balance.policy();
    now.copies = wanted.copies.unwrap_or(now.copies);
    now.auto_squeeze = wanted.auto_squeeze.unwrap_or(now.auto_squeeze);
    if now != guest.balance.policy() {
        guest.balance.set_policy(now);
        guest.announcer.poke();
        log::info!(
            "{}: copies {}, auto_squeeze {}",
            guest.name,
            now.copies.name(),
            now.auto_squeeze
        );
    }
    Ok(json!({
        "client": guest.name,
        "copies": now.copies.name(),
        "auto_squeeze": now.auto_squeeze,
    }))
}

fn errand(errand: &Errand) -> Value {
    json!({
        "state": errand.state_name(),
        "asked_pages": errand.asked,
        "done_pages": errand.done,
    })
}

fn authorise(shared: &Shared, given: &Map<String, Value>) -> Result<Value, Error> {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Params {
        client: String,
        uuid: String,
        #[serde(default)]
        revoke: bool,
    }
    let wanted: Params = params(given)?;
    let guest = guest(shared, &wanted.client)?;
    let uuid = read_uuid(&wanted.uuid).ok_or_else(|| {
        Error::new(
            INVALID_PARAMS,
            format!(
                "\"{}\" is not a uuid, such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8",
                wanted.uuid
            ),
        )
    })?;
    if wanted.revoke {
        guest.account.revoke(&uuid);
    } else {
        guest.account.authorise(uuid);
    }
    Ok(json!({
        "client": guest.name,
        "uuid": write_uuid(&uuid),
        "authorised": !wanted.revoke,
    }))
}

/// A string: JSON's numbers do not hold 64 bits everywhere.
fn write_generation(generation: u64) -> String {
    format!("{generation:016x}")
}

fn write_uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (k, byte) in uuid.iter().enumerate() {
        if matches!(k, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Reads a uuid with or without hyphens. The one that is all zeros names no pool.
fn read_uuid(text: &str) -> Option<[u8; 16]> {
    let hyphens = [8, 13, 18, 23];
    let is_plain = text.len() == 32;
    let is_hyphened = text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(k, byte)| (byte == b'-') == hyphens.contains(&k));
    if !is_plain && !is_hyphened {
        return None;
    }
    let mut uuid = [0u8; 16];
    let mut digits = text.chars().filter(|&c| c != '-' || is_plain);
    for byte in &mut uuid {
        let (high, low) = (digits.next()?.to_digit(16)?, digits.next()?.to_digit(16)?);
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    (uuid != [0; 16]).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_and_written() {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let uuid = read_uuid(text).unwrap();
        assert_eq!(write_uuid(&uuid), text);
        assert_eq!(read_uuid(&text.replace('-', "")), Some(uuid));
        for wrong in [
            "",
            "6ba7b810",
            "6ba7b8109-dad-11d1-80b4-00c04fd430c8",
            &"0".repeat(32),
            &"-".repeat(32),
            &"é".repeat(16),
        ] {
            assert_eq!(read_uuid(wrong), None, "{wrong}");
        }
    }
}
