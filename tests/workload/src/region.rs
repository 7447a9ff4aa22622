// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The memory under test: one anonymous mapping that may be swapped out, while
//! everything else in the process is locked.
//!
//! A page that the swap device lost raises SIGBUS when it is touched. The
//! handler notes the page as lost and puts an empty one there, so that the
//! reader goes on and can tell the harness exactly which pages were lost. All
//! access goes through [`Region::read`] and [`Region::write`], which copy whole
//! pages: no reference into the mapping ever exists.

use std::ffi::c_void;
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use anyhow::{Context, Result, bail};
use rustix::mm::{Advice, MapFlags, MlockAllFlags, ProtFlags};

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// One page's bytes.
pub(crate) type Page = [u8; PAGE];

// What the signal handler needs. Written once, before the handler is installed.
static BASE: AtomicUsize = AtomicUsize::new(0);
static BYTES: AtomicUsize = AtomicUsize::new(0);
static LOST: AtomicUsize = AtomicUsize::new(0);

/// Locks what the process has and will have. Pages come in as they are touched.
pub(crate) fn lock_process() -> Result<()> {
    rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)
        .context("cannot lock the process in memory")
}

/// The mapping. There is one in a process, and it lives as long as the process.
#[derive(Debug)]
pub(crate) struct Region {
    base: *mut u8,
    pages: usize,
    /// One entry per page: whether its contents were lost.
    lost: &'static [AtomicU8],
}

impl Region {
    /// Maps room for `pages` pages that the kernel may swap out.
    pub(crate) fn map(pages: usize) -> Result<Self> {
        let bytes = pages
            .checked_mul(PAGE)
            .filter(|&bytes| bytes > 0)
            .context("no pages to map")?;
        // SAFETY: a new anonymous mapping at an address of the kernel's choice touches no memory in use.
        let base = unsafe {
            rustix::mm::mmap_anonymous(
                ptr::null_mut(),
                bytes,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )
        }
        .context("cannot map the memory under test")?;
        // SAFETY: `base` and `bytes` are the mapping just made; unlocking changes no contents.
        unsafe { rustix::mm::munlock(base, bytes) }.context("cannot unlock the memory")?;
        let lost: Vec<AtomicU8> = (0..pages).map(|_| AtomicU8::new(0)).collect();
        Ok(Self {
            base: base.cast(),
            pages,
            lost: Vec::leak(lost),
        })
    }

    /// How many pages the region has.
    pub(crate) fn pages(&self) -> usize {
        self.pages
    }

    /// Where a page is mapped, for messages.
    pub(crate) fn address_of(&self, page: usize) -> usize {
        self.address(page) as usize
    }

    fn address(&self, page: usize) -> *mut u8 {
        assert!(page < self.pages, "page {page} of {}", self.pages);
        self.base.wrapping_add(page * PAGE)
    }

    /// Copies a page out. False when the page was lost, now or earlier.
    pub(crate) fn read(&self, page: usize, into: &mut Page) -> bool {
        let from = self.address(page);
        // SAFETY: `from` is a whole page of the mapping, `into` is private memory, and they cannot overlap.
        unsafe { ptr::copy_nonoverlapping(from, into.as_mut_ptr(), PAGE) };
        self.lost[page].load(Ordering::SeqCst) == 0
    }

    /// Copies a page in. A lost page is whole again.
    pub(crate) fn write(&self, page: usize, from: &Page) {
        let into = self.address(page);
        // SAFETY: `into` is a whole page of the mapping, `from` is private memory, and they cannot overlap.
        unsafe { ptr::copy_nonoverlapping(from.as_ptr(), into, PAGE) };
        self.lost[page].store(0, Ordering::SeqCst);
    }

    /// Reads one word of a page. None when the page was lost, now or earlier.
    pub(crate) fn read_word(&self, page: usize, word: usize) -> Option<u64> {
        let from = self.address(page).cast::<u64>().wrapping_add(word);
        assert!(word < PAGE / 8, "word {word} of a page");
        // SAFETY: `from` is an aligned word within a page of the mapping, which is always readable.
        let value = unsafe { from.read_volatile() };
        (self.lost[page].load(Ordering::SeqCst) == 0).then_some(value)
    }

    /// Writes one word of a page, and leaves the others as they are.
    pub(crate) fn write_word(&self, page: usize, word: usize, value: u64) {
        let into = self.address(page).cast::<u64>().wrapping_add(word);
        assert!(word < PAGE / 8, "word {word} of a page");
        // SAFETY: `into` is an aligned word within a page of the mapping, which is always writable.
        unsafe { into.write_volatile(value) };
    }

    /// Pages that are not in memory: swapped out, and not in the swap cache as well.
    pub(crate) fn away_pages(&self) -> Result<u64> {
        const AT_ONCE: usize = 4096;
        let mut is_there = [0_u8; AT_ONCE];
        let mut away = 0;
        for first in (0..self.pages).step_by(AT_ONCE) {
            let count = AT_ONCE.min(self.pages - first);
            let base = self.address(first).cast::<c_void>();
            // SAFETY: the range is whole pages of the mapping, and there is a byte for each of them.
            if unsafe { libc::mincore(base, count * PAGE, is_there.as_mut_ptr()) } != 0 {
                bail!("mincore: {}", std::io::Error::last_os_error());
            }
            let here = is_there[..count].iter().filter(|byte| **byte & 1 == 1);
            away += (count - here.count()) as u64;
        }
        Ok(away)
    }

    /// Asks the kernel to swap the whole region out.
    pub(crate) fn page_out(&self) -> Result<()> {
        let bytes = self.pages * PAGE;
        // SAFETY: the range is this region's own mapping; paging out keeps its contents.
        unsafe { rustix::mm::madvise(self.base.cast(), bytes, Advice::LinuxPageOut) }
            .context("MADV_PAGEOUT")
    }

    /// From now on a lost page is noted instead of killing the process.
    pub(crate) fn catch_lost_pages(&self) -> Result<()> {
        BASE.store(self.base as usize, Ordering::SeqCst);
        BYTES.store(self.pages * PAGE, Ordering::SeqCst);
        LOST.store(self.lost.as_ptr() as usize, Ordering::SeqCst);
        // SAFETY: all-zero bytes are a valid `sigaction` (no flags, empty mask).
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        action.sa_sigaction = on_sigbus as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        // SAFETY: `action` is fully set up, and its handler does nothing but async-signal-safe calls.
        if unsafe { libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()) } != 0 {
            bail!("cannot catch SIGBUS");
        }
        Ok(())
    }
}

extern "C" fn on_sigbus(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler installed with SA_SIGINFO.
    let info = unsafe { &*info };
    // SAFETY: a SIGBUS that the kernel raises carries an address.
    let address = unsafe { info.si_addr() } as usize;
    let offset = address.wrapping_sub(BASE.load(Ordering::SeqCst));
    if offset >= BYTES.load(Ordering::SeqCst) {
        // Not the region's: let the fault happen again and end the process.
        // SAFETY: setting a default disposition is async-signal-safe.
        unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
        return;
    }
    let table = LOST.load(Ordering::SeqCst) as *const AtomicU8;
    let entry = table.wrapping_add(offset / PAGE);
    // SAFETY: the table is leaked and has one entry for each page of the region.
    let seen = unsafe { &*entry }.swap(1, Ordering::SeqCst);
    let page = (address & !(PAGE - 1)) as *mut c_void;
    if seen == 0 {
        // Dropping the page drops its swap entry too: the next touch finds an empty page.
        // SAFETY: the page lies within the region, which nobody holds a reference into.
        unsafe { libc::madvise(page, PAGE, libc::MADV_DONTNEED) };
    } else {
        // It faulted again, so dropping did not help: map over it.
        // SAFETY: as above; MAP_FIXED replaces just this page.
        unsafe {
            libc::mmap(
                page,
                PAGE,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::MemfdFlags;

    #[test]
    fn pages_that_were_never_touched_are_away() {
        let region = Region::map(5000).unwrap();
        assert_eq!(region.away_pages().unwrap(), 5000);
        for page in [0, 1, 4095, 4096, 4999] {
            region.write(page, &[1; PAGE]);
        }
        assert_eq!(region.away_pages().unwrap(), 4995);
    }

    /// A page of an empty file stands in for one that the swap device lost: both raise SIGBUS.
    #[test]
    fn a_lost_page_is_noted_and_replaced() {
        let region = Region::map(4).unwrap();
        region.catch_lost_pages().unwrap();
        let mut page: Page = [7; PAGE];
        for index in 0..4 {
            region.write(index, &page);
        }
        let empty = rustix::fs::memfd_create("empty", MemfdFlags::CLOEXEC).unwrap();
        // SAFETY: the page belongs to the region, and nobody holds a reference into it.
        unsafe {
            rustix::mm::mmap(
                region.address(2).cast(),
                PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED,
                &empty,
                0,
            )
        }
        .unwrap();
        assert!(!region.read(2, &mut page));
        assert!(!region.read(2, &mut page), "lost stays lost");
        assert!(region.read(1, &mut page));
        assert_eq!(page, [7; PAGE]);
        assert_eq!(region.read_word(2, 511), None);
        region.write(2, &page);
        region.write_word(2, 511, 5);
        assert_eq!(region.read_word(2, 511), Some(5));
        region.write(2, &page);
        assert!(region.read(2, &mut page), "written anew it is whole");
        assert_eq!(page, [7; PAGE]);
    }
}
