// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the daemon gives up once it has all that it needs.
//!
//! It reads what guests write. Should one of them find a hole in it, what he has then is a process
//! that can do little more than serve guests: it runs no program, opens no file and no network,
//! and reaches no other process. Two locks, each of which holds without the other:
//!
//! - [`seccomp`]: which system calls there are, and with which arguments.
//! - [`landlock`]: where in the file system sockets can be made and removed; nothing else can be
//!   done to any file.
//!
//! Besides, the process is not dumpable. No core dump and no other process of the same user gets
//! at guests' pages.
//!
//! All of that is inherited by threads, and landlock cannot be laid on those that run already. So
//! it is done between [`Ready::new`](crate::server::Ready::new), which opens everything, and
//! [`Ready::run`](crate::server::Ready::run), which starts the first thread.
//!
//! What it does not stop is in `docs/threat-model.md`.

pub mod landlock;
pub mod seccomp;

use std::fmt;
use std::path::PathBuf;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::set_no_new_privs;

use crate::options::Options;

/// Why the process cannot be confined.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The kernel refused the filter of system calls.
    #[error("cannot filter system calls: {0}; --sandbox off goes without")]
    Seccomp(#[from] seccompiler::Error),
    /// The kernel has landlock, and refused the rules.
    #[error("cannot restrict the use of files: {0}; --sandbox off goes without")]
    Landlock(#[from] ::landlock::RulesetError),
    /// The directory of a socket is gone.
    #[error("cannot restrict the use of files to {path}: {error}; --sandbox off goes without")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        error: ::landlock::PathFdError,
    },
    /// Anything else.
    #[error("cannot give up privileges: {0}; --sandbox off goes without")]
    System(#[from] rustix::io::Errno),
}

/// What is in force. Its text is for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// What landlock does.
    pub landlock: landlock::Level,
}

impl Confinement {
    /// Whether anything is missing that a newer kernel would have.
    pub fn is_whole(&self) -> bool {
        self.landlock != landlock::Level::Absent
    }
}

impl fmt::Display for Confinement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.landlock {
            landlock::Level::Absent => f.write_str(
                "confined by seccomp alone: this kernel has no landlock, or it is not enabled",
            ),
            landlock::Level::Abi(number) => {
                write!(f, "confined by seccomp and landlock (ABI {number})")
            }
        }
    }
}

/// Confines the process to what a daemon with these options does from now on. There is no way
/// back. To be called while there is one thread only.
///
/// # Errors
/// When the kernel refuses; some of it may be in force then. A kernel without landlock is none.
pub fn confine(
    options: &Options,
    reaction: seccomp::Reaction,
) -> Result<Confinement, SandboxError> {
    set_no_new_privs(true)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    let places = landlock::Places::of(options);
    let landlock = landlock::restrict(&places)?;
    // The last, since landlock's calls are among those that there are no more.
    seccomp::restrict(reaction, !places.making.is_empty())?;
    Ok(Confinement { landlock })
}
