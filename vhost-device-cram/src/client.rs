// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest: what stands behind one vhost-user socket, for as long as the daemon lives.
//!
//! The account is the socket's; the pages in it are one virtual machine's, which its front-end names by
//! a cookie that the guest can neither read nor write ([`Guest::claim`]). They outlive connections;
//! [`Device`] is one connection.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use cram_abi::wire::{Config, MAX_BATCH, PAGE_SHIFT, PRESSURE_MAX, VERSION, feature, state};
use cram_store::{Client, Store, StoreError};
use parking_lot::Mutex;

use crate::announce::{Announcer, is_worth_announcing};
use crate::balance::{Balance, Fullness, Policy};
use crate::device::Device;
use crate::events::Mailbox;
use crate::figures::Figures;
use crate::first_touch::Allowance;

/// What every guest is offered.
#[derive(Clone, Debug)]
pub struct Offer {
    /// Request queues.
    pub request_queues: u16,
    /// Most entries of a queue.
    pub queue_size: u16,
    /// Pools of a guest.
    pub max_pools: u32,
    /// How long a worker watches its rings before it sleeps, at the most.
    pub poll: Duration,
    /// Workers of a guest; as many as there are processors when not given. Never more than queues.
    pub workers: Option<u16>,
    /// The processors that workers run on, one after the other; any when there are none.
    pub pin: Vec<u32>,
    /// What is wanted of each guest, until the operator says otherwise.
    pub policy: Policy,
    /// Bytes of each guest's memory that the daemon may be the first to touch.
    pub first_touch_bytes: u64,
}

impl Offer {
    /// How many workers share a guest's request queues.
    pub fn workers(&self) -> usize {
        self.workers
            .map_or_else(crate::device::processors, usize::from)
    }

    /// How many groups of request queues there are, each with a worker of its own.
    pub fn groups(&self) -> usize {
        usize::from(self.request_queues).min(self.workers()).max(1)
    }

    /// All worker threads of a connection: that of events, and one for each group.
    pub fn threads(&self) -> usize {
        1 + self.groups()
    }
}

/// Counts of what seldom happens to a guest, since the daemon started. What workers do all the time is
/// in its [`Figures`].
#[derive(Debug, Default)]
pub struct Counters {
    /// Connections accepted.
    pub connections: AtomicU64,
    /// Queues stopped since their ring could not be trusted.
    pub queues_stopped: AtomicU64,
}

impl Counters {
    /// Adds to one of the counters.
    pub fn add(counter: &AtomicU64, n: u64) {
        counter.fetch_add(n, Ordering::Relaxed);
    }
}

/// What a front-end knows its virtual machine by.
pub type Instance = [u8; 16];
/// The instance of one that did not say.
pub const NO_INSTANCE: Instance = [0; 16];

#[derive(Debug)]
struct Announced {
    pressure: u32,
    quota_bytes: u64,
    policy: u32,
    generation: u64,
}

/// A guest.
pub struct Guest {
    /// Its name, which is also that of its account.
    pub name: String,
    /// The socket.
    pub socket: PathBuf,
    /// Whoever connects to the socket is the virtual machine that was there before.
    pub trusts_socket: bool,
    /// The store.
    pub store: Arc<Store>,
    /// The guest's account in the store.
    pub account: Arc<Client>,
    /// What the guest is offered.
    pub offer: Offer,
    /// What is wanted of it.
    pub balance: Balance,
    /// Events that wait.
    pub mailbox: Mailbox,
    /// Rung when the guest changed what the store holds.
    pub announcer: Arc<Announcer>,
    /// What it did.
    pub counters: Counters,
    /// How much of its memory the daemon touched first, and may.
    pub first_touch: Arc<Allowance>,
    /// What its workers count and time.
    pub figures: Figures,
    announced: Mutex<Announced>,
    /// None when nobody is connected; a connection that is just ending is still there.
    connection: Mutex<Option<Weak<Device>>>,
    /// Whose pages they are changes for one at a time; and since when nobody is connected, if so.
    away_since: Mutex<Option<Instant>>,
    /// Some virtual machine had the socket since the daemon was started.
    was_claimed: AtomicBool,
}

impl Guest {
    /// A guest that has never connected.
    pub fn new(
        name: String,
        socket: PathBuf,
        trusts_socket: bool,
        store: Arc<Store>,
        account: Arc<Client>,
        offer: Offer,
        announcer: Arc<Announcer>,
    ) -> Self {
        let quota_bytes = account
            .quota_bytes()
            .unwrap_or_else(|| store.capacity_bytes());
        let announced = Announced {
            pressure: 0,
            quota_bytes,
            policy: 0,
            generation: account.generation(),
        };
        Guest {
            name,
            socket,
            trusts_socket,
            store,
            account,
            balance: Balance::new(offer.policy),
            first_touch: Arc::new(Allowance::new(offer.first_touch_bytes)),
            mailbox: Mailbox::default(),
            announcer,
            counters: Counters::default(),
            figures: Figures::new(offer.threads()),
            announced: Mutex::new(announced),
            connection: Mutex::new(None),
            away_since: Mutex::new(Some(Instant::now())),
            was_claimed: AtomicBool::new(false),
            offer,
        }
    }

    /// A front-end says which virtual machine it has, or nothing. Unless it is the one whose pages
    /// these are, all of them go.
    ///
    /// # Errors
    /// When the store cannot do that; then the front-end must not be served.
    pub fn claim(&self, instance: Option<Instance>) -> Result<(), StoreError> {
        let _alone = self.away_since.lock();
        let known = self.account.instance();
        let is_same = instance == Some(known);
        let is_used = self.was_claimed.swap(true, Ordering::Relaxed)
            || known != NO_INSTANCE
            || !self.account.pools().is_empty();
        if !is_same && is_used && !self.trusts_socket {
            self.drop_pages("another virtual machine came")?;
            // What was asked of the one before, and what that one told, is not this one's.
            self.mailbox.clear();
            self.balance.forget();
        }
        let now = match instance {
            Some(instance) => instance,
            None if self.trusts_socket => known,
            None => NO_INSTANCE,
        };
        if now != known {
            self.account.set_instance(now)?;
        }
        Ok(())
    }

    /// Drops all pools and pages, and says how many pages. The guest finds another generation; while
    /// it is connected, nothing is done unless it is `force`d.
    ///
    /// # Errors
    /// When the store cannot, and then nothing was done.
    pub fn reset(&self, force: bool) -> Result<Option<u64>, StoreError> {
        // Whoever connects meanwhile waits to claim what is left.
        let away_since = self.away_since.lock();
        if away_since.is_none() && !force {
            return Ok(None);
        }
        let pages = self.drop_pages("the operator said so")?;
        self.first_touch.clear();
        Ok(Some(pages))
    }

    /// Drops them when nobody was connected for `limit`.
    ///
    /// # Errors
    /// When the store cannot.
    pub fn forget_after(&self, limit: Duration) -> Result<(), StoreError> {
        let away_since = self.away_since.lock();
        let is_away = away_since.is_some_and(|since| since.elapsed() >= limit);
        if is_away && !self.account.pools().is_empty() {
            self.drop_pages("nobody was connected for as long as they are kept")?;
        }
        Ok(())
    }

    fn drop_pages(&self, why: &str) -> Result<u64, StoreError> {
        let pages = self.account.stats().pages_stored;
        self.account.reset()?;
        // There is room for the others, too.
        self.announcer.poke();
        log::info!("{}: {pages} pages dropped: {why}", self.name);
        Ok(pages)
    }

    /// The configuration space, as of now.
    pub fn config(&self) -> Config {
        Config {
            version: VERSION.into(),
            num_request_queues: self.offer.request_queues.into(),
            max_batch: u16::try_from(MAX_BATCH).unwrap_or(1).into(),
            page_shift: PAGE_SHIFT,
            max_pools: self.offer.max_pools.into(),
            quota_bytes: self.quota_bytes().into(),
            pressure: self.pressure().into(),
            state: state::READY.into(),
            generation: self.account.generation().into(),
            policy: self.balance.bits(|| self.fullness()).into(),
            ..Config::default()
        }
    }

    /// The pressure on the guest, 0 to 1000.
    pub fn pressure(&self) -> u32 {
        self.account.pressure().min(PRESSURE_MAX)
    }

    /// Bytes that the guest may hold. Without a quota of its own, that is all there are.
    pub fn quota_bytes(&self) -> u64 {
        self.account
            .quota_bytes()
            .unwrap_or_else(|| self.store.capacity_bytes())
    }

    /// How full the pool is for this guest.
    fn fullness(&self) -> Fullness {
        let permille = |held: u64, limit: u64| held.saturating_mul(1000) / limit.max(1);
        let own = self.account.stats().mem_used_total;
        let all = self.store.stats().mem_used_total;
        permille(own, self.quota_bytes()).max(permille(all, self.store.capacity_bytes()))
    }

    /// Remembers the connection that serves the guest now.
    pub fn attach(&self, device: &Arc<Device>) {
        Counters::add(&self.counters.connections, 1);
        *self.away_since.lock() = None;
        *self.connection.lock() = Some(Arc::downgrade(device));
    }

    /// The connection is over.
    pub fn detach(&self) {
        let mut away_since = self.away_since.lock();
        *self.connection.lock() = None;
        *away_since = Some(Instant::now());
    }

    /// The connection that serves the guest now.
    pub fn connection(&self) -> Option<Arc<Device>> {
        self.connection.lock().as_ref()?.upgrade()
    }

    /// Whether a front-end is connected.
    pub fn is_connected(&self) -> bool {
        self.connection.lock().is_some()
    }

    /// Announces generation, pressure and quota where they differ enough from what was announced before.
    pub fn announce_changes(&self) {
        let (pressure, quota_bytes) = (self.pressure(), self.quota_bytes());
        let policy = self.balance.bits(|| self.fullness());
        let generation = self.account.generation();
        let mut announced = self.announced.lock();
        let generation_changed = announced.generation != generation;
        announced.generation = generation;
        let pressure_changed = is_worth_announcing(announced.pressure, pressure);
        let quota_changed = announced.quota_bytes != quota_bytes;
        if pressure_changed {
            announced.pressure = pressure;
            self.mailbox.post_pressure(pressure);
        }
        if quota_changed {
            announced.quota_bytes = quota_bytes;
            self.mailbox.post_quota(quota_bytes);
        }
        let policy_changed = announced.policy != policy;
        announced.policy = policy;
        drop(announced);
        if (generation_changed || pressure_changed || quota_changed || policy_changed)
            && let Some(device) = self.connection()
        {
            device.announce_config_change();
            device.wake_event_worker();
        }
    }

    /// Asks the guest to free pages of its memory: the cold ones come to the pool. False when
    /// there is no driver that can do so.
    pub fn ask_to_shrink(&self, pages: u32) -> bool {
        let Some(device) = self.connection() else {
            return false;
        };
        if !(device.has_feature(feature::SQUEEZE) && device.has_feature(feature::EVENTS)) {
            return false;
        }
        self.balance.squeeze_asked(pages);
        self.mailbox.post_squeeze(pages);
        device.wake_event_worker();
        true
    }

    /// Asks the guest to take pages back.
    pub fn ask_to_give_back(&self, pages: u32) {
        self.balance.give_back_asked(pages);
        self.mailbox.post_give_back(pages);
        if let Some(device) = self.connection() {
            device.wake_event_worker();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use cram_store::{PoolId, PoolKind, PoolSpec};

    use crate::device::tests::device;

    /// A connection takes a while to end, and all of that the guest may be back in a moment.
    #[test]
    fn pages_are_not_forgotten_while_a_connection_ends() {
        let device = device(1, 16);
        let guest = Arc::clone(device.guest());
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        guest.account.new_pool(PoolId(0), spec).unwrap();
        guest.attach(&device);
        drop(device);
        guest.forget_after(Duration::ZERO).unwrap();
        assert!(!guest.account.pools().is_empty());
        guest.detach();
        guest.forget_after(Duration::ZERO).unwrap();
        assert!(guest.account.pools().is_empty());
    }
}
