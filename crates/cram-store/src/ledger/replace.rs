// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A record takes another's place.
//!
//! Putting, moving, packing anew, sharing: what is stored changes in one way
//! only, [`Ledger::replace_record`], in four steps under one lock.
//!
//! 1. The new record is appended. It lives.
//! 2. What led to the old record leads to the new one.
//! 3. The old record is declared dead.
//! 4. The figures follow.
//!
//! A process that is killed between 1 and 3 leaves two records of one owner,
//! which a later one tells apart by their generations, or need not, since they
//! stand for the same. That is so only because the lock is held over all of it:
//! without it the owner could end in between, and its number become another's,
//! which then would have the old record too.

use crate::arena::{Header, Place, Record, Urgency};
use crate::ledger::Ledger;
use crate::log::Target;
use crate::machine::budget::Shortage;

/// The record that another takes the place of.
#[derive(Clone, Copy)]
pub(crate) enum Old {
    /// There is none: the owner is new.
    Nothing,
    /// Its header is damaged beyond repair.
    Damaged(Place),
    Whole(Place, Header),
}

/// What leads to a record, with the lock held that the record's life hangs on.
pub(crate) trait Slot {
    /// The record that it leads to.
    fn old(&self) -> Old;
    /// It leads to this place from now on.
    fn lead_to(&mut self, to: Place);
    /// The old record is dead and the new one is at `to`: brings all figures up to date.
    fn recount(&mut self, core: &Ledger, new: &Header, to: Place);
}

/// How a record is appended: see [`Ledger::append`].
#[derive(Clone, Copy)]
pub(crate) struct How<'a> {
    pub(crate) target: Target<'a>,
    pub(crate) born: Option<u64>,
    pub(crate) urgency: Urgency,
}

impl<'a> How<'a> {
    /// What comes in now.
    pub(crate) fn put(target: Target<'a>) -> Self {
        Self {
            target,
            born: None,
            urgency: Urgency::Normal,
        }
    }

    /// What is moved out of the way.
    pub(crate) fn moved(target: Target<'a>, born: Option<u64>) -> Self {
        Self {
            target,
            born,
            urgency: Urgency::Making,
        }
    }
}

impl Ledger {
    /// Puts a record in the place of the one that `slot` leads to. On a shortage nothing has changed.
    #[inline]
    pub(crate) fn replace_record(
        &self,
        slot: &mut impl Slot,
        record: Record<'_>,
        how: How<'_>,
    ) -> Result<Place, Shortage> {
        let to = self.append(how.target, record, how.born, how.urgency)?;
        let old = slot.old();
        slot.lead_to(to);
        match old {
            Old::Nothing => (),
            Old::Damaged(place) => _ = self.arena.kill(place),
            Old::Whole(place, header) => self.arena.kill_known(place, &header),
        }
        slot.recount(self, &record.header, to);
        Ok(to)
    }
}
