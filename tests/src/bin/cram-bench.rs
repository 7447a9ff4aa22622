// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmarks. `cargo xtask bench` builds and runs this.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use cram_tests::bench::chart;
use cram_tests::bench::figures::{Aim, Figures};
use cram_tests::bench::guest;
use cram_tests::bench::store::{self, Extent};
use cram_tests::guest::Artifacts;

#[derive(Parser)]
#[command(name = "cram-bench", version)]
struct Cli {
    #[command(subcommand)]
    subject: Subject,
    /// Where the results go
    #[arg(long, default_value = "target/bench", global = true)]
    out: PathBuf,
    /// A look, in a minute or two
    #[arg(long, global = true)]
    quick: bool,
}

#[derive(Subcommand)]
enum Subject {
    /// The store by itself
    Store {
        /// Only these sections, of: speed memory growth recover zstd evict
        sections: Vec<String>,
    },
    /// Whole guests, and what else they could swap to
    Guest {
        /// Only these sections, of: instructions wall tight idle profile
        sections: Vec<String>,
    },
    /// One section, in this process; prints its figures
    #[command(hide = true)]
    StoreSection { section: String },
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<()> {
    let extent = if cli.quick {
        Extent::QUICK
    } else {
        Extent::WHOLE
    };
    match &cli.subject {
        Subject::StoreSection { section } => {
            print!("{}", store::run(section, extent)?.to_json());
            Ok(())
        }
        Subject::Store { sections } => bench_store(cli, sections),
        Subject::Guest { sections } => bench_guest(cli, sections),
    }
}

fn bench_store(cli: &Cli, sections: &[String]) -> Result<()> {
    std::fs::create_dir_all(&cli.out)
        .with_context(|| format!("cannot make {}", cli.out.display()))?;
    let mut wanted: Vec<&str> = sections.iter().map(String::as_str).collect();
    if wanted.is_empty() {
        wanted = store::SECTIONS.to_vec();
        // Part of the section on memory, but not of its process.
        wanted.insert(2, "hash-map");
    }
    let mut figures = Figures::default();
    for section in wanted {
        let began = Instant::now();
        eprint!("  store: {section} …");
        figures.extend(in_own_process(cli, section)?);
        eprintln!(" {:.0} s", began.elapsed().as_secs_f64());
    }
    let panels = chart::store(&figures, store::AIMS);
    report(cli, "store", &figures, store::AIMS, &panels)
}

fn bench_guest(cli: &Cli, sections: &[String]) -> Result<()> {
    std::fs::create_dir_all(&cli.out)
        .with_context(|| format!("cannot make {}", cli.out.display()))?;
    let artifacts =
        Artifacts::from_env()?.context("no guest was built: run cargo xtask bench guest")?;
    let bench = guest::Bench {
        artifacts: &artifacts,
        extent: if cli.quick {
            guest::Extent::QUICK
        } else {
            guest::Extent::WHOLE
        },
        out: &cli.out,
    };
    let mut wanted: Vec<&str> = sections.iter().map(String::as_str).collect();
    if wanted.is_empty() {
        wanted = guest::SECTIONS.to_vec();
    }
    let mut figures = Figures::default();
    for section in wanted {
        eprintln!("  guest: {section}");
        figures.extend(bench.section(section)?);
    }
    // A profile is a text of its own, and must not take the place of what was measured before.
    if figures.iter().next().is_none() {
        return Ok(());
    }
    eprintln!(
        "  seconds are of guests under {}",
        bench.accelerator().name()
    );
    let panels = chart::guest(&figures, guest::AIMS);
    report(cli, "guest", &figures, guest::AIMS, &panels)
}

/// Writes the figures and their picture, and shows those that were aimed at something.
fn report(
    cli: &Cli,
    name: &str,
    figures: &Figures,
    aims: &[Aim],
    panels: &[chart::Panel],
) -> Result<()> {
    let (list, picture) = (
        cli.out.join(format!("{name}.json")),
        cli.out.join(format!("{name}.svg")),
    );
    figures.write(&list)?;
    std::fs::write(&picture, chart::svg(panels))
        .with_context(|| format!("cannot write {}", picture.display()))?;
    println!(
        "\nThe {name}{}:",
        if cli.quick { " (a quick look)" } else { "" }
    );
    figures.print(aims);
    println!(
        "\n  all figures: {}\n  picture:     {}",
        list.display(),
        picture.display()
    );
    Ok(())
}

fn in_own_process(cli: &Cli, section: &str) -> Result<Figures> {
    let own: PathBuf = std::env::current_exe().context("where is this program?")?;
    let mut command = Command::new(own);
    command.args(["store-section", section]);
    if cli.quick {
        command.arg("--quick");
    }
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start myself")?;
    if !output.status.success() {
        bail!("section {section} failed");
    }
    let text = String::from_utf8(output.stdout).context("figures that are no text")?;
    Figures::from_json(&text).with_context(|| format!("section {section}"))
}
