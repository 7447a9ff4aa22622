// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client: one guest, with its quota, its pools, and what the operator allows it.

mod durable;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::arena::Kind;
use crate::engine::evict::Whose;
use crate::engine::policy::{PRESSURE_MAX, between, low_watermark};
use crate::engine::{Core, SharedSpace};
use crate::ledger::account::{Account, Holder, NO_QUOTA};
use crate::ledger::catalogue::{AccountRecord, PoolRecord};
use crate::ledger::domain::Domain;
use crate::ledger::stats::ClientStats;
use crate::machine::sync::atomic::Ordering::Relaxed;
use crate::machine::sync::{Mutex, RwLock};
use crate::recover::KnownClient;
use crate::space::Space;
use crate::spec::config::StoreConfig;
use crate::spec::settings::{AUTHORISED_MAX, Identity};
use crate::spec::{Keeping, NoPool, PoolError, PoolId, PoolKind, PoolSpec};
use crate::store::pool::Pool;

use durable::Durable;

/// A client's pools; `is_closed` once the client was removed from the store.
#[derive(Default)]
struct Pools {
    by_id: HashMap<PoolId, Arc<Pool>>,
    is_closed: bool,
}

/// One guest. Made by [`crate::Store::add_client`]. It is known by the name that the operator
/// gave it, never by what it says of itself.
pub struct Client {
    core: Arc<Core>,
    account: Arc<Account>,
    /// Inside which its equal pages are stored once.
    domain: Arc<Domain>,
    max_pools: u32,
    durable: Mutex<Durable>,
    /// Held while pools are made or end, alone when all of them end at once. What is found under
    /// `pools` is there meanwhile for whoever asks.
    changing: RwLock<()>,
    pools: RwLock<Pools>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("name", &self.name())
            .finish_non_exhaustive()
    }
}

impl Client {
    pub(crate) fn new(
        core: Arc<Core>,
        account: Arc<Account>,
        domain: Arc<Domain>,
        identity: Identity,
        config: &StoreConfig,
    ) -> Self {
        Self {
            core,
            account,
            domain,
            max_pools: config.max_pools_per_client,
            durable: Mutex::new(Durable {
                authorised: BTreeSet::new(),
                identity,
                is_gone: false,
            }),
            changing: RwLock::default(),
            pools: RwLock::default(),
        }
    }

    /// A client that was found in the arena, with its pools.
    pub(crate) fn recovered(core: Arc<Core>, known: KnownClient, config: &StoreConfig) -> Self {
        let KnownClient {
            account,
            domain,
            settings,
            identity,
            pools: known,
        } = known;
        // Only now: what is there already may be more than a quota allows.
        account.restore(&settings);
        let client = Self::new(core, account, domain, identity, config);
        client.durable.lock().authorised = settings.authorised;
        {
            let mut pools = client.pools.write();
            for (id, spec, space) in known {
                let pool = Pool::new(client.core.clone(), spec, space, client.account.clone());
                pools.by_id.insert(id, Arc::new(pool));
            }
        }
        client
    }

    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// The operator's name for it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.account.name
    }

    /// The most bytes that its pages and their metadata may take; `None` when only the store's
    /// capacity limits it.
    #[must_use]
    pub fn quota_bytes(&self) -> Option<u64> {
        Some(self.account.quota_bytes()).filter(|quota| *quota != NO_QUOTA)
    }

    /// Changes the quota. When it is lowered, ephemeral pages that do not fit any more are evicted
    /// now; persistent ones stay, and puts are refused until enough of them were flushed.
    ///
    /// Kept in the arena if there is room, as are weight, freezing and authorising; see
    /// [`Self::set_settings`] for how to learn whether there is.
    pub fn set_quota(&self, quota_bytes: Option<u64>) {
        let _ = self.change(|_| self.account.set_quota(quota_bytes));
        self.evict_over_quota();
    }

    fn evict_over_quota(&self) {
        while self.account.is_over_quota() {
            let over = self
                .account
                .used_bytes()
                .saturating_sub(self.account.quota_bytes());
            if self.core.evict(Whose::Client(&self.account, over)) == 0 {
                break;
            }
        }
    }

    /// What the client counts for when the store is full, in proportion to the others' weights.
    #[must_use]
    pub fn weight(&self) -> u32 {
        self.account.weight()
    }

    /// Changes the weight: 0 to give way to everybody, [`crate::DEFAULT_WEIGHT`] is usual.
    pub fn set_weight(&self, weight: u32) {
        let _ = self.change(|_| self.account.set_weight(weight));
    }

    /// Evicts about so many bytes of this client's ephemeral pages; how many pages went.
    pub fn evict(&self, bytes: u64) -> u64 {
        self.core.evict(Whose::Client(&self.account, bytes))
    }

    /// While frozen, every put is refused (and removes the older copy); gets and flushes go on.
    pub fn freeze(&self, is_frozen: bool) {
        let _ = self.change(|_| self.account.set_frozen(is_frozen));
    }

    /// Whether puts are refused for now.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.account.is_frozen()
    }

    /// Allows this client to open the shared pool of that uuid. False when it is allowed
    /// [`AUTHORISED_MAX`] others already.
    pub fn authorise(&self, uuid: [u8; 16]) -> bool {
        let mut is_allowed = false;
        let _ = self.change(|durable| {
            let uuids = &mut durable.authorised;
            is_allowed = uuids.contains(&uuid) || uuids.len() < AUTHORISED_MAX;
            if is_allowed {
                uuids.insert(uuid);
            }
        });
        is_allowed
    }

    /// Withdraws what [`Self::authorise`] allowed: the client loses the pool, too, if it has it.
    pub fn revoke(&self, uuid: &[u8; 16]) {
        let _changing = self.changing.read();
        let _ = self.change(|durable| _ = durable.authorised.remove(uuid));
        let is_it = |_: &PoolId, pool: &mut Arc<Pool>| pool.spec().kind.uuid() == Some(*uuid);
        let lost: Vec<_> = self.pools.write().by_id.extract_if(is_it).collect();
        for (id, pool) in lost {
            self.core.erase_entry(&self.pool_key(id));
            self.leave(&pool);
        }
    }

    /// Makes a pool, or finds it when it is there with the very same spec. How many pages are in
    /// it: 0, unless it was there, or is shared and another client has filled it.
    ///
    /// # Errors
    /// See [`PoolError`]. Nothing was changed then.
    pub fn new_pool(&self, id: PoolId, spec: PoolSpec) -> Result<u64, PoolError> {
        let _changing = self.changing.read();
        let mut pools = self.pools.write();
        if pools.is_closed {
            return Err(PoolError::Denied);
        }
        if let Some(pool) = pools.by_id.get(&id) {
            return if pool.spec() == spec {
                Ok(pool.pages())
            } else {
                Err(PoolError::Exists)
            };
        }
        // One that was made when there might be more is still found.
        if id.0 >= self.max_pools {
            return Err(PoolError::BadId);
        }
        if let Some(uuid) = spec.kind.uuid()
            && let mut others = pools.by_id.values()
            && others.any(|pool| pool.spec().kind.uuid() == Some(uuid))
        {
            return Err(PoolError::Denied);
        }
        let space = match spec.kind {
            PoolKind::Persistent => self.new_space(Keeping::Persistent)?,
            PoolKind::PrivateEphemeral => self.new_space(Keeping::Exclusive)?,
            PoolKind::SharedEphemeral { uuid } => self.open_shared(uuid)?,
        };
        let record = PoolRecord::new(space.number, &spec, self.generation()).to_bytes();
        let pool = Pool::new(self.core.clone(), spec, space, self.account.clone());
        if self.core.write_entry(self.pool_key(id), &record).is_err() {
            self.leave(&pool);
            return Err(PoolError::NoSpace);
        }
        let pages = pool.pages();
        pools.by_id.insert(id, Arc::new(pool));
        Ok(pages)
    }

    fn pool_key(&self, id: PoolId) -> (Kind, u32, u32) {
        (Kind::Pool, u32::from(self.account.number), id.0)
    }

    /// A space of this client alone.
    fn new_space(&self, keeping: Keeping) -> Result<Arc<Space>, PoolError> {
        let (account, domain) = (self.account.clone(), self.domain.clone());
        self.core
            .new_space(keeping, [0; 16], account, Some(domain))
            .map_err(|_| PoolError::NoSpace)
    }

    /// The space of a shared pool, made if this is the first client to open it.
    fn open_shared(&self, uuid: [u8; 16]) -> Result<Arc<Space>, PoolError> {
        if !self.durable.lock().authorised.contains(&uuid) {
            return Err(PoolError::Denied);
        }
        let core = &self.core;
        let mut shared = core.shared.lock();
        if let Some(entry) = shared.get_mut(&uuid) {
            entry.opened += 1;
            return Ok(entry.space.clone());
        }
        let account = core.add_account(Holder::SharedPool, None, "", None, Identity::default());
        let account = account.ok_or(PoolError::NoSpace)?;
        let space = core.new_space(Keeping::Shared, uuid, account.clone(), None);
        let space = space.map_err(|_| {
            core.remove_account(&account);
            PoolError::NoSpace
        })?;
        shared.insert(
            uuid,
            SharedSpace {
                space: space.clone(),
                opened: 1,
            },
        );
        Ok(space)
    }

    /// Destroys a pool and all its pages; how many there were. Of a shared pool only the last
    /// client to leave destroys the pages; until then it is 0.
    ///
    /// Takes time in proportion to the pages destroyed, and stops nobody else meanwhile.
    ///
    /// # Errors
    /// When no pool has this id.
    pub fn destroy_pool(&self, id: PoolId) -> Result<u64, NoPool> {
        // The account, whose number is in the key below, is not another's before this is done.
        let _changing = self.changing.read();
        let pool = self.pools.write().by_id.remove(&id).ok_or(NoPool)?;
        // From here on a store that is opened again does not know it.
        self.core.erase_entry(&self.pool_key(id));
        Ok(self.leave(&pool))
    }

    fn leave(&self, pool: &Pool) -> u64 {
        let space = pool.space();
        pool.leave();
        if space.is_shared() {
            let mut shared = self.core.shared.lock();
            if let Some(entry) = shared.get_mut(&space.uuid) {
                entry.opened -= 1;
                if entry.opened > 0 {
                    return 0;
                }
                shared.remove(&space.uuid);
            }
        }
        self.core.erase_entry(&(Kind::Space, space.number, 0));
        let removed = self.core.destroy(space);
        if space.is_shared() {
            self.core.remove_account(&space.payer);
            self.core.sweep_accounts();
        }
        removed
    }

    /// The pool with this id.
    #[must_use]
    pub fn pool(&self, id: PoolId) -> Option<Arc<Pool>> {
        self.pools.read().by_id.get(&id).cloned()
    }

    /// All pools, by id.
    #[must_use]
    pub fn pools(&self) -> Vec<(PoolId, Arc<Pool>)> {
        let pools = self.pools.read();
        let mut pools: Vec<_> = pools
            .by_id
            .iter()
            .map(|(id, pool)| (*id, pool.clone()))
            .collect();
        pools.sort_unstable_by_key(|(id, _)| *id);
        pools
    }

    /// The client's figures: what it did, and the pages that it put and that are there. Takes no
    /// lock that puts or gets wait for. `mem_limit` is the quota, 0 when there is none.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        let account = &self.account;
        let quota = self.quota_bytes().unwrap_or(0);
        let sum = self
            .pools
            .read()
            .by_id
            .values()
            .filter(|pool| !pool.space().is_shared())
            .fold(account.tally.sum(), |sum, pool| {
                sum.plus(&pool.space().tally.sum())
            });
        sum.read(account.used_bytes(), quota, account.used_bytes_max())
    }

    /// Whether equal pages of it and of other clients are stored once.
    #[must_use]
    pub fn is_in_sharing_group(&self) -> bool {
        self.domain.account.holder == Holder::SharingGroup
    }

    /// How close this client is to having its puts refused: 0 (far) to 1000 (all are refused). The
    /// store's pressure or that of its own quota, whichever is greater; 1000 while frozen.
    #[must_use]
    pub fn pressure(&self) -> u32 {
        if self.is_frozen() {
            return PRESSURE_MAX;
        }
        let own = self.quota_bytes().map_or(0, |quota| {
            // Full is when a page that does not compress finds no room, and a leaf for it.
            let full = quota.saturating_sub(2 * crate::spec::PAGE_SIZE as u64);
            between(self.account.committed_bytes(), low_watermark(full), full)
        });
        own.max(self.core.pressure())
    }

    /// Destroys all pools, and lets none be made any more.
    pub(crate) fn close(&self) {
        let _changing = self.changing.write();
        let pools = {
            let mut pools = self.pools.write();
            pools.is_closed = true;
            std::mem::take(&mut pools.by_id)
        };
        for (id, pool) in pools {
            self.core.erase_entry(&self.pool_key(id));
            self.leave(&pool);
        }
        let account = &self.account;
        if Arc::ptr_eq(&self.domain.account, account) {
            self.core.domains.write().remove(&account.number);
            let freed = self.domain.images.lock().free_if_empty();
            self.core.budget.release(freed);
        }
        // Whoever has a handle still writes no record any more: the number may soon be another's.
        self.durable.lock().is_gone = true;
        // Pages of it may be left in shared pools: they stay, and with them the account.
        let gone = AccountRecord::plain(Holder::Gone, None, &account.name);
        if account.tally.pages() > 0 {
            let key = (Kind::Account, u32::from(account.number), 0);
            // Without room for the record a store that is opened again has a client of that name
            // without pools, which the operator can remove once more.
            let _ = self.core.write_entry(key, &gone.to_bytes());
        }
        account.is_closed.store(true, Relaxed);
        self.core.sweep_accounts();
    }
}
