// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A record that was found in a span gives its place to another of the same
//! owner, whoever that is: a page, an image, an object, an entry of the catalogue.

use std::sync::Arc;

use crate::arena::{Found, Header, Kind, Place, Record};
use crate::engine::Core;
use crate::ledger::Ledger;
use crate::ledger::domain::{Domain, Images};
use crate::ledger::replace::{How, Old, Slot};
use crate::log::Target;
use crate::machine::budget::Shortage;
use crate::space::Space;
use crate::space::index::{Index, Key};

impl Core {
    /// Copies a record elsewhere, under a header that differs in `is_used` at the most, if whatever it
    /// belongs to still leads to it. Whether it did.
    pub(crate) fn relocate(
        &self,
        found: &Found,
        header: Header,
        how: How<'_>,
    ) -> Result<bool, Shortage> {
        let pin = self.arena.pin(found.place);
        // Read only if something leads to the record still, so that it is one.
        let payload = || pin.payload(found.place, &found.header);
        self.replace_found(found, header, payload, how)
    }

    /// Puts a record of the same owner in the place of one that was found, if whatever it belongs to
    /// still leads to it. Whether it did. The span that it was found in is pinned.
    pub(crate) fn replace_found<'a>(
        &self,
        found: &Found,
        header: Header,
        payload: impl FnOnce() -> &'a [u8],
        how: How<'_>,
    ) -> Result<bool, Shortage> {
        let record = || Record {
            header,
            payload: payload(),
        };
        let replaced = match header.kind {
            Kind::Page | Kind::Alias => {
                let Some((space, key)) = self.page_of(&header) else {
                    return Ok(false);
                };
                let (shard, hash) = space.find(key.object, key.region());
                let mut index = shard.lock();
                PageSlot::new(&space, &mut index, hash, &key, (found.place, found.header))
                    .map(|mut slot| self.replace_record(&mut slot, record(), how))
            }
            Kind::Image => {
                let domain = u16::try_from(header.number).ok();
                let Some(domain) = domain.and_then(|number| self.domain(number)) else {
                    return Ok(false);
                };
                let mut images = domain.images.lock();
                ImageSlot::new(&domain, &mut images, found)
                    .map(|mut slot| self.replace_record(&mut slot, record(), how))
            }
            Kind::Object => {
                let mut objects = self.objects.lock();
                objects
                    .copy_of(header.number, found.place)
                    .map(|(at, copy)| (Target::Catalogue(at), CopySlot { copy, found }))
                    .map(|(target, mut slot)| {
                        self.replace_record(&mut slot, record(), How { target, ..how })
                    })
            }
            Kind::Account | Kind::Space | Kind::Pool => {
                let key = (header.kind, header.number, header.index);
                let mut catalogue = self.catalogue.lock();
                catalogue
                    .slot(&key, found.place)
                    .map(|(at, copy)| (Target::Catalogue(at), CopySlot { copy, found }))
                    .map(|(target, mut slot)| {
                        self.replace_record(&mut slot, record(), How { target, ..how })
                    })
            }
        };
        replaced.transpose().map(|replaced| replaced.is_some())
    }

    /// Which page's record this is, if it is any's that is known.
    pub(crate) fn page_of(&self, header: &Header) -> Option<(Arc<Space>, Key)> {
        let object = self.objects.get(header.number)?;
        let key = Key {
            object: object.id,
            index: header.index,
        };
        Some((self.space(object.space)?, key))
    }
}

/// A page's slot in the index.
pub(crate) struct PageSlot<'a> {
    space: &'a Space,
    index: &'a mut Index,
    hash: u64,
    key: &'a Key,
    place: Place,
    header: Header,
}

impl<'a> PageSlot<'a> {
    /// `None` when it does not lead to this record.
    pub(crate) fn new(
        space: &'a Space,
        index: &'a mut Index,
        hash: u64,
        key: &'a Key,
        (place, header): (Place, Header),
    ) -> Option<Self> {
        (index.get(hash, key) == Some(place)).then_some(Self {
            space,
            index,
            hash,
            key,
            place,
            header,
        })
    }
}

impl Slot for PageSlot<'_> {
    fn old(&self) -> Old {
        Old::Whole(self.place, self.header)
    }

    fn lead_to(&mut self, to: Place) {
        self.index.relocate(self.hash, self.key, self.place, to);
    }

    fn recount(&mut self, core: &Ledger, new: &Header, to: Place) {
        let space = self.space;
        core.note_twin(space.sharing_domain(), new, to);
        if is_counted_alike(&self.header, new) {
            return;
        }
        space.count_out(core, &self.header);
        space.with_owner(core, new.number, |owner| {
            owner.reserve_anyway(space.bill_bytes(core, new.len));
        });
        space.page_in(core, new);
        note_shrunk(core, &self.header, new);
    }
}

/// An image's entry in its domain.
struct ImageSlot<'a> {
    domain: &'a Domain,
    images: &'a mut Images,
    place: Place,
    header: Header,
}

impl<'a> ImageSlot<'a> {
    /// `None` when it does not lead to the record that was found.
    fn new(domain: &'a Domain, images: &'a mut Images, found: &Found) -> Option<Self> {
        (images.place(found.header.index) == Ok(found.place)).then_some(Self {
            domain,
            images,
            place: found.place,
            header: found.header,
        })
    }
}

impl Slot for ImageSlot<'_> {
    fn old(&self) -> Old {
        Old::Whole(self.place, self.header)
    }

    fn lead_to(&mut self, to: Place) {
        self.images.relocate(self.header.index, self.place, to);
    }

    fn recount(&mut self, core: &Ledger, new: &Header, to: Place) {
        core.note_twin(Some(self.domain), new, to);
        if is_counted_alike(&self.header, new) {
            return;
        }
        let account = &self.domain.account;
        core.count_image(self.domain, &self.header, false);
        account.release(core.record_bytes(self.header.len));
        account.reserve_anyway(core.record_bytes(new.len));
        core.count_image(self.domain, new, true);
        note_shrunk(core, &self.header, new);
    }
}

/// One of the two records of an entry of the catalogue, or of an object.
struct CopySlot<'a> {
    copy: &'a mut Option<Place>,
    found: &'a Found,
}

impl Slot for CopySlot<'_> {
    fn old(&self) -> Old {
        Old::Whole(self.found.place, self.found.header)
    }

    fn lead_to(&mut self, to: Place) {
        *self.copy = Some(to);
    }

    fn recount(&mut self, _core: &Ledger, _new: &Header, _to: Place) {
        // As long as the one before.
    }
}

/// What was in vain for want of room need not be any more.
fn note_shrunk(core: &Ledger, old: &Header, new: &Header) {
    if new.len < old.len {
        core.note_freed();
    }
}

/// Whether two records of one owner are the same in all figures.
fn is_counted_alike(old: &Header, new: &Header) -> bool {
    (old.kind, old.len, old.is_zstd) == (new.kind, new.len, new.is_zstd)
}
