// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmarks. `cargo xtask bench` builds and runs this.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use cram_tests::bench::chart;
use cram_tests::bench::figures::Figures;
use cram_tests::bench::store::{self, Extent};

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
    figures.write(&cli.out.join("store.json"))?;
    let picture = cli.out.join("store.svg");
    let panels = chart::store(&figures, store::AIMS);
    std::fs::write(&picture, chart::svg(&panels))
        .with_context(|| format!("cannot write {}", picture.display()))?;
    println!(
        "\nThe store{}:",
        if cli.quick { " (a quick look)" } else { "" }
    );
    figures.print(store::AIMS);
    println!(
        "\n  all figures: {}\n  picture:     {}",
        cli.out.join("store.json").display(),
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
