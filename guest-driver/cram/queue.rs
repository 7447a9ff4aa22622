// SPDX-License-Identifier: GPL-2.0

//! One request queue.
//!
//! A queue has a fixed number of slots, each with memory for one request, allocated in advance:
//! swapping has to go on when there is no memory left. Who finds no slot free waits for one, as
//! long as the device answers: a store is refused, and a load is put off, as soon as it is known
//! not to (see [`Gate`] and `device/watchdog.rs`).
//!
//! The device executes a queue in order, so requests are counted: number n is answered when n
//! requests are.

use crate::{
    areas::Flush,
    dma::{Lists, SharedRequest},
    frontswap::Batch,
    request::{Purpose, Request},
    virtio::{Virtqueue, Window},
    wire, //
};
use core::ptr::NonNull;
use kernel::{
    new_condvar,
    new_spinlock_irq,
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Release},
            Atomic, //
        },
        lock::spinlock::SpinLockIrqGuard,
        CondVar,
        SpinLockIrq, //
    },
    time::{delay::fsleep, Delta}, //
};

/// Requests that may be under way on a queue.
pub(crate) const SLOTS: usize = 32;
/// Flushes that may be under way on a queue: nobody waits for them, and others should not.
const FLUSHES: usize = 2;
/// How long to wait for memory to describe a request with.
const MEMORY_WAIT_MS: i64 = 5;

/// What a queue takes. Who submits looks at it under the queue's lock, so nothing gets under way
/// after it was closed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Gate {
    /// Only what the driver asks for itself.
    Shut,
    /// What was stored is loaded and forgotten, too.
    Loads,
    /// Everything.
    Open,
}

/// Memory for one request.
struct Slot {
    shared: SharedRequest,
    purpose: Option<Purpose>,
    /// What an answer that says OK must at least have written.
    least: usize,
}

struct Inner {
    vq: Option<Virtqueue>,
    gate: Gate,
    slots: KVec<Slot>,
    free: KVec<u16>,
    /// Flushes that are not under way.
    flushes: KVec<KBox<Flush>>,
    lists: Lists,
    submitted: u64,
    /// Processors that watch for answers, and need no interrupts.
    watchers: u32,
}

/// An answered request.
pub(crate) struct Answer {
    /// Why it was made.
    pub(crate) purpose: Purpose,
    /// What the device said.
    pub(crate) response: wire::Response,
}

/// A request queue.
#[pin_data]
pub(crate) struct RequestQueue {
    #[pin]
    inner: SpinLockIrq<Inner>,
    /// Signalled when a slot becomes free, when the gate moves, and when the queue closes.
    #[pin]
    room: CondVar,
    /// Requests that were answered, or lost. Changed under the lock.
    answered: Atomic<u64>,
    /// Through which the virtqueue is looked at without the lock.
    window: Window,
}

/// What became of an attempt to submit.
pub(crate) enum Submitted {
    /// It is under way, with this number.
    Yes(u64),
    /// It would have to wait for longer than it may.
    Later(Purpose),
    /// The queue does not take it.
    No(Purpose),
}

/// What became of an attempt to submit a flush.
pub(crate) enum Flushed {
    /// So many pages are under way.
    Yes(usize),
    /// There was nothing to flush.
    Nothing,
    /// There was no room.
    NoRoom,
}

/// Why a request could not be added.
enum Full {
    /// Others are under way: wait for them.
    ForNow,
    /// There was no memory to describe it with: wait for that.
    NoMemory,
    /// The queue is broken, or too small for the request.
    ForEver,
}

impl RequestQueue {
    /// A closed queue with its slots.
    pub(crate) fn new() -> Result<Pin<KBox<Self>>> {
        let mut slots = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        let mut free = KVec::with_capacity(SLOTS, GFP_KERNEL)?;
        for nr in 0..SLOTS {
            slots.push(
                Slot {
                    shared: SharedRequest::new()?,
                    purpose: None,
                    least: 0,
                },
                GFP_KERNEL,
            )?;
            free.push(nr as u16, GFP_KERNEL)?;
        }
        let mut flushes = KVec::with_capacity(FLUSHES, GFP_KERNEL)?;
        for _ in 0..FLUSHES {
            flushes.push(KBox::new(Flush::new(), GFP_KERNEL)?, GFP_KERNEL)?;
        }
        let inner = Inner {
            vq: None,
            gate: Gate::Shut,
            slots,
            free,
            flushes,
            lists: Lists::new()?,
            submitted: 0,
            watchers: 0,
        };
        KBox::pin_init(
            pin_init!(Self {
                inner <- new_spinlock_irq!(inner),
                room <- new_condvar!(),
                answered: Atomic::new(0),
                window: Window::new(),
            }),
            GFP_KERNEL,
        )
    }

    /// Opens the queue over a virtqueue.
    pub(crate) fn open(&self, vq: Virtqueue) {
        let mut inner = self.inner.lock();
        self.window.open(&vq);
        inner.vq = Some(vq);
        drop(inner);
        self.room.notify_all();
    }

    /// Says what the queue takes from now on.
    pub(crate) fn set_gate(&self, gate: Gate) {
        let mut inner = self.inner.lock();
        if inner.gate != gate {
            inner.gate = gate;
            drop(inner);
            self.room.notify_all();
        }
    }

    /// Closes the queue after the device was reset. What was under way is handed to `lost`.
    pub(crate) fn close(&self, mut lost: impl FnMut(Purpose)) {
        let mut vq = {
            let mut inner = self.inner.lock();
            self.window.close();
            match inner.vq.take() {
                Some(vq) => vq,
                None => return,
            }
        };
        // Nobody reaches the virtqueue any more, except who is about to notify it or looks at it:
        // wait for them.
        kernel::sync::rcu::synchronize_rcu();
        while let Some(cookie) = vq.unused() {
            let released = self.inner.lock().release(cookie);
            if let Some((purpose, _, _)) = released {
                self.count_answer();
                lost(purpose);
            }
        }
        self.room.notify_all();
    }

    /// Submits a request that carries the pages of a batch. Sleeps while there is no room, and
    /// `may_wait` or the device is well. `submitted` runs under the queue's lock, right after.
    ///
    /// `watch`: who calls will watch for the answer, and calls [`Self::end_watch`] afterwards.
    pub(crate) fn submit(
        &self,
        request: &Request,
        purpose: Purpose,
        batch: &Batch<'_>,
        watch: bool,
        submitted: impl FnOnce(),
    ) -> Submitted {
        let needed = match purpose {
            Purpose::Store(_) => Gate::Open,
            _ => Gate::Loads,
        };
        let store = needed == Gate::Open;
        let mut purpose = purpose;
        let mut inner = self.inner.lock();
        loop {
            if inner.gate < needed {
                return Submitted::No(purpose);
            }
            let full = match inner.add(request, purpose, Some(batch)) {
                Ok(()) => {
                    submitted();
                    if watch {
                        inner.begin_watch();
                    }
                    let number = inner.submitted;
                    Self::unlock_and_kick(inner);
                    return Submitted::Yes(number);
                }
                Err((back, full)) => {
                    purpose = back;
                    full
                }
            };
            // While the device is being reset there is no virtqueue.
            let well = inner.gate == Gate::Open && inner.vq.is_some();
            match full {
                Full::ForEver => return Submitted::No(purpose),
                // The disk takes what is to be stored.
                Full::NoMemory if store => return Submitted::No(purpose),
                Full::ForNow if store && !well => return Submitted::No(purpose),
                Full::NoMemory if !batch.may_wait() => return Submitted::Later(purpose),
                Full::ForNow if !batch.may_wait() && !well => return Submitted::Later(purpose),
                Full::NoMemory => {
                    drop(inner);
                    fsleep(Delta::from_millis(MEMORY_WAIT_MS));
                    inner = self.inner.lock();
                }
                Full::ForNow => self.room.wait(&mut inner),
            }
        }
    }

    /// Submits a request without pages, if there is room now.
    pub(crate) fn submit_now(&self, request: &Request, purpose: Purpose) -> Submitted {
        let mut inner = self.inner.lock();
        match inner.add(request, purpose, None) {
            Ok(()) => {
                let number = inner.submitted;
                Self::unlock_and_kick(inner);
                Submitted::Yes(number)
            }
            Err((purpose, _)) => Submitted::No(purpose),
        }
    }

    /// Submits the flush that `prepare` fills under the queue's lock, if there is room now.
    /// `undo` runs under the same hold of the lock when the ring was full after all.
    pub(crate) fn submit_flush(
        &self,
        prepare: impl FnOnce(&mut Flush) -> bool,
        undo: impl FnOnce(&Flush),
    ) -> Flushed {
        let mut inner = self.inner.lock();
        if inner.vq.is_none() || inner.gate < Gate::Loads || inner.free.is_empty() {
            return Flushed::NoRoom;
        }
        let Some(mut flush) = inner.flushes.pop() else {
            return Flushed::NoRoom;
        };
        if !prepare(&mut flush) {
            inner.put_flush(flush);
            return Flushed::Nothing;
        }
        let pages = flush.ranges.pages();
        let request = Request::flush_page(&flush);
        if let Err((purpose, _)) = inner.add(&request, Purpose::Flush(flush), None) {
            if let Purpose::Flush(flush) = purpose {
                undo(&flush);
                inner.put_flush(flush);
            }
            return Flushed::NoRoom;
        }
        Self::unlock_and_kick(inner);
        Flushed::Yes(pages)
    }

    /// A flush has ended, and may be used for another.
    pub(crate) fn put_flush(&self, flush: KBox<Flush>) {
        self.inner.lock().put_flush(flush);
    }

    /// Notifies the device, if it waits for that, without the lock.
    fn unlock_and_kick(mut inner: SpinLockIrqGuard<'_, Inner>) {
        // `close` waits for us before the virtqueue goes.
        let _guard = kernel::sync::rcu::read_lock();
        let notification = inner.vq.as_mut().and_then(Virtqueue::kick);
        drop(inner);
        if let Some(notification) = notification {
            notification.send();
        }
    }

    /// Is there an answer? Takes no lock. Any context.
    pub(crate) fn has_answer(&self) -> bool {
        self.window.has_used()
    }

    /// The next answered request. Any context.
    pub(crate) fn answer(&self) -> Option<Answer> {
        let mut inner = self.inner.lock();
        let (cookie, len) = inner.vq.as_mut()?.used()?;
        self.window.count_used();
        let (purpose, mut response, least) = inner.release(cookie)?;
        self.count_answer();
        drop(inner);
        let len = len as usize;
        if len < wire::RESPONSE_SIZE || (response.status == wire::status::OK && len < least) {
            // Pages that were not written must not be taken for pages that were.
            response = wire::Response::default();
        }
        self.room.notify_one();
        Some(Answer { purpose, response })
    }

    /// Under the lock, or while nobody else answers.
    fn count_answer(&self) {
        self.answered
            .store(self.answered.load(Acquire) + 1, Release);
    }

    /// Number of requests that were answered, or lost.
    pub(crate) fn answered(&self) -> u64 {
        self.answered.load(Acquire)
    }

    /// Number of requests that were answered, and whether others are under way.
    pub(crate) fn progress(&self) -> (u64, bool) {
        let inner = self.inner.lock();
        (self.answered(), inner.free.len() < SLOTS)
    }

    /// Ends all loads under way for those who wait for them. Their pages stay with the device.
    pub(crate) fn give_up_loads(&self) {
        // The lock keeps this apart from the answer to the same request.
        for slot in self.inner.lock().slots.iter() {
            if let Some(Purpose::Load(transfer)) = &slot.purpose {
                transfer.give_up();
            }
        }
    }

    /// Somebody has watched for long enough. False when there are answers already: then the
    /// watch goes on.
    pub(crate) fn end_watch(&self) -> bool {
        let mut inner = self.inner.lock();
        if inner.watchers == 1 && !inner.vq.as_mut().is_none_or(Virtqueue::enable_interrupts) {
            return false;
        }
        inner.watchers -= 1;
        true
    }

    /// No interrupts for a while.
    pub(crate) fn disable_interrupts(&self) {
        if let Some(vq) = &mut self.inner.lock().vq {
            vq.disable_interrupts();
        }
    }

    /// Interrupts again, unless somebody watches. False when there are answers already.
    pub(crate) fn enable_interrupts(&self) -> bool {
        let mut inner = self.inner.lock();
        inner.watchers > 0 || inner.vq.as_mut().is_none_or(Virtqueue::enable_interrupts)
    }
}

impl Inner {
    fn add(
        &mut self,
        request: &Request,
        purpose: Purpose,
        batch: Option<&Batch<'_>>,
    ) -> core::result::Result<(), (Purpose, Full)> {
        let under_way = self.free.len() < SLOTS;
        let (Some(vq), Some(nr)) = (&mut self.vq, self.free.last().copied()) else {
            return Err((purpose, Full::ForNow));
        };
        let Some(slot) = self.slots.get_mut(usize::from(nr)) else {
            return Err((purpose, Full::ForEver));
        };
        slot.shared.fill(request.header(), request.body());
        let nr_segments = batch.map_or(0, |batch| batch.segments().count());
        let segments = batch.into_iter().flat_map(Batch::segments);
        let lists = self.lists.describe(
            &slot.shared,
            request.body().len(),
            request.payload(),
            nr_segments,
            segments,
        );
        // SAFETY: The lists describe the slot's memory, which stays while the queue does and is
        // not touched before the slot is free again, and the batch's pages, which stay until the
        // batch's token is done; `purpose` has that, and it ends when the cookie has come back.
        match unsafe { vq.add(lists, cookie_of(nr)) } {
            Ok(()) => (),
            Err(error) if error == ENOSPC && under_way => return Err((purpose, Full::ForNow)),
            Err(error) if error == ENOMEM => return Err((purpose, Full::NoMemory)),
            Err(_) => return Err((purpose, Full::ForEver)),
        }
        slot.purpose = Some(purpose);
        slot.least = request.least_answer();
        self.free.pop();
        self.submitted += 1;
        Ok(())
    }

    /// Frees the slot of a cookie.
    fn release(&mut self, cookie: NonNull<c_void>) -> Option<(Purpose, wire::Response, usize)> {
        let nr = nr_of(cookie);
        let slot = self.slots.get_mut(usize::from(nr))?;
        let purpose = slot.purpose.take()?;
        let response = slot.shared.response();
        // There is room: the capacity is the number of slots, and each is there once.
        let _ = self.free.push_within_capacity(nr);
        Some((purpose, response, slot.least))
    }

    fn begin_watch(&mut self) {
        self.watchers += 1;
        if self.watchers == 1 {
            if let Some(vq) = &mut self.vq {
                vq.disable_interrupts();
            }
        }
    }

    fn put_flush(&mut self, flush: KBox<Flush>) {
        // There is room: it came from here.
        let _ = self.flushes.push_within_capacity(flush);
    }
}

// Cookies are numbers of slots, plus one, since null is not a cookie.
fn cookie_of(nr: u16) -> NonNull<c_void> {
    NonNull::without_provenance(core::num::NonZero::<usize>::MIN.saturating_add(usize::from(nr)))
}

fn nr_of(cookie: NonNull<c_void>) -> u16 {
    (cookie.addr().get() - 1) as u16
}
