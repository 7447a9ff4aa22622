// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Locks and atomics, by the name under which tests can put others in their place.
//!
//! Normally these are parking_lot's locks and the standard library's atomics. Built with
//! `--cfg shuttle` they are shuttle's, which run a test under many schedules, each chosen by lot
//! and repeatable; `tests/schedules.rs` does so.

#[cfg(not(shuttle))]
mod real {
    pub(crate) use parking_lot::{Mutex, MutexGuard, RwLock, RwLockWriteGuard};
    pub(crate) use std::sync::atomic;
}

#[cfg(not(shuttle))]
pub(crate) use real::*;

#[cfg(shuttle)]
mod scheduled {
    pub(crate) use shuttle::sync::MutexGuard;
    use shuttle::sync::RwLockReadGuard;
    pub(crate) use shuttle::sync::RwLockWriteGuard;
    pub(crate) use shuttle::sync::atomic;

    /// As parking_lot's: a panic of a holder poisons nothing.
    #[derive(Debug, Default)]
    pub(crate) struct Mutex<T>(shuttle::sync::Mutex<T>);

    impl<T> Mutex<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::Mutex::new(value))
        }

        pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
            self.0.lock().unwrap_or_else(|error| error.into_inner())
        }
    }

    /// As parking_lot's: a panic of a holder poisons nothing.
    #[derive(Debug, Default)]
    pub(crate) struct RwLock<T>(shuttle::sync::RwLock<T>);

    impl<T> RwLock<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(shuttle::sync::RwLock::new(value))
        }

        pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
            self.0.read().unwrap_or_else(|error| error.into_inner())
        }

        pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
            self.0.write().unwrap_or_else(|error| error.into_inner())
        }
    }
}

#[cfg(shuttle)]
pub(crate) use scheduled::*;
