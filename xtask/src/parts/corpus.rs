// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The corpus: one gibibyte of real data for guests to hold in memory.
//!
//! Programs and libraries of this machine, and the kernel's source and
//! documentation, strewn evenly, so that any stretch of the file is a mixture
//! of both. Compressible data made up for the purpose would prove nothing.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use sha2::{Digest, Sha256};

use crate::cache::{Cache, Key, KeyBuilder, Part, files_below, hex};
use crate::progress::Step;

/// Twice the memory that a guest of 512 MiB can use, and a bit.
const SIZE: u64 = 1 << 30;
/// Of the whole, at most this much is programs.
const PROGRAMS_SIZE: u64 = SIZE / 2;
/// A stretch of one kind before the other kind has its turn.
const STRETCH: u64 = 4 << 20;
/// A program or library smaller than this is not worth its place.
const PROGRAM_MIN: u64 = 256 << 10;

/// Where programs are taken from: all belong to packages that the build needs.
const PROGRAM_FOLDERS: [&str; 4] = [
    "/usr/lib/gcc",
    "/usr/lib/llvm-19/lib",
    "/usr/bin",
    "/usr/lib/x86_64-linux-gnu",
];
/// What of the kernel's tree is text worth reading.
const TEXT_FOLDERS: [&str; 7] = [
    "Documentation",
    "mm",
    "kernel",
    "fs",
    "net",
    "sound",
    "drivers",
];

/// Makes the corpus; returns the path of the data. `SHA256SUMS` lies beside it.
pub fn build(cache: &Cache, kernel_tree: &Path, kernel_key: &Key) -> Result<PathBuf> {
    // Not of the programs themselves: a corpus does not go stale when this
    // machine is upgraded, for all that its own manifest tells what is in it.
    let key = KeyBuilder::new("corpus 1")
        .text("kernel", kernel_key.as_str())
        .finish();
    let dir = cache.ensure(Part::Corpus, &key, |work| {
        let mut step = Step::begin(cache, "corpus")?;
        let mut text = Vec::new();
        for folder in TEXT_FOLDERS {
            text.extend(files_below(&kernel_tree.join(folder))?);
        }
        let programs = programs()?;
        write_mixture(&mut step, work, &programs, &text)?;
        step.finish();
        Ok(())
    })?;
    Ok(dir.join("corpus.img"))
}

fn programs() -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for folder in PROGRAM_FOLDERS {
        if !Path::new(folder).is_dir() {
            continue;
        }
        for file in files_below(Path::new(folder))? {
            if is_program(&file) {
                found.push(file);
            }
        }
    }
    Ok(found)
}

fn is_program(path: &Path) -> bool {
    let mut magic = [0; 4];
    let large = fs::metadata(path).is_ok_and(|meta| meta.len() >= PROGRAM_MIN);
    large
        && File::open(path).is_ok_and(|mut file| file.read_exact(&mut magic).is_ok())
        && magic == *b"\x7fELF"
}

/// Takes stretches from both kinds in turn until the file has its size.
fn write_mixture(
    step: &mut Step,
    work: &Path,
    programs: &[PathBuf],
    text: &[PathBuf],
) -> Result<()> {
    let mut out = Output::create(work)?;
    let mut programs = programs.iter();
    let mut text = text.iter();
    let mut programs_done = 0;
    while out.written < SIZE {
        let programs_room = PROGRAMS_SIZE.saturating_sub(programs_done);
        let before = out.written;
        out.take(&mut programs, STRETCH.min(programs_room))?;
        programs_done += out.written - before;
        out.take(&mut text, STRETCH)?;
        if out.written == before {
            bail!("there is not enough real data on this machine for the corpus");
        }
        step.advance(out.written, SIZE);
    }
    out.finish(work)
}

struct Output {
    data: BufWriter<File>,
    whole: Sha256,
    manifest: String,
    written: u64,
}

impl Output {
    fn create(work: &Path) -> Result<Self> {
        let path = work.join("corpus.img");
        let file =
            File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
        Ok(Self {
            data: BufWriter::with_capacity(1 << 20, file),
            whole: Sha256::new(),
            manifest: String::new(),
            written: 0,
        })
    }

    /// Writes whole files until there are at least `room` more bytes, or no file is left.
    fn take<'a>(&mut self, files: &mut impl Iterator<Item = &'a PathBuf>, room: u64) -> Result<()> {
        let end = (self.written + room).min(SIZE);
        while self.written < end {
            let Some(path) = files.next() else {
                return Ok(());
            };
            let bytes =
                fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
            let left = usize::try_from(SIZE - self.written).unwrap_or(usize::MAX);
            let bytes = bytes.get(..bytes.len().min(left)).unwrap_or(&bytes);
            self.data
                .write_all(bytes)
                .context("cannot write the corpus")?;
            self.whole.update(bytes);
            self.manifest += &format!(
                "{}  {} {} {}\n",
                hex(&Sha256::digest(bytes)),
                self.written,
                bytes.len(),
                path.file_name().unwrap_or_default().to_string_lossy()
            );
            self.written += bytes.len() as u64;
        }
        Ok(())
    }

    fn finish(mut self, work: &Path) -> Result<()> {
        self.data.flush().context("cannot write the corpus")?;
        let whole = hex(&self.whole.finalize());
        fs::write(work.join("SHA256SUMS"), format!("{whole}  corpus.img\n"))
            .context("cannot write the corpus's checksum")?;
        fs::write(work.join("MANIFEST"), self.manifest)
            .context("cannot write the corpus's manifest")
    }
}
