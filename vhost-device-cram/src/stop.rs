// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The bell that ends a thread which waits for connections.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// Ends whoever waits at it. It cannot be undone.
pub(crate) struct Stop {
    stopping: AtomicBool,
    /// Becomes readable, and stays so.
    bell: OwnedFd,
}

impl Stop {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Stop {
            stopping: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC)?,
        })
    }

    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Waits for so long. False when it is time to stop.
    pub(crate) fn pause(&self, time: Duration) -> bool {
        let time = Timespec::try_from(time).ok();
        let mut fds = [PollFd::new(&self.bell, PollFlags::IN)];
        // Woken early by whatever it is, it only looks early.
        let _ = poll(&mut fds, time.as_ref());
        !self.is_stopping()
    }

    pub(crate) fn ring(&self) {
        self.stopping.store(true, Ordering::Release);
        // It fails only when the counter is full, and then the bell is ringing.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Waits for a connection, and takes it with `accept`. `None` when it is time to stop.
    pub(crate) fn accept<T>(
        &self,
        listener: &impl AsFd,
        accept: impl Fn() -> io::Result<T>,
    ) -> Option<T> {
        const BREATHE: Duration = Duration::from_millis(100);
        loop {
            let mut fds = [
                PollFd::new(&self.bell, PollFlags::IN),
                PollFd::new(listener, PollFlags::IN),
            ];
            let polled = poll(&mut fds, None);
            if self.is_stopping() {
                return None;
            }
            let accepted = match polled {
                Ok(_) => accept(),
                Err(rustix::io::Errno::INTR) => continue,
                Err(error) => Err(error.into()),
            };
            match accepted {
                Ok(taken) => return Some(taken),
                // Who was there has gone.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => {
                    // Out of descriptors, most likely: others may give some back.
                    log::warn!("cannot accept a connection: {error}");
                    thread::sleep(BREATHE);
                }
            }
        }
    }
}
