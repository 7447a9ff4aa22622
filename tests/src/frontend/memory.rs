// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The pretended guest's memory: two regions with a hole between them, both in one memfd.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use parking_lot::Mutex;
use rustix::fs::MemfdFlags;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

/// What the front-end says its own addresses are: guest addresses, moved by this much.
const USER_OFFSET: u64 = 0x7000_0000_0000;
/// Where the first region lies in the guest.
const LOW: u64 = 0x10_0000;
/// Where the second region begins; before it there is nothing.
const HIGH: u64 = 0x4000_0000;
/// Bytes of the second region.
const HIGH_BYTES: u64 = 0x10_0000;

/// The memory, shared with the daemon.
pub struct Memory {
    file: File,
    map: GuestMemoryMmap<()>,
    low_bytes: u64,
    next: Mutex<u64>,
}

impl Memory {
    /// Memory of `bytes`, and a little more behind a hole.
    ///
    /// # Errors
    ///
    /// When the system gives none.
    pub fn new(bytes: u64) -> Result<Arc<Self>> {
        let file = File::from(rustix::fs::memfd_create(
            "cram-test-guest",
            MemfdFlags::CLOEXEC,
        )?);
        file.set_len(bytes + HIGH_BYTES)?;
        let range = |address, bytes: u64, offset| -> Result<_> {
            let file = FileOffset::new(file.try_clone()?, offset);
            Ok((GuestAddress(address), usize::try_from(bytes)?, Some(file)))
        };
        let map = GuestMemoryMmap::from_ranges_with_files([
            range(LOW, bytes, 0)?,
            range(HIGH, HIGH_BYTES, bytes)?,
        ])?;
        Ok(Arc::new(Self {
            file,
            map,
            low_bytes: bytes,
            next: Mutex::new(LOW),
        }))
    }

    /// The regions, as the daemon is told of them.
    #[must_use]
    pub fn regions(&self) -> Vec<VhostUserMemoryRegionInfo> {
        let region = |address, bytes, offset| VhostUserMemoryRegionInfo {
            guest_phys_addr: address,
            memory_size: bytes,
            userspace_addr: Self::user_address(address),
            mmap_offset: offset,
            mmap_handle: self.file.as_raw_fd(),
        };
        vec![
            region(LOW, self.low_bytes, 0),
            region(HIGH, HIGH_BYTES, self.low_bytes),
        ]
    }

    /// A guest address as the front-end's own.
    #[must_use]
    pub fn user_address(address: u64) -> u64 {
        address + USER_OFFSET
    }

    /// An address in the hole.
    #[must_use]
    pub fn unmapped(&self) -> u64 {
        HIGH - 0x10_0000
    }

    /// Where the second region begins.
    #[must_use]
    pub fn behind_the_hole(&self) -> u64 {
        HIGH
    }

    /// The last `bytes` before the hole.
    #[must_use]
    pub fn before_the_hole(&self, bytes: u64) -> u64 {
        LOW + self.low_bytes - bytes
    }

    /// Cuts the file off, so that what is behind the hole is gone; or all of it. What this process
    /// has mapped of it is gone, too.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn take_away(&self, all: bool) -> Result<()> {
        Ok(self.file.set_len(if all { 0 } else { self.low_bytes })?)
    }

    /// Makes the file as long as it was: what was taken away is there again, empty.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn give_back(&self) -> Result<()> {
        Ok(self.file.set_len(self.low_bytes + HIGH_BYTES)?)
    }

    /// Room for `bytes`, aligned, filled with 0xa5.
    ///
    /// # Errors
    ///
    /// When the memory is used up; make it larger in the test.
    pub fn allocate(&self, bytes: usize, align: u64) -> Result<u64> {
        let address = self.reserve(bytes, align)?;
        self.write(address, &vec![0xa5; bytes])?;
        Ok(address)
    }

    /// The same, but nobody touches it: the memory has none of the host's pages.
    ///
    /// # Errors
    ///
    /// When the memory is used up; make it larger in the test.
    pub fn reserve(&self, bytes: usize, align: u64) -> Result<u64> {
        let mut next = self.next.lock();
        let address = next.next_multiple_of(align);
        let end = address + bytes as u64;
        ensure!(
            end <= LOW + self.low_bytes - 0x1_0000,
            "the pretended guest's memory is used up"
        );
        *next = end;
        Ok(address)
    }

    /// Where the next allocation will be, to come back to.
    #[must_use]
    pub fn mark(&self) -> u64 {
        *self.next.lock()
    }

    /// Frees everything that was allocated since `mark`.
    pub fn release(&self, mark: u64) {
        *self.next.lock() = mark;
    }

    /// Writes bytes.
    ///
    /// # Errors
    ///
    /// When the address is wrong.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.map
            .write_slice(bytes, GuestAddress(address))
            .with_context(|| format!("writing to {address:#x}"))
    }

    /// Reads bytes.
    ///
    /// # Errors
    ///
    /// When the address is wrong.
    pub fn read(&self, address: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read_into(address, &mut bytes)?;
        Ok(bytes)
    }

    /// Reads bytes into a buffer.
    ///
    /// # Errors
    ///
    /// When the address is wrong.
    pub fn read_into(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.map
            .read_slice(bytes, GuestAddress(address))
            .with_context(|| format!("reading from {address:#x}"))
    }

    /// Stores an index of a ring, after everything that was written before.
    ///
    /// # Errors
    ///
    /// When the address is wrong.
    pub fn store(&self, address: u64, value: u16) -> Result<()> {
        // SeqCst, as it is followed by loads of what the other side wrote.
        Ok(self
            .map
            .store(value.to_le(), GuestAddress(address), Ordering::SeqCst)?)
    }

    /// Loads an index of a ring, before everything that is read afterwards.
    ///
    /// # Errors
    ///
    /// When the address is wrong.
    pub fn load(&self, address: u64) -> Result<u16> {
        let value: u16 = self.map.load(GuestAddress(address), Ordering::SeqCst)?;
        Ok(u16::from_le(value))
    }
}
