// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A space: the pages of one pool. A private pool has a space of its own; the
//! clients of a shared pool have one together.
//!
//! A space is cut into shards by the hash of object and region, each with its
//! own lock and part of the index. Locks are held for a look-up and a copy of
//! at most 4 KiB, never while a page is packed or unpacked, and long work
//! (flushing a range, destroying) takes them anew for each leaf.

pub(crate) mod index;
pub(crate) mod leaf;
pub(crate) mod tables;

use std::sync::Arc;

use crate::arena::{Damaged, Header, Kind, Place, Record, mix};
use crate::ledger::Ledger;
use crate::ledger::account::{Account, Purse};
use crate::ledger::catalogue::OBJECT_BYTES;
use crate::ledger::domain::Domain;
use crate::ledger::hash::HashKeys;
use crate::ledger::objects::{Object, Objects};
use crate::ledger::replace::{How, Old, Slot};
use crate::ledger::stats::{Amounts, PoolStats, Tally};
use crate::log::Target;
use crate::log::queue::Class;
use crate::machine::budget::Shortage;
use crate::machine::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use crate::machine::sync::{Mutex, MutexGuard};
use crate::space::index::{Index, Key, Numbers, Prepared, leaf_hash};
use crate::space::leaf::PAGES_PER_LEAF;
use crate::spec::Keeping;
use crate::spec::ObjectId;

/// What a client is billed for a page in a shared pool beyond that, in bytes: there nobody can say
/// whose page made a table grow.
const SHARED_PAGE_BYTES: u64 = 64;

/// One shard. The number beside the lock mirrors what is inside it, for readers in a hurry.
#[derive(Debug)]
#[repr(align(64))]
pub(crate) struct Shard {
    index: Mutex<Index>,
    index_bytes: AtomicU64,
}

impl Shard {
    pub(crate) fn lock(&self) -> MutexGuard<'_, Index> {
        self.index.lock()
    }
}

/// See the module's text.
pub(crate) struct Space {
    pub(crate) number: u32,
    pub(crate) keeping: Keeping,
    /// Of a shared space; else zero.
    pub(crate) uuid: [u8; 16],
    keys: HashKeys,
    shards: Box<[Shard]>,
    pub(crate) tally: Tally,
    /// Pays for leaves and objects: the client, if the space is private. A shared space has an
    /// account of its own, without a quota, or else the quota of the client that came first would
    /// decide for all; its members pay [`SHARED_PAGE_BYTES`] for each of their pages instead.
    pub(crate) payer: Arc<Account>,
    /// Inside which equal pages are stored once. A shared space is in none: its pages have several
    /// owners.
    pub(crate) domain: Option<Arc<Domain>>,
}

/// Gives objects of a space their numbers, on behalf of an owner.
struct Numbering<'a> {
    core: &'a Ledger,
    space: &'a Space,
    owner: u16,
}

impl Numbers for Numbering<'_> {
    fn assign(&self, id: ObjectId) -> Result<u32, Shortage> {
        let object = Object {
            space: self.space.number,
            owner: self.owner,
            id,
        };
        let core = self.core;
        core.objects.assign(object, &core.budget, |number| {
            self.space.write_object(core, number, &object)
        })
    }

    fn withdraw(&self, number: u32) {
        let core = self.core;
        core.objects.withdraw(number, &core.budget, |place| {
            core.kill_copies([Some(place), None]);
            self.space.payer.release(self.space.object_copy_bytes(core));
        });
    }
}

/// A page that is to be entered: what is known of it before the shard is locked.
#[derive(Clone, Copy)]
pub(crate) struct Incoming<'a> {
    pub(crate) kind: Kind,
    pub(crate) content: crate::ledger::sums::Content,
    pub(crate) payload: &'a [u8],
    pub(crate) is_zstd: bool,
    /// The account of who puts it.
    pub(crate) owner: u16,
    /// Number of the worker that puts it.
    pub(crate) worker: usize,
    /// Set when the client has left the pool: nothing comes in any more through its handle.
    pub(crate) is_left: &'a AtomicBool,
}

/// What leads to a page that is put.
struct PutSlot<'a> {
    space: &'a Space,
    index: &'a mut Index,
    prepared: Prepared,
    old: Old,
    /// The image that the older page has its bytes from.
    image: Option<u32>,
}

impl Slot for PutSlot<'_> {
    fn old(&self) -> Old {
        self.old
    }

    fn lead_to(&mut self, to: Place) {
        self.index.enter(self.prepared, to);
    }

    fn recount(&mut self, core: &Ledger, new: &Header, to: Place) {
        let space = self.space;
        core.note_twin(space.sharing_domain(), new, to);
        match &self.old {
            Old::Nothing => space.page_in(core, new),
            Old::Damaged(_) => {
                space.page_in(core, new);
                space.lost();
            }
            Old::Whole(_, old) if space.is_evictable() => {
                space.page_in(core, new);
                space.count_out(core, old);
            }
            Old::Whole(_, old) => space.page_exchanged(core, old, new),
        }
        space.drop_image(core, self.image);
        if !matches!(self.old, Old::Nothing) {
            core.note_freed();
        }
    }
}

/// Why a page could not be entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Obstacle {
    Quota,
    /// No room in the arena.
    Room,
    /// No room for the index.
    Index,
    PoolGone,
}

impl Obstacle {
    /// A table could not grow.
    fn of_index(why: Shortage) -> Self {
        match why {
            Shortage::Store => Self::Index,
            Shortage::Quota => Self::Quota,
        }
    }
}

impl Space {
    /// Makes an empty space, whose structures `payer` pays for.
    pub(crate) fn new(
        core: &Ledger,
        number: u32,
        keeping: Keeping,
        uuid: [u8; 16],
        payer: Arc<Account>,
        domain: Option<Arc<Domain>>,
    ) -> Result<Self, Shortage> {
        let bytes = Self::fixed_bytes(core);
        payer.reserve(bytes)?;
        core.budget
            .reserve(bytes)
            .inspect_err(|_| payer.release(bytes))?;
        let secret = core.arena.secret();
        let keys = HashKeys(secret.number(3) ^ mix(u64::from(number)), secret.number(4));
        let shard = |_| Shard {
            index: Mutex::new(Index::new(keys)),
            index_bytes: AtomicU64::new(0),
        };
        Ok(Self {
            number,
            keeping,
            uuid,
            shards: (0..core.shards_per_space).map(shard).collect(),
            keys,
            tally: Tally::new(core.stripes),
            payer,
            domain,
        })
    }

    /// Bytes of an empty space and of one client's handle on it.
    pub(crate) fn fixed_bytes(core: &Ledger) -> u64 {
        let shards = core.shards_per_space * size_of::<Shard>();
        (size_of::<Self>() + Tally::bytes(core.stripes) + shards + 512) as u64
    }

    pub(crate) fn is_evictable(&self) -> bool {
        self.keeping != Keeping::Persistent
    }

    pub(crate) fn is_shared(&self) -> bool {
        self.keeping == Keeping::Shared
    }

    /// Inside which its pages may be stored once with others. Ephemeral ones are not.
    pub(crate) fn sharing_domain(&self) -> Option<&Domain> {
        self.domain.as_deref().filter(|_| !self.is_evictable())
    }

    pub(crate) fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// A page's shard and the hash to look it up with.
    pub(crate) fn find(&self, object: ObjectId, region: u32) -> (&Shard, u64) {
        let hash = leaf_hash(self.keys, object, region);
        (&self.shards[self.shard_at(hash)], hash)
    }

    fn shard_at(&self, hash: u64) -> usize {
        // Bits that the tables inside the shard do not look at.
        usize::try_from(hash >> 32 & 0xff_ffff).unwrap_or(0) % self.shards.len()
    }

    /// The number of a page's shard.
    pub(crate) fn shard_of(&self, object: ObjectId, region: u32) -> usize {
        self.shard_at(leaf_hash(self.keys, object, region))
    }

    /// By which the store remembers an ephemeral page that is gone.
    pub(crate) fn ghost_hash(&self, key: &Key) -> u64 {
        self.keys.hash_one((key.object, key.index))
    }

    fn numbering<'a>(&'a self, core: &'a Ledger, owner: u16) -> Numbering<'a> {
        Numbering {
            core,
            space: self,
            owner,
        }
    }

    /// What a page with so many bytes of payload is billed to the client that put it.
    pub(crate) fn bill_bytes(&self, core: &Ledger, payload: usize) -> u64 {
        let shared = if self.is_shared() {
            SHARED_PAGE_BYTES
        } else {
            0
        };
        core.record_bytes(payload) + shared
    }

    /// Who pays for its tables.
    pub(crate) fn purse<'a>(&'a self, core: &'a Ledger) -> Purse<'a> {
        Purse {
            budget: &core.budget,
            payer: &self.payer,
        }
    }

    /// What the payer is billed for one record of an object: the record, and with all of them its
    /// entry in the table of objects.
    pub(crate) fn object_copy_bytes(&self, core: &Ledger) -> u64 {
        core.record_bytes(OBJECT_BYTES) + Objects::ENTRY_BYTES / self.object_copies() as u64
    }

    /// How many records an object has.
    pub(crate) fn object_copies(&self) -> usize {
        if self.is_evictable() { 1 } else { 2 }
    }

    /// Writes the records of an object, and bills them.
    fn write_object(
        &self,
        core: &Ledger,
        number: u32,
        object: &Object,
    ) -> Result<[Option<Place>; 2], Shortage> {
        let copies = self.object_copies();
        let bytes = self.object_copy_bytes(core) * copies as u64;
        self.payer.reserve(bytes)?;
        core.write_object(number, object, copies)
            .inspect_err(|_| self.payer.release(bytes))
    }

    /// Calls `act` with the account that is billed for pages of this object number.
    pub(crate) fn with_owner(&self, core: &Ledger, number: u32, act: impl FnOnce(&Account)) {
        if !self.is_shared() {
            return act(&self.payer);
        }
        if let Some(object) = core.objects.get(number) {
            core.accounts.with(object.owner, act);
        }
    }

    /// Where a page that comes in goes.
    fn target<'a>(&'a self, core: &'a Ledger, key: &Key, worker: usize) -> Target<'a> {
        if !self.is_evictable() {
            return Target::Log(core.put_head(worker));
        }
        let is_known = core
            .ghosts()
            .is_some_and(|ghosts| ghosts.recall(self.ghost_hash(key)));
        let class = if is_known {
            Class::Proven
        } else {
            Class::Fresh
        };
        Target::Queue(&self.payer.queue, class)
    }

    /// Fetches the memory that [`Self::enter`] will touch.
    pub(crate) fn prefetch(&self, core: &Ledger, key: &Key, worker: usize) {
        /// More than half of all images are not longer.
        const IMAGE_BYTES: usize = 2048;
        if !self.is_evictable() {
            core.arena.prefetch_tail(core.put_head(worker), IMAGE_BYTES);
        }
        let (shard, hash) = self.find(key.object, key.region());
        if let Some(old) = shard.lock().get(hash, key) {
            core.arena.prefetch_header(old);
        }
    }

    /// Stores a page, in the place of an older one; or leaves everything as it was. The page itself
    /// is on the owner's bill already.
    pub(crate) fn enter(
        &self,
        core: &Ledger,
        key: &Key,
        incoming: &Incoming<'_>,
    ) -> Result<(), Obstacle> {
        let target = self.target(core, key, incoming.worker);
        let numbering = self.numbering(core, incoming.owner);
        let (shard, hash) = self.find(key.object, key.region());
        let mut index = shard.lock();
        if index.is_dead || incoming.is_left.load(Relaxed) {
            return Err(Obstacle::PoolGone);
        }
        let purse = self.purse(core);
        let prepared = index.prepare(hash, key, &numbering, &purse);
        // On a shortage, too: some table may have grown before another could not.
        shard.publish(&index);
        let prepared = prepared.map_err(Obstacle::of_index)?;
        self.replace(core, target, key, incoming, &mut index, prepared)
            .inspect_err(|_| {
                index.cancel(prepared, &numbering, &purse);
                shard.publish(&index);
            })
    }

    /// Puts the record of a page, for which room was made in the index, in the place of the older one.
    fn replace(
        &self,
        core: &Ledger,
        target: Target<'_>,
        key: &Key,
        incoming: &Incoming<'_>,
        index: &mut Index,
        prepared: Prepared,
    ) -> Result<(), Obstacle> {
        let number = if self.is_shared() {
            let write = |number, object| self.write_object(core, number, &object);
            let owner = incoming.owner;
            core.objects
                .of_owner(prepared.number, owner, &core.budget, write)
                .map_err(Obstacle::of_index)?
        } else {
            prepared.number
        };
        let old = match prepared.old {
            None => Old::Nothing,
            Some(place) => match core.arena.header(place) {
                Ok(header) => Old::Whole(place, header),
                Err(Damaged) => Old::Damaged(place),
            },
        };
        let generation = match old {
            Old::Whole(_, old) => old.generation.wrapping_add(1) & 3,
            // Of a page that is damaged nothing is known; it is about to be killed anyway.
            Old::Nothing | Old::Damaged(_) => 0,
        };
        let image = match old {
            Old::Whole(place, header) => self.image_needed(core, place, &header),
            Old::Nothing | Old::Damaged(_) => None,
        };
        let record = Record {
            header: Header {
                kind: incoming.kind,
                number,
                index: key.index,
                len: incoming.payload.len(),
                is_zstd: incoming.is_zstd,
                check: core.sums.check(incoming.content, number, key.index),
                generation,
                is_used: false,
            },
            payload: incoming.payload,
        };
        let mut slot = PutSlot {
            space: self,
            index,
            prepared,
            old,
            image,
        };
        core.replace_record(&mut slot, record, How::put(target))
            .map_err(|_| Obstacle::Room)?;
        Ok(())
    }

    /// Counts a page that has come. With the shard's lock held.
    pub(crate) fn page_in(&self, core: &Ledger, header: &Header) {
        let amounts = self.amounts(core, header);
        self.tally.add(&amounts);
        core.sizes.add(header.len);
        if self.is_evictable() {
            self.note_evictable(core, header, &amounts, true);
        }
    }

    fn amounts(&self, core: &Ledger, header: &Header) -> Amounts<u64> {
        Amounts::of(header, self.bill_bytes(core, header.len))
    }

    /// Counts an ephemeral page where persistent ones are not.
    fn note_evictable(&self, core: &Ledger, header: &Header, amounts: &Amounts<u64>, is_in: bool) {
        let change = |counter: &AtomicU64| {
            if is_in {
                counter.fetch_add(amounts.billed_bytes, Relaxed);
            } else {
                counter.fetch_sub(amounts.billed_bytes, Relaxed);
            }
        };
        change(&core.evictable_bytes);
        self.with_owner(core, header.number, |owner| {
            change(&owner.evictable_bytes);
            if self.is_shared() && is_in {
                owner.tally.add(amounts);
            } else if self.is_shared() {
                owner.tally.sub(amounts);
            }
        });
    }

    /// The image that a page's record needs, if it is an alias.
    fn image_needed(&self, core: &Ledger, place: Place, header: &Header) -> Option<u32> {
        match header.kind {
            Kind::Alias => core.image_number(place, header),
            _ => None,
        }
    }

    /// Counts a page that took another's place. Both are on the bill.
    fn page_exchanged(&self, core: &Ledger, old: &Header, new: &Header) {
        let (gone, come) = (self.amounts(core, old), self.amounts(core, new));
        self.tally.exchange(&gone, &come);
        core.sizes.exchange(old.len, new.len);
        self.payer.release(gone.billed_bytes);
    }

    fn drop_image(&self, core: &Ledger, image: Option<u32>) {
        if let (Some(domain), Some(image)) = (&self.domain, image) {
            core.drop_image_ref(domain, image);
        }
    }

    /// Kills the record of a page that has left the index, and counts it out. With the shard's lock
    /// held.
    pub(crate) fn page_out(&self, core: &Ledger, place: Place) {
        let Ok(header) = core.arena.header(place) else {
            let _ = core.arena.kill(place);
            self.lost();
            return;
        };
        let image = self.image_needed(core, place, &header);
        core.arena.kill_known(place, &header);
        self.count_out(core, &header);
        self.drop_image(core, image);
        core.note_freed();
    }

    /// Counts out a page whose record is dead.
    pub(crate) fn count_out(&self, core: &Ledger, header: &Header) {
        let amounts = self.amounts(core, header);
        self.tally.sub(&amounts);
        core.sizes.sub(header.len);
        if self.is_evictable() {
            self.note_evictable(core, header, &amounts, false);
        }
        self.with_owner(core, header.number, |owner| {
            owner.release(amounts.billed_bytes);
        });
    }

    /// A page whose header is damaged beyond repair has left the index. How long it was is not to be
    /// known: it stays on the bill, and its span is lost to the store until it is opened anew.
    fn lost(&self) {
        self.tally.sub(&Amounts {
            pages: 1,
            ..Amounts::default()
        });
    }

    /// Takes one page out, if `is_it` is true of where it is. Whether it was there.
    pub(crate) fn remove(
        &self,
        core: &Ledger,
        key: &Key,
        is_it: impl FnOnce(Place) -> bool,
    ) -> bool {
        let (shard, hash) = self.find(key.object, key.region());
        let mut index = shard.lock();
        let was_there = self.taking_out(core, shard, &mut index, |index, numbering| {
            let gone = |place| self.page_out(core, place);
            index.remove(hash, key, numbering, &self.purse(core), is_it, gone)
        });
        drop(index);
        core.relieve();
        was_there
    }

    /// Does what takes pages out of a shard, and tells those in a hurry.
    fn taking_out<T>(
        &self,
        core: &Ledger,
        shard: &Shard,
        index: &mut Index,
        act: impl FnOnce(&mut Index, &Numbering<'_>) -> T,
    ) -> T {
        let result = act(index, &self.numbering(core, self.payer.number));
        shard.publish(index);
        result
    }

    /// Takes out all pages of an object whose numbers are in `first..=last`; how many there were.
    /// Costs the lesser of the range's width and what the object stores.
    pub(crate) fn remove_range(
        &self,
        core: &Ledger,
        object: ObjectId,
        first: u32,
        last: u32,
    ) -> u64 {
        let (low, high) = (first / PAGES_PER_LEAF, last / PAGES_PER_LEAF);
        let width = high - low + 1;
        // A narrow range is tried number by number; else the object's own lists tell what is there.
        let shards = u32::try_from(self.shards.len()).unwrap_or(u32::MAX);
        let is_narrow = width <= shards || {
            let leaves = |shard: &Shard| u64::from(shard.lock().leaves_of(object));
            u64::from(width) <= self.shards.iter().map(leaves).sum()
        };
        let mut removed = 0;
        let mut strip = |region: u32| {
            let from = if region == low {
                first % PAGES_PER_LEAF
            } else {
                0
            };
            let to = if region == high {
                last % PAGES_PER_LEAF
            } else {
                PAGES_PER_LEAF - 1
            };
            let mask = (u64::MAX << from) & (u64::MAX >> (PAGES_PER_LEAF - 1 - to));
            removed += self.remove_masked(core, object, region, mask);
        };
        if is_narrow {
            (low..=high).for_each(strip);
        } else {
            let mut regions = Vec::new();
            for shard in &self.shards {
                shard.lock().regions_of(object, low, high, &mut regions);
                regions.drain(..).for_each(&mut strip);
            }
        }
        removed
    }

    fn remove_masked(&self, core: &Ledger, object: ObjectId, region: u32, mask: u64) -> u64 {
        let (shard, hash) = self.find(object, region);
        let mut removed = 0;
        let mut index = shard.lock();
        self.taking_out(core, shard, &mut index, |index, numbering| {
            let gone = |place| {
                self.page_out(core, place);
                removed += 1;
            };
            index.remove_masked(
                hash,
                (object, region, mask),
                numbering,
                &self.purse(core),
                gone,
            );
        });
        drop(index);
        core.relieve();
        removed
    }

    /// Waits until whoever is entering a page has entered it. Who set [`Incoming::is_left`] before
    /// knows then that nothing more comes.
    pub(crate) fn wait_for_puts(&self) {
        for shard in &self.shards {
            drop(shard.lock());
        }
    }

    /// Takes everything out, for good: nothing comes in any more. How many pages there were.
    pub(crate) fn destroy(&self, core: &Ledger) -> u64 {
        let mut removed = 0;
        for shard in &self.shards {
            shard.lock().is_dead = true;
            let mut is_more = true;
            while is_more {
                let mut index = shard.lock();
                is_more = self.taking_out(core, shard, &mut index, |index, numbering| {
                    let gone = |place| {
                        self.page_out(core, place);
                        removed += 1;
                    };
                    index.remove_last(numbering, &self.purse(core), gone)
                });
                drop(index);
                core.relieve();
            }
        }
        // What happened here stays on record: with the client, or (of a shared pool, whose events
        // its clients counted too) nowhere.
        if !self.is_shared() {
            self.payer.tally.absorb(&self.tally.sum());
        }
        let bytes = Self::fixed_bytes(core);
        self.payer.release(bytes);
        core.budget.release(bytes);
        removed
    }

    /// Bytes that its index has allocated.
    pub(crate) fn index_bytes(&self) -> u64 {
        self.shards
            .iter()
            .map(|shard| shard.index_bytes.load(Relaxed))
            .sum()
    }

    pub(crate) fn stats(&self, core: &Ledger) -> PoolStats {
        let sum = self.tally.sum();
        let held = sum.stored.billed_bytes + self.index_bytes() + Self::fixed_bytes(core);
        sum.read(held, 0, 0)
    }
}

impl Shard {
    /// To be called before the lock is let go, whenever tables grew or shrank.
    pub(crate) fn publish(&self, index: &Index) {
        self.index_bytes.store(index.held_bytes(), Relaxed);
    }
}
