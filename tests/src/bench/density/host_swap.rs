// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The host swaps a guest's RAM to compressed memory of its own: what one does without our device.
//!
//! It takes root, a memory cgroup (v1 or v2) with a limit for QEMU, and zram or zswap in the host's
//! kernel. A process in the background undoes everything when its standard input is closed, so it
//! is undone however this program ends.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FileType, Mode};

use crate::guest::knows_residence;

const ZRAM_CONTROL: &str = "/sys/class/zram-control";
const ZSWAP: &str = "/sys/module/zswap/parameters";
/// As preferred as can be, so that the host's other swap, if any, is left alone.
const PRIORITY: &str = "32767";
const CODEC: &str = "lz4";

/// Which of the host's ways to swap to compressed memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Means {
    /// A block device in memory.
    Zram,
    /// A cache before a file on a disk.
    Zswap,
}

/// Why it cannot be had here; none when it can.
pub(super) fn missing(means: Means) -> Option<String> {
    if !rustix::process::geteuid().is_root() {
        return Some("it takes root".to_owned());
    }
    if Group::parent().is_none() {
        return Some("there is no memory cgroup to make one in".to_owned());
    }
    if !knows_residence() {
        return Some(
            "the kernel does not say what of a file is in memory (Linux 6.5 does)".to_owned(),
        );
    }
    let (path, name) = match means {
        Means::Zram => (ZRAM_CONTROL, "zram"),
        Means::Zswap => (ZSWAP, "zswap"),
    };
    (!Path::new(path).is_dir()).then(|| format!("the host's kernel has no {name}"))
}

/// How much the host's compressed swap holds.
#[derive(Clone, Debug)]
pub(super) enum Gauge {
    /// The third field of this file.
    Zram(PathBuf),
    /// A line of `/proc/meminfo`.
    Zswap,
}

impl Gauge {
    /// Bytes.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub(super) fn bytes(&self) -> Result<u64> {
        // A page that is on its way is in the host's swap cache, and in no file and no process.
        let meminfo = fs::read_to_string("/proc/meminfo").context("/proc/meminfo")?;
        let cached = kib(&meminfo, "SwapCached:").unwrap_or(0);
        let pool = match self {
            Self::Zram(path) => {
                let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
                let third = text.split_whitespace().nth(2);
                third.and_then(|field| field.parse().ok())
            }
            Self::Zswap => kib(&meminfo, "Zswap:"),
        };
        Ok(pool.context("the kernel does not say how large its compressed swap is")? + cached)
    }
}

fn kib(meminfo: &str, name: &str) -> Option<u64> {
    let rest = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
    let value: u64 = rest.split_whitespace().next()?.parse().ok()?;
    Some(value << 10)
}

/// The host's swap, in use. Dropping it undoes everything; nothing may be in the group by then.
pub(super) struct HostSwap {
    group: Group,
    gauge: Gauge,
    /// Closing its standard input has it undo everything.
    undoing: Child,
}

impl HostSwap {
    /// Sets it up, for a group of processes that may have so much memory.
    ///
    /// # Errors
    /// When a step fails; what was done is undone.
    pub(super) fn start(means: Means, size_mib: u64, limit_mib: u64) -> Result<Self> {
        if let Some(why) = missing(means) {
            bail!("{why}");
        }
        let parent = Group::parent().context("no memory cgroup")?;
        let group = Group {
            path: parent.join(format!("cram-density-{}", std::process::id())),
        };
        match means {
            Means::Zram => Self::with_zram(group, size_mib, limit_mib),
            Means::Zswap => Self::with_zswap(group, size_mib, limit_mib),
        }
    }

    fn with_zram(group: Group, size_mib: u64, limit_mib: u64) -> Result<Self> {
        let number = fs::read_to_string(Path::new(ZRAM_CONTROL).join("hot_add"))
            .context("cannot add a zram device")?;
        let number = number.trim();
        let settings = PathBuf::from(format!("/sys/block/zram{number}"));
        let node = PathBuf::from(format!("/dev/zram{number}"));
        // Where no daemon makes nodes for devices that appear, we do, and remove it.
        let remove_node = if node.exists() {
            String::new()
        } else {
            format!("rm -f {}", quoted(&node))
        };
        let script = format!(
            "{}\nswapoff {node} 2>/dev/null\necho 1 > {settings}/reset\n\
             echo {number} > {ZRAM_CONTROL}/hot_remove\n{remove_node}\n",
            group.remove_script(),
            node = quoted(&node),
            settings = settings.display()
        );
        let swap = Self {
            undoing: undo_later(&script)?,
            gauge: Gauge::Zram(settings.join("mm_stat")),
            group,
        };
        write(&settings.join("comp_algorithm"), CODEC)?;
        write(&settings.join("disksize"), &format!("{size_mib}M"))?;
        if !node.exists() {
            make_node(&settings.join("dev"), &node)?;
        }
        swap.on(&node, limit_mib)?;
        Ok(swap)
    }

    fn with_zswap(group: Group, size_mib: u64, limit_mib: u64) -> Result<Self> {
        let file = PathBuf::from(format!("/var/tmp/cram-density-{}.swap", std::process::id()));
        let parameter = |name: &str| Path::new(ZSWAP).join(name);
        let before = |name: &str| -> Result<String> {
            let text = fs::read_to_string(parameter(name)).with_context(|| name.to_owned())?;
            Ok(text.trim().to_owned())
        };
        let script = format!(
            "{}\necho {} > {ZSWAP}/enabled\necho {} > {ZSWAP}/compressor\n\
             swapoff {file} 2>/dev/null\nrm -f {file}\n",
            group.remove_script(),
            before("enabled")?,
            before("compressor")?,
            file = quoted(&file)
        );
        let swap = Self {
            undoing: undo_later(&script)?,
            gauge: Gauge::Zswap,
            group,
        };
        // A swap file has no holes, and is nobody else's to read.
        let made = File::options()
            .write(true)
            .create_new(true)
            .open(&file)
            .with_context(|| format!("cannot make {}", file.display()))?;
        rustix::fs::fchmod(&made, Mode::RUSR | Mode::WUSR)?;
        let flags = rustix::fs::FallocateFlags::empty();
        rustix::fs::fallocate(&made, flags, 0, size_mib << 20)
            .with_context(|| format!("no room for {}", file.display()))?;
        drop(made);
        if write(&parameter("compressor"), CODEC).is_err() {
            eprintln!(
                "    the host's zswap has no {CODEC} and compresses with {}",
                before("compressor")?
            );
        }
        write(&parameter("enabled"), "Y")?;
        swap.on(&file, limit_mib)?;
        Ok(swap)
    }

    fn on(&self, device: &Path, limit_mib: u64) -> Result<()> {
        command(Command::new("mkswap").arg(device))?;
        command(
            Command::new("swapon")
                .args(["--priority", PRIORITY])
                .arg(device),
        )?;
        self.group.make(limit_mib)
    }

    /// Puts a process under the limit. What it has by then stays outside.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub(super) fn take(&self, process: u32) -> Result<()> {
        write(&self.group.path.join("cgroup.procs"), &process.to_string())
    }

    /// Where to read how much is compressed.
    pub(super) fn gauge(&self) -> Gauge {
        self.gauge.clone()
    }
}

impl Drop for HostSwap {
    fn drop(&mut self) {
        drop(self.undoing.stdin.take());
        if !self.undoing.wait().is_ok_and(|status| status.success()) {
            eprintln!("    warning: not all of the host's swap could be undone");
        }
    }
}

/// A memory cgroup of our own.
struct Group {
    path: PathBuf,
}

impl Group {
    /// The folder that it is made in.
    fn parent() -> Option<PathBuf> {
        let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
        let own = fs::read_to_string("/proc/self/cgroup").ok()?;
        parent_of(&mounts, &own, |path| path.is_dir())
    }

    fn is_v2(&self) -> bool {
        self.path
            .parent()
            .is_some_and(|parent| parent.join("cgroup.controllers").exists())
    }

    fn make(&self, limit_mib: u64) -> Result<()> {
        let path = &self.path;
        let limit = (limit_mib << 20).to_string();
        fs::create_dir(path).with_context(|| format!("cannot make {}", path.display()))?;
        if self.is_v2() {
            ensure!(
                path.join("memory.max").exists(),
                "cgroups below {} have no memory controller",
                path.display()
            );
            return write(&path.join("memory.max"), &limit);
        }
        write(&path.join("memory.limit_in_bytes"), &limit)?;
        // As readily as what the guests themselves are set to.
        write(&path.join("memory.swappiness"), "100")
    }

    /// Waits for its processes to be gone.
    fn remove_script(&self) -> String {
        let path = quoted(&self.path);
        format!(
            "tries=0\nwhile [ -d {path} ] && ! rmdir {path} 2>/dev/null && [ $tries -lt 200 ]; do\n\
             tries=$((tries + 1)); sleep 0.05\ndone"
        )
    }
}

/// In v1, below the group that we are in, as far as that can be seen; in v2, at the root, since
/// a group with processes of its own has none below it.
fn parent_of(mounts: &str, own: &str, is_there: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let mut v2 = None;
    for line in mounts.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [_, place, kind, options, ..] = words[..] else {
            continue;
        };
        let place = PathBuf::from(place);
        if kind == "cgroup" && options.split(',').any(|option| option == "memory") {
            let group = own.lines().find_map(|line| {
                let mut parts = line.splitn(3, ':').skip(1);
                let controllers = parts.next()?;
                controllers
                    .split(',')
                    .any(|name| name == "memory")
                    .then(|| parts.next())?
            });
            let below = place.join(group.unwrap_or("/").trim_start_matches('/'));
            return Some(if is_there(&below) { below } else { place });
        }
        if kind == "cgroup2" {
            v2 = Some(place);
        }
    }
    v2
}

/// Starts a shell that runs a script when its input is closed, also by our death.
fn undo_later(script: &str) -> Result<Child> {
    Command::new("/bin/sh")
        .arg("-c")
        .arg(format!("read nothing\n{script}"))
        .stdin(Stdio::piped())
        // Whoever interrupts us from the keyboard does not mean this one.
        .process_group(0)
        .spawn()
        .context("cannot start a shell")
}

fn make_node(numbers: &Path, node: &Path) -> Result<()> {
    let text = fs::read_to_string(numbers).with_context(|| numbers.display().to_string())?;
    let (major, minor) = text.trim().split_once(':').context("a device's numbers")?;
    let device = rustix::fs::makedev(major.parse()?, minor.parse()?);
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, node, FileType::BlockDevice, mode, device)
        .with_context(|| format!("cannot make {}", node.display()))
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {text:?} to {}", path.display()))
}

fn command(command: &mut Command) -> Result<()> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {:?}", command.get_program()))?;
    ensure!(
        output.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

/// As one word of a shell.
fn quoted(path: &Path) -> String {
    format!("'{}'", path.display().to_string().replace('\'', "'\\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_group_is_made_where_we_are() {
        let mounts = "cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\n\
                      cgroup /sys/fs/cgroup/memory cgroup rw,relatime,memory 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        let own = "4:memory:/machine/guests\n3:cpu:/\n0::/\n";
        let parent = |is_there: bool| parent_of(mounts, own, |_| is_there);
        let v1 = Path::new("/sys/fs/cgroup/memory");
        assert_eq!(parent(true), Some(v1.join("machine/guests")));
        assert_eq!(parent(false), Some(v1.to_owned()));
        let v2 = "cgroup2 /sys/fs/cgroup cgroup2 rw 0 0\n";
        let found = parent_of(v2, "0::/user.slice\n", |_| true);
        assert_eq!(found, Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(parent_of("", own, |_| true), None);
    }

    #[test]
    fn what_is_to_be_undone_is_undone_also_after_our_death() {
        let folder = tempfile::tempdir().unwrap();
        let mark = folder.path().join("it's undone");
        let mut undoing = undo_later(&format!("echo yes > {}", quoted(&mark))).unwrap();
        assert!(!mark.exists());
        drop(undoing.stdin.take());
        assert!(undoing.wait().unwrap().success());
        assert_eq!(fs::read_to_string(&mark).unwrap(), "yes\n");
    }

    #[test]
    fn sizes_are_read() {
        let meminfo = "SwapCached:        4 kB\nZswap:          12 kB\n";
        assert_eq!(kib(meminfo, "Zswap:"), Some(12 << 10));
        assert_eq!(kib(meminfo, "Zswapped:"), None);
    }
}
