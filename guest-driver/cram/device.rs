// SPDX-License-Identifier: GPL-2.0

//! One device: what it does for frontswap, its states, its life.

#[cfg(CONFIG_PM_SLEEP)]
mod hibernation;
mod host;
mod swap;
mod watchdog;

use self::watchdog::Look;
use crate::{
    areas::Areas,
    balance::{Balance, Wishes},
    events::EventQueue,
    frontswap,
    queue::{Gate, RequestQueue, Submitted},
    request::{Purpose, Request},
    stats::{Dir, Show, Stats, StatsFile},
    turn::Turn,
    virtio::{self, VirtioDevice},
    wire,
    work::{self, Workqueue}, //
};
use kernel::{
    global_lock,
    new_mutex,
    new_spinlock_irq,
    prelude::*,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc,
        Mutex,
        SpinLockIrq, //
    },
    time::{delay::fsleep, msecs_to_jiffies, Delta, Instant, Monotonic},
    workqueue::{impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem}, //
};

/// How often a full device is asked whether it has room again, at the least.
const PRESSURE_CHECK_MS: u32 = 200;
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
///                               no answer for stall_ms   ... load_timeout_ms
///                                      ┌───────► STALLED ───────► HUNG
///                                      │ ◄─────────┴── answers ─────┘
///   SETTING_UP ──── new_pool worked ────► RUNNING ◄─┐
///       ▲                                  │   │    │ READY is back,
///       │◄─────── another generation ──────┘   │    │ same generation
///       │         READY is gone, from any      ▼    │
///       │◄─────── another generation ──────── DOWN ─┤
///       │              down_grace_ms passed:   │    │
///       │                     device reset     ▼    │
///       └──────── another generation ──────── LOST ─┘
/// ```
mod state {
    use super::Gate;

    /// There is no pool yet. Pages are refused.
    pub(super) const SETTING_UP: u32 = 0;
    /// Pages are put and got.
    pub(super) const RUNNING: u32 = 1;
    /// The back-end is gone, maybe not for long. Pages are refused; gets wait.
    pub(super) const DOWN: u32 = 2;
    /// The back-end stays away. Gets fail.
    pub(super) const LOST: u32 = 3;
    /// The back-end does not answer, maybe not for long. Pages are refused; gets wait.
    pub(super) const STALLED: u32 = 4;
    /// The back-end still does not answer. Gets fail.
    pub(super) const HUNG: u32 = 5;

    pub(super) fn name(state: u32) -> &'static str {
        match state {
            SETTING_UP => "setting-up",
            RUNNING => "running",
            DOWN => "down",
            STALLED => "stalled",
            HUNG => "hung",
            _ => "lost",
        }
    }

    /// What the queues take.
    pub(super) fn gate(state: u32) -> Gate {
        match state {
            RUNNING => Gate::Open,
            DOWN | STALLED => Gate::Loads,
            _ => Gate::Shut,
        }
    }
}

/// The answer to the driver's own question. Whoever asks holds `Device::asking`.
struct Asked {
    /// Which question.
    number: u64,
    /// The answer, or that there will be none.
    answer: Option<Option<wire::Response>>,
}

/// What only the control work, probe and remove touch.
struct Control {
    /// The generation that the pool is of; 0 is none.
    generation: u64,
    down_since: Option<Instant<Monotonic>>,
    /// What the watchdog has seen of each queue.
    looks: KVec<Look>,
    registration: Option<frontswap::Registration<Device>>,
    file: Option<StatsFile<Device>>,
    #[cfg(CONFIG_PM_SLEEP)]
    alarm: Option<Pin<KBox<crate::sleep::Alarm<Device>>>>,
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
    /// There is more to be flushed than had room.
    flush_waits: Atomic<bool>,
    /// Somebody will look whether requests are answered.
    watched: Atomic<bool>,
    #[pin]
    turn: Turn,
    #[pin]
    asking: Mutex<()>,
    #[pin]
    asked: SpinLockIrq<Asked>,
    #[pin]
    control: Mutex<Control>,
    #[pin]
    flush_work: DelayedWork<Device, 0>,
    #[pin]
    control_work: DelayedWork<Device, 1>,
    #[pin]
    balance_work: DelayedWork<Device, 2>,
    #[pin]
    watch_work: DelayedWork<Device, 3>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<Device, 0> for Device { self.flush_work }
    impl HasDelayedWork<Device, 1> for Device { self.control_work }
    impl HasDelayedWork<Device, 2> for Device { self.balance_work }
    impl HasDelayedWork<Device, 3> for Device { self.watch_work }
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
        // Others may wait for what this does in order to get memory.
        let _noio = work::NoIo::begin();
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
        let mut looks = KVec::new();
        let cpus = u16::try_from(kernel::cpu::nr_cpu_ids()).unwrap_or(u16::MAX);
        for _ in 0..config.num_request_queues.get().min(cpus) {
            queues.push(RequestQueue::new()?, GFP_KERNEL)?;
            looks.push(Look::default(), GFP_KERNEL)?;
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
                flush_waits: Atomic::new(false),
                watched: Atomic::new(false),
                turn <- Turn::new(),
                asking <- new_mutex!(()),
                asked <- new_spinlock_irq!(Asked {
                    number: 0,
                    answer: None,
                }),
                control <- new_mutex!(Control {
                    generation: 0,
                    down_since: None,
                    looks,
                    registration: None,
                    file: None,
                    #[cfg(CONFIG_PM_SLEEP)]
                    alarm: None,
                }),
                flush_work <- new_delayed_work!("cram_flush"),
                control_work <- new_delayed_work!("cram_control"),
                balance_work <- new_delayed_work!("cram_balance"),
                watch_work <- new_delayed_work!("cram_watch"),
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
        // After a reset, something may have changed or may be left to do.
        self.schedule_control_now();
        Ok(())
    }

    fn start(self: &Arc<Self>) -> Result {
        self.look_after();
        // Nothing is allocated under the lock: what gives memory free may wait for who has it.
        let file = StatsFile::new(&self.dir, self.virtio.index(), self.clone())?;
        let registration = frontswap::Registration::new(self.clone())?;
        {
            let mut control = self.control.lock();
            control.registration = Some(registration);
            control.file = Some(file);
        }
        // It follows the host's policy from now on.
        self.schedule_control_now();
        #[cfg(CONFIG_PM_SLEEP)]
        self.expect_hibernation()?;
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
        // From here on it looks by itself: the core reports no change any more.
        self.workqueue.schedule_now::<_, 1>(self);
        // Memory that is being reclaimed would go to the disk now.
        work::cancel::<_, 2>(self);
        #[cfg(CONFIG_PM_SLEEP)]
        self.ignore_hibernation();
        let (registration, file) = {
            let mut control = self.control.lock();
            (control.registration.take(), control.file.take())
        };
        drop(file);
        // Brings every page back, with the help of the control work when the back-end is gone.
        drop(registration);

        {
            // A restart under way ends first: it must not find the device gone, and wait for itself.
            let _control = self.control.lock();
            self.gone.store(true, Relaxed);
        }
        self.cancel_work();
        if self.state.load(Relaxed) == state::RUNNING {
            // Nothing is left to be lost; the host need not keep what the guest will not ask for.
            self.control_request(&Request::destroy_pool());
        }
    }

    fn disconnected(self: &Arc<Self>) {
        self.events.close();
        for queue in self.queues.iter() {
            queue.close(|purpose| self.end(queue, purpose, None));
        }
        if self.gone.load(Relaxed) {
            // Interrupts may have left some until the reset.
            self.cancel_work();
        }
    }

    fn broken(self: &Arc<Self>) {
        pr_err!("virtio{}: the device is broken\n", self.virtio.index());
        self.set_state(state::LOST);
    }

    fn turn(&self) -> &Turn {
        &self.turn
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

/// Did the device do what it was asked? An error of its own may pass, others would come again.
fn was_executed(response: Option<&wire::Response>) -> bool {
    response.is_some_and(|response| response.status != wire::status::DEVICE_ERROR)
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
    /// Changes the state, and what the queues take. Whoever submits looks at that under the
    /// queue's lock.
    fn set_state(&self, state: u32) {
        self.state.store(state, Relaxed);
        for queue in self.queues.iter() {
            queue.set_gate(state::gate(state));
        }
    }

    fn cancel_work(self: &Arc<Self>) {
        work::cancel::<_, 0>(self);
        work::cancel::<_, 1>(self);
        work::cancel::<_, 2>(self);
        work::cancel::<_, 3>(self);
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
        while queue.has_answer() {
            let Some(answer) = queue.answer() else { break };
            if matches!(answer.response.status, wire::status::NO_POOL) {
                self.schedule_control_now();
            }
            self.end(queue, answer.purpose, Some(&answer.response));
            self.answer_seen();
        }
    }

    /// Ends a request. Without a response, it was lost.
    fn end(
        self: &Arc<Self>,
        queue: &RequestQueue,
        purpose: Purpose,
        response: Option<&wire::Response>,
    ) {
        match purpose {
            Purpose::Store(transfer) => {
                let executed = response.is_some_and(|response| response.status == wire::status::OK);
                if !executed {
                    // Whatever is there under these names is old.
                    for (offset, pages) in transfer.segments() {
                        self.areas.mark(transfer.swap_type(), offset, pages);
                    }
                    self.schedule_flush();
                }
                let mut ok = 0;
                transfer.end(response, |result| match result {
                    wire::result::OK => ok += 1,
                    other => self.stats.count_put(other),
                });
                self.stats.puts_ok.add(ok);
            }
            Purpose::Load(transfer) => {
                if response.is_none() && self.state.load(Relaxed) != state::LOST {
                    // The pages are still there; the device will be, too.
                    self.stats.loads_again.add(1);
                    return transfer.again();
                }
                let mut ok = 0;
                transfer.end(response, |result| match result {
                    wire::result::OK => ok += 1,
                    other => self.stats.count_get(other),
                });
                self.stats.gets_ok.add(ok);
            }
            Purpose::Flush(flush) => {
                let executed = was_executed(response);
                self.areas.put(&flush, executed);
                queue.put_flush(flush);
                if self.flush_waits.load(Relaxed) {
                    self.flush_on();
                } else if !executed {
                    self.schedule_flush();
                }
            }
            Purpose::Object(object) => {
                let executed = was_executed(response);
                self.areas.put_object(object, executed);
                if !executed {
                    self.schedule_flush();
                }
            }
            Purpose::Control(number) => {
                let mut asked = self.asked.lock();
                if asked.number == number {
                    asked.answer = Some(response.copied());
                }
            }
        }
    }

    /// Submits a request on the first queue and waits, but not longer than there is a back-end.
    /// `None` when there is no answer.
    fn control_request(self: &Arc<Self>, request: &Request) -> Option<wire::Response> {
        let _asking = self.asking.lock();
        let number = {
            let mut asked = self.asked.lock();
            asked.number += 1;
            asked.answer = None;
            asked.number
        };
        let purpose = Purpose::Control(number);
        let Submitted::Yes(_) = self.queues.first()?.submit_now(request, purpose) else {
            return None;
        };
        // This is what looks at the configuration space otherwise, so it does so here.
        let since = Instant::<Monotonic>::now();
        while since.elapsed() < Delta::from_secs(CONTROL_TIMEOUT_S) {
            let answer = self.asked.lock().answer;
            if let Some(answer) = answer {
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

    /// Looks at the configuration space, and does what follows from it.
    fn look_after(self: &Arc<Self>) {
        let mut control = self.control.lock();
        if self.gone.load(Relaxed) {
            return;
        }
        self.events.refill();
        let config = self.virtio.config();
        self.pressure.store(config.pressure.get(), Relaxed);

        let next = if !is_ready(&config) {
            self.without_backend(&mut control)
        } else if check(&config).is_err() {
            self.set_state(state::SETTING_UP);
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
        self.set_state(state::DOWN);
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
        self.set_state(state::LOST);
        self.stats.resets.add(1);
        if let Err(error) = self.virtio.restart(self) {
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
            self.set_state(state::SETTING_UP);
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
        if !matches!(self.state.load(Relaxed), state::STALLED | state::HUNG) {
            // Otherwise it is for the watchdog to say.
            self.set_state(state::RUNNING);
        }
        if control.registration.is_some() {
            // What mm does with copies is for the one backend that it has to say.
            self.follow(config.policy.get());
        }
        self.arm_watchdog();
        self.schedule_flush();
        // A full device says when it has room, but news may be late or lost.
        (config.pressure.get() >= wire::PRESSURE_MAX).then_some(PRESSURE_CHECK_MS)
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
