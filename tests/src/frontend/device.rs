// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A connection to the daemon, from the first message to a device that is ready.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cram_abi::wire::{
    CONFIG_SIZE, Config, EVENT_QUEUE, EVENT_SIZE, Event, Limits, PAGE_SIZE, RESPONSE_SIZE,
    Response, feature, status,
};
use vhost::vhost_user::message::{
    VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

use super::flow::{Flow, Wait};
use super::memory::Memory;
use super::raw::RawFrontend;
use super::ring::{Manner, Piece, Ring};
use super::{PATIENCE, page};
use cram_conformance::Request;

pub(super) const VERSION_1: u64 = 1 << 32;
pub(super) const EVENT_IDX: u64 = 1 << 29;
pub(super) const INDIRECT_DESC: u64 = 1 << 28;

/// How a guest connects.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Device features to accept.
    pub features: u64,
    /// Accept EVENT_IDX.
    pub event_idx: bool,
    /// Accept INDIRECT_DESC, and use it.
    pub indirect: bool,
    /// Request queues to set up.
    pub request_queues: u16,
    /// Entries of each queue.
    pub queue_size: u16,
    /// Which virtual machine it says that it is; the same one for all that do not care.
    pub instance: Option<[u8; 16]>,
    /// Memory of the pretended guest.
    pub memory_bytes: u64,
    /// Tell the daemon of the memory region by region, as QEMU does, rather than in a table.
    pub memory_slots: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            features: feature::ALL,
            event_idx: true,
            indirect: true,
            request_queues: 2,
            queue_size: 256,
            instance: Some([7; 16]),
            memory_bytes: 16 << 20,
            memory_slots: true,
        }
    }
}

impl Options {
    fn wanted_features(&self) -> u64 {
        VERSION_1
            | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
            | if self.event_idx { EVENT_IDX } else { 0 }
            | if self.indirect { INDIRECT_DESC } else { 0 }
            | self.features
    }

    fn manner(&self) -> Manner {
        Manner {
            size: self.queue_size,
            indirect: self.indirect,
            event_idx: self.event_idx,
        }
    }
}

/// What the device answered.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The used length.
    pub used: u32,
    /// The response; as the driver left it when nothing was written.
    pub response: Response,
    /// What is behind the response.
    pub rest: Vec<u8>,
}

impl Answer {
    /// The results of the first `n` pages.
    #[must_use]
    pub fn results(&self, n: usize) -> &[u8] {
        &self.response.result[..n]
    }

    /// Page `k` of a get.
    #[must_use]
    pub fn page(&self, k: usize) -> &[u8] {
        &self.rest[k * PAGE_SIZE..(k + 1) * PAGE_SIZE]
    }

    /// The limits of a query.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub fn limits(&self) -> Result<Limits> {
        Limits::read_from_bytes(&self.rest)
            .ok()
            .context("no limits behind the response")
    }
}

/// Tells a back-end of a ring, and has it begin where the ring is.
pub(super) fn start_ring(frontend: &mut Frontend, index: usize, ring: &Ring) -> Result<()> {
    let (descriptors, available, used) = ring.addresses();
    frontend.set_vring_num(index, ring.size())?;
    let config = VringConfigData {
        queue_max_size: ring.size(),
        queue_size: ring.size(),
        flags: 0,
        desc_table_addr: Memory::user_address(descriptors),
        used_ring_addr: Memory::user_address(used),
        avail_ring_addr: Memory::user_address(available),
        log_addr: None,
    };
    frontend.set_vring_addr(index, &config)?;
    frontend.set_vring_base(index, ring.base()?)?;
    let (kick, call) = ring.notifiers();
    frontend.set_vring_call(index, call)?;
    frontend.set_vring_kick(index, kick)?;
    Ok(frontend.set_vring_enable(index, true)?)
}

/// A guest, connected. Dropping it disconnects.
pub struct Guest {
    frontend: Frontend,
    /// The connection itself.
    stream: UnixStream,
    /// Its memory.
    pub memory: Arc<Memory>,
    rings: Vec<Ring>,
    /// Where the daemon sends requests of its own.
    channel: UnixStream,
    /// Features that the daemon offered.
    pub offered: u64,
}

impl Guest {
    /// Connects, negotiates, and sets up the queues.
    ///
    /// # Errors
    ///
    /// When any step fails.
    pub fn connect(socket: &Path, options: &Options) -> Result<Self> {
        let memory = Memory::new(options.memory_bytes)?;
        let manner = options.manner();
        let rings = (0..=options.request_queues).map(|_| Ring::new(&memory, manner));
        let rings = rings.collect::<Result<Vec<_>>>()?;
        Self::attach(socket, options, memory, rings)
    }

    /// Connects again with the memory and the rings of before, as QEMU does: from the used index.
    ///
    /// # Errors
    ///
    /// When any step fails.
    pub fn reconnect(self, socket: &Path, options: &Options) -> Result<Self> {
        let Self {
            frontend,
            stream,
            memory,
            rings,
            channel,
            ..
        } = self;
        // The daemon serves one front-end of a socket at a time.
        drop((frontend, stream, channel));
        Self::attach(socket, options, memory, rings)
    }

    fn attach(
        socket: &Path,
        options: &Options,
        memory: Arc<Memory>,
        rings: Vec<Ring>,
    ) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut frontend = Frontend::from_stream(stream.try_clone()?, rings.len() as u64);
        frontend.set_owner()?;
        let offered = frontend.get_features()?;
        let features = options.wanted_features();
        ensure!(
            offered & features == features,
            "offered {offered:#x}, wanted {features:#x}"
        );
        let protocol = frontend.get_protocol_features()?;
        frontend.set_protocol_features(protocol)?;
        ensure!(protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ));
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        let queues = frontend.get_queue_num()?;
        ensure!(
            queues >= rings.len() as u64,
            "the device has {queues} queues only"
        );

        if let Some(instance) = options.instance {
            let behind = u32::try_from(CONFIG_SIZE)?;
            frontend.set_config(behind, VhostUserConfigFlags::WRITABLE, &instance)?;
        }

        let (channel, theirs) = UnixStream::pair()?;
        frontend.set_backend_request_fd(&theirs)?;
        frontend.set_features(features)?;
        if options.memory_slots {
            ensure!(frontend.get_max_mem_slots()? >= memory.regions().len() as u64);
            for region in memory.regions() {
                frontend.add_mem_region(&region)?;
            }
        } else {
            frontend.set_mem_table(&memory.regions())?;
        }
        let mut guest = Self {
            frontend,
            stream,
            memory,
            rings,
            channel,
            offered,
        };
        for index in 0..guest.rings.len() {
            guest.start_queue(index)?;
        }
        Ok(guest)
    }

    fn start_queue(&mut self, index: usize) -> Result<()> {
        start_ring(&mut self.frontend, index, &self.rings[index])
    }

    /// Stops a queue and sets it up anew, empty, as a driver's reset would.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn reset_queue(&mut self, index: usize, options: &Options) -> Result<()> {
        self.frontend.set_vring_enable(index, false)?;
        self.frontend.get_vring_base(index)?;
        self.rings[index] = Ring::new(&self.memory, options.manner())?;
        self.start_queue(index)
    }

    /// Resets the device and starts it anew, as when a guest boots again.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn reset(&mut self, options: &Options) -> Result<()> {
        for index in 0..self.rings.len() {
            self.frontend.set_vring_enable(index, false)?;
            self.frontend.get_vring_base(index)?;
        }
        self.frontend.reset_device()?;
        self.frontend.set_features(options.wanted_features())?;
        for index in 0..self.rings.len() {
            self.rings[index] = Ring::new(&self.memory, options.manner())?;
            self.start_queue(index)?;
        }
        Ok(())
    }

    /// Messages of one's own making.
    pub fn frontend(&mut self) -> &mut Frontend {
        &mut self.frontend
    }

    /// The same connection, for messages byte by byte. Not while an answer is waited for.
    ///
    /// # Errors
    ///
    /// When there are no descriptors left.
    pub fn raw(&self) -> Result<RawFrontend> {
        RawFrontend::on(self.stream.try_clone()?)
    }

    /// A queue: 0 is the event queue.
    pub fn ring(&mut self, index: usize) -> &mut Ring {
        &mut self.rings[index]
    }

    /// A driver at full speed on a queue that is idle.
    ///
    /// # Errors
    ///
    /// When the memory has no room.
    pub fn flow(
        &mut self,
        queue: usize,
        pool: u32,
        lanes: usize,
        batch: usize,
        wait: Wait,
    ) -> Result<Flow<'_>> {
        let memory = Arc::clone(&self.memory);
        Flow::new(memory, &mut self.rings[queue], pool, lanes, batch, wait)
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    ///
    /// When the daemon refuses.
    pub fn config(&mut self) -> Result<Config> {
        let size = u32::try_from(CONFIG_SIZE)?;
        let flags = VhostUserConfigFlags::empty();
        let (_, bytes) = self
            .frontend
            .get_config(0, size, flags, &[0; CONFIG_SIZE])?;
        Config::read_from_bytes(&bytes)
            .ok()
            .context("config of a wrong size")
    }

    /// Waits until the daemon hangs up.
    ///
    /// # Errors
    ///
    /// When it does not within the usual time.
    pub fn wait_hang_up(&mut self) -> Result<()> {
        self.channel.set_read_timeout(Some(PATIENCE))?;
        let mut rest = Vec::new();
        let end = self.channel.read_to_end(&mut rest);
        end.context("the daemon does not hang up")?;
        // The channel goes first. The workers may still be ending; then the socket goes.
        while self.config().is_ok() {}
        Ok(())
    }

    /// Waits for the daemon to say that the configuration space changed. False when it does not.
    ///
    /// # Errors
    ///
    /// When it says something else.
    pub fn wait_config_change(&mut self, limit: Duration) -> Result<bool> {
        self.channel.set_read_timeout(Some(limit))?;
        let mut message = [0u8; 12];
        match self.channel.read_exact(&mut message) {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => return Ok(false),
            Err(e) => return Err(e.into()),
        }
        ensure!(
            message == [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            "the daemon sent {message:?}"
        );
        Ok(true)
    }

    /// Puts a request into memory, cut at page borders, and makes it available.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn submit(&mut self, queue: usize, request: &Request) -> Result<(u16, u64)> {
        let readable = self.memory.allocate(request.readable.len(), 8)?;
        self.memory.write(readable, &request.readable)?;
        let writable = self.memory.allocate(request.writable, 8)?;
        let mut pieces = cut(readable, request.readable.len(), false)?;
        pieces.extend(cut(writable, request.writable, true)?);
        let head = self.rings[queue].submit(&pieces)?;
        Ok((head, writable))
    }

    /// Sends a request and waits for the answer. Nothing else may be in flight on the queue.
    ///
    /// # Errors
    ///
    /// When there is no answer in time.
    pub fn call(&mut self, queue: usize, request: &Request) -> Result<Answer> {
        let mark = self.memory.mark();
        let (head, writable) = self.submit(queue, request)?;
        let answer = self.finish(queue, head, writable, request.writable)?;
        self.memory.release(mark);
        Ok(answer)
    }

    /// Sends pieces as they are; the response is expected at `writable`.
    ///
    /// # Errors
    ///
    /// When there is no answer in time.
    pub fn call_pieces(&mut self, queue: usize, pieces: &[Piece], writable: u64) -> Result<Answer> {
        let head = self.rings[queue].submit(pieces)?;
        self.finish(queue, head, writable, RESPONSE_SIZE)
    }

    /// Waits for the answer to the only request in flight.
    ///
    /// # Errors
    ///
    /// When there is no answer in time.
    pub fn finish(
        &mut self,
        queue: usize,
        head: u16,
        writable: u64,
        writable_len: usize,
    ) -> Result<Answer> {
        self.rings[queue].notify()?;
        let (done, used) = self.rings[queue].wait_used(PATIENCE)?;
        ensure!(done == head, "chain {done} completed instead of {head}");
        self.answer(used, writable, writable_len)
    }

    /// Reads the answer to a completed request.
    ///
    /// # Errors
    ///
    /// When memory fails.
    pub fn answer(&self, used: u32, writable: u64, writable_len: usize) -> Result<Answer> {
        let bytes = self
            .memory
            .read(writable, writable_len.max(RESPONSE_SIZE))?;
        let (response, rest) = bytes.split_at(RESPONSE_SIZE);
        let mut copy = Response::new_zeroed();
        copy.as_mut_bytes().copy_from_slice(response);
        Ok(Answer {
            used,
            response: copy,
            rest: rest.to_vec(),
        })
    }

    /// Makes a pool; it must work.
    ///
    /// # Errors
    ///
    /// When it does not.
    pub fn new_pool(&mut self, pool: u32, flags: u32) -> Result<u64> {
        let answer = self.call(1, &Request::new_pool(pool, flags, [0; 16]))?;
        let status = answer.response.status;
        ensure!(
            status == status::OK,
            "new_pool {pool} was answered {status}"
        );
        Ok(answer.response.pages.get())
    }

    /// Puts test pages of these numbers, under their numbers; the results.
    ///
    /// # Errors
    ///
    /// When the request as a whole is not done.
    pub fn put(&mut self, pool: u32, numbers: &[u32]) -> Result<Vec<u8>> {
        let pages: Vec<_> = numbers.iter().map(|&k| (k, page(u64::from(k)))).collect();
        let answer = self.call(1, &Request::put(pool, 0, &pages))?;
        let status = answer.response.status;
        ensure!(status == status::OK, "put was answered {status}");
        Ok(answer.results(numbers.len()).to_vec())
    }

    /// Gets test pages of these numbers and compares those that came; the results.
    ///
    /// # Errors
    ///
    /// When the request as a whole is not done, or a page is not what was put.
    pub fn get(&mut self, pool: u32, numbers: &[u32]) -> Result<Vec<u8>> {
        let answer = self.call(1, &Request::get(pool, 0, numbers))?;
        let status = answer.response.status;
        ensure!(status == status::OK, "get was answered {status}");
        for (k, &number) in numbers.iter().enumerate() {
            let is_same = answer.page(k) == page(u64::from(number));
            let result = answer.response.result[k];
            ensure!(
                is_same == (result == 0),
                "page {number} is wrong, result {result}"
            );
        }
        Ok(answer.results(numbers.len()).to_vec())
    }

    /// Gives the device `n` buffers for events.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn give_event_buffers(&mut self, n: usize) -> Result<Vec<(u16, u64)>> {
        let mut buffers = Vec::new();
        for _ in 0..n {
            let address = self.memory.allocate(EVENT_SIZE, 8)?;
            let piece = Piece {
                address,
                len: u32::try_from(EVENT_SIZE)?,
                writable: true,
            };
            let ring = self.ring(usize::from(EVENT_QUEUE));
            buffers.push((ring.submit(&[piece])?, address));
        }
        self.ring(usize::from(EVENT_QUEUE)).notify()?;
        Ok(buffers)
    }

    /// Waits for an event of `kind`, in one of `buffers`; events of other kinds are passed over.
    ///
    /// # Errors
    ///
    /// When there is none in time.
    pub fn wait_event(&mut self, kind: u16, buffers: &[(u16, u64)]) -> Result<Event> {
        let until = Instant::now() + PATIENCE;
        while let Some(left) = until.checked_duration_since(Instant::now()) {
            let (head, used) = self.ring(usize::from(EVENT_QUEUE)).wait_used(left)?;
            ensure!(
                used as usize == EVENT_SIZE,
                "an event of {used} bytes for chain {head}"
            );
            let buffer = buffers.iter().find(|(chain, _)| *chain == head);
            let (_, address) = buffer.context("an event in a buffer that was not given")?;
            let bytes = self.memory.read(*address, EVENT_SIZE)?;
            let event = Event::read_from_bytes(&bytes).ok().context("no event")?;
            if event.kind.get() == kind {
                return Ok(event);
            }
        }
        bail!("no event of kind {kind}")
    }
}

/// Cuts a buffer where pages end, as a driver with scattered pages would.
fn cut(address: u64, len: usize, writable: bool) -> Result<Vec<Piece>> {
    let mut pieces = Vec::new();
    let (mut at, end) = (address, address + len as u64);
    while at < end {
        let next = (at + 1).next_multiple_of(PAGE_SIZE as u64).min(end);
        pieces.push(Piece {
            address: at,
            len: u32::try_from(next - at)?,
            writable,
        });
        at = next;
    }
    Ok(pieces)
}
