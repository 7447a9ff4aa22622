// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client's pool: put, get and flush, with tmem's semantics.

use std::sync::Arc;

use crate::arena::{Header, Kind, Pin, Place};
use crate::codec::{Scratch, filled_payload, filled_with, filled_word};
use crate::engine::Core;
use crate::engine::evict::Whose;
use crate::engine::share::Putting;
use crate::ledger::account::Account;
use crate::ledger::stats::{Event, PoolStats, Refusal};
use crate::machine::sync::atomic::{AtomicBool, Ordering::Relaxed};
use crate::space::index::Key;
use crate::space::{Incoming, Obstacle, Space};
use crate::spec::{Keeping, PoolSpec};
use crate::spec::{ObjectId, PAGE_SIZE, Page};

/// What became of a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use = "a refused page is not in the store, and neither is any older copy"]
pub enum PutResult {
    /// The page is in the store; an older copy is overwritten.
    Stored,
    /// The page is not in the store; an older copy has been removed.
    Refused(Refusal),
}

/// What became of a get.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[must_use = "only a page that was found is in the buffer"]
pub enum GetResult {
    /// The buffer holds the page that was put last.
    Found,
    /// The page is not there. The buffer is untouched.
    Missing,
    /// The page is there but damaged: its checksum is wrong. The buffer holds zeroes. The page
    /// stays, and is reported again, until it is flushed, overwritten or evicted.
    Corrupt,
}

/// How often a put makes room and tries again before it is refused. Many others may take what it
/// made.
const PUT_TRIES: u32 = 32;
/// How often an exclusive get starts again when the page changed while it was unpacked.
const GET_TRIES: u32 = 16;

/// One client's pool. Made by [`crate::Client::new_pool`]; a handle outlives the pool's
/// destruction, and then refuses every put and finds nothing.
///
/// All operations may be called from any number of threads at once. Object ids and page numbers
/// come from guests: every value is allowed.
pub struct Pool {
    core: Arc<Core>,
    spec: PoolSpec,
    space: Arc<Space>,
    account: Arc<Account>,
    is_left: AtomicBool,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool")
            .field("spec", &self.spec)
            .finish_non_exhaustive()
    }
}

/// A page that was found, pinned where it is.
struct Held<'a> {
    place: Place,
    pin: Pin<'a>,
    header: Header,
    /// Of a page that has its bytes from an image: the image.
    image: Option<(Place, Pin<'a>, Header)>,
}

/// What the index led to.
enum Lookup<'a> {
    Missing,
    /// The record, or the image that it needs, is damaged beyond repair.
    Damaged,
    Held(Held<'a>),
}

impl Pool {
    pub(crate) fn new(
        core: Arc<Core>,
        spec: PoolSpec,
        space: Arc<Space>,
        account: Arc<Account>,
    ) -> Self {
        Self {
            core,
            spec,
            space,
            account,
            is_left: AtomicBool::new(false),
        }
    }

    /// The client has destroyed the pool, which others may have open still: from now on the handle
    /// does nothing any more.
    pub(crate) fn leave(&self) {
        self.is_left.store(true, Relaxed);
        self.space.wait_for_puts();
    }

    pub(crate) fn space(&self) -> &Arc<Space> {
        &self.space
    }

    /// What the pool was made with.
    #[must_use]
    pub fn spec(&self) -> PoolSpec {
        self.spec
    }

    /// How many pages are in the pool; in a shared pool those of all clients.
    #[must_use]
    pub fn pages(&self) -> u64 {
        self.space.tally.pages()
    }

    /// The pool's figures; in a shared pool those of all clients. Takes no lock.
    #[must_use]
    pub fn stats(&self) -> PoolStats {
        self.space.stats(&self.core)
    }

    fn count(&self, event: Event) {
        self.count_times(event, 1);
    }

    fn count_times(&self, event: Event, times: u64) {
        self.space.tally.count(event, times);
        if self.space.is_shared() {
            self.account.tally.count(event, times);
        }
    }

    /// Puts a page. Whatever comes of it, an older copy is never seen again.
    pub fn put(
        &self,
        object: ObjectId,
        index: u32,
        page: &Page,
        scratch: &mut Scratch,
    ) -> PutResult {
        let key = Key { object, index };
        self.count(Event::Put);
        match self.try_put(&key, page, scratch) {
            Ok(()) => PutResult::Stored,
            Err(why) => {
                if !self.is_left.load(Relaxed) {
                    self.space.remove(&self.core, &key, |_| true);
                }
                self.count(why.into());
                PutResult::Refused(why)
            }
        }
    }

    fn try_put(&self, key: &Key, page: &Page, scratch: &mut Scratch) -> Result<(), Refusal> {
        if self.is_left.load(Relaxed) {
            return Err(Refusal::NoSpace);
        }
        if self.account.is_frozen() {
            return Err(Refusal::Frozen);
        }
        let core = &*self.core;
        let (owner, worker) = (self.account.number, scratch.head());
        let incoming = |content, payload| Incoming {
            kind: Kind::Page,
            content,
            payload,
            is_zstd: false,
            owner,
            worker,
            is_left: &self.is_left,
        };
        if let Some(word) = filled_with(page) {
            let bytes = word.to_le_bytes();
            return self.store(
                key,
                &incoming(core.sums.filled(word), filled_payload(&bytes)),
            );
        }
        let content = core.sums.page(page);
        let domain = self
            .space
            .domain
            .as_ref()
            .filter(|_| core.shares_equal_pages && !self.space.is_evictable());
        if let Some(domain) = domain {
            core.twins.prefetch(domain.number(), content);
        }
        self.space.prefetch(core, key, worker);
        if let Some(domain) = domain {
            let putting = Putting {
                space: &self.space,
                domain,
                key,
                content,
                worker,
                refuses_incompressible: self.spec.refuse_incompressible,
                is_left: &self.is_left,
            };
            if core.put_as_twin(&putting, page, scratch) {
                return Ok(());
            }
        }
        let payload = scratch.pack(page);
        if self.spec.refuse_incompressible && payload.len() == PAGE_SIZE {
            return Err(Refusal::Incompressible);
        }
        self.store(key, &incoming(content, payload))
    }

    fn store(&self, key: &Key, incoming: &Incoming<'_>) -> Result<(), Refusal> {
        let mut tries = 1;
        loop {
            let Err(obstacle) = self.try_store(key, incoming) else {
                return Ok(());
            };
            // The older copy has to go in any case now, and may be all the room that is needed.
            let is_roomier = (tries == 1 && self.space.remove(&self.core, key, |_| true))
                || self.make_room(obstacle, incoming.payload.len(), tries);
            if !is_roomier || tries == PUT_TRIES {
                return Err(self.refusal(obstacle));
            }
            tries += 1;
        }
    }

    fn try_store(&self, key: &Key, incoming: &Incoming<'_>) -> Result<(), Obstacle> {
        let bill = self.space.bill_bytes(&self.core, incoming.payload.len());
        self.account.reserve(bill).map_err(|_| Obstacle::Quota)?;
        self.space
            .enter(&self.core, key, incoming)
            .inspect_err(|_| self.account.release(bill))
    }

    fn refusal(&self, obstacle: Obstacle) -> Refusal {
        match obstacle {
            Obstacle::Quota => Refusal::OverQuota,
            Obstacle::PoolGone => Refusal::NoSpace,
            Obstacle::Room | Obstacle::Index => {
                self.count(Event::LimitHit);
                self.core.note_full();
                Refusal::NoSpace
            }
        }
    }

    /// Tries to remove what stood in the way; false when there is nothing to be done.
    fn make_room(&self, obstacle: Obstacle, len: usize, tries: u32) -> bool {
        let core = &*self.core;
        // More each time: others may take what this call frees.
        let bytes = (self.space.bill_bytes(core, len) + 512) << (tries - 1).min(8);
        match obstacle {
            Obstacle::PoolGone => false,
            Obstacle::Quota => core.evict(Whose::Put(&self.account, bytes)) > 0,
            Obstacle::Room => core.make_span(),
            // The index needs bytes from the host, so spans must go back to it.
            Obstacle::Index => core.arena.trim(0) > 0 || core.make_span(),
        }
    }

    /// Gets the page that was put last under this name.
    ///
    /// From a persistent pool it stays; from a private ephemeral one it is removed, once it was
    /// found intact; from a shared ephemeral one it stays and counts as used.
    pub fn get(
        &self,
        object: ObjectId,
        index: u32,
        page: &mut Page,
        scratch: &mut Scratch,
    ) -> GetResult {
        self.count(Event::Get);
        let key = Key { object, index };
        let result = self.try_get(&key, page, scratch);
        match result {
            GetResult::Found => (),
            GetResult::Missing => self.count(Event::Missing),
            GetResult::Corrupt => {
                page.fill(0);
                self.count(Event::Corrupt);
            }
        }
        result
    }

    fn try_get(&self, key: &Key, page: &mut Page, scratch: &mut Scratch) -> GetResult {
        if self.is_left.load(Relaxed) {
            return GetResult::Missing;
        }
        let is_exclusive = self.space.keeping == Keeping::Exclusive;
        for _ in 0..GET_TRIES {
            let held = match self.look_up(key) {
                Lookup::Missing => return GetResult::Missing,
                Lookup::Damaged => return GetResult::Corrupt,
                Lookup::Held(held) => held,
            };
            if !is_exclusive {
                return if self.unpack(key, &held, page, scratch) {
                    GetResult::Found
                } else {
                    GetResult::Corrupt
                };
            }
            // Into the worker's own memory first: who comes too late leaves the caller's alone.
            let mut own = scratch.take_other();
            let is_whole = self.unpack(key, &held, &mut own, scratch);
            // Pinned as it is, the place cannot have become another page's meanwhile.
            let is_mine = is_whole && self.space.remove(&self.core, key, |now| now == held.place);
            if is_mine {
                page.copy_from_slice(&own[..]);
            }
            scratch.return_other(own);
            if !is_whole {
                return GetResult::Corrupt;
            }
            if is_mine {
                if let Some(ghosts) = self.core.ghosts() {
                    ghosts.remember(self.space.ghost_hash(key));
                }
                return GetResult::Found;
            }
        }
        // Others change this page all the time. It may be evicted at any moment, so also now: then
        // it is missing, and stays so.
        self.space.remove(&self.core, key, |_| true);
        GetResult::Missing
    }

    fn look_up(&self, key: &Key) -> Lookup<'_> {
        let core = &*self.core;
        let (shard, hash) = self.space.find(key.object, key.region());
        let index = shard.lock();
        let Some(place) = index.get(hash, key) else {
            return Lookup::Missing;
        };
        let pin = core.arena.pin(place);
        let Ok(header) = core.arena.header(place) else {
            return Lookup::Damaged;
        };
        let image = match header.kind {
            Kind::Page => None,
            Kind::Alias => match self.image_of(place, &header) {
                Some(image) => Some(image),
                None => return Lookup::Damaged,
            },
            _ => return Lookup::Damaged,
        };
        drop(index);
        if !header.is_used {
            core.arena.mark_used(place);
        }
        Lookup::Held(Held {
            place,
            pin,
            header,
            image,
        })
    }

    /// The image that an alias has its bytes from. The shard's lock is held, so the image stays.
    fn image_of(&self, alias: Place, header: &Header) -> Option<(Place, Pin<'_>, Header)> {
        let core = &*self.core;
        let number = core.image_number(alias, header)?;
        let images = self.space.domain.as_ref()?.images.lock();
        let place = images.place(number).ok()?;
        let pin = core.arena.pin(place);
        let image = core.arena.header(place).ok()?;
        if image.kind != Kind::Image {
            return None;
        }
        if !image.is_used {
            core.arena.mark_used(place);
        }
        Some((place, pin, image))
    }

    /// Makes the page from what was found and verifies it. No lock is held.
    fn unpack(&self, key: &Key, held: &Held<'_>, page: &mut Page, scratch: &mut Scratch) -> bool {
        let sums = &self.core.sums;
        let (payload, is_zstd) = match &held.image {
            Some((place, pin, image)) => (pin.payload(*place, image), image.is_zstd),
            None => (
                held.pin.payload(held.place, &held.header),
                held.header.is_zstd,
            ),
        };
        if held.header.index != key.index || !scratch.unpack(payload, is_zstd, page) {
            return false;
        }
        let content = match filled_word(payload) {
            Some(word) => sums.filled(word),
            None => sums.page(page),
        };
        content == sums.promised(&held.header)
    }

    /// Removes `count` pages from number `first` on, as far as they are there; how many were. A
    /// range that leaves the 32 bits of a page number ends with them. Acts also while frozen.
    pub fn flush_page(&self, object: ObjectId, first: u32, count: u64) -> u64 {
        let Some(more) = count.checked_sub(1) else {
            return 0;
        };
        if self.is_left.load(Relaxed) {
            return 0;
        }
        let last = u32::try_from(u64::from(first).saturating_add(more)).unwrap_or(u32::MAX);
        let removed = self.space.remove_range(&self.core, object, first, last);
        self.count_times(Event::Flush, removed);
        removed
    }

    /// Removes all pages of an object; how many there were. Acts also while frozen.
    pub fn flush_object(&self, object: ObjectId) -> u64 {
        self.flush_page(object, 0, 1 << 32)
    }

    /// Flips one bit of what a page is stored as (`bit` modulo its length), as failing memory would;
    /// of its image, if it has its bytes from one. False when the page is not there. For tests: a get
    /// must then say [`GetResult::Corrupt`].
    #[cfg(any(test, feature = "fault-injection"))]
    #[doc(hidden)]
    pub fn flip_stored_bit(&self, object: ObjectId, index: u32, bit: usize) -> bool {
        match self.look_up(&Key { object, index }) {
            Lookup::Held(held) => {
                let place = held.image.map_or(held.place, |(place, ..)| place);
                self.core.arena.flip_payload_bit(place, bit)
            }
            Lookup::Missing | Lookup::Damaged => false,
        }
    }
}
