// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The harness's end of the serial line to `cram-workload agent`.

use std::collections::{HashMap, VecDeque};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How much longer than a command itself its answer may take.
const ANSWER_SLACK: Duration = Duration::from_secs(60);

/// A job that runs in the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct JobId(u64);

/// What a job said.
#[derive(Clone, Debug)]
pub enum JobEvent {
    /// A line of its standard output.
    Line(String),
    /// A line of its standard error.
    ErrorLine(String),
    /// It is over.
    End(Finished),
}

/// How a command or job ended, and what it printed (a job's lines come as events instead).
#[derive(Clone, Debug, Default)]
pub struct Finished {
    /// Exit status, unless a signal ended it.
    pub status: Option<i64>,
    /// The signal that ended it.
    pub signal: Option<i64>,
    /// Whether it was killed because its time was up.
    pub timed_out: bool,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Finished {
    fn from(value: &Value) -> Self {
        let text = |key: &str| value[key].as_str().unwrap_or_default().to_owned();
        Self {
            status: value["status"].as_i64(),
            signal: value["signal"].as_i64(),
            timed_out: value["timed_out"].as_bool().unwrap_or(false),
            stdout: text("stdout"),
            stderr: text("stderr"),
        }
    }

    /// Whether it ended by itself with status 0.
    #[must_use]
    pub fn good(&self) -> bool {
        self.status == Some(0)
    }
}

#[derive(Default)]
struct Inbox {
    answers: HashMap<u64, Value>,
    events: HashMap<u64, VecDeque<JobEvent>>,
    ready: bool,
    closed: bool,
    next_id: u64,
}

/// Shared by the reading thread and everybody who waits.
#[derive(Default)]
struct Mail {
    inbox: Mutex<Inbox>,
    arrived: Condvar,
}

impl Mail {
    fn inbox(&self) -> MutexGuard<'_, Inbox> {
        self.inbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `take` finds what it looks for.
    fn wait<T>(
        &self,
        limit: Duration,
        what: &str,
        take: impl FnMut(&mut Inbox) -> Option<T>,
    ) -> Result<T> {
        self.poll(limit, what, take)?
            .with_context(|| format!("{what} did not come within {limit:?}"))
    }

    /// Waits for `limit` at most until `take` finds what it looks for.
    fn poll<T>(
        &self,
        limit: Duration,
        what: &str,
        mut take: impl FnMut(&mut Inbox) -> Option<T>,
    ) -> Result<Option<T>> {
        let until = Instant::now() + limit;
        let mut inbox = self.inbox();
        loop {
            if let Some(found) = take(&mut inbox) {
                return Ok(Some(found));
            }
            if inbox.closed {
                bail!("the guest closed its line while {what} was awaited");
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(None);
            }
            inbox = self
                .arrived
                .wait_timeout(inbox, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// The program inside the guest.
pub struct Agent {
    line: Mutex<UnixStream>,
    mail: Arc<Mail>,
}

impl Agent {
    pub(super) fn new(line: UnixStream) -> Result<Self> {
        let mail = Arc::new(Mail::default());
        let (reader, told) = (line.try_clone()?, Arc::clone(&mail));
        std::thread::Builder::new()
            .name("agent".to_owned())
            .spawn(move || read_all(reader, &told))?;
        Ok(Self {
            line: Mutex::new(line),
            mail,
        })
    }

    /// Waits until the program is there.
    ///
    /// # Errors
    ///
    /// When it is not there within `limit`.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        self.mail
            .wait(limit, "the agent", |inbox| inbox.ready.then_some(()))
    }

    /// Forgets that the program was there, for a guest that is about to boot again.
    pub fn expect_again(&self) {
        self.mail.inbox().ready = false;
    }

    fn call(&self, mut request: Value, limit: Duration) -> Result<Value> {
        let id = {
            let mut inbox = self.mail.inbox();
            inbox.next_id += 1;
            inbox.next_id
        };
        request["id"] = json!(id);
        let what = request["op"].as_str().unwrap_or_default().to_owned();
        let text = format!("{request}\n");
        self.line
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(text.as_bytes())
            .context("the guest's line")?;
        let mut answer = self
            .mail
            .wait(limit, &format!("the answer to {what}"), |inbox| {
                inbox.answers.remove(&id)
            })?;
        if let Some(error) = answer["error"].as_str() {
            bail!("the guest answered {what} with: {error}");
        }
        Ok(answer["ok"].take())
    }

    /// Asks for an answer, to see that the guest is alive.
    ///
    /// # Errors
    ///
    /// When there is none within `limit`.
    pub fn ping(&self, limit: Duration) -> Result<()> {
        self.call(json!({ "op": "ping" }), limit).map(drop)
    }

    /// Runs a shell command, in control group `group` if one is named, and waits for its end.
    ///
    /// # Errors
    ///
    /// When the guest does not answer; how the command ended is in the result.
    pub fn exec(&self, command: &str, group: Option<&str>, limit: Duration) -> Result<Finished> {
        let request = json!({
            "op": "exec", "command": command, "cgroup": group, "timeout_s": limit.as_secs_f64(),
        });
        let answer = self
            .call(request, limit + ANSWER_SLACK)
            .with_context(|| format!("in the guest: {command}"))?;
        Ok(Finished::from(&answer))
    }

    /// Runs a shell command that must succeed, and gives what it printed.
    ///
    /// # Errors
    ///
    /// When it fails or takes longer than a minute.
    pub fn shell(&self, command: &str) -> Result<String> {
        let done = self.exec(command, None, Duration::from_secs(60))?;
        if !done.good() {
            bail!(
                "in the guest: {command}: status {:?}, signal {:?}, timed out {}: {}{}",
                done.status,
                done.signal,
                done.timed_out,
                done.stdout,
                done.stderr
            );
        }
        Ok(done.stdout)
    }

    /// The contents of a small file.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub fn read(&self, path: &str) -> Result<String> {
        let answer = self.call(json!({ "op": "read", "path": path }), ANSWER_SLACK)?;
        Ok(answer.as_str().unwrap_or_default().to_owned())
    }

    /// Starts a shell command and goes on.
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn start(&self, command: &str, group: Option<&str>) -> Result<JobId> {
        let request = json!({ "op": "start", "command": command, "cgroup": group });
        let answer = self.call(request, ANSWER_SLACK)?;
        let id = answer["job"].as_u64().context("a job without a number")?;
        Ok(JobId(id))
    }

    /// Writes to a job's standard input; `None` closes it.
    ///
    /// # Errors
    ///
    /// When the job is gone.
    pub fn send(&self, job: JobId, text: Option<&str>) -> Result<()> {
        let request = json!({ "op": "send", "job": job.0, "text": text });
        self.call(request, ANSWER_SLACK).map(drop)
    }

    /// Signals a job's process group.
    ///
    /// # Errors
    ///
    /// When the job is gone.
    pub fn signal(&self, job: JobId, signal: i32) -> Result<()> {
        let request = json!({ "op": "signal", "job": job.0, "signal": signal });
        self.call(request, ANSWER_SLACK).map(drop)
    }

    /// The next thing a job says.
    ///
    /// # Errors
    ///
    /// When it says nothing within `limit`.
    pub fn next_event(&self, job: JobId, limit: Duration) -> Result<JobEvent> {
        self.mail.wait(limit, "a word of the job", |inbox| {
            inbox.events.get_mut(&job.0)?.pop_front()
        })
    }

    /// The next thing a job says, if it says something within `limit`.
    ///
    /// # Errors
    ///
    /// When the line to the guest is closed.
    pub fn poll_event(&self, job: JobId, limit: Duration) -> Result<Option<JobEvent>> {
        self.mail.poll(limit, "a word of the job", |inbox| {
            inbox.events.get_mut(&job.0)?.pop_front()
        })
    }

    /// The job's next line of output.
    ///
    /// # Errors
    ///
    /// When the job ends instead, or says nothing within `limit`.
    pub fn next_line(&self, job: JobId, limit: Duration) -> Result<String> {
        let mut complaints = Vec::new();
        loop {
            match self.next_event(job, limit)? {
                JobEvent::Line(line) => return Ok(line),
                JobEvent::ErrorLine(line) => complaints.push(line),
                JobEvent::End(end) => bail!(
                    "the job ended: status {:?}, signal {:?}: {}",
                    end.status,
                    end.signal,
                    complaints.join("; ")
                ),
            }
        }
    }

    /// Waits for a job's end; its remaining lines are passed over.
    ///
    /// # Errors
    ///
    /// When it goes on longer than `limit`.
    pub fn wait_end(&self, job: JobId, limit: Duration) -> Result<Finished> {
        let until = Instant::now() + limit;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if let JobEvent::End(end) = self.next_event(job, left)? {
                return Ok(end);
            }
        }
    }
}

fn read_all(line: UnixStream, mail: &Mail) {
    for text in BufReader::new(line).split(b'\n') {
        let Ok(text) = text else { break };
        // Before the terminal is raw the kernel may echo or add something: only whole objects count.
        let Ok(value) = serde_json::from_slice::<Value>(&text) else {
            log::debug!("agent: {}", String::from_utf8_lossy(&text));
            continue;
        };
        sort_in(&mut mail.inbox(), value);
        mail.arrived.notify_all();
    }
    mail.inbox().closed = true;
    mail.arrived.notify_all();
}

fn sort_in(inbox: &mut Inbox, value: Value) {
    if value.get("ready").is_some() {
        inbox.ready = true;
    } else if let Some(job) = value["job"].as_u64() {
        let text = |key: &str| value[key].as_str().map(str::to_owned);
        let event = if let Some(line) = text("line") {
            JobEvent::Line(line)
        } else if let Some(line) = text("error_line") {
            JobEvent::ErrorLine(line)
        } else {
            JobEvent::End(Finished::from(&value["end"]))
        };
        inbox.events.entry(job).or_default().push_back(event);
    } else if let Some(id) = value["id"].as_u64() {
        inbox.answers.insert(id, value);
    } else {
        log::warn!("agent: {value}");
    }
}
