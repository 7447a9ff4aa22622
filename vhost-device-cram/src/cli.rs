// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's command line: what it looks like, and which values make sense together.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};

use cram_abi::wire::MAX_REQUEST_QUEUES;
use cram_store::Background;

use crate::address::Address;
use crate::balance::{Copies, Policy};
use crate::client::Offer;
use crate::config::Configuration;
pub use crate::options::Dedup;
use crate::options::{GuestOptions, Options, StoreOptions};
use crate::size;
use crate::socket::{self, Permissions};

/// The smallest store that is of any use.
const CAPACITY_MIN: u64 = 1 << 20;
/// The largest ring that virtio knows.
const QUEUE_SIZE_MAX: u16 = 32768;
/// Pool ids are few, so that a guest cannot make the host keep books for nothing.
const POOLS_MAX: u32 = cram_store::POOLS_PER_CLIENT_MAX;
/// A worker that watches its rings longer than this is not waiting, it is burning a core.
const POLL_US_MAX: u32 = 1_000_000;

/// Keep cold pages of virtual machines compressed in the host's memory, outside of the guests.
///
/// One process serves many guests: give --socket-path once for each of them, and start QEMU
/// with -chardev socket,id=cram0,path=SOCKET,reconnect-ms=500 and
/// -device vhost-user-cram-pci,chardev=cram0. What a guest stored is kept until the daemon ends, or
/// another virtual machine comes to its socket; also while it is not connected.
#[derive(Clone, Debug, clap::Parser)]
#[command(
    name = "vhost-device-cram",
    version,
    args_override_self = true,
    after_help = "Example: vhost-device-cram --socket-path /run/cram/vm1.sock \
                  --control-socket /run/cram/control.sock --capacity 4G"
)]
pub struct Arguments {
    /// Listen for a guest's QEMU here; repeat for more guests. Its name is the file's, without what
    /// comes behind the last dot
    #[arg(
        long = "socket-path",
        short = 's',
        value_name = "SOCKET",
        required_unless_present_any = ["guests", "config", "guest_folders"]
    )]
    pub socket_paths: Vec<PathBuf>,

    /// The same with a name, by which the guest's account is known for ever: name=vm1,socket=SOCKET.
    /// More words, with commas between them, for a guest that the arena does not know yet: quota=SIZE,
    /// weight=N (100 is usual). And: copies=free, keep or adaptive; auto-squeeze=on; trust-socket=on:
    /// whoever connects is taken for the virtual machine that was there before, and gets its pages
    #[arg(long = "guest", short = 'g', value_name = "name=NAME,socket=SOCKET,…", value_parser = guest)]
    pub guests: Vec<GuestOptions>,

    /// Say in JSON what this back-end is, for managers of virtual machines, and end
    #[arg(long, exclusive = true)]
    pub print_capabilities: bool,

    /// Read options and guests from this file, TOML: its keys are these options, without the dashes,
    /// and each guest is a table [[guest]]. What is given here besides counts more
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,

    /// Guests may be added later (cramctl guest add) whose sockets are in this folder; repeat for more.
    /// Sockets in it on which nobody listens are removed at the start. Guests can also be added in
    /// folders in which there are sockets of guests already
    #[arg(long = "guest-folder", value_name = "FOLDER")]
    pub guest_folders: Vec<PathBuf>,

    /// Drop pages of a guest to which nobody was connected for so long [default: never]
    #[arg(long, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub forget_after: Option<u32>,

    /// Listen for cramctl here. Only root and this user may change anything there
    #[arg(long, short = 'C', value_name = "SOCKET")]
    pub control_socket: Option<PathBuf>,

    /// Who may connect to the control socket, as an octal mode [default: 0600, or 0660 with
    /// --control-group]
    #[arg(long, value_name = "MODE", value_parser = mode)]
    pub control_mode: Option<u32>,

    /// The group of the control socket, a name or a number. Its members may look and change nothing
    #[arg(long, value_name = "GROUP", value_parser = socket::group)]
    pub control_group: Option<u32>,

    /// Serve metrics for Prometheus (OpenMetrics, GET /metrics) on unix:PATH or 127.0.0.1:PORT; there
    /// are no passwords, so no other addresses
    #[arg(long, value_name = "ADDRESS")]
    pub metrics: Option<Address>,

    /// Memory that all guests together may use, for example 512M or 4G
    #[arg(long, short = 'c', value_name = "SIZE", value_parser = size::parse,
          required_unless_present = "config")]
    pub capacity: Option<u64>,

    /// Memory that each guest may use, if the arena does not know it with a quota of its own
    /// [default: the capacity]
    #[arg(long, short = 'q', value_name = "SIZE", value_parser = size::parse)]
    pub quota: Option<u64>,

    /// Keep the pages in this file, so that they outlive the daemon: memory, if it is under /dev/shm
    /// or on hugetlbfs. It is made if it is not there; a daemon that finds one finds its pages
    /// [default: memory that ends with the daemon]
    #[arg(long, short = 'a', value_name = "FILE")]
    pub arena: Option<PathBuf>,

    /// Store equal pages once: those of each guest, those of all guests (who can then learn from how
    /// fast a page is stored whether another guest has it), or none. Guests that an arena knows stay as
    /// they were put there
    #[arg(long, value_enum, value_name = "WHOSE", default_value_t = Dedup::Guest)]
    pub dedup: Dedup,

    /// Compress pages once more, and better, that were cold for so many seconds; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub cold_after: u32,

    /// Share of one processor, in percent, for compaction and recompression
    #[arg(long, value_name = "PERCENT", default_value_t = 25,
          value_parser = clap::value_parser!(u32).range(1..=100))]
    pub background_cpu: u32,

    /// Pages that a guest loaded back: free the pool's copy at once, keep it until the guest writes
    /// to the page, or keep it until three fifths of the pool are in use
    #[arg(long, value_enum, value_name = "WHEN", default_value_t = Copies::Free)]
    pub copies: Copies,

    /// Have guests free what they do not use by themselves, slowly, while none of their tasks waits
    /// for memory
    #[arg(long)]
    pub auto_squeeze: bool,

    /// Request queues that each guest may have; what its driver does not use costs nothing
    #[arg(long, value_name = "N", default_value_t = MAX_REQUEST_QUEUES,
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_REQUEST_QUEUES)))]
    pub num_queues: u16,

    /// Most entries of a queue, a power of two
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = queue_size)]
    pub queue_size: u16,

    /// Pools that each guest may have
    #[arg(long, value_name = "N", default_value_t = 16,
          value_parser = clap::value_parser!(u32).range(1..=i64::from(POOLS_MAX)))]
    pub max_pools: u32,

    /// Memory of each guest that the daemon may be the first to touch, so that it is charged to the
    /// daemon's control group; a guest beyond it is disconnected. Drivers that follow the protocol touch
    /// their memory themselves
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = size::parse)]
    pub first_touch_limit: u64,

    /// Microseconds that a worker watches its queues before it sleeps, at the most; how long it does
    /// adapts to the guest, and an idle one costs nothing. 0: never
    #[arg(long, value_name = "N", default_value_t = 50,
          value_parser = clap::value_parser!(u32).range(0..=i64::from(POLL_US_MAX)))]
    pub poll_us: u32,

    /// Worker threads of each guest, among which its queues are shared [default: one for each
    /// processor, and no more than queues]
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_REQUEST_QUEUES)))]
    pub workers: Option<u16>,

    /// Run workers on these processors only, one on each in turn, such as 2,3,6-9
    #[arg(long, value_name = "CPUS", value_parser = processors)]
    pub pin: Option<Processors>,

    /// Give up, once everything is open, all rights that serving guests does not need
    #[arg(long, value_enum, value_name = "HOW", default_value_t = Sandbox::On)]
    pub sandbox: Sandbox,

    /// How much to say: off, error, warn, info, debug or trace [default: info, or what RUST_LOG says]
    #[arg(long, value_name = "LEVEL", value_parser = log_level)]
    pub log_level: Option<log::LevelFilter>,
}

/// How the daemon confines itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Sandbox {
    /// What is forbidden fails.
    On,
    /// What is forbidden ends the daemon, and the pages with it. For tests.
    Strict,
    /// Nothing is forbidden. For debuggers, and for kernels without seccomp.
    Off,
}

/// A guest, as words with commas between them.
fn guest(text: &str) -> Result<GuestOptions, String> {
    const USAGE: &str = "write name=NAME,socket=SOCKET and maybe quota=SIZE, weight=N, copies=free, \
                         auto-squeeze=on or trust-socket=on, without commas in them";
    let mut words = BTreeMap::new();
    for part in text.split(',') {
        match part.split_once('=') {
            Some((key, value)) if !value.is_empty() => {
                if words.insert(key, value).is_some() {
                    return Err(format!("{key} is given twice; {USAGE}"));
                }
            }
            _ => return Err(USAGE.to_owned()),
        }
    }
    let name = words.remove("name").ok_or(USAGE)?;
    let socket = words.remove("socket").ok_or(USAGE)?;
    let mut guest = GuestOptions::new(name.to_owned(), PathBuf::from(socket));
    for (key, value) in words {
        match key {
            "quota" => guest.quota_bytes = Some(size::parse(value)?),
            "weight" => guest.weight = Some(whole(value)?),
            "copies" => guest.copies = Some(Copies::from_str(value, false)?),
            "auto-squeeze" => guest.auto_squeeze = Some(switch(value)?),
            "trust-socket" => guest.trusts_socket = switch(value)?,
            _ => return Err(format!("there is no {key}; {USAGE}")),
        }
    }
    Ok(guest)
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

fn whole(text: &str) -> Result<u32, String> {
    text.parse()
        .map_err(|_| format!("\"{text}\" is not a whole number"))
}

fn mode(text: &str) -> Result<u32, String> {
    match u32::from_str_radix(text, 8) {
        Ok(mode) if mode <= 0o777 => Ok(mode),
        _ => Err("write an octal mode such as 0660".to_owned()),
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    match text.parse::<u16>() {
        Ok(size) if size.is_power_of_two() && size <= QUEUE_SIZE_MAX => Ok(size),
        _ => Err(format!(
            "write a power of two up to {QUEUE_SIZE_MAX}, such as 256"
        )),
    }
}

/// Numbers of processors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Processors(Vec<u32>);

/// More processors than any machine has.
const PROCESSORS_MAX: u32 = 1024;

/// Numbers and ranges of numbers, as in the kernel's own lists.
fn processors(text: &str) -> Result<Processors, String> {
    let number = |text: &str| {
        text.trim()
            .parse::<u32>()
            .ok()
            .filter(|n| *n < PROCESSORS_MAX)
    };
    let range = |part: &str| match part.split_once('-') {
        Some((first, last)) => number(first).zip(number(last)).map(|(a, b)| a..=b),
        None => number(part).map(|only| only..=only),
    };
    let ranges: Option<Vec<_>> = text.split(',').map(range).collect();
    ranges
        .map(|ranges| ranges.into_iter().flatten().collect::<Vec<_>>())
        .filter(|numbers| !numbers.is_empty())
        .map(Processors)
        .ok_or_else(|| "write numbers of processors and ranges of them, such as 2,3,6-9".to_owned())
}

fn log_level(text: &str) -> Result<log::LevelFilter, String> {
    text.parse()
        .map_err(|_| "write off, error, warn, info, debug or trace".to_owned())
}

/// Why there are no arguments.
#[derive(Debug)]
pub enum Unread {
    /// The command line is wrong, or asks for help.
    CommandLine(clap::Error),
    /// The configuration file is wrong: one line that says what, and where.
    File(String),
}

impl Arguments {
    /// Reads a command line, the program's name first, and the configuration file that it names.
    ///
    /// # Errors
    /// When either is wrong.
    pub fn read(words: impl IntoIterator<Item = OsString>) -> Result<Self, Unread> {
        let words: Vec<_> = words.into_iter().collect();
        let given = Self::try_parse_from(&words).map_err(Unread::CommandLine)?;
        let Some(path) = &given.config else {
            return Ok(given);
        };
        let file = Configuration::read(path).map_err(Unread::File)?;
        let wrong = |error: clap::Error| Unread::File(file.locate(&one_line(&error)));
        // By itself, so that a mistake is known to be the file's; it may lack what is given by hand.
        let config = format!("--config={}", path.display());
        let alone = words.iter().take(1).cloned();
        let alone = alone.chain([config.into()]);
        let of_file = || file.words.iter().map(OsString::from);
        Self::try_parse_from(alone.chain(of_file())).map_err(wrong)?;
        let name = words.iter().take(1).cloned();
        let by_hand = words.iter().skip(1).cloned();
        let all = name.chain(of_file()).chain(by_hand);
        let mut both = Self::try_parse_from(all).map_err(Unread::CommandLine)?;
        both.guests.splice(0..0, file.guests);
        Ok(both)
    }

    /// The options, if they make sense together; otherwise one line that says what to change.
    pub fn options(&self) -> Result<Options, String> {
        let Some(capacity) = self.capacity else {
            return Err("--capacity <SIZE> is missing; see --help".to_owned());
        };
        if capacity < CAPACITY_MIN {
            return Err(format!(
                "--capacity {} is too small; give at least {}",
                size::show(capacity),
                size::show(CAPACITY_MIN)
            ));
        }
        if capacity > cram_store::CAPACITY_BYTES_MAX {
            return Err(format!(
                "--capacity {} is too large; give at most {}",
                size::show(capacity),
                size::show(cram_store::CAPACITY_BYTES_MAX)
            ));
        }
        if let Some(quota) = self.quota
            && quota > capacity
        {
            return Err(format!(
                "--quota {} is more than --capacity {}; a guest cannot have more than there is",
                size::show(quota),
                size::show(capacity)
            ));
        }
        let unnamed = self.socket_paths.iter().cloned();
        let unnamed = unnamed.map(GuestOptions::of_socket);
        let guests: Vec<_> = self.guests.iter().cloned().chain(unnamed).collect();
        let may_be_added = self.control_socket.is_some() && !self.guest_folders.is_empty();
        if guests.is_empty() && !may_be_added {
            return Err(
                "there is no guest; give --socket-path or --guest, or --guest-folder and \
                 --control-socket for guests that are added later"
                    .to_owned(),
            );
        }
        if self.control_socket.is_none()
            && (self.control_group.is_some() || self.control_mode.is_some())
        {
            return Err(
                "--control-group and --control-mode need a --control-socket that they are of"
                    .to_owned(),
            );
        }
        for guest in &guests {
            if let Some(quota) = guest.quota_bytes
                && quota > capacity
            {
                return Err(format!(
                    "{}: quota {} is more than --capacity {}; a guest cannot have more than there is",
                    guest.name,
                    size::show(quota),
                    size::show(capacity)
                ));
            }
        }
        let mut names: Vec<_> = guests.iter().map(|guest| guest.name.as_str()).collect();
        names.sort_unstable();
        if let Some(&[name, _]) = names.windows(2).find(|pair| pair.first() == pair.last()) {
            return Err(format!(
                "two guests would be called {name}; give one of them another name: --guest \
                 name=NAME,socket=SOCKET"
            ));
        }
        let sockets = guests.iter().map(|guest| &guest.socket);
        let metrics = match &self.metrics {
            Some(Address::Unix(path)) => Some(path),
            _ => None,
        };
        let mut paths: Vec<_> = sockets.chain(&self.control_socket).chain(metrics).collect();
        paths.sort();
        if let Some(twice) = paths.windows(2).find(|pair| pair.first() == pair.get(1)) {
            let path = twice
                .first()
                .map(|path| path.display().to_string())
                .unwrap_or_default();
            return Err(format!(
                "socket {path} is given twice; each needs a path of its own"
            ));
        }
        Ok(Options {
            guests,
            keep: self
                .forget_after
                .map(|seconds| Duration::from_secs(seconds.into())),
            control_socket: self.control_socket.clone(),
            control_permissions: Permissions {
                mode: self.control_mode.unwrap_or(match self.control_group {
                    Some(_) => 0o660,
                    None => 0o600,
                }),
                group: self.control_group,
            },
            metrics: self.metrics.clone(),
            guest_folders: self.guest_folders.clone(),
            store: StoreOptions {
                capacity_bytes: capacity,
                arena: self.arena.clone(),
                dedup: self.dedup,
                background: Background {
                    cpu_percent: self.background_cpu,
                    cold_after: (self.cold_after > 0)
                        .then(|| Duration::from_secs(self.cold_after.into())),
                },
            },
            quota_bytes: self.quota,
            offer: Offer {
                request_queues: self.num_queues,
                queue_size: self.queue_size,
                max_pools: self.max_pools,
                poll: Duration::from_micros(u64::from(self.poll_us)),
                workers: self.workers,
                pin: self
                    .pin
                    .as_ref()
                    .map(|list| list.0.clone())
                    .unwrap_or_default(),
                policy: Policy {
                    copies: self.copies,
                    auto_squeeze: self.auto_squeeze,
                },
                first_touch_bytes: self.first_touch_limit,
            },
        })
    }
}

/// What clap has to say about a wrong command line, as one line that says what to do.
pub fn one_line(error: &clap::Error) -> String {
    use clap::error::{ContextKind, ContextValue, ErrorKind};

    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        Some(ContextValue::Strings(texts)) => Some(texts.join(", ")),
        _ => None,
    };
    let argument = text(ContextKind::InvalidArg).unwrap_or_default();
    match error.kind() {
        ErrorKind::MissingRequiredArgument => format!("{argument} is missing; see --help"),
        ErrorKind::UnknownArgument => match text(ContextKind::SuggestedArg) {
            Some(suggestion) => format!("there is no {argument}; did you mean {suggestion}?"),
            None => format!("there is no {argument}; see --help"),
        },
        ErrorKind::MissingSubcommand => "say what to do; see --help".to_owned(),
        ErrorKind::InvalidSubcommand => {
            let word = text(ContextKind::InvalidSubcommand).unwrap_or_default();
            format!("there is no command {word}; see --help")
        }
        ErrorKind::InvalidValue if text(ContextKind::InvalidValue).is_none_or(|v| v.is_empty()) => {
            format!("{argument} needs a value; see --help")
        }
        _ => {
            // The first line, with the reason that a parser of ours gave behind the colon.
            let full = error.to_string();
            let line = full.lines().next().unwrap_or_default();
            line.strip_prefix("error: ").unwrap_or(line).to_owned()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guests_are_read() {
        let read = |text: &str| guest(text).ok();
        let vm1 = |trusts_socket| GuestOptions {
            trusts_socket,
            ..GuestOptions::new("vm1".into(), "/run/a.sock".into())
        };
        assert_eq!(read("name=vm1,socket=/run/a.sock"), Some(vm1(false)));
        let trusted = "socket=/run/a.sock,trust-socket=on,name=vm1";
        assert_eq!(read(trusted), Some(vm1(true)));
        let all = "name=vm1,socket=/run/a.sock,quota=1M,weight=50,copies=keep,auto-squeeze=on";
        let wishes = GuestOptions {
            quota_bytes: Some(1 << 20),
            weight: Some(50),
            copies: Some(Copies::Keep),
            auto_squeeze: Some(true),
            ..vm1(false)
        };
        assert_eq!(read(all), Some(wishes));
        for wrong in [
            "",
            "vm1",
            "name=vm1,socket=/run/a.sock,quota=12Q",
            "name=vm1,socket=/run/a.sock,weight=-1",
            "name=vm1,socket=/run/a.sock,copies=some",
            "name=vm1,socket=/run/a.sock,auto-squeeze=1",
            "name=vm1",
            "socket=/run/a.sock",
            "name=,socket=/run/a.sock",
            "name=vm1,socket=/run/a.sock,",
            "name=vm1,name=vm2,socket=/run/a.sock",
            "name=vm1,socket=/run/a.sock,trust-socket=maybe",
            "name=vm1,socket=/run/a.sock,colour=red",
        ] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn lists_of_processors_are_read() {
        let read = |text| processors(text).map(|list| list.0).ok();
        assert_eq!(read("3"), Some(vec![3]));
        assert_eq!(read("2,3, 6-8"), Some(vec![2, 3, 6, 7, 8]));
        for wrong in ["", "x", "1,", "5-3", "-1", "1024", "1-2-3", "0-4294967295"] {
            assert_eq!(read(wrong), None, "{wrong}");
        }
    }
}
