// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The request parser: the one place where a guest's bytes become checked values.
//!
//! Invariants that the rest of the daemon builds on:
//! - Every byte of a descriptor, header or body is read from the guest's memory exactly once,
//!   into memory of our own, before anything looks at it. What was checked is what is used.
//! - At most [`MAX_DESCRIPTORS`] descriptors are followed, whatever they say.
//! - Nothing here allocates, panics, or returns an `Err` for something that a guest did: a
//!   request is understood, answered with a status, or cannot even be answered.
//!
//! The order of the checks is the order of docs/protocol.md, section 6.1.1.

use std::ops::Range;

use cram_abi::wire::{
    self, HEADER_SIZE, Header, LIMITS_SIZE, Limits, MAX_BATCH, MAX_DESCRIPTORS, MAX_READABLE,
    MAX_WRITABLE, NEW_POOL_SIZE, NewPool, PAGE_SIZE, RANGE_SIZE, REPORT_SIZE, RESPONSE_SIZE,
    Report, Response, feature, op, pool_flag, status,
};
use cram_store::{ObjectId, Page, PoolId, PoolKind, PoolSpec};
use virtio_bindings::bindings::virtio_ring::{
    VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};
use zerocopy::{FromBytes, IntoBytes};

use crate::vhost::memory::Memory;

const DESCRIPTOR_SIZE: u32 = 16;
const NEXT: u32 = VRING_DESC_F_NEXT;
const WRITE: u32 = VRING_DESC_F_WRITE;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;

/// What a request may use, as negotiated with this guest.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// Device features that the driver accepted ([`feature`]).
    pub features: u64,
    /// Indirect descriptors were accepted.
    pub indirect: bool,
}

/// Where a ring's descriptors lie.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Address of the first descriptor.
    pub address: u64,
    /// Number of descriptors.
    pub len: u32,
}

/// A request that has passed every check that can be made without the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Tell the limits.
    Query,
    /// Make a pool.
    NewPool(PoolId, PoolSpec),
    /// Remove a pool.
    DestroyPool(PoolId),
    /// Store this many pages.
    Put(PoolId, ObjectId, usize),
    /// Bring back this many pages.
    Get(PoolId, ObjectId, usize),
    /// Forget this many ranges.
    FlushPage(PoolId, ObjectId, usize),
    /// Forget an object.
    FlushObject(PoolId, ObjectId),
    /// Hear how a squeeze or a give-back goes.
    Report(Report),
}

/// What the parser made of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed {
    /// There is nowhere to put an answer: complete the chain with length 0.
    Unanswerable,
    /// Answer with this status; nothing is done.
    Rejected(u8),
    /// Execute it.
    Accepted(Request),
}

/// The chain cannot be followed to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Broken;

#[derive(Clone, Copy, Debug, Default)]
struct Segment {
    address: u64,
    len: u32,
    /// Bytes of the part that lie before this segment.
    before: u64,
}

/// One direction of a chain: bytes that lie in a bounded number of places.
#[derive(Debug)]
struct Part {
    segments: [Segment; MAX_DESCRIPTORS],
    used: usize,
    bytes: u64,
    /// Where the last access ended; pages are visited in order, so the next one is near.
    cursor: usize,
}

impl Part {
    const fn new() -> Self {
        Part {
            segments: [Segment {
                address: 0,
                len: 0,
                before: 0,
            }; MAX_DESCRIPTORS],
            used: 0,
            bytes: 0,
            cursor: 0,
        }
    }

    fn clear(&mut self) {
        self.used = 0;
        self.bytes = 0;
        self.cursor = 0;
    }

    fn push(&mut self, address: u64, len: u32) -> Result<(), Broken> {
        let slot = self.segments.get_mut(self.used).ok_or(Broken)?;
        *slot = Segment {
            address,
            len,
            before: self.bytes,
        };
        self.used += 1;
        // 136 descriptors of less than 2^32 bytes each cannot overflow a u64.
        self.bytes += u64::from(len);
        Ok(())
    }

    /// Visits the places that hold bytes `offset..offset + len`, in order: the address in the
    /// guest's memory, and which of the `len` bytes lie there. False as soon as `visit` says
    /// false, or when the part has fewer bytes.
    fn visit(
        &mut self,
        offset: u64,
        len: usize,
        mut visit: impl FnMut(GuestAddress, Range<usize>) -> bool,
    ) -> bool {
        let segments = self.segments.get(..self.used).unwrap_or_default();
        if segments.get(self.cursor).is_none_or(|s| s.before > offset) {
            self.cursor = 0;
        }
        let mut done = 0usize;
        while done < len {
            let Some(segment) = segments.get(self.cursor) else {
                return false;
            };
            // `cursor` never passes `offset + done`, so this does not underflow.
            let skip = offset + done as u64 - segment.before;
            let left = u64::from(segment.len).saturating_sub(skip);
            if left == 0 {
                self.cursor += 1;
                continue;
            }
            let Some(address) = segment.address.checked_add(skip) else {
                return false;
            };
            let take = usize::try_from(left).unwrap_or(usize::MAX).min(len - done);
            if !visit(GuestAddress(address), done..done + take) {
                return false;
            }
            done += take;
        }
        true
    }

    fn read(&mut self, memory: &Memory, offset: u64, into: &mut [u8]) -> bool {
        let len = into.len();
        self.visit(offset, len, |address, range| {
            into.get_mut(range)
                .is_some_and(|piece| memory.read_slice(piece, address).is_ok())
        }) && memory.is_intact()
    }

    fn write(&mut self, memory: &Memory, offset: u64, from: &[u8]) -> bool {
        self.visit(offset, from.len(), |address, range| {
            from.get(range)
                .is_some_and(|piece| memory.write_slice(piece, address).is_ok())
        }) && memory.is_intact()
    }

    fn is_writable(&mut self, memory: &Memory, offset: u64, len: usize) -> bool {
        self.visit(offset, len, |address, range| {
            memory.check_range(address, range.len(), Permissions::Write)
        })
    }
}

/// A chain taken from a ring, and what was copied from it. Reused from request to request.
#[derive(Debug)]
pub struct Chain {
    readable: Part,
    writable: Part,
    misordered: bool,
    count: usize,
    indexes: [u32; MAX_BATCH],
    ranges: [(u32, u64); MAX_BATCH],
}

impl Default for Chain {
    fn default() -> Self {
        Chain::new()
    }
}

impl Chain {
    /// A chain with nothing in it.
    pub const fn new() -> Self {
        Chain {
            readable: Part::new(),
            writable: Part::new(),
            misordered: false,
            count: 0,
            indexes: [0; MAX_BATCH],
            ranges: [(0, 0); MAX_BATCH],
        }
    }

    /// Follows the chain that begins at `head`, and checks the request in it.
    pub fn parse(&mut self, memory: &Memory, table: Table, head: u16, terms: &Terms) -> Parsed {
        if self.collect(memory, table, head, terms.indirect).is_err()
            || !memory.is_intact()
            || !self.writable.is_writable(memory, 0, RESPONSE_SIZE)
        {
            return Parsed::Unanswerable;
        }
        match self.check(memory, terms) {
            Ok(request) => Parsed::Accepted(request),
            Err(status) => Parsed::Rejected(status),
        }
    }

    /// Follows a chain of the event queue. True when one event can be written to it.
    pub fn parse_event_buffer(
        &mut self,
        memory: &Memory,
        table: Table,
        head: u16,
        indirect: bool,
    ) -> bool {
        self.collect(memory, table, head, indirect).is_ok()
            && memory.is_intact()
            && self.readable.bytes == 0
            && self.writable.is_writable(memory, 0, wire::EVENT_SIZE)
    }

    /// Writes an event into a chain that [`Chain::parse_event_buffer`] accepted.
    pub fn write_event(&mut self, memory: &Memory, event: &wire::Event) -> bool {
        self.writable.write(memory, 0, event.as_bytes())
    }

    fn collect(
        &mut self,
        memory: &Memory,
        table: Table,
        head: u16,
        indirect_allowed: bool,
    ) -> Result<(), Broken> {
        self.readable.clear();
        self.writable.clear();
        self.misordered = false;
        self.count = 0;

        let mut table = table;
        let mut index = u32::from(head);
        let mut indirect = false;
        let mut followed = 0;
        loop {
            if index >= table.len {
                return Err(Broken);
            }
            let address = u64::from(index * DESCRIPTOR_SIZE);
            let address = table.address.checked_add(address).ok_or(Broken)?;
            let descriptor: Descriptor =
                memory.read_obj(GuestAddress(address)).map_err(|_| Broken)?;
            let flags = u32::from(descriptor.flags());

            if flags & INDIRECT != 0 {
                let len = descriptor.len();
                if indirect || !indirect_allowed || flags & NEXT != 0 || len == 0 {
                    return Err(Broken);
                }
                if !len.is_multiple_of(DESCRIPTOR_SIZE) {
                    return Err(Broken);
                }
                // `next` has 16 bits: what lies beyond in a longer table cannot be reached.
                let entries = (len / DESCRIPTOR_SIZE).min(1 << 16);
                table = Table {
                    address: descriptor.addr().raw_value(),
                    len: entries,
                };
                index = 0;
                indirect = true;
                continue;
            }

            // The bound also ends loops.
            followed += 1;
            if followed > MAX_DESCRIPTORS {
                return Err(Broken);
            }
            if flags & WRITE != 0 {
                self.writable
                    .push(descriptor.addr().raw_value(), descriptor.len())?;
            } else {
                self.misordered |= self.writable.used > 0;
                self.readable
                    .push(descriptor.addr().raw_value(), descriptor.len())?;
            }
            if flags & NEXT == 0 {
                return Ok(());
            }
            index = u32::from(descriptor.next());
        }
    }

    fn check(&mut self, memory: &Memory, terms: &Terms) -> Result<Request, u8> {
        let readable = self.readable.bytes;
        let writable = self.writable.bytes;
        if self.misordered || readable > MAX_READABLE as u64 || writable > MAX_WRITABLE as u64 {
            return Err(status::BAD_REQUEST);
        }
        let mut bytes = [0u8; HEADER_SIZE];
        if !self.readable.read(memory, 0, &mut bytes) {
            return Err(status::BAD_REQUEST);
        }
        let header = Header::read_from_bytes(&bytes).map_err(|_| status::BAD_REQUEST)?;
        let code = header.op.get();
        if code > op::REPORT || header.flags.get() != 0 {
            return Err(status::UNSUPPORTED);
        }
        if code == op::REPORT && terms.features & feature::SQUEEZE == 0 {
            return Err(status::UNSUPPORTED);
        }
        if header.reserved.get() != 0 {
            return Err(status::BAD_REQUEST);
        }

        let count = usize::try_from(header.count.get()).map_err(|_| status::BAD_REQUEST)?;
        let batched = matches!(code, op::PUT | op::GET | op::FLUSH_PAGE);
        let counts = if batched { 1..=MAX_BATCH } else { 0..=0 };
        if !counts.contains(&count) {
            return Err(status::BAD_REQUEST);
        }
        let (body, answer) = match code {
            op::QUERY => (0, LIMITS_SIZE),
            op::NEW_POOL => (NEW_POOL_SIZE, 0),
            op::PUT => (count * (4 + PAGE_SIZE), 0),
            op::GET => (count * 4, count * PAGE_SIZE),
            op::FLUSH_PAGE => (count * RANGE_SIZE, 0),
            op::REPORT => (REPORT_SIZE, 0),
            _ => (0, 0),
        };
        if readable != (HEADER_SIZE + body) as u64 || writable < (RESPONSE_SIZE + answer) as u64 {
            return Err(status::BAD_REQUEST);
        }

        self.count = count;
        let pool = PoolId(header.pool.get());
        let object = ObjectId(header.object.map(|word| word.get()));
        match code {
            op::QUERY => {
                if !self
                    .writable
                    .is_writable(memory, RESPONSE_SIZE as u64, LIMITS_SIZE)
                {
                    return Err(status::BAD_REQUEST);
                }
                Ok(Request::Query)
            }
            op::NEW_POOL => self.check_new_pool(memory, pool, terms),
            op::DESTROY_POOL => Ok(Request::DestroyPool(pool)),
            op::PUT => {
                self.copy_indexes(memory)?;
                Ok(Request::Put(pool, object, count))
            }
            op::GET => {
                self.copy_indexes(memory)?;
                Ok(Request::Get(pool, object, count))
            }
            op::FLUSH_PAGE => {
                self.copy_ranges(memory)?;
                Ok(Request::FlushPage(pool, object, count))
            }
            op::REPORT => self.copy_report(memory).map(Request::Report),
            _ => Ok(Request::FlushObject(pool, object)),
        }
    }

    fn check_new_pool(
        &mut self,
        memory: &Memory,
        pool: PoolId,
        terms: &Terms,
    ) -> Result<Request, u8> {
        let mut bytes = [0u8; NEW_POOL_SIZE];
        if !self.readable.read(memory, HEADER_SIZE as u64, &mut bytes) {
            return Err(status::BAD_REQUEST);
        }
        let body = NewPool::read_from_bytes(&bytes).map_err(|_| status::BAD_REQUEST)?;
        let flags = body.flags.get();
        if flags & !pool_flag::ALL != 0 || body.page_shift != wire::PAGE_SHIFT {
            return Err(status::UNSUPPORTED);
        }
        if body.reserved != [0; 3] {
            return Err(status::BAD_REQUEST);
        }

        let persistent = flags & pool_flag::PERSISTENT != 0;
        let shared = flags & pool_flag::SHARED != 0;
        let refuse_incompressible = flags & pool_flag::REFUSE_INCOMPRESSIBLE != 0;
        let needed = [
            (!persistent, feature::EPHEMERAL),
            (shared, feature::SHARED),
            (refuse_incompressible, feature::REFUSE_INCOMPRESSIBLE),
        ];
        if needed
            .iter()
            .any(|&(used, bit)| used && terms.features & bit == 0)
        {
            return Err(status::UNSUPPORTED);
        }
        if shared == (body.uuid == [0; 16]) {
            return Err(status::BAD_REQUEST);
        }
        let kind = match (persistent, shared) {
            (true, true) => return Err(status::DENIED),
            (true, false) => PoolKind::Persistent,
            (false, false) => PoolKind::PrivateEphemeral,
            (false, true) => PoolKind::SharedEphemeral { uuid: body.uuid },
        };
        Ok(Request::NewPool(
            pool,
            PoolSpec {
                kind,
                refuse_incompressible,
            },
        ))
    }

    fn copy_indexes(&mut self, memory: &Memory) -> Result<(), u8> {
        let mut bytes = [0u8; MAX_BATCH * 4];
        let bytes = bytes.get_mut(..self.count * 4).ok_or(status::BAD_REQUEST)?;
        if !self.readable.read(memory, HEADER_SIZE as u64, bytes) {
            return Err(status::BAD_REQUEST);
        }
        for (index, raw) in self.indexes.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *index = u32::from_le_bytes(*raw);
        }
        Ok(())
    }

    fn copy_report(&mut self, memory: &Memory) -> Result<Report, u8> {
        let mut bytes = [0u8; REPORT_SIZE];
        if !self.readable.read(memory, HEADER_SIZE as u64, &mut bytes) {
            return Err(status::BAD_REQUEST);
        }
        let report = Report::read_from_bytes(&bytes).map_err(|_| status::BAD_REQUEST)?;
        if report.reserved.get() != 0 {
            return Err(status::BAD_REQUEST);
        }
        Ok(report)
    }

    fn copy_ranges(&mut self, memory: &Memory) -> Result<(), u8> {
        let mut bytes = [0u8; MAX_BATCH * RANGE_SIZE];
        let bytes = bytes
            .get_mut(..self.count * RANGE_SIZE)
            .ok_or(status::BAD_REQUEST)?;
        if !self.readable.read(memory, HEADER_SIZE as u64, bytes) {
            return Err(status::BAD_REQUEST);
        }
        for (range, raw) in self
            .ranges
            .iter_mut()
            .zip(bytes.as_chunks::<RANGE_SIZE>().0)
        {
            let raw = wire::Range::read_from_bytes(raw).map_err(|_| status::BAD_REQUEST)?;
            let (first, count) = (raw.first.get(), u64::from(raw.count.get()));
            if count == 0 || u64::from(first) + count > 1 << 32 {
                return Err(status::BAD_REQUEST);
            }
            *range = (first, count);
        }
        Ok(())
    }

    /// The indexes of an accepted put or get, in the guest's order.
    pub fn indexes(&self) -> &[u32] {
        self.indexes.get(..self.count).unwrap_or_default()
    }

    /// The ranges of an accepted flush_page: first index and number of pages.
    pub fn ranges(&self) -> &[(u32, u64)] {
        self.ranges.get(..self.count).unwrap_or_default()
    }

    /// Copies page `k` of an accepted put into memory of our own; this is the only time that
    /// it is read. False when its buffer is not all in the guest's memory.
    pub fn read_page(&mut self, memory: &Memory, k: usize, page: &mut Page) -> bool {
        let offset = HEADER_SIZE + self.count * 4 + k * PAGE_SIZE;
        self.readable.read(memory, offset as u64, page)
    }

    /// Whether the buffer of page `k` of an accepted get is in the guest's memory.
    pub fn is_page_writable(&mut self, memory: &Memory, k: usize) -> bool {
        let offset = RESPONSE_SIZE + k * PAGE_SIZE;
        self.writable.is_writable(memory, offset as u64, PAGE_SIZE)
    }

    /// Delivers page `k` of an accepted get.
    pub fn write_page(&mut self, memory: &Memory, k: usize, page: &Page) -> bool {
        let offset = RESPONSE_SIZE + k * PAGE_SIZE;
        self.writable.write(memory, offset as u64, page)
    }

    /// Writes the answer to a query, behind the response.
    pub fn write_limits(&mut self, memory: &Memory, limits: &Limits) -> bool {
        self.writable
            .write(memory, RESPONSE_SIZE as u64, limits.as_bytes())
    }

    /// Writes the response.
    pub fn write_response(&mut self, memory: &Memory, response: &Response) -> bool {
        self.writable.write(memory, 0, response.as_bytes())
    }
}
