// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cramctl`: asks a running daemon, and shows its answers to people.

mod commands;
mod top;

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use serde_json::{Value, json};
use vhost_device_cram::cli::one_line;
use vhost_device_cram::control::client::{CallError, Caller};
use vhost_device_cram::report;

use crate::commands::Command;

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
    control_socket: Option<PathBuf>,

    /// Show the daemon's answers as they are, one JSON object per line
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    command: Command,
}

pub(crate) fn seconds(text: &str) -> Result<Duration, String> {
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
    if let Command::Completions { shell } = arguments.command {
        let mut out = Vec::new();
        clap_complete::generate(shell, &mut Arguments::command(), "cramctl", &mut out);
        return end(show(&String::from_utf8_lossy(&out)));
    }
    if let Command::Man { folder } = &arguments.command {
        return end(manuals(folder).map_err(Failure::Output));
    }
    let Some(socket) = &arguments.control_socket else {
        return fail(USAGE, "--control-socket <SOCKET> is missing; see --help");
    };
    let outcome = Caller::connect(socket)
        .map_err(Failure::from)
        .and_then(|mut caller| run(&mut caller, &arguments.command, arguments.json));
    end(outcome)
}

/// A page for each program, and one for each command of this one.
fn manuals(folder: &Path) -> io::Result<()> {
    clap_mangen::generate_to(Arguments::command(), folder)?;
    clap_mangen::generate_to(vhost_device_cram::cli::Arguments::command(), folder)
}

fn end(outcome: Result<(), Failure>) -> ExitCode {
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

pub(crate) enum Failure {
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

fn run(caller: &mut Caller, command: &Command, as_json: bool) -> Result<(), Failure> {
    if let Some(call) = command.call() {
        let answer = caller.call(call.method, &call.params)?;
        if as_json {
            return show(&format!("{answer}\n"));
        }
        show(&(call.show)(&answer))?;
        return match command {
            Command::Squeeze {
                client, wait: true, ..
            } => follow(caller, client, "squeeze"),
            Command::GiveBack {
                client, wait: true, ..
            } => follow(caller, client, "give_back"),
            _ => Ok(()),
        };
    }
    match command {
        Command::Stats { watch } => stats(caller, as_json, *watch),
        Command::Top { interval } => top::run(caller, *interval),
        Command::Call { method, params } => {
            let params: Value = serde_json::from_str(params)
                .map_err(|error| Failure::Usage(format!("PARAMS is not JSON: {error}")))?;
            let answer = caller.call(method, &params)?;
            show(&format!("{answer}\n"))
        }
        // All others are calls, or need no daemon.
        _ => Ok(()),
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
