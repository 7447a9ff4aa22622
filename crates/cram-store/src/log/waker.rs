// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How puts wake the background thread.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use crate::machine::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Wakes the background thread, if there is one.
#[derive(Default)]
pub(crate) struct Waker {
    pub(crate) has_thread: AtomicBool,
    is_wanted: AtomicBool,
    /// Spans that were opened since the thread last looked.
    pub(crate) opened: AtomicU64,
    bell: Mutex<Bell>,
    rung: Condvar,
}

#[derive(Default)]
struct Bell {
    is_rung: bool,
    is_over: bool,
}

impl Waker {
    /// A span was opened: there may be something to do. Cheap, and safe with any lock held but the
    /// bell's.
    pub(crate) fn wake(&self) {
        self.opened.fetch_add(1, Ordering::Relaxed);
        if self.is_wanted.load(Ordering::Relaxed) {
            self.ring(false);
        }
    }

    /// Has the thread look at once; false when there is none.
    pub(crate) fn call(&self) -> bool {
        let has_thread = self.has_thread.load(Ordering::Relaxed);
        if has_thread && self.is_wanted.load(Ordering::Relaxed) {
            self.ring(false);
        }
        has_thread
    }

    pub(crate) fn ring(&self, is_over: bool) {
        let mut bell = self.bell.lock().unwrap_or_else(PoisonError::into_inner);
        bell.is_rung = true;
        bell.is_over |= is_over;
        self.rung.notify_one();
    }

    /// Waits for the bell, `rest` at the most. True when it is all over.
    pub(crate) fn sleep(&self, rest: Duration) -> bool {
        self.is_wanted.store(true, Ordering::Relaxed);
        let bell = self.bell.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut bell, _) = self
            .rung
            .wait_timeout_while(bell, rest, |bell| !bell.is_rung)
            .unwrap_or_else(PoisonError::into_inner);
        bell.is_rung = false;
        self.is_wanted.store(false, Ordering::Relaxed);
        bell.is_over
    }
}
