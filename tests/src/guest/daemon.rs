// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A running `vhost-device-cram`.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::artifacts::Artifacts;
use super::control::Control;
use super::process::Process;

/// How long the daemon may take to open its sockets.
const START_LIMIT: Duration = Duration::from_secs(20);

/// How a daemon is started.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    /// How many guests it serves, each on a socket of its own.
    pub sockets: usize,
    /// The pool's size, as its command line takes it.
    pub capacity: String,
    /// Further words of its command line.
    pub more: Vec<String>,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self {
            sockets: 1,
            capacity: "512M".to_owned(),
            more: Vec::new(),
        }
    }
}

/// A daemon. Dropping it kills it.
#[derive(Debug)]
pub struct Daemon {
    program: PathBuf,
    options: DaemonOptions,
    sockets: Vec<PathBuf>,
    control_socket: PathBuf,
    log: PathBuf,
    process: Option<Process>,
}

impl Daemon {
    /// Starts a daemon with its sockets and its log in `folder`.
    ///
    /// # Errors
    ///
    /// When it does not open its sockets in time.
    pub fn start(artifacts: &Artifacts, folder: &Path, options: DaemonOptions) -> Result<Self> {
        let sockets = (0..options.sockets)
            .map(|number| folder.join(format!("guest{number}.sock")))
            .collect();
        let mut daemon = Self {
            program: artifacts.daemon.clone(),
            options,
            sockets,
            control_socket: folder.join("control.sock"),
            log: folder.join("daemon.log"),
            process: None,
        };
        daemon.restart()?;
        daemon.wait_open()?;
        Ok(daemon)
    }

    /// Starts the daemon again after [`Daemon::kill`], on the same sockets, without waiting for it.
    ///
    /// Call it from the thread that runs the test: the daemon dies with the thread that started it.
    ///
    /// # Errors
    ///
    /// When it runs already or cannot be started.
    pub fn restart(&mut self) -> Result<()> {
        ensure!(self.process.is_none(), "the daemon runs already");
        let mut command = Command::new(&self.program);
        for socket in &self.sockets {
            command.arg("--socket-path").arg(socket);
        }
        command.arg("--control-socket").arg(&self.control_socket);
        command.args(["--capacity", &self.options.capacity]);
        command.args(&self.options.more);
        if std::env::var_os("RUST_LOG").is_none() {
            command.env("RUST_LOG", "info");
        }
        self.process = Some(Process::start("the daemon", command, &self.log)?);
        Ok(())
    }

    /// Waits until the daemon answers on its control socket and has opened the others.
    ///
    /// # Errors
    ///
    /// When it ends instead, or takes too long.
    pub fn wait_open(&mut self) -> Result<()> {
        let until = Instant::now() + START_LIMIT;
        loop {
            self.process_mut()?.expect_running()?;
            let is_socket = |path: &PathBuf| {
                std::fs::metadata(path).is_ok_and(|data| data.file_type().is_socket())
            };
            let answer = self.control().stats();
            if answer.is_ok() && self.sockets.iter().all(is_socket) {
                return Ok(());
            }
            if Instant::now() > until {
                let why = answer.err().map(|error| format!("{error:#}"));
                bail!("the daemon did not open its sockets: {why:?}");
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn process_mut(&mut self) -> Result<&mut Process> {
        self.process.as_mut().context("the daemon is not started")
    }

    /// Kills the daemon with SIGKILL.
    ///
    /// # Errors
    ///
    /// When it had ended by itself before.
    pub fn kill(&mut self) -> Result<()> {
        self.process_mut()?.expect_running()?;
        if let Some(mut process) = self.process.take() {
            process.kill()?;
        }
        Ok(())
    }

    /// Asks the daemon to end (SIGTERM), and waits until it did so with status 0.
    ///
    /// # Errors
    ///
    /// When it does not, or not in time.
    pub fn stop(&mut self) -> Result<()> {
        self.process_mut()?.expect_running()?;
        if let Some(mut process) = self.process.take() {
            process.terminate()?;
            let status = process.wait(START_LIMIT)?;
            ensure!(status.success(), "the daemon ended with {status}");
        }
        Ok(())
    }

    /// Stops the daemon where it is (SIGSTOP): it answers nothing, and nobody is told.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn pause(&mut self) -> Result<()> {
        let process = self.process_mut()?;
        process.expect_running()?;
        process.pause()
    }

    /// Lets the daemon go on after [`Daemon::pause`].
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn resume(&mut self) -> Result<()> {
        let process = self.process_mut()?;
        process.expect_running()?;
        process.resume()
    }

    /// Fails when the daemon ended by itself.
    ///
    /// # Errors
    ///
    /// As it says.
    pub fn expect_running(&mut self) -> Result<()> {
        self.process_mut()?.expect_running()
    }

    /// The socket of guest `number`.
    #[must_use]
    pub fn socket(&self, number: usize) -> &Path {
        &self.sockets[number]
    }

    /// The control socket's client.
    #[must_use]
    pub fn control(&self) -> Control {
        Control::new(self.control_socket.clone())
    }

    /// The control socket's path.
    #[must_use]
    pub fn control_socket(&self) -> &Path {
        &self.control_socket
    }

    /// The daemon's process.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn process_id(&mut self) -> Result<u32> {
        let process = self.process_mut()?;
        process.expect_running()?;
        Ok(process.pid())
    }

    /// Processor time that the daemon's threads have used.
    ///
    /// # Errors
    ///
    /// When it does not run.
    pub fn cpu_time(&mut self) -> Result<Duration> {
        let process = self.process_mut()?;
        process.expect_running()?;
        let mut total_ns = 0;
        for task in std::fs::read_dir(format!("/proc/{}/task", process.pid()))? {
            // A thread may end meanwhile.
            let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
            let first = text.split_whitespace().next();
            total_ns += first.and_then(|ns| ns.parse::<u64>().ok()).unwrap_or(0);
        }
        Ok(Duration::from_nanos(total_ns))
    }
}
