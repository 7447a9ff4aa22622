// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pages of real things that are found on any machine: what compression and memory are measured on.
//!
//! Of each kind, files (or processes) are taken in the order of their paths, each in full, as the
//! page cache would hold them, until there is enough. Made-up data would prove nothing.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};

/// Bytes of a page.
pub const PAGE_SIZE: usize = 4096;
/// A page.
pub type Page = [u8; PAGE_SIZE];

/// What pages are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Programs and libraries.
    Elf,
    /// Documentation, in plain text and HTML.
    Text,
    /// Source code of many languages.
    Source,
    /// JSON.
    Json,
    /// Memory of running processes.
    Heap,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 5] = [Kind::Elf, Kind::Text, Kind::Source, Kind::Json, Kind::Heap];

    /// For people and JSON.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Kind::Elf => "elf",
            Kind::Text => "text",
            Kind::Source => "source",
            Kind::Json => "json",
            Kind::Heap => "heap",
        }
    }
}

/// Pages of one kind.
pub struct Pages {
    /// What they are of.
    pub kind: Kind,
    /// The pages.
    pub pages: Vec<Page>,
}

/// A file is read up to here.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// Folders are followed so deep.
const DEPTH_MAX: usize = 12;
/// Files looked at in one place, so that a huge tree does not take for ever.
const FILES_MAX: usize = 60_000;

/// Gathers up to `pages` pages of each kind. Pages that one word fills, and pages that are there
/// already, are left out: they would flatter whoever stores them for nothing.
///
/// # Errors
/// When the machine has nothing of some kind.
pub fn gather(pages: usize) -> Result<Vec<Pages>> {
    let mut seen = HashSet::new();
    let mut all = Vec::new();
    for kind in Kind::ALL {
        let mut gathered = Gathering {
            wanted: pages,
            pages: Vec::new(),
            seen: &mut seen,
        };
        match kind {
            Kind::Heap => gather_heaps(&mut gathered),
            _ => gather_files(kind, &mut gathered),
        }
        let pages = gathered.pages;
        ensure!(
            !pages.is_empty(),
            "there is nothing of the kind {} on this machine",
            kind.name()
        );
        all.push(Pages { kind, pages });
    }
    Ok(all)
}

/// All kinds in turn, page by page, as one list: no stretch of it is of one kind.
#[must_use]
pub fn mixed(corpus: &[Pages]) -> Vec<Page> {
    let longest = corpus.iter().map(|kind| kind.pages.len()).max();
    (0..longest.unwrap_or(0))
        .flat_map(|at| corpus.iter().filter_map(move |kind| kind.pages.get(at)))
        .copied()
        .collect()
}

struct Gathering<'a> {
    wanted: usize,
    pages: Vec<Page>,
    /// Hashes of all pages so far.
    seen: &'a mut HashSet<u64>,
}

impl Gathering<'_> {
    fn is_enough(&self) -> bool {
        self.pages.len() >= self.wanted
    }

    fn add(&mut self, page: Page) {
        use std::hash::{DefaultHasher, Hash, Hasher};
        let (words, _) = page.as_chunks::<8>();
        if words.iter().all(|word| Some(word) == words.first()) {
            return;
        }
        let mut hasher = DefaultHasher::new();
        page.hash(&mut hasher);
        if self.seen.insert(hasher.finish()) && !self.is_enough() {
            self.pages.push(page);
        }
    }

    /// A file's bytes, the last page filled up with zeroes as in the page cache.
    fn add_bytes(&mut self, bytes: &[u8]) {
        for piece in bytes.chunks(PAGE_SIZE) {
            let mut page = [0; PAGE_SIZE];
            if let Some(start) = page.get_mut(..piece.len()) {
                start.copy_from_slice(piece);
            }
            self.add(page);
        }
    }
}

fn folders(kind: Kind) -> Vec<PathBuf> {
    let fixed: &[&str] = match kind {
        Kind::Elf => &["/usr/bin", "/usr/lib", "/usr/libexec"],
        Kind::Text => &[
            "/usr/share/doc",
            "/usr/share/common-licenses",
            "/usr/share/perl",
        ],
        Kind::Source => &["/usr/include", "/usr/lib/python3", "/usr/lib/gcc"],
        Kind::Json => &["/usr/share", "/usr/lib"],
        Kind::Heap => &[],
    };
    let mut folders: Vec<_> = fixed.iter().map(PathBuf::from).collect();
    // What whoever builds this has: the toolchain's documentation, and the sources of its crates.
    let home = |variable: &str, usual: &str| {
        std::env::var_os(variable)
            .map(PathBuf::from)
            .or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(usual)))
    };
    match kind {
        Kind::Text => folders.extend(home("RUSTUP_HOME", ".rustup")),
        Kind::Source | Kind::Json => {
            folders.extend(home("CARGO_HOME", ".cargo").map(|home| home.join("registry/src")));
            folders.extend(home("RUSTUP_HOME", ".rustup"));
        }
        Kind::Elf | Kind::Heap => (),
    }
    folders.push(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(".."));
    folders
}

fn is_of(kind: Kind, path: &Path) -> bool {
    let extension = path.extension().and_then(|extension| extension.to_str());
    let name = path.file_name().and_then(|name| name.to_str());
    match kind {
        Kind::Elf => {
            let mut magic = [0; 4];
            File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok())
                && magic == *b"\x7fELF"
        }
        Kind::Text => {
            matches!(extension, Some("txt" | "md" | "html" | "rst" | "pod"))
                || matches!(name, Some("copyright" | "changelog" | "README" | "NEWS"))
                || path.starts_with("/usr/share/common-licenses")
        }
        Kind::Source => matches!(
            extension,
            Some("rs" | "c" | "h" | "cc" | "cpp" | "py" | "pl" | "js" | "sh")
        ),
        Kind::Json => matches!(extension, Some("json")),
        Kind::Heap => false,
    }
}

fn gather_files(kind: Kind, gathering: &mut Gathering<'_>) {
    if kind == Kind::Json {
        gathering.add_bytes(&metadata());
    }
    for folder in folders(kind) {
        let mut files = Vec::new();
        list(&folder, 0, &mut files);
        for path in files.into_iter().filter(|path| is_of(kind, path)) {
            if gathering.is_enough() {
                return;
            }
            let mut bytes = Vec::new();
            if let Ok(file) = File::open(path)
                && file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).is_ok()
            {
                gathering.add_bytes(&bytes);
            }
        }
    }
}

/// Files below a folder, in order; links are not followed.
fn list(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        if files.len() >= FILES_MAX {
            return;
        }
        match entry.file_type() {
            Ok(kind) if kind.is_file() => files.push(entry.path()),
            Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => {
                list(&entry.path(), depth + 1, files);
            }
            _ => (),
        }
    }
}

/// What cargo says of this very workspace: JSON as programs exchange it.
fn metadata() -> Vec<u8> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Command::new(cargo)
        .args(["metadata", "--format-version=1", "--offline"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stderr(Stdio::null())
        .output()
        .map_or_else(|_| Vec::new(), |output| output.stdout)
}

/// A process that is there to be looked at, and ends with this.
struct Subject(Child);

impl Drop for Subject {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Memory of all processes that may be looked at; and, since on an idle machine these are few, of a
/// Python that has read its own library.
fn gather_heaps(gathering: &mut Gathering<'_>) {
    const READS_ITS_LIBRARY: &str = "import ast, glob, os, time\n\
        trees = []\n\
        for path in sorted(glob.glob(os.path.dirname(os.__file__) + '/*.py')):\n    \
            try:\n        \
                trees.append(ast.parse(open(path).read()))\n    \
            except Exception:\n        pass\n\
        print('ready', flush=True)\n\
        time.sleep(600)\n";
    let python = Command::new("python3")
        .args(["-c", READS_ITS_LIBRARY])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn();
    if let Ok(child) = python {
        let mut subject = Subject(child);
        if let Some(out) = subject.0.stdout.as_mut() {
            // It says when it is ready, or ends.
            let _ = out.read(&mut [0; 8]);
        }
        gather_process(subject.0.id(), gathering);
    }
    let own = std::process::id();
    let mut processes: Vec<u32> = fs::read_dir("/proc")
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|process| *process != own)
        .collect();
    processes.sort_unstable();
    for process in processes {
        gather_process(process, gathering);
    }
    std::thread::sleep(Duration::from_millis(10));
}

/// The private writable memory of a process that is not of any file, as far as it is resident.
fn gather_process(process: u32, gathering: &mut Gathering<'_>) {
    let read = |name: &str| File::open(format!("/proc/{process}/{name}"));
    let (Ok(maps), Ok(memory)) = (
        fs::read_to_string(format!("/proc/{process}/maps")),
        read("mem"),
    ) else {
        return;
    };
    let Ok(pagemap) = read("pagemap") else { return };
    for line in maps.lines() {
        if gathering.is_enough() {
            return;
        }
        let mut words = line.split_whitespace();
        let (Some(range), Some(rights)) = (words.next(), words.next()) else {
            continue;
        };
        let file = words.nth(3);
        if !rights.starts_with("rw-p") || file.is_some_and(|file| file != "[heap]") {
            continue;
        }
        let Some((start, end)) = range.split_once('-') else {
            continue;
        };
        let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        else {
            continue;
        };
        for at in (start..end).step_by(PAGE_SIZE) {
            let mut entry = [0; 8];
            let number = at / PAGE_SIZE as u64;
            let is_resident = pagemap.read_exact_at(&mut entry, number * 8).is_ok()
                && u64::from_le_bytes(entry) >> 63 == 1;
            let mut page = [0; PAGE_SIZE];
            if is_resident && memory.read_exact_at(&mut page, at).is_ok() {
                gathering.add(page);
            }
            if gathering.is_enough() {
                return;
            }
        }
    }
}
