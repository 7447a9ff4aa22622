// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the region asks of the host.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::{NonNull, null_mut};

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, MsyncFlags, ProtFlags, madvise, mmap, msync, munmap};

/// Maps the first `len` bytes of a file.
pub(super) fn map(file: &OwnedFd, len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the kernel chooses the address, so no other mapping is touched.
    let base = unsafe {
        mmap(
            null_mut(),
            len,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::NORESERVE,
            file,
            0,
        )
    }?;
    Ok(NonNull::new(base.cast::<u8>()).ok_or(Errno::NOMEM)?)
}

/// Ends a mapping.
///
/// # Safety
/// It is one that [`map`] made, of that length, and nobody uses it any more.
pub(super) unsafe fn unmap(base: NonNull<u8>, len: usize) {
    // SAFETY: as the caller says.
    let _ = unsafe { munmap(base.as_ptr().cast(), len) };
}

/// Has the host give memory for a part of a mapping.
///
/// # Safety
/// The part lies in a mapping, and `at` bytes from the beginning of its file.
pub(super) unsafe fn populate(
    file: &OwnedFd,
    pointer: *mut u8,
    at: u64,
    len: usize,
) -> io::Result<()> {
    loop {
        // SAFETY: inside the mapping, as the caller says; populating changes no byte.
        match unsafe { madvise(pointer.cast(), len, Advice::LinuxPopulateWrite) } {
            Ok(()) => return Ok(()),
            Err(Errno::INTR | Errno::AGAIN) => (),
            // Linux before 5.14. Room in the file is what matters.
            Err(Errno::INVAL) => return allocate(file, at, len as u64),
            // So it is called when a touch would have raised SIGBUS (madvise(2)): no huge page, or no
            // room in the file system.
            Err(Errno::FAULT) => return Err(Errno::NOMEM.into()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn allocate(file: &OwnedFd, at: u64, len: u64) -> io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::KEEP_SIZE, at, len) {
            Err(Errno::INTR) => (),
            done => return Ok(done?),
        }
    }
}

/// Makes a hole in the file: that part of it has no memory any more, and reads as zeroes.
///
/// # Safety
/// `pointer` is where that part of the file is mapped, and nobody reads or writes it meanwhile.
pub(super) unsafe fn punch(
    file: &OwnedFd,
    _pointer: *mut u8,
    at: u64,
    len: usize,
) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    loop {
        match fallocate(file, flags, at, len as u64) {
            Err(Errno::INTR) => (),
            done => return Ok(done?),
        }
    }
}

/// Writes a part of a mapping to the disk that its file is on, and waits.
///
/// # Safety
/// The part lies in a mapping.
pub(super) unsafe fn sync(pointer: *mut u8, len: usize) -> io::Result<()> {
    // SAFETY: inside the mapping, as the caller says; no byte is changed.
    Ok(unsafe { msync(pointer.cast(), len, MsyncFlags::SYNC) }?)
}
