// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Children of the agent. The agent's own memory is locked; a child runs in a
//! control group of the harness's choice, where it may be swapped out.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// Most output of a command that is kept; more than that would only fill a slow serial line.
const OUTPUT_MAX: usize = 256 << 10;

/// A shell command, as a process group of its own, inside `group` when one is named.
pub(crate) fn shell(command: &str, group: Option<&str>) -> Command {
    let mut shell = Command::new("/bin/sh");
    match group {
        // A shell moves itself into the group first, so that nothing the command allocates is charged elsewhere.
        Some(group) => shell.args([
            "-c",
            "mkdir -p /sys/fs/cgroup/\"$0\" && echo 0 > /sys/fs/cgroup/\"$0\"/cgroup.procs || exit 125; exec /bin/sh -c \"$1\"",
            group,
            command,
        ]),
        None => shell.args(["-c", command]),
    };
    shell.process_group(0);
    shell
}

/// How a child ended.
pub(crate) fn describe(status: ExitStatus) -> Value {
    json!({ "status": status.code(), "signal": status.signal() })
}

/// Runs a command to its end, or kills its whole process group when the time is up.
pub(crate) fn run_to_end(mut command: Command, limit: Duration) -> Result<Value> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("cannot start the command")?;
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        bail!("the command came without its pipes");
    };
    let (stdout, stderr) = (read_in_background(stdout), read_in_background(stderr));
    let until = Instant::now() + limit;
    let mut timed_out = false;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if Instant::now() >= until {
            timed_out = true;
            signal_group(&child, libc::SIGKILL);
            break child.wait()?;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut answer = describe(status);
    answer["timed_out"] = json!(timed_out);
    answer["stdout"] = json!(stdout.join().unwrap_or_default());
    answer["stderr"] = json!(stderr.join().unwrap_or_default());
    Ok(answer)
}

fn read_in_background(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut kept = Vec::new();
        let mut buffer = [0; 4096];
        while let Ok(count) = from.read(&mut buffer) {
            if count == 0 {
                break;
            }
            let room = OUTPUT_MAX - kept.len();
            kept.extend_from_slice(&buffer[..count.min(room)]);
        }
        String::from_utf8_lossy(&kept).into_owned()
    })
}

/// Signals a child's process group.
pub(crate) fn signal_group(child: &Child, signal: i32) {
    if let Ok(pid) = i32::try_from(child.id()) {
        signal_pid_group(pid, signal);
    }
}

/// Signals the process group that `pid` leads.
pub(crate) fn signal_pid_group(pid: i32, signal: i32) {
    // SAFETY: sending a signal touches no memory; the group was made for this child alone.
    unsafe { libc::kill(-pid, signal) };
}

/// A job in the background: its input, and the process group to signal.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) pid: i32,
    input: Option<ChildStdin>,
}

impl Job {
    /// Starts a command whose output lines and end are told through `tell`, from threads of their own.
    pub(crate) fn start(
        mut command: Command,
        tell: impl Fn(Value) + Send + Sync + Clone + 'static,
    ) -> Result<Self> {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start the job")?;
        let pid = i32::try_from(child.id())?;
        let input = child.stdin.take();
        let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
            bail!("the job came without its pipes");
        };
        let tell_lines = |from: Box<dyn Read + Send>, key: &'static str| {
            let tell = tell.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(from).split(b'\n') {
                    let Ok(line) = line else { break };
                    tell(json!({ key: String::from_utf8_lossy(&line) }));
                }
            })
        };
        let readers = [
            tell_lines(Box::new(stdout), "line"),
            tell_lines(Box::new(stderr), "error_line"),
        ];
        std::thread::spawn(move || {
            let status = child.wait();
            for reader in readers {
                let _ = reader.join();
            }
            let end = match status {
                Ok(status) => describe(status),
                Err(error) => json!({ "error": error.to_string() }),
            };
            tell(json!({ "end": end }));
        });
        Ok(Self { pid, input })
    }

    /// Writes to the job's standard input; `None` closes it.
    pub(crate) fn send(&mut self, text: Option<&str>) -> Result<()> {
        match (text, &mut self.input) {
            (None, _) => self.input = None,
            (Some(text), Some(input)) => {
                input.write_all(text.as_bytes())?;
                input.flush()?;
            }
            (Some(_), None) => bail!("the job's input is closed"),
        }
        Ok(())
    }
}
