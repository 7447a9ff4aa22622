// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guests that come, change and go while the daemon runs.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::params::Bytes;
use crate::balance::Copies;
use crate::client::Guest;
use crate::control::rpc::Error;
use crate::options::GuestOptions;
use crate::roster::Change;
use crate::shared::Shared;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Add {
    /// By which its account is known for ever.
    name: String,
    /// Where to listen for its QEMU; in one of the folders that the daemon was started with.
    socket: PathBuf,
    /// Bytes that it may hold, if the arena does not know it yet.
    quota: Option<Bytes>,
    /// What it counts for when the store is full, if the arena does not know it yet; 100 is usual.
    weight: Option<u32>,
    /// What becomes of the pool's copy of a page that it loaded back.
    copies: Option<Copies>,
    /// Whether it frees by itself what it does not use.
    auto_squeeze: Option<bool>,
    /// Whoever connects is taken for the virtual machine that was there before.
    #[serde(default)]
    trust_socket: bool,
}

/// A guest, as it is now.
#[derive(Serialize, JsonSchema)]
pub(super) struct GuestAnswer {
    client: String,
    socket: PathBuf,
    connected: bool,
    quota_bytes: u64,
    weight: u32,
    frozen: bool,
    copies: &'static str,
    auto_squeeze: bool,
    /// Pages that are stored for it.
    pages: u64,
    /// Bytes that are held for it. What is above the quota stays until it is taken back or flushed.
    held_bytes: u64,
}

impl GuestAnswer {
    fn of(guest: &Guest) -> Self {
        let (stats, policy) = (guest.account.stats(), guest.balance.policy());
        GuestAnswer {
            client: guest.name.clone(),
            socket: guest.socket.clone(),
            connected: guest.is_connected(),
            quota_bytes: guest.quota_bytes(),
            weight: guest.account.weight(),
            frozen: guest.account.is_frozen(),
            copies: policy.copies.name(),
            auto_squeeze: policy.auto_squeeze,
            pages: stats.pages_stored,
            held_bytes: stats.mem_used_total,
        }
    }
}

pub(super) fn add(shared: &Shared, wanted: Add) -> Result<GuestAnswer, Error> {
    let guest = shared.guests.add(&GuestOptions {
        name: wanted.name,
        socket: wanted.socket,
        trusts_socket: wanted.trust_socket,
        quota_bytes: wanted.quota.map(Bytes::read).transpose()?,
        weight: wanted.weight,
        copies: wanted.copies,
        auto_squeeze: wanted.auto_squeeze,
    })?;
    Ok(GuestAnswer::of(&guest))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Set {
    /// Its name.
    client: String,
    /// Bytes that it may hold.
    quota: Option<Bytes>,
    /// What it counts for when the store is full.
    weight: Option<u32>,
    /// Whether its puts are refused.
    frozen: Option<bool>,
    /// What becomes of the pool's copy of a page that it loaded back.
    copies: Option<Copies>,
    /// Whether it frees by itself what it does not use.
    auto_squeeze: Option<bool>,
}

pub(super) fn set(shared: &Shared, wanted: Set) -> Result<GuestAnswer, Error> {
    let change = Change {
        quota_bytes: wanted.quota.map(Bytes::read).transpose()?,
        weight: wanted.weight,
        frozen: wanted.frozen,
        copies: wanted.copies,
        auto_squeeze: wanted.auto_squeeze,
    };
    let guest = shared.guests.set(&wanted.client, &change)?;
    Ok(GuestAnswer::of(&guest))
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Remove {
    /// Its name.
    client: String,
    /// Also while it is connected.
    #[serde(default)]
    force: bool,
    /// Its pages and settings go, too.
    #[serde(default)]
    forget: bool,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Removed {
    client: String,
    /// Pages that were stored for it.
    pages: u64,
    /// Whether they are gone.
    forgotten: bool,
}

pub(super) fn remove(shared: &Shared, wanted: Remove) -> Result<Removed, Error> {
    let pages = shared
        .guests
        .remove(&wanted.client, wanted.force, wanted.forget)?;
    Ok(Removed {
        client: wanted.client,
        pages,
        forgotten: wanted.forget,
    })
}
