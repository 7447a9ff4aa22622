// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a front-end's messages mean, one after the other.
//!
//! A message that is refused ends the connection. One that is acknowledged is in force: no worker
//! uses what it replaced.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use cram_abi::wire::feature;
use vhost::vhost_user::{VhostUserProtocolFeatures as Protocol, VhostUserVirtioFeatures};
use vhost_user_backend::VhostUserBackend;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::channel::Received;
use super::memory::{Memory, MemoryError, REGIONS_MAX};
use super::message::{Addresses, Message, Region, Reply};
use super::notifier::{self, Notifier, NotifierError};
use crate::backend::Unsettled;
use crate::device::Device;
use crate::ring::Ring;
use crate::sigbus::Loss;

/// Why a message is refused. The text is for the log.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    /// Not as many descriptors as the message has.
    #[error("{found} descriptors came with message {code}")]
    Descriptors {
        /// The message's code.
        code: u32,
        /// How many there were.
        found: usize,
    },
    /// It needs a feature that was not negotiated.
    #[error("{0} needs a feature that was not negotiated")]
    NotNegotiated(&'static str),
    /// It may come once.
    #[error("the device is owned already")]
    Owned,
    /// What was not offered.
    #[error("features {0:#x} were not offered")]
    NotOffered(u64),
    /// Features that the device cannot do without.
    #[error("features {0:#x} cannot be used: VERSION_1 is needed, and EPHEMERAL for SHARED")]
    Features(u64),
    /// There is no such ring.
    #[error("there is no ring {0}")]
    NoRing(u32),
    /// A size that no ring has.
    #[error("ring {ring} cannot have {size} entries")]
    Size {
        /// The ring.
        ring: u32,
        /// The size.
        size: u32,
    },
    /// An index that no ring has.
    #[error("ring {ring} cannot begin at {index}")]
    Base {
        /// The ring.
        ring: u32,
        /// The index.
        index: u32,
    },
    /// It lies elsewhere, or is not aligned.
    #[error("ring {0} is not in the guest's memory")]
    Place(u32),
    /// A ring cannot be served without.
    #[error("ring {0} has no descriptor to be kicked by")]
    NoKick(u32),
    /// What a guest may not have as memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// What cannot wake anybody.
    #[error(transparent)]
    Notifier(#[from] NotifierError),
    /// It is not settled whose pages these are.
    #[error(transparent)]
    Unsettled(#[from] Unsettled),
    /// The device does not do it.
    #[error(transparent)]
    Device(#[from] io::Error),
    /// The guest's memory is lost.
    #[error(transparent)]
    Lost(Loss),
}

/// What the messages of one connection have come to.
pub struct Session<'a> {
    device: &'a Device,
    owned: bool,
    /// Protocol features in force.
    protocol: Protocol,
    /// Virtio features in force, if there are any.
    features: Option<u64>,
    memory: Arc<Memory>,
}

impl<'a> Session<'a> {
    /// A connection without a message yet.
    pub fn new(device: &'a Device) -> Self {
        Session {
            device,
            owned: false,
            protocol: Protocol::empty(),
            features: None,
            memory: Arc::new(Memory::with_allowance(device.first_touch())),
        }
    }

    /// Does what a message says. What is to be answered, and whether that was all.
    pub fn handle(&mut self, received: Received) -> (Option<Vec<u8>>, Result<(), Refusal>) {
        let header = received.header;
        let (message, fds) = (received.message, received.fds);
        let outcome = if message.descriptors().contains(&fds.len()) {
            self.act(message, fds)
        } else {
            Err(Refusal::Descriptors {
                code: header.code,
                found: fds.len(),
            })
        };
        // The memory may have gone while a ring was looked at: then that is the reason.
        let outcome = match self.memory.loss() {
            Some(loss) => Err(Refusal::Lost(loss)),
            None => outcome,
        };
        let wants_ack = header.needs_reply && self.protocol.contains(Protocol::REPLY_ACK);
        let (reply, verdict) = match outcome {
            Ok(None) => (wants_ack.then_some(Reply::Number(0)), Ok(())),
            Ok(reply) => (reply, Ok(())),
            Err(refusal) => (wants_ack.then_some(Reply::Number(1)), Err(refusal)),
        };
        (reply.map(|reply| reply.bytes(header.code)), verdict)
    }

    fn act(&mut self, message: Message, fds: Vec<OwnedFd>) -> Result<Option<Reply>, Refusal> {
        let mut fds = fds.into_iter();
        let done = match message {
            Message::GetFeatures => return number(self.device.features()),
            Message::GetProtocolFeatures => return number(self.device.protocol_features().bits()),
            Message::GetQueueNum => {
                self.needs(Protocol::MQ, "GET_QUEUE_NUM")?;
                return number(self.device.num_queues() as u64);
            }
            Message::GetMaxMemSlots => {
                self.needs(Protocol::CONFIGURE_MEM_SLOTS, "GET_MAX_MEM_SLOTS")?;
                return number(REGIONS_MAX as u64);
            }
            Message::GetConfig(offset, length) => {
                self.needs(Protocol::CONFIG, "GET_CONFIG")?;
                self.device.settle(None)?;
                let bytes = self.device.get_config(offset, length);
                return Ok(Some(Reply::Config(offset, bytes)));
            }
            Message::GetVringBase(ring) => {
                self.index(ring)?;
                self.device.stop_vring(ring)?;
                let base = self.change(ring, |state| Ok(state.base()))?;
                return Ok(Some(Reply::State(ring, base.into())));
            }
            Message::SetOwner if self.owned => Err(Refusal::Owned),
            Message::SetOwner => {
                self.owned = true;
                Ok(())
            }
            Message::ResetOwner => {
                self.owned = false;
                self.reset();
                Ok(())
            }
            Message::SetFeatures(features) => self.set_features(features),
            Message::SetProtocolFeatures(features) => self.set_protocol_features(features),
            Message::SetMemTable(regions) => self.set_memory(&regions, fds),
            Message::AddMemReg(region) => self.add_memory(region, fds.next()),
            Message::RemMemReg(region) => self.remove_memory(region),
            Message::SetVringNum(ring, size) => self.set_size(ring, size),
            Message::SetVringAddr(ring, addresses) => self.set_addresses(ring, addresses),
            Message::SetVringBase(ring, base) => self.set_base(ring, base),
            Message::SetVringKick(ring, _) => self.set_kick(ring, fds.next()),
            Message::SetVringCall(ring, _) => self.set_call(ring, fds.next()),
            Message::SetVringErr(ring, _) => self.set_error(ring, fds.next()),
            Message::SetVringEnable(ring, enable) => self.set_enabled(ring, enable),
            Message::SetBackendReqFd => self.set_channel(fds.next()),
            Message::SetConfig(offset, bytes) => self.set_config(offset, &bytes),
            Message::ResetDevice => {
                self.needs(Protocol::RESET_DEVICE, "RESET_DEVICE")?;
                self.reset();
                Ok(())
            }
        };
        done.map(|()| None)
    }

    fn needs(&self, feature: Protocol, message: &'static str) -> Result<(), Refusal> {
        if !self.protocol.contains(feature) {
            return Err(Refusal::NotNegotiated(message));
        }
        Ok(())
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        self.needs(Protocol::CONFIG, "SET_CONFIG")?;
        Ok(self.device.set_config(offset, bytes)?)
    }

    fn index(&self, ring: u32) -> Result<usize, Refusal> {
        usize::try_from(ring)
            .ok()
            .filter(|index| *index < self.device.num_queues())
            .ok_or(Refusal::NoRing(ring))
    }

    /// Changes a ring while no worker is at it, and has its worker look at it.
    fn change<T>(
        &self,
        ring: u32,
        change: impl FnOnce(&mut Ring) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        self.device.change_ring(self.index(ring)?, change)
    }

    fn set_features(&mut self, features: u64) -> Result<(), Refusal> {
        let not_offered = features & !self.device.features();
        if not_offered != 0 {
            return Err(Refusal::NotOffered(not_offered));
        }
        let is_shared = features & feature::SHARED != 0;
        if features & 1 << VIRTIO_F_VERSION_1 == 0
            || is_shared && features & feature::EPHEMERAL == 0
        {
            return Err(Refusal::Features(features));
        }
        self.features = Some(features);
        self.device.acked_features(features);
        // A front-end that knows no protocol features has no message for this.
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            for ring in 0..self.device.num_queues() {
                self.device.change_ring(ring, |state| {
                    state.set_enabled(true);
                    Ok::<_, Refusal>(())
                })?;
            }
        }
        Ok(())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<(), Refusal> {
        let offered = self.device.protocol_features();
        let not_offered = features & !offered.bits();
        if not_offered != 0 {
            return Err(Refusal::NotOffered(not_offered));
        }
        self.protocol = Protocol::from_bits_truncate(features);
        Ok(())
    }

    fn set_memory(
        &mut self,
        regions: &[Region],
        fds: impl Iterator<Item = OwnedFd>,
    ) -> Result<(), Refusal> {
        let none = self.memory.emptied();
        let memory = regions
            .iter()
            .zip(fds)
            .try_fold(none, |memory, (region, fd)| {
                memory.with(*region, File::from(fd))
            })?;
        self.use_memory(memory)
    }

    fn add_memory(&mut self, region: Region, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        self.needs(Protocol::CONFIGURE_MEM_SLOTS, "ADD_MEM_REG")?;
        if let Some(fd) = fd {
            let memory = self.memory.with(region, File::from(fd))?;
            self.use_memory(memory)?;
        }
        Ok(())
    }

    fn remove_memory(&mut self, region: Region) -> Result<(), Refusal> {
        self.needs(Protocol::CONFIGURE_MEM_SLOTS, "REM_MEM_REG")?;
        let memory = self.memory.without(region)?;
        self.use_memory(memory)
    }

    /// From now on; afterwards no worker has the memory of before.
    fn use_memory(&mut self, memory: Memory) -> Result<(), Refusal> {
        self.memory = Arc::new(memory);
        self.device.describe_memory(&self.memory);
        Ok(self.device.update_memory(self.memory.address_space())?)
    }

    fn set_size(&self, ring: u32, size: u32) -> Result<(), Refusal> {
        self.change(ring, |state| {
            let size = u16::try_from(size).map_err(|_| Refusal::Size { ring, size })?;
            let refused = Refusal::Size {
                ring,
                size: size.into(),
            };
            state.set_size(size).map_err(|_| refused)
        })
    }

    fn set_addresses(&self, ring: u32, addresses: Addresses) -> Result<(), Refusal> {
        let guest = |user| self.memory.guest_address(user);
        let places = guest(addresses.descriptors)
            .zip(guest(addresses.available))
            .zip(guest(addresses.used));
        let ((descriptors, available), used) = places.ok_or(Refusal::Place(ring))?;
        self.change(ring, |state| {
            let set = state.set_addresses(descriptors, available, used);
            set.map_err(|_| Refusal::Place(ring))
        })
    }

    fn set_base(&self, ring: u32, base: u32) -> Result<(), Refusal> {
        let index = u16::try_from(base).map_err(|_| Refusal::Base { ring, index: base })?;
        self.change(ring, |state| {
            state.set_base(index);
            Ok(())
        })
    }

    fn set_kick(&mut self, ring: u32, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        let index = self.index(ring)?;
        self.device.settle(None)?;
        let fd = fd.ok_or(Refusal::NoKick(ring))?;
        notifier::check(std::os::fd::AsFd::as_fd(&fd))?;
        Ok(self.device.start_ring(index, fd)?)
    }

    fn set_call(&self, ring: u32, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        let call = fd.map(Notifier::new).transpose()?;
        self.change(ring, |state| {
            state.set_call(call);
            Ok(())
        })
    }

    fn set_error(&self, ring: u32, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        let error = fd.map(Notifier::new).transpose()?;
        self.change(ring, |state| {
            state.set_error(error);
            Ok(())
        })
    }

    fn set_enabled(&self, ring: u32, enabled: bool) -> Result<(), Refusal> {
        let features = self.features.unwrap_or_default();
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() == 0 {
            return Err(Refusal::NotNegotiated("SET_VRING_ENABLE"));
        }
        self.change(ring, |state| {
            state.set_enabled(enabled);
            Ok(())
        })
    }

    fn set_channel(&self, fd: Option<OwnedFd>) -> Result<(), Refusal> {
        self.needs(Protocol::BACKEND_REQ, "SET_BACKEND_REQ_FD")?;
        if let Some(fd) = fd {
            self.device.set_backend_channel(fd);
        }
        Ok(())
    }

    /// Back to the beginning, but for the memory and the protocol features.
    fn reset(&mut self) {
        self.features = None;
        self.device.reset_device();
    }
}

#[allow(clippy::unnecessary_wraps, reason = "as all other answers")]
fn number(number: u64) -> Result<Option<Reply>, Refusal> {
    Ok(Some(Reply::Number(number)))
}
