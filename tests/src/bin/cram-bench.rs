// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmarks. `cargo xtask bench` builds and runs this.

use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::{Parser, Subcommand};
use cram_tests::bench::chart::{self, Panel};
use cram_tests::bench::figures::{Aim, Figures};
use cram_tests::bench::{density, device, guest, page, store};
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
    /// The device, driven over a real socket and real rings
    Device {
        /// Only these sections, of: speed blk latency neighbour idle
        sections: Vec<String>,
    },
    /// Whole guests, and what else they could swap to
    Guest {
        /// Only these sections, of: instructions wall tight idle profile
        sections: Vec<String>,
    },
    /// How much of the host's memory guests take, all told
    Density {
        /// Only these: loads (cycle cold phases page-cache twins squeeze codec), arms, or LOAD:ARM
        parts: Vec<String>,
    },
    /// One section, in this process; prints its figures
    #[command(hide = true)]
    Section { subject: String, section: String },
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
    match &cli.subject {
        Subject::Section { subject, section } => {
            print!("{}", one_section(cli, subject, section)?.to_json());
            Ok(())
        }
        Subject::Store { sections } => {
            let mut all = store::SECTIONS.to_vec();
            // Part of the section on memory, but not of its process.
            all.insert(2, "hash-map");
            bench(cli, "store", sections, &all, store::AIMS, chart::store)
        }
        Subject::Device { sections } => bench(
            cli,
            "device",
            sections,
            &device::SECTIONS,
            device::AIMS,
            chart::device,
        ),
        Subject::Guest { sections } => bench_guest(cli, sections),
        Subject::Density { parts } => bench_density(cli, parts),
    }
}

fn one_section(cli: &Cli, subject: &str, section: &str) -> Result<Figures> {
    match (subject, cli.quick) {
        ("store", true) => store::run(section, store::Extent::QUICK),
        ("store", false) => store::run(section, store::Extent::WHOLE),
        ("device", true) => device::run(section, device::Extent::QUICK),
        ("device", false) => device::run(section, device::Extent::WHOLE),
        _ => bail!("there is nothing called {subject}"),
    }
}

fn bench(
    cli: &Cli,
    subject: &str,
    sections: &[String],
    all: &[&str],
    aims: &'static [Aim],
    panels: fn(&Figures, &'static [Aim]) -> Vec<Panel>,
) -> Result<()> {
    std::fs::create_dir_all(&cli.out)
        .with_context(|| format!("cannot make {}", cli.out.display()))?;
    let mut wanted: Vec<&str> = sections.iter().map(String::as_str).collect();
    if wanted.is_empty() {
        wanted = all.to_vec();
    }
    let (mut figures, failed) = measure(&wanted, |section| {
        let began = Instant::now();
        eprint!("  {subject}: {section} …");
        let figures = in_own_process(cli, subject, section)?;
        eprintln!(" {:.0} s", began.elapsed().as_secs_f64());
        Ok(figures)
    });
    if subject == "device" {
        device::combine(&mut figures);
    }
    report(cli, subject, &figures, aims, &panels(&figures, aims))?;
    complain(&failed)
}

/// Measures section by section. What was measured is kept, whatever fails before or after.
fn measure<'a>(
    sections: &[&'a str],
    mut section: impl FnMut(&str) -> Result<Figures>,
) -> (Figures, Vec<&'a str>) {
    let mut figures = Figures::default();
    let mut failed = Vec::new();
    for name in sections {
        match section(name) {
            Ok(measured) => figures.extend(measured),
            Err(error) => {
                eprintln!("\n  {name}: {error:#}");
                failed.push(*name);
            }
        }
    }
    (figures, failed)
}

fn complain(failed: &[&str]) -> Result<()> {
    if failed.is_empty() {
        return Ok(());
    }
    bail!("these sections failed: {}", failed.join(", "))
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
    let (figures, failed) = measure(&wanted, |section| {
        eprintln!("  guest: {section}");
        bench.section(section)
    });
    // A profile is a text of its own, and must not take the place of what was measured before.
    if figures.iter().next().is_none() {
        return complain(&failed);
    }
    eprintln!(
        "  seconds are of guests under {}",
        bench.accelerator().name()
    );
    let panels = chart::guest(&figures, guest::AIMS);
    report(cli, "guest", &figures, guest::AIMS, &panels)?;
    complain(&failed)
}

fn bench_density(cli: &Cli, parts: &[String]) -> Result<()> {
    std::fs::create_dir_all(&cli.out)
        .with_context(|| format!("cannot make {}", cli.out.display()))?;
    let artifacts = Artifacts::from_env()?;
    let bench = density::Bench {
        artifacts: artifacts.as_ref(),
        extent: if cli.quick {
            density::Extent::QUICK
        } else {
            density::Extent::WHOLE
        },
        out: &cli.out,
    };
    eprintln!("  density:");
    let (figures, failed) = bench.run(parts, |figures| {
        figures.write(&cli.out.join("density.json"))?;
        page::write(&cli.out)
    })?;
    let panels = chart::density(&figures, density::AIMS);
    report(cli, "density", &figures, density::AIMS, &panels)?;
    let (tables, path) = (density::tables(&figures), cli.out.join("density.md"));
    std::fs::write(&path, &tables).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{tables}\n  these tables:    {}", path.display());
    if !failed.is_empty() {
        bail!("these parts failed: {}", failed.join(", "));
    }
    Ok(())
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
    page::write(&cli.out)?;
    println!(
        "\n  all figures:     {}\n  picture:         {}\n  all on one page: {}",
        list.display(),
        picture.display(),
        cli.out.join("report.html").display()
    );
    Ok(())
}

fn in_own_process(cli: &Cli, subject: &str, section: &str) -> Result<Figures> {
    let own: PathBuf = std::env::current_exe().context("where is this program?")?;
    let mut command = Command::new(own);
    command.args(["section", subject, section]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_measured_is_kept_when_something_else_fails() {
        let (figures, failed) = measure(&["one", "two", "three"], |section| {
            if section == "two" {
                bail!("cannot start qemu-storage-daemon");
            }
            let mut figures = Figures::default();
            figures.set(section, 1.0);
            Ok(figures)
        });
        assert_eq!(failed, ["two"]);
        assert_eq!(figures.get("one"), Some(1.0));
        assert_eq!(figures.get("three"), Some(1.0));
        assert!(complain(&failed).is_err() && complain(&[]).is_ok());
    }
}
