// SPDX-License-Identifier: GPL-2.0

//! Hibernation, as those hear of it who have to get ready (include/linux/suspend.h), wrapped.

use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    sync::Arc,
    types::Opaque, //
};

/// Who has to get ready for hibernation. Both are called in process context, while all others run,
/// and may take long.
pub(crate) trait Sleeper: Send + Sync + 'static {
    /// The system is about to be written to a disk. It may wake up in another machine.
    fn before_hibernation(self: &Arc<Self>);
    /// It has woken up, or did not fall asleep.
    fn after_hibernation(self: &Arc<Self>);
}

/// Has a sleeper called, until this is dropped.
#[pin_data(PinnedDrop)]
pub(crate) struct Alarm<T: Sleeper> {
    #[pin]
    block: Opaque<bindings::notifier_block>,
    sleeper: Arc<T>,
}

// SAFETY: Registration and its end may happen on different threads.
unsafe impl<T: Sleeper> Send for Alarm<T> {}
// SAFETY: There is nothing to do with a shared reference.
unsafe impl<T: Sleeper> Sync for Alarm<T> {}

impl<T: Sleeper> Alarm<T> {
    /// Has `sleeper` called from now on.
    pub(crate) fn new(sleeper: Arc<T>) -> Result<Pin<KBox<Self>>> {
        let alarm = KBox::pin_init(
            pin_init!(Self {
                block <- Opaque::ffi_init(|slot: *mut bindings::notifier_block| {
                    // SAFETY: `slot` is valid for writing; all zeroes is a block that nobody knows.
                    let block = unsafe {
                        slot.write_bytes(0, 1);
                        &mut *slot
                    };
                    block.notifier_call = Some(Self::call);
                }),
                sleeper,
            }),
            GFP_KERNEL,
        )?;
        // SAFETY: The block is pinned and filled, and lives until `drop` takes it back.
        let result = to_result(unsafe { bindings::register_pm_notifier(alarm.block.get()) });
        if let Err(error) = result {
            // What was not registered must not be taken back.
            core::mem::forget(alarm);
            return Err(error);
        }
        Ok(alarm)
    }

    extern "C" fn call(
        block: *mut bindings::notifier_block,
        action: usize,
        _data: *mut c_void,
    ) -> i32 {
        // SAFETY: The block is that of an alarm, which lives until nobody calls any more.
        let alarm = unsafe { &*kernel::container_of!(Opaque::cast_from(block), Self, block) };
        match action as u32 {
            bindings::PM_HIBERNATION_PREPARE => alarm.sleeper.before_hibernation(),
            bindings::PM_POST_HIBERNATION => alarm.sleeper.after_hibernation(),
            // A system that is suspended stays in its machine.
            _ => (),
        }
        bindings::NOTIFY_DONE as i32
    }
}

#[pinned_drop]
impl<T: Sleeper> PinnedDrop for Alarm<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: `new` registered the block. Afterwards nobody calls.
        unsafe { bindings::unregister_pm_notifier(self.block.get()) };
    }
}
