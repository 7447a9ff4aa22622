// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The calling side of the control socket, for `cramctl` and for tests.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

/// Longest answer that is taken: far above what any daemon sends.
const ANSWER_MAX: u64 = 64 << 20;
/// A daemon that does not answer for so long will not.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// Nobody listens, or may not be spoken to.
    #[error("{0}")]
    Connect(String),
    /// The connection broke.
    #[error("the connection to the daemon broke: {0}")]
    Broken(#[from] io::Error),
    /// The answer is none.
    #[error("the daemon's answer is not understood: {0}")]
    Garbled(String),
    /// The daemon said no.
    #[error("{message}")]
    Refused {
        /// The JSON-RPC code.
        code: i64,
        /// What it said.
        message: String,
    },
}

/// A connection to a daemon's control socket.
#[derive(Debug)]
pub struct Caller {
    reader: BufReader<UnixStream>,
    serial: u64,
}

impl Caller {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Self, CallError> {
        let stream = UnixStream::connect(path)
            .map_err(|error| CallError::Connect(explain(path.to_owned(), &error)))?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        Ok(Caller {
            reader: BufReader::new(stream),
            serial: 0,
        })
    }

    /// Calls `method` and waits for the answer.
    pub fn call(&mut self, method: &str, params: &Value) -> Result<Value, CallError> {
        self.serial += 1;
        let request =
            json!({ "jsonrpc": "2.0", "id": self.serial, "method": method, "params": params });
        let answer = self.exchange(format!("{request}\n").as_bytes())?;
        if let Some(error) = answer.get("error") {
            return Err(CallError::Refused {
                code: error
                    .get("code")
                    .and_then(Value::as_i64)
                    .unwrap_or_default(),
                message: error
                    .get("message")
                    .and_then(Value::as_str)
                    .unwrap_or("the daemon refused, and gave no reason")
                    .to_owned(),
            });
        }
        match answer.get("result") {
            Some(result) => Ok(result.clone()),
            None => Err(CallError::Garbled("neither result nor error".to_owned())),
        }
    }

    /// Sends bytes as they are, and reads one line.
    pub fn exchange(&mut self, bytes: &[u8]) -> Result<Value, CallError> {
        self.reader.get_mut().write_all(bytes)?;
        let mut line = Vec::new();
        Read::by_ref(&mut self.reader)
            .take(ANSWER_MAX)
            .read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return Err(CallError::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        serde_json::from_slice(&line).map_err(|error| CallError::Garbled(error.to_string()))
    }
}

fn explain(path: PathBuf, error: &io::Error) -> String {
    let path = path.display();
    match error.kind() {
        io::ErrorKind::NotFound => {
            format!(
                "there is no socket {path}; is the daemon running with --control-socket {path}?"
            )
        }
        io::ErrorKind::ConnectionRefused => {
            format!("nobody listens on {path}; the daemon has ended, start it again")
        }
        io::ErrorKind::PermissionDenied => {
            format!("no permission to connect to {path}; run as the user of the daemon")
        }
        _ => format!("cannot connect to {path}: {error}"),
    }
}
