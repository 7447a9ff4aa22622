// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Opening an arena that has something in it: the index is made anew from the
//! records alone.
//!
//! First it is found out whether all that must be there fits (see [`survey`]);
//! until that is certain, nothing is written. Then the catalogue is read (accounts, spaces, pools, objects), then all
//! spans of pages, on as many threads as there are processors. A live record is
//! entered; of two records of one page, the newer one. Whatever belongs to
//! nothing, contradicts something or cannot be verified is declared dead.
//!
//! What was acknowledged is found, and what was removed is not, wherever the
//! process was killed: a page's record lives from one atomic store on, which
//! comes before the acknowledgement; and so it is with its end.

mod catalogue;
mod pages;
mod survey;

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::arena::{
    Arena, ArenaError, Found as FoundRecord, Header, Kind, Place, Role, SpanHeader, Trust,
};
use crate::engine::Core;
use crate::ledger::account::Account;
use crate::ledger::domain::Domain;
use crate::log::queue::Class;
use crate::machine::budget::Shortage;
use crate::machine::sync::Mutex;
use crate::machine::sync::atomic::{AtomicU8, AtomicU64, Ordering::Relaxed};
use crate::space::Space;
use crate::space::index::Numbers;
use crate::spec::ObjectId;
use crate::spec::settings::{ClientSettings, Identity};
use crate::spec::{PoolId, PoolSpec};

/// What was found when a store was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Recovery {
    /// Pages that are there again.
    pub pages: u64,
    /// Records that lived but were torn, damaged, or superseded, and were discarded.
    pub discarded: u64,
    /// The machine was started anew in between, so every page was unpacked and verified.
    pub is_verified: bool,
    /// The machine ended before the file was closed, so all that was in it was given up.
    pub is_lost: bool,
    /// Threads that worked on it.
    pub threads: u32,
    /// How long it took, from the moment that the file was opened.
    pub took: Duration,
}

/// A client that was found, with its pools.
pub(crate) struct KnownClient {
    pub(crate) account: Arc<Account>,
    pub(crate) domain: Arc<Domain>,
    pub(crate) settings: ClientSettings,
    pub(crate) identity: Identity,
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
/// When that is refused, the arena is as it was.
pub(crate) fn recover(
    core: &Core,
    opened: &Found,
    began: Instant,
) -> Result<(Recovery, Vec<KnownClient>), Refused> {
    let reader = Reader {
        core,
        verifies_all: opened.is_after_reboot,
        discarded: AtomicU64::new(0),
        doomed: Mutex::new(Some(Vec::new())),
    };
    // A thread is worth its while for some spans, not for one.
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = processors.min(opened.spans.len() / SPANS_PER_THREAD + 1);
    let mut survey = reader.survey(&opened.spans, threads)?;
    let has_role = |wanted: fn(Role) -> bool| {
        let of_role = survey.kept.iter().filter(|(header, _)| wanted(header.role));
        of_role.copied().collect::<Vec<_>>()
    };
    let catalogue = has_role(|role| role == Role::Catalogue);
    let pages = has_role(|role| role == Role::Pages);
    let evictable = has_role(|role| matches!(role, Role::Fresh(_) | Role::Proven(_)));

    let entries = reader.read_catalogue(&catalogue);
    let known = reader.enter_accounts(&entries)?;
    let clients = reader.enter_pools(&entries, known)?;
    drop(entries);
    let objects = reader.enter_objects(&catalogue)?;
    reader.make_tables(&mut survey, &objects)?;

    // All that must be there fits. From here on the arena is written to.
    core.arena.commit()?;
    let kept: Vec<_> = survey.kept.iter().map(|(header, _)| *header).collect();
    let others: Vec<_> = survey.dead.iter().chain(&opened.others).copied().collect();
    core.arena.spans().adopt(&kept, &others);
    reader.discard_doomed();
    reader.read_pages(&pages, &objects, threads)?;
    reader.read_pages(&evictable, &objects, threads)?;
    reader.settle(&objects);
    reader.seal(&survey.kept);
    core.recovered();
    let recovery = Recovery {
        pages: core.sum().stored.pages,
        discarded: reader.discarded.load(Relaxed),
        is_verified: opened.is_after_reboot,
        is_lost: opened.is_lost,
        threads: u32::try_from(threads).unwrap_or(u32::MAX),
        took: began.elapsed(),
    };
    Ok((recovery, clients))
}

/// Why an arena is not opened after all.
pub(crate) enum Refused {
    /// What is in it does not fit.
    TooLarge,
    /// It cannot be written to.
    Arena(ArenaError),
}

impl From<Shortage> for Refused {
    fn from(_: Shortage) -> Self {
        Self::TooLarge
    }
}

impl From<ArenaError> for Refused {
    fn from(error: ArenaError) -> Self {
        Self::Arena(error)
    }
}

/// What is known of an arena that is opened.
pub(crate) struct Found {
    /// The spans that were in use, and how many granules of each have memory.
    pub(crate) spans: Vec<(SpanHeader, u32)>,
    /// Other spans that have memory.
    pub(crate) others: Vec<u32>,
    pub(crate) is_after_reboot: bool,
    pub(crate) is_lost: bool,
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

    fn is_claimed(&self, number: u32) -> bool {
        self.0
            .get(number as usize)
            .is_some_and(|claimed| claimed.load(Relaxed) != 0)
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
    /// What is to be discarded once it is certain that the arena will be opened; `None` from then on.
    doomed: Mutex<Option<Vec<Place>>>,
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

    fn are_apart(&self, one: Place, other: Place) -> bool {
        let layout = self.arena().layout();
        layout.span_of(one) != layout.span_of(other)
    }

    /// A record that lived is dead from now on.
    fn discard(&self, place: Place) {
        self.discarded.fetch_add(1, Relaxed);
        match &mut *self.doomed.lock() {
            Some(doomed) => doomed.push(place),
            None => self.arena().reject(place),
        }
    }

    fn discard_doomed(&self) {
        let doomed = self.doomed.lock().take();
        for place in doomed.into_iter().flatten() {
            self.arena().reject(place);
        }
    }

    /// A record of a page or an image that is not to be entered. What names no owner at all may well
    /// be no record, but something that looks like one behind the last.
    fn drop_record(&self, found: &FoundRecord) {
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

    /// Walks a span and hands every record to `take`, which says whether it is one. The span is as
    /// far filled as the last record reaches.
    fn walk(
        &self,
        (span, granules): &(SpanHeader, u32),
        take: &mut dyn FnMut(&FoundRecord) -> bool,
    ) {
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

    /// Takes out what turned out to belong to nothing.
    fn settle(&self, objects: &Needed) {
        let core = self.core;
        // First, since an object that loses its last page here gives its number back.
        core.objects.settle(
            &core.budget,
            |number| objects.has(number),
            // No loss: a number may outlive its last page.
            |object, place| {
                core.kill_copies([Some(place), None]);
                if let Some(space) = core.space(object.space) {
                    space.payer.release(space.object_copy_bytes(core));
                }
            },
        );
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
