// SPDX-License-Identifier: GPL-2.0

//! What is inside a request, and what a response means. Nothing here knows virtio.

use crate::{
    areas::Ranges,
    dma::{bytes_of, Payload, BODY_SIZE},
    frontswap::{Batch, Token, BATCH_PAGES, BATCH_SEGMENTS},
    wire, //
};
use kernel::{
    new_spinlock_irq,
    prelude::*,
    sync::{Arc, Completion, SpinLockIrq}, //
};
use zerocopy::little_endian::U32;

/// The pool that holds this guest's swapped pages. A device serves one guest, so one is enough.
pub(crate) const POOL: u32 = 0;

/// The object that holds the pages of a swap device.
pub(crate) fn object_of(swap_type: u32) -> [zerocopy::little_endian::U64; 3] {
    [u64::from(swap_type).into(), 0.into(), 0.into()]
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

    fn transfer(op: u16, payload: Payload, batch: &Batch<'_>) -> Self {
        let mut indexes = [U32::ZERO; BATCH_PAGES];
        let slots = batch
            .segments()
            .flat_map(|segment| segment.offset..segment.offset + segment.pages as u32);
        for (index, slot) in indexes.iter_mut().zip(slots) {
            *index = slot.into();
        }
        let pages = batch.pages().min(BATCH_PAGES);
        let mut request = Self::new(op, object_of(batch.swap_type()), pages)
            .with_body(bytes_of(&indexes[..pages]));
        request.payload = payload;
        request
    }

    /// put, of the batch's pages.
    pub(crate) fn put(batch: &Batch<'_>) -> Self {
        Self::transfer(wire::op::PUT, Payload::Put, batch)
    }

    /// get, into the batch's pages.
    pub(crate) fn get(batch: &Batch<'_>) -> Self {
        Self::transfer(wire::op::GET, Payload::Get, batch)
    }

    /// flush_page, of ranges of a swap device.
    pub(crate) fn flush_page(swap_type: u32, ranges: &Ranges) -> Self {
        Self::new(
            wire::op::FLUSH_PAGE,
            object_of(swap_type),
            ranges.items().len(),
        )
        .with_body(bytes_of(ranges.items()))
    }

    /// flush_object, of a whole swap device.
    pub(crate) fn flush_object(swap_type: u32) -> Self {
        Self::new(wire::op::FLUSH_OBJECT, object_of(swap_type), 0)
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

/// Somebody waits for the response to a request.
#[pin_data]
pub(crate) struct Waiter {
    #[pin]
    answered: Completion,
    #[pin]
    answer: SpinLockIrq<Option<Option<wire::Response>>>,
}

impl Waiter {
    /// Nobody has answered yet.
    pub(crate) fn new() -> Result<Arc<Self>> {
        Arc::pin_init(
            pin_init!(Self {
                answered <- Completion::new(),
                answer <- new_spinlock_irq!(None),
            }),
            GFP_KERNEL,
        )
    }

    /// Answers; `None` when the request was lost.
    pub(crate) fn answer(&self, response: Option<wire::Response>) {
        *self.answer.lock() = Some(response);
        self.answered.complete_all();
    }

    /// Waits for the answer. Whatever happens to the device, one comes: a response, or the news
    /// that the request was lost in a reset.
    pub(crate) fn wait(&self) -> Option<wire::Response> {
        self.answered.wait_for_completion();
        self.try_wait().flatten()
    }

    /// The answer, if there is one.
    pub(crate) fn try_wait(&self) -> Option<Option<wire::Response>> {
        *self.answer.lock()
    }
}

impl Purpose {
    /// Gives the token of a batch back that did not get under way.
    pub(crate) fn into_token(self) -> Option<Token> {
        match self {
            Self::Store(transfer) | Self::Load(transfer) => Some(transfer.token),
            Self::Flush | Self::Control(_) => None,
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
    Flush,
    /// Because of somebody who waits.
    Control(Arc<Waiter>),
}
