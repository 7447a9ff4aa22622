// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connection of a guest: the device as vhost-user-backend drives it.
//!
//! Workers: worker 0 has the event queue; each of the others has a group of request queues and
//! memory of its own, so workers share nothing on the way to the store. A worker serves its
//! rings in turn, a bounded batch at a time, with notifications off, until all are empty.
//!
//! Rule: [`VhostUserBackend::handle_event`] returns `Err` in one case only, when the connection
//! has ended and the worker shall end with it. Nothing that a guest does may be one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cram_abi::wire::{EVENT_QUEUE, EVENT_SIZE, feature};
use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendFlags, send};
use rustix::thread::{CpuSet, sched_setaffinity};
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost_user_backend::{VhostUserBackend, VringT};
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic};
use vmm_sys_util::epoll::EventSet;
use zerocopy::IntoBytes;

use crate::client::{Counters, Guest};
use crate::execute::{Target, Workspace, execute};
use crate::patience::Patience;
use crate::request::{Memory, Terms};
use crate::ring::{self, Fault, Vring};
use crate::sigbus;

/// Pages after which a worker looks at its next queue, and tells the driver what is done: half
/// a millisecond or so of compression.
const BATCH_PAGES: u32 = 64;
/// Chains after which it does so, for requests without pages.
const BATCH_CHAINS: u32 = 64;
/// Queues stopped for want of memory after which a connection ends: each time some pages of zeroes
/// have been mapped, and of mappings a process has so many only.
const LOSSES_MAX: u32 = 8;
/// The worker that has the event queue.
const EVENT_WORKER: usize = 0;

/// Virtio features that the device offers.
pub const FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    | feature::ALL;

struct Worker {
    /// Request queues of the worker (indexes of the device).
    queues: Vec<u16>,
    /// What it works with; only the worker itself looks at it.
    tools: Mutex<Tools>,
    /// Rung to end the worker, or to have it look at the mailbox.
    bell: OwnedFd,
}

struct Tools {
    workspace: Workspace,
    patience: Patience,
    /// The processor that the worker is to run on, until it does.
    pin: Option<u32>,
}

/// One connection.
pub struct Device {
    guest: Arc<Guest>,
    memory: GuestMemoryAtomic<Memory>,
    features: AtomicU64,
    workers: Vec<Worker>,
    /// Queues whose rings cannot be trusted, until they are set up anew.
    stopped: Vec<AtomicBool>,
    /// How often a queue was stopped since memory was gone.
    losses: AtomicU32,
    closing: AtomicBool,
    /// The front-end's channel for requests of ours; the relay finds it.
    backend_channel: Mutex<Option<OwnedFd>>,
}

impl Device {
    /// A device for one connection of `guest`.
    pub fn new(guest: Arc<Guest>, memory: GuestMemoryAtomic<Memory>) -> io::Result<Self> {
        let queues: Vec<u16> = (1..=guest.offer.request_queues).collect();
        let offer = &guest.offer;
        let groups = queues.len().min(offer.workers()).max(1);
        let mut workers = vec![Self::worker(vec![EVENT_QUEUE], offer.poll, None)?];
        let mut pins = offer.pin.iter().copied().cycle();
        for group in 0..groups {
            let mine = queues.iter().copied().skip(group).step_by(groups).collect();
            workers.push(Self::worker(mine, offer.poll, pins.next())?);
        }
        let stopped = (0..=queues.len()).map(|_| AtomicBool::new(false)).collect();
        Ok(Device {
            guest,
            memory,
            features: AtomicU64::new(0),
            workers,
            stopped,
            losses: AtomicU32::new(0),
            closing: AtomicBool::new(false),
            backend_channel: Mutex::new(None),
        })
    }

    fn worker(queues: Vec<u16>, poll: Duration, pin: Option<u32>) -> io::Result<Worker> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let tools = Tools {
            workspace: Workspace::new(),
            patience: Patience::new(poll),
            pin,
        };
        Ok(Worker {
            queues,
            tools: Mutex::new(tools),
            bell,
        })
    }

    /// The token under which a worker's bell is known to its epoll loop. Smaller ones belong
    /// to vhost-user-backend.
    pub fn bell_token(&self) -> u64 {
        self.num_queues() as u64 + 1
    }

    /// The bells, one for each worker.
    pub fn bells(&self) -> impl Iterator<Item = RawFd> {
        self.workers.iter().map(|worker| worker.bell.as_raw_fd())
    }

    /// Keeps the front-end's channel for our requests.
    pub fn set_backend_channel(&self, channel: OwnedFd) {
        *self.backend_channel.lock() = Some(channel);
    }

    /// Makes every worker end, soon.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.backend_channel.lock().take();
        for worker in &self.workers {
            ring_bell(&worker.bell);
        }
    }

    /// Has the event worker look at the mailbox.
    pub fn wake_event_worker(&self) {
        if let Some(worker) = self.workers.get(EVENT_WORKER) {
            ring_bell(&worker.bell);
        }
    }

    /// Tells the front-end to read the configuration space and interrupt the guest.
    ///
    /// The `vhost` crate has no call for this message, so it is written here: a header without
    /// body, and without the flag that asks for a reply. A front-end that does not read its
    /// channel misses the message, and never makes us wait.
    pub fn announce_config_change(&self) {
        const CONFIG_CHANGE_MSG: u32 = 2;
        const VERSION_FLAG: u32 = 1;
        const BODY_SIZE: u32 = 0;
        let message = [CONFIG_CHANGE_MSG, VERSION_FLAG, BODY_SIZE];
        let channel = self.backend_channel.lock();
        if let Some(channel) = channel.as_ref()
            && let Err(error) = send(
                channel,
                message.as_bytes(),
                SendFlags::DONTWAIT | SendFlags::NOSIGNAL,
            )
        {
            log::debug!("{}: config change not announced: {error}", self.guest.name);
        }
    }

    /// Whether the driver accepted a feature of the device.
    pub fn has_feature(&self, bit: u64) -> bool {
        self.features.load(Ordering::Acquire) & bit != 0
    }

    fn terms(&self) -> Terms {
        let features = self.features.load(Ordering::Acquire);
        Terms {
            features: features & feature::ALL,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
            max_pools: self.guest.offer.max_pools,
        }
    }

    fn is_stopped(&self, queue: u16) -> bool {
        self.stopped
            .get(usize::from(queue))
            .is_none_or(|flag| flag.load(Ordering::Acquire))
    }

    fn stop_queue(&self, queue: u16, fault: Fault) {
        if let Some(flag) = self.stopped.get(usize::from(queue)) {
            flag.store(true, Ordering::Release);
        }
        // Whatever this worker met with, the queue's next life is another one.
        let is_lost = sigbus::take_lost() || fault == Fault::MemoryGone;
        if is_lost && self.losses.fetch_add(1, Ordering::Relaxed) + 1 >= LOSSES_MAX {
            self.close();
        }
        Counters::add(&self.guest.counters.queues_stopped, 1);
        log::warn!(
            "{}: queue {queue} stopped until it is reset: {fault}",
            self.guest.name
        );
    }

    /// Serves a group of request queues until all of them are empty, and have been for a while.
    fn serve_requests(&self, worker: &Worker, vrings: &[Vring]) {
        let mut tools = worker.tools.lock();
        let Tools {
            workspace,
            patience,
            pin,
        } = &mut *tools;
        if let Some(processor) = pin.take() {
            self.run_on(processor);
        }
        let rings = || worker.queues.iter().copied().zip(vrings);
        Counters::add(&self.guest.counters.wakeups, 1);
        patience.wakes(Instant::now());
        let mut idle_since = None;
        while !self.closing.load(Ordering::Acquire) {
            let mut worked = false;
            for (queue, vring) in rings() {
                match self.serve_batch(queue, vring, workspace) {
                    Ok(n) => worked |= n > 0,
                    Err(fault) => self.stop_queue(queue, fault),
                }
            }
            if worked {
                idle_since = None;
                continue;
            }
            if !patience.window().is_zero() {
                let since = *idle_since.get_or_insert_with(Instant::now);
                if since.elapsed() < patience.window() {
                    std::hint::spin_loop();
                    continue;
                }
            }
            let mut arrived = false;
            for (queue, vring) in rings() {
                match self.listen(queue, vring) {
                    Ok(more) => arrived |= more,
                    Err(fault) => self.stop_queue(queue, fault),
                }
            }
            if !arrived {
                break;
            }
            idle_since = None;
        }
        patience.sleeps(Instant::now());
    }

    /// Has the calling worker run on one processor only.
    fn run_on(&self, processor: u32) {
        let mut set = CpuSet::new();
        let done = usize::try_from(processor)
            .ok()
            .filter(|processor| *processor < CpuSet::MAX_CPU)
            .ok_or(rustix::io::Errno::INVAL)
            .and_then(|processor| {
                set.set(processor);
                sched_setaffinity(None, &set)
            });
        if let Err(error) = done {
            log::warn!(
                "{}: a worker cannot run on processor {processor}: {error}",
                self.guest.name
            );
        }
    }

    fn listen(&self, queue: u16, vring: &Vring) -> Result<bool, Fault> {
        if self.is_stopped(queue) {
            return Ok(false);
        }
        let mut state = vring.get_mut();
        if !ring::is_running(&state) {
            return Ok(false);
        }
        ring::listen(state.get_queue_mut(), &self.memory.memory())
    }

    /// Executes and completes a bounded number of chains of one queue. Returns how many.
    fn serve_batch(
        &self,
        queue: u16,
        vring: &Vring,
        workspace: &mut Workspace,
    ) -> Result<u32, Fault> {
        if self.is_stopped(queue) {
            return Ok(0);
        }
        // Locked for the batch: GET_VRING_BASE waits for it, and so never reports an index
        // that is behind what we execute.
        let mut state = vring.get_mut();
        if !ring::is_running(&state) {
            return Ok(0);
        }
        let memory = self.memory.memory();
        let queue = state.get_queue_mut();
        let waiting = ring::pending(queue, &memory);
        ring::intact()?;
        let waiting = waiting?;
        if waiting == 0 {
            return Ok(0);
        }
        ring::quiet(queue, &memory)?;

        let terms = self.terms();
        let target = Target {
            store: &self.guest.store,
            client: &self.guest.account,
            balance: &self.guest.balance,
            max_pools: self.guest.offer.max_pools,
        };
        let counters = &self.guest.counters;
        let (mut chains, mut pages, mut changed) = (0, 0, false);
        let mut outcome = Ok(());
        while chains < u32::from(waiting).min(BATCH_CHAINS) && pages < BATCH_PAGES {
            let taken = ring::take(queue, &memory);
            let done = ring::intact().and(taken).and_then(|head| {
                let table = ring::table(queue);
                let parsed = workspace.chain().parse(&memory, table, head, &terms);
                let effect = execute(target, &memory, workspace, parsed);
                // Before the driver can see the answer, so that who has it finds it counted.
                Counters::add(&counters.requests, 1);
                Counters::add(&counters.malformed, u64::from(effect.malformed));
                ring::intact()?;
                ring::complete(queue, &memory, head, effect.used)?;
                Ok(effect)
            });
            match done {
                Ok(effect) => {
                    chains += 1;
                    pages += effect.pages;
                    changed |= effect.changed;
                }
                Err(fault) => {
                    outcome = Err(fault);
                    break;
                }
            }
        }
        let interrupt = chains > 0 && ring::wants_interrupt(queue, &memory)?;
        drop(state);

        if interrupt {
            ring::interrupt(vring);
        }
        if changed {
            self.guest.announcer.poke();
        }
        Counters::add(&counters.interrupts, u64::from(interrupt));
        outcome.map(|()| chains)
    }

    /// Delivers what is in the mailbox, as far as the driver has given buffers.
    fn deliver_events(&self, vring: &Vring) {
        if self.features.load(Ordering::Acquire) & feature::EVENTS == 0 {
            self.guest.mailbox.clear();
            return;
        }
        if self.is_stopped(EVENT_QUEUE) {
            return;
        }
        if let Err(fault) = self.try_deliver_events(vring) {
            self.stop_queue(EVENT_QUEUE, fault);
        }
    }

    fn try_deliver_events(&self, vring: &Vring) -> Result<(), Fault> {
        let Some(worker) = self.workers.get(EVENT_WORKER) else {
            return Ok(());
        };
        let mut tools = worker.tools.lock();
        let chain = tools.workspace.chain();
        let Terms {
            features, indirect, ..
        } = self.terms();
        let mut state = vring.get_mut();
        if !ring::is_running(&state) {
            return Ok(());
        }
        let memory = self.memory.memory();
        let queue = state.get_queue_mut();
        let (mut delivered, mut completed) = (0, 0u32);
        loop {
            let mut waiting = ring::pending(queue, &memory)?;
            while waiting > 0 {
                let Some(event) = self.guest.mailbox.take(features) else {
                    break;
                };
                waiting -= 1;
                let head = ring::take(queue, &memory)?;
                let fits = chain.parse_event_buffer(&memory, ring::table(queue), head, indirect)
                    && chain.write_event(&memory, &event);
                if !fits {
                    self.guest.mailbox.put_back(event);
                }
                ring::intact()?;
                let used = if fits { EVENT_SIZE } else { 0 };
                ring::complete(
                    queue,
                    &memory,
                    head,
                    u32::try_from(used).unwrap_or_default(),
                )?;
                delivered += u64::from(fits);
                completed += 1;
            }
            // New buffers matter only while something waits for one.
            if !ring::listen(queue, &memory)? || self.guest.mailbox.is_empty() {
                break;
            }
        }
        let interrupt = completed > 0 && ring::wants_interrupt(queue, &memory)?;
        drop(state);
        if interrupt {
            ring::interrupt(vring);
        }
        Counters::add(&self.guest.counters.events, delivered);
        Ok(())
    }
}

/// How many processors there are for this process, as of the first time that it was asked: the
/// limits of its control group are in files, which a confined process cannot read.
pub(crate) fn processors() -> usize {
    static FOUND: OnceLock<usize> = OnceLock::new();
    *FOUND.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

fn ring_bell(bell: &OwnedFd) {
    // It fails only when the counter is full, and then the bell is ringing.
    let _ = rustix::io::write(bell, &1u64.to_ne_bytes());
}

fn quiet_bell(bell: impl AsFd) {
    // It fails only when the bell was not ringing.
    let _ = rustix::io::read(bell, &mut [0u8; 8]);
}

impl VhostUserBackend for Device {
    type Bitmap = ();
    type Vring = Vring;

    fn num_queues(&self) -> usize {
        usize::from(self.guest.offer.request_queues) + 1
    }

    fn max_queue_size(&self) -> usize {
        usize::from(self.guest.offer.queue_size)
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn acked_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
    }

    fn reset_device(&self) {
        self.features.store(0, Ordering::Release);
        for flag in &self.stopped {
            flag.store(false, Ordering::Release);
        }
    }

    fn set_event_idx(&self, _enabled: bool) {
        // The rings know by themselves.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let config = self.guest.config();
        let range = usize::try_from(offset)
            .ok()
            .zip(usize::try_from(size).ok())
            .and_then(|(offset, size)| Some(offset..offset.checked_add(size)?));
        // Nothing at all is how vhost-user-backend is told that the request was wrong.
        range
            .and_then(|range| config.as_bytes().get(range))
            .unwrap_or_default()
            .to_vec()
    }

    fn set_config(&self, _offset: u32, _bytes: &[u8]) -> io::Result<()> {
        // All of it is read-only; writes are ignored, as the protocol says.
        Ok(())
    }

    fn update_memory(&self, _memory: GuestMemoryAtomic<Memory>) -> io::Result<()> {
        // Workers look at the shared memory object anew for every batch.
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        let mask = |worker: &Worker| worker.queues.iter().fold(0u64, |mask, &q| mask | (1 << q));
        self.workers.iter().map(mask).collect()
    }

    fn stop_vring(&self, queue: u32) -> io::Result<()> {
        // The next life of the ring is another one.
        if let Some(flag) = usize::try_from(queue)
            .ok()
            .and_then(|q| self.stopped.get(q))
        {
            flag.store(false, Ordering::Release);
        }
        Ok(())
    }

    fn handle_event(
        &self,
        device_event: u16,
        _events: EventSet,
        vrings: &[Vring],
        thread: usize,
    ) -> io::Result<()> {
        if self.closing.load(Ordering::Acquire) {
            return Err(io::Error::other("the connection has ended"));
        }
        let Some(worker) = self.workers.get(thread) else {
            return Ok(());
        };
        if u64::from(device_event) == self.bell_token() {
            quiet_bell(&worker.bell);
        }
        match vrings.first() {
            Some(vring) if thread == EVENT_WORKER => self.deliver_events(vring),
            _ => self.serve_requests(worker, vrings),
        }
        Ok(())
    }
}
