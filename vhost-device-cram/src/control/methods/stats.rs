// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cram_store::{Pool, PoolId, PoolKind};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::SCHEMA;
use super::params::{Nothing, guest, write_generation, write_uuid};
use crate::balance;
use crate::client::{Guest, NO_INSTANCE};
use crate::control::rpc::Error;
use crate::figures::{Kind, TIMED};
use crate::shared::Shared;

/// Figures by name, as docs/control.md explains them.
type Figures = BTreeMap<&'static str, u64>;

/// The answer to "stats".
#[derive(Serialize, JsonSchema)]
pub(super) struct Stats {
    schema: u32,
    /// Since the daemon started.
    uptime_ms: u64,
    store: StoreStats,
    clients: Vec<ClientStats>,
}

#[derive(Serialize, JsonSchema)]
struct StoreStats {
    #[serde(flatten)]
    figures: Figures,
    capacity_bytes: u64,
    /// 0 to 1000.
    pressure: u32,
    /// Sixteen hexadecimal digits.
    generation: String,
}

#[derive(Serialize, JsonSchema)]
struct ClientStats {
    #[serde(flatten)]
    figures: Figures,
    name: String,
    socket: PathBuf,
    connected: bool,
    frozen: bool,
    /// Sixteen hexadecimal digits; others when its pages were dropped.
    generation: String,
    /// Whether its front-end said which virtual machine it is.
    identified: bool,
    quota_bytes: u64,
    weight: u32,
    /// 0 to 1000.
    pressure: u32,
    /// "free", "keep" or "adaptive".
    copies: &'static str,
    auto_squeeze: bool,
    squeeze: Errand,
    give_back: Errand,
    /// As its driver last reported it.
    guest_memory: Option<GuestMemory>,
    /// What it should take back so that the store comes below its low watermark.
    reclaim_bytes: u64,
    reclaim_pages: u64,
    device: DeviceStats,
    pools: Vec<PoolStats>,
}

/// Something that a guest was asked for.
#[derive(Serialize, JsonSchema)]
struct Errand {
    /// "none", "asked", "working", "throttled", "done" or "stopped".
    state: &'static str,
    asked_pages: u32,
    done_pages: u32,
}

#[derive(Serialize, JsonSchema)]
struct GuestMemory {
    free_pages: u32,
    total_pages: u32,
}

/// What the guest's connections did since the daemon started.
#[derive(Serialize, JsonSchema)]
struct DeviceStats {
    connections: u64,
    requests: u64,
    malformed: u64,
    interrupts: u64,
    wakeups: u64,
    queues_stopped: u64,
    /// Bytes of its memory that the daemon touched before anybody else did.
    first_touch_bytes: u64,
    events: u64,
}

#[derive(Serialize, JsonSchema)]
struct PoolStats {
    #[serde(flatten)]
    figures: Figures,
    id: u32,
    /// "persistent", "ephemeral" or "shared".
    kind: &'static str,
    /// Of a shared pool.
    uuid: Option<String>,
    refuse_incompressible: bool,
}

pub(super) fn stats(shared: &Shared, _: Nothing) -> Result<Stats, Error> {
    let store = &shared.store;
    let guests = shared.guests.list();
    Ok(Stats {
        schema: SCHEMA,
        uptime_ms: u64::try_from(shared.started.elapsed().as_millis()).unwrap_or(u64::MAX),
        store: StoreStats {
            figures: store.stats().named().into_iter().collect(),
            capacity_bytes: store.capacity_bytes(),
            pressure: store.pressure(),
            generation: write_generation(store.generation()),
        },
        clients: guests.iter().map(|guest| client(guest)).collect(),
    })
}

fn client(guest: &Guest) -> ClientStats {
    let reclaim = guest.store.reclaim_target(&guest.account);
    let policy = guest.balance.policy();
    let memory = guest.balance.memory();
    let pools = guest.account.pools().into_iter();
    ClientStats {
        figures: guest.account.stats().named().into_iter().collect(),
        name: guest.name.clone(),
        socket: guest.socket.clone(),
        connected: guest.is_connected(),
        frozen: guest.account.is_frozen(),
        generation: write_generation(guest.account.generation()),
        identified: guest.account.instance() != NO_INSTANCE,
        quota_bytes: guest.quota_bytes(),
        weight: guest.account.weight(),
        pressure: guest.pressure(),
        copies: policy.copies.name(),
        auto_squeeze: policy.auto_squeeze,
        squeeze: errand(&guest.balance.squeeze()),
        give_back: errand(&guest.balance.give_back()),
        guest_memory: memory.map(|memory| GuestMemory {
            free_pages: memory.free,
            total_pages: memory.total,
        }),
        reclaim_bytes: reclaim.bytes,
        reclaim_pages: reclaim.pages,
        device: device(guest),
        pools: pools.map(|(id, of)| pool(id, &of)).collect(),
    }
}

fn device(guest: &Guest) -> DeviceStats {
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (counters, sums) = (&guest.counters, guest.figures.sums());
    DeviceStats {
        connections: read(&counters.connections),
        requests: sums.requests,
        malformed: sums.malformed,
        interrupts: sums.interrupts,
        wakeups: sums.wakeups,
        queues_stopped: read(&counters.queues_stopped),
        first_touch_bytes: guest.first_touch.touched_bytes(),
        events: sums.events,
    }
}

fn pool(PoolId(id): PoolId, pool: &Pool) -> PoolStats {
    let (kind, uuid) = match pool.spec().kind {
        PoolKind::Persistent => ("persistent", None),
        PoolKind::PrivateEphemeral => ("ephemeral", None),
        PoolKind::SharedEphemeral { uuid } => ("shared", Some(write_uuid(&uuid))),
    };
    PoolStats {
        figures: pool.stats().named().into_iter().collect(),
        id,
        kind,
        uuid,
        refuse_incompressible: pool.spec().refuse_incompressible,
    }
}

fn errand(errand: &balance::Errand) -> Errand {
    Errand {
        state: errand.state_name(),
        asked_pages: errand.asked,
        done_pages: errand.done,
    }
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OfWhom {
    /// Only of this one.
    client: Option<String>,
}

/// The answer to "stats.histogram".
#[derive(Serialize, JsonSchema)]
pub(super) struct Histograms {
    /// One request of so many was timed, whatever it was.
    timed_one_in: u32,
    clients: Vec<ClientHistograms>,
}

#[derive(Serialize, JsonSchema)]
struct ClientHistograms {
    name: String,
    /// From a put's being taken from the ring to its being answered, all its pages together.
    put: Times,
    /// The same of a get.
    get: Times,
    /// From a worker's seeing a request in the ring to its taking it.
    queueing: Times,
}

/// Times in nanoseconds; buckets are an eighth of a power of two wide.
#[derive(Serialize, JsonSchema)]
struct Times {
    count: u64,
    sum_ns: u64,
    /// What half, nine tenths and so on do not exceed; none while there is no time.
    p50_ns: Option<u64>,
    p90_ns: Option<u64>,
    p99_ns: Option<u64>,
    p999_ns: Option<u64>,
    max_ns: Option<u64>,
    /// Those that count something, the shortest first.
    buckets: Vec<Bucket>,
}

#[derive(Serialize, JsonSchema)]
struct Bucket {
    /// The longest time of this bucket.
    ns_max: u64,
    count: u64,
}

pub(super) fn histogram(shared: &Shared, wanted: OfWhom) -> Result<Histograms, Error> {
    let guests = match wanted.client {
        Some(name) => vec![guest(shared, &name)?],
        None => shared.guests.list(),
    };
    let of = |guest: &Arc<Guest>| ClientHistograms {
        name: guest.name.clone(),
        put: times(guest, Kind::Put),
        get: times(guest, Kind::Get),
        queueing: times(guest, Kind::Queueing),
    };
    Ok(Histograms {
        timed_one_in: TIMED,
        clients: guests.iter().map(of).collect(),
    })
}

fn times(guest: &Guest, kind: Kind) -> Times {
    let histogram = guest.figures.histogram(kind);
    Times {
        count: histogram.count(),
        sum_ns: histogram.sum_ns,
        p50_ns: histogram.quantile_ns(500),
        p90_ns: histogram.quantile_ns(900),
        p99_ns: histogram.quantile_ns(990),
        p999_ns: histogram.quantile_ns(999),
        max_ns: histogram.quantile_ns(1000),
        buckets: histogram
            .buckets()
            .map(|(ns_max, count)| Bucket { ns_max, count })
            .collect(),
    }
}

/// The answer to "clients".
#[derive(Serialize, JsonSchema)]
pub(super) struct Clients {
    clients: Vec<ClientEntry>,
}

#[derive(Serialize, JsonSchema)]
struct ClientEntry {
    name: String,
    /// None, when the arena knows it and nobody listens for it.
    socket: Option<PathBuf>,
    connected: bool,
    frozen: bool,
}

pub(super) fn clients(shared: &Shared, _: Nothing) -> Result<Clients, Error> {
    let entry = |guest: &Arc<Guest>| ClientEntry {
        name: guest.name.clone(),
        socket: Some(guest.socket.clone()),
        connected: guest.is_connected(),
        frozen: guest.account.is_frozen(),
    };
    let mut clients: Vec<_> = shared.guests.list().iter().map(entry).collect();
    for client in shared.store.clients() {
        if shared.guests.get(client.name()).is_none() {
            clients.push(ClientEntry {
                name: client.name().to_owned(),
                socket: None,
                connected: false,
                frozen: client.is_frozen(),
            });
        }
    }
    Ok(Clients { clients })
}
