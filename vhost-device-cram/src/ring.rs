// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One ring: taking chains from it, and completing them.
//!
//! The calls of `virtio_queue` that iterate a ring swallow errors; with a guest that moves the
//! available index at will that ends in a loop that never ends. So the ring is read here, and
//! every doubt is a [`Fault`]: the queue is then stopped, alone, until it is set up again. A chain
//! is taken when it is completed: one that met a fault is in the ring as if it had never been
//! looked at, and is executed by the ring's next life.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::request::Table;
use crate::vhost::memory::Memory;
use crate::vhost::notifier::Notifier;

/// Why a ring cannot be trusted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// More chains are said to be available than the ring has room for.
    #[error("the available index is {ahead} ahead of the device in a ring of {size}")]
    Jumped {
        /// How far the index is ahead.
        ahead: u16,
        /// The ring's size.
        size: u16,
    },
    /// The available ring names a descriptor that does not exist.
    #[error("descriptor {head} was made available in a ring of {size}")]
    NoSuchDescriptor {
        /// The descriptor's index.
        head: u16,
        /// The ring's size.
        size: u16,
    },
    /// Part of the ring is not in the guest's memory.
    #[error("the ring is not in the guest's memory")]
    Unmapped,
    /// Memory of the guest was taken away, or broke.
    #[error("part of the guest's memory is gone")]
    MemoryGone,
}

/// A ring, and what its front-end said of it.
pub struct Ring {
    queue: Queue,
    /// What its addresses lie in.
    memory: Arc<Memory>,
    /// By which the driver wakes the worker, while the ring is started.
    kick: Option<OwnedFd>,
    /// By which the driver is woken.
    call: Option<Notifier>,
    /// By which the front-end hears of a fault.
    error: Option<Notifier>,
    enabled: bool,
    /// It cannot be trusted, until it is started anew.
    faulted: bool,
}

impl Ring {
    /// A ring that was not set up yet, and will have `size` entries at the most.
    ///
    /// # Errors
    /// When that is no size.
    pub fn new(size: u16) -> Result<Self, QueueError> {
        Ok(Ring {
            queue: Queue::new(size)?,
            memory: Arc::default(),
            kick: None,
            call: None,
            error: None,
            enabled: false,
            faulted: false,
        })
    }

    /// Whether the ring may be served now.
    pub fn is_running(&self) -> bool {
        self.enabled && self.queue.ready() && !self.faulted
    }

    /// Uses other memory from now on.
    pub fn use_memory(&mut self, memory: Arc<Memory>) {
        self.memory = memory;
    }

    /// Uses EVENT_IDX, or not.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.queue.set_event_idx(event_idx);
    }

    /// Sets the number of entries.
    ///
    /// # Errors
    /// When no ring has so many.
    pub fn set_size(&mut self, size: u16) -> Result<(), QueueError> {
        self.queue.try_set_size(size)
    }

    /// Says where the parts lie, and goes on where the used ring in it is.
    ///
    /// # Errors
    /// When they are not aligned, or not in memory.
    pub fn set_addresses(
        &mut self,
        descriptors: u64,
        available: u64,
        used: u64,
    ) -> Result<(), QueueError> {
        let queue = &mut self.queue;
        queue.try_set_desc_table_address(GuestAddress(descriptors))?;
        queue.try_set_avail_ring_address(GuestAddress(available))?;
        queue.try_set_used_ring_address(GuestAddress(used))?;
        let used = queue.used_idx(&**self.memory, Ordering::Acquire)?;
        queue.set_next_used(used.0);
        Ok(())
    }

    /// Says which chain is the next to be taken.
    pub fn set_base(&mut self, base: u16) {
        self.queue.set_next_avail(base);
    }

    /// Starts the ring, with this descriptor to be woken by; the one of before is given back.
    pub fn start(&mut self, kick: OwnedFd) -> Option<OwnedFd> {
        self.queue.set_ready(true);
        self.kick.replace(kick)
    }

    /// Stops the ring: the chain that would have been the next, and the descriptor that it was woken by.
    pub fn stop(&mut self) -> (u16, Option<OwnedFd>) {
        self.queue.set_ready(false);
        self.faulted = false;
        self.call = None;
        (self.queue.next_avail(), self.kick.take())
    }

    /// Says how to wake the driver.
    pub fn set_call(&mut self, call: Option<Notifier>) {
        self.call = call;
    }

    /// Says how to tell the front-end of a fault.
    pub fn set_error(&mut self, error: Option<Notifier>) {
        self.error = error;
    }

    /// Lets the ring be served, once it is started, or no longer.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// How to wake the driver; to be done when the ring is not locked any more.
    pub fn call(&self) -> Option<Notifier> {
        self.call.clone()
    }

    /// Serves it no more until it is started anew. How to tell the front-end.
    pub fn fault(&mut self) -> Option<Notifier> {
        self.faulted = true;
        self.error.clone()
    }

    /// The memory that its chains are in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Whether what was read and written in guest memory up to now was there.
    ///
    /// # Errors
    /// When it was not.
    pub fn intact(&self) -> Result<(), Fault> {
        // What was written before this line was written before the mark is looked at.
        fence(Ordering::SeqCst);
        if self.memory.is_intact() {
            Ok(())
        } else {
            Err(Fault::MemoryGone)
        }
    }

    /// Where the descriptors lie.
    pub fn table(&self) -> Table {
        Table {
            address: self.queue.desc_table(),
            len: u32::from(self.queue.size()),
        }
    }

    /// Number of chains that wait in the ring.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn pending(&self) -> Result<u16, Fault> {
        let available = self
            .queue
            .avail_idx(&**self.memory, Ordering::Acquire)
            .map_err(|_| Fault::Unmapped)?;
        self.intact()?;
        let ahead = available.0.wrapping_sub(self.queue.next_avail());
        if ahead > self.queue.size() {
            return Err(Fault::Jumped {
                ahead,
                size: self.queue.size(),
            });
        }
        Ok(ahead)
    }

    /// The next chain; only when [`Ring::pending`] said that there is one.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn next(&self) -> Result<u16, Fault> {
        let (next, size) = (self.queue.next_avail(), self.queue.size());
        // The ring of indexes follows two 16-bit fields. Neither sum can overflow for an address
        // that is in the guest's memory, and `load` refuses every other.
        let offset = 4 + 2 * u64::from(next % size);
        let head = self.load(self.queue.avail_ring().checked_add(offset))?;
        self.intact()?;
        if head >= size {
            return Err(Fault::NoSuchDescriptor { head, size });
        }
        Ok(head)
    }

    fn load(&self, address: Option<u64>) -> Result<u16, Fault> {
        let address = GuestAddress(address.ok_or(Fault::Unmapped)?);
        let value: Result<u16, _> = self.memory.load(address, Ordering::Relaxed);
        value.map(u16::from_le).map_err(|_| Fault::Unmapped)
    }

    /// Completes the chain that [`Ring::next`] told; unless memory is gone, since then nothing can be
    /// believed of what was done.
    ///
    /// # Errors
    /// When it is not completed.
    pub fn complete(&mut self, head: u16, used: u32) -> Result<(), Fault> {
        self.intact()?;
        let next = self.queue.next_avail();
        self.queue
            .add_used(&**self.memory, head, used)
            .map_err(|_| Fault::Unmapped)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        Ok(())
    }

    /// Asks the driver not to notify: the ring is being watched.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn quiet(&mut self) -> Result<(), Fault> {
        self.queue
            .disable_notification(&**self.memory)
            .map_err(|_| Fault::Unmapped)
    }

    /// Asks the driver to notify. True when something has arrived in the meantime.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn listen(&mut self) -> Result<bool, Fault> {
        let arrived = self.queue.enable_notification(&**self.memory);
        self.intact()?;
        arrived.map_err(|_| Fault::Unmapped)
    }

    /// Whether the driver wants to hear of what was completed since the last call.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn wants_interrupt(&mut self) -> Result<bool, Fault> {
        let wanted = self.queue.needs_notification(&**self.memory);
        if !wanted.map_err(|_| Fault::Unmapped)? {
            return Ok(false);
        }
        if self.queue.event_idx_enabled() {
            return Ok(true);
        }
        // `needs_notification` does not look at the older way of saying "do not interrupt".
        let flags = self.load(Some(self.queue.avail_ring()))?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
