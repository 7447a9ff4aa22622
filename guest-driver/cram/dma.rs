// SPDX-License-Identifier: GPL-2.0

//! Memory that the device reads and writes, and the lists that describe it.

use crate::{
    frontswap::{Segment, BATCH_SEGMENTS},
    wire, //
};
use core::{
    mem::{offset_of, size_of},
    ptr::NonNull, //
};
use kernel::{
    bindings,
    page::PAGE_SIZE,
    prelude::*, //
};
use zerocopy::IntoBytes;

/// Bytes of the longest body: a flush_page with all its ranges.
pub(crate) const BODY_SIZE: usize = wire::MAX_BATCH * wire::RANGE_SIZE;

#[repr(C)]
struct Shared {
    header: wire::Header,
    body: [u8; BODY_SIZE],
    response: wire::Response,
}

/// A request's fixed part, in memory that the device may use while the request is under way.
///
/// It is only ever accessed by copying, so that nothing the device does to it meanwhile can
/// matter.
pub(crate) struct SharedRequest(NonNull<Shared>);

// SAFETY: It owns its memory.
unsafe impl Send for SharedRequest {}

impl SharedRequest {
    /// Allocates one.
    pub(crate) fn new() -> Result<Self> {
        let shared = KBox::new(
            Shared {
                header: wire::Header::default(),
                body: [0; BODY_SIZE],
                response: wire::Response::default(),
            },
            GFP_KERNEL,
        )?;
        // SAFETY: A box is never null.
        Ok(Self(unsafe {
            NonNull::new_unchecked(KBox::into_raw(shared))
        }))
    }

    /// Writes the request, and a response that says nothing was done.
    pub(crate) fn fill(&mut self, header: &wire::Header, body: &[u8]) {
        let shared = self.0.as_ptr();
        let len = body.len().min(BODY_SIZE);
        // SAFETY: `shared` is valid, and the device does not have it yet.
        unsafe { (&raw mut (*shared).header).write(*header) };
        // SAFETY: As above; `len` is at most the body's size.
        unsafe {
            (&raw mut (*shared).body)
                .cast::<u8>()
                .copy_from_nonoverlapping(body.as_ptr(), len)
        };
        // SAFETY: As above.
        unsafe { (&raw mut (*shared).response).write(wire::Response::default()) };
    }

    /// Copies the response out.
    pub(crate) fn response(&self) -> wire::Response {
        // SAFETY: The memory is valid, and any bytes are a response.
        unsafe { (&raw const (*self.0.as_ptr()).response).read_volatile() }
    }

    fn field(&self, offset: usize) -> *mut c_void {
        // SAFETY: All callers pass the offset of a field.
        unsafe { self.0.as_ptr().byte_add(offset) }.cast()
    }
}

impl Drop for SharedRequest {
    fn drop(&mut self) {
        // SAFETY: The memory came from a box, and the device does not have it any more: queues
        // drop their slots after the device was reset.
        drop(unsafe { KBox::from_raw(self.0.as_ptr()) });
    }
}

/// What a request carries besides its fixed part.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Payload {
    /// Nothing.
    None,
    /// Pages that the device reads.
    Put,
    /// Pages that the device writes.
    Get,
}

const LIST: usize = BATCH_SEGMENTS + 1;

/// The scatterlists of one request. One set per queue is enough: it is used under the queue's
/// lock, and the ring has a copy of it afterwards.
pub(crate) struct Lists(KBox<[[bindings::scatterlist; LIST]; 2]>);

// SAFETY: Scatterlists are plain memory.
unsafe impl Send for Lists {}

impl Lists {
    /// Allocates them.
    pub(crate) fn new() -> Result<Self> {
        // SAFETY: All zeroes is a scatterlist without entries.
        let zero = || unsafe { core::mem::zeroed::<bindings::scatterlist>() };
        let lists = KBox::new([[zero(); LIST], [zero(); LIST]], GFP_KERNEL)?;
        Ok(Self(lists))
    }

    /// Describes a request with `nr` segments. Returns the readable and the writable list.
    pub(crate) fn describe(
        &mut self,
        request: &SharedRequest,
        body: usize,
        payload: Payload,
        nr: usize,
        segments: impl Iterator<Item = Segment>,
    ) -> (*mut bindings::scatterlist, *mut bindings::scatterlist) {
        let [readable, writable] = &mut *self.0;
        let nr = nr.min(BATCH_SEGMENTS);
        let fixed = offset_of!(Shared, body) + body.min(BODY_SIZE);
        let (out, input) = match payload {
            Payload::Put => (1 + nr, 1),
            Payload::Get => (1, 1 + nr),
            _ => (1, 1),
        };
        start(readable, out, request.field(0), fixed);
        start(
            writable,
            input,
            request.field(offset_of!(Shared, response)),
            size_of::<wire::Response>(),
        );

        let list = match payload {
            Payload::Get => &mut *writable,
            _ => &mut *readable,
        };
        for (entry, segment) in list.iter_mut().skip(1).zip(segments.take(nr)) {
            let len = (segment.pages * PAGE_SIZE) as u32;
            // SAFETY: `entry` was initialised above; the pages are the batch's, and stay with it.
            unsafe { bindings::sg_set_page(entry, segment.page, len, 0) };
        }

        (readable.as_mut_ptr(), writable.as_mut_ptr())
    }
}

/// Makes `list` one of `nr` entries, the first of them memory of ours.
fn start(list: &mut [bindings::scatterlist; LIST], nr: usize, memory: *mut c_void, len: usize) {
    // SAFETY: `nr` is at most the list's length: both callers pass 1 + a number of segments that
    // is bounded by BATCH_SEGMENTS.
    unsafe { bindings::sg_init_table(list.as_mut_ptr(), nr as u32) };
    // SAFETY: The first entry was just initialised, and `memory` is kmalloc'ed, of `len` bytes.
    unsafe { bindings::sg_set_buf(&mut list[0], memory, len as u32) };
}

/// Bytes of a body made of wire structures.
pub(crate) fn bytes_of<T: IntoBytes + zerocopy::Immutable>(items: &[T]) -> &[u8] {
    items.as_bytes()
}
