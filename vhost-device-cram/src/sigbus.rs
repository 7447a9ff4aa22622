// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that goes away under the daemon.
//!
//! A front-end hands over a file as its guest's memory. Whoever has that file can cut it short at
//! any time, and the host's memory can break; then the next access to what was there is answered
//! with SIGBUS, which would end the daemon, and with it the pages of all guests. So SIGBUS is
//! handled: empty memory takes the place of what is gone, and the thread that touched it remembers
//! that ([`take_lost`]). It is up to that thread not to believe what it read, and to serve the queue
//! no more. Nobody else notices.
//!
//! When it is the store's own memory that is gone there is nothing to be saved, and the signal does
//! what it always did.

#![allow(unsafe_code)]

use std::cell::Cell;
use std::io;
use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use libc::{c_int, c_void, siginfo_t};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmm_sys_util::signal::register_signal_handler;

/// Sizes of the host's pages, small and huge: what a mapping can be cut at depends on the file.
const PAGE_BYTES: [usize; 3] = [4 << 10, 2 << 20, 1 << 30];
/// As many stores as there can be in one process; more than one only in tests.
const STORES: usize = 64;

thread_local! {
    // Const, and without anything to drop: so a signal handler may use it.
    static LOST: Cell<bool> = const { Cell::new(false) };
}

/// Where stores are mapped, as beginning and end; both 0: none.
static STORE_BEGIN: [AtomicUsize; STORES] = [const { AtomicUsize::new(0) }; STORES];
static STORE_END: [AtomicUsize; STORES] = [const { AtomicUsize::new(0) }; STORES];

/// Whether this thread has touched memory that was gone since it last asked with [`take_lost`].
pub fn is_lost() -> bool {
    LOST.get()
}

/// The same, and forgets it.
pub fn take_lost() -> bool {
    LOST.replace(false)
}

/// While it lives, memory at these addresses is not replaced.
#[derive(Debug)]
pub struct StoreMapping(Option<usize>);

impl StoreMapping {
    /// Handles SIGBUS from now on, everywhere but in `mapping`.
    ///
    /// # Errors
    /// When the system does not take the handler.
    pub fn protect(mapping: Range<usize>) -> io::Result<Self> {
        let slot = STORE_BEGIN.iter().position(|begin| {
            begin
                .compare_exchange(0, mapping.start, Ordering::AcqRel, Ordering::Acquire)
                .is_ok()
        });
        if let Some(end) = slot.and_then(|slot| STORE_END.get(slot)) {
            end.store(mapping.end, Ordering::Release);
        }
        // Made before anything can fail, so that the slot is given back.
        let protected = Self(slot);
        install()?;
        Ok(protected)
    }
}

impl Drop for StoreMapping {
    fn drop(&mut self) {
        if let Some(slot) = self.0 {
            for edges in [&STORE_END, &STORE_BEGIN] {
                if let Some(edge) = edges.get(slot) {
                    edge.store(0, Ordering::Release);
                }
            }
        }
    }
}

fn install() -> io::Result<()> {
    /// What the system said, as an error's number.
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || register_signal_handler(libc::SIGBUS, on_sigbus).map_err(|e| e.errno());
    INSTALLED
        .get_or_init(install)
        .map_err(io::Error::from_raw_os_error)
}

/// Calls nothing but what a signal handler may: atomics, a thread's cell, and system calls that do
/// not go through the C library.
extern "C" fn on_sigbus(_signal: c_int, info: *mut siginfo_t, _context: *mut c_void) {
    // SAFETY: the handler was registered with SA_SIGINFO, so the kernel hands over a valid one.
    let info = unsafe { *info };
    let code = info.si_code;
    // SAFETY: for SIGBUS from the kernel this field is what the union holds, and for one that somebody
    // sent it is looked at only after `code` has told them apart.
    let address = unsafe { info.si_addr() } as usize;
    // An early warning of broken memory, which nobody has touched yet.
    if code == libc::BUS_MCEERR_AO {
        return;
    }
    let is_fault = code == libc::BUS_ADRERR || code == libc::BUS_MCEERR_AR;
    if is_fault && !is_in_store(address) && replace(address) {
        LOST.set(true);
    } else {
        give_up();
    }
}

fn is_in_store(address: usize) -> bool {
    STORE_BEGIN.iter().zip(&STORE_END).any(|(begin, end)| {
        (begin.load(Ordering::Acquire)..end.load(Ordering::Acquire)).contains(&address)
    })
}

/// Puts zeroes where nothing is any more.
fn replace(address: usize) -> bool {
    for bytes in PAGE_BYTES {
        let begin = address & !(bytes - 1);
        // SAFETY: `begin` lies in a mapping, or there would have been another signal, and not in a
        // store's. What else is mapped from a file is memory of guests (of which nobody holds
        // references, only raw pointers and volatile accesses) and the program itself, whose pages
        // would be no more usable than before. A page of that mapping's own size takes its place, so
        // nothing is replaced that is not gone: a smaller one is refused as invalid, since no page can
        // be cut, and only that lets a larger one be tried.
        let mapped = unsafe {
            mmap_anonymous(
                begin as *mut c_void,
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
            )
        };
        match mapped {
            Ok(_) => return true,
            Err(Errno::INVAL) => (),
            // Nothing larger: what lies around may be anybody's.
            Err(_) => return false,
        }
    }
    false
}

/// Has the signal come again when the handler is left, and end the process; also one that somebody
/// sent, which would not come again by itself.
fn give_up() {
    // SAFETY: no handler of ours is involved any more, and signal() may be called in one.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    // SAFETY: it takes a number, and may be called in a handler.
    unsafe { libc::raise(libc::SIGBUS) };
}
