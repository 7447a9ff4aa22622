// SPDX-License-Identifier: GPL-2.0

//! The guest's own memory: what mm does for the host (include/linux/frontswap.h), wrapped.

use core::mem::MaybeUninit;
use kernel::bindings;

/// Free and total pages.
#[derive(Clone, Copy)]
pub(crate) struct Size {
    /// Pages that nobody uses.
    pub(crate) free: usize,
    /// Pages that there are.
    pub(crate) total: usize,
}

/// How much memory there is.
pub(crate) fn size() -> Size {
    let mut info = MaybeUninit::<bindings::sysinfo>::zeroed();
    // SAFETY: The pointer is valid; all zeroes is a `sysinfo`, and `si_meminfo` fills it.
    let info = unsafe {
        bindings::si_meminfo(info.as_mut_ptr());
        info.assume_init()
    };
    Size {
        free: info.freeram as usize,
        total: info.totalram as usize,
    }
}

/// Chooses whether the slot of a page that is mapped again is freed at once. Any context.
pub(crate) fn set_exclusive(exclusive: bool) {
    // SAFETY: May be called at any time.
    unsafe { bindings::frontswap_set_exclusive(exclusive) };
}

/// Frees the slots of pages that are in memory as well. Returns their number. May sleep.
pub(crate) fn drop_copies() -> usize {
    // SAFETY: All callers are in process context.
    unsafe { bindings::frontswap_drop_copies() }
}

/// Reclaims `pages` pages. Returns how many are free. May sleep.
pub(crate) fn shrink(pages: usize) -> usize {
    // SAFETY: All callers are in process context.
    unsafe { bindings::frontswap_shrink(pages) }
}

/// Takes `pages` pages back from the device, as far as there is free memory. Returns how many it
/// does not keep any more. May sleep.
pub(crate) fn bring_back(pages: usize) -> usize {
    // SAFETY: All callers are in process context.
    unsafe { bindings::frontswap_bring_back(pages) }
}

/// For how many nanoseconds since boot some task has waited for memory. May sleep.
pub(crate) fn stall_ns() -> u64 {
    // SAFETY: All callers are in process context.
    unsafe { bindings::frontswap_stall_ns() }
}
