// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What processes have in the host's memory, each shared page once.
//!
//! Shared memory that a process has as a descriptor (a guest's RAM, the daemon's arena) is counted
//! by asking for the file itself how much of it is resident: that is right however many map it, and
//! for pages that nobody has mapped. Everything else is the process's own share of its mappings
//! (PSS). The kernel walks all page tables to tell that, which takes tens of milliseconds for
//! a guest; so between two exact readings only what changes fast is read: the process's anonymous
//! pages, which the kernel keeps count of, and the shared files.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context, Result};

/// What QEMU names the memory that it shares.
const GUEST_MEMORY: &str = "memfd:memory-backend-memfd";

/// What a process is there for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Runs a guest.
    Qemu,
    /// Keeps pages.
    Daemon,
}

/// Bytes of a set of processes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HostBytes {
    /// The guests' RAM.
    pub guest: u64,
    /// What the emulators have beside it.
    pub qemu: u64,
    /// The daemon's, with its pool.
    pub daemon: u64,
}

impl HostBytes {
    /// All of it.
    #[must_use]
    pub fn total(self) -> u64 {
        self.guest + self.qemu + self.daemon
    }
}

/// A file by its device and number.
type FileId = (u64, u64);

struct Process {
    id: u32,
    role: Role,
    /// Its share of its mappings, less its anonymous pages, at the last exact reading.
    rest: u64,
}

/// Shared memory that has a descriptor.
struct Shared {
    file: File,
    is_guest: bool,
    role: Role,
}

/// The processes that are counted.
pub struct Ledger {
    processes: Vec<Process>,
    shared: BTreeMap<FileId, Shared>,
}

impl Ledger {
    /// Counts these from now on.
    ///
    /// # Errors
    /// When one is not there, or we may not look at it.
    pub fn new(processes: &[(u32, Role)]) -> Result<Self> {
        let processes = processes.iter().map(|(id, role)| Process {
            id: *id,
            role: *role,
            rest: 0,
        });
        let mut ledger = Self {
            processes: processes.collect(),
            shared: BTreeMap::new(),
        };
        ledger.exact()?;
        Ok(ledger)
    }

    /// Reads everything. Takes tens of milliseconds for a guest of ordinary size.
    ///
    /// # Errors
    /// When a process is gone, or we may not look at it.
    pub fn exact(&mut self) -> Result<HostBytes> {
        self.find_shared()?;
        for process in &mut self.processes {
            let path = format!("/proc/{}/smaps", process.id);
            let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
            let share = share_of(&text, |id| self.shared.contains_key(&id));
            process.rest = share.saturating_sub(anonymous(process.id)?);
        }
        self.quick()
    }

    /// Reads what changes fast.
    ///
    /// # Errors
    /// When a process is gone.
    pub fn quick(&self) -> Result<HostBytes> {
        let mut bytes = HostBytes::default();
        for process in &self.processes {
            let own = anonymous(process.id)? + process.rest;
            match process.role {
                Role::Qemu => bytes.qemu += own,
                Role::Daemon => bytes.daemon += own,
            }
        }
        for shared in self.shared.values() {
            let resident = resident(&shared.file)?;
            match (shared.is_guest, shared.role) {
                (true, _) => bytes.guest += resident,
                (false, Role::Qemu) => bytes.qemu += resident,
                (false, Role::Daemon) => bytes.daemon += resident,
            }
        }
        Ok(bytes)
    }

    /// Processor time of all of them, in seconds.
    ///
    /// # Errors
    /// When a process is gone.
    pub fn cpu_s(&self) -> Result<f64> {
        let mut total = 0.0;
        for process in &self.processes {
            total += cpu_s_of(process.id)?;
        }
        Ok(total)
    }

    /// Looks for shared memory among the descriptors. One that was seen stays as long as this does.
    fn find_shared(&mut self) -> Result<()> {
        for process in &self.processes {
            let folder = format!("/proc/{}/fd", process.id);
            let entries =
                fs::read_dir(&folder).with_context(|| format!("cannot look into {folder}"))?;
            for entry in entries.flatten() {
                // A descriptor may be closed meanwhile, and most are no files.
                let Some((id, shared)) = as_shared(&entry.path(), process.role) else {
                    continue;
                };
                // A guest's memory is open in the daemon too.
                self.shared.entry(id).or_insert(shared);
            }
        }
        Ok(())
    }
}

fn as_shared(descriptor: &Path, role: Role) -> Option<(FileId, Shared)> {
    let target = fs::read_link(descriptor).ok()?;
    // Opening a device or a pipe again may do something; these are neither.
    let name = target.to_str()?.trim_start_matches('/');
    if !name.starts_with("memfd:") && !target.starts_with("/dev/shm") {
        return None;
    }
    let file = File::open(descriptor).ok()?;
    let data = file.metadata().ok().filter(fs::Metadata::is_file)?;
    let shared = Shared {
        file,
        is_guest: name.starts_with(GUEST_MEMORY),
        role,
    };
    Some(((data.dev(), data.ino()), shared))
}

/// Sum of `Pss` over the mappings of an smaps file, but for shared mappings of counted files.
fn share_of(smaps: &str, is_counted: impl Fn(FileId) -> bool) -> u64 {
    let mut is_own = true;
    let mut kib = 0;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let first = words.next().unwrap_or_default();
        if first == "Pss:" {
            let value: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            kib += if is_own { value } else { 0 };
        } else if !first.ends_with(':') {
            let shared = words.next().is_some_and(|rights| rights.ends_with('s'));
            let id = words.nth(1).zip(words.next());
            let id = id.and_then(|(device, file)| Some((device_of(device)?, file.parse().ok()?)));
            is_own = !(shared && id.is_some_and(&is_counted));
        }
    }
    kib << 10
}

/// `00:01` as a device's number.
fn device_of(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    Some(rustix::fs::makedev(number(major)?, number(minor)?))
}

/// Anonymous pages of a process that are in memory.
fn anonymous(process: u32) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let kib = text.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = kib.and_then(|rest| rest.split_whitespace().next()?.parse::<u64>().ok());
    Ok(kib.with_context(|| format!("no RssAnon in {path}"))? << 10)
}

/// User and system time of a process, those of threads that ended included.
fn cpu_s_of(process: u32) -> Result<f64> {
    let path = format!("/proc/{process}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    // The name, in parentheses, may hold anything.
    let rest = text.rsplit_once(')').map(|(_, rest)| rest);
    let ticks: Option<Vec<f64>> = rest.map(|rest| {
        let fields = rest.split_whitespace().skip(11).take(2);
        fields.filter_map(|field| field.parse().ok()).collect()
    });
    let ticks: f64 = ticks.with_context(|| path.clone())?.iter().sum();
    Ok(ticks / f64::from(u32::try_from(rustix::param::clock_ticks_per_second())?))
}

/// Bytes of a file that are in memory.
///
/// # Errors
/// When the kernel does not say.
fn resident(file: &File) -> Result<u64> {
    match cached_pages(file) {
        Some(pages) => Ok(pages * rustix::param::page_size() as u64),
        // Before Linux 6.5. Of shared memory it also counts what is swapped out, so it is right where
        // the host does not swap.
        None => Ok(file.metadata()?.blocks() * 512),
    }
}

/// Whether the kernel says what of a file is in memory, and not only how large it is.
pub fn knows_residence() -> bool {
    rustix::fs::memfd_create("probe", rustix::fs::MemfdFlags::CLOEXEC)
        .is_ok_and(|memory| cached_pages(&File::from(memory)).is_some())
}

/// The system call, the same on every architecture.
const CACHESTAT: libc::c_long = 451;

/// Pages of a file that are in the page cache; none when the kernel does not know the question.
#[allow(unsafe_code)]
fn cached_pages(file: &File) -> Option<u64> {
    /// `struct cachestat_range`; no length means to the end.
    #[repr(C)]
    struct Range {
        offset: u64,
        length: u64,
    }
    /// `struct cachestat`.
    #[repr(C)]
    #[derive(Default)]
    struct Answer {
        cached: u64,
        dirty: u64,
        under_writeback: u64,
        evicted: u64,
        recently_evicted: u64,
    }
    let range = Range {
        offset: 0,
        length: 0,
    };
    let mut answer = Answer::default();
    // SAFETY: both structures are laid out as the kernel has them and live through the call, and the
    // descriptor is open.
    let result = unsafe {
        libc::syscall(
            CACHESTAT,
            file.as_raw_fd(),
            &raw const range,
            &raw mut answer,
            0,
        )
    };
    (result == 0).then_some(answer.cached)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Child, Command, Stdio};

    use rustix::fs::{FallocateFlags, MemfdFlags};
    use rustix::mm::{MapFlags, ProtFlags};

    use super::*;

    const PAGE: usize = 4096;
    const PAGES: usize = 8192;
    const FILE_VARIABLE: &str = "CRAM_SHARED_FILE";

    /// Maps the file and writes to some of its pages.
    #[allow(unsafe_code)]
    fn touch(file: &File, pages: std::ops::Range<usize>) {
        // SAFETY: a new mapping at a place of the kernel's choice.
        let base = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                PAGES * PAGE,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                file,
                0,
            )
        }
        .unwrap();
        for page in pages {
            assert!(page < PAGES);
            let place = base.cast::<u8>().wrapping_add(page * PAGE);
            // SAFETY: within the mapping, which stays for as long as the process.
            unsafe { place.write_volatile(1) };
        }
    }

    /// What [`Other`] runs: this very program again. Run as a test, it has nothing to share.
    #[test]
    fn the_other_process() {
        let Ok(path) = std::env::var(FILE_VARIABLE) else {
            return;
        };
        let file = File::options().read(true).write(true).open(path).unwrap();
        touch(&file, 2000..6000);
        println!("\nready");
        let _ = std::io::stdin().lock().read_line(&mut String::new());
    }

    struct Other(Child);

    impl Other {
        fn start(file: &File) -> Self {
            let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
            let mut child = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "guest::host_bytes::tests::the_other_process",
                    "--nocapture",
                ])
                .env(FILE_VARIABLE, path)
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let lines = BufReader::new(child.stdout.take().unwrap()).lines();
            assert!(lines.map_while(Result::ok).any(|line| line == "ready"));
            Self(child)
        }
    }

    impl Drop for Other {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[test]
    fn a_page_counts_once_whoever_maps_it_and_also_when_nobody_does() {
        let memory = rustix::fs::memfd_create(
            "memory-backend-memfd",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        );
        let mut file = File::from(memory.unwrap());
        file.set_len((PAGES * PAGE) as u64).unwrap();
        touch(&file, 0..4000);
        let other = Other::start(&file);
        // Written, not mapped.
        let at = std::io::SeekFrom::Start((6000 * PAGE) as u64);
        std::io::Seek::seek(&mut file, at).unwrap();
        file.write_all(&vec![1; 1000 * PAGE]).unwrap();

        let own = (std::process::id(), Role::Qemu);
        let mut ledger = Ledger::new(&[own, (other.0.id(), Role::Daemon)]).unwrap();
        let bytes = ledger.exact().unwrap();
        assert_eq!(bytes.guest, 7000 * PAGE as u64);
        // The other process has a few MiB of its own; 4,000 mapped pages of the guest's are not.
        assert!(bytes.daemon > 0 && bytes.daemon < 4000 * PAGE as u64);
        assert_eq!(ledger.quick().unwrap().guest, bytes.guest);

        // What is given back no longer counts.
        rustix::fs::fallocate(
            &file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            0,
            (3000 * PAGE) as u64,
        )
        .unwrap();
        assert_eq!(ledger.quick().unwrap().guest, 4000 * PAGE as u64);
    }

    #[test]
    fn anonymous_memory_counts_for_whom_it_belongs_to() {
        const MIB: usize = 64;
        let ledger = Ledger::new(&[(std::process::id(), Role::Daemon)]).unwrap();
        let before = ledger.quick().unwrap();
        let taken = std::hint::black_box(vec![1_u8; MIB << 20]);
        let after = ledger.quick().unwrap();
        let grown = after.daemon - before.daemon;
        // Other tests of this process take and give memory too.
        assert!(grown >= (MIB as u64 - 8) << 20, "{grown}");
        assert_eq!(after.qemu, before.qemu);
        drop(taken);
    }

    #[test]
    fn counted_files_are_left_out_of_the_mappings() {
        let smaps = "7f00-7f10 rw-s 00000000 00:01 5 /memfd:x (deleted)\n\
                     Size: 100 kB\nPss: 90 kB\nPss_Dirty: 90 kB\n\
                     7f20-7f30 rw-p 00000000 00:00 0\n\
                     Rss: 8 kB\nPss: 8 kB\n\
                     7f40-7f50 r--p 00000000 00:01 5 /memfd:x (deleted)\nPss: 4 kB\n";
        let counted = (rustix::fs::makedev(0, 1), 5);
        assert_eq!(share_of(smaps, |id| id == counted), 12 << 10);
        assert_eq!(share_of(smaps, |_| false), 102 << 10);
    }

    #[test]
    fn processor_time_is_read() {
        let own = cpu_s_of(std::process::id()).unwrap();
        assert!((0.0..1e6).contains(&own));
        assert!(cpu_s_of(u32::MAX).is_err());
    }
}
