// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What everybody may know: pages, how pools are named and what they are for,
//! what can be chosen.

pub(crate) mod config;
pub(crate) mod settings;

use std::time::Duration;

use thiserror::Error;

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// A page's bytes.
pub type Page = [u8; PAGE_SIZE];

/// An object's id, 192 bits, chosen by the guest: a swap device, an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub [u64; 3]);

/// The most bytes of a client's name.
pub(crate) const NAME_BYTES_MAX: usize = 255;

/// A pool's number inside its client, chosen by the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PoolId(pub u32);

/// What a pool is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PoolKind {
    /// Pages stay until flushed (swap).
    Persistent,
    /// Pages may be evicted, and a get removes them (page cache).
    PrivateEphemeral,
    /// Pages may be evicted, a get keeps them, and every client that opens the pool under this
    /// uuid, if the operator allows it, sees the same pages.
    SharedEphemeral {
        /// Names the pool among all clients of the store.
        uuid: [u8; 16],
    },
}

impl PoolKind {
    /// What a shared pool is named by.
    #[must_use]
    pub fn uuid(self) -> Option<[u8; 16]> {
        match self {
            Self::SharedEphemeral { uuid } => Some(uuid),
            Self::Persistent | Self::PrivateEphemeral => None,
        }
    }
}

/// How a pool is to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PoolSpec {
    /// What the pool is for.
    pub kind: PoolKind,
    /// Refuse pages that do not compress rather than keep them as they are.
    pub refuse_incompressible: bool,
}

/// Why a pool could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PoolError {
    /// The id is not below the configured number of pools.
    #[error("no pool of a client can have that id")]
    BadId,
    /// A pool with this id is there and is different.
    #[error("a different pool has this id")]
    Exists,
    /// The operator does not allow this client that shared pool; or it has it under another id; or
    /// the client was removed.
    #[error("this client may not open that pool")]
    Denied,
    /// No room for the pool's own structures, in the store or in the client's quota.
    #[error("there is no room for a pool")]
    NoSpace,
}

/// No pool has this id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("there is no such pool")]
pub struct NoPool;

/// What becomes of the pages of a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Keeping {
    /// Kept until flushed.
    Persistent = 1,
    /// May be evicted; a get takes the page out.
    Exclusive = 2,
    /// May be evicted; a get leaves the page and makes it young again.
    Shared = 3,
}

/// What the background thread may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Background {
    /// The share of one processor's time that compaction and recompression may take, in percent, 1
    /// to 100.
    pub cpu_percent: u32,
    /// Pages that were neither put nor got for so long are packed once more; `None`: never.
    pub cold_after: Option<Duration>,
}

impl Default for Background {
    /// A quarter of a processor; cold after ten minutes.
    fn default() -> Self {
        Self {
            cpu_percent: 25,
            cold_after: Some(Duration::from_secs(600)),
        }
    }
}
