// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Sizes that fit the kernel in use, and what several tests ask of guest and daemon.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{
    Daemon, DaemonReading, Guest, GuestOptions, Hold, Kernel, LoadOptions, wait_until,
};

/// A capacity that no test of these sizes fills.
pub(crate) const ROOMY: &str = "512M";

/// A guest with one device on the daemon's first socket.
pub(crate) fn guest_of(daemon: &Daemon, kernel: Kernel) -> GuestOptions {
    GuestOptions {
        sockets: vec![daemon.socket(0).to_owned()],
        // KASAN's shadow and lockdep's tables take their part.
        memory_mib: match kernel {
            Kernel::Plain => 256,
            Kernel::Debug => 384,
        },
        kernel,
        ..GuestOptions::default()
    }
}

/// More data than the guest has memory. On the debug kernel, where every page takes its time, less
/// data that is told to leave.
pub(crate) fn large(kernel: Kernel) -> LoadOptions {
    match kernel {
        Kernel::Plain => LoadOptions::default(),
        Kernel::Debug => LoadOptions {
            mib: 72,
            passes: "sequential,random".to_owned(),
            pageout: true,
            ..LoadOptions::default()
        },
    }
}

/// The same, read back fewer times, for tests whose point is something else.
pub(crate) fn brief() -> LoadOptions {
    LoadOptions {
        mib: 280,
        passes: "sequential,random".to_owned(),
        ..LoadOptions::default()
    }
}

/// Data that fits in the guest's memory, but may be told to leave it.
pub(crate) fn small(kernel: Kernel) -> LoadOptions {
    LoadOptions {
        mib: match kernel {
            Kernel::Plain => 96,
            Kernel::Debug => 32,
        },
        ..LoadOptions::default()
    }
}

/// The pages of `small`, or of any load.
pub(crate) fn pages(load: &LoadOptions) -> u64 {
    load.mib * 256
}

/// Fails unless guest and daemon agree that pages went through the device and none was harmed.
pub(crate) fn expect_travelled(guest: &Guest, daemon: &Daemon) -> Result<DaemonReading> {
    let device = guest.reading()?.device;
    let stats = daemon.control().stats()?;
    let (put, got) = (device.get("puts_ok")?, device.get("gets_ok")?);
    ensure!(put > 0, "the guest put no page");
    ensure!(got > 0, "the guest got no page back");
    let host_put = stats.get("puts")? - stats.get("puts_refused")?;
    let host_got = stats.get("gets")? - stats.get("gets_missing")? - stats.get("gets_corrupt")?;
    ensure!(
        host_put >= put && host_got >= got,
        "the guest put {put} and got {got} pages, the host says {host_put} and {host_got}"
    );
    ensure!(stats.get("gets_corrupt")? == 0, "pages were corrupt");
    Ok(stats)
}

/// Fails unless the guest used its device, and no page was harmed. For a daemon that was started
/// again, whose counts began again with it.
pub(crate) fn expect_used(guest: &Guest, daemon: &Daemon) -> Result<()> {
    let device = guest.reading()?.device;
    ensure!(device.get("puts_ok")? > 0, "the guest put no page");
    ensure!(device.get("gets_ok")? > 0, "the guest got no page back");
    let corrupt = daemon.control().stats()?.get("gets_corrupt")?;
    ensure!(corrupt == 0, "{corrupt} pages were corrupt");
    Ok(())
}

/// Waits until the device holds at least `pages`.
pub(crate) fn wait_stored(daemon: &Daemon, pages: u64) -> Result<()> {
    wait_until(
        &format!("{pages} pages in the device"),
        Duration::from_secs(60),
        || Ok(daemon.control().stats()?.get("pages_stored")? >= pages),
    )
}

/// Changes a load's pages and has them swapped out, until the device has them.
pub(crate) fn wait_in_use(
    guest: &Guest,
    daemon: &Daemon,
    hold: &Hold<'_>,
    load: &LoadOptions,
) -> Result<()> {
    let mut seed = 100;
    let patience = guest.patient(Duration::from_secs(30));
    wait_until("the device in use", patience, || {
        seed += 1;
        hold.rewrite(seed, 1000)?;
        hold.page_out()?;
        Ok(daemon.control().stats()?.get("pages_stored")? >= pages(load) / 2)
    })
}

/// Waits until the device holds no page whose slot the guest has freed. Flushes are queued, so
/// that takes a moment. After swapoff, that is no page at all; before it, the kernel may keep a few
/// slots of processes that are gone, for as long as their pages linger in the swap cache.
pub(crate) fn wait_freed(guest: &Guest, daemon: &Daemon) -> Result<()> {
    let what = "a device without freed pages";
    wait_until(what, guest.patient(Duration::from_secs(20)), || {
        let meminfo = guest.reading()?.meminfo;
        let used_kib = meminfo.get("SwapTotal")? - meminfo.get("SwapFree")?;
        Ok(daemon.control().stats()?.get("pages_stored")? <= used_kib / 4)
    })
}
