// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask demo`: real data in a guest too small for it, swapped into the
//! host's pool and back, every byte compared.

mod plot;
mod report;
mod sample;
mod view;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use cram_tests::guest::{
    Artifacts, Daemon, DaemonOptions, Guest, GuestOptions, Ledger, LoadEvent, LoadOptions, LoadRun,
    MAY_RUN_OUT, Role,
};

use self::report::Report;
use self::sample::{GuestPoller, HostNumbers, Series};
use self::view::View;
use crate::progress::human_bytes;
use crate::workspace;

/// Between two looks at the daemon.
const INTERVAL: Duration = Duration::from_millis(500);
/// Longest time without a finished step of the load.
const STEP_LIMIT: Duration = Duration::from_secs(600);
/// Where in the guest stress-ng runs.
const GROUP: &str = "work";
/// Pages of each thousand that are changed after the first pass.
const REWRITTEN_PERMILLE: u64 = 50;

/// Options of `cargo xtask demo`.
///
/// Leaves target/demo/report.json and target/demo/plot.svg, and fails when a
/// byte differs or the pages did not travel through the device.
#[derive(Args)]
pub struct DemoArgs {
    /// The host's pool of compressed pages, as the daemon takes it
    #[arg(long, default_value = "1G", value_name = "SIZE")]
    capacity: String,
    /// The guest's memory in MiB
    #[arg(long, default_value_t = 512, value_name = "MIB", value_parser = clap::value_parser!(u32).range(128..=65536))]
    memory: u32,
    /// The guest's processors; each gets a queue of its own
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=16))]
    cpus: u32,
    /// Data to load in MiB, instead of twice the guest's free memory
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..))]
    load: Option<u64>,
    /// Seed of the random orders
    #[arg(long, default_value_t = 1, value_name = "N")]
    seed: u64,
    /// Fewer passes over the data, and a shorter stress-ng
    #[arg(long)]
    quick: bool,
}

/// Runs `cargo xtask demo`.
pub fn run(args: DemoArgs, artifacts: &Artifacts) -> Result<()> {
    let begin = Instant::now();
    let target = workspace::root()?.join("target/demo");
    std::fs::create_dir_all(&target)
        .with_context(|| format!("cannot make {}", target.display()))?;
    let folder = tempfile::Builder::new()
        .prefix("cram-demo-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let outcome = Demo::start(&args, artifacts, folder.path()).and_then(|demo| demo.play(begin));
    keep_logs(folder.path(), &target);
    let (report, plot) = outcome?;
    let report_path = target.join("report.json");
    let plot_path = target.join("plot.svg");
    write(&report_path, &serde_json::to_string_pretty(&report)?)?;
    write(&plot_path, &plot)?;
    println!("\n{}", report.summary());
    println!("  report      {}", report_path.display());
    println!("  plot        {}", plot_path.display());
    if !report.good {
        bail!(
            "the demo found {} problem(s); logs are in {}",
            report.problems.len(),
            target.display()
        );
    }
    Ok(())
}

fn write(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// Copies the logs of daemon, QEMU and guest to where they are found afterwards.
fn keep_logs(folder: &Path, target: &Path) {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let path: PathBuf = entry.path();
        if path.extension().is_some_and(|extension| extension == "log") {
            // Missing logs are a pity and no more.
            let _ = std::fs::copy(&path, target.join(entry.file_name()));
        }
    }
}

struct Demo<'a> {
    args: &'a DemoArgs,
    daemon: Daemon,
    guest: Guest,
    ledger: Ledger,
    capacity_bytes: u64,
    report: Report,
    load: LoadOptions,
}

impl<'a> Demo<'a> {
    fn start(args: &'a DemoArgs, artifacts: &Artifacts, folder: &Path) -> Result<Self> {
        println!("daemon      a pool of {}", args.capacity);
        let mut more = Vec::new();
        if !rustix::process::geteuid().is_root() {
            // The kernel tells root alone how much memory a confined process has.
            println!(
                "            not confined, so that its memory can be seen; as root it would be"
            );
            more.extend(["--sandbox", "off"].map(str::to_owned));
        }
        let mut daemon = Daemon::start(
            artifacts,
            folder,
            DaemonOptions {
                capacity: args.capacity.clone(),
                more,
                ..DaemonOptions::default()
            },
        )?;
        let capacity_bytes = daemon.control().stats()?.get("mem_limit")?;
        let guest = Guest::start(
            artifacts,
            folder,
            GuestOptions {
                sockets: vec![daemon.socket(0).to_owned()],
                queues: args.cpus,
                memory_mib: args.memory,
                cpus: args.cpus,
                swap_mib: u64::from(args.memory) * 4,
                ..GuestOptions::default()
            },
        )?;
        guest.swap_on()?;
        let kernel = guest.shell("uname -r")?.trim().to_owned();
        println!(
            "guest       {} processors, {} MiB, Linux {kernel}, accelerator {}",
            args.cpus,
            args.memory,
            guest.accelerator().name()
        );
        let free_bytes = guest.reading()?.meminfo.get("MemAvailable")? << 10;
        let load = choose_load(args, free_bytes, artifacts)?;
        println!(
            "load        {} of real data into {} of free memory, {} processes: {}",
            human_bytes(load.mib << 20),
            human_bytes(free_bytes),
            load.processes,
            load.passes
        );
        let report = Report {
            accelerator: guest.accelerator().name().to_owned(),
            kernel,
            qemu: qemu_version(artifacts),
            guest_memory_bytes: u64::from(args.memory) << 20,
            guest_free_bytes: free_bytes,
            guest_cpus: args.cpus,
            store_bytes_capacity: capacity_bytes,
            seed: args.seed,
            ..Report::default()
        };
        let processes = [
            (guest.pid(), Role::Qemu),
            (daemon.process_id()?, Role::Daemon),
        ];
        Ok(Self {
            args,
            ledger: Ledger::new(&processes)?,
            daemon,
            guest,
            capacity_bytes,
            report,
            load,
        })
    }

    /// Loads, verifies, and looks on. Returns the report and the plot.
    fn play(mut self, begin: Instant) -> Result<(Report, String)> {
        println!();
        let mut series = Series::new();
        let mut view = View::new(self.capacity_bytes);
        let poller = GuestPoller::default();
        let watched = std::thread::scope(|scope| {
            scope.spawn(|| poller.run(&self.guest));
            let mut watch = Watch {
                daemon: &self.daemon,
                ledger: &mut self.ledger,
                guest: &self.guest,
                poller: &poller,
                series: &mut series,
                view: &mut view,
            };
            let outcome = watch
                .load(&self.load)
                .and_then(|load| Ok((load, watch.stress(self.args.quick)?)));
            poller.stop();
            outcome
        });
        view.end();
        let (load, stress_good) = watched?;
        self.report.take_load(&load);
        self.report.stress_ng_good = stress_good;
        if let Err(error) = self.load.check_sums(self.guest.corpus(), &load.sums) {
            self.report.problems.push(format!("{error:#}"));
        }
        let guest = self.guest.reading()?;
        let host = HostNumbers::read(&self.daemon, &self.ledger)?;
        self.report.take_readings(&host, &guest, &series);
        if let Err(error) = self.guest.finish() {
            self.report.problems.push(format!("{error:#}"));
        }
        self.report
            .judge(!self.args.quick && self.args.load.is_none());
        self.report.wall_s = begin.elapsed().as_secs_f64();
        let report = self.report;
        let mut subtitle = format!(
            "{} of real data in a guest of {}, pool of {}; Linux {}, {}",
            human_bytes(report.load_bytes),
            human_bytes(report.guest_memory_bytes),
            human_bytes(self.capacity_bytes),
            report.kernel,
            report.accelerator
        );
        if report.accelerator == "tcg" {
            subtitle.push_str(" (guest code about ten times slower than on hardware)");
        }
        let plot = plot::svg(&series, &subtitle);
        Ok((report, plot))
    }
}

/// Twice the free memory at least, unless the user knows better.
fn choose_load(args: &DemoArgs, free_bytes: u64, artifacts: &Artifacts) -> Result<LoadOptions> {
    let corpus_mib = std::fs::metadata(&artifacts.corpus)
        .with_context(|| format!("the corpus {}", artifacts.corpus.display()))?
        .len()
        >> 20;
    let mib = args.load.unwrap_or((free_bytes * 2).div_ceil(1 << 20));
    ensure!(
        mib <= corpus_mib,
        "{mib} MiB are to be loaded, but the corpus has {corpus_mib} MiB: choose a smaller --memory or --load"
    );
    let passes = if args.quick {
        "sequential,random"
    } else {
        "sequential,reverse,random,stride"
    };
    Ok(LoadOptions {
        mib,
        processes: u64::from(args.cpus) * 2,
        passes: passes.to_owned(),
        seed: args.seed,
        rewrite_permille: REWRITTEN_PERMILLE,
        ..LoadOptions::default()
    })
}

fn qemu_version(artifacts: &Artifacts) -> String {
    let output = Command::new(&artifacts.qemu).arg("--version").output();
    let text = output.map_or(String::new(), |output| {
        String::from_utf8_lossy(&output.stdout).into_owned()
    });
    // "QEMU emulator version 10.0.13 (…)"
    let version = text.split_whitespace().nth(3).unwrap_or("unknown");
    version.to_owned()
}

/// Looks at guest and daemon while something runs.
struct Watch<'a> {
    daemon: &'a Daemon,
    ledger: &'a mut Ledger,
    guest: &'a Guest,
    poller: &'a GuestPoller,
    series: &'a mut Series,
    view: &'a mut View,
}

impl Watch<'_> {
    fn look(&mut self, phase: &str) -> Result<()> {
        let host = HostNumbers::read(self.daemon, self.ledger)?;
        let sample = self.series.add(self.poller.numbers(), host);
        self.view.show(phase, &sample);
        Ok(())
    }

    fn load(&mut self, options: &LoadOptions) -> Result<cram_tests::guest::LoadReport> {
        let mut phases = vec!["load"];
        for (number, pass) in options.passes.split(',').enumerate() {
            phases.push(pass);
            if number == 0 && options.rewrite_permille > 0 {
                phases.push("rewrite");
            }
        }
        let mut phases = phases.into_iter();
        let mut phase = phases.next().unwrap_or_default();
        self.series.phase(phase);
        self.ledger.exact()?;
        let mut run = LoadRun::start(self.guest, options)?;
        let mut step_begin = Instant::now();
        loop {
            match run.poll(INTERVAL)? {
                Some(LoadEvent::Step(..)) => {
                    step_begin = Instant::now();
                    if let Some(next) = phases.next() {
                        phase = next;
                        self.series.phase(phase);
                    }
                }
                Some(LoadEvent::Finished(report)) => {
                    self.look(phase)?;
                    return Ok(report);
                }
                None => self.look(phase)?,
            }
            ensure!(
                step_begin.elapsed() < STEP_LIMIT,
                "{phase} did not end within {STEP_LIMIT:?}"
            );
        }
    }

    /// A program that is not the project's own, checking its own memory. Returns whether it was content.
    fn stress(&mut self, quick: bool) -> Result<bool> {
        let seconds = if quick { 10 } else { 20 };
        let phase = "stress-ng";
        self.series.phase(phase);
        // It populates more than there is, which reclaim cannot always follow, whatever is swapped to.
        self.guest
            .shell(&format!("echo '{MAY_RUN_OUT}' > /dev/kmsg"))?;
        // Over both workers: more than the guest has.
        let mib = self.guest.options().memory_mib * 13 / 10;
        let command = format!(
            "cd /tmp && stress-ng --vm 2 --vm-bytes {mib}m --vm-keep --oomable --verify \
             --timeout {seconds}s --temp-path /tmp"
        );
        let guest = self.guest;
        let limit = guest.patient(Duration::from_secs(120));
        std::thread::scope(|scope| {
            let run = scope.spawn(move || guest.agent()?.exec(&command, Some(GROUP), limit));
            while !run.is_finished() {
                std::thread::sleep(INTERVAL);
                self.look(phase)?;
            }
            match run.join() {
                Ok(done) => Ok(done?.good()),
                Err(_) => bail!("the thread that ran stress-ng failed"),
            }
        })
    }
}
