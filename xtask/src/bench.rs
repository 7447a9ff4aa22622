// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask bench`: builds the benchmarks and runs them. What they measure
//! is in the `bench` module of the crate `cram-tests`.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};

use crate::cache::Cache;
use crate::parts::{Builder, SourceArgs};
use crate::{system, workspace};

/// Options of `cargo xtask bench`.
#[derive(Args)]
pub struct BenchArgs {
    /// What to measure [default: everything]
    #[arg(value_enum)]
    subject: Option<Subject>,
    /// Only these sections of it; an unknown name lists those that there are
    sections: Vec<String>,
    /// A look: fewer pages and rounds (the store: two minutes; guests: ten; density: five)
    #[arg(long)]
    quick: bool,
}

/// What there is to measure.
#[derive(Clone, Copy, ValueEnum)]
enum Subject {
    /// The store by itself
    Store,
    /// The device, driven over a real socket and real rings
    Device,
    /// Whole guests, and what else they could swap to
    Guest,
    /// How much of the host's memory guests take, all told
    Density,
}

impl Subject {
    /// Of the density only the codecs are measured without guests.
    fn needs_guests(self, sections: &[String]) -> bool {
        match self {
            Self::Store | Self::Device => false,
            Self::Guest => true,
            Self::Density => sections.is_empty() || sections.iter().any(|name| name != "codec"),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Store => "store",
            Self::Device => "device",
            Self::Guest => "guest",
            Self::Density => "density",
        }
    }
}

/// Runs `cargo xtask bench`.
pub fn run(args: &BenchArgs, sources: SourceArgs) -> Result<()> {
    let cache = Cache::open()?;
    system::prepare(&cache)?;
    let root = workspace::root()?;
    let program = workspace::build_bench(&root, &cache)?;
    let all: Vec<Subject> = match args.subject {
        Some(subject) => vec![subject],
        None => Subject::value_variants().to_vec(),
    };
    let mut failed = Vec::new();
    for subject in all {
        let mut command = Command::new(&program);
        if subject.needs_guests(&args.sections) {
            let builder = Builder::open(sources.clone())?;
            builder.artifacts_for_bench()?;
            command.env("CRAM_ARTIFACTS", builder.artifacts_path());
        }
        command
            .arg(subject.name())
            .args(&args.sections)
            .arg("--out")
            .arg(workspace::target_dir(&root).join("bench"));
        if args.quick {
            command.arg("--quick");
        }
        // The others' figures are worth having all the same.
        if let Err(error) = finish(command, &root) {
            eprintln!("error: {}: {error:#}", subject.name());
            failed.push(subject.name());
        }
    }
    if !failed.is_empty() {
        bail!("not everything could be measured: {}", failed.join(", "));
    }
    Ok(())
}

fn finish(mut command: Command, root: &Path) -> Result<()> {
    let status = command
        .current_dir(root)
        .stdin(Stdio::null())
        .status()
        .context("cannot start the benchmarks")?;
    if !status.success() {
        bail!("the benchmarks failed");
    }
    Ok(())
}
