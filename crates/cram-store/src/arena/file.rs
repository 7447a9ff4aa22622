// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The file that an arena is in: made, opened, recognised or refused.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    FlockOperation, MemfdFlags, SealFlags, SeekFrom as Whence, fcntl_add_seals, flock, fstat,
    fstatfs, ftruncate, memfd_create, seek,
};
use rustix::io::Errno;
use thiserror::Error;

use super::region::Region;
use super::span_header::{SPAN_HEADER_BYTES, SpanHeader, read_header};
use super::spans::Spans;
use super::superblock::{SUPERBLOCK_BYTES, Superblock, Unreadable};
use super::{Arena, Layout, Secret};
use crate::machine::budget::Budget;
use crate::machine::sync::Mutex;
use crate::machine::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use crate::spec::config::Backing;

/// Why an arena could not be opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ArenaError {
    /// The system refused something.
    #[error("{what} {}: {error}", path.display())]
    System {
        /// What was tried.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Another process has it open.
    #[error("{} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// Neither empty nor an arena. It is left as it is.
    #[error("{} is not an arena, and not empty; give another path, or remove it", .0.display())]
    Foreign(PathBuf),
    /// An arena of another version of the format.
    #[error(
        "{} has version {found} of the format, and this program reads version {}; \
         open it with the program that made it",
        path.display(), super::FORMAT_VERSION
    )]
    Version {
        /// The file.
        path: PathBuf,
        /// The version that it has.
        found: u32,
    },
    /// An arena whose first bytes are damaged beyond repair, or that was cut short.
    #[error("{} is damaged: {what}; put a copy in its place, or remove it", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// An arena that was opened, and what is to be done with it.
pub(crate) struct Opened {
    pub(crate) arena: Arena,
    pub(crate) generation: u64,
    /// The spans that were in use, and how many granules of each have memory; empty in a new arena.
    pub(crate) found: Vec<(SpanHeader, u32)>,
    /// Other spans that have memory.
    pub(crate) others: Vec<u32>,
    /// The machine was started anew since the file was closed: nothing is believed that is not
    /// verified.
    pub(crate) is_after_reboot: bool,
    /// The machine ended before the file was closed: what was written last may be missing from it,
    /// so all that was in it is given up.
    pub(crate) is_lost: bool,
}

const MEMORY_NAME: &str = "cram-arena";
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// Larger pages than this are no use as spans.
const HUGE_PAGE_BYTES_MAX: u64 = 32 << 20;

/// A file that is being opened, and how it is called in errors.
struct Candidate<'a> {
    file: OwnedFd,
    path: &'a Path,
}

impl Arena {
    /// Opens an arena, or makes one, of `layout` (or of larger spans, if the file system wants). An
    /// arena that was made for another capacity keeps its spans, and gets more if it needs them.
    pub(crate) fn open(
        backing: &Backing,
        layout: Layout,
        budget: Arc<Budget>,
    ) -> Result<Opened, ArenaError> {
        let candidate = Candidate::open(backing)?;
        let boot_id = boot_id();
        let (is_new, mut superblock) = match candidate.superblock()? {
            Some(found) => (false, found),
            None => (true, candidate.new_superblock(layout)?),
        };
        let before = (!is_new).then(|| superblock.clone());
        let layout = candidate.fit(&mut superblock, budget.capacity_bytes())?;
        let is_after_reboot = !is_new && superblock.boot_id != boot_id;
        let is_lost = is_after_reboot && !superblock.is_clean;
        if is_lost {
            superblock = Superblock {
                span_shift: superblock.span_shift,
                granule_shift: superblock.granule_shift,
                len_bytes: superblock.len_bytes,
                ..candidate.new_superblock(layout)?
            };
        }
        superblock.boot_id = boot_id;
        superblock.is_clean = false;
        let huge_page_bytes = huge_page_bytes(&candidate.file);
        let region = candidate.map(layout)?;
        let salt = superblock.secret.number(0);
        // (Of what is lost no header agrees with the new secret.)
        let (found, others) = if is_new {
            (Vec::new(), Vec::new())
        } else {
            find_spans(&region, layout, salt)
        };
        let spans = Spans::new(region, layout, huge_page_bytes, budget, salt);
        spans.recall(&found);
        Ok(Opened {
            generation: superblock.generation,
            is_lost,
            others,
            arena: Self {
                superblock: superblock.clone(),
                found: before,
                is_committed: AtomicBool::new(false),
                flipped: Mutex::default(),
                path: match backing {
                    Backing::Memory => None,
                    Backing::File(path) => Some(path.clone()),
                },
                layout,
                salt,
                secret: superblock.secret,
                spans,
                damaged: AtomicU64::new(0),
                corrected: AtomicU64::new(0),
            },
            found,
            is_after_reboot,
        })
    }
}

impl<'a> Candidate<'a> {
    /// Opens the file, or makes it, for this process alone.
    fn open(backing: &'a Backing) -> Result<Self, ArenaError> {
        let (file, path) = match backing {
            Backing::Memory => (memory_file(), Path::new(MEMORY_NAME)),
            Backing::File(path) => (named_file(path), path.as_path()),
        };
        let file = file.map_err(|error| failure("cannot open", path, error))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { file, path }),
            Err(Errno::WOULDBLOCK) => Err(ArenaError::InUse(path.to_owned())),
            Err(error) => Err(failure("cannot lock", path, error.into())),
        }
    }

    fn failed(&self, what: &'static str) -> impl FnOnce(io::Error) -> ArenaError + use<> {
        let path = self.path.to_owned();
        move |error| failure(what, &path, error)
    }

    fn damaged(&self, what: &'static str) -> ArenaError {
        ArenaError::Damaged {
            path: self.path.to_owned(),
            what,
        }
    }

    /// What the file's first bytes say; `None` when nothing was ever written to it.
    fn superblock(&self) -> Result<Option<Superblock>, ArenaError> {
        let read = read_superblock(&self.file).map_err(self.failed("cannot read"))?;
        let found = match read {
            Ok(found) => found,
            Err(Unreadable::Blank) => return Ok(None),
            Err(Unreadable::Foreign) => return Err(ArenaError::Foreign(self.path.to_owned())),
            Err(Unreadable::Version(found)) => {
                let path = self.path.to_owned();
                return Err(ArenaError::Version { path, found });
            }
            Err(Unreadable::Damaged) => return Err(self.damaged("its first bytes say nothing")),
        };
        let about = fstat(&self.file).map_err(|error| self.failed("cannot stat")(error.into()))?;
        if u64::try_from(about.st_size).unwrap_or(0) < found.len_bytes {
            return Err(self.damaged("it was cut short"));
        }
        Ok(Some(found))
    }

    /// For an arena that is made now.
    fn new_superblock(&self, layout: Layout) -> Result<Superblock, ArenaError> {
        let mut bytes = [0; Secret::BYTES + 8];
        random(&mut bytes).map_err(self.failed("cannot make a secret for"))?;
        let (secret, generation) = bytes.split_at(Secret::BYTES);
        let mut own = [0; Secret::BYTES];
        own.copy_from_slice(secret);
        let page_bytes = huge_page_bytes(&self.file).unwrap_or(1);
        Ok(Superblock {
            span_shift: layout.span_shift.max(page_bytes.ilog2()),
            granule_shift: layout.granule_shift,
            len_bytes: 0,
            generation: u64::from_le_bytes(generation.try_into().unwrap_or([1; 8])).max(1),
            boot_id: [0; 16],
            is_clean: false,
            secret: Secret::new(own),
        })
    }

    /// Makes the file long enough for a capacity. A file that is longer stays so: the budget sees to
    /// it that it is not filled.
    fn fit(&self, superblock: &mut Superblock, capacity_bytes: u64) -> Result<Layout, ArenaError> {
        let mut layout = fitted(
            Layout {
                span_shift: superblock.span_shift,
                granule_shift: superblock.granule_shift,
                spans: 0,
            },
            capacity_bytes,
        );
        let found = u32::try_from(superblock.len_bytes >> superblock.span_shift);
        layout.spans = layout.spans.max(found.unwrap_or(u32::MAX));
        if layout.len_bytes() >> layout.granule_shift > 1 << u32::BITS {
            return Err(self.damaged("it was made for a smaller capacity, and cannot grow so far"));
        }
        if layout.len_bytes() > superblock.len_bytes {
            let about =
                fstat(&self.file).map_err(|error| self.failed("cannot stat")(error.into()))?;
            if u64::try_from(about.st_size).unwrap_or(0) < layout.len_bytes() {
                ftruncate(&self.file, layout.len_bytes())
                    .map_err(|error| self.failed("cannot enlarge")(error.into()))?;
            }
            superblock.len_bytes = layout.len_bytes();
        }
        Ok(layout)
    }

    fn map(self, layout: Layout) -> Result<Region, ArenaError> {
        let (unmapped, unpopulated) = (self.failed("cannot map"), self.failed("no memory for"));
        let region = Region::map(self.file, layout.len_bytes()).map_err(unmapped)?;
        region.populate(0, SUPERBLOCK_BYTES).map_err(unpopulated)?;
        Ok(region)
    }
}

fn failure(what: &'static str, path: &Path, error: io::Error) -> ArenaError {
    let path = path.to_owned();
    ArenaError::System { what, path, error }
}

impl Arena {
    /// What was found is going to be used. Until then, nothing has been written to the file; nor is
    /// there when that fails.
    pub(crate) fn commit(&self) -> Result<(), ArenaError> {
        let region = self.spans.region();
        self.superblock.write(region);
        if let Some(path) = &self.path
            // Before anything else is written, and reaches the disk: the file is not closed any more.
            && let Err(error) = region.sync(0, SUPERBLOCK_BYTES)
        {
            if let Some(found) = &self.found {
                found.write(region);
            }
            return Err(failure("cannot write", path, error));
        }
        self.is_committed.store(true, Relaxed);
        let flipped = std::mem::take(&mut *self.flipped.lock());
        for place in flipped {
            // Corrects it.
            let _ = self.header(place);
        }
        Ok(())
    }

    /// Has everything written to the disk, and then says so.
    fn close(&self) {
        let region = self.spans.region();
        if self.path.is_none() || !self.is_committed.load(Relaxed) {
            return;
        }
        if region.sync(0, region.len_bytes()).is_err() {
            return;
        }
        let closed = Superblock {
            is_clean: true,
            ..self.superblock.clone()
        };
        closed.write(region);
        let _ = region.sync(0, SUPERBLOCK_BYTES);
    }
}

impl Drop for Arena {
    fn drop(&mut self) {
        self.close();
    }
}

/// The headers of all spans that have one, and how many granules of each have memory; and the other
/// spans that have memory.
fn find_spans(region: &Region, layout: Layout, salt: u64) -> (Vec<(SpanHeader, u32)>, Vec<u32>) {
    let mut data = Data::new(region.file(), layout);
    let (mut found, mut others) = (Vec::new(), Vec::new());
    for span in 1..layout.spans {
        let bytes = data.bytes_of(span);
        let header = (bytes >= SPAN_HEADER_BYTES as u64)
            .then(|| read_header(region, layout, span, salt))
            .flatten();
        match header {
            Some(header) => found.push((header, layout.granules_of(bytes))),
            None if bytes > 0 => others.push(span),
            None => (),
        }
    }
    (found, others)
}

/// Where a file has memory (or blocks), asked of the system from the beginning to the end. To look
/// at a hole through the mapping would have the host give memory for it.
struct Data<'a> {
    file: BorrowedFd<'a>,
    layout: Layout,
    /// The stretch of memory that was found last: it is asked for once, since the system goes
    /// through all of it to find its end.
    stretch: std::ops::Range<u64>,
}

impl<'a> Data<'a> {
    fn new(file: BorrowedFd<'a>, layout: Layout) -> Self {
        Self {
            file,
            layout,
            stretch: 0..0,
        }
    }

    /// For how many bytes from the beginning of a span on there is memory. Spans must be asked for
    /// in order.
    fn bytes_of(&mut self, span: u32) -> u64 {
        let (at, whole) = (self.layout.span_at(span), self.layout.span_bytes());
        if self.stretch.end <= at {
            self.stretch = self.next_stretch(at);
        }
        if self.stretch.contains(&at) {
            (self.stretch.end - at).min(whole)
        } else {
            0
        }
    }

    /// The first stretch of memory that ends behind `at`.
    fn next_stretch(&self, at: u64) -> std::ops::Range<u64> {
        let end = self.layout.len_bytes();
        match seek(self.file, Whence::Data(at)) {
            Ok(data) => data..seek(self.file, Whence::Hole(data)).unwrap_or(end),
            // Nothing but a hole.
            Err(Errno::NXIO) => end..end,
            // A file system that cannot tell: all of it, then.
            Err(_) => at..end,
        }
    }
}

/// The layout with as many spans as a capacity has room for, one for the superblock, and some that
/// make up for those that are sealed before they are full. (What has no memory costs nothing.)
pub(crate) fn fitted(layout: Layout, capacity_bytes: u64) -> Layout {
    let whole = (capacity_bytes >> layout.span_shift).max(1);
    let spans = whole + whole / 16 + 3;
    Layout {
        spans: u32::try_from(spans).unwrap_or(u32::MAX),
        ..layout
    }
}

fn memory_file() -> io::Result<OwnedFd> {
    let file = memfd_create(MEMORY_NAME, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    // Nobody can make it shorter under us.
    fcntl_add_seals(&file, SealFlags::SHRINK)?;
    Ok(file)
}

fn named_file(path: &Path) -> io::Result<OwnedFd> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false);
    let file = options.mode(0o600).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "not an ordinary file",
        ));
    }
    Ok(file.into())
}

/// Reads through the file, not the mapping: it may be shorter than it should be.
fn read_superblock(file: &OwnedFd) -> io::Result<Result<Superblock, Unreadable>> {
    let file = File::from(file.try_clone()?);
    let mut bytes = Vec::new();
    (&file).seek(SeekFrom::Start(0))?;
    (&file).take(SUPERBLOCK_BYTES).read_to_end(&mut bytes)?;
    if bytes.is_empty() {
        return Ok(Err(Unreadable::Blank));
    }
    let read = Superblock::read(&bytes);
    if read == Err(Unreadable::Blank) && !is_hole(&file)? {
        return Ok(Err(Unreadable::Foreign));
    }
    Ok(read)
}

/// Whether nothing was ever written to a file beyond where the superblock is: an arena whose maker
/// was killed before it was done. (What is shorter than any arena is somebody else's.)
fn is_hole(file: &File) -> io::Result<bool> {
    if file.metadata()?.len() <= SUPERBLOCK_BYTES {
        return Ok(false);
    }
    match seek(file.as_fd(), Whence::Data(SUPERBLOCK_BYTES)) {
        Err(Errno::NXIO) => Ok(true),
        Ok(_) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn huge_page_bytes(file: &OwnedFd) -> Option<u64> {
    let about = fstatfs(file).ok()?;
    if about.f_type != HUGETLBFS_MAGIC {
        return None;
    }
    u64::try_from(about.f_bsize)
        .ok()
        .filter(|bytes| bytes.is_power_of_two() && *bytes <= HUGE_PAGE_BYTES_MAX)
}

fn random(bytes: &mut [u8]) -> io::Result<()> {
    File::open("/dev/urandom")?.read_exact(bytes)
}

/// Differs from one start of the machine to the next; all zero where it cannot be known.
pub(super) fn boot_id() -> [u8; 16] {
    let mut id = [0; 16];
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let digits = text
        .bytes()
        .filter_map(|byte| char::from(byte).to_digit(16));
    for (at, digit) in digits.take(32).enumerate() {
        if let Some(byte) = id.get_mut(at / 2) {
            // A digit has 4 bits.
            *byte = *byte << 4 | u8::try_from(digit).unwrap_or(0);
        }
    }
    id
}
