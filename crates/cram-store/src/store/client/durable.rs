// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What outlives the process of a client: its settings, its generation, its
//! instance. All of it is in the client's one record in the arena, so that it
//! changes at one moment.

use super::Client;
use crate::engine::evict::Whose;
use crate::ledger::account::Holder;
use crate::ledger::catalogue::AccountRecord;
use crate::spec::settings::{ClientSettings, Identity};
use crate::store::error::StoreError;

/// The part of a client's record that is not in its account.
pub(super) struct Durable {
    pub(super) authorised: std::collections::BTreeSet<[u8; 16]>,
    pub(super) identity: Identity,
    /// The client was removed from the store.
    pub(super) is_gone: bool,
}

impl Client {
    /// What the operator has set for the client.
    #[must_use]
    pub fn settings(&self) -> ClientSettings {
        self.settings_with(&self.durable.lock())
    }

    fn settings_with(&self, durable: &Durable) -> ClientSettings {
        ClientSettings {
            quota_bytes: self.quota_bytes(),
            weight: self.weight(),
            is_frozen: self.is_frozen(),
            authorised: durable.authorised.clone(),
        }
    }

    /// Changes all settings at once. A lower quota evicts, see [`Self::set_quota`].
    ///
    /// # Errors
    /// [`StoreError::TooManyAuthorised`]: nothing was changed. [`StoreError::NoRoom`]: they are in
    /// force, but the arena has no room to keep them: a store that is opened again has the old ones.
    /// [`StoreError::ClientGone`]: the client was removed.
    pub fn set_settings(&self, settings: &ClientSettings) -> Result<(), StoreError> {
        if !settings.is_bounded() {
            return Err(StoreError::TooManyAuthorised);
        }
        self.change(|durable| {
            durable.authorised.clone_from(&settings.authorised);
            self.account.set_quota(settings.quota_bytes);
            self.account.set_weight(settings.weight);
            self.account.set_frozen(settings.is_frozen);
        })?;
        self.evict_over_quota();
        Ok(())
    }

    /// A random number, not 0, that differs from one life of the client's pages to the next: it was
    /// drawn when the client was added or last [reset](Self::reset), and is kept in the arena.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.durable.lock().identity.generation
    }

    /// What [`Self::set_instance`] was given last; zeroes at first.
    #[must_use]
    pub fn instance(&self) -> [u8; 16] {
        self.durable.lock().identity.instance
    }

    /// Keeps 16 bytes that say nothing to the store, in the arena.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`]: nothing was changed. [`StoreError::ClientGone`]: the client was removed.
    pub fn set_instance(&self, instance: [u8; 16]) -> Result<(), StoreError> {
        let mut durable = self.durable.lock();
        let identity = Identity {
            instance,
            ..durable.identity
        };
        self.record(&durable, identity)?;
        durable.identity = identity;
        Ok(())
    }

    /// Drops all pools and pages of the client, those that it put into shared pools included, and
    /// draws a new generation, which is returned. Settings and instance stay.
    ///
    /// Both happen at one moment: a process that is killed meanwhile leaves an arena with the old
    /// generation and all pages, or with the new one and none, but for pages in shared pools that
    /// others have open: those are then left to eviction. Takes time in proportion to the pages that
    /// are dropped; only who makes or destroys a pool of the same client waits meanwhile. Handles on
    /// the pools refuse puts and find nothing from then on.
    ///
    /// # Errors
    /// [`StoreError::NoRoom`]: nothing was changed. [`StoreError::ClientGone`]: the client was removed.
    pub fn reset(&self) -> Result<u64, StoreError> {
        // No pool is made before the pages are gone, so none of them is of the new generation.
        let _changing = self.changing.write();
        let generation = self.core.draw_generation();
        {
            let mut durable = self.durable.lock();
            let identity = Identity {
                generation,
                ..durable.identity
            };
            // From here on the pools' own records count for nothing.
            self.record(&durable, identity)?;
            durable.identity = identity;
        }
        let gone = std::mem::take(&mut self.pools.write().by_id);
        for (id, pool) in &gone {
            self.core.erase_entry(&self.pool_key(*id));
            pool.leave();
        }
        for pool in gone.values() {
            self.leave(pool);
        }
        self.evict_from_shared();
        Ok(generation)
    }

    /// Evicts what the client has put into shared pools. It has none open.
    fn evict_from_shared(&self) {
        /// One pass misses a page that is moved meanwhile. (A page whose header is damaged stays.)
        const PASSES_IN_VAIN: u32 = 3;
        let mut in_vain = 0;
        while self.account.tally.pages() > 0 && in_vain < PASSES_IN_VAIN {
            let evicted = self.core.evict(Whose::Client(&self.account, u64::MAX));
            in_vain = if evicted == 0 { in_vain + 1 } else { 0 };
        }
    }

    /// Changes what is kept, and keeps it. On an error it is changed all the same.
    pub(super) fn change(&self, act: impl FnOnce(&mut Durable)) -> Result<(), StoreError> {
        let mut durable = self.durable.lock();
        act(&mut durable);
        self.record(&durable, durable.identity)
    }

    /// Writes the client's record.
    fn record(&self, durable: &Durable, identity: Identity) -> Result<(), StoreError> {
        if durable.is_gone {
            let name = self.name().to_owned();
            return Err(StoreError::ClientGone { name });
        }
        let domain = &self.domain.account;
        let record = AccountRecord {
            holder: Holder::Client,
            group: (domain.holder == Holder::SharingGroup).then_some(domain.number),
            name: self.name().to_owned(),
            settings: self.settings_with(durable),
            identity,
        };
        self.core
            .write_account(self.account.number, &record)
            .map_err(|_| StoreError::NoRoom)
    }
}
