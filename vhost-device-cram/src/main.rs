// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `vhost-device-cram`: starts the daemon and waits for a signal to end it.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use vhost_device_cram::cli::{Arguments, Sandbox, Unread};
use vhost_device_cram::limits;
use vhost_device_cram::sandbox::seccomp::Reaction;
use vhost_device_cram::sandbox::{self, SandboxError};
use vhost_device_cram::server::{Daemon, Options, Ready};
use vhost_device_cram::service::Service;

/// Exit status of a wrong command line, as elsewhere.
const USAGE: u8 = 2;
/// How long ending may take.
const STOP_MAX: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments = match Arguments::read(std::env::args_os()) {
        Ok(arguments) => arguments,
        Err(Unread::CommandLine(error)) => return usage(&error),
        Err(Unread::File(message)) => return fail(USAGE, &message),
    };
    if arguments.print_capabilities {
        // As QEMU's vhost-user convention has it; there are no features to choose from.
        println!("{{\n  \"type\": \"cram\"\n}}");
        return ExitCode::SUCCESS;
    }
    start_log(arguments.log_level);
    let options = match arguments.options() {
        Ok(options) => options,
        Err(error) => return fail(USAGE, &error),
    };
    limits::raise_descriptors();
    // Before there is any other thread, so that all of them leave the signals to this one.
    let signals = match EndSignals::block() {
        Ok(signals) => signals,
        Err(error) => return fail(1, &format!("cannot block signals: {error}")),
    };
    // Opened first, then confined, then run: threads inherit what the process may do.
    let ready = match Ready::new(&options) {
        Ok(ready) => ready,
        Err(error) => return fail(1, &error.to_string()),
    };
    // Asked now, since a confined process cannot.
    limits::report(&options.offer, options.guests.len());
    let service = Service::connect();
    service.ready();
    if let Err(error) = confine(arguments.sandbox, &options) {
        return fail(1, &error.to_string());
    }
    let daemon = match ready.run() {
        Ok(daemon) => daemon,
        Err(error) => return fail(1, &error.to_string()),
    };
    let watchdog = match service.watch(daemon.shared()) {
        Ok(watchdog) => watchdog,
        Err(error) => return fail(1, &format!("cannot watch: {error}")),
    };
    for guest in &options.guests {
        log::info!("listening on {} for {}", guest.socket.display(), guest.name);
    }
    if let Some(address) = &options.metrics {
        log::info!("metrics on {address}");
    }
    if let Some(path) = &options.control_socket {
        log::info!("control socket {}", path.display());
    }
    let signal = signals.wait();
    log::info!("ending on signal {signal}");
    service.stopping();
    if options.store.arena.is_none() {
        warn_of_losses(&daemon);
    }
    // A front-end that gave us broken descriptors could hold up one of our threads for ever.
    std::thread::spawn(|| {
        std::thread::sleep(STOP_MAX);
        say("not everything could be ended in time");
        std::process::exit(1);
    });
    daemon.stop();
    drop(watchdog);
    ExitCode::SUCCESS
}

/// Says whose pages end with the daemon.
fn warn_of_losses(daemon: &Daemon) {
    for guest in daemon.shared().guests.list() {
        let pages = guest.account.stats().pages_stored;
        if pages > 0 {
            log::warn!(
                "{}: {pages} pages end with this daemon: there is no --arena to keep them in",
                guest.name
            );
        }
    }
}

fn start_log(level: Option<log::LevelFilter>) {
    let mut builder = env_logger::Builder::new();
    match level {
        Some(level) => builder.filter_level(level),
        None => builder
            .filter_level(log::LevelFilter::Info)
            .parse_default_env(),
    };
    builder.format_target(false).init();
}

/// Gives up what is not needed from now on, and says what is in force.
fn confine(sandbox: Sandbox, options: &Options) -> Result<(), SandboxError> {
    let reaction = match sandbox {
        Sandbox::On => Reaction::Refuse,
        Sandbox::Strict => Reaction::Kill,
        Sandbox::Off => {
            log::warn!("not confined: --sandbox is off");
            return Ok(());
        }
    };
    let confinement = sandbox::confine(options, reaction)?;
    let level = if confinement.is_whole() {
        log::Level::Info
    } else {
        log::Level::Warn
    };
    log::log!(level, "{confinement}");
    Ok(())
}

/// Says what is wrong with the command line in one line; help and version go out as they are.
fn usage(error: &clap::Error) -> ExitCode {
    if matches!(
        error.kind(),
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion
    ) {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    fail(USAGE, &vhost_device_cram::cli::one_line(error))
}

fn fail(status: u8, message: &str) -> ExitCode {
    say(message);
    ExitCode::from(status)
}

/// To whoever can hear it: unlike `eprintln`, it does not panic where there is no room for a log.
fn say(message: &str) {
    let _ = writeln!(std::io::stderr(), "vhost-device-cram: {message}");
}

/// SIGINT and SIGTERM, blocked, to be waited for.
struct EndSignals(libc::sigset_t);

impl EndSignals {
    fn block() -> std::io::Result<Self> {
        let set = vmm_sys_util::signal::create_sigset(&[libc::SIGINT, libc::SIGTERM])
            .map_err(std::io::Error::from)?;
        // SAFETY: `set` was initialised by create_sigset, and no old mask is asked for.
        let status =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut()) };
        if status == 0 {
            Ok(EndSignals(set))
        } else {
            Err(std::io::Error::from_raw_os_error(status))
        }
    }

    fn wait(&self) -> i32 {
        let mut signal = 0;
        // SAFETY: the set is initialised, and both pointers are valid for the call.
        while unsafe { libc::sigwait(&raw const self.0, &raw mut signal) } != 0 {}
        signal
    }
}
