// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver, the device and the guest go and come back while pages are out.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{Failed, Guest, GuestOptions, Hold, Kernel, Stage};
use serde_json::json;

use crate::scale::{
    ROOMY, brief, expect_travelled, guest_of, pages, small, wait_freed, wait_stored,
};

/// Unloading the module drains its pages to the disk beneath, or is refused; either way every
/// byte comes back, and a module that is loaded again is used again.
pub(crate) fn module_goes_and_comes(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    let rounds = match kernel {
        Kernel::Plain => 2,
        Kernel::Debug => 1,
    };
    for round in 0..rounds {
        hold.rewrite(round, 1000)?;
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        let limit = guest.patient(Duration::from_secs(60));
        let removed = guest.agent()?.exec("rmmod cram", None, limit)?;
        if !removed.good() {
            // Refused: then only an unused device may be let go.
            hold.verify("random", round)?.expect_good()?;
            guest.shell("swapoff /dev/vdb")?;
            guest.shell("rmmod cram")?;
            guest.shell("swapon /dev/vdb")?;
        }
        hold.verify("random", round)?.expect_good()?;
        hold.page_out()?;
        hold.verify("reverse", round)?.expect_good()?;
        guest.shell("insmod /lib/modules/cram.ko")?;
    }
    hold.rewrite(7, 1000)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    hold.verify("random", 7)?.expect_good()?;
    hold.finish()?;
    expect_travelled(&guest, &daemon)?;
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn module_reload() -> Result<(), Failed> {
    Stage::run("module_reload", |stage| {
        module_goes_and_comes(stage, Kernel::Plain)
    })
}

/// Takes the device away: by QEMU, as a person would unplug it.
///
/// On the debug kernel by the guest itself, which comes to the same for the driver: there the
/// kernel's own pciehp has lockdep complain of pci_rescan_remove_lock against its reset_lock.
fn unplug(guest: &Guest, limit: Duration) -> Result<()> {
    match guest.options().kernel {
        Kernel::Plain => {
            let mut qmp = guest.qmp()?;
            qmp.call("device_del", json!({ "id": "cram0" }))?;
            qmp.wait_event("DEVICE_DELETED", limit, |data| data["device"] == "cram0")
        }
        Kernel::Debug => {
            let remove = "for device in /sys/bus/virtio/devices/*; do \
                          if [ $(cat $device/device) = 0x003f ]; then \
                          echo 1 > $(readlink -f $device/..)/remove; fi; done";
            let done = guest.agent()?.exec(remove, None, limit)?;
            ensure!(done.good(), "the device was not removed: {done:?}");
            Ok(())
        }
    }
}

/// Undoes [`unplug`].
fn plug(guest: &Guest) -> Result<()> {
    match guest.options().kernel {
        Kernel::Plain => {
            let device = json!({
                "driver": "vhost-user-cram-pci", "id": "cram0", "chardev": "cramchr0",
                "num-queues": 2, "bus": "port0",
            });
            guest.qmp()?.call("device_add", device).map(drop)
        }
        Kernel::Debug => guest.shell("echo 1 > /sys/bus/pci/rescan").map(drop),
    }
}

/// The device is unplugged with pages out: they are drained first. Plugged in again, it is used again.
pub(crate) fn unplugged_with_pages_out(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(GuestOptions {
        pluggable: true,
        ..guest_of(&daemon, kernel)
    })?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    let limit = guest.patient(Duration::from_secs(60));
    unplug(&guest, limit)?;
    hold.verify("random", 1)?.expect_good()?;
    hold.page_out()?;
    hold.verify("stride", 2)?.expect_good()?;
    plug(&guest)?;
    let mut round = 2;
    cram_tests::guest::wait_until("the device in use again", limit, || {
        round += 1;
        hold.rewrite(round, 1000)?;
        hold.page_out()?;
        Ok(daemon.control().stats()?.get("pages_stored")? >= pages(&load) / 2)
    })?;
    hold.verify("random", 3)?.expect_good()?;
    hold.finish()?;
    guest.finish()
}

#[test]
fn hot_unplug() -> Result<(), Failed> {
    Stage::run("hot_unplug", |stage| {
        unplugged_with_pages_out(stage, Kernel::Plain)
    })
}

/// A guest that is reset leaves pages in the device; after the boot they are gone, and all is well.
#[test]
fn reset_with_pages_out() -> Result<(), Failed> {
    Stage::run("reset_with_pages_out", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(GuestOptions {
            reboots: true,
            ..guest_of(&daemon, Kernel::Plain)
        })?;
        guest.swap_on()?;
        let load = small(Kernel::Plain);
        let hold = Hold::start(&guest, &load)?;
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        guest.agent()?.expect_again();
        guest.qmp()?.call("system_reset", json!({}))?;
        guest.wait_booted()?;
        wait_freed(&guest, &daemon)?;
        guest.swap_on()?;
        guest.load(&brief())?;
        let reading = guest.reading()?;
        ensure!(reading.disk_written_bytes == 0, "the disk was used");
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}
