// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Takes the place of `host.rs` where the host cannot be asked: under Miri, which sees to it that
//! the rest of the arena uses memory as it may. Files are not looked at.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;

use rustix::io::Errno;

fn layout(len: usize) -> io::Result<Layout> {
    Layout::from_size_align(len.max(1), 4096).map_err(|_| Errno::NOMEM.into())
}

/// Zeroes of that length.
pub(super) fn map(_file: &OwnedFd, len: usize) -> io::Result<NonNull<u8>> {
    // SAFETY: the size is not 0.
    let base = unsafe { alloc_zeroed(layout(len)?) };
    Ok(NonNull::new(base).ok_or(Errno::NOMEM)?)
}

/// Frees them.
///
/// # Safety
/// They are what [`map`] made, of that length, and nobody uses them any more.
pub(super) unsafe fn unmap(base: NonNull<u8>, len: usize) {
    if let Ok(layout) = layout(len) {
        // SAFETY: as the caller says.
        unsafe { dealloc(base.as_ptr(), layout) };
    }
}

/// They are there already.
///
/// # Safety
/// None needed: it is so for the other one.
pub(super) unsafe fn populate(
    _file: &OwnedFd,
    _pointer: *mut u8,
    _at: u64,
    _len: usize,
) -> io::Result<()> {
    Ok(())
}

/// Zeroes, once more.
///
/// # Safety
/// `pointer` and `len` are a part of what [`map`] made, and nobody reads or writes it meanwhile.
pub(super) unsafe fn punch(
    _file: &OwnedFd,
    pointer: *mut u8,
    _at: u64,
    len: usize,
) -> io::Result<()> {
    // SAFETY: as the caller says.
    unsafe { pointer.write_bytes(0, len) };
    Ok(())
}

/// There is no disk.
///
/// # Safety
/// None needed: it is so for the other one.
pub(super) unsafe fn sync(_pointer: *mut u8, _len: usize) -> io::Result<()> {
    Ok(())
}
