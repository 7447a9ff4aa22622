// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's memory, and what a hostile guest writes there: descriptors that lead to plausible places,
//! near them, and nowhere; requests that are right but for a byte; anything else.

use std::fs::File;
use std::sync::Arc;

use arbitrary::Arbitrary;
use cram_abi::wire::HEADER_SIZE;
use cram_store::{Client, PoolId, PoolKind, PoolSpec, Store, StoreConfig};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device_cram::vhost::memory::Memory;
use vhost_device_cram::vhost::message::Region;
use vm_memory::{Bytes, GuestAddress};

/// The first region: rings, tables and requests.
pub const LOW_BYTES: u64 = 128 << 10;
/// The second one begins behind a hole.
pub const HIGH: u64 = 1 << 20;
pub const HIGH_BYTES: u64 = 16 << 10;
/// Entries of a ring.
pub const RING: u16 = 16;
/// Descriptor tables: one for each ring, and some that indirect descriptors lead to.
const TABLES: u64 = 8;
const TABLE_BYTES: u64 = 1024;
/// Where requests and pages lie: slots of a page each.
const SLOTS: u64 = LOW_BYTES / 2;
const SLOT_BYTES: u64 = 4096;
const SLOT_COUNT: u64 = (LOW_BYTES - SLOTS) / SLOT_BYTES;

/// Where the descriptor table of ring (or of an indirect descriptor) `k` lies.
pub fn table_at(k: u64) -> u64 {
    k % TABLES * TABLE_BYTES
}

/// A place in the guest's memory, or out of it.
#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Place {
    Slot(u8),
    Near(u8, i8),
    Table(u8),
    High(u16),
    Hole,
    LastOfLow(u8),
    Wild(u64),
}

impl Place {
    pub fn address(self) -> u64 {
        let slot = |k: u8| SLOTS + u64::from(k) % SLOT_COUNT * SLOT_BYTES;
        match self {
            Self::Slot(k) => slot(k),
            Self::Near(k, by) => slot(k).wrapping_add_signed(by.into()),
            Self::Table(k) => table_at(k.into()),
            Self::High(at) => HIGH + u64::from(at) % HIGH_BYTES,
            Self::Hole => HIGH - 4096,
            Self::LastOfLow(back) => LOW_BYTES - u64::from(back),
            Self::Wild(address) => address,
        }
    }
}

#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Length {
    Header,
    Response,
    Page,
    Pages(u8),
    Small(u8),
    Entries(u8),
    Wild(u32),
}

impl Length {
    fn bytes(self) -> u32 {
        match self {
            Self::Header => 64,
            Self::Response => 80,
            Self::Page => 4096,
            Self::Pages(n) => u32::from(n) * 4096,
            Self::Small(n) => n.into(),
            Self::Entries(n) => u32::from(n) * 16,
            Self::Wild(len) => len,
        }
    }
}

/// Something that a guest writes.
#[derive(Arbitrary, Debug)]
pub enum Write {
    Descriptor {
        table: u8,
        entry: u8,
        place: Place,
        length: Length,
        flags: u8,
        next: u8,
    },
    /// A whole chain for a put or a get, as a good driver would make it.
    Chain {
        table: u8,
        entry: u8,
        op: u8,
        pool: u8,
        object: u8,
        count: u8,
        index: u8,
    },
    /// A request's first bytes.
    Header {
        slot: u8,
        op: u8,
        pool: u8,
        object: u8,
        count: u8,
        spoiled: Option<(u8, u8)>,
    },
    Bytes(Place, Vec<u8>),
    Fill(u8, u8),
}

fn write(memory: &Memory, address: u64, bytes: &[u8]) {
    // What is out of memory is no write.
    let _ = memory.write_slice(bytes, GuestAddress(address));
}

fn header(op: u8, pool: u8, object: u8, count: u8) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    let op = u16::from(op % 9);
    bytes[0..2].copy_from_slice(&op.to_le_bytes());
    bytes[4..8].copy_from_slice(&u32::from(pool % 5).to_le_bytes());
    bytes[8] = object % 3;
    bytes[32..36].copy_from_slice(&u32::from(count % 67).to_le_bytes());
    bytes
}

fn descriptor(memory: &Memory, at: u64, address: u64, len: u32, flags: u16, next: u16) {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    write(memory, at, &bytes);
}

impl Write {
    pub fn apply(&self, memory: &Memory) {
        match self {
            Self::Descriptor {
                table,
                entry,
                place,
                length,
                flags,
                next,
            } => {
                let at = table_at(u64::from(*table)) + u64::from(*entry % 64) * 16;
                let flags = u16::from(*flags & 7);
                descriptor(
                    memory,
                    at,
                    place.address(),
                    length.bytes(),
                    flags,
                    u16::from(*next % 66),
                );
            }
            Self::Chain {
                table,
                entry,
                op,
                pool,
                object,
                count,
                index,
            } => {
                let count = *count % 3 + 1;
                let is_put = op % 2 == 0;
                let pages = u32::from(count) * 4096;
                let slot = Place::Slot(*entry).address();
                let mut bytes = header(if is_put { 3 } else { 4 }, *pool, *object, count).to_vec();
                for k in 0..count {
                    bytes.extend(u32::from(index.wrapping_add(k)).to_le_bytes());
                }
                write(memory, slot, &bytes);
                let table = table_at(u64::from(*table));
                let first = u16::from(*entry % RING as u8);
                let nth = |k: u16| (first + k) % RING;
                let at = |k: u16| table + u64::from(nth(k)) * 16;
                let body = u32::try_from(bytes.len()).unwrap();
                descriptor(memory, at(0), slot, body, 1, nth(1));
                let far = Place::Slot(entry.wrapping_add(1)).address();
                let answer = Place::High(u16::from(*entry) * 96).address();
                if is_put {
                    descriptor(memory, at(1), far, pages, 1, nth(2));
                    descriptor(memory, at(2), answer, 80, 2, 0);
                } else {
                    descriptor(memory, at(1), answer, 80, 3, nth(2));
                    descriptor(memory, at(2), far, pages, 2, 0);
                }
            }
            Self::Header {
                slot,
                op,
                pool,
                object,
                count,
                spoiled,
            } => {
                let mut bytes = header(*op, *pool, *object, *count);
                if let Some((at, value)) = spoiled {
                    bytes[usize::from(*at) % HEADER_SIZE] = *value;
                }
                write(memory, Place::Slot(*slot).address(), &bytes);
            }
            Self::Bytes(place, bytes) => write(memory, place.address(), bytes),
            Self::Fill(slot, byte) => {
                write(
                    memory,
                    Place::Slot(*slot).address(),
                    &[*byte; SLOT_BYTES as usize],
                );
            }
        }
    }
}

/// The regions of the memory, both in one file; the front-end has them where the guest has.
pub fn regions() -> [Region; 2] {
    let region = |at, bytes, offset| Region {
        guest: at,
        bytes,
        user: at,
        offset,
    };
    [region(0, LOW_BYTES, 0), region(HIGH, HIGH_BYTES, LOW_BYTES)]
}

/// Memory of two regions, and the file that both are in.
pub fn memory() -> (Memory, File) {
    let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    ftruncate(&file, LOW_BYTES + HIGH_BYTES).unwrap();
    let none = Memory::default();
    let memory = regions().into_iter().fold(none, |memory, region| {
        memory.with(region, file.try_clone().unwrap()).unwrap()
    });
    (memory, file)
}

/// Zeroes everything.
pub fn wipe(memory: &Memory) {
    write(memory, 0, &[0; LOW_BYTES as usize]);
    write(memory, HIGH, &[0; HIGH_BYTES as usize]);
}

/// Ids of a guest's pools are below this.
pub const POOLS: u32 = 4;

/// A small store, and a client of it.
pub fn store() -> (Arc<Store>, Arc<Client>) {
    let store = Store::new(StoreConfig {
        capacity_bytes: 1 << 20,
        background: None,
        ..StoreConfig::default()
    })
    .unwrap();
    let client = store.add_client("guest", None).unwrap();
    (store, client)
}

/// Leaves the client with pool 0, persistent, and nothing in it.
pub fn empty(client: &Client) {
    for pool in 0..POOLS {
        let _ = client.destroy_pool(PoolId(pool));
    }
    let spec = PoolSpec {
        kind: PoolKind::Persistent,
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(0), spec).unwrap();
}
