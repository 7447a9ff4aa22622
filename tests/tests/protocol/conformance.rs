// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of conformance, through the daemon's parser called directly, and through the front-end.
//! (From inside a guest: `tests/tests/guest/conformance.rs`.)

use std::sync::Arc;

use anyhow::Result;
use cram_abi::wire::feature;
use cram_conformance::{Channel, Part, Reply, run};
use cram_store::{Client, Store, StoreConfig};
use cram_tests::frontend::{Descriptor, Guest, Memory, Options, PATIENCE, Piece, TestDaemon};
use vhost_device_cram::balance::{Balance, Policy};
use vhost_device_cram::execute::{Target, Workspace, execute};
use vhost_device_cram::request::{Table, Terms};
use vhost_device_cram::vhost::memory::Memory as Shared;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const CAPACITY: u64 = 64 << 20;
const MEMORY: u64 = 16 << 20;
const UNTOUCHED: u8 = 0xa5;

/// Where each part lies; and where the writable ones do, to be read again.
fn lay_out(memory: &Memory, parts: &[Part]) -> Result<(Vec<Piece>, Vec<Piece>)> {
    let mut pieces = Vec::new();
    for part in parts {
        let (address, len, writable) = match part {
            Part::Read(bytes) => {
                let address = memory.allocate(bytes.len(), 8)?;
                memory.write(address, bytes)?;
                (address, bytes.len(), false)
            }
            Part::Write(len) => (memory.allocate(*len, 8)?, *len, true),
            Part::Nowhere(writable, len) => (memory.unmapped(), *len, *writable),
        };
        pieces.push(Piece {
            address,
            len: u32::try_from(len)?,
            writable,
        });
    }
    let writable = pieces
        .iter()
        .zip(parts)
        .filter(|(_, part)| matches!(part, Part::Write(_)))
        .map(|(piece, _)| *piece)
        .collect();
    Ok((pieces, writable))
}

struct Frontend(Guest);

impl Channel for Frontend {
    fn exchange(&mut self, parts: &[Part]) -> Result<Reply> {
        let memory = self.0.memory.clone();
        let mark = memory.mark();
        let (pieces, writable) = lay_out(&memory, parts)?;
        let ring = self.0.ring(1);
        let head = ring.submit(&pieces)?;
        ring.notify()?;
        let (done, used) = ring.wait_used(PATIENCE)?;
        assert_eq!(done, head);
        let written = writable
            .iter()
            .map(|piece| memory.read(piece.address, piece.len as usize))
            .collect::<Result<Vec<_>>>()?;
        memory.release(mark);
        Ok(Reply {
            used,
            written: written.concat(),
        })
    }
}

#[test]
fn through_the_front_end() -> Result<()> {
    for indirect in [true, false] {
        let daemon = TestDaemon::start(1, CAPACITY)?;
        let options = Options {
            indirect,
            ..Options::default()
        };
        let guest = Guest::connect(&daemon.socket(0), &options)?;
        let count = run(&mut Frontend(guest))?;
        assert!(count > 60, "{count} cases only");
        daemon.check_store()?;
    }
    Ok(())
}

/// The parser, and what executes, over memory of its own.
struct Direct {
    memory: Shared,
    store: Arc<Store>,
    client: Arc<Client>,
    balance: Balance,
    workspace: Workspace,
}

impl Direct {
    fn new() -> Result<Self> {
        let store = Store::new(StoreConfig {
            capacity_bytes: CAPACITY,
            ..StoreConfig::default()
        })?;
        let client = store.add_client("guest", None)?;
        let range = (GuestAddress(0), usize::try_from(MEMORY)?);
        Ok(Self {
            memory: GuestMemoryMmap::from_ranges(&[range])?.into(),
            store,
            client,
            balance: Balance::new(Policy::default()),
            workspace: Workspace::new(),
        })
    }
}

impl Channel for Direct {
    fn exchange(&mut self, parts: &[Part]) -> Result<Reply> {
        const TABLE: u64 = 0x1000;
        const BUFFERS: u64 = 0x1_0000;
        let mut at = BUFFERS;
        let mut writable = Vec::new();
        for (number, part) in (0..).zip(parts) {
            let (address, len, is_writable) = match part {
                Part::Read(bytes) => {
                    self.memory.write_slice(bytes, GuestAddress(at))?;
                    (at, bytes.len(), false)
                }
                Part::Write(len) => {
                    let fill = vec![UNTOUCHED; *len];
                    self.memory.write_slice(&fill, GuestAddress(at))?;
                    writable.push((at, *len));
                    (at, *len, true)
                }
                Part::Nowhere(is_writable, len) => (2 * MEMORY, *len, *is_writable),
            };
            at += u64::try_from(len)?;
            let descriptor = Descriptor {
                address,
                len: u32::try_from(len)?,
                flags: u16::from(usize::from(number) + 1 < parts.len())
                    | u16::from(is_writable) << 1,
                next: number + 1,
            };
            let place = GuestAddress(TABLE + 16 * u64::from(number));
            self.memory.write_slice(&descriptor.to_bytes(), place)?;
        }
        let table = Table {
            address: TABLE,
            len: u32::try_from(parts.len())?,
        };
        let terms = Terms {
            features: feature::ALL,
            indirect: true,
        };
        let parsed = self.workspace.chain().parse(&self.memory, table, 0, &terms);
        let target = Target {
            store: &self.store,
            client: &self.client,
            balance: &self.balance,
            features: terms.features,
            max_pools: 16,
        };
        let effect = execute(target, &self.memory, &mut self.workspace, parsed);
        let mut written = Vec::new();
        for (at, len) in writable {
            let mut bytes = vec![0; len];
            self.memory.read_slice(&mut bytes, GuestAddress(at))?;
            written.extend(bytes);
        }
        Ok(Reply {
            used: effect.used,
            written,
        })
    }
}

#[test]
fn through_the_parser() -> Result<()> {
    let mut direct = Direct::new()?;
    run(&mut direct)?;
    direct.store.check().map_err(anyhow::Error::msg)
}
