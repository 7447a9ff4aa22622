// SPDX-License-Identifier: GPL-2.0

//! What is inside a request, and what a response means. Nothing here knows virtio.

use crate::{
    areas::{Flush, Object},
    dma::{bytes_of, Payload, BODY_SIZE},
    frontswap::{Batch, Token, BATCH_PAGES, BATCH_SEGMENTS},
    wire, //
};
use kernel::{
    page::PAGE_SIZE,
    prelude::*, //
};
use zerocopy::little_endian::U32;

/// The pool that holds this guest's swapped pages. A device serves one guest, so one is enough.
pub(crate) const POOL: u32 = 0;

/// The name of an object on the wire.
fn name_of(object: Object) -> [zerocopy::little_endian::U64; 3] {
    [
        u64::from(object.swap_type).into(),
        object.life.into(),
        0.into(),
    ]
}

/// A request, ready to be copied to where the device reads it.
pub(crate) struct Request {
    header: wire::Header,
    body: [u8; BODY_SIZE],
    body_len: usize,
    payload: Payload,
}

impl Request {
    fn new(op: u16, object: [zerocopy::little_endian::U64; 3], count: usize) -> Self {
        Self {
            header: wire::Header {
                op: op.into(),
                pool: POOL.into(),
                object,
                count: (count as u32).into(),
                ..Default::default()
            },
            body: [0; BODY_SIZE],
            body_len: 0,
            payload: Payload::None,
        }
    }

    fn with_body(mut self, bytes: &[u8]) -> Self {
        self.body_len = bytes.len().min(BODY_SIZE);
        for (to, from) in self.body.iter_mut().zip(bytes) {
            *to = *from;
        }
        self
    }

    fn transfer(op: u16, payload: Payload, object: Object, batch: &Batch<'_>) -> Self {
        let mut indexes = [U32::ZERO; BATCH_PAGES];
        let slots = batch
            .segments()
            .flat_map(|segment| segment.offset..segment.offset + segment.pages as u32);
        for (index, slot) in indexes.iter_mut().zip(slots) {
            *index = slot.into();
        }
        let pages = batch.pages().min(BATCH_PAGES);
        let mut request =
            Self::new(op, name_of(object), pages).with_body(bytes_of(&indexes[..pages]));
        request.payload = payload;
        request
    }

    /// put, of the batch's pages.
    pub(crate) fn put(object: Object, batch: &Batch<'_>) -> Self {
        Self::transfer(wire::op::PUT, Payload::Put, object, batch)
    }

    /// get, into the batch's pages.
    pub(crate) fn get(object: Object, batch: &Batch<'_>) -> Self {
        Self::transfer(wire::op::GET, Payload::Get, object, batch)
    }

    /// flush_page, of ranges of a swap device.
    pub(crate) fn flush_page(flush: &Flush) -> Self {
        let items = flush.ranges.items();
        Self::new(wire::op::FLUSH_PAGE, name_of(flush.object), items.len())
            .with_body(bytes_of(items))
    }

    /// flush_object, of a whole swap device.
    pub(crate) fn flush_object(object: Object) -> Self {
        Self::new(wire::op::FLUSH_OBJECT, name_of(object), 0)
    }

    /// new_pool, for swapped pages.
    pub(crate) fn new_pool() -> Self {
        let body = wire::NewPool {
            flags: wire::pool_flag::PERSISTENT.into(),
            page_shift: wire::PAGE_SHIFT,
            ..Default::default()
        };
        Self::new(wire::op::NEW_POOL, Default::default(), 0)
            .with_body(bytes_of(core::slice::from_ref(&body)))
    }

    /// report.
    pub(crate) fn report(report: &wire::Report) -> Self {
        Self::new(wire::op::REPORT, Default::default(), 0)
            .with_body(bytes_of(core::slice::from_ref(report)))
    }

    /// destroy_pool.
    pub(crate) fn destroy_pool() -> Self {
        Self::new(wire::op::DESTROY_POOL, Default::default(), 0)
    }

    /// The header.
    pub(crate) fn header(&self) -> &wire::Header {
        &self.header
    }

    /// The body.
    pub(crate) fn body(&self) -> &[u8] {
        self.body.get(..self.body_len).unwrap_or_default()
    }

    /// Bytes that the device writes at least when it answers OK.
    pub(crate) fn least_answer(&self) -> usize {
        match self.payload {
            Payload::Get => wire::RESPONSE_SIZE + self.header.count.get() as usize * PAGE_SIZE,
            _ => wire::RESPONSE_SIZE,
        }
    }

    /// What it carries besides.
    pub(crate) fn payload(&self) -> Payload {
        self.payload
    }
}

/// A batch under way: what is needed to say how it ended.
pub(crate) struct Transfer {
    token: Token,
    /// Slots and pages of each segment.
    segments: [(u32, u8); BATCH_SEGMENTS],
    nr: usize,
    swap_type: u32,
}

impl Transfer {
    /// Remembers a batch.
    pub(crate) fn new(batch: &Batch<'_>, token: Token) -> Self {
        let mut segments = [(0, 0); BATCH_SEGMENTS];
        let mut nr = 0;
        for (place, segment) in segments.iter_mut().zip(batch.segments()) {
            *place = (segment.offset, segment.pages as u8);
            nr += 1;
        }
        Self {
            token,
            segments,
            nr,
            swap_type: batch.swap_type(),
        }
    }

    /// The swap device.
    pub(crate) fn swap_type(&self) -> u32 {
        self.swap_type
    }

    /// First slot and number of pages of each segment.
    pub(crate) fn segments(&self) -> impl Iterator<Item = (usize, usize)> + '_ {
        self.segments
            .iter()
            .take(self.nr)
            .map(|(offset, pages)| (*offset as usize, usize::from(*pages)))
    }

    /// Nobody shall wait for it any longer. It goes on.
    pub(crate) fn give_up(&self) {
        self.token.give_up();
    }

    /// Has it handed over once more.
    pub(crate) fn again(self) {
        self.token.again();
    }

    /// Ends it. `each` is called with every page's result. Without a response, all of it failed.
    pub(crate) fn end(self, response: Option<&wire::Response>, mut each: impl FnMut(u8)) {
        let mut failed = 0usize;
        let mut page = 0;
        for (nr, (_, pages)) in self.segments().enumerate() {
            for _ in 0..pages {
                let result = response
                    .and_then(|response| response.result.get(page).copied())
                    .unwrap_or(wire::result::NOT_DONE);
                each(result);
                if result != wire::result::OK {
                    failed |= 1 << nr;
                }
                page += 1;
            }
        }
        self.token.done(failed);
    }
}

impl Purpose {
    /// Gives the token of a batch back that did not get under way.
    pub(crate) fn into_token(self) -> Option<Token> {
        match self {
            Self::Store(transfer) | Self::Load(transfer) => Some(transfer.token),
            Self::Flush(_) | Self::Object(_) | Self::Control(_) => None,
        }
    }
}

/// Why a request was made.
pub(crate) enum Purpose {
    /// To store pages.
    Store(Transfer),
    /// To load pages.
    Load(Transfer),
    /// To forget pages; nobody waits.
    Flush(KBox<Flush>),
    /// To forget all pages of a swap device that is gone; nobody waits.
    Object(Object),
    /// The driver's own question of that number, whose answer may be waited for.
    Control(u64),
}
