// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cramctl`: asks a running daemon, and shows its answers to people.

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::{Parser, Subcommand};
use serde_json::{Value, json};
use vhost_device_cram::balance::Copies;
use vhost_device_cram::cli::one_line;
use vhost_device_cram::control::client::{CallError, Caller};
use vhost_device_cram::{report, size};

/// Exit status of a wrong command line, as elsewhere.
const USAGE: u8 = 2;
/// Longest time between two readings.
const WATCH_MAX: f64 = 86_400.0;

/// Look into a running vhost-device-cram, and tell it what to do.
#[derive(Parser)]
#[command(
    name = "cramctl",
    version,
    after_help = "Exit status: 0 done, 1 the daemon is not there or refused, 2 wrong command line."
)]
struct Arguments {
    /// The daemon's control socket
    #[arg(long, short = 'C', value_name = "SOCKET")]
    control_socket: PathBuf,

    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show what is stored, for whom, and how well it compresses
    Stats {
        /// Show the daemon's answer as it is, one JSON object per line
        #[arg(long)]
        json: bool,
        /// Show it again every SECS seconds, with what happened in between
        #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "1",
              value_parser = seconds)]
        watch: Option<Duration>,
    },
    /// List the clients and their sockets
    Clients,
    /// Show a client's quota, or set it
    Quota {
        /// The client's name
        client: String,
        /// The new quota, such as 512M
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Show what a client counts for when the store is full, or set it (100 is usual)
    Weight {
        /// The client's name
        client: String,
        /// The new weight
        weight: Option<u32>,
    },
    /// Drop all pages of a client, for instance of a virtual machine that does not come back
    Reset {
        /// The client's name
        client: String,
        /// Also while it is connected: it loses what it has there
        #[arg(long)]
        force: bool,
    },
    /// Forget a client that has no socket any more, with its pages
    Remove {
        /// The client's name
        client: String,
    },
    /// Move what is stored together, and give what is free back to the host
    Compact,
    /// Compress cold pages once more, and better
    Recompress {
        /// Only pages that were cold for so many seconds
        #[arg(default_value_t = 0)]
        cold_after: u32,
    },
    /// Show how large the stored images are, how cold, and what else is held
    Anatomy,
    /// Refuse all further puts of a client
    Freeze {
        /// The client's name
        client: String,
    },
    /// Take puts of a client again
    Thaw {
        /// The client's name
        client: String,
    },
    /// Drop ephemeral pages of a client (persistent ones are never dropped)
    Flush {
        /// The client's name
        client: String,
        /// How much; everything when not given
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Ask a client to free so much of its memory: its cold pages come to the pool
    Squeeze {
        /// The client's name
        client: String,
        /// How much, such as 512M; 0 ends a squeeze that goes on
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Stay until it is done, and show how it goes
        #[arg(long)]
        wait: bool,
    },
    /// Ask a client to take pages back into its own memory
    GiveBack {
        /// The client's name
        client: String,
        /// How much, such as 512M; 0 ends what goes on
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Stay until it is done, and show how it goes
        #[arg(long)]
        wait: bool,
    },
    /// Show what is wanted of a client's memory, or change it
    Policy {
        /// The client's name
        client: String,
        /// What becomes of the pool's copy of a page that was loaded back
        #[arg(long, value_enum)]
        copies: Option<Copies>,
        /// Whether the client frees by itself what it does not use
        #[arg(long, value_name = "BOOL")]
        auto_squeeze: Option<bool>,
    },
    /// Let a client use the shared pool of a uuid
    Authorise {
        /// The client's name
        client: String,
        /// The pool's uuid
        uuid: String,
        /// No longer let it
        #[arg(long)]
        revoke: bool,
    },
    /// List the methods of the control socket
    Methods,
    /// Show the daemon's version
    Version,
    /// Call a method, and show the answer as JSON
    Call {
        /// The method's name
        method: String,
        /// Its parameters, a JSON object
        #[arg(default_value = "{}")]
        params: String,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=WATCH_MAX).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("write a number of seconds, 0.1 or more".to_owned()),
    }
}

fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
            ) =>
        {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return fail(USAGE, &one_line(&error)),
    };
    let outcome = Caller::connect(&arguments.control_socket)
        .map_err(Failure::from)
        .and_then(|mut caller| run(&mut caller, arguments.command));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has seen enough.
        Err(Failure::Output(error)) if error.kind() == io::ErrorKind::BrokenPipe => {
            ExitCode::SUCCESS
        }
        Err(Failure::Usage(message)) => fail(USAGE, &message),
        Err(Failure::Call(error)) => fail(1, &error.to_string()),
        Err(Failure::Output(error)) => fail(1, &format!("cannot write: {error}")),
    }
}

fn fail(status: u8, message: &str) -> ExitCode {
    eprintln!("cramctl: {message}");
    ExitCode::from(status)
}

enum Failure {
    Call(CallError),
    Output(io::Error),
    Usage(String),
}

impl From<CallError> for Failure {
    fn from(error: CallError) -> Self {
        Failure::Call(error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Failure::Output(error)
    }
}

fn run(caller: &mut Caller, command: Command) -> Result<(), Failure> {
    match command {
        Command::Stats { json, watch } => stats(caller, json, watch),
        Command::Clients => show(&report::clients(&caller.call("clients", &json!({}))?)),
        Command::Methods => show(&report::methods(&caller.call("methods", &json!({}))?)),
        Command::Version => show(&report::version(&caller.call("version", &json!({}))?)),
        Command::Quota { client, size } => {
            let mut params = json!({ "client": client });
            if let Some(size) = size {
                params["bytes"] = size.into();
            }
            let answer = caller.call("client.quota", &params)?;
            let bytes = answer
                .get("quota_bytes")
                .and_then(Value::as_u64)
                .unwrap_or_default();
            show(&format!("{client}: quota {}\n", size::show(bytes)))
        }
        Command::Weight { client, weight } => {
            let mut params = json!({ "client": client });
            if let Some(weight) = weight {
                params["weight"] = weight.into();
            }
            let answer = caller.call("client.weight", &params)?;
            let weight = answer.get("weight").and_then(Value::as_u64);
            show(&format!(
                "{client}: weight {}\n",
                weight.unwrap_or_default()
            ))
        }
        Command::Reset { client, force } => {
            let params = json!({ "client": client, "force": force });
            let answer = caller.call("client.reset", &params)?;
            let pages = answer.get("pages").and_then(Value::as_u64);
            let pages = pages.unwrap_or_default();
            show(&format!("{client}: {pages} pages dropped\n"))
        }
        Command::Remove { client } => {
            let answer = caller.call("client.remove", &json!({ "client": client }))?;
            let pages = answer.get("pages").and_then(Value::as_u64);
            let pages = pages.unwrap_or_default();
            show(&format!("{client}: removed, with {pages} pages\n"))
        }
        Command::Compact => {
            let answer = caller.call("store.compact", &json!({}))?;
            show(&report::compacted(&answer))
        }
        Command::Recompress { cold_after } => {
            let params = json!({ "cold_after_s": cold_after });
            show(&report::recompressed(
                &caller.call("store.recompress", &params)?,
            ))
        }
        Command::Anatomy => show(&report::anatomy(&caller.call("store.anatomy", &json!({}))?)),
        Command::Freeze { client } => {
            caller.call("client.freeze", &json!({ "client": client }))?;
            show(&format!("{client}: frozen, puts are refused\n"))
        }
        Command::Thaw { client } => {
            caller.call("client.thaw", &json!({ "client": client }))?;
            show(&format!("{client}: thawed\n"))
        }
        Command::Flush { client, size } => {
            let mut params = json!({ "client": client });
            if let Some(size) = size {
                params["bytes"] = size.into();
            }
            let answer = caller.call("client.flush", &params)?;
            let pages = answer
                .get("pages")
                .and_then(Value::as_u64)
                .unwrap_or_default();
            show(&format!("{client}: {pages} ephemeral pages dropped\n"))
        }
        Command::Squeeze { client, size, wait } => {
            let params = json!({ "client": client, "bytes": size });
            caller.call("client.squeeze", &params)?;
            show(&format!("{client}: asked to free {}\n", size::show(size)))?;
            if wait {
                follow(caller, &client, "squeeze")?;
            }
            Ok(())
        }
        Command::GiveBack { client, size, wait } => {
            let params = json!({ "client": client, "bytes": size });
            let answer = caller.call("client.give_back", &params)?;
            let is_connected = answer.get("connected").and_then(Value::as_bool) == Some(true);
            let note = if is_connected {
                ""
            } else {
                " (when it connects)"
            };
            show(&format!(
                "{client}: asked to take back {}{note}\n",
                size::show(size)
            ))?;
            if wait && is_connected {
                follow(caller, &client, "give_back")?;
            }
            Ok(())
        }
        Command::Policy {
            client,
            copies,
            auto_squeeze,
        } => {
            let mut params = json!({ "client": client });
            if let Some(copies) = copies {
                params["copies"] = copies.name().into();
            }
            if let Some(auto) = auto_squeeze {
                params["auto_squeeze"] = auto.into();
            }
            let answer = caller.call("client.policy", &params)?;
            show(&report::policy(&answer))
        }
        Command::Authorise {
            client,
            uuid,
            revoke,
        } => {
            let params = json!({ "client": client, "uuid": uuid, "revoke": revoke });
            caller.call("pool.authorise", &params)?;
            let word = if revoke {
                "no longer authorised"
            } else {
                "authorised"
            };
            show(&format!("{client}: {word} for the shared pool {uuid}\n"))
        }
        Command::Call { method, params } => {
            let params: Value = serde_json::from_str(&params)
                .map_err(|error| Failure::Usage(format!("PARAMS is not JSON: {error}")))?;
            let answer = caller.call(&method, &params)?;
            show(&format!("{answer}\n"))
        }
    }
}

/// Shows how an errand of a client goes, until it has ended or the client is gone.
fn follow(caller: &mut Caller, client: &str, errand: &str) -> Result<(), Failure> {
    const INTERVAL: Duration = Duration::from_millis(500);
    let mut last = String::new();
    loop {
        std::thread::sleep(INTERVAL);
        let stats = caller.call("stats", &json!({}))?;
        let Some((line, goes_on)) = report::errand(&stats, client, errand) else {
            return Ok(());
        };
        if line != last {
            show(&line)?;
            last = line;
        }
        if !goes_on {
            return Ok(());
        }
    }
}

fn show(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

fn stats(caller: &mut Caller, as_json: bool, watch: Option<Duration>) -> Result<(), Failure> {
    let mut before: Option<(Instant, Value)> = None;
    loop {
        let now = Instant::now();
        let answer = caller.call("stats", &json!({}))?;
        if as_json {
            show(&format!("{answer}\n"))?;
        } else {
            let earlier = before.as_ref().map(|(at, answer)| (now - *at, answer));
            let is_first = before.is_none();
            let text = report::stats(&answer, earlier);
            show(&if is_first { text } else { format!("\n{text}") })?;
        }
        let Some(interval) = watch else {
            return Ok(());
        };
        before = Some((now, answer));
        std::thread::sleep(interval);
    }
}
