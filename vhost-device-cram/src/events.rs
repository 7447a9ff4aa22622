// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What waits to be told to a guest through the event queue.
//!
//! Bounded by construction: of each kind only the newest is kept.

use cram_abi::wire::{Event, event, feature};
use parking_lot::Mutex;

const KINDS: usize = event::KINDS;

/// The newest undelivered event of each kind.
#[derive(Debug, Default)]
pub struct Mailbox {
    slots: Mutex<[Option<Event>; KINDS]>,
}

impl Mailbox {
    /// The pressure is now `pressure`.
    pub fn post_pressure(&self, pressure: u32) {
        self.post(Event {
            kind: event::PRESSURE.into(),
            value: pressure.into(),
            ..Event::default()
        });
    }

    /// The host would like `pages` to be taken back.
    pub fn post_give_back(&self, pages: u32) {
        self.post(Event {
            kind: event::GIVE_BACK.into(),
            value: pages.into(),
            ..Event::default()
        });
    }

    /// The host would like the guest to free `pages` of its memory.
    pub fn post_squeeze(&self, pages: u32) {
        self.post(Event {
            kind: event::SQUEEZE.into(),
            value: pages.into(),
            ..Event::default()
        });
    }

    /// The quota is now `bytes`.
    pub fn post_quota(&self, bytes: u64) {
        self.post(Event {
            kind: event::QUOTA.into(),
            wide: bytes.into(),
            ..Event::default()
        });
    }

    fn post(&self, event: Event) {
        if let Some(slot) = self.slots.lock().get_mut(Self::slot(&event)) {
            *slot = Some(event);
        }
    }

    fn slot(event: &Event) -> usize {
        usize::from(event.kind.get()).wrapping_sub(1)
    }

    /// Takes an event out, if there is one for a driver with these features; one that waits for
    /// a driver that cannot know it is forgotten.
    pub fn take(&self, features: u64) -> Option<Event> {
        let mut slots = self.slots.lock();
        if features & feature::SQUEEZE == 0 {
            for slot in slots.iter_mut() {
                slot.take_if(|event| event.kind.get() == event::SQUEEZE);
            }
        }
        slots.iter_mut().find_map(Option::take)
    }

    /// Puts back an event that could not be delivered, unless there is a newer one.
    pub fn put_back(&self, event: Event) {
        if let Some(slot) = self.slots.lock().get_mut(Self::slot(&event)) {
            slot.get_or_insert(event);
        }
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.slots.lock().iter().all(Option::is_none)
    }

    /// Forgets everything: the driver does not want events.
    pub fn clear(&self) {
        *self.slots.lock() = [None; KINDS];
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn newest_of_each_kind_is_kept() {
        let mailbox = Mailbox::default();
        mailbox.post_pressure(100);
        mailbox.post_pressure(200);
        mailbox.post_quota(1 << 30);
        let first = mailbox.take(feature::ALL).unwrap();
        assert_eq!(
            (first.kind.get(), first.value.get()),
            (event::PRESSURE, 200)
        );
        mailbox.post_pressure(300);
        mailbox.put_back(first);
        assert_eq!(mailbox.take(feature::ALL).unwrap().value.get(), 300);
        assert_eq!(mailbox.take(feature::ALL).unwrap().wide.get(), 1 << 30);
        assert!(mailbox.take(feature::ALL).is_none() && mailbox.is_empty());
    }

    #[test]
    fn a_squeeze_is_only_for_drivers_that_know_it() {
        let mailbox = Mailbox::default();
        mailbox.post_squeeze(5);
        mailbox.post_give_back(6);
        let kind = |features| mailbox.take(features).map(|event| event.kind.get());
        assert_eq!(kind(feature::EVENTS), Some(event::GIVE_BACK));
        assert_eq!(kind(feature::ALL), None);
        mailbox.post_squeeze(7);
        assert_eq!(kind(feature::ALL), Some(event::SQUEEZE));
    }
}
