// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who is at the other end of the control socket, and what he may do.
//!
//! Who may connect is decided by the socket's mode and group. Of those, root and the daemon's own
//! user may do everything; everybody else may only look.

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::sync::OnceLock;

use rustix::net::sockopt::socket_peercred;
use rustix::process::geteuid;

/// What a method does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// It tells something.
    Read,
    /// It can change something.
    Change,
}

/// The daemon's user, as of the first time that it was asked: a confined process cannot ask.
pub(crate) fn own_uid() -> u32 {
    static FOUND: OnceLock<u32> = OnceLock::new();
    *FOUND.get_or_init(|| geteuid().as_raw())
}

/// A process that connected, as the kernel knew it then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Peer {
    /// Its user.
    pub uid: u32,
    /// Its number; 0 when it is in no name space that we see.
    pub pid: i32,
    /// Whether it may change something.
    is_operator: bool,
}

impl Peer {
    /// Who is at the other end of a connection.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn of(stream: &impl AsFd) -> io::Result<Self> {
        let found = socket_peercred(stream)?;
        let pid = found.pid.as_raw_nonzero().get();
        Ok(Self::new(found.uid.as_raw(), pid, own_uid()))
    }

    /// A process of user `uid`, for a daemon of user `own_uid`.
    pub fn new(uid: u32, pid: i32, own_uid: u32) -> Self {
        Peer {
            uid,
            pid,
            is_operator: uid == 0 || uid == own_uid,
        }
    }

    /// Whether it may do so.
    pub fn may(&self, access: Access) -> bool {
        self.is_operator || access == Access::Read
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {}, process {}", self.uid, self.pid)
    }
}
