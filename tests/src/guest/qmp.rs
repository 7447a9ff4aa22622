// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A client of QEMU's machine protocol, as small as the tests need it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(30);

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    stream: BufReader<UnixStream>,
    /// Events that came while an answer was awaited.
    events: Vec<Value>,
}

impl Qmp {
    pub(super) fn new(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(LIMIT))?;
        let mut qmp = Self {
            stream: BufReader::new(stream),
            events: Vec::new(),
        };
        qmp.line().context("QEMU's greeting")?;
        qmp.call("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    fn line(&mut self) -> Result<Value> {
        let mut text = String::new();
        if self.stream.read_line(&mut text)? == 0 {
            bail!("QEMU closed its monitor");
        }
        Ok(serde_json::from_str(&text)?)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    ///
    /// When QEMU answers with an error, or not at all.
    pub fn call(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        let text = format!("{request}\n");
        self.stream
            .get_mut()
            .write_all(text.as_bytes())
            .with_context(|| format!("QEMU: {command}"))?;
        loop {
            let mut value = self.line().with_context(|| format!("QEMU: {command}"))?;
            if value.get("event").is_some() {
                self.events.push(value);
            } else if let Some(error) = value.get("error") {
                bail!("QEMU: {command}: {}", error["desc"]);
            } else {
                return Ok(value["return"].take());
            }
        }
    }

    /// Fails unless the guest runs.
    ///
    /// # Errors
    ///
    /// When QEMU is gone, or the guest is stopped.
    pub fn expect_running(&mut self) -> Result<()> {
        let status = self.call("query-status", json!({}))?;
        match status["status"].as_str() {
            Some("running") => Ok(()),
            _ => bail!("the guest does not run: {status}"),
        }
    }

    /// Waits for an event of this name for which `matches` holds.
    ///
    /// # Errors
    ///
    /// When it does not come within `limit`.
    pub fn wait_event(
        &mut self,
        name: &str,
        limit: Duration,
        matches: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let until = Instant::now() + limit;
        loop {
            let found = |event: &Value| event["event"] == name && matches(&event["data"]);
            if let Some(place) = self.events.iter().position(found) {
                self.events.remove(place);
                return Ok(());
            }
            if Instant::now() > until {
                bail!("QEMU did not tell of {name} within {limit:?}");
            }
            // An answered question brings in the events before it.
            self.call("query-status", json!({}))?;
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}
