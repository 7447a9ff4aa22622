// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What an operator chooses when a store is made.

use std::path::PathBuf;

use crate::spec::Background;

/// The least capacity that a store accepts, in bytes: below it the fixed structures would be most of it.
pub const CAPACITY_BYTES_MIN: u64 = 256 << 10;
/// The greatest capacity, in bytes: half of what 32-bit places reach in granules of 64 bytes.
pub const CAPACITY_BYTES_MAX: u64 = 128 << 30;
/// The most clients that one store serves; a bound on what the operator can ask for.
pub const CLIENTS_MAX: u32 = 4096;
/// The most pools that one client may have; a bound on what the operator can allow.
pub const POOLS_PER_CLIENT_MAX: u32 = 1024;

/// Where the arena is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Backing {
    /// In memory that ends with the process.
    #[default]
    Memory,
    /// In this file, which is made if it is not there: under /dev/shm or on hugetlbfs, it is memory
    /// that outlives the process; elsewhere it is a file that the system writes to its disk. The
    /// store finds its pages in it again.
    File(PathBuf),
}

/// How large a store is and how many it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoreConfig {
    /// Bytes that the store may take from the host in all, its metadata included. Never exceeded.
    pub capacity_bytes: u64,
    /// How many clients there may be at one time.
    pub max_clients: u32,
    /// How many pools each client may have; their ids are below this number.
    pub max_pools_per_client: u32,
    /// Where the arena is: in memory that ends with the process, or in a file, in which a later
    /// process finds all pages again.
    pub backing: Backing,
    /// What the store's background thread may do; `None`: there is none, and puts that find no room
    /// make it by themselves.
    pub background: Option<Background>,
    /// Equal pages of a client are stored once.
    pub share_equal_pages: bool,
}

impl Default for StoreConfig {
    /// 1 GiB in memory, 64 clients of 16 pools each, a background thread, equal pages stored once.
    fn default() -> Self {
        Self {
            capacity_bytes: 1 << 30,
            max_clients: 64,
            max_pools_per_client: 16,
            backing: Backing::Memory,
            background: Some(Background::default()),
            share_equal_pages: true,
        }
    }
}
