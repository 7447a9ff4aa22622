// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask fuzz`: libFuzzer over the targets of `fuzz/`, built with the
//! toolchain at hand and the address sanitizer.
//!
//! What is interesting is kept below `target/fuzz`, and grows from one time to
//! the next; a small selection that everybody begins with is in `fuzz/seeds`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::cache::Cache;
use crate::command::is_installed;
use crate::progress::human_duration;
use crate::workspace;

/// As cargo-fuzz has them, for LLVM's coverage and its libFuzzer.
const FLAGS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Ccodegen-units=1",
    "-Zsanitizer=address",
];
/// Inputs are no longer than this; longer ones only take longer.
const INPUT_BYTES_MAX: u32 = 4096;
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Options of `cargo xtask fuzz`.
#[derive(Args)]
pub struct FuzzArgs {
    /// The targets [default: all of them]
    targets: Vec<String>,
    /// Seconds for each target
    #[arg(long, value_name = "N", default_value_t = 60)]
    seconds: u64,
    /// Processes for each target
    #[arg(long, short, value_name = "N", default_value_t = 1)]
    jobs: u32,
    /// Choose a small corpus anew from all that was found, for fuzz/seeds
    #[arg(long)]
    merge: bool,
}

/// Runs `cargo xtask fuzz`.
pub fn run(args: &FuzzArgs) -> Result<()> {
    crate::system::prepare(&Cache::open()?)?;
    let fuzzer = Fuzzer::build()?;
    let targets = if args.targets.is_empty() {
        fuzzer.targets()?
    } else {
        args.targets.clone()
    };
    for target in &targets {
        if args.merge {
            fuzzer.merge(target)?;
            continue;
        }
        let limit = Duration::from_secs(args.seconds);
        println!("fuzzing {target} for {}", human_duration(limit));
        fuzzer.fuzz(target, limit, args.jobs)?;
    }
    Ok(())
}

/// The targets, built.
pub struct Fuzzer {
    crate_dir: PathBuf,
    build_dir: PathBuf,
}

impl Fuzzer {
    /// Builds all targets.
    pub fn build() -> Result<Self> {
        if !is_installed("c++") {
            bail!("a C++ compiler is missing (g++): libFuzzer is written in it");
        }
        let root = workspace::root()?;
        let fuzzer = Self {
            crate_dir: root.join("fuzz"),
            build_dir: workspace::target_dir(&root).join("fuzz"),
        };
        let status = workspace::cargo()
            .current_dir(&fuzzer.crate_dir)
            .args(["build", "--release", "--locked", "--target", TRIPLE])
            .arg("--target-dir")
            .arg(&fuzzer.build_dir)
            // The sanitizer is there in a stable toolchain too, but behind this.
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\u{1f}"))
            .stdin(Stdio::null())
            .status()
            .context("cannot start cargo")?;
        if !status.success() {
            bail!("the fuzz targets do not build");
        }
        Ok(fuzzer)
    }

    /// Their names.
    pub fn targets(&self) -> Result<Vec<String>> {
        let folder = self.crate_dir.join("targets");
        let entries =
            fs::read_dir(&folder).with_context(|| format!("cannot list {}", folder.display()))?;
        let mut names: Vec<String> = entries
            .flatten()
            .filter_map(|entry| {
                let path = entry.path();
                let is_source = path.extension().is_some_and(|extension| extension == "rs");
                let name = path.file_stem()?.to_str()?.to_owned();
                is_source.then_some(name)
            })
            .collect();
        names.sort();
        Ok(names)
    }

    fn program(&self, target: &str) -> Result<PathBuf> {
        let program = self.build_dir.join(TRIPLE).join("release").join(target);
        if !program.is_file() {
            bail!(
                "there is no fuzz target {target}; there are: {}",
                self.targets()?.join(", ")
            );
        }
        Ok(program)
    }

    fn seeds(&self, target: &str) -> PathBuf {
        self.crate_dir.join("seeds").join(target)
    }

    fn folder(&self, kind: &str, target: &str) -> Result<PathBuf> {
        let folder = self.build_dir.join(kind).join(target);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// Fuzzes one target. An input that makes it fail is kept, and is an error.
    pub fn fuzz(&self, target: &str, limit: Duration, jobs: u32) -> Result<()> {
        let corpus = self.folder("corpus", target)?;
        let artifacts = self.folder("artifacts", target)?;
        let mut command = Command::new(self.program(target)?);
        command.arg(format!("-max_total_time={}", limit.as_secs()));
        if jobs > 1 {
            command.arg(format!("-fork={jobs}"));
        }
        let status = command
            .arg(format!("-max_len={INPUT_BYTES_MAX}"))
            .args(["-len_control=20", "-timeout=60", "-rss_limit_mb=4096"])
            .arg("-print_final_stats=1")
            // Threads of a daemon that are just ending look like leaks.
            .env("ASAN_OPTIONS", "detect_leaks=0")
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(&corpus)
            .args(Some(self.seeds(target)).filter(|seeds| seeds.is_dir()))
            .current_dir(&self.build_dir)
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot start {target}"))?;
        if !status.success() {
            bail!(
                "{target} failed; the input is in {}, and this runs it again:\n  {} INPUT",
                artifacts.display(),
                self.program(target)?.display()
            );
        }
        Ok(())
    }

    /// Chooses from all inputs the fewest that reach as much.
    fn merge(&self, target: &str) -> Result<()> {
        let seeds = self.seeds(target);
        let fresh = seeds.with_extension("new");
        replace_folder(&fresh)?;
        let status = Command::new(self.program(target)?)
            .args(["-merge=1", "-timeout=60"])
            .arg(&fresh)
            .arg(self.folder("corpus", target)?)
            .args(Some(&seeds).filter(|seeds| seeds.is_dir()))
            .stdin(Stdio::null())
            .status()
            .with_context(|| format!("cannot start {target}"))?;
        if !status.success() {
            bail!("merging the inputs of {target} failed");
        }
        keep_smallest(&fresh)?;
        let _ = fs::remove_dir_all(&seeds);
        fs::rename(&fresh, &seeds).with_context(|| format!("cannot make {}", seeds.display()))
    }
}

fn replace_folder(folder: &Path) -> Result<()> {
    let _ = fs::remove_dir_all(folder);
    fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))
}

/// A repository is no place for thousands of inputs: the smallest ones stay.
fn keep_smallest(folder: &Path) -> Result<()> {
    const FILES_MAX: usize = 60;
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut files: Vec<_> = entries
        .flatten()
        .map(|entry| (entry.metadata().map_or(0, |meta| meta.len()), entry.path()))
        .collect();
    files.sort();
    // Evenly over all sizes: the long ones reach what the short ones cannot.
    let step = files.len().div_ceil(FILES_MAX).max(1);
    for (at, (_, path)) in files.iter().enumerate() {
        if at % step != step - 1 {
            fs::remove_file(path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}
