// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A store of compressed pages with the semantics of transcendent memory
//! (tmem): pages are put, got and flushed by name, and any put may be refused.
//!
//! A [`Store`] serves many [`Client`]s; each has [`Pool`]s, and in a pool a page
//! of 4096 bytes is named by a 192-bit object id and a 32-bit page number. The
//! store knows nothing of virtio or sockets, and nothing that comes from a
//! guest (ids, numbers, page contents) can make it panic.
//!
//! What it promises:
//! - After a put, whatever came of it, no older copy is ever seen.
//! - A get returns the bytes that were put last, or says that it cannot: every
//!   page carries a checksum that is verified on every get.
//! - The memory held, metadata included, never exceeds the capacity, and a
//!   client's never exceeds its quota.
//! - Persistent pages are never evicted.
//! - With its arena in a file, every page that was acknowledged is there again
//!   when the process was killed and another one opens the file; and none that
//!   was overwritten or flushed.
//!
//! `docs/store.md` describes the inside, `docs/performance.md` what it costs.
//!
//! ```
//! use cram_store::*;
//! let store = Store::new(StoreConfig::default())?;
//! let client = store.add_client("guest", None)?;
//! client.new_pool(PoolId(0), PoolSpec { kind: PoolKind::Persistent, refuse_incompressible: false })?;
//! let pool = client.pool(PoolId(0)).ok_or(NoPool)?;
//! let mut scratch = Scratch::new();
//! let mut page = [7; PAGE_SIZE];
//! assert_eq!(pool.put(ObjectId([0; 3]), 42, &page, &mut scratch), PutResult::Stored);
//! page.fill(0);
//! assert_eq!(pool.get(ObjectId([0; 3]), 42, &mut page, &mut scratch), GetResult::Found);
//! assert_eq!(page, [7; PAGE_SIZE]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

// The modules, from the floor up. Each imports what stands above it in this list, never what is
// below; `tests/layers.rs` sees to it that there are no circles.
//
// - `sync`, `budget`, `prefetch`, `codec`: know nothing of the store.
// - `arena`: the mapped file, spans, records, pins. Knows no client.
// - `spec`, `settings`, `config`: what everybody may know of pools, clients and the operator's wishes.
// - `account`, `objects`, `catalogue`, `domain`, `index`, `queue`, `stats`, …: what is known of records,
//   each by itself; `ledger` has them all, and `replace` is how a record takes another's place.
// - `space`: a pool's pages over the ledger. `core`: the ledger and the spaces.
// - `relocate`, `policy`, `evict`, `compact`, `share`, `recompress`, `maintain`: what moves pages.
// - `recover`: makes all of that from an arena.
// - `pool`, `client`, `store`, `check`: the public face.
#![deny(unsafe_code)]

mod account;
mod alias;
mod arena;
mod budget;
mod catalogue;
mod check;
mod client;
mod codec;
mod compact;
mod config;
mod core;
mod domain;
mod evict;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod forge;
mod ghosts;
mod index;
mod leaf;
mod ledger;
mod maintain;
mod objects;
mod policy;
mod pool;
mod prefetch;
mod queue;
mod recompress;
mod recover;
mod relocate;
mod replace;
mod settings;
mod share;
mod space;
mod spec;
mod stats;
mod store;
mod sums;
mod sync;
mod tables;
mod twins;
mod waker;

pub use arena::{ArenaError, Backing, FORMAT_VERSION};
pub use client::Client;
pub use codec::Scratch;
pub use config::{
    CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN, CLIENTS_MAX, POOLS_PER_CLIENT_MAX, StoreConfig,
    StoreError,
};
pub use policy::ReclaimTarget;
pub use pool::{GetResult, Pool, PutResult};
pub use recover::Recovery;
pub use settings::{AUTHORISED_MAX, ClientSettings, DEFAULT_WEIGHT};
pub use spec::{Background, NoPool, PoolError, PoolId, PoolKind, PoolSpec};
pub use stats::{ClientStats, PoolStats, Refusal, Stats, StoreStats};
pub use store::{AgeBytes, Store};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// A page's bytes.
pub type Page = [u8; PAGE_SIZE];

/// An object's id, 192 bits, chosen by the guest: a swap device, an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ObjectId(pub [u64; 3]);
