// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One ring: taking chains from it, and completing them.
//!
//! The calls of `virtio_queue` that iterate a ring swallow errors; with a guest that moves the
//! available index at will that ends in a loop that never ends. So the ring is read here, and
//! every doubt is a [`Fault`]: the queue is then stopped, alone, until it is set up again. A chain
//! is taken when it is completed: one that met a fault is in the ring as if it had never been
//! looked at, and is executed by the ring's next life.
//!
//! What a front-end sets up is in a vring of `vhost_user_backend`: the queue, the descriptor of its
//! kicks, whether it is enabled, and its memory. The rest is ours:
//! - The descriptors to call and to report an error with ([`Notifier`]). A vring's notifier begins a
//!   write that was interrupted anew, and so could not be ended; it can be used only while the vring
//!   is locked, or for the price of a new descriptor each time; and its error descriptor cannot be
//!   used at all.
//! - That the ring is faulted, and the watch over its memory.
//! - The lock that everybody waits for. A vring's own is not fair: a busy worker would keep a
//!   front-end out. It is taken once for a batch ([`Ring::serve`]), and nobody ever waits for it. A
//!   worker that panics meanwhile poisons it; whoever comes next panics, too, which is caught, and
//!   ends a connection that ends anyway.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};
use std::sync::{Arc, MutexGuard, PoisonError};

use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Error as QueueError, QueueT};
use vm_memory::{Bytes, GuestAddress};

use crate::backend::AddressSpace;
use crate::request::Table;
use crate::sigbus::Loss;
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
    /// Memory of the guest is lost.
    #[error(transparent)]
    Lost(#[from] Loss),
}

/// A ring, and what its front-end said of it.
pub struct Ring {
    vring: VringMutex<AddressSpace>,
    /// The vring's memory: replaced while the ring is locked, so never in the midst of a batch.
    space: AddressSpace,
    /// The same, with the watch over it. After the others, so that it is watched while they have it.
    memory: Arc<Memory>,
    /// By which the driver is woken.
    call: Option<Notifier>,
    /// By which the front-end hears of a fault.
    error: Option<Notifier>,
    /// It cannot be trusted, until it is started anew.
    faulted: bool,
}

impl Ring {
    /// A ring that was not set up yet, and will have `size` entries at the most.
    ///
    /// # Errors
    /// When that is no size.
    pub fn new(size: u16) -> Result<Self, QueueError> {
        let memory = Arc::<Memory>::default();
        let space = memory.address_space();
        Ok(Ring {
            vring: VringMutex::new(space.clone(), size)?,
            space,
            memory,
            call: None,
            error: None,
            faulted: false,
        })
    }

    /// The ring, for a batch of chains.
    pub fn serve(&self) -> Serving<'_> {
        Serving {
            vring: self.vring.get_mut(),
            memory: &self.memory,
            faulted: self.faulted,
        }
    }

    /// Uses other memory from now on.
    pub fn use_memory(&mut self, memory: &Arc<Memory>) {
        let space = self.space.lock().unwrap_or_else(PoisonError::into_inner);
        space.replace((***memory).clone());
        self.memory = Arc::clone(memory);
    }

    /// Uses EVENT_IDX, or not.
    pub fn set_event_idx(&mut self, event_idx: bool) {
        self.vring.set_queue_event_idx(event_idx);
    }

    /// Sets the number of entries.
    ///
    /// # Errors
    /// When no ring has so many. (The vring's own call for this says nothing then.)
    pub fn set_size(&mut self, size: u16) -> Result<(), QueueError> {
        self.vring.get_mut().get_queue_mut().try_set_size(size)
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
        self.vring.set_queue_info(descriptors, available, used)?;
        let used = self.vring.queue_used_idx()?;
        self.vring.set_queue_next_used(used);
        Ok(())
    }

    /// Says which chain is the next to be taken.
    pub fn set_base(&mut self, base: u16) {
        self.vring.set_queue_next_avail(base);
    }

    /// Which chain would be the next.
    pub fn base(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    /// Does something with the descriptor that the ring is woken by, if there is one.
    pub fn with_kick(&self, act: impl FnOnce(&dyn AsRawFd)) {
        if let Some(kick) = self.vring.get_ref().get_kick() {
            act(kick);
        }
    }

    /// Starts the ring, with this descriptor to be woken by.
    pub fn start(&mut self, kick: OwnedFd) {
        self.vring.set_kick(Some(File::from(kick)));
        self.vring.set_queue_ready(true);
    }

    /// Stops the ring.
    pub fn stop(&mut self) {
        self.vring.set_queue_ready(false);
        self.vring.set_kick(None);
        self.faulted = false;
        self.call = None;
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
        self.vring.set_enabled(enabled);
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
}

/// A ring while a worker is at it.
pub struct Serving<'a> {
    vring: MutexGuard<'a, VringState<AddressSpace>>,
    memory: &'a Arc<Memory>,
    faulted: bool,
}

impl Serving<'_> {
    /// Whether the ring may be served now.
    pub fn is_running(&self) -> bool {
        self.vring.is_enabled() && self.vring.get_queue().ready() && !self.faulted
    }

    /// The memory that its chains are in.
    pub fn memory(&self) -> &Arc<Memory> {
        self.memory
    }

    /// Whether what was read and written in guest memory up to now was there.
    ///
    /// # Errors
    /// When it was not.
    pub fn intact(&self) -> Result<(), Fault> {
        // What was written before this line was written before the mark is looked at.
        fence(Ordering::SeqCst);
        self.memory.loss().map_or(Ok(()), |loss| Err(loss.into()))
    }

    /// Where the descriptors lie.
    pub fn table(&self) -> Table {
        let queue = self.vring.get_queue();
        Table {
            address: queue.desc_table(),
            len: u32::from(queue.size()),
        }
    }

    /// Number of chains that wait in the ring.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn pending(&self) -> Result<u16, Fault> {
        let queue = self.vring.get_queue();
        let available = queue
            .avail_idx(&***self.memory, Ordering::Acquire)
            .map_err(|_| Fault::Unmapped)?;
        self.intact()?;
        let (ahead, size) = (available.0.wrapping_sub(queue.next_avail()), queue.size());
        if ahead > size {
            return Err(Fault::Jumped { ahead, size });
        }
        Ok(ahead)
    }

    /// The next chain; only when [`Serving::pending`] said that there is one.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn next(&self) -> Result<u16, Fault> {
        let queue = self.vring.get_queue();
        let (next, size) = (queue.next_avail(), queue.size());
        // The ring of indexes follows two 16-bit fields. Neither sum can overflow for an address
        // that is in the guest's memory, and `load` refuses every other.
        let offset = 4 + 2 * u64::from(next % size);
        let head = self.load(queue.avail_ring().checked_add(offset))?;
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

    /// Completes the chain that [`Serving::next`] told; unless memory is gone, since then nothing can be
    /// believed of what was done.
    ///
    /// # Errors
    /// When it is not completed.
    pub fn complete(&mut self, head: u16, used: u32) -> Result<(), Fault> {
        self.intact()?;
        let queue = self.vring.get_queue_mut();
        let next = queue.next_avail();
        // Not the vring's own `add_used`, which looks for its memory anew each time.
        queue
            .add_used(&***self.memory, head, used)
            .map_err(|_| Fault::Unmapped)?;
        queue.set_next_avail(next.wrapping_add(1));
        Ok(())
    }

    /// Asks the driver not to notify: the ring is being watched.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn quiet(&mut self) -> Result<(), Fault> {
        let asked = self.vring.disable_notification();
        asked.map_err(|_| Fault::Unmapped)
    }

    /// Asks the driver to notify. True when something has arrived in the meantime.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn listen(&mut self) -> Result<bool, Fault> {
        let arrived = self.vring.enable_notification();
        self.intact()?;
        arrived.map_err(|_| Fault::Unmapped)
    }

    /// Whether the driver wants to hear of what was completed since the last call.
    ///
    /// # Errors
    /// When the ring cannot be trusted.
    pub fn wants_interrupt(&mut self) -> Result<bool, Fault> {
        let wanted = self.vring.needs_notification();
        if !wanted.map_err(|_| Fault::Unmapped)? {
            return Ok(false);
        }
        let queue = self.vring.get_queue();
        if queue.event_idx_enabled() {
            return Ok(true);
        }
        // `needs_notification` does not look at the older way of saying "do not interrupt".
        let flags = self.load(Some(queue.avail_ring()))?;
        Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}
