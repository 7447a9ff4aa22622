// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One split virtqueue, driven by hand.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::poll::PollContext;

use super::memory::Memory;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// One piece of a request's memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where it is.
    pub address: u64,
    /// How long it is.
    pub len: u32,
    /// Whether the device may write to it, or else read it.
    pub writable: bool,
}

/// A descriptor as it lies in memory, to be written with any content.
#[derive(Clone, Copy, Debug, Default)]
pub struct Descriptor {
    /// Address of the buffer, or of an indirect table.
    pub address: u64,
    /// Its length.
    pub len: u32,
    /// 1 next, 2 write, 4 indirect.
    pub flags: u16,
    /// The next descriptor.
    pub next: u16,
}

impl Descriptor {
    /// As it lies in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// How a ring is used.
#[derive(Clone, Copy, Debug)]
pub struct Manner {
    /// Entries.
    pub size: u16,
    /// Whether chains are put into indirect tables.
    pub indirect: bool,
    /// Whether notifications are suppressed by indexes.
    pub event_idx: bool,
}

/// A queue.
pub struct Ring {
    memory: Arc<Memory>,
    manner: Manner,
    descriptors: u64,
    available: u64,
    used: u64,
    free: Vec<u16>,
    /// Descriptors of each chain in flight, by its head; the head alone is not listed.
    chains: Vec<Option<Vec<u16>>>,
    in_flight: usize,
    next_available: u16,
    announced: u16,
    last_used: u16,
    is_watched: bool,
    kick: EventFd,
    call: EventFd,
    /// Watches `call`.
    bell: PollContext<u32>,
    /// Times that the daemon was notified.
    pub kicks: u64,
    /// Times that the daemon notified us.
    pub interrupts: u64,
}

impl Ring {
    /// A ring in `memory`.
    ///
    /// # Errors
    ///
    /// When there is no room.
    pub fn new(memory: &Arc<Memory>, manner: Manner) -> Result<Self> {
        let size = usize::from(manner.size);
        let ring = Self {
            memory: memory.clone(),
            manner,
            descriptors: memory.allocate(16 * size, 16)?,
            available: memory.allocate(6 + 2 * size, 2)?,
            used: memory.allocate(6 + 8 * size, 4)?,
            free: (0..manner.size).rev().collect(),
            chains: vec![None; size],
            in_flight: 0,
            next_available: 0,
            announced: 0,
            last_used: 0,
            is_watched: false,
            kick: EventFd::new(EFD_NONBLOCK)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            bell: PollContext::new()?,
            kicks: 0,
            interrupts: 0,
        };
        // All of them, as VIRTIO has it: a device may leave its event index alone until it was notified.
        memory.write(ring.available, &vec![0; 6 + 2 * size])?;
        memory.write(ring.used, &vec![0; 6 + 8 * size])?;
        ring.bell.add(&ring.call, 0)?;
        ring.want_interrupt()?;
        Ok(ring)
    }

    /// Addresses of descriptors, available ring and used ring.
    #[must_use]
    pub fn addresses(&self) -> (u64, u64, u64) {
        (self.descriptors, self.available, self.used)
    }

    /// Entries.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.manner.size
    }

    /// Where a back-end that is new to the ring begins: behind what was completed.
    ///
    /// # Errors
    ///
    /// When memory fails.
    pub fn base(&self) -> Result<u16> {
        self.memory.load(self.used + 2)
    }

    /// The notifiers: towards the daemon, and from it.
    #[must_use]
    pub fn notifiers(&self) -> (&EventFd, &EventFd) {
        (&self.kick, &self.call)
    }

    /// Makes a chain available, in the manner of the ring. The device is not notified yet.
    ///
    /// # Errors
    ///
    /// When the ring is full.
    pub fn submit(&mut self, pieces: &[Piece]) -> Result<u16> {
        ensure!(!pieces.is_empty(), "a chain has at least one descriptor");
        let head = if self.manner.indirect {
            let table = self.memory.allocate(16 * pieces.len(), 16)?;
            let mut bytes = vec![0; 16 * pieces.len()];
            Self::lay_out(&mut pieces.iter().copied(), &mut bytes);
            self.memory.write(table, &bytes)?;
            return self.submit_table(table, pieces.len());
        } else {
            let chain: Vec<u16> = pieces
                .iter()
                .map(|_| self.take_descriptor())
                .collect::<Result<_>>()?;
            for (k, piece) in pieces.iter().enumerate() {
                let next = chain.get(k + 1);
                let next_index = next.copied().unwrap_or(0);
                let descriptor = Self::descriptor_for(piece, next.is_none(), next_index);
                self.write_descriptor(chain[k], descriptor)?;
            }
            let head = chain[0];
            self.remember(head, chain);
            head
        };
        self.make_available(head)?;
        Ok(head)
    }

    /// Writes the descriptors of a chain into a table of its own: 16 bytes for each piece.
    pub fn lay_out(pieces: &mut dyn Iterator<Item = Piece>, table: &mut [u8]) {
        let mut entries = table.chunks_exact_mut(16).zip(1..).peekable();
        while let Some((entry, next)) = entries.next() {
            let Some(piece) = pieces.next() else { return };
            let last = entries.peek().is_none();
            let descriptor = Self::descriptor_for(&piece, last, if last { 0 } else { next });
            entry.copy_from_slice(&descriptor.to_bytes());
        }
    }

    /// Makes a chain available whose descriptors are in a table of their own.
    ///
    /// # Errors
    ///
    /// When the ring is full.
    pub fn submit_table(&mut self, table: u64, entries: usize) -> Result<u16> {
        let head = self.take_descriptor()?;
        let descriptor = Descriptor {
            address: table,
            len: u32::try_from(16 * entries)?,
            flags: INDIRECT,
            next: 0,
        };
        self.write_descriptor(head, descriptor)?;
        self.remember(head, Vec::new());
        self.make_available(head)?;
        Ok(head)
    }

    fn descriptor_for(piece: &Piece, last: bool, next: u16) -> Descriptor {
        Descriptor {
            address: piece.address,
            len: piece.len,
            flags: if piece.writable { WRITE } else { 0 } | if last { 0 } else { NEXT },
            next,
        }
    }

    fn remember(&mut self, head: u16, chain: Vec<u16>) {
        self.chains[usize::from(head)] = Some(chain);
        self.in_flight += 1;
    }

    fn take_descriptor(&mut self) -> Result<u16> {
        self.free.pop().context("the ring is full")
    }

    /// Writes a descriptor, with any content.
    ///
    /// # Errors
    ///
    /// When it is not in the table.
    pub fn write_descriptor(&self, index: u16, descriptor: Descriptor) -> Result<()> {
        let address = self.descriptors + 16 * u64::from(index);
        self.memory.write(address, &descriptor.to_bytes())
    }

    /// Takes a free descriptor, to be used by hand. It becomes free again when it is completed.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn reserve_head(&mut self) -> Result<u16> {
        let head = self.take_descriptor()?;
        self.remember(head, Vec::new());
        Ok(head)
    }

    /// Makes a descriptor available, whether it exists or not.
    ///
    /// # Errors
    ///
    /// When memory fails.
    pub fn make_available(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.next_available % self.manner.size);
        self.memory
            .write(self.available + 4 + 2 * slot, &head.to_le_bytes())?;
        self.next_available = self.next_available.wrapping_add(1);
        self.set_available_index(self.next_available)
    }

    /// Says how many chains were made available in all, whether it is true or not.
    ///
    /// # Errors
    ///
    /// When memory fails.
    pub fn set_available_index(&self, index: u16) -> Result<()> {
        self.memory.store(self.available + 2, index)
    }

    /// Notifies the device of what was made available since the last time, if it wants to know.
    ///
    /// # Errors
    ///
    /// When the notification fails.
    pub fn notify(&mut self) -> Result<bool> {
        // What was made available must be seen before we look whether a notification is wanted.
        fence(Ordering::SeqCst);
        let wanted = if self.manner.event_idx {
            let event = self
                .memory
                .load(self.used + 4 + 8 * u64::from(self.manner.size))?;
            let new = self.next_available;
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(self.announced)
        } else {
            self.memory.load(self.used)? & 1 == 0
        };
        self.announced = self.next_available;
        if wanted {
            self.notify_always()?;
        }
        Ok(wanted)
    }

    /// Notifies the device in any case.
    ///
    /// # Errors
    ///
    /// When the notification fails.
    pub fn notify_always(&mut self) -> Result<()> {
        self.kicks += 1;
        Ok(self.kick.write(1)?)
    }

    /// Whether the ring is watched, so that no interrupts are wanted.
    ///
    /// # Errors
    ///
    /// When memory fails.
    pub fn watch(&mut self, is_watched: bool) -> Result<()> {
        self.is_watched = is_watched;
        if self.manner.event_idx {
            // What is completed next does not pass this index for a whole round of 65,536.
            return self.store_event(self.last_used.wrapping_sub(u16::from(is_watched)));
        }
        self.memory.store(self.available, u16::from(is_watched))
    }

    fn store_event(&self, index: u16) -> Result<()> {
        let address = self.available + 4 + 2 * u64::from(self.manner.size);
        self.memory.store(address, index)
    }

    fn want_interrupt(&self) -> Result<()> {
        if self.manner.event_idx && !self.is_watched {
            self.store_event(self.last_used)?;
        }
        Ok(())
    }

    /// Number of chains that were made available and are not completed.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// The next completed chain, if there is one: its head, and the used length.
    ///
    /// # Errors
    ///
    /// When the device completed something that was not in flight.
    pub fn take_used(&mut self) -> Result<Option<(u16, u32)>> {
        if self.memory.load(self.used + 2)? == self.last_used {
            return Ok(None);
        }
        let slot = u64::from(self.last_used % self.manner.size);
        let mut bytes = [0; 8];
        self.memory
            .read_into(self.used + 4 + 8 * slot, &mut bytes)?;
        let word = |at: usize| {
            let mut word = [0; 4];
            word.copy_from_slice(&bytes[at..at + 4]);
            u32::from_le_bytes(word)
        };
        let head = u16::try_from(word(0)).context("the device completed an absurd chain")?;
        let chain = self
            .chains
            .get_mut(usize::from(head))
            .and_then(Option::take);
        let chain = chain.with_context(|| format!("chain {head} completed, not in flight"))?;
        self.in_flight -= 1;
        if chain.is_empty() {
            self.free.push(head);
        }
        self.free.extend(chain);
        self.last_used = self.last_used.wrapping_add(1);
        self.want_interrupt()?;
        Ok(Some((head, word(4))))
    }

    /// Waits for the next completed chain.
    ///
    /// # Errors
    ///
    /// When there is none in `limit`.
    pub fn wait_used(&mut self, limit: Duration) -> Result<(u16, u32)> {
        let until = Instant::now() + limit;
        loop {
            if let Some(used) = self.take_used()? {
                return Ok(used);
            }
            let Some(left) = until.checked_duration_since(Instant::now()) else {
                bail!("no completion in {limit:?}, {} in flight", self.in_flight);
            };
            self.wait_interrupt(left)?;
        }
    }

    /// The next completed chain, watching for it without a pause.
    ///
    /// # Errors
    ///
    /// When there is none in `limit`.
    pub fn watch_used(&mut self, limit: Duration) -> Result<(u16, u32)> {
        // A look at the clock costs as much as a look at the ring.
        const LOOKS: u32 = 1 << 16;
        let until = Instant::now() + limit;
        loop {
            for _ in 0..LOOKS {
                if let Some(used) = self.take_used()? {
                    return Ok(used);
                }
                std::hint::spin_loop();
            }
            if Instant::now() > until {
                bail!("no completion in {limit:?}, {} in flight", self.in_flight);
            }
        }
    }

    /// Waits for an interrupt. False when there is none in `limit`.
    ///
    /// # Errors
    ///
    /// When waiting fails.
    pub fn wait_interrupt(&mut self, limit: Duration) -> Result<bool> {
        let rang = self.bell.wait_timeout(limit)?.iter().next().is_some();
        if rang {
            self.interrupts += self.call.read()?;
        }
        Ok(rang)
    }
}
