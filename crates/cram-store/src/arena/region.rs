// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory that the arena lives in: one shared mapping of a file.
//!
//! This module maps, and hands out pieces. What may be read or written when is
//! decided one floor up, in [`super`]: words are atomic and may be touched at
//! any time; bytes are plain memory, and whoever asks for them says why nobody
//! else writes there.

#![allow(unsafe_code)]

#[cfg_attr(miri, path = "region/heap.rs")]
mod host;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use rustix::io::Errno;

use crate::machine::prefetch::{LINE_BYTES, prefetch};

/// A mapped file. Offsets are in bytes from its beginning.
pub(crate) struct Region {
    base: NonNull<u8>,
    len: usize,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to the value and stays where it is until it is dropped; what is in it
// is reached through `&self` as atomics, or as bytes under the contracts of `bytes` and `bytes_mut`.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Maps the first `len` bytes of `file`, which must have that length. Nothing is read or
    /// written yet.
    pub(crate) fn map(file: OwnedFd, len: u64) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| Errno::NOMEM)?;
        let base = host::map(&file, len)?;
        Ok(Self { base, len, file })
    }

    /// So many zeroes, in no file that anybody could open.
    #[cfg(test)]
    pub(crate) fn for_tests(len: u64) -> Self {
        #[cfg(not(miri))]
        let file = {
            let flags = rustix::fs::MemfdFlags::CLOEXEC;
            let file = rustix::fs::memfd_create("test", flags).unwrap();
            rustix::fs::ftruncate(&file, len).unwrap();
            file
        };
        #[cfg(miri)]
        let file = std::fs::File::open("/dev/null").unwrap().into();
        Self::map(file, len).unwrap()
    }

    /// The addresses at which it is mapped.
    pub(crate) fn addresses(&self) -> std::ops::Range<usize> {
        let begin = self.base.addr().get();
        begin..begin + self.len
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Where `len` bytes from `at` on begin, which all are inside.
    fn pointer(&self, at: u64, len: usize) -> *mut u8 {
        let at = usize::try_from(at).unwrap_or(usize::MAX);
        assert!(
            at <= self.len && len <= self.len - at,
            "outside of the arena"
        );
        // SAFETY: `at` is at most `self.len`, the length of the mapping that `base` begins.
        unsafe { self.base.as_ptr().add(at) }
    }

    /// The word at `at`, a multiple of 8.
    pub(crate) fn word(&self, at: u64) -> &AtomicU64 {
        let pointer = self.pointer(at, size_of::<u64>()).cast::<u64>();
        assert!(pointer.is_aligned());
        // SAFETY: it is 8 bytes inside the mapping, which lives as long as `self`, and aligned.
        // Plain accesses through `bytes` or `bytes_mut` never overlap an atomic one in time: that
        // is part of their contracts.
        unsafe { AtomicU64::from_ptr(pointer) }
    }

    /// Has so many bytes fetched into the caches.
    pub(crate) fn prefetch(&self, at: u64, len: usize) {
        let first = self.pointer(at, len);
        for step in (0..len).step_by(LINE_BYTES) {
            prefetch(first.wrapping_add(step));
        }
    }

    /// Bytes, to be read.
    ///
    /// # Safety
    /// As long as the slice is used, nobody writes there, neither in this process nor elsewhere.
    pub(crate) unsafe fn bytes(&self, at: u64, len: usize) -> &[u8] {
        let pointer = self.pointer(at, len);
        // SAFETY: inside the mapping; unchanging, as the caller says.
        unsafe { std::slice::from_raw_parts(pointer, len) }
    }

    /// Bytes, to be written.
    ///
    /// # Safety
    /// As long as the slice is used, nobody else reads or writes there.
    #[allow(
        clippy::mut_from_ref,
        reason = "the region is shared memory; the contract says who may use which part"
    )]
    pub(crate) unsafe fn bytes_mut(&self, at: u64, len: usize) -> &mut [u8] {
        let pointer = self.pointer(at, len);
        // SAFETY: inside the mapping; the caller's alone, as the caller says.
        unsafe { std::slice::from_raw_parts_mut(pointer, len) }
    }

    /// Has the host give memory for these whole pages now, so that touching them cannot fail.
    ///
    /// Without this, a host without memory (or a file system without room) would only be noticed
    /// by the signal that kills whoever touches the page.
    pub(crate) fn populate(&self, at: u64, len: u64) -> io::Result<()> {
        let bytes = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let pointer = self.pointer(at, bytes);
        // SAFETY: that is inside the mapping, which begins where the file does.
        unsafe { host::populate(&self.file, pointer, at, bytes) }
    }

    /// Has the host write these whole pages to the disk that the file is on, if it is on one, and
    /// waits until that is done.
    pub(crate) fn sync(&self, at: u64, len: u64) -> io::Result<()> {
        let bytes = usize::try_from(len).map_err(|_| Errno::INVAL)?;
        let pointer = self.pointer(at, bytes);
        // SAFETY: that is inside the mapping.
        unsafe { host::sync(pointer, bytes) }
    }

    /// Bytes that are mapped.
    pub(crate) fn len_bytes(&self) -> u64 {
        self.len as u64
    }

    /// Gives these whole pages back to the host; they read as zeroes from now on. Nobody may have
    /// bytes of them. True when the host took them.
    pub(crate) fn punch(&self, at: u64, len: u64) -> bool {
        let Ok(bytes) = usize::try_from(len) else {
            return false;
        };
        let pointer = self.pointer(at, bytes);
        // SAFETY: inside the mapping, which begins where the file does. Words may be looked at
        // meanwhile, which is no harm to whoever made the hole; bytes nobody has, as the caller says.
        unsafe { host::punch(&self.file, pointer, at, bytes) }.is_ok()
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and every reference into it borrows `self`.
        unsafe { host::unmap(self.base, self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::Ordering::Relaxed;

    #[test]
    fn words_and_bytes_are_the_same_memory_and_a_hole_is_zero() {
        let region = Region::for_tests(64 << 10);
        region.populate(0, 64 << 10).unwrap();
        region.word(8192).store(0x0807_0605_0403_0201, Relaxed);
        // SAFETY: no other thread knows the region.
        let bytes = unsafe { region.bytes(8192, 8) };
        assert_eq!(bytes, [1, 2, 3, 4, 5, 6, 7, 8]);
        // SAFETY: likewise, and the slice above is used no more.
        let bytes = unsafe { region.bytes_mut(8192, 1) };
        bytes[0] = 9;
        assert_eq!(region.word(8192).load(Relaxed) & 0xff, 9);
        assert!(region.punch(8192, 4096));
        assert_eq!(region.word(8192).load(Relaxed), 0);
    }

    #[test]
    #[should_panic(expected = "outside of the arena")]
    fn nothing_outside_is_handed_out() {
        let region = Region::for_tests(4096);
        let _ = region.word(4096 - 4);
    }
}
