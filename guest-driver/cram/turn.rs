// SPDX-License-Identifier: GPL-2.0

//! Whose turn it is to reset the device.
//!
//! The bus resets a device when somebody asks it to (a PCI function reset), at any moment; the
//! driver does when the back-end stays away, and when it leaves. Both take the virtqueues away and
//! set them up again, so only one may.

use kernel::{
    new_condvar,
    new_mutex,
    prelude::*,
    sync::{CondVar, Mutex}, //
};

/// Who resets the device.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum By {
    /// The driver itself.
    Driver,
    /// The bus that the device is on.
    Bus,
}

/// A turn that one may have.
#[pin_data]
pub(crate) struct Turn {
    #[pin]
    taken: Mutex<Option<By>>,
    #[pin]
    over: CondVar,
}

impl Turn {
    /// A turn that nobody has.
    pub(crate) fn new() -> impl PinInit<Self> {
        pin_init!(Self {
            taken <- new_mutex!(None),
            over <- new_condvar!(),
        })
    }

    /// Waits for the turn.
    pub(crate) fn take(&self, by: By) {
        let mut taken = self.taken.lock();
        while taken.is_some() {
            self.over.wait(&mut taken);
        }
        *taken = Some(by);
    }

    /// Takes the turn unless somebody has it.
    pub(crate) fn try_take(&self, by: By) -> bool {
        let mut taken = self.taken.lock();
        let free = taken.is_none();
        if free {
            *taken = Some(by);
        }
        free
    }

    /// Gives the turn back, if it is that one's.
    pub(crate) fn give_back(&self, by: By) {
        let mut taken = self.taken.lock();
        if *taken == Some(by) {
            *taken = None;
            drop(taken);
            self.over.notify_all();
        }
    }
}
