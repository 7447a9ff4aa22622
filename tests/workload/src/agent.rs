// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The agent: JSON objects, one per line, both ways over a serial line.
//!
//! A request has an `id` and an `op`; its answer has the same `id` and either
//! `ok` or `error`. Requests run side by side, so answers come in any order.
//! What jobs say comes between them: `{"job": N, "line": …}`, `{"job": N, "end": …}`.
//!
//! | op | with | gives |
//! |---|---|---|
//! | `ping` | | uptime |
//! | `exec` | `command`, `timeout_s`, `cgroup` | status, signal, stdout, stderr, timed_out |
//! | `read` | `path` | text |
//! | `start` | `command`, `cgroup` | job |
//! | `send` | `job`, `text` (absent: close) | |
//! | `signal` | `job`, `signal` | |
//!
//! Everything of the agent's is locked in memory: when the swap device dies,
//! somebody must be left to tell of it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, OFlags};
use rustix::termios::OptionalActions;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::job::{self, Job};
use crate::region::lock_process;

/// Stack of a thread: all of it is locked in memory once it is touched.
const STACK: usize = 256 << 10;
/// How long a command may run when the request does not say.
const TIMEOUT_S: f64 = 60.0;

#[derive(Deserialize)]
struct Request {
    id: u64,
    #[serde(flatten)]
    op: Op,
}

#[derive(Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum Op {
    Ping,
    Exec {
        command: String,
        timeout_s: Option<f64>,
        cgroup: Option<String>,
    },
    Read {
        path: String,
    },
    Start {
        command: String,
        cgroup: Option<String>,
    },
    Send {
        job: u64,
        text: Option<String>,
    },
    Signal {
        job: u64,
        signal: i32,
    },
}

/// The line to the harness. Whole lines only, one at a time.
#[derive(Clone)]
struct Line(Arc<Mutex<File>>);

impl Line {
    fn tell(&self, value: &Value) {
        let text = format!("{value}\n");
        // When the harness is gone there is nobody to tell.
        let _ = held(&self.0).write_all(text.as_bytes());
    }
}

/// A lock whose holder cannot leave it half done: poison means nothing here.
fn held<T>(lock: &Mutex<T>) -> MutexGuard<'_, T> {
    lock.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Clone)]
struct Agent {
    line: Line,
    jobs: Arc<Mutex<BTreeMap<u64, Job>>>,
}

/// Runs the mode: `agent TTY`.
pub(crate) fn run(words: &[String]) -> Result<ExitCode> {
    let [path] = words else {
        bail!("one terminal is needed");
    };
    lock_process()?;
    // What it starts is not to be swapped either, unless a request names another group.
    let pid = std::process::id().to_string();
    if let Err(error) = std::fs::write("/sys/fs/cgroup/init/cgroup.procs", pid) {
        eprintln!("agent: stays in its control group: {error}");
    }
    let tty = open_raw(path)?;
    let agent = Agent {
        line: Line(Arc::new(Mutex::new(tty.try_clone()?))),
        jobs: Arc::default(),
    };
    agent
        .line
        .tell(&json!({ "ready": env!("CARGO_PKG_VERSION") }));
    for line in BufReader::new(tty).split(b'\n') {
        let line = line.context("the line to the harness broke")?;
        if line.is_empty() {
            continue;
        }
        match serde_json::from_slice::<Request>(&line) {
            Ok(request) => agent.accept(request),
            Err(error) => agent
                .line
                .tell(&json!({ "error": format!("request: {error}") })),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens a terminal as a plain pipe of bytes: no echo, no signals, no translation.
fn open_raw(path: &str) -> Result<File> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let tty = rustix::fs::open(path, flags, Mode::empty())
        .with_context(|| format!("cannot open {path}"))?;
    let mut settings = rustix::termios::tcgetattr(&tty).context("not a terminal")?;
    settings.make_raw();
    rustix::termios::tcsetattr(&tty, OptionalActions::Now, &settings)
        .context("cannot set the terminal up")?;
    Ok(File::from(tty))
}

impl Agent {
    /// What may take long gets a thread; what must keep its order is done at once.
    fn accept(&self, request: Request) {
        let agent = self.clone();
        let at_once = matches!(
            request.op,
            Op::Ping | Op::Start { .. } | Op::Send { .. } | Op::Signal { .. }
        );
        let id = request.id;
        let work = move || {
            let answer = match agent.execute(request) {
                Ok(value) => json!({ "id": id, "ok": value }),
                Err(error) => json!({ "id": id, "error": format!("{error:#}") }),
            };
            agent.line.tell(&answer);
        };
        if at_once {
            work();
            return;
        }
        let started = std::thread::Builder::new().stack_size(STACK).spawn(work);
        if let Err(error) = started {
            let text = format!("no thread: {error}");
            self.line.tell(&json!({ "id": id, "error": text }));
        }
    }

    fn execute(&self, request: Request) -> Result<Value> {
        match request.op {
            Op::Ping => Ok(json!(std::fs::read_to_string("/proc/uptime")?.trim())),
            Op::Exec {
                command,
                timeout_s,
                cgroup,
            } => {
                let seconds = timeout_s.unwrap_or(TIMEOUT_S);
                let limit = Duration::try_from_secs_f64(seconds).context("timeout_s")?;
                job::run_to_end(job::shell(&command, cgroup.as_deref()), limit)
            }
            Op::Read { path } => {
                let bytes = std::fs::read(&path).with_context(|| path.clone())?;
                Ok(json!(String::from_utf8_lossy(&bytes)))
            }
            Op::Start { command, cgroup } => self.start(request.id, &command, cgroup.as_deref()),
            Op::Send { job, text } => {
                self.job(job, |job| job.send(text.as_deref()))?;
                Ok(Value::Null)
            }
            Op::Signal { job, signal } => {
                self.job(job, |job| {
                    job::signal_pid_group(job.pid, signal);
                    Ok(())
                })?;
                Ok(Value::Null)
            }
        }
    }

    /// Starts a job that is known by its request's id.
    fn start(&self, id: u64, command: &str, cgroup: Option<&str>) -> Result<Value> {
        let line = self.line.clone();
        let jobs = Arc::clone(&self.jobs);
        let tell = move |mut value: Value| {
            if value.get("end").is_some() {
                // The process id may soon be another's: it must not be signalled any more.
                held(&jobs).remove(&id);
            }
            value["job"] = json!(id);
            line.tell(&value);
        };
        // Held until the job is entered, so that its end cannot come first.
        let mut entered = held(&self.jobs);
        let job = Job::start(job::shell(command, cgroup), tell)?;
        let pid = job.pid;
        entered.insert(id, job);
        Ok(json!({ "job": id, "pid": pid }))
    }

    fn job<T>(&self, id: u64, act: impl FnOnce(&mut Job) -> Result<T>) -> Result<T> {
        let mut jobs = held(&self.jobs);
        let job = jobs
            .get_mut(&id)
            .with_context(|| format!("no job {id} runs"))?;
        act(job)
    }
}
