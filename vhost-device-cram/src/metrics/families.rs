// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which metrics there are, and where their values come from.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use cram_store::Stats;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::registry::Unit;

use crate::client::Guest;
use crate::figures::{Kind, TIMED};
use crate::shared::Shared;

/// All metrics of a daemon.
pub(super) struct All(pub(super) Arc<Shared>);

impl fmt::Debug for All {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("All")
    }
}

/// A metric of the store's figures, which each guest has, too.
struct Family {
    name: &'static str,
    help: &'static str,
    is_bytes: bool,
    kind: MetricType,
    value: fn(&Stats) -> u64,
}

const fn gauge(name: &'static str, help: &'static str, value: fn(&Stats) -> u64) -> Family {
    Family {
        name,
        help,
        is_bytes: false,
        kind: MetricType::Gauge,
        value,
    }
}

const fn bytes(name: &'static str, help: &'static str, value: fn(&Stats) -> u64) -> Family {
    Family {
        name,
        help,
        is_bytes: true,
        kind: MetricType::Gauge,
        value,
    }
}

const fn counter(name: &'static str, help: &'static str, value: fn(&Stats) -> u64) -> Family {
    Family {
        name,
        help,
        is_bytes: false,
        kind: MetricType::Counter,
        value,
    }
}

const FAMILIES: &[Family] = &[
    bytes("held", "Bytes held, metadata included", |of| {
        of.mem_used_total
    }),
    bytes("limit", "Bytes that may be held; 0 without a limit", |of| {
        of.mem_limit
    }),
    bytes(
        "original",
        "Bytes of the stored pages as guests see them",
        |of| of.orig_data_size,
    ),
    bytes("compressed", "Bytes of their compressed images", |of| {
        of.compr_data_size
    }),
    gauge("pages", "Pages that are stored", |of| of.pages_stored),
    gauge(
        "same_filled_pages",
        "Pages that are one repeated word",
        |of| of.same_pages,
    ),
    gauge(
        "incompressible_pages",
        "Pages that did not compress",
        |of| of.huge_pages,
    ),
    gauge(
        "sharing_pages",
        "Pages that have their bytes from an image of several",
        |of| of.pages_sharing,
    ),
    counter("puts", "Pages that were to be put", |of| of.puts),
    counter("puts_refused", "Pages that were refused", |of| {
        of.puts_refused
    }),
    counter(
        "puts_refused_no_space",
        "Pages refused since the store was full",
        |of| of.refused_no_space,
    ),
    counter(
        "puts_refused_over_quota",
        "Pages refused since the quota was used up",
        |of| of.refused_over_quota,
    ),
    counter(
        "puts_refused_frozen",
        "Pages refused since the guest was frozen",
        |of| of.refused_frozen,
    ),
    counter("gets", "Pages that were to be got", |of| of.gets),
    counter("gets_missing", "Gets that found nothing", |of| {
        of.gets_missing
    }),
    counter("gets_corrupt", "Gets that found a damaged page", |of| {
        of.gets_corrupt
    }),
    counter("flushes", "Pages that were flushed", |of| of.flushes),
    counter(
        "evicted_pages",
        "Ephemeral pages evicted to make room",
        |of| of.evicted_pages,
    ),
];

/// A metric of each guest's.
struct GuestFamily {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    value: fn(&Guest) -> u64,
}

const GUEST_FAMILIES: &[GuestFamily] = &[
    GuestFamily {
        name: "guest_connected",
        help: "Whether a front-end is connected",
        kind: MetricType::Gauge,
        value: |guest| guest.is_connected().into(),
    },
    GuestFamily {
        name: "guest_frozen",
        help: "Whether its puts are refused",
        kind: MetricType::Gauge,
        value: |guest| guest.account.is_frozen().into(),
    },
    GuestFamily {
        name: "guest_pressure",
        help: "0, free, to 1000, nothing is taken",
        kind: MetricType::Gauge,
        value: |guest| guest.pressure().into(),
    },
    GuestFamily {
        name: "guest_weight",
        help: "What it counts for when the store is full",
        kind: MetricType::Gauge,
        value: |guest| guest.account.weight().into(),
    },
    GuestFamily {
        name: "guest_requests",
        help: "Requests completed",
        kind: MetricType::Counter,
        value: |guest| guest.figures.sums().requests,
    },
    GuestFamily {
        name: "guest_requests_malformed",
        help: "Requests that were malformed",
        kind: MetricType::Counter,
        value: |guest| guest.figures.sums().malformed,
    },
    GuestFamily {
        name: "guest_queues_stopped",
        help: "Queues stopped since their ring could not be trusted",
        kind: MetricType::Counter,
        value: |guest| guest.counters.queues_stopped.load(Ordering::Relaxed),
    },
    GuestFamily {
        name: "guest_connections",
        help: "Connections accepted",
        kind: MetricType::Counter,
        value: |guest| guest.counters.connections.load(Ordering::Relaxed),
    },
];

impl Collector for All {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let (store, guests) = (&self.0.store, self.0.guests.list());
        let encoder = &mut encoder;
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        encoder
            .encode_descriptor("build", "The daemon", None, MetricType::Info)?
            .encode_info(&version)?;
        let stats = store.stats();
        for family in FAMILIES {
            let name = format!("store_{}", family.name);
            let unit = family.is_bytes.then_some(&Unit::Bytes);
            let mut metric = encoder.encode_descriptor(&name, family.help, unit, family.kind)?;
            encode_one(&mut metric, family.kind, (family.value)(&stats))?;
        }
        for (name, help, value) in [
            (
                "store_pressure",
                "0, free, to 1000, full",
                store.pressure().into(),
            ),
            (
                "store_damaged_records",
                "Records found damaged beyond repair",
                store.damage().0,
            ),
            (
                "store_corrected_bits",
                "Flipped bits that were corrected",
                store.damage().1,
            ),
            ("guests", "Guests that may connect", guests.len() as u64),
        ] {
            let kind = MetricType::Gauge;
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            encode_one(&mut metric, kind, value)?;
        }
        let of_guests: Vec<_> = guests.iter().map(|guest| guest.account.stats()).collect();
        for family in FAMILIES {
            let name = format!("guest_{}", family.name);
            let unit = family.is_bytes.then_some(&Unit::Bytes);
            let mut metric = encoder.encode_descriptor(&name, family.help, unit, family.kind)?;
            for (guest, stats) in guests.iter().zip(&of_guests) {
                let labels = [("guest", guest.name.as_str())];
                let mut one = metric.encode_family(&labels)?;
                encode_one(&mut one, family.kind, (family.value)(stats))?;
            }
        }
        for family in GUEST_FAMILIES {
            let mut metric =
                encoder.encode_descriptor(family.name, family.help, None, family.kind)?;
            for guest in &guests {
                let labels = [("guest", guest.name.as_str())];
                let mut one = metric.encode_family(&labels)?;
                encode_one(&mut one, family.kind, (family.value)(guest))?;
            }
        }
        encode_times(encoder, &guests)
    }
}

fn encode_one(
    metric: &mut prometheus_client::encoding::MetricEncoder<'_>,
    kind: MetricType,
    value: u64,
) -> fmt::Result {
    match kind {
        MetricType::Counter => metric.encode_counter::<NoLabelSet, _, u64>(&value, None),
        // A gauge is a signed number there.
        _ => metric.encode_gauge(&i64::try_from(value).unwrap_or(i64::MAX)),
    }
}

/// The bounds of buckets: powers of two, from a microsecond to four seconds.
const BOUNDS: std::ops::RangeInclusive<u32> = 10..=32;

#[allow(
    clippy::cast_precision_loss,
    reason = "seconds are shown as floating-point numbers, and nothing is decided by them"
)]
fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

fn encode_times(encoder: &mut DescriptorEncoder<'_>, guests: &[Arc<Guest>]) -> fmt::Result {
    let help = format!(
        "How long puts and gets took, and requests waited for those before them; one request in \
         {TIMED} is timed"
    );
    let (unit, kind) = (Unit::Seconds, MetricType::Histogram);
    let mut metric = encoder.encode_descriptor("guest_request", &help, Some(&unit), kind)?;
    for guest in guests {
        for kind in Kind::ALL {
            let times = guest.figures.histogram(kind);
            let mut before = 0;
            let mut buckets: Vec<_> = BOUNDS
                .map(|power| {
                    let up_to = times.up_to((1 << power) - 1);
                    let count = up_to - before;
                    before = up_to;
                    (seconds(1 << power), count)
                })
                .collect();
            let count = times.count();
            buckets.push((f64::INFINITY, count - before));
            let labels = [("guest", guest.name.as_str()), ("kind", kind.name())];
            let mut one = metric.encode_family(&labels)?;
            one.encode_histogram::<NoLabelSet>(seconds(times.sum_ns), count, &buckets, None)?;
        }
    }
    Ok(())
}
