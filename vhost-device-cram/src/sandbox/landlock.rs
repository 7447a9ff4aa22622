// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where in the file system the daemon can still do something: its sockets' directories.
//!
//! It removes its sockets when it ends. A rule for a directory holds for all that is below it, too.
//! Everything else is refused: no file is opened, nothing is listed or made. Descriptors that are open
//! already, the arena's and those that a front-end hands over, are not touched by that.

use std::collections::BTreeSet;
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::SandboxError;
use crate::server::Options;
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

/// The directories in which files can be removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places(pub BTreeSet<PathBuf>);

impl Places {
    /// What a daemon with these options needs.
    pub fn of(options: &Options) -> Self {
        let sockets = options.guests.iter().map(|guest| &guest.socket);
        let sockets = sockets.chain(&options.control_socket);
        Self(sockets.map(|path| directory_of(path)).collect())
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
    for path in &places.0 {
        let directory = PathFd::new(path).map_err(|error| SandboxError::Directory {
            path: path.clone(),
            error,
        })?;
        rules = rules.add_rule(PathBeneath::new(directory, remove))?;
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
