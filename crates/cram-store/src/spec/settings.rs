// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the arena keeps of a client beside its pools: what the operator has set
//! for it, and by what it is told from another of the same name.

use std::collections::BTreeSet;

/// The weight of a client of which the operator has said nothing.
pub const DEFAULT_WEIGHT: u32 = 100;
/// The most shared pools that one client may be authorised for.
pub const AUTHORISED_MAX: usize = 64;

/// What the operator has set for a client. It is kept in the arena, so that a store that is opened
/// again still has it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ClientSettings {
    /// The most bytes that its pages and their metadata may take; `None` when only the store's
    /// capacity limits it.
    pub quota_bytes: Option<u64>,
    /// What it counts for when the store is full, in proportion to the others' weights.
    pub weight: u32,
    /// Its puts are refused.
    pub is_frozen: bool,
    /// The uuids of the shared pools that it may open, [`AUTHORISED_MAX`] at the most.
    pub authorised: BTreeSet<[u8; 16]>,
}

impl Default for ClientSettings {
    fn default() -> Self {
        Self {
            quota_bytes: None,
            weight: DEFAULT_WEIGHT,
            is_frozen: false,
            authorised: BTreeSet::new(),
        }
    }
}

impl ClientSettings {
    /// Whether it can be kept.
    pub(crate) fn is_bounded(&self) -> bool {
        self.authorised.len() <= AUTHORISED_MAX
    }
}

/// By what a client is told from what it was before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Identity {
    /// Differs from one life of the client's pages to the next.
    pub(crate) generation: u64,
    /// Whatever the store's user wants to know the client by.
    pub(crate) instance: [u8; 16],
}
