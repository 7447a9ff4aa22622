// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages and images, entered into the index again, on several threads.

use super::survey::in_parallel;
use super::{Needed, Numbering, Reader};
use crate::arena::{Found, Kind, Place, Role, SpanHeader, Trust, is_newer};
use crate::codec::{Scratch, filled_word};
use crate::ledger::alias::image_in;
use crate::ledger::objects::Object;
use crate::machine::budget::Shortage;
use crate::machine::sync::atomic::{AtomicU64, Ordering::Relaxed};
use crate::space::Space;
use crate::space::index::Key;
use crate::spec::{PAGE_SIZE, Page};

/// What a page has its bytes from.
#[derive(Clone, Copy)]
enum Needs {
    /// Its own record.
    Nothing,
    /// The image of that number.
    Image(u32),
    /// An image of a number that none has: memory was changed from outside.
    Nowhere,
}

impl Reader<'_> {
    /// Walks all spans of pages, `threads` at a time.
    pub(super) fn read_pages(
        &self,
        spans: &[(SpanHeader, u32)],
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
                            // It may be evicted at any time, so also now.
                            Err(_) if span.0.role != Role::Pages => self.drop_record(found),
                            Err(why) => shortage = Err(why),
                        }
                    } else if found.trust == Trust::Header {
                        self.drop_record(found);
                    }
                    is_whole
                });
            }
        };
        in_parallel(threads, work)
    }

    /// Whether a record's payload is what its header promises.
    pub(super) fn is_whole(&self, found: &Found, scratch: &mut Scratch, page: &mut Page) -> bool {
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
        if !images.adopt(header.index, found.place) {
            return Ok(false);
        }
        let _ = self.arena().accept(found.place);
        core.note_twin(Some(&domain), header, found.place);
        core.count_image(&domain, header, true);
        domain.account.reserve_anyway(core.record_bytes(header.len));
        Ok(true)
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
        let needed = self.need_image(&space, found);
        if let Needs::Nowhere = needed {
            return Ok(false);
        }
        let key = Key {
            object: object.id,
            index: header.index,
        };
        let shard = space.shard_of(key.object, key.region());
        let is_entered =
            objects.claim(header.number, shard) && self.enter_into_index(&space, &key, found)?;
        if is_entered {
            objects.note(header.number);
        } else if let (Needs::Image(image), Some(domain)) = (needed, &space.domain) {
            domain.images.lock().unadopt_ref(image);
        }
        Ok(is_entered)
    }

    /// Takes a reference on the image that an alias needs, be it entered already or not.
    fn need_image(&self, space: &Space, found: &Found) -> Needs {
        if found.header.kind != Kind::Alias {
            return Needs::Nothing;
        }
        let number = self.core.image_number(found.place, &found.header);
        let (Some(number), Some(domain)) = (number, &space.domain) else {
            return Needs::Nowhere;
        };
        if domain.images.lock().adopt_ref(number) {
            Needs::Image(number)
        } else {
            Needs::Nowhere
        }
    }

    fn enter_into_index(&self, space: &Space, key: &Key, found: &Found) -> Result<bool, Shortage> {
        let core = self.core;
        let header = &found.header;
        let numbering = Numbering {
            number: header.number,
        };
        let (shard, hash) = space.find(key.object, key.region());
        let mut index = shard.lock();
        let purse = space.purse(core);
        let prepared = index.prepare(hash, key, &numbering, &purse)?;
        let old = prepared.old.and_then(|old| core.arena.header(old).ok());
        let is_better = old.is_none_or(|old| is_newer(header.generation, old.generation));
        // Joined only for a page that comes in: else the number would be free, and in the list still.
        let is_entered = is_better
            && (prepared.number == header.number
                || space.is_shared() && core.objects.join(prepared.number, header.number));
        if !is_entered {
            index.cancel(prepared, &numbering, &purse);
            shard.publish(&index);
            return Ok(false);
        }
        index.enter(prepared, found.place);
        shard.publish(&index);
        let _ = core.arena.accept(found.place);
        space.with_owner(core, header.number, |owner| {
            owner.reserve_anyway(space.bill_bytes(core, header.len));
        });
        space.page_in(core, header);
        core.note_twin(space.sharing_domain(), header, found.place);
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
