// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The device, from its reset to a queue that is served; and chains on that queue, one at a time.

use std::sync::atomic::{Ordering, fence};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cram_abi::wire::{feature, state};
use cram_conformance::{Channel, Part, Reply};

use super::mapped::Buffers;
use super::pci::{self, Registers};

/// Registers of the common structure (VIRTIO 1.3, section 4.1.4.3).
pub(super) mod common {
    pub(in crate::raw) const DEVICE_FEATURE_SELECT: usize = 0;
    pub(in crate::raw) const DEVICE_FEATURE: usize = 4;
    pub(in crate::raw) const DRIVER_FEATURE_SELECT: usize = 8;
    pub(in crate::raw) const DRIVER_FEATURE: usize = 12;
    pub(in crate::raw) const STATUS: usize = 20;
    pub(in crate::raw) const QUEUE_SELECT: usize = 22;
    pub(in crate::raw) const QUEUE_SIZE: usize = 24;
    pub(in crate::raw) const QUEUE_ENABLE: usize = 28;
    pub(in crate::raw) const QUEUE_NOTIFY_OFFSET: usize = 30;
    pub(in crate::raw) const QUEUE_DESCRIPTORS: usize = 32;
    pub(in crate::raw) const QUEUE_DRIVER: usize = 40;
    pub(in crate::raw) const QUEUE_DEVICE: usize = 48;
}

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
pub(super) const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

const VERSION_1: u64 = 1 << 32;
const INDIRECT: u64 = 1 << 28;
/// Where the state is in the device's own configuration.
const STATE: usize = 28;

/// The first request queue.
pub(super) const QUEUE: u16 = 1;
pub(super) const SIZE: u16 = 64;
/// Where the parts of the queue are, in the first page of the buffers.
pub(super) const DESCRIPTORS: usize = 0;
pub(super) const AVAILABLE: usize = 1024;
pub(super) const USED: usize = 2048;
/// The second page: the table of the chain.
pub(super) const TABLE: usize = 4096;
/// The rest: what the chain consists of.
pub(super) const DATA: usize = 8192;
/// The largest request, and the largest answer, and a byte more each.
const PAGES: usize = 2 + 70 + 70;
const PAGE_BYTES: usize = 4096;
/// No guest has memory there.
pub(super) const NOWHERE: u64 = 1 << 45;

pub(super) const FLAG_NEXT: u16 = 1;
pub(super) const FLAG_WRITE: u16 = 2;
pub(super) const FLAG_INDIRECT: u16 = 4;
const UNTOUCHED: u8 = 0xa5;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Device {
    pub(super) registers: Registers,
    pub(super) buffers: Buffers,
    /// Where the queue is notified.
    doorbell: usize,
    pub(super) sent: u16,
}

impl Device {
    pub(crate) fn open() -> Result<Self> {
        let registers = pci::open()?;
        let buffers = Buffers::new(PAGES)?;
        let mut device = Self {
            registers,
            buffers,
            doorbell: 0,
            sent: 0,
        };
        device.begin()?;
        Ok(device)
    }

    /// From a reset, whatever was before, to a queue that is served.
    pub(super) fn begin(&mut self) -> Result<()> {
        self.reset()?;
        self.buffers
            .write_bytes(0, &vec![0; self.buffers.len().min(TABLE)]);
        self.sent = 0;
        self.negotiate()?;
        self.start_queue()?;
        self.set_status(DRIVER_OK);
        self.wait("a back-end", |device| {
            let at = device.registers.device.at + STATE;
            let found: u32 = device.registers.device.bar.read(at);
            found & state::READY != 0
        })
    }

    fn wait(&self, what: &str, ready: impl Fn(&Self) -> bool) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        while !ready(self) {
            ensure!(Instant::now() < until, "{what}: not in {PATIENCE:?}");
            thread::sleep(Duration::from_micros(200));
        }
        Ok(())
    }

    fn status(&self) -> u8 {
        let common = &self.registers.common;
        common.bar.read(common.at + common::STATUS)
    }

    pub(super) fn set_status(&self, bits: u8) {
        let common = &self.registers.common;
        let status = self.status() | bits;
        common.bar.write(common.at + common::STATUS, status);
    }

    pub(super) fn reset(&self) -> Result<()> {
        let common = &self.registers.common;
        common.bar.write(common.at + common::STATUS, 0_u8);
        self.wait("a reset", |device| device.status() == 0)
    }

    pub(super) fn negotiate(&self) -> Result<()> {
        let common = &self.registers.common;
        let (bar, at) = (&common.bar, common.at);
        self.set_status(ACKNOWLEDGE);
        self.set_status(DRIVER);
        let half = |select: u32| -> u64 {
            bar.write(at + common::DEVICE_FEATURE_SELECT, select);
            let bits: u32 = bar.read(at + common::DEVICE_FEATURE);
            u64::from(bits) << (32 * select)
        };
        let offered = half(0) | half(1);
        // All that the table asks for; no events, since nobody would take them.
        let wanted = VERSION_1 | INDIRECT | feature::ALL & !feature::EVENTS;
        ensure!(
            offered & wanted == wanted,
            "{offered:#x} is offered, {wanted:#x} wanted"
        );
        for select in [0_u32, 1] {
            bar.write(at + common::DRIVER_FEATURE_SELECT, select);
            let bits = u32::try_from(wanted >> (32 * select) & u64::from(u32::MAX))?;
            bar.write(at + common::DRIVER_FEATURE, bits);
        }
        self.set_status(FEATURES_OK);
        ensure!(
            self.status() & FEATURES_OK != 0,
            "the features were refused"
        );
        Ok(())
    }

    fn start_queue(&mut self) -> Result<()> {
        let places = [DESCRIPTORS, AVAILABLE, USED].map(|place| self.buffers.physical(place));
        self.start_queue_at(places)
    }

    /// Says that the queue's parts lie at these addresses, and has it served.
    pub(super) fn start_queue_at(&mut self, places: [u64; 3]) -> Result<()> {
        let common = &self.registers.common;
        let (bar, at) = (&common.bar, common.at);
        bar.write(at + common::QUEUE_SELECT, QUEUE);
        let most: u16 = bar.read(at + common::QUEUE_SIZE);
        ensure!(most >= SIZE, "a queue has {most} entries only");
        bar.write(at + common::QUEUE_SIZE, SIZE);
        let registers = [
            common::QUEUE_DESCRIPTORS,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ];
        for (register, physical) in registers.into_iter().zip(places) {
            // Halves, as every transport takes them.
            let [low, high] = [physical & u64::from(u32::MAX), physical >> 32];
            bar.write(at + register, u32::try_from(low)?);
            bar.write(at + register + 4, u32::try_from(high)?);
        }
        let offset: u16 = bar.read(at + common::QUEUE_NOTIFY_OFFSET);
        let notify = &self.registers.notify;
        self.doorbell = notify.at + usize::from(offset) * notify.stride;
        bar.write(at + common::QUEUE_ENABLE, 1_u16);
        Ok(())
    }

    pub(super) fn describe(&self, at: usize, descriptor: (u64, u32, u16, u16)) {
        let (address, len, flags, next) = descriptor;
        let numbers = self.buffers.numbers();
        numbers.write(at, address);
        numbers.write(at + 8, len);
        numbers.write(at + 12, flags);
        numbers.write(at + 14, next);
    }

    /// Makes the table that is laid out available, and waits until it was completed.
    fn send(&mut self, entries: usize) -> Result<u32> {
        let bytes = u32::try_from(entries * 16)?;
        let table = self.buffers.physical(TABLE);
        self.describe(DESCRIPTORS, (table, bytes, FLAG_INDIRECT, 0));
        let slot = usize::from(self.sent % SIZE);
        self.make_available(0);
        self.ring_doorbell(QUEUE);
        self.wait("a completion", |device| device.used() == device.sent)?;
        fence(Ordering::SeqCst);
        let entry = USED + 4 + 8 * slot;
        let numbers = self.buffers.numbers();
        let head: u32 = numbers.read(entry);
        ensure!(head == 0, "chain {head} was completed, which was not sent");
        Ok(numbers.read(entry + 4))
    }

    /// Makes a chain available, without a notification.
    pub(super) fn make_available(&mut self, head: u16) {
        let slot = usize::from(self.sent % SIZE);
        let next = self.sent.wrapping_add(1);
        self.buffers.numbers().write(AVAILABLE + 4 + 2 * slot, head);
        self.jump(next);
    }

    /// Says that so many chains were made available.
    pub(super) fn jump(&mut self, index: u16) {
        self.sent = index;
        fence(Ordering::SeqCst);
        self.buffers.numbers().write(AVAILABLE + 2, index);
        fence(Ordering::SeqCst);
    }

    /// Notifies the device of a queue, which may not be the one whose doorbell it is.
    pub(super) fn ring_doorbell(&self, queue: u16) {
        self.registers.notify.bar.write(self.doorbell, queue);
    }

    /// How many chains were completed.
    pub(super) fn used(&self) -> u16 {
        self.buffers.numbers().read(USED + 2)
    }

    /// Waits until so many are.
    pub(super) fn wait_used(&self, count: u16) -> Result<()> {
        self.wait("completions", |device| device.used() == count)
    }
}

impl Channel for Device {
    fn exchange(&mut self, parts: &[Part]) -> Result<Reply> {
        // Where each piece lies: no piece crosses the border of a page, since pages lie anywhere.
        let mut pieces: Vec<(u64, usize, bool)> = Vec::new();
        let mut writable = Vec::new();
        let mut at = DATA;
        for part in parts {
            let (bytes, len, is_writable) = match part {
                Part::Read(bytes) => (Some(bytes), bytes.len(), false),
                Part::Write(len) => (None, *len, true),
                Part::Nowhere(is_writable, len) => {
                    pieces.push((NOWHERE, *len, *is_writable));
                    continue;
                }
            };
            ensure!(at + len <= self.buffers.len(), "a chain is too long");
            match bytes {
                Some(bytes) => self.buffers.write_bytes(at, bytes),
                None => {
                    self.buffers.write_bytes(at, &vec![UNTOUCHED; len]);
                    writable.push((at, len));
                }
            }
            let end = at + len;
            loop {
                let take = (PAGE_BYTES - at % PAGE_BYTES).min(end - at);
                pieces.push((self.buffers.physical(at), take, is_writable));
                at += take;
                if at == end {
                    break;
                }
            }
        }
        let Some(last) = pieces.len().checked_sub(1) else {
            bail!("a chain of nothing");
        };
        for (number, (address, len, is_writable)) in pieces.iter().enumerate() {
            let flags = if *is_writable { FLAG_WRITE } else { 0 };
            let (flags, next) = if number == last {
                (flags, 0)
            } else {
                (flags | FLAG_NEXT, u16::try_from(number + 1)?)
            };
            let place = TABLE + 16 * number;
            ensure!(place < DATA, "a chain of too many pieces");
            self.describe(place, (*address, u32::try_from(*len)?, flags, next));
        }
        let used = self.send(pieces.len()).context("on the ring")?;
        self.buffers.expect_unmoved()?;
        let written = writable
            .iter()
            .flat_map(|(at, len)| self.buffers.read_bytes(*at, *len))
            .collect();
        Ok(Reply { used, written })
    }
}
