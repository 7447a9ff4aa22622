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

/// Memory that the device writes, one event per buffer. It is only ever accessed by copying, and
/// never referred to, so that nothing the device does to it meanwhile can matter.
struct Buffers(NonNull<[wire::Event; BUFFERS]>);

// SAFETY: It owns its memory.
unsafe impl Send for Buffers {}

impl Buffers {
    fn new() -> Result<Self> {
        let buffers = KBox::new([wire::Event::default(); BUFFERS], GFP_KERNEL)?;
        // SAFETY: A box is never null.
        Ok(Self(unsafe {
            NonNull::new_unchecked(KBox::into_raw(buffers))
        }))
    }

    fn get(&self, nr: usize) -> Option<*mut wire::Event> {
        // SAFETY: It stays inside of the array.
        (nr < BUFFERS).then(|| unsafe { self.0.as_ptr().cast::<wire::Event>().add(nr) })
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        // SAFETY: The memory came from a box, and the device does not have it any more: the queue
        // is dropped after the device was reset.
        drop(unsafe { KBox::from_raw(self.0.as_ptr()) });
    }
}

struct Inner {
    vq: Option<Virtqueue>,
    buffers: Buffers,
    /// Buffers that could not be offered yet: bit n is the n-th.
    owed: u32,
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
                buffers: Buffers::new()?,
                owed: 0,
            }),
        })
    }

    /// Opens the queue, and gives the device its buffers.
    pub(crate) fn open(&self, vq: Virtqueue) {
        let mut inner = self.inner.lock();
        inner.vq = Some(vq);
        inner.owed = (1 << BUFFERS) - 1;
        inner.offer_owed();
    }

    /// Offers again what could not be offered.
    pub(crate) fn refill(&self) {
        let mut inner = self.inner.lock();
        if inner.owed != 0 {
            inner.offer_owed();
        }
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
        let buffer = inner.buffers.get(nr)?;
        // SAFETY: The buffer is valid, and any bytes are an event.
        let event = unsafe { buffer.read_volatile() };
        inner.owed |= 1 << nr;
        inner.offer_owed();
        if (len as usize) < size_of::<wire::Event>() {
            // Too short to mean anything: like an unknown event.
            return Some(wire::Event::default());
        }
        Some(event)
    }
}

impl Inner {
    fn offer_owed(&mut self) {
        for nr in 0..BUFFERS {
            if self.owed & (1 << nr) != 0 && self.offer(nr) {
                self.owed &= !(1 << nr);
            }
        }
        self.notify();
    }

    fn offer(&mut self, nr: usize) -> bool {
        let (Some(vq), Some(start)) = (&mut self.vq, self.buffers.get(nr)) else {
            return false;
        };
        // SAFETY: All zeroes is a list without entries.
        let mut list = unsafe { core::mem::zeroed::<bindings::scatterlist>() };
        // SAFETY: The memory is kmalloc'ed, one event long.
        unsafe { bindings::sg_init_one(&mut list, start.cast(), size_of::<wire::Event>() as u32) };
        let cookie = NonNull::without_provenance(
            core::num::NonZero::<usize>::MIN.saturating_add(nr), //
        );
        // SAFETY: The buffer stays while the queue does, and is only read after it came back.
        unsafe { vq.add_writable(&mut list, cookie) }.is_ok()
    }

    /// Events are rare: the lock may be held meanwhile.
    fn notify(&mut self) {
        if let Some(notification) = self.vq.as_mut().and_then(Virtqueue::kick) {
            notification.send();
        }
    }
}
