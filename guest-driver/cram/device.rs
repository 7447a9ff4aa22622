// SPDX-License-Identifier: GPL-2.0

//! One device: what it does for frontswap, its states, its life.

use crate::{
    areas::{self, Areas, Ranges},
    balance::{Balance, Wishes},
    events::EventQueue,
    frontswap::{self, Batch, Token},
    memory,
    queue::{Flushed, RequestQueue, Submitted},
    request::{Purpose, Request, Transfer, Waiter},
    stats::{Dir, Show, Stats, StatsFile},
    virtio::{self, VirtioDevice},
    wire,
    work::{self, Workqueue}, //
};
use kernel::{
    global_lock,
    new_mutex,
    prelude::*,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc,
        Mutex, //
    },
    time::{delay::fsleep, msecs_to_jiffies, Delta, Instant, Monotonic},
    workqueue::{impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem}, //
};

/// Freed slots are reported after this time, so that many go at once.
const FLUSH_DELAY_MS: u32 = 10;
/// How often a full device is asked whether it has room again, at the least.
const PRESSURE_CHECK_MS: u32 = 200;
/// How often a processor that watches for an answer pauses between two looks: a fraction of a
/// microsecond.
const PAUSES: u32 = 16;
/// How long to wait for the answer to a request that no page depends on.
const CONTROL_TIMEOUT_S: i64 = 2;
/// How often to look for it.
const CONTROL_POLL_US: i64 = 200;
/// How often to try again when a pool could not be made.
const RETRY_MS: u32 = 200;
/// How often to look whether a back-end that does not fit was replaced.
const MISFIT_CHECK_MS: u32 = 10_000;
/// How often the state is looked at while the device is being removed, when the core does not
/// report changes any more.
const LEAVING_CHECK_MS: u32 = 100;

global_lock! {
    // SAFETY: Initialised by `set_surroundings` before any device is probed.
    unsafe(uninit) static SURROUNDINGS: Mutex<Option<Surroundings>> = None;
}

/// What devices need of the module.
#[derive(Clone)]
struct Surroundings {
    workqueue: Arc<Workqueue>,
    balance_queue: Arc<Workqueue>,
    dir: Arc<Dir>,
}

/// Tells what devices need of the module, before the driver is registered.
pub(crate) fn set_surroundings(
    workqueue: Arc<Workqueue>,
    balance_queue: Arc<Workqueue>,
    dir: Arc<Dir>,
) {
    // SAFETY: Called once, when the module is loaded.
    unsafe { SURROUNDINGS.init() };
    *SURROUNDINGS.lock() = Some(Surroundings {
        workqueue,
        balance_queue,
        dir,
    });
}

/// The module leaves.
pub(crate) fn clear_surroundings() {
    *SURROUNDINGS.lock() = None;
}

/// What the driver does with requests.
///
/// ```text
///   SETTING_UP ──── new_pool worked ────► RUNNING ◄─┐
///       ▲                                  │   │    │ READY is back,
///       │◄─────── another generation ──────┘   │    │ same generation
///       │                     READY is gone    ▼    │
///       │◄─────── another generation ──────── DOWN ─┤
///       │              down_grace_ms passed:   │    │
///       │                     device reset     ▼    │
///       └──────── another generation ──────── LOST ─┘
/// ```
mod state {
    /// There is no pool yet. Pages are refused.
    pub(super) const SETTING_UP: u32 = 0;
    /// Pages are put and got.
    pub(super) const RUNNING: u32 = 1;
    /// The back-end is gone, maybe not for long. Pages are refused; gets wait.
    pub(super) const DOWN: u32 = 2;
    /// The back-end stays away. Gets fail.
    pub(super) const LOST: u32 = 3;

    pub(super) fn name(state: u32) -> &'static str {
        match state {
            SETTING_UP => "setting-up",
            RUNNING => "running",
            DOWN => "down",
            _ => "lost",
        }
    }
}

/// What only the control work, probe and remove touch.
struct Control {
    /// The generation that the pool is of; 0 is none.
    generation: u64,
    down_since: Option<Instant<Monotonic>>,
    registration: Option<frontswap::Registration<Device>>,
    file: Option<StatsFile<Device>>,
}

/// One device.
#[pin_data]
pub(crate) struct Device {
    virtio: VirtioDevice,
    workqueue: Arc<Workqueue>,
    /// For what may take long: see `balance`.
    balance_queue: Arc<Workqueue>,
    dir: Arc<Dir>,
    queues: KVec<Pin<KBox<RequestQueue>>>,
    #[pin]
    events: EventQueue,
    #[pin]
    areas: Areas,
    stats: Stats,
    state: Atomic<u32>,
    pressure: Atomic<u32>,
    leaving: Atomic<bool>,
    gone: Atomic<bool>,
    /// Pages may be in the guest's memory and in the device at a time.
    keeps_copies: Atomic<bool>,
    /// What the host wishes of the guest's memory.
    wishes: Wishes,
    #[pin]
    balance: Mutex<Balance>,
    #[pin]
    control: Mutex<Control>,
    #[pin]
    flush_work: DelayedWork<Device, 0>,
    #[pin]
    control_work: DelayedWork<Device, 1>,
    #[pin]
    balance_work: DelayedWork<Device, 2>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<Device, 0> for Device { self.flush_work }
    impl HasDelayedWork<Device, 1> for Device { self.control_work }
    impl HasDelayedWork<Device, 2> for Device { self.balance_work }
}

impl WorkItem<0> for Device {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.flush();
    }
}

impl WorkItem<1> for Device {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.look_after();
    }
}

impl WorkItem<2> for Device {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.rebalance();
    }
}

impl virtio::Driver for Device {
    fn new(virtio: VirtioDevice) -> Result<Arc<Self>> {
        let surroundings = SURROUNDINGS.lock().clone().ok_or(ENODEV)?;
        let config = virtio.config();
        if is_ready(&config) {
            check(&config)?;
        }
        if config.num_request_queues.get() == 0 {
            pr_err!("the device has no request queues\n");
            return Err(ENODEV);
        }

        let mut queues = KVec::new();
        let cpus = u16::try_from(kernel::cpu::nr_cpu_ids()).unwrap_or(u16::MAX);
        for _ in 0..config.num_request_queues.get().min(cpus) {
            queues.push(RequestQueue::new()?, GFP_KERNEL)?;
        }

        Arc::pin_init(
            try_pin_init!(Self {
                virtio,
                workqueue: surroundings.workqueue,
                balance_queue: surroundings.balance_queue,
                dir: surroundings.dir,
                queues,
                events <- EventQueue::new(),
                areas <- Areas::new(),
                stats: Stats::default(),
                state: Atomic::new(state::SETTING_UP),
                pressure: Atomic::new(0),
                leaving: Atomic::new(false),
                gone: Atomic::new(false),
                keeps_copies: Atomic::new(true),
                wishes: Wishes::new(),
                balance <- new_mutex!(Balance::new()),
                control <- new_mutex!(Control {
                    generation: 0,
                    down_since: None,
                    registration: None,
                    file: None,
                }),
                flush_work <- new_delayed_work!("cram_flush"),
                control_work <- new_delayed_work!("cram_control"),
                balance_work <- new_delayed_work!("cram_balance"),
            }? Error),
            GFP_KERNEL,
        )
    }

    fn connect(self: &Arc<Self>) -> Result {
        let mut found = KVec::with_capacity(self.queues.len() + 1, GFP_KERNEL)?;
        self.virtio
            .find_queues::<Self>(self.queues.len() as u16, |index, vq| {
                // There is room for all of them.
                let _ = found.push_within_capacity((index, vq));
            })?;
        self.virtio.ready();
        for (index, vq) in found {
            if index == wire::EVENT_QUEUE {
                if self.virtio.has_feature(wire::feature::EVENTS) {
                    self.events.open(vq);
                }
            } else if let Some(queue) = self.queues.get(usize::from(index) - 1) {
                queue.open(vq);
            }
        }
        Ok(())
    }

    fn start(self: &Arc<Self>) -> Result {
        self.look_after();
        let registration = frontswap::Registration::new(self.clone())?;
        let mut control = self.control.lock();
        control.registration = Some(registration);
        control.file = Some(StatsFile::new(
            &self.dir,
            self.virtio.index(),
            self.clone(),
        )?);
        pr_info!(
            "virtio{}: {} queues, {}\n",
            self.virtio.index(),
            self.queues.len(),
            state::name(self.state.load(Relaxed))
        );
        Ok(())
    }

    fn stop(self: &Arc<Self>) {
        self.leaving.store(true, Relaxed);
        // Memory that is being reclaimed would go to the disk now.
        work::cancel::<_, 2>(self);
        self.workqueue.schedule_now::<_, 1>(self);
        let (registration, file) = {
            let mut control = self.control.lock();
            (control.registration.take(), control.file.take())
        };
        drop(file);
        // Brings every page back, with the help of the control work when the back-end is gone.
        drop(registration);

        self.gone.store(true, Relaxed);
        work::cancel::<_, 0>(self);
        work::cancel::<_, 1>(self);
        work::cancel::<_, 2>(self);
        if self.state.load(Relaxed) == state::RUNNING {
            // Nothing is left to be lost; the host need not keep what the guest will not ask for.
            self.control_request(&Request::destroy_pool());
        }
    }

    fn disconnected(&self) {
        self.events.close();
        for queue in self.queues.iter() {
            queue.close(|purpose| self.end(purpose, None));
        }
    }

    fn queue_interrupt(self: &Arc<Self>, index: u16) {
        if index == wire::EVENT_QUEUE {
            while let Some(event) = self.events.next() {
                self.on_event(&event);
            }
            return;
        }
        let Some(queue) = self.queues.get(usize::from(index) - 1) else {
            return;
        };
        loop {
            queue.disable_interrupts();
            self.reap(queue);
            if queue.enable_interrupts() {
                break;
            }
        }
    }

    fn config_changed(self: &Arc<Self>) {
        self.schedule_control_now();
    }
}

/// Does a back-end stand behind the device?
fn is_ready(config: &wire::Config) -> bool {
    config.state.get() & wire::state::READY != 0
}

/// Refuses a back-end that this driver cannot work with.
fn check(config: &wire::Config) -> Result {
    if config.version.get() != wire::VERSION {
        pr_err!(
            "the device speaks version {} of the protocol, this driver {}\n",
            config.version.get(),
            wire::VERSION
        );
        return Err(ENODEV);
    }
    if config.page_shift != wire::PAGE_SHIFT
        || usize::from(config.max_batch.get()) < frontswap::BATCH_PAGES
    {
        pr_err!(
            "the device takes {} pages of 2^{} bytes in a batch, this driver needs {} of 2^{}\n",
            config.max_batch.get(),
            config.page_shift,
            frontswap::BATCH_PAGES,
            wire::PAGE_SHIFT
        );
        return Err(ENODEV);
    }
    Ok(())
}

impl Device {
    /// The queue that carries a batch, whose slots are all of one region.
    fn queue_of_batch(&self, batch: &Batch<'_>) -> Option<&RequestQueue> {
        let offset = batch.segments().next()?.offset as usize;
        let index = areas::queue_of(offset, self.queues.len());
        self.queues.get(index).map(|queue| &**queue)
    }

    fn schedule_control_now(self: &Arc<Self>) {
        if !self.gone.load(Relaxed) {
            self.workqueue.schedule_now::<_, 1>(self);
        }
    }

    fn schedule_control(self: &Arc<Self>, delay_ms: u32) {
        if !self.gone.load(Relaxed) {
            self.workqueue
                .schedule::<_, 1>(self, msecs_to_jiffies(delay_ms));
        }
    }

    /// Ends everything that the device has answered on a queue.
    fn reap(self: &Arc<Self>, queue: &RequestQueue) {
        while let Some(answer) = queue.answer() {
            if matches!(answer.response.status, wire::status::NO_POOL) {
                self.schedule_control_now();
            }
            self.end(answer.purpose, Some(&answer.response));
        }
    }

    /// Ends a request. Without a response, it was lost.
    fn end(&self, purpose: Purpose, response: Option<&wire::Response>) {
        match purpose {
            Purpose::Store(transfer) => {
                let executed = response.is_some_and(|response| response.status == wire::status::OK);
                if !executed {
                    // Whatever is there under these names is old.
                    for (offset, pages) in transfer.segments() {
                        self.areas.mark(transfer.swap_type(), offset, pages);
                    }
                }
                transfer.end(response, |result| self.stats.count_put(result));
            }
            Purpose::Load(transfer) => {
                transfer.end(response, |result| self.stats.count_get(result))
            }
            Purpose::Flush => (),
            Purpose::Control(waiter) => waiter.answer(response.copied()),
        }
    }

    /// May pages be put?
    fn accepts(&self) -> bool {
        self.state.load(Relaxed) == state::RUNNING
            && self.pressure.load(Relaxed) < wire::PRESSURE_MAX
    }

    /// Submits a request on the first queue and waits, but not longer than there is a back-end.
    /// `None` when there is no answer.
    fn control_request(self: &Arc<Self>, request: &Request) -> Option<wire::Response> {
        let waiter = Waiter::new().ok()?;
        let purpose = Purpose::Control(waiter.clone());
        if let Submitted::No(_) = self.queues.first()?.submit_now(request, purpose) {
            return None;
        }
        // This is what looks at the configuration space otherwise, so it does so here.
        let since = Instant::<Monotonic>::now();
        while since.elapsed() < Delta::from_secs(CONTROL_TIMEOUT_S) {
            if let Some(answer) = waiter.try_wait() {
                return answer;
            }
            if !is_ready(&self.virtio.config()) {
                break;
            }
            fsleep(Delta::from_micros(CONTROL_POLL_US));
        }
        None
    }

    fn on_event(self: &Arc<Self>, event: &wire::Event) {
        self.stats.events.add(1);
        match event.kind.get() {
            wire::event::PRESSURE => {
                self.pressure.store(event.value.get(), Relaxed);
                if event.value.get() >= wire::PRESSURE_MAX {
                    self.schedule_control(PRESSURE_CHECK_MS);
                }
            }
            wire::event::GIVE_BACK => {
                self.stats.give_back_pages.add(event.value.get() as usize);
                self.wishes.give_back(event.value.get());
                self.schedule_balance_now();
            }
            wire::event::SQUEEZE => {
                self.wishes.squeeze(event.value.get());
                self.schedule_balance_now();
            }
            _ => (),
        }
    }

    /// Tells the device about freed slots, as long as there is room on the queues.
    fn flush(self: &Arc<Self>) {
        if self.gone.load(Relaxed) {
            return;
        }
        let nr = self.queues.len();
        for (index, queue) in self.queues.iter().enumerate() {
            loop {
                let flushed = queue.submit_flush(
                    || {
                        let mut ranges = Ranges::new();
                        let swap_type = self.areas.take(index, nr, &mut ranges)?;
                        Some((Request::flush_page(swap_type, &ranges), (swap_type, ranges)))
                    },
                    |(swap_type, ranges)| self.areas.untake(*swap_type, ranges),
                );
                match flushed {
                    Flushed::Yes((_, ranges)) => {
                        self.stats.flush_requests.add(1);
                        self.stats.pages_flushed.add(ranges.pages());
                    }
                    Flushed::Nothing => break,
                    Flushed::NoRoom => {
                        self.schedule_flush();
                        break;
                    }
                }
            }
        }
    }

    fn schedule_flush(self: &Arc<Self>) {
        if !self.gone.load(Relaxed) {
            self.workqueue
                .schedule::<_, 0>(self, msecs_to_jiffies(FLUSH_DELAY_MS));
        }
    }

    fn schedule_balance_now(self: &Arc<Self>) {
        if !self.leaving.load(Relaxed) {
            self.balance_queue.schedule_now::<_, 2>(self);
        }
    }

    /// One step towards what the host wishes of the guest's memory.
    fn rebalance(self: &Arc<Self>) {
        if self.leaving.load(Relaxed) {
            return;
        }
        let step = self.balance.lock().step(&self.wishes, self.accepts());
        self.stats.squeezed_pages.add(step.squeezed);
        self.stats.given_back_pages.add(step.given_back);
        if let Some(report) = step.report {
            if self.virtio.has_feature(wire::feature::SQUEEZE)
                && self.state.load(Relaxed) == state::RUNNING
            {
                self.control_request(&Request::report(&report));
            }
        }
        if let Some(delay_ms) = step.next_ms {
            if !self.leaving.load(Relaxed) {
                self.balance_queue
                    .schedule::<_, 2>(self, msecs_to_jiffies(delay_ms));
            }
        }
    }

    /// Does as the host's operator wants. A device that has no policy wants no page twice.
    fn follow(self: &Arc<Self>, policy: u32) {
        let policy = match self.virtio.has_feature(wire::feature::POLICY) {
            true => policy,
            false => 0,
        };
        let keeps = policy & wire::policy::KEEP_COPIES != 0;
        let kept = self.keeps_copies.xchg(keeps, Relaxed);
        memory::set_exclusive(!keeps);
        if kept && !keeps {
            self.wishes.drop_copies();
            self.schedule_balance_now();
        }
        if self.wishes.set_auto(policy & wire::policy::AUTO_SQUEEZE != 0) {
            self.schedule_balance_now();
        }
    }

    /// Looks at the configuration space, and does what follows from it.
    fn look_after(self: &Arc<Self>) {
        let mut control = self.control.lock();
        if self.gone.load(Relaxed) {
            return;
        }
        let config = self.virtio.config();
        self.pressure.store(config.pressure.get(), Relaxed);

        let next = if !is_ready(&config) {
            self.without_backend(&mut control)
        } else if check(&config).is_err() {
            self.state.store(state::SETTING_UP, Relaxed);
            Some(MISFIT_CHECK_MS)
        } else {
            control.down_since = None;
            self.with_backend(&mut control, &config)
        };
        let next = match self.leaving.load(Relaxed) {
            true => Some(LEAVING_CHECK_MS),
            false => next,
        };
        if let Some(delay_ms) = next {
            self.schedule_control(delay_ms);
        }
    }

    /// There is no back-end. Returns when to look again, in milliseconds.
    fn without_backend(self: &Arc<Self>, control: &mut Control) -> Option<u32> {
        if self.state.load(Relaxed) == state::LOST {
            return None;
        }
        self.state.store(state::DOWN, Relaxed);
        let since = match control.down_since {
            Some(since) => since,
            None => {
                pr_warn!("virtio{}: the back-end is gone\n", self.virtio.index());
                self.stats.backend_lost.add(1);
                *control.down_since.insert(Instant::<Monotonic>::now())
            }
        };
        let grace = u64::from(crate::module_parameters::down_grace_ms.value());
        let waited = since.elapsed().as_millis().max(0) as u64;
        if waited < grace {
            return Some((grace - waited).min(u64::from(u32::MAX)) as u32);
        }

        // Requests that are with the device can only be taken back by a reset.
        pr_err!(
            "virtio{}: the back-end stays away, its pages are given up\n",
            self.virtio.index()
        );
        self.state.store(state::LOST, Relaxed);
        self.stats.resets.add(1);
        if let Err(error) = self.virtio.restart() {
            pr_err!(
                "virtio{}: the device does not come back: {:?}\n",
                self.virtio.index(),
                error
            );
        }
        None
    }

    /// There is a back-end. Returns when to look again, in milliseconds.
    fn with_backend(self: &Arc<Self>, control: &mut Control, config: &wire::Config) -> Option<u32> {
        let generation = config.generation.get();
        // The same generation has every page that this driver put, however long it was away.
        if control.generation != generation {
            self.state.store(state::SETTING_UP, Relaxed);
            // What is there is from another life of this guest.
            let destroyed = self.control_request(&Request::destroy_pool());
            let made = destroyed.and_then(|_| self.control_request(&Request::new_pool()));
            let Some(response) = made else {
                return Some(RETRY_MS);
            };
            if response.status != wire::status::OK {
                pr_err!(
                    "virtio{}: the device makes no pool: status {}\n",
                    self.virtio.index(),
                    response.status
                );
                return Some(RETRY_MS * 10);
            }
            control.generation = generation;
        }
        self.state.store(state::RUNNING, Relaxed);
        self.follow(config.policy.get());
        // A full device says when it has room, but news may be late or lost.
        (config.pressure.get() >= wire::PRESSURE_MAX).then_some(PRESSURE_CHECK_MS)
    }

    /// Watches for the answer to request `number` for a short while.
    fn watch(self: &Arc<Self>, queue: &RequestQueue, number: u64) {
        let limit = Delta::from_micros(i64::from(crate::module_parameters::load_spin_us.value()));
        let since = Instant::<Monotonic>::now();
        while since.elapsed() < limit {
            // No answer is there at once, and each look takes a lock that the next request wants.
            for _ in 0..PAUSES {
                kernel::processor::cpu_relax();
            }
            self.reap(queue);
            if queue.answered() >= number {
                self.stats.gets_watched.add(1);
                return;
            }
        }
    }
}

impl frontswap::Backend for Device {
    fn init(self: &Arc<Self>, swap_type: u32, slots: usize) -> Result {
        self.areas.add(swap_type, slots)
    }

    fn exit(self: &Arc<Self>, swap_type: u32) {
        self.areas.remove(swap_type);
        if self.state.load(Relaxed) == state::LOST {
            return;
        }
        // Wait: a page that is put under the same name later must not be hit.
        if let (Ok(waiter), Some(queue)) = (Waiter::new(), self.queues.first()) {
            let purpose = Purpose::Control(waiter.clone());
            let request = Request::flush_object(swap_type);
            if let Submitted::Yes(_) = queue.submit(&request, purpose, None, || ()) {
                waiter.wait();
            }
        }
    }

    fn store(self: &Arc<Self>, batch: &Batch<'_>, token: Token) -> Result<(), Token> {
        let Some(queue) = self.accepts().then(|| self.queue_of_batch(batch)).flatten() else {
            self.stats.puts_not_tried.add(batch.pages());
            return Err(token);
        };
        let request = Request::put(batch);
        let purpose = Purpose::Store(Transfer::new(batch, token));
        let submitted = queue.submit(&request, purpose, Some(batch), || {
            for segment in batch.segments() {
                self.areas
                    .unmark(batch.swap_type(), segment.offset as usize, segment.pages);
            }
        });
        self.stats.put_requests.add(1);
        match submitted {
            Submitted::Yes(_) => Ok(()),
            Submitted::No(purpose) => purpose.into_token().map_or(Ok(()), Err),
        }
    }

    fn load(self: &Arc<Self>, batch: &Batch<'_>, token: Token) -> Result<(), Token> {
        let Some(queue) = self.queue_of_batch(batch) else {
            return Err(token);
        };
        if self.state.load(Relaxed) == state::LOST {
            self.stats.gets_failed.add(batch.pages());
            return Err(token);
        }
        let request = Request::get(batch);
        let purpose = Purpose::Load(Transfer::new(batch, token));
        self.stats.get_requests.add(1);
        match queue.submit(&request, purpose, Some(batch), || ()) {
            Submitted::Yes(number) => {
                self.watch(queue, number);
                Ok(())
            }
            Submitted::No(purpose) => {
                self.stats.gets_failed.add(batch.pages());
                purpose.into_token().map_or(Ok(()), Err)
            }
        }
    }

    fn invalidate(self: &Arc<Self>, swap_type: u32, offset: usize, nr: usize) {
        self.areas.mark(swap_type, offset, nr);
        self.schedule_flush();
    }
}

impl Show for Device {
    fn show(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
        writeln!(f, "state {}", state::name(self.state.load(Relaxed)))?;
        writeln!(f, "pressure {}", self.pressure.load(Relaxed))?;
        writeln!(f, "queues {}", self.queues.len())?;
        let copies = if self.keeps_copies.load(Relaxed) {
            "keep"
        } else {
            "free"
        };
        writeln!(f, "copies {copies}")?;
        self.stats.write(f)
    }
}
