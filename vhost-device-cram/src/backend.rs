// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device as a back-end of vhost-user: what a front-end's messages come to, in the terms of
//! `vhost_user_backend`.
//!
//! [`Session`](crate::vhost::session::Session) drives the device through [`VhostUserBackend`], and
//! the workers serve its rings through it. Two calls of that trait are left at their defaults.
//! `set_backend_req_fd` has a `Backend` that sends with calls that block, and that knows no
//! CONFIG_CHANGE ([`Device::set_backend_channel`] is ours). `exit_event` is for workers that read
//! their kicks (ours end by their bell, see [`worker`](crate::worker)).

use std::io;

use cram_abi::wire::CONFIG_SIZE;
use cram_store::StoreError;
use vhost::vhost_user::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringMutex};
use virtio_bindings::bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

use crate::client::{Instance, NO_INSTANCE};
use crate::device::{Device, FEATURES};

/// A guest's memory, in the form in which the trait has it.
pub type AddressSpace = GuestMemoryAtomic<GuestMemoryMmap<()>>;

/// Why it is not settled which virtual machine this is.
#[derive(Debug, thiserror::Error)]
pub enum Unsettled {
    /// The cookie comes too late, is another one than before, or is none.
    #[error("the front-end says too late, or twice, or wrongly, which virtual machine it has")]
    Instance,
    /// The pages of the virtual machine before cannot be dropped, and nobody else may have them.
    #[error("whose pages these are cannot be settled: {0}")]
    Store(#[from] StoreError),
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = VringMutex<AddressSpace>;

    fn num_queues(&self) -> usize {
        self.rings().len()
    }

    fn max_queue_size(&self) -> usize {
        self.guest().offer.queue_size.into()
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    /// Takes over what the driver accepted, and has all rings know of EVENT_IDX.
    fn acked_features(&self, features: u64) {
        self.keep_features(features);
        self.set_event_idx(features & (1 << VIRTIO_RING_F_EVENT_IDX) != 0);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    /// Stops all rings, and forgets what was negotiated. The memory stays.
    fn reset_device(&self) {
        self.keep_features(0);
        for (index, ring) in self.rings().iter().enumerate() {
            self.stop_ring(index);
            let mut ring = ring.lock();
            ring.set_enabled(false);
            ring.set_error(None);
        }
    }

    fn set_event_idx(&self, enabled: bool) {
        for ring in self.rings() {
            ring.lock().set_event_idx(enabled);
        }
        self.look();
    }

    /// Part of the configuration space; nothing where it has none.
    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest().config();
        let range = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(size).ok())
            .and_then(|(offset, size)| Some(offset..offset.checked_add(size)?));
        range
            .and_then(|range| config.as_bytes().get(range))
            .unwrap_or_default()
            .to_vec()
    }

    /// All that the guest sees of the configuration space is read-only: writes are ignored, as the
    /// protocol says. Behind that lies what it does not see.
    fn set_config(&self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        match instance(offset, bytes).map_err(io::Error::other)? {
            None => Ok(()),
            instance => self.settle(instance).map_err(io::Error::other),
        }
    }

    /// Uses the memory that was described last from now on: when this returns, nobody uses what was
    /// there before. Memory that nobody keeps watch over is refused.
    fn update_memory(&self, space: AddressSpace) -> io::Result<()> {
        let memory = self.described_memory();
        if !memory.is_in(&space) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        for ring in self.rings() {
            ring.lock().use_memory(&memory);
        }
        self.look();
        Ok(())
    }

    /// One bit for each queue of a worker.
    fn queues_per_thread(&self) -> Vec<u64> {
        let bits = |number| {
            let queues = self.queues_of(number).iter();
            queues.fold(0, |bits, queue| bits | 1u64 << queue)
        };
        (0..self.workers()).map(bits).collect()
    }

    /// Stops a ring: when this returns, nobody serves it.
    fn stop_vring(&self, index: u32) -> io::Result<()> {
        let index = usize::try_from(index).map_err(io::Error::other)?;
        self.stop_ring(index);
        Ok(())
    }

    /// Has worker `number` serve its rings. Whichever descriptor woke it, all of them are looked at;
    /// the rings are the device's own, whose locks are fair.
    fn handle_event(
        &self,
        _event: u16,
        _set: EventSet,
        _rings: &[Self::Vring],
        number: usize,
    ) -> io::Result<()> {
        self.serve(number);
        Ok(())
    }
}

/// The cookie that a write to the configuration space brings, if it is one to be looked at.
fn instance(offset: u32, bytes: &[u8]) -> Result<Option<Instance>, Unsettled> {
    let offset = usize::try_from(offset).map_err(|_| Unsettled::Instance)?;
    let end = offset.checked_add(bytes.len());
    if end.ok_or(Unsettled::Instance)? <= CONFIG_SIZE {
        return Ok(None);
    }
    let instance = bytes.try_into().map_err(|_| Unsettled::Instance)?;
    if offset != CONFIG_SIZE || instance == NO_INSTANCE {
        return Err(Unsettled::Instance);
    }
    Ok(Some(instance))
}
