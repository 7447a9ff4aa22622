// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Methods about one client.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::params::{Amount, Bytes, OnlyClient, guest, read_uuid, write_generation, write_uuid};
use crate::balance::Copies;
use crate::control::rpc::{Error, INTERNAL_ERROR, INVALID_PARAMS, NOT_FOUND};
use crate::roster::Change;
use crate::shared::Shared;

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Quota {
    client: String,
    /// The new one.
    bytes: Option<Bytes>,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct QuotaAnswer {
    client: String,
    quota_bytes: u64,
    /// Bytes that are held for it. What is above the quota stays until it is taken back or flushed.
    held_bytes: u64,
}

pub(super) fn quota(shared: &Shared, wanted: Quota) -> Result<QuotaAnswer, Error> {
    let change = Change {
        quota_bytes: wanted.bytes.map(Bytes::read).transpose()?,
        ..Change::default()
    };
    let guest = if change == Change::default() {
        guest(shared, &wanted.client)?
    } else {
        shared.guests.set(&wanted.client, &change)?
    };
    Ok(QuotaAnswer {
        client: guest.name.clone(),
        quota_bytes: guest.quota_bytes(),
        held_bytes: guest.account.stats().mem_used_total,
    })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Weight {
    client: String,
    /// The new one.
    weight: Option<u32>,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct WeightAnswer {
    client: String,
    weight: u32,
}

pub(super) fn weight(shared: &Shared, wanted: Weight) -> Result<WeightAnswer, Error> {
    let guest = guest(shared, &wanted.client)?;
    if let Some(weight) = wanted.weight {
        guest.account.set_weight(weight);
    }
    Ok(WeightAnswer {
        client: guest.name.clone(),
        weight: guest.account.weight(),
    })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Reset {
    client: String,
    /// Also while it is connected.
    #[serde(default)]
    force: bool,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct ResetAnswer {
    client: String,
    /// Pages that were dropped.
    pages: u64,
    /// Sixteen hexadecimal digits.
    generation: String,
}

pub(super) fn reset(shared: &Shared, wanted: Reset) -> Result<ResetAnswer, Error> {
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
    Ok(ResetAnswer {
        client: guest.name.clone(),
        pages,
        generation: write_generation(guest.account.generation()),
    })
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Pages {
    client: String,
    pages: u64,
}

pub(super) fn remove(shared: &Shared, wanted: OnlyClient) -> Result<Pages, Error> {
    let name = wanted.client;
    if shared.guests.get(&name).is_some() {
        return Err(Error::new(
            INVALID_PARAMS,
            format!(
                "\"{name}\" has a socket; only clients without one can be removed, \"guest.remove\" \
                 takes it away, and \"client.reset\" drops its pages"
            ),
        ));
    }
    let pages = shared
        .store
        .client(&name)
        .map(|client| client.stats().pages_stored);
    match pages {
        Some(pages) if shared.store.remove_client(&name) => {
            shared.guests.tell_of_room();
            Ok(Pages {
                client: name,
                pages,
            })
        }
        _ => Err(Error::new(
            NOT_FOUND,
            format!("the arena knows no client \"{name}\""),
        )),
    }
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Frozen {
    client: String,
    frozen: bool,
}

pub(super) fn freeze(shared: &Shared, wanted: OnlyClient) -> Result<Frozen, Error> {
    set_frozen(shared, wanted.client, true)
}

pub(super) fn thaw(shared: &Shared, wanted: OnlyClient) -> Result<Frozen, Error> {
    set_frozen(shared, wanted.client, false)
}

fn set_frozen(shared: &Shared, client: String, frozen: bool) -> Result<Frozen, Error> {
    let guest = guest(shared, &client)?;
    guest.account.freeze(frozen);
    guest.announcer.poke();
    Ok(Frozen { client, frozen })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Flush {
    client: String,
    /// How much; everything when not given.
    bytes: Option<Bytes>,
}

pub(super) fn flush(shared: &Shared, wanted: Flush) -> Result<Pages, Error> {
    let guest = guest(shared, &wanted.client)?;
    let bytes = wanted.bytes.map(Bytes::read).transpose()?;
    let pages = guest.account.evict(bytes.unwrap_or(u64::MAX));
    guest.announcer.poke();
    log::info!("{}: {pages} ephemeral pages dropped", guest.name);
    Ok(Pages {
        client: guest.name.clone(),
        pages,
    })
}

#[derive(Serialize, JsonSchema)]
pub(super) struct GiveBack {
    client: String,
    pages: u32,
    /// Whether it hears of it now; otherwise when it connects.
    connected: bool,
}

pub(super) fn give_back(shared: &Shared, mut wanted: Amount) -> Result<GiveBack, Error> {
    let pages = wanted.pages()?;
    let guest = guest(shared, &wanted.client)?;
    guest.ask_to_give_back(pages);
    Ok(GiveBack {
        client: guest.name.clone(),
        pages,
        connected: guest.is_connected(),
    })
}

pub(super) fn squeeze(shared: &Shared, mut wanted: Amount) -> Result<Pages, Error> {
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
    Ok(Pages {
        client: guest.name.clone(),
        pages: pages.into(),
    })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PolicyChange {
    client: String,
    /// What becomes of the pool's copy of a page that it loaded back.
    copies: Option<Copies>,
    /// Whether it frees by itself what it does not use.
    auto_squeeze: Option<bool>,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct PolicyAnswer {
    client: String,
    copies: &'static str,
    auto_squeeze: bool,
}

pub(super) fn policy(shared: &Shared, wanted: PolicyChange) -> Result<PolicyAnswer, Error> {
    let change = Change {
        copies: wanted.copies,
        auto_squeeze: wanted.auto_squeeze,
        ..Change::default()
    };
    let guest = if change == Change::default() {
        guest(shared, &wanted.client)?
    } else {
        shared.guests.set(&wanted.client, &change)?
    };
    let now = guest.balance.policy();
    Ok(PolicyAnswer {
        client: guest.name.clone(),
        copies: now.copies.name(),
        auto_squeeze: now.auto_squeeze,
    })
}

#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Authorise {
    client: String,
    /// With or without hyphens.
    uuid: String,
    /// No longer.
    #[serde(default)]
    revoke: bool,
}

#[derive(Serialize, JsonSchema)]
pub(super) struct Authorised {
    client: String,
    uuid: String,
    authorised: bool,
}

pub(super) fn authorise(shared: &Shared, wanted: Authorise) -> Result<Authorised, Error> {
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
    } else if !guest.account.authorise(uuid) {
        return Err(Error::new(
            INVALID_PARAMS,
            format!(
                "{} is authorised for {} shared pools already, which is the limit; revoke one first",
                guest.name,
                cram_store::AUTHORISED_MAX
            ),
        ));
    }
    Ok(Authorised {
        client: guest.name.clone(),
        uuid: write_uuid(&uuid),
        authorised: !wanted.revoke,
    })
}
