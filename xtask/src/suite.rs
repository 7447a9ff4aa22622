// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask test`: every check, one stage after another. A stage that fails
//! does not keep the others from being run.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use cram_tests::guest::Artifacts;

use crate::check_patches;
use crate::command::{for_each_line, program_name};
use crate::fuzz::Fuzzer;
use crate::parts::{Builder, SourceArgs};
use crate::progress::human_duration;
use crate::workspace;

/// Guest tests whose names begin so run on the debug kernel.
const DEBUG_TESTS: &str = "debug_";
/// Guest tests that take minutes each under TCG; `--quick` leaves them out.
const LONG_TESTS: &[&str] = &["a_hundred_kills", "stress_ng"];

/// Options of `cargo xtask test`.
#[derive(Args)]
pub struct TestArgs {
    /// Leave out the debug kernel and the long guest tests
    #[arg(long)]
    quick: bool,
    /// Run only the tests whose name contains this
    #[arg(long, value_name = "FILTER")]
    only: Option<String>,
    /// Start no guests: needs neither a kernel nor QEMU
    #[arg(long)]
    no_guest: bool,
    /// Take hours instead of minutes: what draws lots does so twenty times as often
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// Seed of the tests that draw lots; each prints the one it used
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
}

/// How a stage went.
#[derive(Clone, Copy, Default)]
struct Tally {
    passed: u64,
    failed: u64,
}

impl Tally {
    fn plus(self, other: Tally) -> Tally {
        Tally {
            passed: self.passed + other.passed,
            failed: self.failed + other.failed,
        }
    }
}

struct Stage {
    name: &'static str,
    tally: Tally,
    took: Duration,
}

/// Which kernel's guest tests.
#[derive(Clone, Copy)]
enum Kernel {
    Release,
    Debug,
}

struct Suite<'a> {
    args: &'a TestArgs,
    root: PathBuf,
    stages: Vec<Stage>,
}

/// Runs `cargo xtask test`.
pub fn run(args: TestArgs, sources: SourceArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let mut suite = Suite {
        args: &args,
        root: workspace::root()?,
        stages: Vec::new(),
    };
    // Now, so that the stages which need no guest find a C++ compiler.
    let builder = if args.no_guest {
        None
    } else {
        Some(Builder::open(sources)?)
    };
    if args.only.is_none() {
        suite.stage("format", |suite| suite.fmt());
        suite.stage("lints", |suite| suite.clippy());
    }
    suite.stage("unit and protocol tests", |suite| suite.unit());
    if suite.args.only.is_none() {
        suite.stage("all schedules (loom)", |suite| suite.loom());
        suite.stage("many schedules (shuttle)", |suite| suite.shuttle());
        if has_miri() {
            suite.stage("Miri", |suite| suite.miri());
        }
        if !suite.args.quick {
            suite.stage("fuzzing", |suite| suite.fuzz());
        }
    }
    if let Some(builder) = &builder {
        suite.guests(builder);
    }
    Ok(suite.report(started.elapsed()))
}

impl Suite<'_> {
    fn stage(&mut self, name: &'static str, run: impl FnOnce(&Self) -> Result<Tally>) {
        eprintln!("\n== {name}");
        let started = Instant::now();
        let tally = run(self).unwrap_or_else(|error| {
            eprintln!("error: {error:#}");
            Tally {
                passed: 0,
                failed: 1,
            }
        });
        self.stages.push(Stage {
            name,
            tally,
            took: started.elapsed(),
        });
    }

    fn fmt(&self) -> Result<Tally> {
        let whole = self.check(workspace::cargo().args(["fmt", "--all", "--check"]))?;
        let fuzz = self.check(
            workspace::cargo()
                .args(["fmt", "--check"])
                .args(["--manifest-path", FUZZ_MANIFEST]),
        )?;
        Ok(whole.plus(fuzz))
    }

    fn clippy(&self) -> Result<Tally> {
        let whole = self.check(
            workspace::cargo()
                .args(["clippy", "--workspace", "--all-targets", "--all-features"])
                .args(["--", "-D", "warnings"]),
        )?;
        let fuzz = self.check(
            workspace::cargo()
                .args(["clippy", "--locked", "--manifest-path", FUZZ_MANIFEST])
                .arg("--target-dir")
                .arg(self.target_dir("fuzz-lints"))
                .env("RUSTFLAGS", "--cfg fuzzing")
                .args(["--", "-D", "warnings"]),
        )?;
        Ok(whole.plus(fuzz))
    }

    fn target_dir(&self, name: &str) -> PathBuf {
        workspace::target_dir(&self.root).join(name)
    }

    /// The store's tests that are built with other locks and atomics; `flags` says so.
    fn schedules(&self, flags: &str, args: &[&str]) -> Result<Tally> {
        let mut command = workspace::cargo();
        command
            .args(["test", "--package", "cram-store", "--release"])
            .arg("--target-dir")
            .arg(self.target_dir("schedules"))
            .args(args)
            .env("RUSTFLAGS", flags);
        self.repeat(&mut command);
        self.tests(&mut command)
    }

    fn loom(&self) -> Result<Tally> {
        self.schedules("--cfg loom", &["--lib", "loom_"])
    }

    fn shuttle(&self) -> Result<Tally> {
        self.schedules("--cfg shuttle", &["--test", "schedules"])
    }

    /// What is unsafe, under an interpreter that knows what is undefined.
    fn miri(&self) -> Result<Tally> {
        let mut command = Command::new("cargo");
        command
            .args(["+nightly", "miri", "test", "--package", "cram-store"])
            .args(["--lib", "arena::"])
            .arg("--target-dir")
            .arg(self.target_dir("miri"))
            .env("MIRIFLAGS", "-Zmiri-disable-isolation");
        self.tests(&mut command)
    }

    fn fuzz(&self) -> Result<Tally> {
        let fuzzer = Fuzzer::build()?;
        let mut tally = Tally::default();
        for target in fuzzer.targets()? {
            println!("fuzzing {target}");
            let limit = if self.args.long {
                LONG_FUZZING
            } else {
                SHORT_FUZZING
            };
            match fuzzer.fuzz(&target, limit, 1) {
                Ok(()) => tally.passed += 1,
                Err(error) => {
                    eprintln!("error: {error:#}");
                    tally.failed += 1;
                }
            }
        }
        Ok(tally)
    }

    /// Sets what the tests that draw lots look at.
    fn repeat(&self, command: &mut Command) {
        if let Some(seed) = self.args.seed {
            command.env(SEED, seed.to_string());
        }
        if self.args.long {
            command.env(LONG, LONG_FACTOR.to_string());
        }
    }

    fn unit(&self) -> Result<Tally> {
        let mut command = workspace::cargo();
        command.args(["test", "--workspace", "--no-fail-fast"]);
        // The benchmarks' own parts have tests, too.
        command.args(["--features", "cram-tests/bench"]);
        self.repeat(&mut command);
        if let Some(filter) = &self.args.only {
            command.args(["--", filter]);
        }
        self.tests(&mut command)
    }

    /// The stages that need a kernel or QEMU.
    fn guests(&mut self, builder: &Builder) {
        eprintln!("\n== building");
        let started = Instant::now();
        let with_debug = !self.args.quick;
        let built = builder.artifacts(with_debug);
        let (artifacts, tally) = match built {
            Ok(artifacts) => (Some(artifacts), Tally::default()),
            Err(error) => {
                eprintln!("error: {error:#}");
                let failed = 1;
                (None, Tally { passed: 0, failed })
            }
        };
        self.stages.push(Stage {
            name: "building",
            tally,
            took: started.elapsed(),
        });
        if self.args.only.is_none() {
            self.stage("kernel patches", |_| {
                let count = check_patches::checkpatch(builder)?;
                Ok(Tally {
                    passed: count as u64,
                    failed: 0,
                })
            });
        }
        let Some(artifacts) = artifacts else {
            return;
        };
        if self.args.only.is_none()
            && let Some(qtest) = &artifacts.qtest
        {
            self.stage("QEMU's device test", |suite| suite.qtest(&artifacts, qtest));
        }
        let list = builder.artifacts_path();
        self.stage("guests", |suite| suite.guest_tests(&list, Kernel::Release));
        if with_debug {
            self.stage("guests, debug kernel", |suite| {
                suite.guest_tests(&list, Kernel::Debug)
            });
        }
    }

    fn qtest(&self, artifacts: &Artifacts, program: &Path) -> Result<Tally> {
        let mut tally = Tally::default();
        let mut command = Command::new(program);
        command
            .env("QTEST_QEMU_BINARY", &artifacts.qemu)
            .arg("--tap");
        let ok = self.stream(&mut command, |line| {
            tally.passed += u64::from(line.starts_with("ok "));
            tally.failed += u64::from(line.starts_with("not ok "));
        })?;
        Ok(judge(tally, ok))
    }

    fn guest_tests(&self, artifacts: &Path, kernel: Kernel) -> Result<Tally> {
        let mut command = workspace::cargo();
        command
            .args(["test", "--package", "cram-tests", "--features", "guest"])
            .args(["--test", "guest", "--", "--test-threads=1", "--nocapture"])
            .env("CRAM_ARTIFACTS", artifacts);
        // The harness takes any of several filters, so one that narrows has to skip the others.
        match kernel {
            Kernel::Release => {
                command.args(["--skip", DEBUG_TESTS]);
                if self.args.quick {
                    for name in LONG_TESTS {
                        command.args(["--skip", name]);
                    }
                }
                command.args(&self.args.only);
            }
            Kernel::Debug => match &self.args.only {
                Some(filter) if filter.starts_with(DEBUG_TESTS) => {
                    command.arg(filter);
                }
                Some(filter) => {
                    command.arg(format!("{DEBUG_TESTS}{filter}"));
                }
                None => {
                    command.arg(DEBUG_TESTS);
                }
            },
        }
        self.repeat(&mut command);
        self.tests(&mut command)
    }

    /// A command that passes or fails as a whole.
    fn check(&self, command: &mut Command) -> Result<Tally> {
        let ok = self.stream(command, |_| ())?;
        Ok(Tally {
            passed: u64::from(ok),
            failed: u64::from(!ok),
        })
    }

    /// A `cargo test`, whose summaries are added up.
    fn tests(&self, command: &mut Command) -> Result<Tally> {
        let mut tally = Tally::default();
        let ok = self.stream(command, |line| {
            if let Some((passed, failed)) = summary(line) {
                tally.passed += passed;
                tally.failed += failed;
            }
        })?;
        Ok(judge(tally, ok))
    }

    /// Runs a program and prints its output as it comes. Returns whether it ended well.
    fn stream(&self, command: &mut Command, mut watch: impl FnMut(&str)) -> Result<bool> {
        let name = program_name(command);
        let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
        let errors = writer.try_clone().context("cannot make a pipe")?;
        if std::io::stdout().is_terminal() {
            command.env("CARGO_TERM_COLOR", "always");
        }
        let mut child = command
            .current_dir(&self.root)
            .stdin(Stdio::null())
            .stdout(writer)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        // The command still holds the pipe's writing ends, and the reader must see its end.
        command.stdout(Stdio::null()).stderr(Stdio::null());
        for_each_line(reader, |line| {
            println!("{line}");
            watch(line);
        })?;
        let status = child
            .wait()
            .with_context(|| format!("cannot wait for {name}"))?;
        Ok(status.success())
    }

    fn report(&self, took: Duration) -> ExitCode {
        println!();
        let mut sum = Tally::default();
        for stage in &self.stages {
            let Tally { passed, failed } = stage.tally;
            let verdict = if failed == 0 { "ok" } else { "FAILED" };
            println!(
                "  {:<26} {verdict:<7} {passed:>5} passed {failed:>3} failed {:>8}",
                stage.name,
                human_duration(stage.took)
            );
            sum.passed += passed;
            sum.failed += failed;
        }
        println!("  {:<26} {:>34}", "in all", human_duration(took));
        println!("{} passed, {} failed", sum.passed, sum.failed);
        if sum.failed == 0 {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }
}

/// The environment variable that tests take their seed from.
const SEED: &str = "CRAM_SEED";
/// The one that says how many times as often they draw lots.
const LONG: &str = "CRAM_LONG";
const LONG_FACTOR: u32 = 20;
const FUZZ_MANIFEST: &str = "fuzz/Cargo.toml";
const SHORT_FUZZING: Duration = Duration::from_secs(10);
const LONG_FUZZING: Duration = Duration::from_secs(600);

/// Whether a nightly toolchain with Miri is installed. (It cannot be had from the registries that the
/// tests may use, so it is not asked for.)
fn has_miri() -> bool {
    Command::new("cargo")
        .args(["+nightly", "miri", "--version"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A program that failed has failed, even when no test of it says so.
fn judge(mut tally: Tally, ok: bool) -> Tally {
    if !ok && tally.failed == 0 {
        tally.failed = 1;
    }
    tally
}

/// "test result: ok. 12 passed; 0 failed; …"
fn summary(line: &str) -> Option<(u64, u64)> {
    let rest = line.split_once("test result: ")?.1.split_once(". ")?.1;
    let mut counts = rest.split("; ");
    let mut count =
        |word: &str| -> Option<u64> { counts.next()?.strip_suffix(word)?.trim().parse().ok() };
    Some((count("passed")?, count("failed")?))
}

#[cfg(test)]
mod tests {
    use super::summary;

    #[test]
    fn cargos_summary_is_understood() {
        let line = "test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured";
        assert_eq!(summary(line), Some((3, 2)));
        let coloured = "test result: \u{1b}[32mok\u{1b}[0m. 3 passed; 0 failed; 0 ignored";
        assert_eq!(summary(coloured), Some((3, 0)));
        assert_eq!(summary("test result of another kind"), None);
    }
}
