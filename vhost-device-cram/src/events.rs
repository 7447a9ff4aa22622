// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What waits to be told to a guest through the event queue.
//!
//! Bounded by construction: of each kind only the newest is kept.

use cram_abi::wire::{Event, event};
use parking_lot::Mutex;

const KINDS: usize = 3;

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

    /// Takes an event out, if there is one.
    pub fn take(&self) -> Option<Event> {
        self.slots.lock().iter_mut().find_map(Option::take)
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
        let first = mailbox.take().unwrap();
        assert_eq!(
            (first.kind.get(), first.value.get()),
            (event::PRESSURE, 200)
        );
        mailbox.post_pressure(300);
        mailbox.put_back(first);
        assert_eq!(mailbox.take().unwrap().value.get(), 300);
        assert_eq!(mailbox.take().unwrap().wide.get(), 1 << 30);
        assert!(mailbox.take().is_none() && mailbox.is_empty());
    }
}
