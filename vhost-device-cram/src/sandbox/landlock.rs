// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where in the file system the daemon can still do something: its sockets' directories.
//!
//! It removes its sockets when it ends, and makes new ones for guests that are added. A rule for a directory holds for all that is below it, too.
//! Everything else is refused: no file is opened, nothing else is listed or made. Descriptors that are open
//! already, the arena's and those that a front-end hands over, are not touched by that.

use std::collections::BTreeSet;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::SandboxError;
use crate::address::Address;
use crate::options::Options;
use crate::socket::directory_of;

/// The newest interface whose rights are asked for. What an older kernel does not know is left out.
const NEWEST: ABI = ABI::V9;

/// How much of it a kernel does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// Nothing: there is no landlock.
    Absent,
    /// All that the kernel's interface of this number has.
    Abi(u32),
}

/// Where something can be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Directories in which files can be removed.
    pub removing: BTreeSet<PathBuf>,
    /// Directories in which sockets can be made, for guests that are added.
    pub making: BTreeSet<PathBuf>,
}

impl Places {
    /// What a daemon with these options needs.
    pub fn of(options: &Options) -> Self {
        let sockets = options.guests.iter().map(|guest| &guest.socket);
        let metrics = match &options.metrics {
            Some(Address::Unix(path)) => Some(path),
            _ => None,
        };
        let sockets = sockets.chain(&options.control_socket).chain(metrics);
        let making = options.folders();
        let used = sockets.map(|path| directory_of(path));
        Self {
            removing: used.chain(making.iter().cloned()).collect(),
            making,
        }
    }
}

/// Restricts this thread, and those that it starts, to these places.
///
/// # Errors
/// When a place does not exist, or the kernel has landlock and refuses.
pub fn restrict(places: &Places) -> Result<Level, SandboxError> {
    let mut rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        // No network at all, and so no rule for it.
        .handle_access(AccessNet::from_all(NEWEST))?
        // Neither abstract sockets nor signals to others.
        .scope(Scope::from_all(NEWEST))?
        .create()?;
    let remove = BitFlags::from(AccessFs::RemoveFile);
    for path in &places.removing {
        let allowed = match places.making.contains(path) {
            true => remove | AccessFs::MakeSock,
            false => remove,
        };
        let directory = PathFd::new(path).map_err(|error| SandboxError::Directory {
            path: path.clone(),
            error,
        })?;
        rules = rules.add_rule(PathBeneath::new(directory, allowed))?;
    }
    let status = rules.restrict_self()?;
    Ok(match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, _) => Level::Absent,
        (_, LandlockStatus::Available { effective_abi, .. }) => Level::Abi(number(effective_abi)),
        _ => Level::Absent,
    })
}

/// The number of an interface.
fn number(abi: ABI) -> u32 {
    // A type that may grow cannot be cast.
    let found = (0..100_i32).find(|number| ABI::from(*number) == abi);
    found.unwrap_or_default().unsigned_abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interfaces_have_numbers() {
        assert_eq!(number(ABI::V1), 1);
        assert_eq!(number(ABI::V9), 9);
        assert_eq!(number(ABI::Unsupported), 0);
    }
}
