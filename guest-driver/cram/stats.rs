// SPDX-License-Identifier: GPL-2.0

//! Counters, and how debugfs shows them: `/sys/kernel/debug/cram/virtioN/stats`.

use crate::wire;
use kernel::{
    debugfs,
    prelude::*,
    str::CString,
    sync::{
        atomic::{ordering::Relaxed, Atomic},
        Arc, //
    },
};

macro_rules! counters {
    ($($(#[doc = $doc:literal])* $name:ident,)*) => {
        /// Counters of one device. All of them count from the probe on.
        #[derive(Default)]
        pub(crate) struct Stats {
            $($(#[doc = $doc])* pub(crate) $name: Counter,)*
        }

        impl Stats {
            /// Writes one line for each, "name value".
            pub(crate) fn write(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result {
                $(writeln!(f, "{} {}", stringify!($name), self.$name.get())?;)*
                Ok(())
            }
        }
    };
}

counters! {
    /// Pages that the device took.
    puts_ok,
    /// Pages refused: the device is full.
    puts_no_space,
    /// Pages refused: this guest is over its quota.
    puts_over_quota,
    /// Pages refused: the operator froze this guest.
    puts_frozen,
    /// Pages that were not put for another reason (lost with the back-end, bad page).
    puts_failed,
    /// Pages refused by the driver, without asking the device.
    puts_not_tried,
    /// Pages brought back.
    gets_ok,
    /// Pages that the device did not have.
    gets_missing,
    /// Pages that the device had, damaged.
    gets_corrupt,
    /// Pages that were not brought back for another reason.
    gets_failed,
    /// Freed slots reported to the device.
    pages_flushed,
    /// Requests that reported them.
    flush_requests,
    /// Requests that carried pages to the device.
    put_requests,
    /// Requests that carried pages from the device.
    get_requests,
    /// Gets answered while the driver was watching for it.
    gets_watched,
    /// Events from the device.
    events,
    /// Pages that the host asked to take back.
    give_back_pages,
    /// Pages freed because the host wished so.
    squeezed_pages,
    /// Pages that the device does not keep any more because the host wished so.
    given_back_pages,
    /// Times the back-end was lost.
    backend_lost,
    /// Times the device was reset because the back-end stayed away.
    resets,
    /// Times the back-end was there and did not answer.
    stalls,
    /// Loads that were handed over once more, since they would have had to wait or were lost in
    /// a reset.
    loads_again,
}

/// A number that grows.
pub(crate) struct Counter(Atomic<i64>);

impl Default for Counter {
    fn default() -> Self {
        Self(Atomic::new(0))
    }
}

impl Counter {
    /// Adds `n`.
    pub(crate) fn add(&self, n: usize) {
        self.0.add(n as i64, Relaxed);
    }

    /// The value.
    pub(crate) fn get(&self) -> i64 {
        self.0.load(Relaxed)
    }
}

impl Stats {
    /// Counts the result of one page of a put that is not OK.
    pub(crate) fn count_put(&self, result: u8) {
        let counter = match result {
            wire::result::NO_SPACE => &self.puts_no_space,
            wire::result::OVER_QUOTA => &self.puts_over_quota,
            wire::result::FROZEN => &self.puts_frozen,
            _ => &self.puts_failed,
        };
        counter.add(1);
    }

    /// Counts the result of one page of a get that is not OK.
    pub(crate) fn count_get(&self, result: u8) {
        let counter = match result {
            wire::result::MISSING => &self.gets_missing,
            wire::result::CORRUPT => &self.gets_corrupt,
            _ => &self.gets_failed,
        };
        counter.add(1);
    }
}

/// The driver's directory.
pub(crate) struct Dir(debugfs::Dir);

impl Dir {
    /// Makes it.
    pub(crate) fn new(name: &CStr) -> Result<Arc<Self>> {
        Ok(Arc::new(Self(debugfs::Dir::new(name)), GFP_KERNEL)?)
    }
}

/// Something that can be shown.
pub(crate) trait Show: Send + Sync + 'static {
    /// Writes it.
    fn show(&self, f: &mut kernel::fmt::Formatter<'_>) -> kernel::fmt::Result;
}

/// A device's file. It goes when this is dropped.
pub(crate) struct StatsFile<T: Show> {
    _file: Pin<KBox<debugfs::File<Arc<T>>>>,
    _dir: debugfs::Dir,
}

impl<T: Show> StatsFile<T> {
    /// Shows `what` in `dir`/virtio`index`/stats.
    pub(crate) fn new(dir: &Dir, index: i32, what: Arc<T>) -> Result<Self> {
        let name = CString::try_from_fmt(fmt!("virtio{index}"))?;
        let own = dir.0.subdir(&name);
        let file = KBox::pin_init(
            own.read_callback_file(
                c"stats",
                what,
                &|what: &Arc<T>, f: &mut kernel::fmt::Formatter<'_>| what.show(f),
            ),
            GFP_KERNEL,
        )?;
        Ok(Self {
            _file: file,
            _dir: own,
        })
    }
}
