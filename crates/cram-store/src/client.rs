// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client: one guest, with its quota, its pools, and what the operator allows it.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use thiserror::Error;

use crate::budget::{Account, NO_QUOTA};
use crate::core::{Core, PRESSURE_MAX, SharedSpace, between, low_watermark};
use crate::evict::Whose;
use crate::pool::Pool;
use crate::space::{Keeping, Space};
use crate::stats::ClientStats;

/// A pool's number inside its client, chosen by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

/// What a pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// Pages stay until flushed (swap).
    Persistent,
    /// Pages may be evicted, and a get removes them (page cache).
    PrivateEphemeral,
    /// Pages may be evicted, a get keeps them, and every client that opens the pool under this
    /// uuid, if the operator allows it, sees the same pages.
    SharedEphemeral {
        /// Names the pool among all clients of the store.
        uuid: [u8; 16],
    },
}

/// How a pool is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PoolSpec {
    /// What the pool is for.
    pub kind: PoolKind,
    /// Refuse pages that do not compress rather than keep them as they are.
    pub refuse_incompressible: bool,
}

/// Why a pool could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The id is not below the configured number of pools.
    #[error("no pool of a client can have that id")]
    BadId,
    /// A pool with this id is there and is different.
    #[error("a different pool has this id")]
    Exists,
    /// The operator does not allow this client that shared pool; or the client was removed.
    #[error("this client may not open that pool")]
    Denied,
    /// No room for the pool's own structures, in the store or in the client's quota.
    #[error("there is no room for a pool")]
    NoSpace,
}

/// No pool has this id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("there is no such pool")]
pub struct NoPool;

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
    name: String,
    account: Arc<Account>,
    max_pools: u32,
    authorised: Mutex<HashSet<[u8; 16]>>,
    pools: RwLock<Pools>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// `None` when the store or the quota has no room for it.
    pub(crate) fn new(
        core: Arc<Core>,
        name: &str,
        quota_bytes: Option<u64>,
        max_pools: u32,
    ) -> Option<Self> {
        let client = Self {
            core,
            name: name.to_owned(),
            account: Arc::new(Account::new(quota_bytes)),
            max_pools,
            authorised: Mutex::default(),
            pools: RwLock::default(),
        };
        let bytes = client.fixed_bytes();
        client.account.reserve(bytes).ok()?;
        client.core.budget.reserve(bytes).ok()?;
        Some(client)
    }

    /// Bytes of a client without pools.
    pub(crate) fn fixed_bytes(&self) -> u64 {
        (size_of::<Self>() + size_of::<Account>() + 2 * self.name.len() + 512) as u64
    }

    pub(crate) fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// The operator's name for it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The most bytes that its pages and their metadata may take; `None` when only the store's
    /// capacity limits it.
    #[must_use]
    pub fn quota_bytes(&self) -> Option<u64> {
        Some(self.account.quota_bytes()).filter(|quota| *quota != NO_QUOTA)
    }

    /// Changes the quota. When it is lowered, ephemeral pages that do not fit any more are evicted
    /// now; persistent ones stay, and puts are refused until enough of them were flushed.
    pub fn set_quota(&self, quota_bytes: Option<u64>) {
        self.account.set_quota(quota_bytes);
        while self.account.is_over_quota() {
            let over = self
                .account
                .used_bytes()
                .saturating_sub(self.account.quota_bytes());
            if self.core.evict(Whose::Client(&self.account), over) == 0 {
                break;
            }
        }
    }

    /// Evicts about so many bytes of this client's ephemeral pages; how many pages went.
    pub fn evict(&self, bytes: u64) -> u64 {
        self.core.evict(Whose::Client(&self.account), bytes)
    }

    /// While frozen, every put is refused (and removes the older copy); gets and flushes go on.
    pub fn freeze(&self, is_frozen: bool) {
        self.account.set_frozen(is_frozen);
    }

    /// Whether puts are refused for now.
    #[must_use]
    pub fn is_frozen(&self) -> bool {
        self.account.is_frozen()
    }

    /// Allows this client to open the shared pool of that uuid.
    pub fn authorise(&self, uuid: [u8; 16]) {
        self.authorised.lock().insert(uuid);
    }

    /// Withdraws what [`Self::authorise`] allowed. Pools that are open stay open.
    pub fn revoke(&self, uuid: &[u8; 16]) {
        self.authorised.lock().remove(uuid);
    }

    /// Makes a pool, or finds it when it is there with the very same spec. How many pages are in
    /// it: 0, unless it was there, or is shared and another client has filled it.
    ///
    /// # Errors
    /// See [`PoolError`]. Nothing was changed then.
    pub fn new_pool(&self, id: PoolId, spec: PoolSpec) -> Result<u64, PoolError> {
        if id.0 >= self.max_pools {
            return Err(PoolError::BadId);
        }
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
        let (space, owner) = match spec.kind {
            PoolKind::Persistent => (
                self.new_space(Keeping::Persistent, self.account.clone())?,
                0,
            ),
            PoolKind::PrivateEphemeral => {
                (self.new_space(Keeping::Exclusive, self.account.clone())?, 0)
            }
            PoolKind::SharedEphemeral { uuid } => self.open_shared(uuid)?,
        };
        let pool = Pool::new(self.core.clone(), spec, space, self.account.clone(), owner);
        let pages = pool.pages();
        pools.by_id.insert(id, Arc::new(pool));
        Ok(pages)
    }

    fn new_space(&self, keeping: Keeping, payer: Arc<Account>) -> Result<Arc<Space>, PoolError> {
        let space = Space::new(&self.core, keeping, payer);
        let space = Arc::new(space.map_err(|_| PoolError::NoSpace)?);
        if space.is_evictable() {
            self.core.ephemeral.write().push(space.clone());
        }
        Ok(space)
    }

    /// The space of a shared pool, made if this is the first client to open it, and this
    /// client's number in it.
    fn open_shared(&self, uuid: [u8; 16]) -> Result<(Arc<Space>, u16), PoolError> {
        if !self.authorised.lock().contains(&uuid) {
            return Err(PoolError::Denied);
        }
        let mut shared = self.core.shared.lock();
        if let Some(entry) = shared.get_mut(&uuid) {
            let owner = entry.space.join(&self.account).ok_or(PoolError::NoSpace)?;
            entry.opened += 1;
            return Ok((entry.space.clone(), owner));
        }
        let space = self.new_space(Keeping::Shared, Arc::new(Account::new(None)))?;
        let owner = space.join(&self.account).ok_or(PoolError::NoSpace)?;
        shared.insert(
            uuid,
            SharedSpace {
                space: space.clone(),
                opened: 1,
            },
        );
        Ok((space, owner))
    }

    /// Destroys a pool and all its pages; how many there were. Of a shared pool only the last
    /// client to leave destroys the pages; until then it is 0.
    ///
    /// Takes time in proportion to the pages destroyed, and stops nobody else meanwhile.
    ///
    /// # Errors
    /// When no pool has this id.
    pub fn destroy_pool(&self, id: PoolId) -> Result<u64, NoPool> {
        let pool = self.pools.write().by_id.remove(&id).ok_or(NoPool)?;
        Ok(self.leave(&pool))
    }

    fn leave(&self, pool: &Pool) -> u64 {
        if let PoolKind::SharedEphemeral { uuid } = pool.spec().kind {
            let mut shared = self.core.shared.lock();
            if let Some(entry) = shared.get_mut(&uuid) {
                entry.opened -= 1;
                if entry.opened > 0 {
                    return 0;
                }
                shared.remove(&uuid);
            }
        }
        if pool.space().is_evictable() {
            let mut ephemeral = self.core.ephemeral.write();
            ephemeral.retain(|space| !Arc::ptr_eq(space, pool.space()));
        }
        pool.space().destroy(&self.core)
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
    /// lock of the data path. `mem_limit` is the quota, 0 when there is none.
    #[must_use]
    pub fn stats(&self) -> ClientStats {
        let account = &self.account;
        let quota = self.quota_bytes().unwrap_or(0);
        account
            .tally
            .read(account.used_bytes(), quota, account.used_bytes_max())
    }

    /// How close this client is to having its puts refused: 0 (far) to 1000 (all are refused). The
    /// store's pressure or that of its own quota, whichever is greater; 1000 while frozen.
    #[must_use]
    pub fn pressure(&self) -> u32 {
        if self.is_frozen() {
            return PRESSURE_MAX;
        }
        let own = self.quota_bytes().map_or(0, |quota| {
            between(self.account.committed_bytes(), low_watermark(quota), quota)
        });
        own.max(self.core.pressure())
    }

    /// Destroys all pools, and lets none be made any more.
    pub(crate) fn close(&self) {
        let pools = {
            let mut pools = self.pools.write();
            pools.is_closed = true;
            std::mem::take(&mut pools.by_id)
        };
        for pool in pools.into_values() {
            self.leave(&pool);
        }
        self.account.release(self.fixed_bytes());
        self.core.budget.release(self.fixed_bytes());
    }
}
