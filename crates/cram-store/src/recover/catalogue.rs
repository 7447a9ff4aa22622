// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The catalogue, made anew: accounts, spaces, pools and objects.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Copy, KnownClient, Needed, Reader, SPACES_MAX};
use crate::arena::{Found, Kind, NUMBERS, Place, SpanHeader, Trust, is_newer};
use crate::ledger::account::{Account, Holder};
use crate::ledger::catalogue::{
    AccountRecord, EntryKey, PoolRecord, SpaceRecord, object_from_bytes,
};
use crate::machine::budget::Shortage;
use crate::machine::sync::atomic::Ordering::Relaxed;
use crate::space::Space;
use crate::spec::PAGE_SIZE;
use crate::spec::{Keeping, PoolId, PoolKind, PoolSpec};

impl Reader<'_> {
    /// Walks the catalogue's spans. Of each entry, the copies of its newest state.
    pub(super) fn read_catalogue(
        &self,
        spans: &[(SpanHeader, u32)],
    ) -> BTreeMap<EntryKey, Vec<Copy>> {
        let mut entries: BTreeMap<EntryKey, Vec<Copy>> = BTreeMap::new();
        for span in spans {
            self.walk_catalogue(span, &mut |_| (), &mut |found, payload| {
                let header = found.header;
                if header.kind != Kind::Object {
                    let key = (header.kind, header.number, header.index);
                    entries.entry(key).or_default().push(Copy {
                        place: found.place,
                        generation: header.generation,
                        payload: payload.to_vec(),
                    });
                }
            });
        }
        for copies in entries.values_mut() {
            self.keep_newest(copies);
        }
        entries
    }

    /// Hands every live record of the catalogue that is whole to `take`, with its payload, and what is
    /// none to `fault`.
    fn walk_catalogue(
        &self,
        span: &(SpanHeader, u32),
        fault: &mut dyn FnMut(&Found),
        take: &mut dyn FnMut(&Found, &[u8]),
    ) {
        self.walk(span, &mut |found| {
            let header = found.header;
            let is_named = match header.kind {
                Kind::Account | Kind::Space | Kind::Object => header.index == 0,
                Kind::Pool => true,
                Kind::Page | Kind::Image | Kind::Alias => false,
            };
            if !is_named || header.len >= PAGE_SIZE {
                fault(found);
                return false;
            }
            let pin = self.arena().pin(found.place);
            let payload = pin.payload(found.place, &header);
            let sums = &self.core.sums;
            let is_whole = sums.bytes(payload) == sums.promised(&header);
            if !is_whole {
                fault(found);
            } else if found.is_live {
                take(found, payload);
            }
            is_whole
        });
    }

    fn keep_newest(&self, copies: &mut Vec<Copy>) {
        let newest = |copy: &&Copy| {
            !copies
                .iter()
                .any(|other| is_newer(other.generation, copy.generation))
        };
        let Some((generation, payload)) = copies
            .iter()
            .find(newest)
            .or(copies.first())
            .map(|copy| (copy.generation, copy.payload.clone()))
        else {
            return;
        };
        // A second one in the same span could be lost together with the first: it is worth nothing.
        let mut first = None;
        let mut kept = 0;
        copies.retain(|copy| {
            let is_kept = kept < 2
                && copy.generation == generation
                && copy.payload == payload
                && first.is_none_or(|first| self.are_apart(first, copy.place));
            if is_kept {
                kept += 1;
                first.get_or_insert(copy.place);
            } else {
                self.discard(copy.place);
            }
            is_kept
        });
    }

    /// Enters an entry's copies into the catalogue.
    fn adopt(&self, key: EntryKey, copies: &[Copy]) {
        let mut places = copies.iter().map(|copy| {
            self.live(copy.place);
            copy.place
        });
        let places = [places.next(), places.next()];
        self.core.catalogue.lock().insert(key, places);
    }

    fn reject_all(&self, copies: &[Copy]) {
        copies.iter().for_each(|copy| self.discard(copy.place));
    }

    /// A record of the catalogue stays.
    fn live(&self, place: Place) {
        if let Ok(header) = self.arena().accept(place) {
            let bytes = self.core.record_bytes(header.len);
            self.core.catalogue_bytes.fetch_add(bytes, Relaxed);
        }
    }

    /// Accounts, and the domains of those that have one. Clients' are returned.
    pub(super) fn enter_accounts(
        &self,
        entries: &BTreeMap<EntryKey, Vec<Copy>>,
    ) -> Result<Vec<KnownClient>, Shortage> {
        let core = self.core;
        let mut clients = Vec::new();
        for (key, copies) in entries.iter().filter(|(key, _)| key.0 == Kind::Account) {
            let record = copies
                .first()
                .and_then(|copy| AccountRecord::from_bytes(&copy.payload));
            let is_new = |record: &AccountRecord| {
                record.holder != Holder::Client
                    || !clients
                        .iter()
                        .any(|(known, _): &(Arc<Account>, _)| known.name == record.name)
            };
            let number = u16::try_from(key.1).ok();
            let Some((number, record)) = number.zip(record.filter(is_new)) else {
                self.reject_all(copies);
                continue;
            };
            let bytes = Account::fixed_bytes(&record.name, core.stripes);
            core.budget.reserve(bytes)?;
            let account = Account::new(number, record.holder, &record.name, None, core.stripes);
            account.reserve_anyway(bytes);
            let is_gone = record.holder == Holder::Gone;
            account.is_closed.store(is_gone, Relaxed);
            let account = Arc::new(account);
            core.accounts.adopt(account.clone());
            self.adopt(*key, copies);
            match account.holder {
                Holder::SharingGroup => _ = core.own_domain(&account),
                Holder::Client => clients.push((account, record)),
                Holder::SharedPool | Holder::Gone => (),
            }
        }
        let with_domain = |(account, record): (Arc<Account>, AccountRecord)| {
            let group = record.group.and_then(|group| core.domain(group));
            let domain = group.unwrap_or_else(|| core.own_domain(&account));
            KnownClient {
                account,
                domain,
                settings: record.settings,
                identity: record.identity,
                pools: Vec::new(),
            }
        };
        Ok(clients.into_iter().map(with_domain).collect())
    }

    /// Pools and the spaces that they name.
    pub(super) fn enter_pools(
        &self,
        entries: &BTreeMap<EntryKey, Vec<Copy>>,
        mut clients: Vec<KnownClient>,
    ) -> Result<Vec<KnownClient>, Shortage> {
        let core = self.core;
        for (key, copies) in entries.iter().filter(|(key, _)| key.0 == Kind::Pool) {
            let client = clients
                .iter_mut()
                .find(|client| u32::from(client.account.number) == key.1);
            let named = client.zip(copies.first()).and_then(|(client, copy)| {
                let record = PoolRecord::from_bytes(&copy.payload)?;
                // Another generation's is what was left of a reset.
                (record.generation == client.identity.generation).then_some((client, record))
            });
            let Some((client, record)) = named else {
                self.reject_all(copies);
                continue;
            };
            let Some(space) = self.space_for(entries, client, record.space)? else {
                self.reject_all(copies);
                continue;
            };
            let kind = match space.keeping {
                Keeping::Persistent => PoolKind::Persistent,
                Keeping::Exclusive => PoolKind::PrivateEphemeral,
                Keeping::Shared => PoolKind::SharedEphemeral { uuid: space.uuid },
            };
            let spec = PoolSpec {
                kind,
                refuse_incompressible: record.refuse_incompressible,
            };
            client.pools.push((PoolId(key.2), spec, space));
            self.adopt(*key, copies);
        }
        let spaces = entries.iter().filter(|(key, _)| key.0 == Kind::Space);
        for (key, copies) in spaces {
            if core.space(key.1).is_none() {
                self.reject_all(copies);
            }
        }
        Ok(clients)
    }

    /// The space that a pool names: made from its record when the first pool does. `None` when there
    /// is none that could be this client's.
    fn space_for(
        &self,
        entries: &BTreeMap<EntryKey, Vec<Copy>>,
        client: &KnownClient,
        number: u32,
    ) -> Result<Option<Arc<Space>>, Shortage> {
        let core = self.core;
        if let Some(space) = core.space(number) {
            // Only a shared one may be several pools'.
            let mut shared = core.shared.lock();
            let entry = shared.get_mut(&space.uuid).filter(|_| space.is_shared());
            return Ok(entry.map(|entry| {
                entry.opened += 1;
                space
            }));
        }
        let Some((copies, record, payer)) = self.space_record(entries, client, number) else {
            return Ok(None);
        };
        let is_shared = record.keeping == Keeping::Shared;
        let domain = (!is_shared).then(|| client.domain.clone());
        let space = Space::new(core, number, record.keeping, record.uuid, payer, domain)?;
        let space = Arc::new(space);
        core.adopt_space(space.clone());
        if is_shared {
            core.adopt_shared(space.clone());
        }
        self.adopt((Kind::Space, number, 0), copies);
        Ok(Some(space))
    }

    /// What is on record of a space, and who pays for it, if it may be this client's.
    fn space_record<'a>(
        &self,
        entries: &'a BTreeMap<EntryKey, Vec<Copy>>,
        client: &KnownClient,
        number: u32,
    ) -> Option<(&'a [Copy], SpaceRecord, Arc<Account>)> {
        let core = self.core;
        let key = (Kind::Space, number, 0);
        let copies = entries.get(&key).filter(|_| number < SPACES_MAX)?;
        let record = SpaceRecord::from_bytes(&copies.first()?.payload)?;
        let payer = core.accounts.get(record.account)?;
        let is_right = if record.keeping == Keeping::Shared {
            payer.holder == Holder::SharedPool && !core.shared.lock().contains_key(&record.uuid)
        } else {
            payer.number == client.account.number
        };
        is_right.then_some((copies.as_slice(), record, payer))
    }

    /// Objects, from the spans of the catalogue. Returns room to note which of them are needed.
    pub(super) fn enter_objects(&self, spans: &[(SpanHeader, u32)]) -> Result<Needed, Shortage> {
        let core = self.core;
        let apart = |one, other| self.are_apart(one, other);
        let (mut numbers, mut entered) = (0, Ok(()));
        let mut fault = |found: &Found| {
            if found.is_live && found.trust == Trust::Header {
                self.discard(found.place);
            }
        };
        for span in spans {
            self.walk_catalogue(span, &mut fault, &mut |found, payload| {
                let number = found.header.number;
                if found.header.kind != Kind::Object || entered.is_err() {
                    return;
                }
                let object = object_from_bytes(payload)
                    .filter(|object| core.space(object.space).is_some() && number < NUMBERS);
                let adopted = object.map_or(Ok(false), |object| {
                    core.objects
                        .adopt(number, object, found.place, apart, &core.budget)
                });
                match adopted {
                    Ok(true) => {
                        numbers = numbers.max(number as usize + 1);
                        self.live(found.place);
                        if let Some(space) = object.and_then(|object| core.space(object.space)) {
                            space.payer.reserve_anyway(space.object_copy_bytes(core));
                        }
                    }
                    Ok(false) => self.discard(found.place),
                    Err(why) => entered = Err(why),
                }
            });
        }
        entered?;
        Ok(Needed::new(numbers))
    }
}
