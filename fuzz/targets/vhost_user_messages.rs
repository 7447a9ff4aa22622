// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any sequence of messages on a vhost-user socket, whole, cut off, unknown, in any order, with any
//! descriptors. The daemon hangs up or goes on; the next front-end is served, and so is another
//! guest, all the time.

#![no_main]

mod front_end;

use std::cell::RefCell;
use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use front_end::{Descriptor, Input, MESSAGES_MAX, descriptor};
use libfuzzer_sys::fuzz_target;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use vhost_device_cram::client::Offer;
use vhost_device_cram::server::{Daemon, GuestOptions, Options, StoreOptions};

/// Descriptors of the whole process; one connection's are far fewer.
const DESCRIPTORS_MAX: usize = 200;
/// How long anything may take that takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(20);

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
            guests: ["a", "b"]
                .map(|name| GuestOptions::of_socket(folder.path().join(name)))
                .to_vec(),
            keep: None,
            control_socket: None,
            control_permissions: vhost_device_cram::socket::Permissions::PRIVATE,
            metrics: None,
            guest_folders: Vec::new(),
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
                first_touch_bytes: 16 << 20,
            },
        };
        let daemon = Daemon::start(&options).unwrap();
        let other = UnixStream::connect(&options.guests[1].socket).unwrap();
        other.set_read_timeout(Some(PATIENCE)).unwrap();
        Self {
            _daemon: daemon,
            options,
            other,
            _folder: folder,
        }
    }

    fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.options.guests[0].socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.set_write_timeout(Some(PATIENCE)).unwrap();
        stream
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
