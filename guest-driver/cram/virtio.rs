// SPDX-License-Identifier: GPL-2.0

//! The virtio interface (include/linux/virtio.h), wrapped.

use crate::{
    turn::{By, Turn},
    wire, //
};
use core::{
    marker::PhantomData,
    mem::size_of,
    ptr::NonNull, //
};
use kernel::{
    bindings,
    error::{from_result, to_result},
    prelude::*,
    sync::{
        atomic::{
            ordering::{Acquire, Relaxed, Release},
            Atomic, //
        },
        rcu,
        Arc, //
    },
    types::Opaque, //
};
use zerocopy::FromBytes;

/// What a driver does for the virtio core.
pub(crate) trait Driver: Send + Sync + 'static {
    /// Makes the driver's side of a device. The virtqueues do not exist yet.
    fn new(device: VirtioDevice) -> Result<Arc<Self>>;
    /// Sets the virtqueues up, with `VirtioDevice::find_queues` and `ready`.
    fn connect(self: &Arc<Self>) -> Result;
    /// The device works: begin.
    fn start(self: &Arc<Self>) -> Result;
    /// The device goes: finish with it. It still works while this runs.
    fn stop(self: &Arc<Self>);
    /// The device was reset and touches nothing any more: take everything back.
    fn disconnected(self: &Arc<Self>);
    /// The device could not be set up again after a reset.
    fn broken(self: &Arc<Self>);
    /// Who resets the device: the bus may, and the driver.
    fn turn(&self) -> &Turn;
    /// The device used buffers of a queue. Interrupt context.
    fn queue_interrupt(self: &Arc<Self>, index: u16);
    /// The configuration space changed. Interrupt context.
    fn config_changed(self: &Arc<Self>);
}

/// A virtio device, as its driver has it from probe to remove.
#[derive(Clone, Copy)]
pub(crate) struct VirtioDevice(NonNull<bindings::virtio_device>);

// SAFETY: The virtio core allows calls from any thread.
unsafe impl Send for VirtioDevice {}
// SAFETY: The methods do only what several threads may do at a time, or what the driver's
// control mutex keeps apart.
unsafe impl Sync for VirtioDevice {}

impl VirtioDevice {
    fn raw(&self) -> *mut bindings::virtio_device {
        self.0.as_ptr()
    }

    /// The number in the device's name.
    pub(crate) fn index(&self) -> i32 {
        // SAFETY: The device outlives its driver's side.
        unsafe { (*self.raw()).index }
    }

    /// Was the feature negotiated?
    pub(crate) fn has_feature(&self, feature: u64) -> bool {
        // SAFETY: The device outlives its driver's side.
        unsafe { bindings::__virtio_test_bit(self.raw(), feature.trailing_zeros()) }
    }

    /// Reads the configuration space. May sleep.
    pub(crate) fn config(&self) -> wire::Config {
        let mut bytes = [0u8; size_of::<wire::Config>()];
        // SAFETY: The buffer has the length that is passed.
        unsafe {
            bindings::virtio_cread_bytes(self.raw(), 0, bytes.as_mut_ptr().cast(), bytes.len())
        };
        wire::Config::read_from_bytes(&bytes).unwrap_or_default()
    }

    /// Finds the event queue and `requests` request queues.
    ///
    /// The second argument of `each` is the index of the queue.
    pub(crate) fn find_queues<D: Driver>(
        &self,
        requests: u16,
        mut each: impl FnMut(u16, Virtqueue),
    ) -> Result {
        let nr = usize::from(requests) + 1;
        let mut queues = KVec::from_elem(core::ptr::null_mut(), nr, GFP_KERNEL)?;
        let mut infos = KVec::with_capacity(nr, GFP_KERNEL)?;
        for index in 0..nr {
            // SAFETY: All zeroes is a queue without name and callback.
            let mut info = unsafe { core::mem::zeroed::<bindings::virtqueue_info>() };
            info.name = if index == usize::from(wire::EVENT_QUEUE) {
                c"events".as_char_ptr()
            } else {
                c"requests".as_char_ptr()
            };
            info.callback = Some(queue_callback::<D>);
            infos.push(info, GFP_KERNEL)?;
        }
        // SAFETY: Both arrays have `nr` entries.
        to_result(unsafe {
            bindings::virtio_find_vqs(
                self.raw(),
                nr as u32,
                queues.as_mut_ptr(),
                infos.as_mut_ptr(),
                core::ptr::null_mut(),
            )
        })?;
        for (index, queue) in queues.iter().enumerate() {
            let queue = NonNull::new(*queue).ok_or(ENXIO)?;
            each(index as u16, Virtqueue(queue));
        }
        Ok(())
    }

    /// Says that the driver is ready. Buffers may be offered before and after.
    pub(crate) fn ready(&self) {
        // SAFETY: The queues were found.
        unsafe { bindings::virtio_device_ready(self.raw()) };
    }

    /// Resets the device and begins anew: `Driver::disconnected`, then `Driver::connect`. When
    /// the bus is about to do the same, it is left to the bus.
    ///
    /// May sleep. Neither in an interrupt nor while the device is being removed.
    pub(crate) fn restart<D: Driver>(&self, driver: &Arc<D>) -> Result {
        if !driver.turn().try_take(By::Driver) {
            return Ok(());
        }
        // SAFETY: The device is bound to this driver, and nobody else resets it.
        unsafe { disconnect(self.raw(), driver) };
        // SAFETY: The device outlives its driver's side; this calls `reset_done` below.
        let result = to_result(unsafe { bindings::virtio_device_reset_done(self.raw()) });
        driver.turn().give_back(By::Driver);
        result
    }
}

/// A virtqueue. Whoever has it has it alone: it lives inside a lock.
pub(crate) struct Virtqueue(NonNull<bindings::virtqueue>);

// SAFETY: A virtqueue may be used from any thread, by one at a time.
unsafe impl Send for Virtqueue {}

impl Virtqueue {
    /// Offers a request to the device: what it may read, then what it may write.
    ///
    /// Fails with `ENOSPC` while the ring is full.
    ///
    /// # Safety
    ///
    /// The lists are valid during the call. What they describe is valid, and nobody else changes
    /// it, until the cookie comes back from [`Self::used`] or [`Self::unused`].
    pub(crate) unsafe fn add(
        &mut self,
        lists: (*mut bindings::scatterlist, *mut bindings::scatterlist),
        cookie: NonNull<c_void>,
    ) -> Result {
        let mut sgs = [lists.0, lists.1];
        // SAFETY: The caller's promise.
        to_result(unsafe {
            bindings::virtqueue_add_sgs(
                self.0.as_ptr(),
                sgs.as_mut_ptr(),
                1,
                1,
                cookie.as_ptr(),
                bindings::GFP_ATOMIC,
            )
        })
    }

    /// Offers memory for the device to write.
    ///
    /// # Safety
    ///
    /// As for [`Self::add`].
    pub(crate) unsafe fn add_writable(
        &mut self,
        list: *mut bindings::scatterlist,
        cookie: NonNull<c_void>,
    ) -> Result {
        // SAFETY: The caller's promise.
        to_result(unsafe {
            bindings::virtqueue_add_inbuf(
                self.0.as_ptr(),
                list,
                1,
                cookie.as_ptr(),
                bindings::GFP_ATOMIC,
            )
        })
    }

    /// The cookie of something that the device is done with, and how many bytes it wrote.
    pub(crate) fn used(&mut self) -> Option<(NonNull<c_void>, u32)> {
        let mut len = 0;
        // SAFETY: The queue is valid, and used by one at a time.
        let cookie = unsafe { bindings::virtqueue_get_buf(self.0.as_ptr(), &mut len) };
        NonNull::new(cookie).map(|cookie| (cookie, len))
    }

    /// The cookie of something that the device will never get to. Only after a reset.
    pub(crate) fn unused(&mut self) -> Option<NonNull<c_void>> {
        // SAFETY: The queue is valid, and used by one at a time.
        NonNull::new(unsafe { bindings::virtqueue_detach_unused_buf(self.0.as_ptr()) })
    }

    /// Makes what was added visible. When it returns a notification, that is to be sent, which
    /// takes long, so better without the lock.
    pub(crate) fn kick(&mut self) -> Option<Notification> {
        // SAFETY: The queue is valid, and used by one at a time.
        unsafe { bindings::virtqueue_kick_prepare(self.0.as_ptr()) }.then_some(Notification(self.0))
    }

    /// No interrupts for a while. A hint.
    pub(crate) fn disable_interrupts(&mut self) {
        // SAFETY: The queue is valid, and used by one at a time.
        unsafe { bindings::virtqueue_disable_cb(self.0.as_ptr()) };
    }

    /// Interrupts again. False when there is something used already.
    pub(crate) fn enable_interrupts(&mut self) -> bool {
        // SAFETY: The queue is valid, and used by one at a time.
        unsafe { bindings::virtqueue_enable_cb(self.0.as_ptr()) }
    }
}

/// What can be seen of a virtqueue without having it: whether something used is there.
pub(crate) struct Window {
    vq: Atomic<*mut bindings::virtqueue>,
    /// How much of what was used has been taken. A split ring, which is the only kind that the
    /// device offers, counts the same, in 16 bits.
    taken: Atomic<u32>,
}

impl Window {
    /// A window on nothing.
    pub(crate) fn new() -> Self {
        Self {
            vq: Atomic::new(core::ptr::null_mut()),
            taken: Atomic::new(0),
        }
    }

    /// Looks at a virtqueue that was just found.
    pub(crate) fn open(&self, vq: &Virtqueue) {
        self.taken.store(0, Relaxed);
        self.vq.store(vq.0.as_ptr(), Release);
    }

    /// Looks at nothing. Who looked before is gone after an RCU grace period.
    pub(crate) fn close(&self) {
        self.vq.store(core::ptr::null_mut(), Release);
    }

    /// [`Virtqueue::used`] has given something. Whoever has the virtqueue calls this.
    pub(crate) fn count_used(&self) {
        self.taken
            .store(self.taken.load(Relaxed).wrapping_add(1), Release);
    }

    /// Is there something used that was not taken? By the time it is known it may be out of date.
    pub(crate) fn has_used(&self) -> bool {
        let _guard = rcu::read_lock();
        let vq = self.vq.load(Acquire);
        // SAFETY: The virtqueue goes a grace period after `close`, so it is there still. What is
        // read is memory that the device writes, and one flag.
        !vq.is_null() && unsafe { bindings::virtqueue_poll(vq, self.taken.load(Acquire)) }
    }
}

/// A notification that the device waits for.
#[must_use]
pub(crate) struct Notification(NonNull<bindings::virtqueue>);

impl Notification {
    /// Sends it. Needs no lock.
    pub(crate) fn send(self) {
        // SAFETY: Queues go only after everybody who submits has been kept out and has left: see
        // `RequestQueue::close`.
        unsafe { bindings::virtqueue_notify(self.0.as_ptr()) };
    }
}

/// # Safety
///
/// `vdev` is bound to a driver of type `D`, and `probe` has run.
unsafe fn driver_side<'a, D: Driver>(
    vdev: *mut bindings::virtio_device,
) -> Option<core::mem::ManuallyDrop<Arc<D>>> {
    // SAFETY: The caller's promise.
    let private = unsafe { (*vdev).priv_ }.cast::<D>().cast_const();
    if private.is_null() {
        return None;
    }
    // SAFETY: `probe` put an `Arc` there, which stays until `remove` is done. This one is not
    // counted, and not dropped.
    Some(core::mem::ManuallyDrop::new(unsafe {
        Arc::from_raw(private)
    }))
}

/// Resets the device, gives the driver its buffers back, and removes the queues.
///
/// # Safety
///
/// As for `driver_side`. Not in an interrupt.
unsafe fn disconnect<D: Driver>(vdev: *mut bindings::virtio_device, driver: &Arc<D>) {
    // SAFETY: The caller's promise.
    unsafe { bindings::virtio_reset_device(vdev) };
    driver.disconnected();
    // SAFETY: The device is bound, so it has operations.
    let del_vqs = unsafe { (*(*vdev).config).del_vqs };
    if let Some(del_vqs) = del_vqs {
        // SAFETY: The device was reset, and the driver has given its virtqueues up.
        unsafe { del_vqs(vdev) };
    }
}

extern "C" fn probe<D: Driver>(vdev: *mut bindings::virtio_device) -> i32 {
    from_result(|| {
        let device = VirtioDevice(NonNull::new(vdev).ok_or(EINVAL)?);
        let driver = D::new(device)?;
        // SAFETY: The device is ours from here on.
        unsafe { (*vdev).priv_ = Arc::into_raw(driver.clone()).cast_mut().cast() };
        let result = driver.connect().and_then(|()| driver.start());
        if let Err(error) = result {
            driver.stop();
            // SAFETY: As the functions demand.
            unsafe { disconnect(vdev, &driver) };
            forget::<D>(vdev);
            return Err(error);
        }
        Ok(0)
    })
}

fn forget<D: Driver>(vdev: *mut bindings::virtio_device) {
    // SAFETY: All callers have a valid device.
    let private = unsafe { (*vdev).priv_ }.cast::<D>().cast_const();
    // SAFETY: As above.
    unsafe { (*vdev).priv_ = core::ptr::null_mut() };
    // SAFETY: `probe` put it there, and nobody finds it any more.
    drop(unsafe { Arc::from_raw(private) });
}

extern "C" fn remove<D: Driver>(vdev: *mut bindings::virtio_device) {
    // SAFETY: The core removes what was probed.
    if let Some(driver) = unsafe { driver_side::<D>(vdev) } {
        driver.stop();
        driver.turn().take(By::Driver);
        // SAFETY: As the function demands.
        unsafe { disconnect(vdev, &driver) };
        driver.turn().give_back(By::Driver);
        forget::<D>(vdev);
    }
}

extern "C" fn reset_prepare<D: Driver>(vdev: *mut bindings::virtio_device) -> i32 {
    // SAFETY: The core resets what was probed.
    if let Some(driver) = unsafe { driver_side::<D>(vdev) } {
        driver.turn().take(By::Bus);
        // SAFETY: As the function demands.
        unsafe { disconnect(vdev, &driver) };
    }
    0
}

extern "C" fn reset_done<D: Driver>(vdev: *mut bindings::virtio_device) -> i32 {
    from_result(|| {
        // SAFETY: The core resets what was probed.
        let driver = unsafe { driver_side::<D>(vdev) }.ok_or(ENODEV)?;
        let connected = driver.connect();
        if connected.is_err() {
            driver.broken();
        }
        driver.turn().give_back(By::Bus);
        connected.map(|()| 0)
    })
}

extern "C" fn config_changed<D: Driver>(vdev: *mut bindings::virtio_device) {
    // SAFETY: The core reports changes of what was probed.
    if let Some(driver) = unsafe { driver_side::<D>(vdev) } {
        driver.config_changed();
    }
}

extern "C" fn queue_callback<D: Driver>(vq: *mut bindings::virtqueue) {
    // SAFETY: The core calls back for valid queues.
    let (vdev, index) = unsafe { ((*vq).vdev, (*vq).index) };
    // SAFETY: The queue belongs to what was probed.
    if let Some(driver) = unsafe { driver_side::<D>(vdev) } {
        driver.queue_interrupt(index as u16);
    }
}

/// The system is suspended, or its memory is about to be written down. Pages stay with the device by
/// name, as at any reset; before hibernation there are none.
#[cfg(CONFIG_PM_SLEEP)]
extern "C" fn freeze<D: Driver>(vdev: *mut bindings::virtio_device) -> i32 {
    reset_prepare::<D>(vdev)
}

#[cfg(CONFIG_PM_SLEEP)]
extern "C" fn restore<D: Driver>(vdev: *mut bindings::virtio_device) -> i32 {
    reset_done::<D>(vdev)
}

/// A registered driver. Dropping it removes its devices first.
#[pin_data(PinnedDrop)]
pub(crate) struct DriverRegistration<D: Driver> {
    #[pin]
    driver: Opaque<bindings::virtio_driver>,
    _driver: PhantomData<D>,
}

// SAFETY: Registration and its end may happen on different threads.
unsafe impl<D: Driver> Send for DriverRegistration<D> {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl<D: Driver> Sync for DriverRegistration<D> {}

static FEATURES: [u32; 3] = [
    wire::feature::EVENTS.trailing_zeros(),
    wire::feature::POLICY.trailing_zeros(),
    wire::feature::SQUEEZE.trailing_zeros(),
];
static IDS: Ids = Ids([
    bindings::virtio_device_id {
        device: wire::VIRTIO_ID_CRAM,
        vendor: u32::MAX, // VIRTIO_DEV_ANY_ID
    },
    bindings::virtio_device_id {
        device: 0,
        vendor: 0,
    },
]);

struct Ids([bindings::virtio_device_id; 2]);

// SAFETY: It is constant.
unsafe impl Sync for Ids {}

impl<D: Driver> DriverRegistration<D> {
    /// Registers the driver; devices that are there are probed before this returns.
    pub(crate) fn new(name: &'static CStr, module: &'static ThisModule) -> Result<Pin<KBox<Self>>> {
        let registration = KBox::pin_init(
            pin_init!(Self {
                driver <- Opaque::ffi_init(|slot: *mut bindings::virtio_driver| {
                    // SAFETY: `slot` is valid for writing; all zeroes is a driver without anything.
                    let driver = unsafe {
                        slot.write_bytes(0, 1);
                        &mut *slot
                    };
                    driver.driver.name = name.as_char_ptr();
                    driver.id_table = IDS.0.as_ptr();
                    driver.feature_table = FEATURES.as_ptr();
                    driver.feature_table_size = FEATURES.len() as u32;
                    driver.probe = Some(probe::<D>);
                    driver.remove = Some(remove::<D>);
                    driver.config_changed = Some(config_changed::<D>);
                    driver.reset_prepare = Some(reset_prepare::<D>);
                    driver.reset_done = Some(reset_done::<D>);
                    #[cfg(CONFIG_PM_SLEEP)]
                    {
                        driver.freeze = Some(freeze::<D>);
                        driver.restore = Some(restore::<D>);
                    }
                }),
                _driver: PhantomData,
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The driver is pinned and filled, and lives until `drop` unregisters it.
        let result = to_result(unsafe {
            bindings::__register_virtio_driver(registration.driver.get(), module.as_ptr())
        });
        if let Err(error) = result {
            // What was not registered must not be unregistered.
            core::mem::forget(registration);
            return Err(error);
        }
        Ok(registration)
    }
}

#[pinned_drop]
impl<D: Driver> PinnedDrop for DriverRegistration<D> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `new` registered it.
        unsafe { bindings::unregister_virtio_driver(self.driver.get()) };
    }
}
