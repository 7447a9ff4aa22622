// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any sequence of messages on a vhost-user socket, whole, cut off, unknown, in any order, with any
//! descriptors. The daemon hangs up or goes on; the next front-end is served, and so is another
//! guest, all the time.

#![no_main]

use std::cell::RefCell;
use std::fs::File;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_device_cram::client::Offer;
use vhost_device_cram::server::{Daemon, Options, StoreOptions};

const MESSAGES_MAX: usize = 24;
/// Descriptors of the whole process; one connection's are far fewer.
const DESCRIPTORS_MAX: usize = 200;
const MEMORY_BYTES: u64 = 64 << 10;
/// How long anything may take that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

#[derive(Arbitrary, Debug)]
struct Input {
    messages: Vec<Message>,
    /// The last bytes are left out.
    cut: u8,
}

#[derive(Arbitrary, Debug)]
struct Message {
    code: u8,
    flags: u8,
    body: Body,
    /// Says another length than it has.
    length: Option<u16>,
    fds: Vec<Descriptor>,
}

#[derive(Arbitrary, Debug)]
enum Body {
    None,
    Number(u64),
    /// Index and number, as for most messages about a ring.
    Ring(u8, u16),
    Addresses {
        index: u8,
        flags: u8,
        places: [u16; 3],
    },
    /// Memory: how many regions are said to follow, and those that do.
    Regions(u8, Vec<Region>),
    Region(Region),
    Config {
        offset: u16,
        size: u16,
        payload: u8,
    },
    Any(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
struct Region {
    guest: u16,
    bytes: u16,
    user: u16,
    offset: u16,
    wild: Option<u64>,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Descriptor {
    Memory,
    SmallMemory,
    Event,
    Null,
    Socket,
    ReadOnly,
}

impl Region {
    fn words(&self) -> [u64; 4] {
        let place = |at: u16| u64::from(at % 32) << 12;
        [
            self.wild.unwrap_or(place(self.guest)),
            place(self.bytes),
            place(self.user),
            place(self.offset),
        ]
    }
}

fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Body {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::None => Vec::new(),
            Self::Number(number) => words(&[*number]),
            Self::Ring(index, number) => words(&[u64::from(*index % 8) | u64::from(*number) << 32]),
            Self::Addresses {
                index,
                flags,
                places: [descriptors, used, available],
            } => {
                let at = |place: &u16| u64::from(*place) * 16;
                words(&[
                    u64::from(*index % 8) | u64::from(*flags) << 32,
                    at(descriptors),
                    at(used),
                    at(available),
                    0,
                ])
            }
            Self::Regions(count, regions) => {
                let mut bytes = words(&[u64::from(*count % 10)]);
                regions
                    .iter()
                    .for_each(|region| bytes.extend(words(&region.words())));
                bytes
            }
            Self::Region(region) => {
                let mut bytes = words(&[0]);
                bytes.extend(words(&region.words()));
                bytes
            }
            Self::Config {
                offset,
                size,
                payload,
            } => {
                let mut bytes = words(&[u64::from(*offset) | u64::from(*size) << 32]);
                bytes.extend(0_u32.to_le_bytes());
                bytes.extend(vec![0; (*payload).into()]);
                bytes
            }
            Self::Any(bytes) => bytes.clone(),
        }
    }
}

impl Message {
    /// Header and body.
    fn bytes(&self) -> Vec<u8> {
        let body = self.body.bytes();
        let len = self.length.map_or(body.len(), usize::from);
        let header = [
            u32::from(self.code % 48),
            // Version 1 mostly, and the flag that asks for a reply.
            u32::from(self.flags & 0xf) ^ 1,
            u32::try_from(len).unwrap(),
        ];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(body);
        bytes
    }
}

struct Host {
    _daemon: Daemon,
    options: Options,
    /// Another guest, who is not to notice anything.
    other: UnixStream,
    _folder: tempfile::TempDir,
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::new(Host::new());
}

impl Host {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let options = Options {
            sockets: ["a", "b"].map(|name| folder.path().join(name)).to_vec(),
            control_socket: None,
            store: StoreOptions::with_capacity(1 << 20),
            quota_bytes: None,
            offer: Offer {
                request_queues: 1,
                queue_size: 16,
                max_pools: 4,
                poll: Duration::ZERO,
                workers: None,
                pin: Vec::new(),
                policy: vhost_device_cram::balance::Policy::default(),
            },
        };
        let daemon = Daemon::start(&options).unwrap();
        let other = UnixStream::connect(&options.sockets[1]).unwrap();
        other.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            _daemon: daemon,
            options,
            other,
            _folder: folder,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.options.sockets[0]).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
    }
}

fn descriptor(kind: Descriptor) -> OwnedFd {
    let memory = |bytes| {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        file
    };
    match kind {
        Descriptor::Memory => memory(MEMORY_BYTES),
        Descriptor::SmallMemory => memory(100),
        Descriptor::Event => eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
        Descriptor::Null => File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap()
            .into(),
        Descriptor::Socket => UnixStream::pair().unwrap().0.into(),
        Descriptor::ReadOnly => File::open("/dev/zero").unwrap().into(),
    }
}

/// False when the other side has hung up.
fn send(stream: &UnixStream, bytes: &[u8], fds: &[Descriptor]) -> bool {
    let fds: Vec<OwnedFd> = fds.iter().take(12).map(|kind| descriptor(*kind)).collect();
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(12))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    sendmsg(
        stream,
        &[IoSlice::new(bytes)],
        &mut control,
        SendFlags::NOSIGNAL,
    )
    .is_ok()
}

/// GET_FEATURES, and its answer.
fn features(mut stream: &UnixStream) -> u64 {
    assert!(send(stream, &[1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], &[]));
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    u64::from_le_bytes(answer[12..].try_into().unwrap())
}

fuzz_target!(|input: Input| {
    HOST.with_borrow(|host| {
        let stream = host.connect();
        let count = input.messages.len().min(MESSAGES_MAX);
        for (at, message) in input.messages.iter().take(count).enumerate() {
            let mut bytes = message.bytes();
            if at + 1 == count {
                bytes.truncate(bytes.len() - usize::from(input.cut) % bytes.len());
            }
            if !send(&stream, &bytes, &message.fds) {
                break;
            }
        }
        // It has to hang up when we do, whatever it was doing.
        let _ = stream.shutdown(Shutdown::Write);
        let mut rest = Vec::new();
        let ended = (&stream).read_to_end(&mut rest);
        if let Err(error) = ended {
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset, "{error}");
        }
        assert_ne!(features(&host.connect()), 0);
        assert_ne!(features(&host.other), 0);
        // Descriptors that came with messages have gone with the connection.
        let open = std::fs::read_dir("/proc/self/fd").unwrap().count();
        assert!(open < DESCRIPTORS_MAX, "{open} descriptors are open");
    });
});
