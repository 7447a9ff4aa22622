// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the arena says of accounts, spaces, pools and objects: records whose
//! payloads are laid out here, little-endian.
//!
//! ```text
//! Account  holder (1), group (2, 0xffff: none), quota (8, all ones: none), weight (4), frozen (1),
//!          generation (8), instance (16), number of uuids (1), uuids (16 each), name (the rest)
//! Space    keeping (1), account (2), uuid (16)
//! Pool     space (4), flags (1), generation of its client (8)
//! Object   space (4), owner (2), object id (24)
//! ```
//!
//! Each is written twice, so that damage to one copy loses nothing; only an
//! object whose pages may be evicted anyhow is written once.

use std::collections::HashMap;

use crate::arena::{Kind, Place};
use crate::ledger::account::{Holder, NO_QUOTA};
use crate::ledger::objects::Object;
use crate::spec::ObjectId;
use crate::spec::settings::{ClientSettings, Identity};
use crate::spec::{Keeping, NAME_BYTES_MAX, PoolSpec};

/// No sharing group.
const NO_GROUP: u16 = u16::MAX;

/// What an account's record says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AccountRecord {
    pub(crate) holder: Holder,
    pub(crate) group: Option<u16>,
    pub(crate) name: String,
    pub(crate) settings: ClientSettings,
    pub(crate) identity: Identity,
}

impl AccountRecord {
    /// Of an account that belongs to no client: nothing is set for it.
    pub(crate) fn plain(holder: Holder, group: Option<u16>, name: &str) -> Self {
        Self {
            holder,
            group,
            name: name.to_owned(),
            settings: ClientSettings::default(),
            identity: Identity::default(),
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let (settings, identity) = (&self.settings, &self.identity);
        // See `ClientSettings::is_bounded`.
        let authorised = u8::try_from(settings.authorised.len()).unwrap_or(u8::MAX);
        let mut bytes = vec![self.holder as u8];
        bytes.extend(self.group.unwrap_or(NO_GROUP).to_le_bytes());
        bytes.extend(settings.quota_bytes.unwrap_or(NO_QUOTA).to_le_bytes());
        bytes.extend(settings.weight.to_le_bytes());
        bytes.push(u8::from(settings.is_frozen));
        bytes.extend(identity.generation.to_le_bytes());
        bytes.extend(identity.instance);
        bytes.push(authorised);
        let uuids = settings.authorised.iter().take(authorised.into());
        bytes.extend(uuids.flatten());
        bytes.extend(self.name.as_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (holder, rest) = bytes.split_first()?;
        let (group, rest) = rest.split_first_chunk()?;
        let (quota, rest) = rest.split_first_chunk()?;
        let (weight, rest) = rest.split_first_chunk()?;
        let (is_frozen, rest) = rest.split_first()?;
        let (generation, rest) = rest.split_first_chunk()?;
        let (instance, rest) = rest.split_first_chunk()?;
        let (authorised, rest) = rest.split_first()?;
        let uuids = usize::from(*authorised) * 16;
        let (uuids, name) = (rest.get(..uuids)?, rest.get(uuids..)?);
        let group = u16::from_le_bytes(*group);
        let quota = u64::from_le_bytes(*quota);
        let settings = ClientSettings {
            quota_bytes: (quota != NO_QUOTA).then_some(quota),
            weight: u32::from_le_bytes(*weight),
            is_frozen: match is_frozen {
                0 => false,
                1 => true,
                _ => return None,
            },
            authorised: uuids.as_chunks().0.iter().copied().collect(),
        };
        if !settings.is_bounded() {
            return None;
        }
        Some(Self {
            holder: match holder {
                1 => Holder::Client,
                2 => Holder::SharedPool,
                3 => Holder::SharingGroup,
                4 => Holder::Gone,
                _ => return None,
            },
            group: (group != NO_GROUP).then_some(group),
            name: std::str::from_utf8(name)
                .ok()
                .filter(|name| name.len() <= NAME_BYTES_MAX)?
                .to_owned(),
            settings,
            identity: Identity {
                generation: u64::from_le_bytes(*generation),
                instance: *instance,
            },
        })
    }
}

/// What a space's record says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SpaceRecord {
    pub(crate) keeping: Keeping,
    pub(crate) account: u16,
    /// Of a shared space; else zero.
    pub(crate) uuid: [u8; 16],
}

impl SpaceRecord {
    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = vec![self.keeping as u8];
        bytes.extend(self.account.to_le_bytes());
        bytes.extend(self.uuid);
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (keeping, rest) = bytes.split_first()?;
        let (account, uuid) = rest.split_first_chunk()?;
        Some(Self {
            keeping: match keeping {
                1 => Keeping::Persistent,
                2 => Keeping::Exclusive,
                3 => Keeping::Shared,
                _ => return None,
            },
            account: u16::from_le_bytes(*account),
            uuid: uuid.try_into().ok()?,
        })
    }
}

/// What a pool's record says. What kind of pool it is, its space says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PoolRecord {
    pub(crate) space: u32,
    pub(crate) refuse_incompressible: bool,
    /// Of its client when it was made. The pools of an earlier one are gone: so one record, the
    /// account's, ends them all at one moment.
    pub(crate) generation: u64,
}

impl PoolRecord {
    pub(crate) fn new(space: u32, spec: &PoolSpec, generation: u64) -> Self {
        Self {
            space,
            refuse_incompressible: spec.refuse_incompressible,
            generation,
        }
    }

    pub(crate) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = self.space.to_le_bytes().to_vec();
        bytes.push(u8::from(self.refuse_incompressible));
        bytes.extend(self.generation.to_le_bytes());
        bytes
    }

    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (space, rest) = bytes.split_first_chunk()?;
        let (flags, generation) = rest.split_first()?;
        let refuse_incompressible = match flags {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self {
            space: u32::from_le_bytes(*space),
            refuse_incompressible,
            generation: u64::from_le_bytes(generation.try_into().ok()?),
        })
    }
}

/// Bytes of an object's record.
pub(crate) const OBJECT_BYTES: usize = 30;

pub(crate) fn object_to_bytes(object: &Object) -> [u8; OBJECT_BYTES] {
    let mut bytes = [0; OBJECT_BYTES];
    let (space, rest) = bytes.split_at_mut(4);
    let (owner, id) = rest.split_at_mut(2);
    space.copy_from_slice(&object.space.to_le_bytes());
    owner.copy_from_slice(&object.owner.to_le_bytes());
    for (to, word) in id.chunks_mut(8).zip(object.id.0) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

pub(crate) fn object_from_bytes(bytes: &[u8]) -> Option<Object> {
    let (space, rest) = bytes.split_first_chunk()?;
    let (owner, id) = rest.split_first_chunk()?;
    let (words, []) = id.as_chunks::<8>() else {
        return None;
    };
    let words: [[u8; 8]; 3] = words.try_into().ok()?;
    Some(Object {
        space: u32::from_le_bytes(*space),
        owner: u16::from_le_bytes(*owner),
        id: ObjectId(words.map(u64::from_le_bytes)),
    })
}

/// What an entry of the catalogue is found by: its kind, number and index.
pub(crate) type EntryKey = (Kind, u32, u32);

/// Where the records of accounts, spaces and pools are. (Those of objects are in
/// [`crate::ledger::objects`].)
#[derive(Default)]
pub(crate) struct Catalogue {
    entries: HashMap<EntryKey, [Option<Place>; 2]>,
}

impl Catalogue {
    pub(crate) fn insert(&mut self, key: EntryKey, copies: [Option<Place>; 2]) {
        self.entries.insert(key, copies);
    }

    pub(crate) fn get(&self, key: &EntryKey) -> [Option<Place>; 2] {
        self.entries.get(key).copied().unwrap_or_default()
    }

    pub(crate) fn remove(&mut self, key: &EntryKey) -> [Option<Place>; 2] {
        self.entries.remove(key).unwrap_or_default()
    }

    /// The slot that says that a record is at `place`, and which of the two it is.
    pub(crate) fn slot(
        &mut self,
        key: &EntryKey,
        place: Place,
    ) -> Option<(usize, &mut Option<Place>)> {
        let copies = self.entries.get_mut(key)?.iter_mut().enumerate();
        copies.into_iter().find(|(_, copy)| **copy == Some(place))
    }

    /// The places of each entry's records, for checks.
    pub(crate) fn all_copies(&self) -> impl Iterator<Item = &[Option<Place>; 2]> {
        self.entries.values()
    }

    /// The place of every record, for checks.
    pub(crate) fn all(&self) -> impl Iterator<Item = (EntryKey, Place)> {
        self.entries
            .iter()
            .flat_map(|(key, copies)| copies.iter().flatten().map(|place| (*key, *place)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_nonsense_does_not() {
        let account = AccountRecord {
            holder: Holder::Client,
            group: Some(7),
            name: "vm1".into(),
            settings: ClientSettings {
                quota_bytes: Some(12_345),
                weight: 7,
                is_frozen: true,
                authorised: [[1; 16], [2; 16]].into(),
            },
            identity: Identity {
                generation: 77,
                instance: [8; 16],
            },
        };
        let bytes = account.to_bytes();
        assert_eq!(AccountRecord::from_bytes(&bytes), Some(account));
        let plain = AccountRecord::plain(Holder::SharedPool, None, "");
        assert_eq!(AccountRecord::from_bytes(&plain.to_bytes()), Some(plain));
        // Another holder, a flag that is none, a name that is none, more uuids than there are bytes.
        let ends = [(0, 9), (15, 2), (bytes.len() - 1, 0xff), (40, 200)];
        for (at, byte) in ends {
            let mut wrong = bytes.clone();
            wrong[at] = byte;
            assert_eq!(AccountRecord::from_bytes(&wrong), None, "{at}");
        }
        let space = SpaceRecord {
            keeping: Keeping::Shared,
            account: 300,
            uuid: [4; 16],
        };
        assert_eq!(SpaceRecord::from_bytes(&space.to_bytes()), Some(space));
        let pool = PoolRecord {
            space: 70_000,
            refuse_incompressible: true,
            generation: u64::MAX - 3,
        };
        assert_eq!(PoolRecord::from_bytes(&pool.to_bytes()), Some(pool));
        let object = Object {
            space: 3,
            owner: 500,
            id: ObjectId([1, u64::MAX, 3]),
        };
        let bytes = object_to_bytes(&object);
        assert_eq!(object_from_bytes(&bytes), Some(object));
        for cut in [&bytes[..29], &[], &bytes[..5]] {
            assert_eq!(object_from_bytes(cut), None);
        }
        for bytes in [&[][..], &[1], &[1, 2, 3], &[0; 40]] {
            assert_eq!(
                AccountRecord::from_bytes(&bytes[..bytes.len().min(2)]),
                None
            );
            assert_eq!(SpaceRecord::from_bytes(bytes), None);
            assert_eq!(PoolRecord::from_bytes(bytes), None);
        }
    }
}
