// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask clean-cache`.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Result};
use clap::Args;

use crate::cache::{Cache, LAST_USED, Part, remove_tree};
use crate::progress::human_bytes;

/// How many entries of a part one state of the checkout uses.
const fn in_use(part: Part) -> usize {
    match part {
        // Kernel, QEMU, packages of the image.
        Part::Downloads => 3,
        // One for each kernel.
        Part::Module | Part::Image => 2,
        // One for each kind of check.
        Part::Checks => 2,
        _ => 1,
    }
}

/// Options of `cargo xtask clean-cache`.
#[derive(Args)]
pub struct CleanArgs {
    /// Remove these parts altogether
    #[arg(value_enum, conflicts_with = "all")]
    parts: Vec<Part>,
    /// Remove the whole cache
    #[arg(long)]
    all: bool,
    /// Only say what would be freed
    #[arg(long, short = 'n')]
    dry_run: bool,
}

/// Runs `cargo xtask clean-cache`.
pub fn run(args: &CleanArgs) -> Result<()> {
    let cache = Cache::open()?;
    let mut doomed = Vec::new();
    let mut usage = DiskUsage::default();
    let mut kept_usage = DiskUsage::default();
    let mut kept = 0;
    for part in Part::ALL {
        let mut entries = entries_by_age(&cache.root().join("parts").join(part.name()))?;
        let whole = args.all || args.parts.contains(&part);
        let spared = match (whole, args.parts.is_empty()) {
            (true, _) => 0,
            (false, true) => in_use(part),
            (false, false) => entries.len(),
        };
        for (index, path) in entries.drain(..).enumerate() {
            if index < spared {
                kept += kept_usage.of(&path)?;
            } else {
                let bytes = usage.of(&path)?;
                doomed.push((part.name().to_owned(), path, bytes));
            }
        }
    }
    if args.parts.is_empty() {
        for (_, path) in list(&cache.root().join("work"))? {
            let bytes = usage.of(&path)?;
            // Its name begins with the part's, whose lock it is made under.
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let part = name
                .rsplit_once('-')
                .map_or(name.as_str(), |(part, _)| part)
                .to_owned();
            doomed.push((part, path, bytes));
        }
    }
    if args.all {
        for name in ["apt", "logs", "sizes"] {
            let path = cache.root().join(name);
            if path.exists() {
                let bytes = usage.of(&path)?;
                doomed.push((name.to_owned(), path, bytes));
            }
        }
    }
    let mut freed = 0;
    for (name, path, bytes) in doomed {
        let verb = if args.dry_run { "would free" } else { "freed" };
        if !args.dry_run {
            // A part that another command is making, or reading to make another, stays whole.
            let _lock = cache.lock(&name)?;
            remove_tree(&path)?;
        }
        let entry = path.file_name().unwrap_or_default().to_string_lossy();
        println!("{verb} {:>9}  {name} {entry}", human_bytes(bytes));
        freed += bytes;
    }
    let verb = if args.dry_run {
        "would be freed"
    } else {
        "freed"
    };
    println!(
        "{} {verb}, {} left in {}",
        human_bytes(freed),
        human_bytes(kept),
        cache.root().display()
    );
    Ok(())
}

/// Entries of a part, the one used last first.
fn entries_by_age(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut entries = list(dir)?;
    entries.sort_by_key(|(used, _)| Reverse(*used));
    Ok(entries.into_iter().map(|(_, path)| path).collect())
}

fn list(dir: &Path) -> Result<Vec<(SystemTime, PathBuf)>> {
    let mut found = Vec::new();
    let entries = match fs::read_dir(dir) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(found),
        other => other.with_context(|| format!("cannot list {}", dir.display()))?,
    };
    for entry in entries {
        let path = entry
            .with_context(|| format!("cannot list {}", dir.display()))?
            .path();
        let used = fs::metadata(path.join(LAST_USED))
            .and_then(|meta| meta.modified())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        found.push((used, path));
    }
    Ok(found)
}

/// Counts the bytes that go when folders go. A file with several hard links
/// goes with the last of them.
#[derive(Default)]
struct DiskUsage {
    links_met: HashMap<u64, u64>,
}

impl DiskUsage {
    fn of(&mut self, path: &Path) -> Result<u64> {
        let meta = fs::symlink_metadata(path)
            .with_context(|| format!("cannot look at {}", path.display()))?;
        let own = meta.blocks() * 512;
        if !meta.is_dir() {
            let met = self.links_met.entry(meta.ino()).or_default();
            *met += 1;
            return Ok(if *met == meta.nlink() { own } else { 0 });
        }
        let mut bytes = own;
        let entries =
            fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
        for entry in entries {
            let entry = entry.with_context(|| format!("cannot list {}", path.display()))?;
            bytes += self.of(&entry.path())?;
        }
        Ok(bytes)
    }
}
