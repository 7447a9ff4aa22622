// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon's command line: what it looks like, and which values make sense together.

use std::path::PathBuf;
use std::time::Duration;

use cram_abi::wire::MAX_REQUEST_QUEUES;
use cram_store::Background;

use crate::balance::{Copies, Policy};
use crate::client::Offer;
use crate::server::{GuestOptions, Options, StoreOptions};
use crate::size;

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
        required_unless_present = "guests"
    )]
    pub socket_paths: Vec<PathBuf>,

    /// The same with a name, by which the guest's account is known for ever: name=vm1,socket=SOCKET.
    /// With trust-socket=on, whoever connects is taken for the virtual machine that was there before,
    /// and gets its pages
    #[arg(long = "guest", short = 'g', value_name = "name=NAME,socket=SOCKET", value_parser = guest)]
    pub guests: Vec<GuestOptions>,

    /// Drop pages of a guest to which nobody was connected for so long [default: never]
    #[arg(long, value_name = "SECONDS",
          value_parser = clap::value_parser!(u32).range(1..))]
    pub forget_after: Option<u32>,

    /// Listen for cramctl here (only this user may connect)
    #[arg(long, short = 'C', value_name = "SOCKET")]
    pub control_socket: Option<PathBuf>,

    /// Memory that all guests together may use, for example 512M or 4G
    #[arg(long, short = 'c', value_name = "SIZE", value_parser = size::parse)]
    pub capacity: u64,

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

    /// Request queues of each guest; one for each of its CPUs is best
    #[arg(long, value_name = "N", default_value_t = 4,
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

/// Whose equal pages are stored once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Dedup {
    /// Nobody's.
    Off,
    /// Each guest's own.
    Guest,
    /// All guests' together.
    All,
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
    const USAGE: &str = "write name=NAME,socket=SOCKET and maybe trust-socket=on, without commas \
                         in them";
    let (mut name, mut socket, mut trusts_socket) = (None, None, None);
    for part in text.split(',') {
        let is_first = match part.split_once('=') {
            Some(("name", word)) if !word.is_empty() => name.replace(word).is_none(),
            Some(("socket", path)) if !path.is_empty() => socket.replace(path).is_none(),
            Some(("trust-socket", "on")) => trusts_socket.replace(true).is_none(),
            Some(("trust-socket", "off")) => trusts_socket.replace(false).is_none(),
            _ => false,
        };
        if !is_first {
            return Err(USAGE.to_owned());
        }
    }
    let (name, socket) = name.zip(socket).ok_or(USAGE)?;
    Ok(GuestOptions {
        name: name.to_owned(),
        socket: PathBuf::from(socket),
        trusts_socket: trusts_socket.unwrap_or_default(),
    })
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

impl Arguments {
    /// The options, if they make sense together; otherwise one line that says what to change.
    pub fn options(&self) -> Result<Options, String> {
        if self.capacity < CAPACITY_MIN {
            return Err(format!(
                "--capacity {} is too small; give at least {}",
                size::show(self.capacity),
                size::show(CAPACITY_MIN)
            ));
        }
        if self.capacity > cram_store::CAPACITY_BYTES_MAX {
            return Err(format!(
                "--capacity {} is too large; give at most {}",
                size::show(self.capacity),
                size::show(cram_store::CAPACITY_BYTES_MAX)
            ));
        }
        if let Some(quota) = self.quota
            && quota > self.capacity
        {
            return Err(format!(
                "--quota {} is more than --capacity {}; a guest cannot have more than there is",
                size::show(quota),
                size::show(self.capacity)
            ));
        }
        let unnamed = self.socket_paths.iter().cloned();
        let unnamed = unnamed.map(GuestOptions::of_socket);
        let guests: Vec<_> = self.guests.iter().cloned().chain(unnamed).collect();
        let mut names: Vec<_> = guests.iter().map(|guest| guest.name.as_str()).collect();
        names.sort_unstable();
        if let Some(&[name, _]) = names.windows(2).find(|pair| pair.first() == pair.last()) {
            return Err(format!(
                "two guests would be called {name}; give one of them another name: --guest \
                 name=NAME,socket=SOCKET"
            ));
        }
        let sockets = guests.iter().map(|guest| &guest.socket);
        let mut paths: Vec<_> = sockets.chain(&self.control_socket).collect();
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
            store: StoreOptions {
                capacity_bytes: self.capacity,
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
            name: "vm1".into(),
            socket: "/run/a.sock".into(),
            trusts_socket,
        };
        assert_eq!(read("name=vm1,socket=/run/a.sock"), Some(vm1(false)));
        let trusted = "socket=/run/a.sock,trust-socket=on,name=vm1";
        assert_eq!(read(trusted), Some(vm1(true)));
        for wrong in [
            "",
            "vm1",
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
