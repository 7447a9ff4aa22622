// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Storing equal pages of a domain once. See [`crate::ledger::domain`] and
//! [`crate::ledger::twins`].

use std::sync::Arc;

use crate::arena::{Header, Kind, Pin, Place, Record, Urgency};
use crate::codec::Scratch;
use crate::engine::Core;
use crate::engine::relocate::PageSlot;
use crate::ledger::alias::{ALIAS_BYTES, alias_payload};
use crate::ledger::domain::Domain;
use crate::ledger::replace::How;
use crate::ledger::sums::Content;
use crate::log::Target;
use crate::machine::sync::atomic::AtomicBool;
use crate::space::index::Key;
use crate::space::{Incoming, Space};
use crate::spec::{PAGE_SIZE, Page};

/// What came of looking for a twin.
enum Twin {
    /// The page itself: it was put again as it was.
    Same,
    /// An image, on which a reference was taken.
    Image(u32),
}

/// Whose a record is.
enum Owner {
    Image,
    Page(Arc<Space>, Key),
}

/// Who puts a page, and which.
#[derive(Clone, Copy)]
pub(crate) struct Putting<'a> {
    pub(crate) space: &'a Space,
    pub(crate) domain: &'a Domain,
    pub(crate) key: &'a Key,
    pub(crate) content: Content,
    pub(crate) worker: usize,
    /// The pool refuses pages that do not compress, whoever has kept an equal one.
    pub(crate) refuses_incompressible: bool,
    /// As in [`Incoming`].
    pub(crate) is_left: &'a AtomicBool,
}

impl Core {
    /// Stores a page by the bytes of an equal one, if there is such a one. False when there is none,
    /// or something stood in the way: then the page is to be stored as any other.
    pub(crate) fn put_as_twin(
        &self,
        putting: &Putting<'_>,
        page: &Page,
        scratch: &mut Scratch,
    ) -> bool {
        let &Putting {
            domain, content, ..
        } = putting;
        let twin = self
            .twins
            .find(&self.arena, domain.number(), content, |place, pin| {
                self.try_twin(putting, place, pin, page, scratch)
            });
        match twin {
            None => false,
            Some(Twin::Same) => true,
            Some(Twin::Image(number)) => {
                let is_stored = self.enter_alias(putting, number);
                if !is_stored {
                    self.drop_image_ref(domain, number);
                }
                is_stored
            }
        }
    }

    /// Looks whether there is a record at `place` that is the image of `page`.
    fn try_twin(
        &self,
        putting: &Putting<'_>,
        place: Place,
        pin: &Pin<'_>,
        page: &Page,
        scratch: &mut Scratch,
    ) -> Option<Twin> {
        let header = self.arena.header_at(place, pin)?;
        if self.sums.promised(&header) != putting.content
            || putting.refuses_incompressible && header.len == PAGE_SIZE
        {
            return None;
        }
        // Only of what is a record for certain are the bytes read.
        let owner = self.owner_of(putting, place, &header)?;
        if !scratch.is_image_of(pin.payload(place, &header), header.is_zstd, page) {
            return None;
        }
        match owner {
            Owner::Image => {
                let mut images = putting.domain.images.lock();
                images
                    .take_ref(header.index, place)
                    .then_some(Twin::Image(header.index))
            }
            Owner::Page(space, key) => self.share_page(putting, &space, &key, place, pin),
        }
    }

    /// Whose record is at `place`, if anybody's in the domain.
    fn owner_of(&self, putting: &Putting<'_>, place: Place, header: &Header) -> Option<Owner> {
        let number = putting.domain.number();
        match header.kind {
            Kind::Image if header.number == u32::from(number) => {
                let images = putting.domain.images.lock();
                (images.place(header.index) == Ok(place)).then_some(Owner::Image)
            }
            Kind::Page => {
                let (space, key) = self.page_of(header)?;
                if space.sharing_domain()?.number() != number {
                    return None;
                }
                let (shard, hash) = space.find(key.object, key.region());
                let is_there = shard.lock().get(hash, &key) == Some(place);
                is_there.then_some(Owner::Page(space, key))
            }
            _ => None,
        }
    }

    /// Makes an image of a page's bytes, and the page an alias. The reference for the page that
    /// comes in is taken too.
    fn share_page(
        &self,
        putting: &Putting<'_>,
        space: &Space,
        key: &Key,
        place: Place,
        pin: &Pin<'_>,
    ) -> Option<Twin> {
        let domain = putting.domain;
        let (shard, hash) = space.find(key.object, key.region());
        let mut index = shard.lock();
        let header = &self.arena.header(place).ok()?;
        let mut slot = PageSlot::new(space, &mut index, hash, key, (place, *header))?;
        if space.number == putting.space.number && key == putting.key {
            return Some(Twin::Same);
        }
        let payload = pin.payload(place, header);
        let number = self.make_image(putting, header, payload)?;
        let alias = Header {
            kind: Kind::Alias,
            len: ALIAS_BYTES,
            is_zstd: false,
            generation: header.generation.wrapping_add(1) & 3,
            ..*header
        };
        let made = self.replace_with_alias(&mut slot, alias, number, putting.worker);
        if made.is_none() {
            drop(index);
            // Both references: neither page needs it.
            self.drop_image_ref(domain, number);
            self.drop_image_ref(domain, number);
            return None;
        }
        Some(Twin::Image(number))
    }

    /// A new image, which two pages need.
    fn make_image(&self, putting: &Putting<'_>, header: &Header, payload: &[u8]) -> Option<u32> {
        let domain = putting.domain;
        let bytes = self.record_bytes(payload.len());
        domain.account.reserve(bytes).ok()?;
        let mut images = domain.images.lock();
        let made = self.make_image_in(&mut images, putting, header, payload);
        if made.is_none() {
            domain.account.release(bytes);
        }
        made
    }

    fn make_image_in(
        &self,
        images: &mut crate::ledger::domain::Images,
        putting: &Putting<'_>,
        header: &Header,
        payload: &[u8],
    ) -> Option<u32> {
        if let Some((capacity, bytes)) = images.growth() {
            let old = images.held_bytes();
            self.budget.reserve(bytes).ok()?;
            if !images.grow(capacity) {
                self.budget.release(bytes);
                return None;
            }
            self.budget.release(old);
        }
        let number = images.next_number()?;
        let domain = putting.domain;
        let owner = u32::from(domain.number());
        let image = Header {
            kind: Kind::Image,
            number: owner,
            index: number,
            check: self.sums.check(putting.content, owner, number),
            generation: 0,
            is_used: false,
            ..*header
        };
        let record = Record {
            header: image,
            payload,
        };
        let target = Target::Log(self.put_head(putting.worker));
        let place = self.append(target, record, None, Urgency::Normal).ok()?;
        images.add(place, 2);
        self.note_twin(Some(domain), &image, place);
        self.count_image(domain, &image, true);
        Some(number)
    }

    /// Puts an alias in the place of a page's record. The shard is locked.
    fn replace_with_alias(
        &self,
        slot: &mut PageSlot<'_>,
        header: Header,
        image: u32,
        worker: usize,
    ) -> Option<Place> {
        let record = Record {
            header,
            payload: &alias_payload(image),
        };
        // A persistent page's record is in a span of pages, and so is what takes its place.
        let target = Target::Log(self.put_head(worker));
        self.replace_record(slot, record, How::put(target)).ok()
    }

    /// Enters a page that comes in as an alias. A reference on the image was taken for it.
    fn enter_alias(&self, putting: &Putting<'_>, image: u32) -> bool {
        let incoming = Incoming {
            kind: Kind::Alias,
            content: putting.content,
            payload: &alias_payload(image),
            is_zstd: false,
            owner: putting.space.payer.number,
            worker: putting.worker,
            is_left: putting.is_left,
        };
        let space = putting.space;
        let bill = space.bill_bytes(self, incoming.payload.len());
        if space.payer.reserve(bill).is_err() {
            return false;
        }
        let entered = space.enter(self, putting.key, &incoming);
        if entered.is_err() {
            space.payer.release(bill);
        }
        entered.is_ok()
    }
}
