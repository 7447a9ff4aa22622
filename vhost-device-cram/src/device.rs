// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One connection of a guest: its rings, and how they are served.
//!
//! Workers: worker 0 has the event queue; each of the others has a group of request queues and
//! memory of its own, so workers share nothing on the way to the store. A worker serves its
//! rings in turn, a bounded batch at a time, with notifications off, until all are empty.
//!
//! A front-end sets the rings up ([`session`](crate::vhost::session)), threads run them
//! ([`worker`](crate::worker)), both by way of [`backend`](crate::backend).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use cram_abi::wire::{EVENT_QUEUE, EVENT_SIZE, feature};
use parking_lot::{Mutex, MutexGuard};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendFlags, send};
use rustix::thread::{CpuSet, sched_setaffinity};
use vhost::vhost_user::VhostUserVirtioFeatures;
use vhost::vhost_user::message::BackendReq;
use virtio_bindings::bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use zerocopy::IntoBytes;

use crate::backend::Unsettled;
use crate::client::{Counters, Guest, Instance};
use crate::execute::{Effect, Target, Workspace, execute};
use crate::figures::{Kind, Sampler, WorkerFigures};
use crate::first_touch::Allowance;
use crate::patience::Patience;
use crate::request::Terms;
use crate::ring::{Fault, Ring, Serving};
use crate::sigbus::Loss;
use crate::vhost::memory::Memory;
use crate::vhost::notifier::{Notifier, NotifierError};
use crate::worker::Wakers;

/// Pages after which a worker looks at its next queue, and tells the driver what is done: half
/// a millisecond or so of compression.
const BATCH_PAGES: u32 = 64;
/// Chains after which it does so, for requests without pages, and for events.
const BATCH_CHAINS: u32 = 64;
/// The worker that has the event queue.
const EVENT_WORKER: usize = 0;

/// Virtio features that the device offers.
pub const FEATURES: u64 = (1 << VIRTIO_F_VERSION_1)
    | (1 << VIRTIO_RING_F_EVENT_IDX)
    | (1 << VIRTIO_RING_F_INDIRECT_DESC)
    | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits()
    | feature::ALL;

struct Worker {
    number: usize,
    /// Queues of the worker (indexes of the device).
    queues: Vec<usize>,
    /// What it works with; only the worker itself looks at it.
    tools: Mutex<Option<Tools>>,
    /// Made when the first of its queues is started: a driver that uses few queues costs few threads.
    wakers: OnceLock<Wakers>,
    poll: Duration,
    /// The processor that it is to run on.
    pin: Option<u32>,
}

impl Worker {
    fn new(number: usize, queues: Vec<usize>, poll: Duration, pin: Option<u32>) -> Self {
        Worker {
            number,
            queues,
            tools: Mutex::new(None),
            wakers: OnceLock::new(),
            poll,
            pin,
        }
    }

    /// What wakes it, from now on. Only the thread of the connection calls this.
    fn use_wakers(&self) -> io::Result<&Wakers> {
        if self.wakers.get().is_none() {
            let made = Wakers::new()?;
            return Ok(self.wakers.get_or_init(|| made));
        }
        self.wakers
            .get()
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn new_tools(&self) -> Tools {
        Tools {
            workspace: Workspace::new(),
            patience: Patience::new(self.poll),
            sampler: Sampler::default(),
            pin: self.pin,
        }
    }

    fn wake(&self) {
        if let Some(wakers) = self.wakers.get() {
            wakers.ring();
        }
    }
}

struct Tools {
    workspace: Workspace,
    patience: Patience,
    /// Which requests are timed.
    sampler: Sampler,
    /// The processor that the worker is to run on, until it does.
    pin: Option<u32>,
}

/// One connection.
pub struct Device {
    guest: Arc<Guest>,
    /// Bits that the driver accepted; none until it has said so.
    features: AtomicU64,
    /// All queues, by number.
    rings: Vec<Mutex<Ring>>,
    /// The memory that the front-end described last, and the watch over it.
    memory: Mutex<Arc<Memory>>,
    /// Which virtual machine this is, once that is settled.
    instance: Mutex<Option<Option<Instance>>>,
    workers: Vec<Worker>,
    closing: AtomicBool,
    /// Becomes readable when the connection is to end, and stays so.
    over: OwnedFd,
    /// Why, when it was not the front-end's wish.
    failure: Mutex<Option<&'static str>>,
    /// The front-end's channel for requests of ours.
    backend_channel: Mutex<Option<OwnedFd>>,
}

impl Device {
    /// A device for one connection of `guest`.
    ///
    /// # Errors
    /// When there are no descriptors left, or the offer makes no sense.
    pub fn new(guest: Arc<Guest>) -> io::Result<Self> {
        let offer = &guest.offer;
        let queues: Vec<usize> = (1..=usize::from(offer.request_queues)).collect();
        let groups = offer.groups();
        let events = usize::from(EVENT_QUEUE);
        let events = Worker::new(EVENT_WORKER, vec![events], offer.poll, None);
        events.use_wakers()?;
        let mut workers = vec![events];
        let mut pins = offer.pin.iter().copied().cycle();
        for group in 0..groups {
            let mine = queues.iter().copied().skip(group).step_by(groups).collect();
            workers.push(Worker::new(1 + group, mine, offer.poll, pins.next()));
        }
        let rings = (0..=queues.len()).map(|_| Ring::new(offer.queue_size).map(Mutex::new));
        let rings = rings.collect::<Result<_, _>>().map_err(io::Error::other)?;
        Ok(Device {
            guest,
            features: AtomicU64::new(0),
            rings,
            memory: Mutex::default(),
            instance: Mutex::new(None),
            workers,
            closing: AtomicBool::new(false),
            over: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            failure: Mutex::new(None),
            backend_channel: Mutex::new(None),
        })
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.workers.len()
    }

    /// What wakes worker `number`; nothing as long as none of its queues was ever started.
    pub fn wakers(&self, number: usize) -> Option<&Wakers> {
        self.workers.get(number)?.wakers.get()
    }

    /// The queues, by number; 0 is the event queue.
    pub fn rings(&self) -> &[Mutex<Ring>] {
        &self.rings
    }

    /// Whose connection it is.
    pub(crate) fn guest(&self) -> &Arc<Guest> {
        &self.guest
    }

    /// How much of the guest's memory the daemon touches first.
    pub(crate) fn first_touch(&self) -> Arc<Allowance> {
        Arc::clone(&self.guest.first_touch)
    }

    /// The queues of worker `number`.
    pub(crate) fn queues_of(&self, number: usize) -> &[usize] {
        let worker = self.workers.get(number);
        worker.map_or(&[], |worker| &worker.queues)
    }

    /// Keeps the front-end's channel for our requests.
    pub fn set_backend_channel(&self, channel: OwnedFd) {
        let before = self.backend_channel.lock().replace(channel);
        // Closed when it is not locked: closing may take as long as a front-end likes.
        drop(before);
    }

    /// Whether the workers are to end.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Makes every worker end, soon.
    pub fn close(&self) {
        self.closing.store(true, Ordering::Release);
        let channel = self.backend_channel.lock().take();
        // It cannot be full: this is written once or twice.
        let _ = rustix::io::write(&self.over, &1u64.to_ne_bytes());
        for worker in &self.workers {
            worker.wake();
        }
        // At last, and not locked: closing may take as long as a front-end likes.
        drop(channel);
    }

    /// The same, for a reason of ours: the first one counts.
    pub fn fail(&self, why: &'static str) {
        self.failure.lock().get_or_insert(why);
        self.close();
    }

    /// Why the connection ends, if the reason is ours.
    pub fn failure(&self) -> Option<&'static str> {
        *self.failure.lock()
    }

    /// Becomes readable when the connection is to end.
    pub fn over(&self) -> BorrowedFd<'_> {
        self.over.as_fd()
    }

    /// Has the event worker look at the mailbox.
    pub fn wake_event_worker(&self) {
        if let Some(wakers) = self.wakers(EVENT_WORKER) {
            wakers.ring();
        }
    }

    /// Tells the front-end to read the configuration space and interrupt the guest: a header without
    /// body, and without the flag that asks for a reply. A front-end that does not read its channel
    /// misses the message, and never makes us wait.
    pub fn announce_config_change(&self) {
        const VERSION_FLAG: u32 = 1;
        const BODY_SIZE: u32 = 0;
        let code = BackendReq::CONFIG_CHANGE_MSG.into();
        let message = [code, VERSION_FLAG, BODY_SIZE];
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

    /// Keeps what the driver accepted.
    pub(crate) fn keep_features(&self, features: u64) {
        self.features.store(features, Ordering::Release);
    }

    /// Keeps the memory that a front-end describes, and the watch over it. Rings use it once
    /// `update_memory` says so.
    pub fn describe_memory(&self, memory: &Arc<Memory>) {
        *self.memory.lock() = Arc::clone(memory);
    }

    pub(crate) fn described_memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory.lock())
    }

    /// Settles which virtual machine this is, and so whose pages are served: what the front-end says
    /// first counts, and that it says nothing before it reads the configuration or starts a ring.
    ///
    /// # Errors
    /// When it says otherwise afterwards, or the pages of the one before cannot be dropped.
    pub fn settle(&self, instance: Option<Instance>) -> Result<(), Unsettled> {
        let mut settled = self.instance.lock();
        match *settled {
            None => {
                self.guest.claim(instance)?;
                *settled = Some(instance);
                Ok(())
            }
            Some(known) if instance.is_none() || known == instance => Ok(()),
            Some(_) => Err(Unsettled::Instance),
        }
    }

    /// Changes a ring while no worker is at it, and has its worker look at it.
    ///
    /// # Errors
    /// What `change` says.
    pub fn change_ring<T, E>(
        &self,
        index: usize,
        change: impl FnOnce(&mut Ring) -> Result<T, E>,
    ) -> Result<T, E>
    where
        E: From<NotifierError>,
    {
        let missing = || E::from(NotifierError::Kind);
        let ring = self.rings.get(index).ok_or_else(missing)?;
        let changed = change(&mut ring.lock());
        if let Some(worker) = self.worker_of(index) {
            worker.wake();
        }
        changed
    }

    fn worker_of(&self, index: usize) -> Option<&Worker> {
        let has_it = |worker: &&Worker| worker.queues.contains(&index);
        self.workers.iter().find(has_it)
    }

    /// Starts a ring, or has a started one be kicked by another descriptor.
    ///
    /// # Errors
    /// When nobody can be woken by `kick`.
    pub fn start_ring(&self, index: usize, kick: OwnedFd) -> Result<(), NotifierError> {
        if let (Some(worker), Some(ring)) = (self.worker_of(index), self.rings.get(index)) {
            let wakers = worker.use_wakers()?;
            wakers.add(&kick)?;
            let mut ring = ring.lock();
            ring.with_kick(|before| wakers.remove(before));
            ring.start(kick);
            drop(ring);
            // Kicks from before.
            wakers.ring();
        }
        Ok(())
    }

    /// Stops a ring: when this returns, nobody serves it.
    pub fn stop_ring(&self, index: usize) {
        if let (Some(worker), Some(ring)) = (self.worker_of(index), self.rings.get(index)) {
            let mut ring = ring.lock();
            ring.with_kick(|kick| {
                if let Some(wakers) = worker.wakers.get() {
                    wakers.remove(kick);
                }
            });
            ring.stop();
        }
    }

    /// Has all workers look at their rings.
    pub(crate) fn look(&self) {
        for worker in &self.workers {
            worker.wake();
        }
    }

    /// Serves the rings of worker `number` until they are empty.
    pub fn serve(&self, number: usize) {
        self.serve_rounds(number, u64::MAX);
    }

    /// The same, but looks at each ring no more than `most` times: rings may lie so that completing
    /// one request offers the next, and then they are never empty.
    pub fn serve_rounds(&self, number: usize, most: u64) {
        match self.workers.get(number) {
            Some(worker) if number == EVENT_WORKER => self.deliver_events(worker, most),
            Some(worker) => self.serve_requests(worker, most),
            None => {}
        }
    }

    fn terms(&self) -> Terms {
        let features = self.features.load(Ordering::Acquire);
        Terms {
            features: features & feature::ALL,
            indirect: features & (1 << VIRTIO_RING_F_INDIRECT_DESC) != 0,
        }
    }

    /// A queue whose ring cannot be trusted is stopped alone; without memory there is no connection.
    fn stop_queue(&self, queue: usize, mut ring: MutexGuard<'_, Ring>, fault: Fault) {
        let error = ring.fault();
        drop(ring);
        Counters::add(&self.guest.counters.queues_stopped, 1);
        let name = &self.guest.name;
        log::warn!("{name}: queue {queue} stopped until it is reset: {fault}");
        if let Fault::Lost(loss) = fault {
            self.fail(match loss {
                Loss::Gone => "part of the guest's memory is gone",
                Loss::Overdrawn => "the guest is beyond --first-touch-limit",
            });
        }
        if let Some(error) = error {
            error.notify();
        }
    }

    /// Serves a group of request queues until all of them are empty, and have been for a while.
    fn serve_requests(&self, worker: &Worker, most: u64) {
        let mut tools = worker.tools.lock();
        let tools = tools.get_or_insert_with(|| worker.new_tools());
        let Tools {
            workspace,
            patience,
            sampler,
            pin,
        } = tools;
        let figures = self.guest.figures.of(worker.number);
        if let Some(processor) = pin.take() {
            self.run_on(processor);
        }
        let rings = || {
            let number = worker.queues.iter().copied();
            number.filter_map(|queue| self.rings.get(queue).map(|ring| (queue, ring)))
        };
        figures.wakeups.add(1);
        patience.wakes(Instant::now());
        let mut idle_since = None;
        let mut rounds = 0..most;
        while !self.is_closing() && rounds.next().is_some() {
            let mut worked = false;
            for (queue, ring) in rings() {
                worked |= self.serve_batch(queue, ring, workspace, (figures, sampler)) > 0;
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
            for (queue, ring) in rings() {
                arrived |= self.listen(queue, ring);
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

    /// Has the driver notify. Whether something has arrived meanwhile.
    fn listen(&self, queue: usize, ring: &Mutex<Ring>) -> bool {
        let ring = ring.lock();
        let mut serving = ring.serve();
        if !serving.is_running() {
            return false;
        }
        let arrived = serving.listen();
        drop(serving);
        arrived.unwrap_or_else(|fault| {
            self.stop_queue(queue, ring, fault);
            false
        })
    }

    /// Executes and completes a bounded number of chains of one queue. Returns how many.
    fn serve_batch(
        &self,
        queue: usize,
        ring: &Mutex<Ring>,
        workspace: &mut Workspace,
        (figures, sampler): (&WorkerFigures, &mut Sampler),
    ) -> u32 {
        // Locked for the batch: GET_VRING_BASE waits for it, and so never reports an index
        // that is behind what we execute.
        let ring = ring.lock();
        let mut serving = ring.serve();
        if !serving.is_running() {
            return 0;
        }
        let mut batch = Batch::default();
        let outcome = self
            .execute_batch(&mut serving, workspace, (figures, sampler), &mut batch)
            // What was completed before a fault is completed.
            .and(if batch.chains > 0 {
                serving.wants_interrupt()
            } else {
                Ok(false)
            });
        drop(serving);
        if batch.changed {
            self.guest.announcer.poke();
        }
        let call = ring.call();
        match outcome {
            Ok(true) => {
                // Whoever waits for the ring comes first: a front-end that wants to change it.
                MutexGuard::unlock_fair(ring);
                figures.interrupts.add(1);
                notify(call);
            }
            Ok(false) => MutexGuard::unlock_fair(ring),
            Err(fault) => {
                self.stop_queue(queue, ring, fault);
                if batch.chains > 0 {
                    notify(call);
                }
            }
        }
        batch.chains
    }

    fn execute_batch(
        &self,
        ring: &mut Serving<'_>,
        workspace: &mut Workspace,
        (figures, sampler): (&WorkerFigures, &mut Sampler),
        batch: &mut Batch,
    ) -> Result<(), Fault> {
        let waiting = ring.pending()?;
        if waiting == 0 {
            return Ok(());
        }
        ring.quiet()?;
        let terms = self.terms();
        let target = Target {
            store: &self.guest.store,
            client: &self.guest.account,
            balance: &self.guest.balance,
            features: terms.features,
            max_pools: self.guest.offer.max_pools,
        };
        // When they were seen in the ring; asked only if one of them will be timed.
        let seen = sampler.picks_within(waiting).then(Instant::now);
        let memory = Arc::clone(ring.memory());
        let (limit, table) = (u32::from(waiting).min(BATCH_CHAINS), ring.table());
        while batch.chains < limit && batch.pages < BATCH_PAGES {
            let head = ring.next()?;
            let taken = sampler.picks().then(Instant::now);
            let parsed = workspace.chain().parse(&memory, table, head, &terms);
            let effect = execute(target, &memory, workspace, parsed);
            // Before anybody can see the answer, so that who has it finds it counted.
            batch.changed |= effect.changed;
            figures.requests.add(1);
            if effect.malformed {
                figures.malformed.add(1);
            }
            if let Some(taken) = taken {
                time(figures, seen, taken, &effect);
            }
            ring.complete(head, effect.used)?;
            batch.chains += 1;
            batch.pages += effect.pages;
        }
        Ok(())
    }

    /// Delivers what is in the mailbox, as far as the driver has given buffers.
    fn deliver_events(&self, worker: &Worker, most: u64) {
        let features = self.features.load(Ordering::Acquire);
        if features == 0 {
            // It has not said yet whether it wants any.
            return;
        }
        if features & feature::EVENTS == 0 {
            self.guest.mailbox.clear();
            return;
        }
        let Some(ring) = self.rings.get(usize::from(EVENT_QUEUE)) else {
            return;
        };
        let mut tools = worker.tools.lock();
        let tools = tools.get_or_insert_with(|| worker.new_tools());
        // A bounded number of buffers at a time, so that whoever wants the ring gets it in between.
        let mut rounds = 0..most;
        while !self.is_closing() && rounds.next().is_some() {
            let ring = ring.lock();
            let mut serving = ring.serve();
            if !serving.is_running() {
                break;
            }
            let mut batch = Batch::default();
            let outcome = self.deliver_batch(&mut serving, &mut tools.workspace, &mut batch);
            let wants_interrupt = if batch.chains > 0 {
                serving.wants_interrupt()
            } else {
                Ok(false)
            };
            drop(serving);
            let call = ring.call();
            match outcome.and_then(|more| wants_interrupt.map(|wants| (more, wants))) {
                Ok((more, wants)) => {
                    MutexGuard::unlock_fair(ring);
                    if wants {
                        notify(call);
                    }
                    if !more {
                        break;
                    }
                }
                Err(fault) => {
                    self.stop_queue(usize::from(EVENT_QUEUE), ring, fault);
                    notify(call);
                    break;
                }
            }
        }
    }

    /// Delivers events into some buffers. Whether there may be more to do.
    fn deliver_batch(
        &self,
        ring: &mut Serving<'_>,
        workspace: &mut Workspace,
        batch: &mut Batch,
    ) -> Result<bool, Fault> {
        let mailbox = &self.guest.mailbox;
        let Terms {
            features, indirect, ..
        } = self.terms();
        let memory = Arc::clone(ring.memory());
        let chain = workspace.chain();
        let mut waiting = ring.pending()?;
        while waiting > 0 {
            if batch.chains >= BATCH_CHAINS {
                return Ok(true);
            }
            let Some(event) = mailbox.take(features) else {
                break;
            };
            waiting -= 1;
            let delivered = ring.next().and_then(|head| {
                let fits = chain.parse_event_buffer(&memory, ring.table(), head, indirect)
                    && chain.write_event(&memory, &event);
                let used = if fits { EVENT_SIZE } else { 0 };
                ring.complete(head, u32::try_from(used).unwrap_or_default())?;
                Ok(fits)
            });
            if !matches!(delivered, Ok(true)) {
                mailbox.put_back(event);
            }
            self.guest
                .figures
                .of(EVENT_WORKER)
                .events
                .add(u64::from(delivered?));
            batch.chains += 1;
        }
        // New buffers matter only while something waits for one.
        Ok(ring.listen()? && !mailbox.is_empty())
    }
}

/// Records what a timed request took.
fn time(figures: &WorkerFigures, seen: Option<Instant>, taken: Instant, effect: &Effect) {
    if let Some(kind) = effect.timed {
        figures.record(kind, taken.elapsed());
    }
    if let Some(seen) = seen {
        figures.record(Kind::Queueing, taken.saturating_duration_since(seen));
    }
}

/// What was done while a ring was locked.
#[derive(Default)]
struct Batch {
    chains: u32,
    pages: u32,
    changed: bool,
}

fn notify(call: Option<Notifier>) {
    if let Some(call) = call {
        call.notify();
    }
}

/// How many processors there are for this process, as of the first time that it was asked: the
/// limits of its control group are in files, which a confined process cannot read.
pub(crate) fn processors() -> usize {
    static FOUND: OnceLock<usize> = OnceLock::new();
    *FOUND.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}

#[cfg(test)]
pub(crate) mod tests {
    use cram_store::{Store, StoreConfig};
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

    use super::*;
    use crate::announce::Announcer;
    use crate::client::Offer;

    /// A connection of a guest of its own.
    pub(crate) fn device(request_queues: u16, queue_size: u16) -> Arc<Device> {
        let store = Store::new(StoreConfig::default()).unwrap();
        let account = store.add_client("guest", None).unwrap();
        let offer = Offer {
            request_queues,
            queue_size,
            max_pools: 1,
            poll: Duration::ZERO,
            workers: Some(1),
            pin: Vec::new(),
            policy: crate::balance::Policy::default(),
            first_touch_bytes: 0,
        };
        let announcer = Arc::new(Announcer::default());
        let (name, socket) = ("guest".into(), "/".into());
        let guest = Guest::new(name, socket, false, store, account, offer, announcer);
        Arc::new(Device::new(Arc::new(guest)).unwrap())
    }

    /// Whoever wants to stop the event queue gets it after so many buffers, though the driver go on
    /// giving buffers that can take no event.
    #[test]
    fn events_are_delivered_a_bounded_batch_at_a_time() {
        const TABLE: u64 = 0;
        const AVAILABLE: u64 = 0x2000;
        const USED: u64 = 0x3000;
        let device = device(1, 256);
        let map = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        // One descriptor of eight bytes, made available two hundred times.
        let descriptor = [0x3800, 2 << 32 | 8].map(u64::to_le_bytes).concat();
        map.write_slice(&descriptor, GuestAddress(TABLE)).unwrap();
        map.write_obj(200u16.to_le(), GuestAddress(AVAILABLE + 2))
            .unwrap();
        device.guest.ask_to_give_back(1);

        let mut ring = device.rings[0].lock();
        ring.use_memory(&Arc::new(Memory::from(map)));
        ring.set_addresses(TABLE, AVAILABLE, USED).unwrap();
        let mut workspace = Workspace::new();
        let mut completed = 0;
        for wanted in [64, 64, 64, 8] {
            let mut batch = Batch::default();
            let more = device.deliver_batch(&mut ring.serve(), &mut workspace, &mut batch);
            assert_eq!((more, batch.chains), (Ok(wanted == 64), wanted));
            completed += batch.chains;
        }
        assert_eq!(completed, 200);
        assert!(!device.guest.mailbox.is_empty());
    }
}
