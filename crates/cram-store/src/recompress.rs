// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Packing pages once more, with zstd, that have been cold for long.
//!
//! Spans of persistent pages are looked at when their youngest page is old
//! enough. Pages that were got meanwhile are not cold: they start anew. The
//! others move to spans of their own, packed with zstd if that saves something
//! worth saving, and are not looked at again.

use std::time::Duration;

use crate::PAGE_SIZE;
use crate::Page;
use crate::arena::{Found, Header, Kind, Record, Role, SpanInfo, Trust, Urgency, now};
use crate::budget::Shortage;
use crate::codec::{Scratch, is_filled};
use crate::core::{Core, Target};
use crate::domain::Domain;
use crate::index::Key;
use crate::queue::Visit;
use crate::space::Space;

/// A new image must be smaller by this share of the old one (as 1 / n).
const WORTH: usize = 16;

/// What the background thread needs for it.
pub(crate) struct Repacker {
    scratch: Scratch,
    page: Box<Page>,
    image: Vec<u8>,
    /// The span that is being looked at.
    visit: Option<Visit>,
}

impl Repacker {
    pub(crate) fn new() -> Self {
        Self {
            scratch: Scratch::new(),
            page: Box::new([0; PAGE_SIZE]),
            image: Vec::new(),
            visit: None,
        }
    }
}

impl Core {
    /// Looks at about `records` records of a span whose pages all are older than `cold_after`. False
    /// when there is none.
    pub(crate) fn recompress_some(
        &self,
        repacker: &mut Repacker,
        cold_after: Duration,
        records: usize,
    ) -> bool {
        let time = now();
        let current = repacker
            .visit
            .and_then(|visit| visit.info(&self.arena))
            .filter(|info| info.live > 0);
        let is_cold = |info: &SpanInfo| {
            info.role == Role::Pages
                && info.is_sealed
                && !self.arena.spans().is_settled(info.span)
                && time.saturating_sub(info.born) >= cold_after.as_secs()
        };
        let info = match current {
            Some(info) => info,
            None => match self
                .arena
                .spans()
                .in_use()
                .filter(is_cold)
                .min_by_key(|info| (info.born, info.sequence))
            {
                Some(info) => info,
                None => return false,
            },
        };
        let visit = Visit {
            span: info.span,
            sequence: info.sequence,
        };
        let done = self.look_at(repacker, &info, visit, records);
        repacker.visit = match done {
            Ok(true) => None,
            Ok(false) => Some(visit),
            Err(Shortage::Store | Shortage::Quota) => None,
        };
        if done != Ok(false) {
            // What is left in it could not be moved: it is not looked at again.
            self.arena.spans().settle(visit.span, visit.sequence);
        }
        true
    }

    /// True when the whole span was looked at.
    fn look_at(
        &self,
        repacker: &mut Repacker,
        info: &SpanInfo,
        visit: Visit,
        records: usize,
    ) -> Result<bool, Shortage> {
        let _pin = self.arena.pin(self.arena.layout().place(info.span, 0));
        if visit.info(&self.arena).is_none() {
            return Ok(true);
        }
        let mut left = records;
        let mut walk = self.arena.walk(info.span, info.filled);
        while let Some(found) = walk.next() {
            if found.trust == Trust::Nothing {
                walk.verified(&found, false);
                continue;
            }
            if !found.is_live {
                continue;
            }
            if left == 0 {
                return Ok(false);
            }
            left -= 1;
            self.settle_record(repacker, &found, info.born)?;
        }
        Ok(true)
    }

    fn settle_record(
        &self,
        repacker: &mut Repacker,
        found: &Found,
        born: u64,
    ) -> Result<(), Shortage> {
        let header = found.header;
        if header.is_used && matches!(header.kind, Kind::Page | Kind::Image) {
            let header = Header {
                is_used: false,
                ..header
            };
            let warm = Target::Log(self.aged_head(0));
            self.evacuate(&Found { header, ..*found }, warm, Some(now()))?;
            return Ok(());
        }
        let is_worth_trying = matches!(header.kind, Kind::Page | Kind::Image)
            && !header.is_zstd
            && !is_filled(header.len);
        if is_worth_trying && self.repack(repacker, found) {
            let image = std::mem::take(&mut repacker.image);
            let new = Header {
                len: image.len(),
                is_zstd: true,
                ..header
            };
            let replaced = self.replace(found, new, &image, born);
            repacker.image = image;
            replaced?;
            return Ok(());
        }
        self.evacuate(found, Target::Cold, Some(born))?;
        Ok(())
    }

    /// Packs a record's page anew into `repacker.image`. False when that is not worth it, or the
    /// page is damaged. No lock is held; the span is pinned.
    fn repack(&self, repacker: &mut Repacker, found: &Found) -> bool {
        let header = &found.header;
        let pin = self.arena.pin(found.place);
        let payload = pin.payload(found.place, header);
        let Repacker {
            scratch,
            page,
            image,
            ..
        } = repacker;
        if !scratch.unpack(payload, false, page)
            || self.sums.page(page) != self.sums.promised(header)
        {
            return false;
        }
        image.clear();
        match scratch.repack(page) {
            Some(packed) if packed.len() + header.len / WORTH <= header.len => {
                image.extend_from_slice(packed);
                true
            }
            _ => false,
        }
    }

    /// Puts a record with another payload in the place of one, if it is still there.
    fn replace(
        &self,
        found: &Found,
        new: Header,
        payload: &[u8],
        born: u64,
    ) -> Result<(), Shortage> {
        let record = Record {
            header: new,
            payload,
        };
        let append = || self.append(Target::Cold, record, Some(born), Urgency::Normal);
        if new.kind == Kind::Image {
            let domain = u16::try_from(new.number).ok();
            if let Some(domain) = domain.and_then(|number| self.domain(number)) {
                self.replace_image(&domain, found, new, append)?;
            }
            return Ok(());
        }
        let Some(object) = self.objects.get(new.number) else {
            return Ok(());
        };
        if let Some(space) = self.space(object.space) {
            let key = Key {
                object: object.id,
                index: new.index,
            };
            self.replace_page(&space, &key, found, new, append)?;
        }
        Ok(())
    }

    fn replace_page(
        &self,
        space: &Space,
        key: &Key,
        found: &Found,
        new: Header,
        append: impl FnOnce() -> Result<crate::arena::Place, Shortage>,
    ) -> Result<(), Shortage> {
        let (shard, hash) = space.find(key.object, key.region());
        let mut index = shard.lock();
        if index.get(hash, key) != Some(found.place) {
            return Ok(());
        }
        let to = append()?;
        index.relocate(hash, key, found.place, to);
        self.note_twin(space.domain.as_deref(), &new, to);
        let _ = self.arena.kill(found.place);
        space.count_out(self, &found.header);
        space.with_owner(self, new.number, |owner| {
            owner.reserve_anyway(space.bill_bytes(self, new.len));
        });
        space.page_in(self, &new);
        Ok(())
    }

    fn replace_image(
        &self,
        domain: &Domain,
        found: &Found,
        new: Header,
        append: impl FnOnce() -> Result<crate::arena::Place, Shortage>,
    ) -> Result<(), Shortage> {
        let mut images = domain.images.lock();
        if images.place(new.index) != Ok(found.place) {
            return Ok(());
        }
        let to = append()?;
        images.relocate(new.index, found.place, to);
        self.note_twin(Some(domain), &new, to);
        let _ = self.arena.kill(found.place);
        self.count_image(domain, &found.header, false);
        domain.account.release(self.record_bytes(found.header.len));
        domain.account.reserve_anyway(self.record_bytes(new.len));
        self.count_image(domain, &new, true);
        Ok(())
    }
}
