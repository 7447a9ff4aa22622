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

// The layers, from the floor up. Each is a folder (or a file) and imports what stands before it in
// this list, never what comes after; `tests/layers.rs` sees to that.
//
// 1. `spec`: pages, pools, names, settings, configuration: what everybody may know.
// 2. `machine`: locks and atomics, the budget of memory, cache lines. `codec`: packs one page.
// 3. `arena`: the mapped file, spans, records, pins. Knows no client.
// 4. `log`: the heads that records are appended to, the order of spans, the keeper's bell.
// 5. `ledger`: accounts, objects, images, catalogue, counters, hints: what is known of records.
//    `replace` is the only place where a record takes another's.
// 6. `space`: a pool's pages, by an index over the ledger.
// 7. `engine`: ledger and spaces together, and what moves pages: compaction, eviction, sharing, policy.
// 8. `recover`: makes all of that from an arena. `maintain`: the background thread.
// 9. `store`: the public face: pools, clients, the store, its check. (`forge`: what fuzzers damage.)
#![deny(unsafe_code)]

mod arena;
mod codec;
mod engine;
#[cfg(fuzzing)]
#[doc(hidden)]
pub mod forge;
mod ledger;
mod log;
mod machine;
mod maintain;
mod recover;
mod space;
mod spec;
mod store;

#[cfg(any(test, feature = "fault-injection"))]
pub use arena::jump_clock;
pub use arena::{ArenaError, FORMAT_VERSION};
pub use codec::Scratch;
pub use engine::policy::ReclaimTarget;
pub use ledger::stats::{ClientStats, PoolStats, Refusal, Stats, StoreStats};
pub use recover::Recovery;
pub use spec::config::{
    Backing, CAPACITY_BYTES_MAX, CAPACITY_BYTES_MIN, CLIENTS_MAX, POOLS_PER_CLIENT_MAX, StoreConfig,
};
pub use spec::settings::{AUTHORISED_MAX, ClientSettings, DEFAULT_WEIGHT};
pub use spec::{
    Background, NoPool, ObjectId, PAGE_SIZE, Page, PoolError, PoolId, PoolKind, PoolSpec,
};
pub use store::client::Client;
pub use store::error::StoreError;
pub use store::pool::{GetResult, Pool, PutResult};
pub use store::{AgeBytes, Store};
