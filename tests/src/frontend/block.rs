// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver of somebody else's device: a disk that is exported by vhost-user-blk, to compare with.
//! Requests are laid out as VIRTIO 1.3, section 5.2.6, has them.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use vhost::VhostBackend;
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};

use super::PATIENCE;
use super::device::{EVENT_IDX, INDIRECT_DESC, VERSION_1, start_ring};
use super::memory::Memory;
use super::ring::{Manner, Piece, Ring};

const READ: u32 = 0;
const WRITE: u32 = 1;
const HEADER_BYTES: usize = 16;
const SECTOR_BYTES: u64 = 512;
/// What a request answers that was done.
const OK: u8 = 0;

/// What of a page is transferred, and where it lies in the guest's memory.
#[derive(Clone, Copy, Debug)]
pub struct Transfer {
    /// Where on the disk, in bytes.
    pub at: u64,
    /// Where in memory.
    pub address: u64,
    /// How many bytes.
    pub bytes: usize,
}

struct Lane {
    header: u64,
    status: u64,
    table: u64,
}

/// A connection to a disk. Requests of three descriptors each, one for each lane in flight.
pub struct Disk {
    /// Keeps the connection.
    _frontend: Frontend,
    /// The pretended guest's memory.
    pub memory: Arc<Memory>,
    ring: Ring,
    lanes: Vec<Lane>,
    lane_of: Vec<Option<usize>>,
}

impl Disk {
    /// Connects with so much memory, and room for so many requests in flight.
    ///
    /// # Errors
    ///
    /// When any step fails.
    pub fn connect(socket: &Path, memory_bytes: u64, lanes: usize) -> Result<Self> {
        let memory = Memory::new(memory_bytes)?;
        let manner = Manner {
            size: 256,
            indirect: true,
            event_idx: true,
        };
        let mut ring = Ring::new(&memory, manner)?;
        let stream = UnixStream::connect(socket)
            .with_context(|| format!("cannot connect to {}", socket.display()))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut frontend = Frontend::from_stream(stream, 1);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let wanted = VERSION_1
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | EVENT_IDX
            | INDIRECT_DESC;
        ensure!(offered & wanted == wanted, "the disk offers {offered:#x}");
        let protocol = frontend.get_protocol_features()?;
        let protocol = protocol & VhostUserProtocolFeatures::REPLY_ACK;
        frontend.set_protocol_features(protocol)?;
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(wanted)?;
        frontend.set_mem_table(&memory.regions())?;
        start_ring(&mut frontend, 0, &ring)?;
        ring.watch(true)?;
        let lane = || -> Result<Lane> {
            Ok(Lane {
                header: memory.allocate(HEADER_BYTES, 64)?,
                status: memory.allocate(1, 64)?,
                table: memory.allocate(3 * 16, 16)?,
            })
        };
        let lanes = (0..lanes).map(|_| lane()).collect::<Result<_>>()?;
        let lane_of = vec![None; usize::from(ring.size())];
        Ok(Self {
            _frontend: frontend,
            memory,
            ring,
            lanes,
            lane_of,
        })
    }

    fn send(&mut self, lane: usize, is_write: bool, transfer: Transfer) -> Result<()> {
        let place = &self.lanes[lane];
        let mut header = [0; HEADER_BYTES];
        let kind = if is_write { WRITE } else { READ };
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(transfer.at / SECTOR_BYTES).to_le_bytes());
        self.memory.write(place.header, &header)?;
        let piece = |address, len: usize, writable| -> Result<Piece> {
            Ok(Piece {
                address,
                len: u32::try_from(len)?,
                writable,
            })
        };
        let pieces = [
            piece(place.header, HEADER_BYTES, false)?,
            piece(transfer.address, transfer.bytes, !is_write)?,
            piece(place.status, 1, true)?,
        ];
        let mut table = [0; 3 * 16];
        Ring::lay_out(&mut pieces.into_iter(), &mut table);
        self.memory.write(place.table, &table)?;
        let head = self.ring.submit_table(place.table, pieces.len())?;
        self.lane_of[usize::from(head)] = Some(lane);
        Ok(())
    }

    /// Does all transfers, as many at a time as there are lanes, watching the ring.
    ///
    /// # Errors
    ///
    /// When one fails.
    pub fn drive(
        &mut self,
        is_write: bool,
        transfers: &mut dyn Iterator<Item = Transfer>,
    ) -> Result<()> {
        let mut free: Vec<usize> = (0..self.lanes.len()).collect();
        let all = free.len();
        let mut next = transfers.next();
        loop {
            while let (Some(transfer), Some(lane)) = (next, free.last().copied()) {
                free.pop();
                self.send(lane, is_write, transfer)?;
                next = transfers.next();
            }
            self.ring.notify()?;
            if free.len() == all {
                return Ok(());
            }
            let (head, _) = self.ring.watch_used(PATIENCE)?;
            let lane = self.lane_of[usize::from(head)].take();
            let lane = lane.context("a chain was completed that was not sent")?;
            let mut status = [0xff];
            self.memory
                .read_into(self.lanes[lane].status, &mut status)?;
            ensure!(status == [OK], "a transfer was answered {status:?}");
            free.push(lane);
        }
    }
}
