// SPDX-License-Identifier: GPL-2.0

//! Guest driver of the cram device: compressed memory that the host keeps.
//!
//! The module is a frontswap backend that speaks the protocol of docs/protocol.md over virtio.
//!
//! | module        | holds                                                               |
//! |---------------|---------------------------------------------------------------------|
//! | [`device`]    | one device: what it does for frontswap, its states, its life; below it `watchdog`, for a back-end that does not answer |
//! | [`turn`]      | who resets the device                                                |
//! | [`queue`]     | one request queue: slots, submitting, completing, waiting            |
//! | [`request`]   | what is inside a request, and what a response means                  |
//! | [`balance`]   | squeezing the guest, and taking pages back, as the host wishes       |
//! | [`areas`]     | which freed slots the device has not heard of yet                    |
//! | [`events`]    | the event queue                                                      |
//! | [`stats`]     | counters, and how debugfs shows them                                 |
//! | [`frontswap`], [`memory`], [`virtio`], [`dma`], [`work`], `sleep` | the C interfaces, wrapped; nearly all `unsafe` is here |
//!
//! Locks, outermost first: `Device::control` and `Device::asking` (mutexes), a queue's spinlock, an
//! area's spinlock. A [`turn::Turn`] is only ever tried for under `control`, so whoever has it may
//! take `control`. Pages are completed with no lock held, but for loads that are given up.

use kernel::prelude::*;

mod areas;
mod balance;
mod device;
mod dma;
mod events;
mod frontswap;
mod memory;
mod queue;
mod request;
#[cfg(CONFIG_PM_SLEEP)]
mod sleep;
mod stats;
mod turn;
mod virtio;
#[path = "../../crates/cram-abi/src/wire.rs"]
#[allow(dead_code, unreachable_pub)]
mod wire;
mod work;

module! {
    type: CramModule,
    name: "cram",
    authors: ["vhost-device-cram maintainers"],
    description: "Compressed memory kept by the host of a virtual machine",
    license: "GPL",
    alias: ["virtio:d0000003Fv*"],
    params: {
        load_spin_us: u32 {
            default: 30,
            description: "How long a swap-in watches for its answer before it sleeps, in microseconds",
        },
        down_grace_ms: u32 {
            default: 5000,
            description: "How long to wait for a lost back-end before its pages are given up, in milliseconds",
        },
        stall_ms: u32 {
            default: 1000,
            description: "How long a queue may go without an answer before pages are refused, in milliseconds; 0 is for ever",
        },
        load_timeout_ms: u32 {
            default: 30000,
            description: "How long a queue may go without an answer before loads fail, in milliseconds",
        },
    },
}

// Fields are dropped in this order: no work is left once the driver is unregistered.
struct CramModule {
    _driver: Pin<KBox<virtio::DriverRegistration<device::Device>>>,
    _dir: kernel::sync::Arc<stats::Dir>,
    _workqueue: kernel::sync::Arc<work::Workqueue>,
    _balance_queue: kernel::sync::Arc<work::Workqueue>,
}

impl kernel::Module for CramModule {
    fn init(module: &'static ThisModule) -> Result<Self> {
        let workqueue = work::Workqueue::new(c"cram", work::Kind::FreesMemory)?;
        let balance_queue = work::Workqueue::new(c"cram_balance", work::Kind::TakesItsTime)?;
        let dir = stats::Dir::new(c"cram")?;
        device::set_surroundings(workqueue.clone(), balance_queue.clone(), dir.clone());
        let driver = virtio::DriverRegistration::new(c"cram", module);
        if driver.is_err() {
            device::clear_surroundings();
        }
        Ok(Self {
            _driver: driver?,
            _dir: dir,
            _workqueue: workqueue,
            _balance_queue: balance_queue,
        })
    }
}

impl Drop for CramModule {
    fn drop(&mut self) {
        device::clear_surroundings();
    }
}
