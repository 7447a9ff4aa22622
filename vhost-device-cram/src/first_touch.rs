// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory of guests that nobody has touched yet, and what it costs the daemon to be the first.
//!
//! Linux charges a page of shared memory to the control group of whoever touches it first. A guest
//! that has pages delivered to where neither it nor its front-end was before would have its memory
//! charged to the daemon, which can be killed for that, and the pages of all guests with it. So each
//! guest has an [`Allowance`].
//!
//! What would be a first touch is known by userfaultfd, in the mode in which a fault on a page that is
//! not there is answered with SIGBUS. It knows of this process's accesses only, and pages that are
//! there (also on the host's swap) cost nothing. The [handler](crate::sigbus) has the page made here
//! as long as the allowance lasts.
//!
//! Files on disks and huge pages are not metered: the first are cache, which the kernel takes back
//! when the group is full, and the others are counted by a controller of their own.

use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{UserfaultfdFlags, userfaultfd};

const PAGE_BYTES: u64 = 4096;
/// From linux/userfaultfd.h.
const GROUP: u8 = 0xaa;
const API_VERSION: u64 = 0xaa;
/// Faults of user code only: no privilege is needed for these.
const USER_MODE_ONLY: u32 = 1;
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;
const FEATURE_SIGBUS: u64 = 1 << 7;
const MODE_MISSING: u64 = 1;
const ZEROPAGE_NUMBER: u8 = 4;

const API: Opcode = opcode::read_write::<Api>(GROUP, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(GROUP, 0);
const UNREGISTER: Opcode = opcode::read::<Place>(GROUP, 1);
const ZEROPAGE: Opcode = opcode::read_write::<Zeropage>(GROUP, ZEROPAGE_NUMBER);

/// What is done once the daemon is confined: requests for the descriptor of [`descriptor`].
pub(crate) const CALLS: [Opcode; 3] = [REGISTER, UNREGISTER, ZEROPAGE];

#[repr(C)]
struct Api {
    version: u64,
    features: u64,
    calls: u64,
}

#[repr(C)]
struct Place {
    begin: u64,
    bytes: u64,
}

#[repr(C)]
struct Register {
    place: Place,
    mode: u64,
    calls: u64,
}

#[repr(C)]
struct Zeropage {
    place: Place,
    mode: u64,
    done: i64,
}

/// How much of its memory a guest may have the daemon touch first, and has. For all of its connections:
/// memory stays charged for as long as its front-end has it, whoever is connected.
#[derive(Debug)]
pub struct Allowance {
    limit_pages: u64,
    touched_pages: AtomicU64,
}

impl Allowance {
    /// So many bytes, in whole pages.
    pub fn new(limit_bytes: u64) -> Self {
        Self {
            limit_pages: limit_bytes / PAGE_BYTES,
            touched_pages: AtomicU64::new(0),
        }
    }

    /// Bytes that the daemon touched first.
    pub fn touched_bytes(&self) -> u64 {
        self.touched_pages.load(Ordering::Relaxed) * PAGE_BYTES
    }

    /// The operator believes that none of it is there any more.
    pub fn clear(&self) {
        self.touched_pages.store(0, Ordering::Relaxed);
    }

    fn take(&self) -> bool {
        let more = |touched| (touched < self.limit_pages).then_some(touched + 1);
        let taken = self
            .touched_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more);
        taken.is_ok()
    }

    fn give_back(&self) {
        let less = |touched: u64| touched.checked_sub(1);
        let _ = self
            .touched_pages
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }
}

/// What a fault was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Touch {
    /// A first touch. The page is there now.
    Settled,
    /// There is no allowance left for it.
    Overdrawn,
    /// Not one: the memory is gone, or cannot be had.
    Other,
}

static DESCRIPTOR: OnceLock<Result<OwnedFd, Errno>> = OnceLock::new();

/// What first touches are known by, made when it is first asked for: that must be before the process is
/// confined.
///
/// # Errors
/// When the kernel has no userfaultfd, or this process may not use it.
pub(crate) fn descriptor() -> Result<BorrowedFd<'static>, Errno> {
    let made = DESCRIPTOR.get_or_init(open);
    made.as_ref().map(AsFd::as_fd).map_err(|errno| *errno)
}

/// The number of [`descriptor`], if there is one.
pub(crate) fn descriptor_number() -> Option<i32> {
    descriptor().ok().map(|fd| fd.as_raw_fd())
}

fn open() -> Result<OwnedFd, Errno> {
    let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    let flags = flags | UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    let fd = make(flags)?;
    let mut api = Api {
        version: API_VERSION,
        features: FEATURE_MISSING_SHMEM | FEATURE_SIGBUS,
        calls: 0,
    };
    request::<API, _>(fd.as_fd(), &mut api)?;
    Ok(fd)
}

#[allow(unsafe_code)]
fn make(flags: UserfaultfdFlags) -> Result<OwnedFd, Errno> {
    // SAFETY: it is registered for memory of guests only, which is accessed by raw pointers, and
    // changes under everybody's hands anyway.
    unsafe { userfaultfd(flags) }
}

/// Async-signal-safe: one system call, without the C library.
#[allow(unsafe_code)]
fn request<const CALL: Opcode, T>(fd: BorrowedFd<'_>, value: &mut T) -> Result<(), Errno> {
    // SAFETY: all callers pass the call's own structure.
    let request = unsafe { Updater::<CALL, T>::new(value) };
    // SAFETY: the calls of userfaultfd read and write their structure, and put zeroes where there was
    // nothing.
    unsafe { ioctl(fd, request) }
}

/// Has first touches of the memory at `range` answered with SIGBUS from now on, until it is unmapped.
/// False when it is of a kind that is not metered, and stays as it is.
pub(crate) fn meter(range: &Range<usize>) -> bool {
    let Ok(fd) = descriptor() else {
        return false;
    };
    let place = || Place {
        begin: range.start as u64,
        // The last page is mapped as a whole.
        bytes: (range.len() as u64).next_multiple_of(PAGE_BYTES),
    };
    let mut register = Register {
        place: place(),
        mode: MODE_MISSING,
        calls: 0,
    };
    if let Err(error) = request::<REGISTER, _>(fd, &mut register) {
        log::debug!("first touches of a region are not metered: {error}");
        return false;
    }
    let can_be_made = register.calls & (1 << ZEROPAGE_NUMBER) != 0;
    if !can_be_made {
        // Huge pages are made another way. What cannot be undone ends with the mapping.
        let _ = request::<UNREGISTER, _>(fd, &mut place());
    }
    can_be_made
}

/// Makes the page at `address`, which is in metered memory. Async-signal-safe.
pub(crate) fn touch(address: usize, allowance: &Allowance) -> Touch {
    let Some(Ok(fd)) = DESCRIPTOR.get() else {
        return Touch::Other;
    };
    if !allowance.take() {
        return Touch::Overdrawn;
    }
    let mut page = Zeropage {
        place: Place {
            begin: address as u64 & !(PAGE_BYTES - 1),
            bytes: PAGE_BYTES,
        },
        mode: 0,
        done: 0,
    };
    let made = request::<ZEROPAGE, _>(fd.as_fd(), &mut page);
    if made.is_ok() {
        return Touch::Settled;
    }
    allowance.give_back();
    match made {
        // Somebody else was faster, or the address space is being changed: the access is made again.
        Err(Errno::EXIST | Errno::AGAIN) => Touch::Settled,
        _ => Touch::Other,
    }
}
