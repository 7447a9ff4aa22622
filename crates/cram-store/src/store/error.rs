// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be wrong when a store or a client of it is made.

use thiserror::Error;

use crate::arena::ArenaError;
use crate::spec::NAME_BYTES_MAX;
use crate::spec::config::{
    CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN, CLIENTS_MAX, POOLS_PER_CLIENT_MAX, StoreConfig,
};
use crate::spec::settings::AUTHORISED_MAX;

impl StoreConfig {
    /// Refuses what cannot work, with a text that says what would.
    pub(crate) fn checked(&self) -> Result<(), StoreError> {
        if self.capacity_bytes < CAPACITY_BYTES_MIN {
            return Err(StoreError::CapacityTooSmall {
                bytes: self.capacity_bytes,
            });
        }
        if self.capacity_bytes > CAPACITY_BYTES_MAX {
            return Err(StoreError::CapacityTooLarge {
                bytes: self.capacity_bytes,
            });
        }
        if !(1..=CLIENTS_MAX).contains(&self.max_clients) {
            return Err(StoreError::BadClientLimit {
                limit: self.max_clients,
            });
        }
        if !(1..=POOLS_PER_CLIENT_MAX).contains(&self.max_pools_per_client) {
            return Err(StoreError::BadPoolLimit {
                limit: self.max_pools_per_client,
            });
        }
        Ok(())
    }
}

/// Why a store, or a client of it, could not be made. Told to the operator, never to a guest.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The capacity is below [`CAPACITY_BYTES_MIN`].
    #[error("a capacity of {bytes} bytes is too small: use {CAPACITY_BYTES_MIN} or more")]
    CapacityTooSmall {
        /// What was asked for, in bytes.
        bytes: u64,
    },
    /// The capacity is above [`CAPACITY_BYTES_MAX`].
    #[error("a capacity of {bytes} bytes is too large: use {CAPACITY_BYTES_MAX} or less")]
    CapacityTooLarge {
        /// What was asked for, in bytes.
        bytes: u64,
    },
    /// The number of clients is 0 or above [`CLIENTS_MAX`].
    #[error("{limit} clients cannot be served: use 1 to {CLIENTS_MAX}")]
    BadClientLimit {
        /// What was asked for.
        limit: u32,
    },
    /// The number of pools is 0 or above [`POOLS_PER_CLIENT_MAX`].
    #[error("{limit} pools for each client are not possible: use 1 to {POOLS_PER_CLIENT_MAX}")]
    BadPoolLimit {
        /// What was asked for.
        limit: u32,
    },
    /// As many clients as the configuration allows are there already.
    #[error("there are {limit} clients already, which is the limit")]
    TooManyClients {
        /// The configured limit.
        limit: u32,
    },
    /// Another client has this name.
    #[error("a client named {name:?} is there already")]
    ClientExists {
        /// The name in question.
        name: String,
    },
    /// The client was removed from the store; this is a handle on what it was.
    #[error("the client {name:?} was removed")]
    ClientGone {
        /// The name that it had.
        name: String,
    },
    /// The name is empty or too long.
    #[error("a name of {bytes} bytes is not possible: use 1 to {NAME_BYTES_MAX}")]
    BadName {
        /// How long it is.
        bytes: usize,
    },
    /// More uuids than [`AUTHORISED_MAX`].
    #[error("a client can be authorised for {AUTHORISED_MAX} shared pools at the most")]
    TooManyAuthorised,
    /// The arena could not be opened.
    #[error(transparent)]
    Arena(#[from] ArenaError),
    /// What the arena holds, and the index for it, does not fit into the capacity.
    #[error("what is in the arena does not fit into a capacity of {capacity_bytes} bytes")]
    DoesNotFit {
        /// The capacity that was asked for, in bytes.
        capacity_bytes: u64,
    },
    /// The store, or the quota given, has no room for the client's own structures.
    #[error("there is no room for another client")]
    NoRoom,
}
