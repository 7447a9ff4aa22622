// SPDX-License-Identifier: GPL-2.0

//! Hibernation: the system wakes up in another machine, perhaps, and finds no page of its own there.
//!
//! So every page comes back before, as it does when the module leaves, and goes to the swap device
//! beneath where there is no room; afterwards the device is used again, with a new pool. A system that
//! is only suspended stays with its device, which then is reset like at any other time.

use super::{state, Device};
use crate::{
    frontswap::Registration,
    sleep::{Alarm, Sleeper}, //
};
use kernel::{
    prelude::*,
    sync::Arc, //
};

impl Device {
    /// From now on the system does not hibernate without this device's pages.
    pub(super) fn expect_hibernation(self: &Arc<Self>) -> Result {
        let alarm = Alarm::new(self.clone())?;
        self.control.lock().alarm = Some(alarm);
        Ok(())
    }

    /// The device goes. Waits until the system is awake.
    pub(super) fn ignore_hibernation(&self) {
        let alarm = self.control.lock().alarm.take();
        drop(alarm);
    }
}

impl Sleeper for Device {
    fn before_hibernation(self: &Arc<Self>) {
        let registration = self.control.lock().registration.take();
        // Brings every page back.
        drop(registration);
    }

    fn after_hibernation(self: &Arc<Self>) {
        {
            let mut control = self.control.lock();
            // What the device has under our names is what booted before us, if anything.
            control.generation = 0;
            self.set_state(state::SETTING_UP);
        }
        // Nothing is allocated under the lock: what gives memory free may wait for who has it.
        match Registration::new(self.clone()) {
            Ok(registration) => self.control.lock().registration = Some(registration),
            Err(error) => pr_err!(
                "virtio{}: not used after hibernation: {:?}\n",
                self.virtio.index(),
                error
            ),
        }
        self.schedule_control_now();
    }
}
