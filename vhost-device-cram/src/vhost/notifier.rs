// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Descriptors by which front-end and back-end wake each other: eventfds, that the front-end made.
//!
//! It may make them as it likes, and change them while we have them. So only descriptors without a
//! file behind them are taken (no pipe, no socket, no file on a file system that somebody else
//! serves), a kick is only waited for and never read, and a call is written without waiting. Should a
//! write wait all the same, since the front-end made the descriptor a blocking one again, then the end
//! of the connection interrupts it ([`worker`](crate::worker)). That is why calls are not made through
//! `vhost_user_backend`'s vring: its notifier begins a write that was interrupted anew.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, statx};

/// Why a descriptor is none by which anybody can be woken.
#[derive(Debug, thiserror::Error)]
pub enum NotifierError {
    /// There is a file, a pipe, a socket or a device behind it.
    #[error("a notifier is no eventfd")]
    Kind,
    /// The system refused.
    #[error("a notifier cannot be used: {0}")]
    System(#[from] io::Error),
}

/// A descriptor to wake the front-end with.
#[derive(Clone, Debug)]
pub struct Notifier(Arc<OwnedFd>);

impl Notifier {
    /// Takes a descriptor, and makes it one that does not block.
    ///
    /// # Errors
    /// When it is no eventfd.
    pub fn new(fd: OwnedFd) -> Result<Self, NotifierError> {
        check(fd.as_fd())?;
        let flags = fcntl_getfl(&fd).map_err(io::Error::from)?;
        if !flags.contains(OFlags::NONBLOCK) {
            fcntl_setfl(&fd, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
        }
        Ok(Notifier(Arc::new(fd)))
    }

    /// Wakes the front-end. When it has not taken earlier calls yet, it will see this one with them.
    pub fn notify(&self) {
        if let Err(error) = rustix::io::write(&*self.0, &1u64.to_ne_bytes())
            && error != rustix::io::Errno::AGAIN
        {
            log::debug!("cannot notify the front-end: {error}");
        }
    }
}

/// Says whether `fd` is of the kind that an eventfd is: one without a file.
///
/// # Errors
/// When it is not.
pub fn check(fd: BorrowedFd<'_>) -> Result<(), NotifierError> {
    const TYPE: u16 = 0o170_000;
    // What is known of it, without asking whoever serves the file.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let found = statx(fd, c"", flags, StatxFlags::TYPE).map_err(io::Error::from)?;
    if found.stx_mode & TYPE == 0 {
        Ok(())
    } else {
        Err(NotifierError::Kind)
    }
}
