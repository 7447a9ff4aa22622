// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opening an arena that has something in it: the index is made anew from the
//! records alone.
//!
//! First the catalogue is read (accounts, spaces, pools, objects), then all
//! spans of pages, on as many threads as there are processors. A live record is
//! entered; of two records of one page, the newer one. Whatever belongs to
//! nothing, contradicts something or cannot be verified is declared dead.
//!
//! What was acknowledged is found, and what was removed is not, wherever the
//! process was killed: a page's record lives from one atomic store on, which
//! comes before the acknowledgement; and so it is with its end.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::account::{Account, Holder};
use crate::arena::{Arena, Found, Header, Kind, NUMBERS, Place, Role, SpanHeader, Trust, is_newer};
use crate::budget::Shortage;
use crate::catalogue::{AccountRecord, EntryKey, PoolRecord, SpaceRecord, object_from_bytes};
use crate::client::{PoolId, PoolKind, PoolSpec};
use crate::codec::{Scratch, filled_word};
use crate::core::Core;
use crate::domain::Domain;
use crate::index::{Key, Numbers};
use crate::objects::Object;
use crate::queue::Class;
use crate::share::image_in;
use crate::space::{Keeping, Space};
use crate::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use crate::{ObjectId, PAGE_SIZE, Page};

/// What was found when a store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Pages that are there again.
    pub pages: u64,
    /// Records that lived but were torn, damaged, or superseded, and were discarded.
    pub discarded: u64,
    /// The machine was started anew in between, so every page was unpacked and verified.
    pub is_verified: bool,
    /// Threads that worked on it.
    pub threads: u32,
    /// How long it took, from the moment that the file was opened.
    pub took: Duration,
}

/// A client that was found, with its pools.
pub(crate) struct KnownClient {
    pub(crate) account: Arc<Account>,
    pub(crate) domain: Arc<Domain>,
    pub(crate) pools: Vec<(PoolId, PoolSpec, Arc<Space>)>,
}

/// Numbers of spaces that are believed; more there cannot be.
const SPACES_MAX: u32 = 1 << 22;

/// Fewer spans than this are no work for another thread.
const SPANS_PER_THREAD: usize = 64;

/// A record of the catalogue that was found.
struct Copy {
    place: Place,
    generation: u8,
    payload: Vec<u8>,
}

/// Enters everything that is in the arena, which began to be opened at `began`, into an empty core.
pub(crate) fn recover(
    core: &Core,
    found: &[(SpanHeader, u32)],
    is_after_reboot: bool,
    began: Instant,
) -> Result<(Recovery, Vec<KnownClient>), Shortage> {
    let reader = Reader {
        core,
        verifies_all: is_after_reboot,
        discarded: AtomicU64::new(0),
    };
    let (catalogue, pages): (Vec<_>, Vec<_>) = found
        .iter()
        .partition(|(header, _)| header.role == Role::Catalogue);
    let entries = reader.read_catalogue(&catalogue);
    let known = reader.enter_accounts(&entries);
    let clients = reader.enter_pools(&entries, known);
    let objects = reader.enter_objects(&entries)?;
    drop(entries);

    // A thread is worth its while for some spans, not for one.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.min(pages.len() / SPANS_PER_THREAD + 1);
    reader.read_pages(&pages, &objects, threads)?;
    reader.settle(&objects);
    reader.seal(found);
    let recovery = Recovery {
        pages: core.sum().stored.pages,
        discarded: reader.discarded.load(Relaxed),
        is_verified: is_after_reboot,
        threads: u32::try_from(threads).unwrap_or(u32::MAX),
        took: began.elapsed(),
    };
    Ok((recovery, clients))
}

/// For each number of an object, the shard in which pages were found under it, counted from 1; and
/// [`Needed::ENTERED`] once one was entered.
struct Needed(Vec<AtomicU8>);

impl Needed {
    const ENTERED: u8 = 0x80;

    fn new(numbers: usize) -> Self {
        Self((0..numbers).map(|_| AtomicU8::new(0)).collect())
    }

    /// A page was found in this shard. False when there are others in another one: a number is of one
    /// shard, so the record lies.
    fn claim(&self, number: u32, shard: usize) -> bool {
        let shard = u8::try_from(shard + 1).unwrap_or(u8::MAX);
        self.0.get(number as usize).is_some_and(|claimed| {
            match claimed.compare_exchange(0, shard, Relaxed, Relaxed) {
                Ok(_) => true,
                Err(claimed) => claimed & !Self::ENTERED == shard,
            }
        })
    }

    fn note(&self, number: u32) {
        if let Some(claimed) = self.0.get(number as usize) {
            claimed.fetch_or(Self::ENTERED, Relaxed);
        }
    }

    fn has(&self, number: u32) -> bool {
        self.0
            .get(number as usize)
            .is_some_and(|claimed| claimed.load(Relaxed) & Self::ENTERED != 0)
    }
}

struct Reader<'a> {
    core: &'a Core,
    /// Nothing is believed that is not verified.
    verifies_all: bool,
    discarded: AtomicU64,
}

/// Hands out the numbers that the records say.
struct Numbering {
    number: u32,
}

impl Numbers for Numbering {
    fn assign(&self, _object: ObjectId) -> Result<u32, Shortage> {
        Ok(self.number)
    }

    fn withdraw(&self, _number: u32) {}
}

impl Reader<'_> {
    fn arena(&self) -> &Arena {
        &self.core.arena
    }

    /// A record that lived is dead from now on.
    fn discard(&self, place: Place) {
        self.discarded.fetch_add(1, Relaxed);
        self.arena().reject(place);
    }

    /// A record of a page or an image that is not to be entered. What names no owner at all may well
    /// be no record, but something that looks like one behind the last.
    fn drop_record(&self, found: &Found) {
        let header = &found.header;
        let has_owner = match header.kind {
            Kind::Image => {
                u16::try_from(header.number).is_ok_and(|number| self.core.domain(number).is_some())
            }
            _ => self.core.objects.get(header.number).is_some(),
        };
        if has_owner {
            self.discard(found.place);
        } else {
            self.arena().reject(found.place);
        }
    }

    fn payload(&self, found: &Found) -> Vec<u8> {
        let pin = self.arena().pin(found.place);
        pin.payload(found.place, &found.header).to_vec()
    }

    /// Walks the catalogue's spans. Of each entry, the copies of its newest state.
    fn read_catalogue(&self, spans: &[&(SpanHeader, u32)]) -> BTreeMap<EntryKey, Vec<Copy>> {
        let mut entries: BTreeMap<EntryKey, Vec<Copy>> = BTreeMap::new();
        for span in spans {
            self.walk(span, &mut |found| {
                let header = found.header;
                let is_named = match header.kind {
                    Kind::Account | Kind::Space | Kind::Object => header.index == 0,
                    Kind::Pool => true,
                    Kind::Page | Kind::Image | Kind::Alias => false,
                };
                let is_entry = is_named && header.len < PAGE_SIZE;
                let payload = self.payload(found);
                let sums = &self.core.sums;
                let is_whole = is_entry && sums.bytes(&payload) == sums.promised(&header);
                if is_whole && found.is_live {
                    let key = (header.kind, header.number, header.index);
                    entries.entry(key).or_default().push(Copy {
                        place: found.place,
                        generation: header.generation,
                        payload,
                    });
                } else if found.is_live && found.trust == Trust::Header {
                    self.discard(found.place);
                }
                is_whole
            });
        }
        for copies in entries.values_mut() {
            self.keep_newest(copies);
        }
        entries
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
        let mut kept = 0;
        copies.retain(|copy| {
            let is_kept = kept < 2 && copy.generation == generation && copy.payload == payload;
            if is_kept {
                kept += 1;
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
    fn enter_accounts(&self, entries: &BTreeMap<EntryKey, Vec<Copy>>) -> Vec<KnownClient> {
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
            let account = record.filter(is_new).and_then(|record| {
                let number = u16::try_from(key.1).ok()?;
                let bytes = Account::fixed_bytes(&record.name, core.stripes);
                core.budget.reserve(bytes).ok()?;
                let account = Account::new(number, record.holder, &record.name, None, core.stripes);
                account.reserve_anyway(bytes);
                let is_gone = record.holder == Holder::Gone;
                account.is_closed.store(is_gone, Relaxed);
                Some((Arc::new(account), record.group))
            });
            let Some((account, group)) = account else {
                self.reject_all(copies);
                continue;
            };
            core.accounts.adopt(account.clone());
            self.adopt(*key, copies);
            match account.holder {
                Holder::SharingGroup => _ = core.own_domain(&account),
                Holder::Client => clients.push((account, group)),
                Holder::SharedPool | Holder::Gone => (),
            }
        }
        let with_domain = |(account, group): (Arc<Account>, Option<u16>)| {
            let group = group.and_then(|group| core.domain(group));
            let domain = group.unwrap_or_else(|| core.own_domain(&account));
            KnownClient {
                account,
                domain,
                pools: Vec::new(),
            }
        };
        clients.into_iter().map(with_domain).collect()
    }

    /// Pools and the spaces that they name.
    fn enter_pools(
        &self,
        entries: &BTreeMap<EntryKey, Vec<Copy>>,
        mut clients: Vec<KnownClient>,
    ) -> Vec<KnownClient> {
        let core = self.core;
        for (key, copies) in entries.iter().filter(|(key, _)| key.0 == Kind::Pool) {
            let client = clients
                .iter_mut()
                .find(|client| u32::from(client.account.number) == key.1);
            let entered = client.zip(copies.first()).and_then(|(client, copy)| {
                let record = PoolRecord::from_bytes(&copy.payload)?;
                let space = self.space_for(entries, client, record.space)?;
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
                Some(())
            });
            match entered {
                Some(()) => self.adopt(*key, copies),
                None => self.reject_all(copies),
            }
        }
        let spaces = entries.iter().filter(|(key, _)| key.0 == Kind::Space);
        for (key, copies) in spaces {
            if core.space(key.1).is_none() {
                self.reject_all(copies);
            }
        }
        clients
    }

    /// The space that a pool names: made from its record when the first pool does.
    fn space_for(
        &self,
        entries: &BTreeMap<EntryKey, Vec<Copy>>,
        client: &KnownClient,
        number: u32,
    ) -> Option<Arc<Space>> {
        let core = self.core;
        if let Some(space) = core.space(number) {
            // Only a shared one may be several pools'.
            let mut shared = core.shared.lock();
            let entry = shared.get_mut(&space.uuid).filter(|_| space.is_shared())?;
            entry.opened += 1;
            return Some(space);
        }
        let key = (Kind::Space, number, 0);
        let copies = entries.get(&key).filter(|_| number < SPACES_MAX)?;
        let record = SpaceRecord::from_bytes(&copies.first()?.payload)?;
        let is_shared = record.keeping == Keeping::Shared;
        let payer = core.accounts.get(record.account)?;
        let is_right = if is_shared {
            payer.holder == Holder::SharedPool && !core.shared.lock().contains_key(&record.uuid)
        } else {
            payer.number == client.account.number
        };
        if !is_right {
            return None;
        }
        let domain = (!is_shared).then(|| client.domain.clone());
        let space = Space::new(core, number, record.keeping, record.uuid, payer, domain).ok()?;
        let space = Arc::new(space);
        core.adopt_space(space.clone());
        if is_shared {
            core.adopt_shared(space.clone());
        }
        self.adopt(key, copies);
        Some(space)
    }

    /// Objects. Returns room to note which of them are needed.
    fn enter_objects(&self, entries: &BTreeMap<EntryKey, Vec<Copy>>) -> Result<Needed, Shortage> {
        let core = self.core;
        let mut numbers = 0;
        for (key, copies) in entries.iter().filter(|(key, _)| key.0 == Kind::Object) {
            let object = copies
                .first()
                .and_then(|copy| object_from_bytes(&copy.payload))
                .filter(|object| core.space(object.space).is_some() && key.1 < NUMBERS);
            let Some(object) = object else {
                self.reject_all(copies);
                continue;
            };
            numbers = numbers.max(key.1 as usize + 1);
            for copy in copies {
                if core
                    .objects
                    .adopt(key.1, object, copy.place, &core.budget)?
                {
                    self.live(copy.place);
                } else {
                    self.discard(copy.place);
                }
            }
        }
        Ok(Needed::new(numbers))
    }

    /// Walks a span and hands every record to `take`, which says whether it is one. The span is as
    /// far filled as the last record reaches.
    fn walk(&self, (span, granules): &(SpanHeader, u32), take: &mut dyn FnMut(&Found) -> bool) {
        let arena = self.arena();
        let layout = arena.layout();
        let mut filled = layout.first_granule();
        let mut walk = arena.walk(span.span, *granules);
        while let Some(found) = walk.next() {
            let is_real = take(&found);
            if found.trust == Trust::Nothing {
                walk.verified(&found, is_real);
            }
            if is_real || found.trust == Trust::Header {
                let end =
                    layout.granule_of(found.place) + layout.granules(found.header.record_bytes());
                filled = filled.max(end);
            }
        }
        arena.spans().set_filled(span.span, filled);
        if walk.was_lost() {
            arena.spans().note_damage(span.span);
        }
    }

    /// Walks all spans of pages, `threads` at a time.
    fn read_pages(
        &self,
        spans: &[&(SpanHeader, u32)],
        objects: &Needed,
        threads: usize,
    ) -> Result<(), Shortage> {
        let next = AtomicU64::new(0);
        let work = || -> Result<(), Shortage> {
            let mut scratch = Scratch::new();
            let mut page = Box::new([0; PAGE_SIZE]);
            let mut shortage = Ok(());
            loop {
                let at = usize::try_from(next.fetch_add(1, Relaxed)).unwrap_or(usize::MAX);
                let Some(span) = spans.get(at) else {
                    return shortage;
                };
                self.walk(span, &mut |found| {
                    let must_verify = found.trust == Trust::Nothing || self.verifies_all;
                    let is_whole = !must_verify || self.is_whole(found, &mut scratch, &mut page);
                    if !found.is_live {
                        return is_whole;
                    }
                    if is_whole {
                        match self.enter_record(found, span.0.role, objects) {
                            Ok(true) => (),
                            Ok(false) => self.drop_record(found),
                            Err(why) => shortage = Err(why),
                        }
                    } else if found.trust == Trust::Header {
                        self.drop_record(found);
                    }
                    is_whole
                });
            }
        };
        if threads == 1 {
            return work();
        }
        std::thread::scope(|scope| {
            let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            let mut results = workers.into_iter().map(|worker| worker.join());
            results.try_for_each(|result| result.unwrap_or(Err(Shortage::Store)))
        })
    }

    /// Whether a record's payload is what its header promises.
    fn is_whole(&self, found: &Found, scratch: &mut Scratch, page: &mut Page) -> bool {
        let header = &found.header;
        let sums = &self.core.sums;
        let pin = self.arena().pin(found.place);
        let payload = pin.payload(found.place, header);
        match header.kind {
            Kind::Page | Kind::Image => {
                if !scratch.unpack(payload, header.is_zstd, page) {
                    return false;
                }
                let content = match filled_word(payload) {
                    Some(word) => sums.filled(word),
                    None => sums.page(page),
                };
                content == sums.promised(header)
            }
            // Its sum is of the page that it stands for, so nothing can be said here; but what it
            // has for a payload must at least be the number of an image.
            Kind::Alias => image_in(payload).is_some() && found.trust == Trust::Header,
            _ => false,
        }
    }

    /// Enters a live record of a page or an image. False when it is to be discarded.
    fn enter_record(&self, found: &Found, role: Role, objects: &Needed) -> Result<bool, Shortage> {
        let header = &found.header;
        match header.kind {
            Kind::Image => self.enter_image(found),
            Kind::Page | Kind::Alias => self.enter_page(found, role, objects),
            Kind::Account | Kind::Space | Kind::Pool | Kind::Object => Ok(false),
        }
    }

    fn enter_image(&self, found: &Found) -> Result<bool, Shortage> {
        let core = self.core;
        let header = &found.header;
        let domain = u16::try_from(header.number).ok();
        let Some(domain) = domain.and_then(|number| core.domain(number)) else {
            return Ok(false);
        };
        let mut images = domain.images.lock();
        self.make_room_for(&mut images, header.index)?;
        if !images.adopt(header.index, found.place) {
            return Ok(false);
        }
        let _ = self.arena().accept(found.place);
        core.note_twin(Some(&domain), header, found.place);
        core.count_image(&domain, header, true);
        domain.account.reserve_anyway(core.record_bytes(header.len));
        Ok(true)
    }

    fn make_room_for(
        &self,
        images: &mut crate::domain::Images,
        number: u32,
    ) -> Result<(), Shortage> {
        let budget = &self.core.budget;
        if let Some((capacity, bytes)) = images.growth_to(number) {
            let old = images.held_bytes();
            budget.reserve(bytes)?;
            if !images.grow(capacity) {
                budget.release(bytes);
                return Err(Shortage::Store);
            }
            budget.release(old);
        }
        Ok(())
    }

    fn enter_page(&self, found: &Found, role: Role, objects: &Needed) -> Result<bool, Shortage> {
        let core = self.core;
        let header = &found.header;
        let Some(object) = core.objects.get(header.number) else {
            return Ok(false);
        };
        let Some(space) = core.space(object.space) else {
            return Ok(false);
        };
        if !is_plausible(&space, &object, role) {
            return Ok(false);
        }
        let image = match self.image_of(&space, found)? {
            Some(image) => image,
            None if header.kind == Kind::Alias => return Ok(false),
            None => None,
        };
        let key = Key {
            object: object.id,
            index: header.index,
        };
        let shard = space.shard_of(key.object, key.region());
        let is_entered =
            objects.claim(header.number, shard) && self.enter_into_index(&space, &key, found)?;
        if is_entered {
            objects.note(header.number);
        } else if let (Some(image), Some(domain)) = (image, &space.domain) {
            domain.images.lock().unadopt_ref(image);
        }
        Ok(is_entered)
    }

    /// Of an alias, the number of its image, on which a reference is taken now, be it there or not:
    /// `Some(Some(number))`. Of any other page `Some(None)`, and of an alias of nothing `None`.
    #[allow(clippy::option_option, reason = "the three cases are what it says")]
    fn image_of(&self, space: &Space, found: &Found) -> Result<Option<Option<u32>>, Shortage> {
        if found.header.kind != Kind::Alias {
            return Ok(Some(None));
        }
        let number = self.core.image_number(found.place, &found.header);
        let (Some(number), Some(domain)) = (number, &space.domain) else {
            return Ok(None);
        };
        let mut images = domain.images.lock();
        self.make_room_for(&mut images, number)?;
        Ok(images.adopt_ref(number).then_some(Some(number)))
    }

    fn enter_into_index(&self, space: &Space, key: &Key, found: &Found) -> Result<bool, Shortage> {
        let core = self.core;
        let header = &found.header;
        let numbering = Numbering {
            number: header.number,
        };
        let (shard, hash) = space.find(key.object, key.region());
        let mut index = shard.lock();
        let before = Space::index_bill_bytes(index.extent());
        let prepared = index.prepare(hash, key, &numbering, &core.budget)?;
        let is_its_number = prepared.number == header.number
            || space.is_shared() && core.objects.join(prepared.number, header.number);
        let old = prepared.old.and_then(|old| core.arena.header(old).ok());
        let is_better = old.is_none_or(|old| is_newer(header.generation, old.generation));
        if !is_its_number || !is_better {
            index.cancel(prepared, &numbering, &core.budget);
            shard.publish(&index);
            return Ok(false);
        }
        index.enter(prepared, found.place);
        space
            .payer
            .reserve_anyway(Space::index_bill_bytes(index.extent()) - before);
        shard.publish(&index);
        let _ = core.arena.accept(found.place);
        space.with_owner(core, header.number, |owner| {
            owner.reserve_anyway(space.bill_bytes(core, header.len));
        });
        space.page_in(core, header);
        core.note_twin(space.domain.as_deref(), header, found.place);
        if let Some(old) = prepared.old {
            self.discarded.fetch_add(1, Relaxed);
            self.supersede(space, old);
        }
        Ok(true)
    }

    /// An older record of a page that was entered already.
    fn supersede(&self, space: &Space, old: Place) {
        let core = self.core;
        if let Ok(header) = core.arena.header(old)
            && header.kind == Kind::Alias
            && let (Some(number), Some(domain)) = (core.image_number(old, &header), &space.domain)
        {
            // Here it may go below what `page_out` could deal with: its image may not be found yet.
            domain.images.lock().unadopt_ref(number);
            let _ = core.arena.kill(old);
            space.count_out(core, &header);
            return;
        }
        space.page_out(core, old);
    }

    /// Takes out what turned out to belong to nothing.
    fn settle(&self, objects: &Needed) {
        let core = self.core;
        let domains: Vec<_> = core.domains.read().values().cloned().collect();
        let mut is_dangling = false;
        for domain in domains {
            let mut images = domain.images.lock();
            is_dangling |= images.settle(|place| {
                self.discarded.fetch_add(1, Relaxed);
                core.kill_image(&domain, place);
            });
            core.budget.release(images.free_if_empty());
        }
        if is_dangling {
            core.all_spaces()
                .iter()
                .for_each(|space| self.drop_dangling(space));
        }
        core.objects.settle(
            &core.budget,
            |number| objects.has(number),
            // No loss: a number may outlive its last page.
            |place| core.kill_copies([Some(place), None]),
        );
        core.sweep_accounts();
    }

    /// Takes out aliases whose image is not there.
    fn drop_dangling(&self, space: &Space) {
        let core = self.core;
        let Some(domain) = &space.domain else { return };
        for shard in space.shards() {
            let pages: Vec<_> = shard
                .lock()
                .pages()
                .map(|(key, _, place)| (key, place))
                .collect();
            for (key, place) in pages {
                let header = core.arena.header(place);
                let Ok(header) = header.map(|header: Header| header) else {
                    continue;
                };
                if header.kind != Kind::Alias {
                    continue;
                }
                let number = core.image_number(place, &header);
                let is_there =
                    number.is_some_and(|number| domain.images.lock().place(number).is_ok());
                if !is_there {
                    self.discarded.fetch_add(1, Relaxed);
                    space.remove(core, &key, |_| true);
                }
            }
        }
    }

    /// Nothing more is added to any span; those in which nothing lives are free, the others take
    /// their places in the queues.
    fn seal(&self, found: &[(SpanHeader, u32)]) {
        let core = self.core;
        let spans = core.arena.spans();
        let mut queued: Vec<_> = found
            .iter()
            .filter_map(|(header, _)| {
                spans.seal_adopted(header.span);
                spans.info(header.span)
            })
            .collect();
        queued.sort_unstable_by_key(|info| info.sequence);
        for info in &queued {
            let (owner, class) = match info.role {
                Role::Fresh(owner) => (owner, Class::Fresh),
                Role::Proven(owner) => (owner, Class::Proven),
                Role::Pages | Role::Catalogue => continue,
            };
            core.accounts
                .with(owner, |account| account.queue.adopt(class, info));
        }
        core.arena.trim(1);
    }
}

/// Whether a page of this object may be in a span of this role.
fn is_plausible(space: &Space, object: &Object, role: Role) -> bool {
    let is_owned = space.is_shared() || object.owner == space.payer.number;
    let is_placed = match role {
        Role::Pages => !space.is_evictable(),
        Role::Fresh(owner) | Role::Proven(owner) => {
            space.is_evictable() && owner == space.payer.number
        }
        Role::Catalogue => false,
    };
    is_owned && is_placed
}
