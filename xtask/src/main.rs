// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask`: everything that a person types in this project.
//!
//! Each part that takes minutes to make (a kernel, QEMU, an image) lives in a
//! cache outside the checkout, under a name made of the hash of all that goes
//! into it; see [`cache`]. [`parts`] says which parts there are and in what
//! order they are made; one file each says how.

#![allow(
    unreachable_pub,
    reason = "a program: nothing in it is reachable from outside"
)]

mod bench;
mod cache;
mod check_patches;
mod clean;
mod command;
mod demo;
mod fuzz;
mod package;
mod parts;
mod play;
mod progress;
mod suite;
mod system;
mod workspace;

use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use crate::parts::{Builder, SourceArgs};

/// Sets up, builds, runs and tests vhost-device-cram.
///
/// The first command that needs a guest fetches and builds the pinned kernel
/// and QEMU into ~/.cache/vhost-device-cram, which takes half an hour on two
/// cores. From then on it starts in seconds.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    max_term_width = 100
)]
struct Cli {
    #[command(subcommand)]
    command: Subject,
}

/// A command's own options, and those about building what it needs.
#[derive(Args)]
struct Building<A: Args> {
    #[command(flatten)]
    own: A,
    #[command(flatten)]
    sources: SourceArgs,
}

#[derive(Subcommand)]
enum Subject {
    /// Shows a guest swapping real data into the host's pool, and proves that it all comes back
    ///
    /// Starts the daemon and a guest, loads real data into the guest's memory, lets it be swapped
    /// out and reads it back, comparing checksums. Leaves a report and a plot in target/demo.
    Demo(Building<demo::DemoArgs>),
    /// Runs every check: format, lints, unit and protocol tests, patches, guests
    ///
    /// Prints what each stage says as it says it, then a table of the stages and one closing
    /// line. A stage that fails does not keep the others from running; the exit status tells.
    Test(Building<suite::TestArgs>),
    /// Measures, and shows each figure beside what was aimed at
    ///
    /// The figures go to target/bench as JSON, and a picture beside it. Leave the machine alone
    /// while it runs.
    Bench(Building<bench::BenchArgs>),
    /// Feeds the parts that face guests, clients and files with inputs that a fuzzer makes
    ///
    /// Stops at the first one that makes a target fail, and keeps it.
    Fuzz(fuzz::FuzzArgs),
    /// Starts a guest with a shell on this terminal, and the daemon beside it
    ///
    /// To leave, type `poweroff` in the guest, or Ctrl-A and then X at any time.
    Run(Building<play::RunArgs>),
    /// Builds everything, or the named parts, into the cache
    Build(Building<parts::BuildArgs>),
    /// Builds the kernel after each patch of the series, and runs checkpatch.pl on it
    CheckPatches(Building<check_patches::CheckPatchesArgs>),
    /// Makes Debian packages of the daemon, its tools and the guest's module, in target/packages
    Package,
    /// Writes the manual pages into target/man
    Man,
    /// Says what is missing on this machine, and changes nothing
    Doctor,
    /// Frees space in the cache, and says how much
    ///
    /// Without options it removes what is stale: parts made for an older state of the checkout,
    /// and what interrupted builds left behind.
    CleanCache(clean::CleanArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(cli) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    match cli.command {
        Subject::Demo(args) => {
            let artifacts = Builder::open(args.sources)?.artifacts(false)?;
            demo::run(args.own, &artifacts)?;
        }
        Subject::Test(args) => return suite::run(args.own, args.sources),
        Subject::Bench(args) => bench::run(&args.own, args.sources)?,
        Subject::Fuzz(args) => fuzz::run(&args)?,
        Subject::Run(args) => return play::run(&args.own, args.sources),
        Subject::Build(args) => parts::build(&args.own, args.sources)?,
        Subject::CheckPatches(args) => check_patches::run(&args.own, args.sources)?,
        Subject::Package => drop(package::run()?),
        Subject::Man => package::manuals()?,
        Subject::Doctor => return system::doctor(),
        Subject::CleanCache(args) => clean::run(&args)?,
    }
    Ok(ExitCode::SUCCESS)
}
