// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Methods about the store as a whole.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::params::Nothing;
use crate::control::rpc::Error;
use crate::shared::Shared;
use crate::size;

#[derive(Serialize, JsonSchema)]
pub(super) struct Compacted {
    spans_emptied: u64,
    /// Bytes held before, and now.
    held_before: u64,
    held: u64,
}

pub(super) fn compact(shared: &Shared, _: Nothing) -> Result<Compacted, Error> {
    let held_before = shared.store.stats().mem_used_total;
    let spans_emptied = shared.store.compact();
    shared.guests.tell_of_room();
    let held = shared.store.stats().mem_used_total;
    log::info!(
        "compacted: {} held before, {} now",
        size::show(held_before),
        size::show(held)
    );
    Ok(Compacted {
        spans_emptied,
        held_before,
        held,
    })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Recompress {
    /// Only pages that were cold for so many seconds.
    #[serde(default)]
    cold_after_s: u32,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Recompressed {
    recompressed_pages: u64,
    compr_data_size_before: u64,
    compr_data_size: u64,
}

pub(super) fn recompress(shared: &Shared, wanted: Recompress) -> Result<Recompressed, Error> {
    let before = shared.store.stats();
    let cold_after = Duration::from_secs(wanted.cold_after_s.into());
    shared.store.recompress(cold_after);
    shared.guests.tell_of_room();
    let after = shared.store.stats();
    Ok(Recompressed {
        recompressed_pages: after.recompressed_pages,
        compr_data_size_before: before.compr_data_size,
        compr_data_size: after.compr_data_size,
    })
}

/// What the store consists of.
#[derive(Serialize, JsonSchema)]
pub(super) struct Anatomy {
    metadata_bytes: u64,
    sizes: Vec<SizeCount>,
    ages: Vec<AgeBytes>,
    damaged_records: u64,
    corrected_bits: u64,
    recovery: Recovery,
}

#[derive(Serialize, JsonSchema)]
struct SizeCount {
    /// The greatest size of this bucket.
    bytes_max: u64,
    images: u64,
}

#[derive(Serialize, JsonSchema)]
struct AgeBytes {
    /// Seconds since these were touched, at the most.
    age_s_max: u64,
    bytes: u64,
}

/// What was found in the arena when the daemon started.
#[derive(Serialize, JsonSchema)]
struct Recovery {
    pages: u64,
    discarded: u64,
    verified: bool,
    threads: u64,
    took_us: u64,
}

pub(super) fn anatomy(shared: &Shared, _: Nothing) -> Result<Anatomy, Error> {
    let store = &shared.store;
    let sizes = store.size_histogram().into_iter();
    let ages = store.age_distribution().into_iter();
    let (damaged_records, corrected_bits) = store.damage();
    let recovery = store.recovery();
    Ok(Anatomy {
        metadata_bytes: store.metadata_bytes(),
        sizes: sizes
            .map(|(bytes_max, images)| SizeCount { bytes_max, images })
            .collect(),
        ages: ages
            .map(|age| AgeBytes {
                age_s_max: age.age_s_max,
                bytes: age.bytes,
            })
            .collect(),
        damaged_records,
        corrected_bits,
        recovery: Recovery {
            pages: recovery.pages,
            discarded: recovery.discarded,
            verified: recovery.is_verified,
            threads: recovery.threads as u64,
            took_us: u64::try_from(recovery.took.as_micros()).unwrap_or(u64::MAX),
        },
    })
}
