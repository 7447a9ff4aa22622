// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole rings of a hostile guest, served by the device: indexes that jump, heads that do not exist,
//! rings that lie nowhere, memory that goes away. A queue is served, or it is stopped; what was made
//! available on one that is not stopped is completed, once.

#![no_main]

mod guest;

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use arbitrary::Arbitrary;
use cram_store::Store;
use guest::{LOW_BYTES, POOLS, Place, RING, Write, empty, memory, regions, store, table_at, wipe};
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::ftruncate;
use vhost_device_cram::announce::Announcer;
use vhost_device_cram::client::{Guest, Offer};
use vhost_device_cram::device::{Device, FEATURES};
use vhost_device_cram::vhost::memory::Memory;
use vhost_user_backend::VhostUserBackend;
use vm_memory::{Bytes, GuestAddress};

const STEPS_MAX: usize = 48;
/// Enough for all that can be offered, and an end for rings that feed themselves.
const ROUNDS_MAX: u64 = 64;
const QUEUES: u16 = 2;

#[derive(Arbitrary, Debug)]
struct Input {
    features: u64,
    event_idx: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write(Write),
    /// Puts a head into the ring and moves the index by one.
    Offer {
        queue: u8,
        head: u8,
    },
    /// Moves the index somewhere.
    Jump {
        queue: u8,
        to: u16,
    },
    Kick {
        queue: u8,
    },
    /// Sets a ring up anew, maybe where there is none.
    Ring {
        queue: u8,
        descriptors: Place,
        available: Place,
        used: Place,
    },
    Reset {
        queue: u8,
    },
    /// The memory is another one, with a part missing.
    Unplug,
    /// The file is cut short.
    Shrink(bool),
    Event(u16),
}

struct Host {
    store: Arc<Store>,
    guest: Arc<Guest>,
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::new(Host::new());
}

impl Host {
    fn new() -> Self {
        let (store, account) = store();
        let offer = Offer {
            request_queues: QUEUES,
            queue_size: RING,
            max_pools: POOLS,
            poll: Duration::ZERO,
            workers: None,
            pin: Vec::new(),
            policy: vhost_device_cram::balance::Policy::default(),
            first_touch_bytes: 16 << 20,
        };
        let guest = Guest::new(
            "guest".into(),
            "/".into(),
            false,
            Arc::clone(&store),
            account,
            offer,
            Arc::new(Announcer::default()),
        );
        Self {
            guest: Arc::new(guest),
            store,
        }
    }

    fn reset(&self) {
        empty(&self.guest.account);
        self.guest.mailbox.clear();
    }
}

/// Whether what is written, or what the device then writes, may be part of a ring.
fn may_reach_rings(write: &Write) -> bool {
    match write {
        Write::Bytes(..) => true,
        Write::Descriptor { place, flags, .. } => {
            flags & 2 != 0 && matches!(place, Place::Wild(_) | Place::Table(_))
        }
        _ => false,
    }
}

/// Where the rings lie that a good driver would set up.
fn available_at(queue: u16) -> u64 {
    0x4000 + u64::from(queue) * 0x400
}

fn used_at(queue: u16) -> u64 {
    0x5000 + u64::from(queue) * 0x400
}

struct Run {
    memory: Arc<Memory>,
    file: std::fs::File,
    device: Device,
    /// The file was cut short at some time.
    has_shrunk: bool,
    /// What was made available; as long as nothing was done to the queue that makes that moot.
    offered: Vec<Option<u16>>,
}

impl Run {
    fn new(host: &Host, input: &Input) -> Self {
        let (memory, file) = memory();
        let memory = Arc::new(memory);
        let device = Device::new(Arc::clone(&host.guest)).unwrap();
        device.describe_memory(&memory);
        device.update_memory(memory.address_space()).unwrap();
        let event_idx = u64::from(input.event_idx) << 29;
        device.acked_features(FEATURES & (input.features & !(1 << 29) | event_idx | 1 << 32));
        let mut run = Self {
            memory,
            file,
            device,
            has_shrunk: false,
            offered: vec![Some(0); usize::from(QUEUES) + 1],
        };
        for queue in 0..=QUEUES {
            run.set_up(
                queue,
                table_at(queue.into()),
                available_at(queue),
                used_at(queue),
            );
        }
        run
    }

    fn set_up(&mut self, queue: u16, descriptors: u64, available: u64, used: u64) {
        let queue = usize::from(queue);
        let is_set = self.device.rings()[queue]
            .lock()
            .set_addresses(descriptors, available, used);
        if is_set.is_ok() {
            let mut ring = self.device.rings()[queue].lock();
            ring.set_size(RING).unwrap();
            ring.set_base(0);
            ring.set_enabled(true);
            drop(ring);
            let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
            self.device.start_ring(queue, kick).unwrap();
        }
    }

    fn load(&self, address: u64) -> u16 {
        self.memory.load(GuestAddress(address), SeqCst).unwrap_or(0)
    }

    fn store(&self, address: u64, value: u16) {
        let _ = self.memory.store(value, GuestAddress(address), SeqCst);
    }

    /// Nothing more is known of what the device should complete.
    fn spoil(&mut self) {
        self.offered.fill(None);
    }

    /// False when the device serves no more, since memory went away.
    fn kick(&self) -> bool {
        // All workers look; the queues that were not kicked have nothing to do, or are kicked early.
        for worker in 0..self.device.workers() {
            self.device.serve_rounds(worker, ROUNDS_MAX);
        }
        let is_served = !self.device.is_closing();
        assert!(is_served || self.has_shrunk, "the connection ended");
        is_served
    }

    fn step(&mut self, step: &Step) {
        let number = |queue: &u8| u16::from(*queue) % (QUEUES + 1);
        match step {
            Step::Write(write) => {
                if may_reach_rings(write) {
                    self.spoil();
                }
                write.apply(&self.memory);
            }
            Step::Offer { queue, head } => {
                let queue = number(queue);
                let index = self.load(available_at(queue) + 2);
                let slot = available_at(queue) + 4 + 2 * u64::from(index % RING);
                let head = u16::from(*head) % (RING + 1);
                self.store(slot, head);
                self.store(available_at(queue) + 2, index.wrapping_add(1));
                let offered = &mut self.offered[usize::from(queue)];
                *offered = offered.filter(|_| head < RING).map(|count| count + 1);
            }
            Step::Jump { queue, to } => {
                let queue = number(queue);
                self.store(available_at(queue) + 2, *to);
                self.offered[usize::from(queue)] = None;
            }
            Step::Kick { queue } => {
                let queue = number(queue);
                if self.kick() {
                    self.expect_completed(queue);
                }
            }
            Step::Ring {
                queue,
                descriptors,
                available,
                used,
            } => {
                let queue = number(queue);
                self.offered[usize::from(queue)] = None;
                let [descriptors, available, used] =
                    [descriptors, available, used].map(|place| place.address());
                self.set_up(queue, descriptors, available, used);
            }
            Step::Reset { queue } => {
                let queue = number(queue);
                self.device.stop_ring(queue.into());
                self.store(available_at(queue) + 2, 0);
                self.store(used_at(queue) + 2, 0);
                self.offered[usize::from(queue)] = Some(0);
                self.set_up(
                    queue,
                    table_at(queue.into()),
                    available_at(queue),
                    used_at(queue),
                );
            }
            Step::Unplug => {
                self.spoil();
                let [_, high] = regions();
                if let Ok(memory) = self.memory.without(high) {
                    self.memory = Arc::new(memory);
                    self.device.describe_memory(&self.memory);
                    let space = self.memory.address_space();
                    self.device.update_memory(space).unwrap();
                }
            }
            Step::Shrink(all) => {
                self.spoil();
                self.has_shrunk = true;
                let len = if *all { 0 } else { LOW_BYTES / 2 };
                ftruncate(&self.file, len).unwrap();
            }
            Step::Event(pressure) => HOST.with_borrow(|host| {
                host.guest.mailbox.post_pressure(u32::from(*pressure));
            }),
        }
    }

    /// A request queue that is in order, and in memory that is there, has been served to its end.
    fn expect_completed(&self, queue: u16) {
        if queue == 0 {
            return;
        }
        if let Some(offered) = self.offered[usize::from(queue)] {
            let used = self.load(used_at(queue) + 2);
            let full = self.load(available_at(queue) + 2);
            let stopped = HOST.with_borrow(|host| host.guest.counters.queues_stopped.load(Relaxed));
            // More than fits were made available at once: stopped, rightly.
            assert!(
                used == offered || stopped > 0,
                "{offered} were made available (index {full}), {used} completed"
            );
        }
    }
}

fuzz_target!(|input: Input| {
    let run = HOST.with_borrow(|host| {
        host.reset();
        host.guest.counters.queues_stopped.store(0, Relaxed);
        Run::new(host, &input)
    });
    let mut run = run;
    wipe(&run.memory);
    for step in input.steps.iter().take(STEPS_MAX) {
        run.step(step);
    }
    HOST.with_borrow(|host| {
        assert!(host.store.stats().mem_used_total <= host.store.capacity_bytes());
    });
});
