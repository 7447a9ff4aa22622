// SPDX-License-Identifier: GPL-2.0

//! One request queue.
//!
//! A queue has a fixed number of slots, each with memory for one request, allocated in advance:
//! swapping has to go on when there is no memory left. Who finds no slot free waits for one.
//!
//! The device executes a queue in order, so requests are counted: number n is answered when n
//! requests are.

use crate::{
    dma::{Lists, SharedRequest},
    frontswap::Batch,
    request::{Purpose, Request},
    virtio::Virtqueue,
    wire, //
};
use core::ptr::NonNull;
use kernel::{
    new_condvar,
    new_spinlock_irq,
    prelude::*,
    sync::{lock::spinlock::SpinLockIrqGuard, CondVar, SpinLockIrq}, //
};

/// Requests that may be under way on a queue.
pub(crate) const SLOTS: usize = 32;

/// Memory for one request.
struct Slot {
    shared: SharedRequest,
    purpose: Option<Purpose>,
}

struct Inner {
    vq: Option<Virtqueue>,
    slots: KVec<Slot>,
    free: KVec<u16>,
    lists: Lists,
    submitted: u64,
    answered: u64,
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
    /// Signalled when a slot becomes free, and when the queue closes.
    #[pin]
    room: CondVar,
}

/// What became of an attempt to submit.
pub(crate) enum Submitted {
    /// It is under way, with this number.
    Yes(u64),
    /// The queue is closed.
    No(Purpose),
}

/// What became of an attempt to submit a flush.
pub(crate) enum Flushed<T> {
    /// It is under way.
    Yes(T),
    /// There was nothing to flush.
    Nothing,
    /// There was no room.
    NoRoom,
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
                },
                GFP_KERNEL,
            )?;
            free.push(nr as u16, GFP_KERNEL)?;
        }
        let inner = Inner {
            vq: None,
            slots,
            free,
            lists: Lists::new()?,
            submitted: 0,
            answered: 0,
        };
        KBox::pin_init(
            pin_init!(Self {
                inner <- new_spinlock_irq!(inner),
                room <- new_condvar!(),
            }),
            GFP_KERNEL,
        )
    }

    /// Opens the queue over a virtqueue.
    pub(crate) fn open(&self, vq: Virtqueue) {
        self.inner.lock().vq = Some(vq);
        self.room.notify_all();
    }

    /// Closes the queue after the device was reset. What was under way is handed to `lost`.
    pub(crate) fn close(&self, mut lost: impl FnMut(Purpose)) {
        let mut vq = {
            let mut inner = self.inner.lock();
            match inner.vq.take() {
                Some(vq) => vq,
                None => return,
            }
        };
        // Nobody reaches the virtqueue any more, except who is about to notify it: wait for them.
        kernel::sync::rcu::synchronize_rcu();
        while let Some(cookie) = vq.unused() {
            let purpose = self
                .inner
                .lock()
                .release(cookie)
                .map(|(purpose, _)| purpose);
            if let Some(purpose) = purpose {
                lost(purpose);
            }
        }
        self.room.notify_all();
    }

    /// Submits a request that carries no pages, or those of a batch. Sleeps while there is no
    /// room. `submitted` runs under the queue's lock, right after.
    pub(crate) fn submit(
        &self,
        request: &Request,
        purpose: Purpose,
        batch: Option<&Batch<'_>>,
        submitted: impl FnOnce(),
    ) -> Submitted {
        let mut purpose = Some(purpose);
        let mut submitted = Some(submitted);
        let mut inner = self.inner.lock();
        loop {
            if inner.vq.is_none() {
                break;
            }
            if let Some(taken) = purpose.take() {
                match inner.add(request, taken, batch) {
                    Ok(()) => {
                        if let Some(submitted) = submitted.take() {
                            submitted();
                        }
                        let number = inner.submitted;
                        Self::unlock_and_kick(inner);
                        return Submitted::Yes(number);
                    }
                    Err((taken, Full::ForNow)) => purpose = Some(taken),
                    Err((taken, Full::ForEver)) => {
                        purpose = Some(taken);
                        break;
                    }
                }
            }
            self.room.wait(&mut inner);
        }
        drop(inner);
        match purpose {
            Some(purpose) => Submitted::No(purpose),
            // It is taken only by a submission, which returns.
            None => Submitted::Yes(0),
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

    /// Submits the flush that `prepare` makes under the queue's lock, if there is room now.
    /// `undo` runs under the same hold of the lock when the ring was full after all.
    pub(crate) fn submit_flush<T>(
        &self,
        prepare: impl FnOnce() -> Option<(Request, T)>,
        undo: impl FnOnce(&T),
    ) -> Flushed<T> {
        let mut inner = self.inner.lock();
        if inner.vq.is_none() || inner.free.is_empty() {
            return Flushed::NoRoom;
        }
        let Some((request, about)) = prepare() else {
            return Flushed::Nothing;
        };
        if inner.add(&request, Purpose::Flush, None).is_err() {
            undo(&about);
            return Flushed::NoRoom;
        }
        Self::unlock_and_kick(inner);
        Flushed::Yes(about)
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

    /// The next answered request. Any context.
    pub(crate) fn answer(&self) -> Option<Answer> {
        let mut inner = self.inner.lock();
        let (cookie, len) = inner.vq.as_mut()?.used()?;
        let (purpose, mut response) = inner.release(cookie)?;
        if (len as usize) < wire::RESPONSE_SIZE {
            response = wire::Response::default();
        }
        drop(inner);
        self.room.notify_one();
        Some(Answer { purpose, response })
    }

    /// Number of requests that were answered, or lost.
    pub(crate) fn answered(&self) -> u64 {
        self.inner.lock().answered
    }

    /// No interrupts for a while.
    pub(crate) fn disable_interrupts(&self) {
        if let Some(vq) = &mut self.inner.lock().vq {
            vq.disable_interrupts();
        }
    }

    /// Interrupts again. False when there are answers already.
    pub(crate) fn enable_interrupts(&self) -> bool {
        match &mut self.inner.lock().vq {
            Some(vq) => vq.enable_interrupts(),
            None => true,
        }
    }
}

/// Why a request could not be added.
enum Full {
    /// Others are under way: wait for them.
    ForNow,
    /// The queue is broken, or too small for the request.
    ForEver,
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
            Err(_) => return Err((purpose, Full::ForEver)),
        }
        slot.purpose = Some(purpose);
        self.free.pop();
        self.submitted += 1;
        Ok(())
    }

    /// Frees the slot of a cookie.
    fn release(&mut self, cookie: NonNull<c_void>) -> Option<(Purpose, wire::Response)> {
        let nr = nr_of(cookie);
        let slot = self.slots.get_mut(usize::from(nr))?;
        let purpose = slot.purpose.take()?;
        let response = slot.shared.response();
        self.answered += 1;
        // There is room: the capacity is the number of slots, and each is there once.
        let _ = self.free.push_within_capacity(nr);
        Some((purpose, response))
    }
}

// Cookies are numbers of slots, plus one, since null is not a cookie.
fn cookie_of(nr: u16) -> NonNull<c_void> {
    NonNull::without_provenance(core::num::NonZero::<usize>::MIN.saturating_add(usize::from(nr)))
}

fn nr_of(cookie: NonNull<c_void>) -> u16 {
    (cookie.addr().get() - 1) as u16
}
