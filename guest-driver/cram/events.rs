// SPDX-License-Identifier: GPL-2.0

//! The event queue: the device writes into buffers that it was given.

use crate::{
    virtio::Virtqueue,
    wire, //
};
use core::{
    mem::size_of,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    new_spinlock_irq,
    prelude::*,
    sync::SpinLockIrq, //
};

/// Buffers that the device is given.
const BUFFERS: usize = 8;

struct Inner {
    vq: Option<Virtqueue>,
    /// Memory that the device writes: one event per buffer. Only copied from.
    buffers: KBox<[wire::Event; BUFFERS]>,
}

/// The event queue.
#[pin_data]
pub(crate) struct EventQueue {
    #[pin]
    inner: SpinLockIrq<Inner>,
}

impl EventQueue {
    /// A closed queue.
    pub(crate) fn new() -> impl PinInit<Self, Error> {
        try_pin_init!(Self {
            inner <- new_spinlock_irq!(Inner {
                vq: None,
                buffers: KBox::new([wire::Event::default(); BUFFERS], GFP_KERNEL)?,
            }),
        })
    }

    /// Opens the queue, and gives the device its buffers.
    pub(crate) fn open(&self, vq: Virtqueue) {
        let mut inner = self.inner.lock();
        inner.vq = Some(vq);
        for nr in 0..BUFFERS {
            inner.offer(nr);
        }
        inner.notify();
    }

    /// Closes the queue after the device was reset.
    pub(crate) fn close(&self) {
        if let Some(mut vq) = self.inner.lock().vq.take() {
            while vq.unused().is_some() {}
        }
    }

    /// The next event. Any context.
    pub(crate) fn next(&self) -> Option<wire::Event> {
        let mut inner = self.inner.lock();
        let (cookie, len) = inner.vq.as_mut()?.used()?;
        let nr = cookie.addr().get() - 1;
        let buffer: *const wire::Event = inner.buffers.get(nr)?;
        // SAFETY: The buffer is valid, and any bytes are an event.
        let event = unsafe { buffer.read_volatile() };
        inner.offer(nr);
        inner.notify();
        if (len as usize) < size_of::<wire::Event>() {
            // Too short to mean anything: like an unknown event.
            return Some(wire::Event::default());
        }
        Some(event)
    }
}

impl Inner {
    fn offer(&mut self, nr: usize) {
        let (Some(vq), Some(buffer)) = (&mut self.vq, self.buffers.get_mut(nr)) else {
            return;
        };
        let start: *mut wire::Event = buffer;
        // SAFETY: All zeroes is a list without entries.
        let mut list = unsafe { core::mem::zeroed::<bindings::scatterlist>() };
        // SAFETY: The memory is kmalloc'ed, one event long.
        unsafe { bindings::sg_init_one(&mut list, start.cast(), size_of::<wire::Event>() as u32) };
        let cookie = NonNull::without_provenance(
            core::num::NonZero::<usize>::MIN.saturating_add(nr), //
        );
        // SAFETY: The buffer stays while the queue does, and is only read after it came back.
        if unsafe { vq.add_writable(&mut list, cookie) }.is_err() {
            // One buffer fewer; the ring is larger than all of them, so this does not happen.
            kernel::pr_warn_once!("cram: the event queue is full\n");
        }
    }

    /// Events are rare: the lock may be held meanwhile.
    fn notify(&mut self) {
        if let Some(notification) = self.vq.as_mut().and_then(Virtqueue::kick) {
            notification.send();
        }
    }
}
