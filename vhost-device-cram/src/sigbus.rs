// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Guest memory that goes away under the daemon.
//!
//! A front-end hands over a file as its guest's memory. Whoever has that file can cut it short at
//! any time, the file system beneath may be full, the pool of huge pages empty, and the host's memory
//! can break; then the next access to what was there is answered with SIGBUS, which would end the
//! daemon, and with it the pages of all guests. So SIGBUS is handled where a guest's memory is
//! [watched](watch), and nowhere else: the connection's memory is marked as lost, and then empty memory
//! takes the place of the whole region. The mark is set first, so that whoever has read such zeroes
//! finds it when he looks afterwards. Nobody may believe, complete or answer anything once it is there;
//! the connection ends, and the front-end maps anew.
//!
//! The same signal tells of memory that nobody has touched yet ([`first_touch`]), which is made
//! as long as the guest's allowance lasts, and treated as lost afterwards.
//!
//! When it is anything else that is gone, the store's memory or the heap, there is nothing to be
//! saved, and the signal does what it always did.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};
use std::sync::{Arc, OnceLock};

use libc::{c_int, c_void, siginfo_t};
use parking_lot::Mutex;
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmm_sys_util::signal::register_signal_handler;

use crate::first_touch::{self, Allowance, Touch};

/// Sizes of the host's pages, small and huge: what a mapping can be cut at depends on the file.
const PAGE_BYTES: [usize; 3] = [4 << 10, 2 << 20, 1 << 30];
/// Regions of all guests together. Half of the mappings that a process may have (65,530 usually),
/// so that front-ends with many regions use up those before the others.
const WATCHED_MAX: usize = 1 << 15;

/// Why a connection's memory cannot be believed any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Loss {
    /// It was taken away, or broke.
    #[error("part of the guest's memory is gone")]
    Gone,
    /// The guest's allowance is used up.
    #[error(
        "the guest has the daemon touch more memory before it does itself than --first-touch-limit allows"
    )]
    Overdrawn,
}

/// What became of a connection's memory.
#[derive(Debug, Default)]
pub struct Fate {
    lost: AtomicBool,
    /// Set before the memory is lost for that reason.
    overdrawn: AtomicBool,
    /// What the guest may have the daemon touch first; all of it when not given.
    allowance: Option<Arc<Allowance>>,
}

impl Fate {
    /// That of memory of which the daemon touches so much first.
    pub fn with_allowance(allowance: Arc<Allowance>) -> Self {
        Self {
            allowance: Some(allowance),
            ..Self::default()
        }
    }

    /// Whether some of the memory is lost, as of now. Once it is, it stays so.
    pub fn is_lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Why, if it is.
    pub fn loss(&self) -> Option<Loss> {
        if !self.lost.load(Ordering::Acquire) {
            None
        } else if self.overdrawn.load(Ordering::Relaxed) {
            Some(Loss::Overdrawn)
        } else {
            Some(Loss::Gone)
        }
    }

    fn touch(&self, address: usize) -> Touch {
        let allowance = self.allowance.as_deref();
        allowance.map_or(Touch::Other, |allowance| {
            first_touch::touch(address, allowance)
        })
    }
}

/// A place in the table that the handler looks at.
struct Slot {
    /// Odd while the slot is being changed.
    version: AtomicUsize,
    begin: AtomicUsize,
    end: AtomicUsize,
    fate: AtomicPtr<Fate>,
    /// First touches are answered with the signal, too.
    metered: AtomicBool,
}

static SLOTS: [Slot; WATCHED_MAX] = [const {
    Slot {
        version: AtomicUsize::new(0),
        begin: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        fate: AtomicPtr::new(std::ptr::null_mut()),
        metered: AtomicBool::new(false),
    }
}; WATCHED_MAX];
/// Slots from here on were never used.
static SLOTS_USED: AtomicUsize = AtomicUsize::new(0);
/// Slots below that are free again.
static FREE: Mutex<Vec<usize>> = Mutex::new(Vec::new());

impl Slot {
    /// Only one thread at a time has the slot to change it.
    fn set(&self, range: Range<usize>, fate: *mut Fate, metered: bool) {
        self.version.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::Release);
        self.begin.store(range.start, Ordering::Relaxed);
        self.end.store(range.end, Ordering::Relaxed);
        self.fate.store(fate, Ordering::Relaxed);
        self.metered.store(metered, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    /// The region, if `address` is in it. A slot that changes meanwhile is not the one: a region that
    /// somebody accesses is watched for as long.
    fn covers(&self, address: usize) -> Option<Found> {
        let version = self.version.load(Ordering::Acquire);
        let range = self.begin.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed);
        let fate = self.fate.load(Ordering::Relaxed);
        let metered = self.metered.load(Ordering::Relaxed);
        fence(Ordering::Acquire);
        let is_stable =
            version.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == version;
        (is_stable && range.contains(&address) && !fate.is_null()).then_some(Found {
            range,
            fate,
            metered,
        })
    }
}

/// A region that the handler was looking for.
struct Found {
    range: Range<usize>,
    fate: *const Fate,
    metered: bool,
}

/// While it lives, the loss of memory in a region is survived. It must live at least as long as
/// anybody accesses the region.
#[derive(Debug)]
pub struct Watch {
    slot: usize,
    /// What the slot points to.
    _fate: Arc<Fate>,
}

/// Watches the memory at `range`, which is a mapping of its own: when some of it is gone, `fate` says
/// so, and then zeroes take the region's place. If there is an allowance for first touches, it counts
/// here.
///
/// # Errors
/// When the system does not take the handler, or too much is watched already.
pub fn watch(range: Range<usize>, fate: &Arc<Fate>) -> io::Result<Watch> {
    install()?;
    let mut free = FREE.lock();
    let slot = match free.pop() {
        Some(slot) => slot,
        None => {
            let next = SLOTS_USED.load(Ordering::Relaxed);
            if next >= WATCHED_MAX {
                return Err(io::Error::other(
                    "all guests together have too many regions of memory",
                ));
            }
            SLOTS_USED.store(next + 1, Ordering::Release);
            next
        }
    };
    drop(free);
    if let Some(place) = SLOTS.get(slot) {
        let metered = fate.allowance.is_some() && first_touch::meter(&range);
        place.set(range, Arc::as_ptr(fate).cast_mut(), metered);
    }
    Ok(Watch {
        slot,
        _fate: Arc::clone(fate),
    })
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(place) = SLOTS.get(self.slot) {
            place.set(0..0, std::ptr::null_mut(), false);
        }
        FREE.lock().push(self.slot);
    }
}

/// Handles SIGBUS from now on; watching does so, too.
///
/// # Errors
/// When the system does not take the handler.
pub fn install() -> io::Result<()> {
    /// What the system said, as an error's number.
    static INSTALLED: OnceLock<Result<(), i32>> = OnceLock::new();
    let install = || register_signal_handler(libc::SIGBUS, on_sigbus).map_err(|e| e.errno());
    INSTALLED
        .get_or_init(install)
        .map_err(io::Error::from_raw_os_error)
}

/// Calls nothing but what a signal handler may: atomics, and system calls that do not go through the
/// C library.
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
    let can_be_settled = match code {
        libc::BUS_ADRERR => settle(address, true),
        libc::BUS_MCEERR_AR => settle(address, false),
        _ => false,
    };
    if !can_be_settled {
        give_up();
    }
}

/// Makes the guest's memory at `address` if that `may_be_untouched` and is; or else marks it as lost,
/// and puts zeroes there. False when it is no guest's.
fn settle(address: usize, may_be_untouched: bool) -> bool {
    let used = SLOTS_USED.load(Ordering::Acquire).min(WATCHED_MAX);
    let slots = SLOTS.iter().take(used);
    let Some(found) = slots.filter_map(|slot| slot.covers(address)).next() else {
        return false;
    };
    // SAFETY: this thread was just accessing the region, so that its `Watch` lives, which keeps what
    // the slot points to.
    let fate = unsafe { &*found.fate };
    if may_be_untouched && found.metered {
        match fate.touch(address) {
            Touch::Settled => return true,
            Touch::Overdrawn => fate.overdrawn.store(true, Ordering::Relaxed),
            Touch::Other => (),
        }
    }
    fate.lost.store(true, Ordering::SeqCst);
    replace_all(&found.range) || replace_page(address)
}

/// Puts zeroes in the place of a whole region: however much of it goes away, that is one mapping.
fn replace_all(range: &Range<usize>) -> bool {
    replace(range.start, range.len()).is_ok()
}

/// The same for the one page that is gone; for hosts that do not promise memory without having it,
/// and so refuse a whole region.
fn replace_page(address: usize) -> bool {
    for bytes in PAGE_BYTES {
        match replace(address & !(bytes - 1), bytes) {
            Ok(()) => return true,
            // No page can be cut, so a size smaller than the mapping's own is refused as invalid.
            Err(Errno::INVAL) => (),
            // Nothing larger: what lies around may be anybody's.
            Err(_) => return false,
        }
    }
    false
}

fn replace(begin: usize, bytes: usize) -> Result<(), Errno> {
    // SAFETY: the range is a guest's memory that this process has mapped (a watched region, or the page
    // of it that was touched), of which nobody holds references, only raw pointers and volatile
    // accesses; and whoever uses it looks at the mark that was set before.
    let mapped = unsafe {
        mmap_anonymous(
            begin as *mut c_void,
            bytes,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE,
        )
    };
    mapped.map(|_| ())
}

/// Has the signal come again when the handler is left, and end the process; also one that somebody
/// sent, which would not come again by itself.
fn give_up() {
    // SAFETY: no handler of ours is involved any more, and signal() may be called in one.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    // SAFETY: it takes a number, and may be called in a handler.
    unsafe { libc::raise(libc::SIGBUS) };
}
