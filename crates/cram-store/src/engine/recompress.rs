// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Packing pages once more, with zstd, that have been cold for long.
//!
//! Spans of persistent pages are looked at when their youngest page is old
//! enough. Pages that were got meanwhile are not cold: they start anew. The
//! others move to spans of their own, packed with zstd if that saves something
//! worth saving, and are not looked at again.

use std::time::Duration;

use crate::arena::{Found, Header, Kind, Role, SpanInfo, Trust, now};
use crate::codec::{Scratch, is_filled};
use crate::engine::Core;
use crate::ledger::replace::How;
use crate::log::Target;
use crate::log::queue::Visit;
use crate::machine::budget::Shortage;
use crate::spec::PAGE_SIZE;
use crate::spec::Page;

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
            self.relocate(found, header, How::moved(warm, Some(now())))?;
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
            let how = How {
                born: Some(born),
                ..How::put(Target::Cold)
            };
            let replaced = self.replace_found(found, new, || &image, how);
            repacker.image = image;
            replaced?;
            return Ok(());
        }
        self.relocate(found, header, How::moved(Target::Cold, Some(born)))?;
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
}

#[cfg(all(test, not(loom), not(shuttle)))]
mod tests {
    use std::time::Duration;

    use crate::{
        ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store, StoreConfig,
    };

    /// After a put in vain no other looks for room until something is freed; smaller records do.
    #[test]
    fn what_is_packed_smaller_is_room_for_a_put() {
        let store = Store::new(StoreConfig {
            capacity_bytes: 2 << 20,
            background: None,
            ..StoreConfig::default()
        })
        .unwrap();
        let client = store.add_client("a", None).unwrap();
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(0), spec).unwrap();
        let (pool, mut scratch) = (client.pool(PoolId(0)).unwrap(), Scratch::new());
        // Every other page is noise, which is only moved; the others are of letters, whose
        // frequencies are all that there is to be used, and which lz4 does not see.
        let mut put = |index: u32| {
            let mut page = [0; PAGE_SIZE];
            for (at, byte) in (0_u64..).zip(&mut page) {
                let noise = crate::arena::mix(u64::from(index) << 32 | at).to_le_bytes();
                *byte = match (index % 2, noise[0] % 4) {
                    (0, _) => noise[0],
                    (_, 0) => b'a' + noise[1] % 16,
                    _ if at % 3 == 0 => b'a',
                    _ => b' ',
                };
            }
            pool.put(ObjectId([0; 3]), index, &page, &mut scratch)
        };
        let refused = (0..).find(|index| put(*index) != PutResult::Stored);
        assert!(refused.is_some() && store.core.is_futile());
        store.recompress(Duration::ZERO);
        assert!(store.stats().recompressed_pages > 0);
        assert!(!store.core.is_futile());
        store.check().unwrap();
    }
}
