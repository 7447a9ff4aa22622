// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cache: `${XDG_CACHE_HOME:-~/.cache}/vhost-device-cram`.
//!
//! ```text
//! parts/<part>/<key>/   a finished part; key = hash of everything that went in
//! work/<part>-<key>/    a part being made; renamed into parts/ when it is complete
//! locks/<part>          held while a part is made, so that two commands do not race
//! apt/                  apt state of our own: lists of the suites we fetch from
//! logs/                 what the last run of each step printed
//! sizes/                how many units of work each step had last time, for its bar
//! ```
//!
//! So a part that exists is complete, and a part under another key is stale.

use std::fs::{self, File, TryLockError};
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::progress::human_bytes;

/// Hexadecimal digits of a key; enough for a cache that holds a dozen entries.
const KEY_DIGITS: usize = 20;

/// Free space that the largest part takes while it is made, and some more.
const ROOM_MIN: u64 = 4 << 30;

/// The kinds of things in the cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, clap::ValueEnum)]
pub enum Part {
    /// Source packages and Debian packages, as they were fetched
    Downloads,
    /// bindgen, which the kernel needs for its Rust side
    Bindgen,
    /// The kernel's source as published
    KernelBase,
    /// The kernel's source with our patches
    KernelSource,
    /// The kernel that guests run
    Kernel,
    /// The kernel that checks itself: lockdep, KASAN
    KernelDebug,
    /// cram.ko, for each kernel
    Module,
    /// QEMU with our patches
    Qemu,
    /// The plugin with which QEMU counts instructions
    Plugin,
    /// The firmware files that QEMU loads
    Firmware,
    /// The guest's root image
    Image,
    /// The real data that the demo and the tests swap out
    Corpus,
    /// Results of checks that need not run twice
    Checks,
}

impl Part {
    /// All of them.
    pub const ALL: [Self; 13] = [
        Self::Downloads,
        Self::Bindgen,
        Self::KernelBase,
        Self::KernelSource,
        Self::Kernel,
        Self::KernelDebug,
        Self::Module,
        Self::Qemu,
        Self::Plugin,
        Self::Firmware,
        Self::Image,
        Self::Corpus,
        Self::Checks,
    ];

    /// Its folder's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Downloads => "downloads",
            Self::Bindgen => "bindgen",
            Self::KernelBase => "kernel-base",
            Self::KernelSource => "kernel-source",
            Self::Kernel => "kernel",
            Self::KernelDebug => "kernel-debug",
            Self::Module => "module",
            Self::Qemu => "qemu",
            Self::Plugin => "plugin",
            Self::Firmware => "firmware",
            Self::Image => "image",
            Self::Corpus => "corpus",
            Self::Checks => "checks",
        }
    }
}

/// A name for everything that goes into a part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Key(String);

impl Key {
    /// The key as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Gathers what goes into a key. Labels keep one ingredient from passing for another.
pub struct KeyBuilder(Sha256);

impl KeyBuilder {
    /// `recipe` names the part and the version of the code that makes it.
    pub fn new(recipe: &str) -> Self {
        Self(Sha256::new()).text("recipe", recipe)
    }

    /// Adds a text.
    pub fn text(self, label: &str, text: &str) -> Self {
        self.bytes(label, text.as_bytes())
    }

    /// Adds bytes.
    pub fn bytes(mut self, label: &str, bytes: &[u8]) -> Self {
        for field in [label.as_bytes(), bytes] {
            self.0.update((field.len() as u64).to_le_bytes());
            self.0.update(field);
        }
        self
    }

    /// Adds a file's contents.
    pub fn file(self, path: &Path) -> Result<Self> {
        let bytes = fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        Ok(self.bytes(&name, &bytes))
    }

    /// Adds every file below a folder, by relative name and contents.
    pub fn tree(mut self, dir: &Path) -> Result<Self> {
        for path in files_below(dir)? {
            let name = path.strip_prefix(dir).unwrap_or(&path).to_string_lossy();
            let bytes =
                fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            self = self.bytes(&name, &bytes);
        }
        Ok(self)
    }

    /// The key.
    pub fn finish(self) -> Key {
        let mut text = hex(&self.0.finalize());
        text.truncate(KEY_DIGITS);
        Key(text)
    }
}

/// The files below a folder, sorted, so that the order is everywhere the same.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let mut folders = vec![dir.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
            let kind = entry
                .file_type()
                .with_context(|| format!("cannot look at {}", entry.path().display()))?;
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() {
                files.push(entry.path());
            }
        }
    }
    files.sort();
    Ok(files)
}

/// SHA-256 of a file, in hexadecimal digits.
pub fn sha256_of(path: &Path) -> Result<String> {
    let mut file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = file
            .read(&mut buffer)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let Some(bytes) = buffer.get(..count).filter(|bytes| !bytes.is_empty()) else {
            return Ok(hex(&hasher.finalize()));
        };
        hasher.update(bytes);
    }
}

/// Hexadecimal digits of some bytes.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Held while a part is being made; let go when dropped.
pub struct CacheLock(#[allow(dead_code, reason = "held for its lock alone")] File);

/// The cache's folder.
#[derive(Clone, Debug)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// Opens the user's cache, and makes it when it is not there.
    pub fn open() -> Result<Self> {
        let base = match std::env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()) {
            Some(dir) => PathBuf::from(dir),
            None => std::env::home_dir()
                .context("neither XDG_CACHE_HOME nor HOME is set: where shall the cache be?")?
                .join(".cache"),
        };
        if !base.is_absolute() {
            bail!("XDG_CACHE_HOME is not an absolute path: {}", base.display());
        }
        let root = base.join("vhost-device-cram");
        fs::create_dir_all(&root)
            .with_context(|| format!("cannot make the cache folder {}", root.display()))?;
        Ok(Self { root })
    }

    /// Its root.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// A folder of the cache, made when it is not there.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        let dir = self.root.join(name);
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(dir)
    }

    /// Where a part with this key is, or will be.
    pub fn path(&self, part: Part, key: &Key) -> PathBuf {
        self.root.join("parts").join(part.name()).join(&key.0)
    }

    /// Where the step of this name writes its log.
    pub fn log_path(&self, step: &str) -> Result<PathBuf> {
        let name: String = step
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        Ok(self.folder("logs")?.join(format!("{name}.log")))
    }

    /// Takes the lock of this name, waiting for another command that has it.
    pub fn lock(&self, name: &str) -> Result<CacheLock> {
        let path = self.folder("locks")?.join(name);
        let file =
            File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                eprintln!("  waiting for another cargo xtask that is making: {name}");
                file.lock()
                    .with_context(|| format!("cannot lock {}", path.display()))?;
            }
            Err(TryLockError::Error(error)) => {
                return Err(error).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        Ok(CacheLock(file))
    }

    /// Returns the part's folder; makes it first if it is not there.
    ///
    /// `make` fills an empty folder, which is renamed into place afterwards:
    /// whatever interrupts it, there is never half a part under a key.
    pub fn ensure(
        &self,
        part: Part,
        key: &Key,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        self.ensure_with(part, key, false, make)
    }

    /// Like [`Cache::ensure`], but `make` finds what an interrupted run left, to go on from there.
    pub fn ensure_resumable(
        &self,
        part: Part,
        key: &Key,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        self.ensure_with(part, key, true, make)
    }

    fn ensure_with(
        &self,
        part: Part,
        key: &Key,
        resume: bool,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.path(part, key);
        if !path.is_dir() {
            let _lock = self.lock(part.name())?;
            // Another command may have made it while we waited.
            if !path.is_dir() {
                self.expect_room()?;
                let name = format!("{}-{}", part.name(), key.0);
                let work = self.folder("work")?.join(name);
                if work.exists() && !resume {
                    remove_tree(&work)?;
                }
                fs::create_dir_all(&work)
                    .with_context(|| format!("cannot make {}", work.display()))?;
                make(&work)?;
                self.folder(&format!("parts/{}", part.name()))?;
                fs::rename(&work, &path)
                    .with_context(|| format!("cannot put {} in place", path.display()))?;
            }
        }
        self.mark_used(&path);
        Ok(path)
    }

    /// A full disk in the middle of a build makes for strange errors.
    fn expect_room(&self) -> Result<()> {
        let stat = rustix::fs::statvfs(&self.root)
            .with_context(|| format!("cannot look at {}", self.root.display()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < ROOM_MIN {
            bail!(
                "only {} free in {}, and {} are needed: `cargo xtask clean-cache` frees what is \
                 stale, and XDG_CACHE_HOME names another place",
                human_bytes(free),
                self.root.display(),
                human_bytes(ROOM_MIN)
            );
        }
        Ok(())
    }

    /// Leaves the time of last use for `clean-cache`; failing to is harmless.
    fn mark_used(&self, path: &Path) {
        let _ = File::create(path.join(LAST_USED));
    }

    /// How many units of work this step had last time; 0 when it never ran.
    pub fn usual_size(&self, step: &str) -> u64 {
        fs::read_to_string(self.size_path(step))
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or_else(|| first_guess(step))
    }

    /// Remembers it for the next time. Only the largest counts: a step that
    /// goes on from where it was interrupted has less to do than a whole one.
    pub fn remember_size(&self, step: &str, size: u64) {
        if size > self.usual_size(step) / 2 && self.folder("sizes").is_ok() {
            let _ = fs::write(self.size_path(step), size.to_string());
        }
    }

    fn size_path(&self, step: &str) -> PathBuf {
        self.root.join("sizes").join(step.replace([' ', '/'], "-"))
    }
}

/// The file in a part's folder whose time says when it was last used.
pub const LAST_USED: &str = ".last-used";

/// Units of work of the long steps, counted once, for the first bar.
fn first_guess(step: &str) -> u64 {
    match step {
        "kernel" => 1770,
        "debug kernel" => 1930,
        "bindgen" => 90,
        "kernel source" => 102_000,
        "daemon and cramctl" => 86,
        "guest workload" => 36,
        _ => 0,
    }
}

/// Removes a folder and all below it, read-only folders too.
pub fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other.with_context(|| format!("cannot remove {}", path.display())),
    }
}
