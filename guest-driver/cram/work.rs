// SPDX-License-Identifier: GPL-2.0

//! Work that can be put forward and cancelled.
//!
//! `kernel::workqueue` can enqueue; a driver that leaves must also cancel and wait. These
//! functions keep to its rule: a pending work item owns one reference to the [`Arc`] around it.

use core::marker::PhantomData;
use kernel::{
    bindings,
    prelude::*,
    sync::Arc,
    workqueue::{HasDelayedWork, Work, WorkItem},
};

/// What runs on a workqueue.
#[derive(Clone, Copy)]
pub(crate) enum Kind {
    /// Others get memory when it is done, so it has a rescuer.
    FreesMemory,
    /// It may wait for memory itself, and take long.
    TakesItsTime,
}

/// A workqueue of our own.
pub(crate) struct Workqueue(*mut bindings::workqueue_struct);

// SAFETY: Workqueues may be used from any thread.
unsafe impl Send for Workqueue {}
// SAFETY: Workqueues may be used from any thread, by several at a time.
unsafe impl Sync for Workqueue {}

impl Workqueue {
    /// Makes a workqueue.
    pub(crate) fn new(name: &'static CStr, kind: Kind) -> Result<Arc<Self>> {
        // A device that sleeps is not to be touched.
        let mut flags = bindings::wq_flags_WQ_UNBOUND | bindings::wq_flags_WQ_FREEZABLE;
        if matches!(kind, Kind::FreesMemory) {
            flags |= bindings::wq_flags_WQ_MEM_RECLAIM;
        }
        // SAFETY: `name` is a string without format specifications that lives for ever.
        let ptr = unsafe { bindings::alloc_workqueue_noprof(name.as_char_ptr(), flags, 0) };
        if ptr.is_null() {
            return Err(ENOMEM);
        }
        Ok(Arc::new(Self(ptr), GFP_KERNEL)?)
    }

    /// Runs the work item of `item` after `delay` jiffies, unless it is pending already.
    ///
    /// May be called in any context.
    pub(crate) fn schedule<T, const ID: u64>(&self, item: &Arc<T>, delay: usize)
    where
        T: HasDelayedWork<T, ID> + WorkItem<ID, Pointer = Arc<T>> + Send + Sync + 'static,
    {
        let owned = Arc::into_raw(item.clone());
        let dwork = delayed_work::<T, ID>(owned);
        let cpu = bindings::wq_misc_consts_WORK_CPU_UNBOUND as i32;
        // SAFETY: The work item lives in what `owned` points to, and the workqueue in `self`.
        if !unsafe { bindings::queue_delayed_work_on(cpu, self.0, dwork, delay) } {
            // SAFETY: It was pending, with a reference of its own: this one is not used.
            drop(unsafe { Arc::from_raw(owned) });
        }
    }

    /// Runs the work item of `item` as soon as may be, also when it is waiting for a later time.
    ///
    /// May be called in any context.
    pub(crate) fn schedule_now<T, const ID: u64>(&self, item: &Arc<T>)
    where
        T: HasDelayedWork<T, ID> + WorkItem<ID, Pointer = Arc<T>> + Send + Sync + 'static,
    {
        let owned = Arc::into_raw(item.clone());
        let dwork = delayed_work::<T, ID>(owned);
        let cpu = bindings::wq_misc_consts_WORK_CPU_UNBOUND as i32;
        // SAFETY: The work item lives in what `owned` points to, and the workqueue in `self`.
        if unsafe { bindings::mod_delayed_work_on(cpu, self.0, dwork, 0) } {
            // SAFETY: It was pending, with a reference of its own: this one is not used.
            drop(unsafe { Arc::from_raw(owned) });
        }
    }
}

impl Drop for Workqueue {
    fn drop(&mut self) {
        // SAFETY: The pointer came from `alloc_workqueue`, and nobody else has it.
        unsafe { bindings::destroy_workqueue(self.0) };
    }
}

/// Takes the work item of `item` back, and waits until it does not run. May sleep.
pub(crate) fn cancel<T, const ID: u64>(item: &Arc<T>)
where
    T: HasDelayedWork<T, ID> + WorkItem<ID, Pointer = Arc<T>> + Send + Sync + 'static,
{
    let ptr: *const T = &**item;
    // SAFETY: The work item lives in what `item` points to.
    if unsafe { bindings::cancel_delayed_work_sync(delayed_work::<T, ID>(ptr)) } {
        // SAFETY: It was pending and will not run: its reference is ours to drop.
        drop(unsafe { Arc::from_raw(ptr) });
    }
}

fn delayed_work<T, const ID: u64>(item: *const T) -> *mut bindings::delayed_work
where
    T: HasDelayedWork<T, ID>,
{
    // SAFETY: All callers pass a pointer that they got from an `Arc`.
    let work = unsafe { T::raw_get_work(item.cast_mut()) };
    // SAFETY: As above, so `work` is valid.
    let work = unsafe { Work::raw_get(work) };
    // SAFETY: `HasDelayedWork` promises that this is the `work` field of a `delayed_work`.
    unsafe { kernel::container_of!(work, bindings::delayed_work, work) }
}

/// As long as this is there, what the current task allocates does not wait for swapping. For
/// whatever swapping may be waiting for itself.
pub(crate) struct NoIo {
    flags: u32,
    /// It belongs to the task that made it.
    _task: PhantomData<*mut ()>,
}

impl NoIo {
    /// From now on.
    pub(crate) fn begin() -> Self {
        Self {
            // SAFETY: Changes a flag of the current task.
            flags: unsafe { bindings::memalloc_noio_save() },
            _task: PhantomData,
        }
    }
}

impl Drop for NoIo {
    fn drop(&mut self) {
        // SAFETY: Still the same task; scopes end in the reverse order of their beginnings.
        unsafe { bindings::memalloc_noio_restore(self.flags) };
    }
}
