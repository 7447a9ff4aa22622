// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Asking the processor to fetch memory that will be needed soon.
//!
//! A put touches three places that are in no cache: where its bytes go, the
//! header of the record that it replaces, and a set of the table of twins. Each
//! would cost as much as a fiftieth of the compression that comes in between. A
//! hint before it makes them free.

#![allow(unsafe_code)]

/// Bytes of a cache line.
pub(crate) const LINE_BYTES: usize = 64;

/// Has the line with this byte fetched, if the processor can. Any address will do: what cannot be
/// fetched is not.
#[inline]
pub(crate) fn prefetch(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a hint: nothing is read as far as the program can tell, whatever the address is.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}
