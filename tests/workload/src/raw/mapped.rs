// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Memory that a device looks at too: its registers, and buffers of ours.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::ptr::{self, NonNull};

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous};

const PAGE_BYTES: usize = 4096;

/// A mapping that stays until the process ends. Everything in it is read and written by volatile
/// accesses of naturally aligned numbers.
pub(crate) struct Mapped {
    base: NonNull<u8>,
    len: usize,
}

/// What a register or a field of a ring may be.
pub(crate) trait Number: Copy {}
impl Number for u8 {}
impl Number for u16 {}
impl Number for u32 {}
impl Number for u64 {}

impl Mapped {
    /// The registers that a file of sysfs stands for.
    pub(crate) fn registers(path: &Path) -> Result<Self> {
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .with_context(|| format!("opening {}", path.display()))?;
        let len = usize::try_from(file.metadata()?.len())?;
        // SAFETY: A new mapping, at a place that the kernel chooses.
        let base = unsafe {
            mmap(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                &file,
                0,
            )
        };
        let base = base.with_context(|| format!("mapping {}", path.display()))?;
        let base = NonNull::new(base.cast()).context("mapped at 0")?;
        Ok(Self { base, len })
    }

    /// Zeroed memory that stays where it is.
    fn locked(pages: usize) -> Result<Self> {
        let len = pages * PAGE_BYTES;
        // SAFETY: A new mapping, at a place that the kernel chooses.
        let base = unsafe {
            mmap_anonymous(
                ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::POPULATE,
            )
        }
        .context("no memory")?;
        // SAFETY: The mapping was just made.
        unsafe { mlock(base, len) }.context("cannot lock memory")?;
        let base = NonNull::new(base.cast()).context("mapped at 0")?;
        Ok(Self { base, len })
    }

    fn place<N: Number>(&self, at: usize) -> *mut N {
        let end = at.checked_add(size_of::<N>());
        assert!(
            end.is_some_and(|end| end <= self.len) && at.is_multiple_of(align_of::<N>()),
            "{at:#x} is not in the mapping, or not aligned"
        );
        // SAFETY: Inside of the mapping, as was just made sure of.
        unsafe { self.base.as_ptr().add(at) }.cast()
    }

    pub(crate) fn read<N: Number>(&self, at: usize) -> N {
        // SAFETY: `place` is in the mapping and aligned, and any bytes are a number.
        unsafe { ptr::read_volatile(self.place(at)) }
    }

    pub(crate) fn write<N: Number>(&self, at: usize, number: N) {
        // SAFETY: As above.
        unsafe { ptr::write_volatile(self.place(at), number) }
    }
}

/// Buffers of which the device is told by their physical addresses.
pub(crate) struct Buffers {
    mapped: Mapped,
    /// The physical address of each page.
    frames: Vec<u64>,
}

impl Buffers {
    pub(crate) fn new(pages: usize) -> Result<Self> {
        let mapped = Mapped::locked(pages)?;
        let frames = frames_of(&mapped)?;
        Ok(Self { mapped, frames })
    }

    /// Fails when the kernel has moved a page, so that the device has been looking elsewhere.
    pub(crate) fn expect_unmoved(&self) -> Result<()> {
        ensure!(
            frames_of(&self.mapped)? == self.frames,
            "the kernel moved locked pages"
        );
        Ok(())
    }

    pub(crate) fn physical(&self, at: usize) -> u64 {
        let frame = self.frames.get(at / PAGE_BYTES).copied().unwrap_or(0);
        frame + (at % PAGE_BYTES) as u64
    }

    pub(crate) fn len(&self) -> usize {
        self.mapped.len
    }

    pub(crate) fn numbers(&self) -> &Mapped {
        &self.mapped
    }

    pub(crate) fn write_bytes(&self, at: usize, bytes: &[u8]) {
        for (at, byte) in (at..).zip(bytes) {
            self.mapped.write(at, *byte);
        }
    }

    pub(crate) fn read_bytes(&self, at: usize, len: usize) -> Vec<u8> {
        (at..at + len).map(|at| self.mapped.read(at)).collect()
    }
}

/// Physical addresses of the pages of a mapping (Documentation/admin-guide/mm/pagemap.rst).
fn frames_of(mapped: &Mapped) -> Result<Vec<u64>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    let pagemap = File::open("/proc/self/pagemap").context("no pagemap")?;
    let first = mapped.base.addr().get() / PAGE_BYTES;
    (first..first + mapped.len / PAGE_BYTES)
        .map(|page| {
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, page as u64 * 8)?;
            let entry = u64::from_le_bytes(entry);
            let frame = entry & FRAME;
            ensure!(entry & PRESENT != 0 && frame != 0, "a page has no address");
            Ok(frame * PAGE_BYTES as u64)
        })
        .collect()
}
