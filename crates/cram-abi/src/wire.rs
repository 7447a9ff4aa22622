// SPDX-License-Identifier: GPL-2.0 OR BSD-3-Clause

//! The wire format of the cram device, version 1, as docs/protocol.md draws it.
//!
//! This one file is compiled twice: into the crate `cram-abi` for the host,
//! and with `#[path]` into the guest's kernel module. So it needs nothing but
//! `core` and `zerocopy`, holds no `unsafe`, and decides nothing: it names the
//! numbers and lays out the bytes. All integers are little-endian; every
//! structure has alignment 1, so it may be read from any place in a buffer.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy_derive::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Virtio device id. 63 is the last id that virtio-pci can carry, and is not assigned: experimental.
pub const VIRTIO_ID_CRAM: u32 = 63;
/// The protocol version that [`Config::version`] announces.
pub const VERSION: u32 = 1;
/// Bytes of a page. Every page on the wire has exactly this size.
pub const PAGE_SIZE: usize = 4096;
/// log2 of [`PAGE_SIZE`].
pub const PAGE_SHIFT: u8 = 12;
/// Most pages in a put or get, and most ranges in a flush_page.
pub const MAX_BATCH: usize = 64;
/// Index of the event queue; request queues are 1 to [`Config::num_request_queues`].
pub const EVENT_QUEUE: u16 = 0;
/// Most request queues a device may have (vhost-user back-ends carry 64 queues in all).
pub const MAX_REQUEST_QUEUES: u16 = 63;
/// Most bytes of a request's device-readable part: header, indexes and pages.
pub const MAX_READABLE: usize = HEADER_SIZE + MAX_BATCH * 4 + MAX_BATCH * PAGE_SIZE;
/// Most bytes of a request's device-writable part: response and pages.
pub const MAX_WRITABLE: usize = RESPONSE_SIZE + MAX_BATCH * PAGE_SIZE;
/// Most descriptors of one request: the batch's pages cut in two each, header and response.
pub const MAX_DESCRIPTORS: usize = 2 * MAX_BATCH + 8;
/// The pressure at which a device takes nothing more.
pub const PRESSURE_MAX: u32 = 1000;

/// Feature bits (device-specific, below 24).
pub mod feature {
    /// The event queue carries events.
    pub const EVENTS: u64 = 1 << 0;
    /// Pools may be ephemeral.
    pub const EPHEMERAL: u64 = 1 << 1;
    /// Ephemeral pools may be shared under a uuid.
    pub const SHARED: u64 = 1 << 2;
    /// Pools may be told to refuse pages that do not compress.
    pub const REFUSE_INCOMPRESSIBLE: u64 = 1 << 3;
    /// [`super::Config::policy`] has a meaning: see [`super::policy`].
    pub const POLICY: u64 = 1 << 4;
    /// The host may ask the guest to shrink, and the driver reports how it goes.
    pub const SQUEEZE: u64 = 1 << 5;
    /// Every bit that version 1 gives a meaning to.
    pub const ALL: u64 = EVENTS | EPHEMERAL | SHARED | REFUSE_INCOMPRESSIBLE | POLICY | SQUEEZE;
}

/// Operations: [`Header::op`].
pub mod op {
    /// Ask for the limits; answered with [`super::Limits`] behind the response.
    pub const QUERY: u16 = 0;
    /// Make a pool; the body is [`super::NewPool`].
    pub const NEW_POOL: u16 = 1;
    /// Remove a pool and every page in it.
    pub const DESTROY_POOL: u16 = 2;
    /// Store pages; the body is `count` indexes, then `count` pages.
    pub const PUT: u16 = 3;
    /// Bring pages back; the body is `count` indexes.
    pub const GET: u16 = 4;
    /// Forget ranges of pages; the body is `count` times [`super::Range`].
    pub const FLUSH_PAGE: u16 = 5;
    /// Forget every page of an object.
    pub const FLUSH_OBJECT: u16 = 6;
    /// Say how a squeeze or a give-back goes; the body is [`super::Report`].
    pub const REPORT: u16 = 7;
}

/// Flags of a pool: [`NewPool::flags`].
pub mod pool_flag {
    /// Pages stay until they are flushed (swap); otherwise the pool is ephemeral.
    pub const PERSISTENT: u32 = 1 << 0;
    /// The pool is named by its uuid and shared with other clients that are authorised for it.
    pub const SHARED: u32 = 1 << 1;
    /// Refuse pages that do not compress, rather than keep them whole.
    pub const REFUSE_INCOMPRESSIBLE: u32 = 1 << 2;
    /// Every flag that version 1 gives a meaning to.
    pub const ALL: u32 = PERSISTENT | SHARED | REFUSE_INCOMPRESSIBLE;
}

/// Status of a whole request: [`Response::status`].
pub mod status {
    /// Executed; each page has its own result.
    pub const OK: u8 = 0;
    /// Malformed; nothing was done.
    pub const BAD_REQUEST: u8 = 1;
    /// Operation, flag or version unknown, or its feature was not negotiated; nothing was done.
    pub const UNSUPPORTED: u8 = 2;
    /// There is no pool of that id; nothing was done.
    pub const NO_POOL: u8 = 3;
    /// A pool of that id exists and is of another kind.
    pub const POOL_EXISTS: u8 = 4;
    /// The client may not have this pool (too many, or not authorised for the uuid).
    pub const DENIED: u8 = 5;
    /// The device failed by itself; nothing was done.
    pub const DEVICE_ERROR: u8 = 6;
}

/// Result of one page: [`Response::result`].
pub mod result {
    /// Done.
    pub const OK: u8 = 0;
    /// Get: no such page.
    pub const MISSING: u8 = 1;
    /// Put refused: the device is full.
    pub const NO_SPACE: u8 = 2;
    /// Put refused: the client is over its quota.
    pub const OVER_QUOTA: u8 = 3;
    /// Put refused: the client is frozen.
    pub const FROZEN: u8 = 4;
    /// Put refused: the page does not compress, and the pool wants no such pages.
    pub const INCOMPRESSIBLE: u8 = 5;
    /// Get: the page was stored, and its checksum does not match any more.
    pub const CORRUPT: u8 = 6;
    /// The page's buffer is not in the guest's memory, or the index is out of range.
    pub const BAD_PAGE: u8 = 7;
    /// Not executed (the request's status says why), or beyond its count.
    pub const NOT_DONE: u8 = 255;
}

/// Events: [`Event::kind`].
pub mod event {
    /// The pressure changed; `value` is the new pressure, 0 to 1000.
    pub const PRESSURE: u16 = 1;
    /// The host asks for memory; `value` is the number of pages to take back.
    pub const GIVE_BACK: u16 = 2;
    /// The client's quota changed; `wide` is the new quota in bytes.
    pub const QUOTA: u16 = 3;
    /// The host asks for memory of the guest; `value` is the number of pages to free.
    pub const SQUEEZE: u16 = 4;
    /// Kinds that version 1 gives a meaning to, numbered from 1 on.
    pub const KINDS: usize = 4;
}

/// Bits of [`Config::state`].
pub mod state {
    /// A back-end stands behind the device. Cleared by whoever carries the device when it is gone.
    pub const READY: u32 = 1 << 0;
}

/// Bits of [`Config::policy`]: what the host's operator wants of the guest.
pub mod policy {
    /// A page that was loaded back may stay in the device as well, until it is written to.
    pub const KEEP_COPIES: u32 = 1 << 0;
    /// The driver squeezes the guest gently by itself, while no task waits for memory.
    pub const AUTO_SQUEEZE: u32 = 1 << 1;
}

/// How a squeeze or a give-back goes: [`Report::state`].
pub mod progress {
    /// It goes on.
    pub const WORKING: u16 = 1;
    /// It waits, because tasks of the guest wait for memory.
    pub const THROTTLED: u16 = 2;
    /// As much was done as was asked for.
    pub const DONE: u16 = 3;
    /// No more could be done.
    pub const STOPPED: u16 = 4;
}

/// Bytes of [`Header`].
pub const HEADER_SIZE: usize = 40;
/// Bytes of [`NewPool`].
pub const NEW_POOL_SIZE: usize = 24;
/// Bytes of [`Range`].
pub const RANGE_SIZE: usize = 8;
/// Bytes of [`Report`].
pub const REPORT_SIZE: usize = 24;
/// Bytes of [`Response`].
pub const RESPONSE_SIZE: usize = 80;
/// Bytes of [`Limits`].
pub const LIMITS_SIZE: usize = 64;
/// Bytes of [`Event`].
pub const EVENT_SIZE: usize = 16;
/// Bytes of [`Config`].
pub const CONFIG_SIZE: usize = 64;

/// What every request begins with (device-readable).
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Header {
    /// One of [`op`].
    pub op: U16,
    /// Zero in version 1.
    pub flags: U16,
    /// Pool id, chosen by the driver, below [`Config::max_pools`].
    pub pool: U32,
    /// 192-bit object id.
    pub object: [U64; 3],
    /// Entries in the body: 1 to [`MAX_BATCH`] for put, get and flush_page, otherwise 0.
    pub count: U32,
    /// Zero.
    pub reserved: U32,
}

/// Body of new_pool.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NewPool {
    /// Any of [`pool_flag`].
    pub flags: U32,
    /// [`PAGE_SHIFT`]; any other size is unsupported.
    pub page_shift: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// Name of a shared pool; zero for a private one.
    pub uuid: [u8; 16],
}

/// One range of a flush_page: `count` pages from `first` on.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Range {
    /// First index.
    pub first: U32,
    /// Number of indexes, at least 1; `first + count` is at most 2^32.
    pub count: U32,
}

/// Body of report.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Report {
    /// [`event::SQUEEZE`] or [`event::GIVE_BACK`].
    pub kind: U16,
    /// One of [`progress`].
    pub state: U16,
    /// Pages that the event asked for.
    pub asked: U32,
    /// Pages freed, or taken back, so far.
    pub done: U32,
    /// Pages of memory that are free in the guest.
    pub free: U32,
    /// Pages of memory that the guest has.
    pub total: U32,
    /// Zero.
    pub reserved: U32,
}

/// What the device-writable part of every request begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Response {
    /// One of [`status`].
    pub status: u8,
    /// Zero.
    pub reserved: [u8; 3],
    /// The request's count, when the status is OK; otherwise 0.
    pub count: U32,
    /// Pages removed (flush, destroy_pool) or found there (new_pool); otherwise 0.
    pub pages: U64,
    /// One of [`result`] for each page of a put or get; NOT_DONE beyond.
    pub result: [u8; MAX_BATCH],
}

/// Answer to a query, behind the response.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Limits {
    /// Bytes that the client may hold, metadata included.
    pub quota_bytes: U64,
    /// Bytes that the client holds.
    pub held_bytes: U64,
    /// Pages of the client that are stored.
    pub stored_pages: U64,
    /// Bytes that the whole store may hold.
    pub capacity_bytes: U64,
    /// Current pressure on the client, 0 to 1000.
    pub pressure: U32,
    /// Pools that the client may have.
    pub max_pools: U32,
    /// See [`Config::generation`].
    pub generation: U64,
    /// Zero.
    pub reserved: [U64; 2],
}

/// What the device writes into a buffer of the event queue.
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Event {
    /// One of [`event`].
    pub kind: U16,
    /// Zero.
    pub reserved: U16,
    /// See [`event`].
    pub value: U32,
    /// See [`event`].
    pub wide: U64,
}

/// The device configuration space.
#[derive(
    Clone,
    Copy,
    Debug,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct Config {
    /// [`VERSION`].
    pub version: U32,
    /// Request queues that the device has; a driver may use fewer.
    pub num_request_queues: U16,
    /// [`MAX_BATCH`].
    pub max_batch: U16,
    /// [`PAGE_SHIFT`].
    pub page_shift: u8,
    /// Zero.
    pub reserved0: [u8; 3],
    /// Pools that the client may have; ids are below this.
    pub max_pools: U32,
    /// Bytes that the client may hold, metadata included.
    pub quota_bytes: U64,
    /// Current pressure on the client, 0 to 1000.
    pub pressure: U32,
    /// Any of [`state`].
    pub state: U32,
    /// Names one life of the client's pages: another number means that every page and pool is gone.
    pub generation: U64,
    /// Any of [`policy`].
    pub policy: U32,
    /// Zero.
    pub reserved1: U32,
    /// Zero.
    pub reserved2: [U64; 2],
}

impl Default for Response {
    /// A response that says nothing was done.
    fn default() -> Self {
        Response {
            status: status::DEVICE_ERROR,
            reserved: [0; 3],
            count: U32::ZERO,
            pages: U64::ZERO,
            result: [result::NOT_DONE; MAX_BATCH],
        }
    }
}

const _: () = {
    use core::mem::{offset_of, size_of};

    assert!(size_of::<Header>() == HEADER_SIZE);
    assert!(offset_of!(Header, op) == 0);
    assert!(offset_of!(Header, flags) == 2);
    assert!(offset_of!(Header, pool) == 4);
    assert!(offset_of!(Header, object) == 8);
    assert!(offset_of!(Header, count) == 32);
    assert!(offset_of!(Header, reserved) == 36);

    assert!(size_of::<NewPool>() == NEW_POOL_SIZE);
    assert!(offset_of!(NewPool, flags) == 0);
    assert!(offset_of!(NewPool, page_shift) == 4);
    assert!(offset_of!(NewPool, uuid) == 8);

    assert!(size_of::<Range>() == RANGE_SIZE);
    assert!(offset_of!(Range, first) == 0);
    assert!(offset_of!(Range, count) == 4);

    assert!(size_of::<Report>() == REPORT_SIZE);
    assert!(offset_of!(Report, kind) == 0);
    assert!(offset_of!(Report, state) == 2);
    assert!(offset_of!(Report, asked) == 4);
    assert!(offset_of!(Report, done) == 8);
    assert!(offset_of!(Report, free) == 12);
    assert!(offset_of!(Report, total) == 16);
    assert!(offset_of!(Report, reserved) == 20);

    assert!(size_of::<Response>() == RESPONSE_SIZE);
    assert!(offset_of!(Response, status) == 0);
    assert!(offset_of!(Response, count) == 4);
    assert!(offset_of!(Response, pages) == 8);
    assert!(offset_of!(Response, result) == 16);

    assert!(size_of::<Limits>() == LIMITS_SIZE);
    assert!(offset_of!(Limits, quota_bytes) == 0);
    assert!(offset_of!(Limits, held_bytes) == 8);
    assert!(offset_of!(Limits, stored_pages) == 16);
    assert!(offset_of!(Limits, capacity_bytes) == 24);
    assert!(offset_of!(Limits, pressure) == 32);
    assert!(offset_of!(Limits, max_pools) == 36);
    assert!(offset_of!(Limits, generation) == 40);

    assert!(size_of::<Event>() == EVENT_SIZE);
    assert!(offset_of!(Event, kind) == 0);
    assert!(offset_of!(Event, value) == 4);
    assert!(offset_of!(Event, wide) == 8);

    assert!(size_of::<Config>() == CONFIG_SIZE);
    assert!(offset_of!(Config, version) == 0);
    assert!(offset_of!(Config, num_request_queues) == 4);
    assert!(offset_of!(Config, max_batch) == 6);
    assert!(offset_of!(Config, page_shift) == 8);
    assert!(offset_of!(Config, max_pools) == 12);
    assert!(offset_of!(Config, quota_bytes) == 16);
    assert!(offset_of!(Config, pressure) == 24);
    assert!(offset_of!(Config, state) == 28);
    assert!(offset_of!(Config, generation) == 32);
    assert!(offset_of!(Config, policy) == 40);
};
