// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's control socket: JSON-RPC 2.0, one object per line.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(10);

/// The control socket of a daemon. Each question is a connection of its own,
/// so that a daemon that was killed and started again needs no care.
#[derive(Clone, Debug)]
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// A client of the daemon behind `socket`.
    #[must_use]
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Calls a method.
    ///
    /// # Errors
    ///
    /// When the daemon is not there, answers with an error, or not within ten seconds.
    pub fn call(&self, method: &str, params: Value) -> Result<Value> {
        self.call_within(LIMIT, method, params)
    }

    /// Calls a method whose answer may take so long.
    ///
    /// # Errors
    ///
    /// When the daemon is not there, answers with an error, or not in time.
    pub fn call_within(&self, limit: Duration, method: &str, params: Value) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.socket)
            .with_context(|| format!("control socket {}", self.socket.display()))?;
        stream.set_read_timeout(Some(limit))?;
        let mut request = json!({ "jsonrpc": "2.0", "id": 1, "method": method });
        if !params.is_null() {
            request["params"] = params;
        }
        stream.write_all(format!("{request}\n").as_bytes())?;
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line)?;
        let mut answer: Value = serde_json::from_str(&line)
            .with_context(|| format!("the daemon's answer to {method}: {line:?}"))?;
        if let Some(error) = answer.get("error") {
            bail!("the daemon answered {method} with {error}");
        }
        Ok(answer["result"].take())
    }

    /// The daemon's statistics.
    ///
    /// # Errors
    ///
    /// As for [`Control::call`].
    pub fn stats(&self) -> Result<DaemonReading> {
        Ok(DaemonReading {
            raw: self.call("stats", Value::Null)?,
        })
    }
}

/// One reading of the daemon's statistics.
#[derive(Clone, Debug)]
pub struct DaemonReading {
    /// As the daemon gave them.
    pub raw: Value,
}
