// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any sequence of messages, without a socket: the state that they change, and the device that works
//! on it meanwhile. What `vhost_user_messages` does with a daemon, many times as fast.

#![no_main]

mod front_end;

use std::cell::RefCell;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use cram_store::{Store, StoreConfig};
use front_end::{Descriptor, Input, MESSAGES_MAX, descriptor};
use libfuzzer_sys::fuzz_target;
use vhost_device_cram::announce::Announcer;
use vhost_device_cram::client::{Guest, Offer};
use vhost_device_cram::device::Device;
use vhost_device_cram::vhost::channel::Received;
use vhost_device_cram::vhost::message::{FDS_MAX, HEADER_BYTES, Header, Message};
use vhost_device_cram::vhost::session::Session;

/// An end for rings that feed themselves.
const ROUNDS_MAX: u64 = 64;

struct Host {
    store: Arc<Store>,
    guest: Arc<Guest>,
    /// One of each kind.
    descriptors: [OwnedFd; 6],
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::new(Host::new());
}

impl Host {
    fn new() -> Self {
        let store = Store::new(StoreConfig {
            capacity_bytes: 1 << 20,
            background: None,
            ..StoreConfig::default()
        })
        .unwrap();
        let account = store.add_client("guest", None).unwrap();
        let offer = Offer {
            request_queues: 2,
            queue_size: 16,
            max_pools: 4,
            poll: Duration::ZERO,
            workers: Some(1),
            pin: Vec::new(),
            policy: vhost_device_cram::balance::Policy::default(),
            first_touch_bytes: 16 << 20,
        };
        let announcer = Arc::new(Announcer::default());
        let (name, socket) = ("guest".into(), "/".into());
        let shared = Arc::clone(&store);
        let guest = Guest::new(name, socket, false, shared, account, offer, announcer);
        let kinds = [
            Descriptor::Memory,
            Descriptor::SmallMemory,
            Descriptor::Event,
            Descriptor::Null,
            Descriptor::Socket,
            Descriptor::ReadOnly,
        ];
        Self {
            store,
            guest: Arc::new(guest),
            descriptors: kinds.map(descriptor),
        }
    }
}

/// A whole message, if there is one.
fn receive(bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Received> {
    let (header, rest) = bytes.split_first_chunk::<HEADER_BYTES>()?;
    let header = Header::read(header).ok()?;
    let body = rest.get(..header.body)?;
    let message = Message::read(header.code, body).ok()?;
    Some(Received {
        header,
        message,
        fds,
    })
}

fuzz_target!(|input: Input| {
    HOST.with_borrow(|host| {
        let device = Device::new(Arc::clone(&host.guest)).unwrap();
        let mut session = Session::new(&device);
        let count = input.messages.len().min(MESSAGES_MAX);
        for (at, message) in input.messages.iter().take(count).enumerate() {
            let mut bytes = message.bytes();
            if at + 1 == count {
                bytes.truncate(bytes.len() - usize::from(input.cut) % bytes.len());
            }
            let fds = message.fds.iter().take(FDS_MAX);
            let fds = fds.map(|kind| host.descriptors[*kind as usize].try_clone().unwrap());
            let Some(received) = receive(&bytes, fds.collect()) else {
                break;
            };
            let (answer, verdict) = session.handle(received);
            if let Some(answer) = answer {
                assert!(answer.len() >= HEADER_BYTES + 8);
            }
            if verdict.is_err() {
                break;
            }
            for worker in 0..device.workers() {
                device.serve_rounds(worker, ROUNDS_MAX);
            }
        }
        assert!(host.store.stats().mem_used_total <= host.store.capacity_bytes());
    });
});
