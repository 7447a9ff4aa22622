// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Taking chains from a ring, and completing them.
//!
//! The calls of `virtio_queue` that iterate a ring swallow errors; with a guest that moves the
//! available index at will that ends in a loop that never ends. So the ring is read here, and
//! every doubt is a [`Fault`]: the queue is then stopped, alone, until it is set up again.

use std::sync::atomic::Ordering;

use vhost_user_backend::{VringMutex, VringState, VringT};
use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryAtomic};

use crate::request::{Memory, Table};
use crate::sigbus;

/// A ring as vhost-user-backend keeps it.
pub type Vring = VringMutex<GuestMemoryAtomic<Memory>>;
/// The locked state of a [`Vring`].
pub type State = VringState<GuestMemoryAtomic<Memory>>;

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
    /// Memory of the guest was taken away, or broke, and something was just read there or written.
    #[error("part of the guest's memory is gone")]
    MemoryGone,
}

/// Whether what this thread read and wrote in guest memory since it last asked was there.
pub fn intact() -> Result<(), Fault> {
    if sigbus::take_lost() {
        Err(Fault::MemoryGone)
    } else {
        Ok(())
    }
}

/// Where the descriptors of `queue` lie.
pub fn table(queue: &Queue) -> Table {
    Table {
        address: queue.desc_table(),
        len: u32::from(queue.size()),
    }
}

/// Whether the ring may be served now.
pub fn is_running(state: &State) -> bool {
    state.is_enabled() && state.get_queue().ready()
}

/// Number of chains that wait in the ring.
pub fn pending(queue: &Queue, memory: &Memory) -> Result<u16, Fault> {
    let available = queue
        .avail_idx(memory, Ordering::Acquire)
        .map_err(|_| Fault::Unmapped)?;
    let ahead = available.0.wrapping_sub(queue.next_avail());
    if ahead > queue.size() {
        return Err(Fault::Jumped {
            ahead,
            size: queue.size(),
        });
    }
    Ok(ahead)
}

/// Takes the next chain; only when [`pending`] said that there is one.
pub fn take(queue: &mut Queue, memory: &Memory) -> Result<u16, Fault> {
    let (next, size) = (queue.next_avail(), queue.size());
    // The ring of indexes follows two 16-bit fields. Neither sum can overflow for an address
    // that is in the guest's memory, and `load` refuses every other.
    let offset = 4 + 2 * u64::from(next % size);
    let address = queue
        .avail_ring()
        .checked_add(offset)
        .ok_or(Fault::Unmapped)?;
    let head: u16 = memory
        .load(GuestAddress(address), Ordering::Relaxed)
        .map(u16::from_le)
        .map_err(|_| Fault::Unmapped)?;
    if head >= size {
        return Err(Fault::NoSuchDescriptor { head, size });
    }
    queue.set_next_avail(next.wrapping_add(1));
    Ok(head)
}

/// Completes a chain.
pub fn complete(queue: &mut Queue, memory: &Memory, head: u16, used: u32) -> Result<(), Fault> {
    queue
        .add_used(memory, head, used)
        .map_err(|_| Fault::Unmapped)
}

/// Asks the driver not to notify: the ring is being watched.
pub fn quiet(queue: &mut Queue, memory: &Memory) -> Result<(), Fault> {
    queue
        .disable_notification(memory)
        .map_err(|_| Fault::Unmapped)
}

/// Asks the driver to notify. True when something has arrived in the meantime.
pub fn listen(queue: &mut Queue, memory: &Memory) -> Result<bool, Fault> {
    queue
        .enable_notification(memory)
        .map_err(|_| Fault::Unmapped)
}

/// Whether the driver wants to hear of what was completed since the last call.
pub fn wants_interrupt(queue: &mut Queue, memory: &Memory) -> Result<bool, Fault> {
    if !queue
        .needs_notification(memory)
        .map_err(|_| Fault::Unmapped)?
    {
        return Ok(false);
    }
    if queue.event_idx_enabled() {
        return Ok(true);
    }
    // `needs_notification` does not look at the older way of saying "do not interrupt".
    let flags: u16 = memory
        .load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)
        .map(u16::from_le)
        .map_err(|_| Fault::Unmapped)?;
    Ok(u32::from(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}

/// Interrupts the driver. A front-end that gave a broken descriptor hears nothing, and has
/// nobody to blame but itself.
pub fn interrupt(vring: &Vring) {
    if let Err(error) = vring.signal_used_queue() {
        log::debug!("cannot notify the front-end: {error}");
    }
}
