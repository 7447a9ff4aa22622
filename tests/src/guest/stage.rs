// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The frame of every guest test.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::artifacts::Artifacts;
use super::console::{Console, last_lines};
use super::daemon::{Daemon, DaemonOptions};
use super::machine::{Guest, GuestOptions};

/// Lines of each log that a failed test shows.
const SHOWN: usize = 25;

/// One test at a time: a guest wants the machine for itself.
static TURN: Mutex<()> = Mutex::new(());

/// Why a test failed: one line, after all that the logs say.
pub struct Failed(String);

impl std::fmt::Debug for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// A test's folder and artifacts.
#[derive(Debug)]
pub struct Stage {
    folder: PathBuf,
    artifacts: Artifacts,
}

impl Stage {
    /// Runs a test.
    ///
    /// # Errors
    ///
    /// When the test fails, a guest's kernel printed what it never should, or nothing was built
    /// to run.
    pub fn run(name: &str, body: impl FnOnce(&Stage) -> Result<()>) -> Result<(), Failed> {
        Self::run_one(name, body).map_err(|error| Failed(format!("{name}: {error:#}")))
    }

    fn run_one(name: &str, body: impl FnOnce(&Stage) -> Result<()>) -> Result<()> {
        let artifacts = Artifacts::from_env()?
            .context("no guest was built: run cargo xtask test, or see docs/testing.md")?;
        // A test that failed leaves nothing behind that the next one could trip over.
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = Instant::now();
        let folder = tempfile::Builder::new()
            .prefix(&format!("cram-{name}-"))
            .tempdir()
            .context("a folder for the test")?;
        let stage = Self {
            folder: folder.path().to_owned(),
            artifacts,
        };
        // From here on the folder goes only when the test is known to be good.
        let kept = KeepFolder(Some(folder));
        body(&stage)?;
        stage.check_consoles()?;
        kept.remove();
        eprintln!("{name}: {:.1} s", begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// The folder for this test's files.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What was built.
    #[must_use]
    pub fn artifacts(&self) -> &Artifacts {
        &self.artifacts
    }

    /// Starts a daemon for one guest with a pool of `capacity`.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn daemon(&self, capacity: &str) -> Result<Daemon> {
        self.daemon_with(DaemonOptions {
            capacity: capacity.to_owned(),
            ..DaemonOptions::default()
        })
    }

    /// Starts a daemon. Should it try what its sandbox forbids, it dies of it, and the test fails.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub fn daemon_with(&self, mut options: DaemonOptions) -> Result<Daemon> {
        options
            .more
            .extend(["--sandbox", "strict"].map(str::to_owned));
        Daemon::start(&self.artifacts, &self.folder, options)
    }

    /// Boots a guest, with swap not yet in use.
    ///
    /// # Errors
    ///
    /// When it does not boot.
    pub fn guest(&self, options: GuestOptions) -> Result<Guest> {
        Guest::start(&self.artifacts, &self.folder, options)
    }

    fn logs(&self) -> Vec<PathBuf> {
        let mut logs: Vec<PathBuf> = std::fs::read_dir(&self.folder)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| path.extension().is_some_and(|ext| ext == "log"))
            .collect();
        logs.sort();
        logs
    }

    fn check_consoles(&self) -> Result<()> {
        for log in self.logs() {
            if log.to_string_lossy().ends_with(".console.log") {
                let splats = Console::new(log).splats()?;
                if !splats.is_empty() {
                    bail!("the kernel complained:\n{}", splats.join("\n"));
                }
            }
        }
        Ok(())
    }
}

/// Keeps the folder, and shows what is in it, unless told that all is well.
struct KeepFolder(Option<tempfile::TempDir>);

impl KeepFolder {
    fn remove(mut self) {
        self.0.take();
    }
}

impl Drop for KeepFolder {
    fn drop(&mut self) {
        let Some(folder) = self.0.take() else {
            return;
        };
        let path = folder.keep();
        let mut names: Vec<PathBuf> = std::fs::read_dir(&path)
            .into_iter()
            .flatten()
            .filter_map(|entry| Some(entry.ok()?.path()))
            .collect();
        names.sort();
        for log in names {
            let name = log.to_string_lossy().into_owned();
            if name.ends_with(".log") {
                eprintln!("---- {name}\n{}", last_lines(&log, SHOWN));
            } else if name.ends_with(".swap.img") {
                // Large, and the guest that wrote it is gone.
                let _ = std::fs::remove_file(&log);
            }
        }
        eprintln!(
            "---- the files of the failed test are kept in {}",
            path.display()
        );
    }
}

/// Asks again and again until `ready` says yes.
///
/// # Errors
///
/// When it does not within `limit`, or fails.
pub fn wait_until(
    what: &str,
    limit: Duration,
    mut ready: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let until = Instant::now() + limit;
    while !ready()? {
        if Instant::now() > until {
            bail!("{what}: not within {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}

/// The seed of a test with chance in it: `CRAM_SEED`, or one from the clock. It is printed.
#[must_use]
pub fn seed_from_env(name: &str) -> u64 {
    let given = std::env::var("CRAM_SEED")
        .ok()
        .and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| {
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        u64::from(now.subsec_nanos()) ^ now.as_secs()
    });
    eprintln!("{name}: CRAM_SEED={seed} repeats this run");
    seed
}
