// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver, the device and the guest go and come back while pages are out.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{Failed, GuestOptions, Hold, Kernel, Stage};
use serde_json::json;

use crate::scale::{
    ROOMY, brief, expect_travelled, guest_of, pages, small, wait_empty, wait_stored,
};

/// Unloading the module drains its pages to the disk beneath, or is refused; either way every
/// byte comes back, and a module that is loaded again is used again.
pub(crate) fn module_goes_and_comes(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    for round in 0..2 {
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
    wait_empty(&daemon)?;
    guest.finish()
}

#[test]
fn module_reload() -> Result<(), Failed> {
    Stage::run("module_reload", |stage| {
        module_goes_and_comes(stage, Kernel::Plain)
    })
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
    {
        let mut qmp = guest.qmp()?;
        qmp.call("device_del", json!({ "id": "cram0" }))?;
        qmp.wait_event("DEVICE_DELETED", limit, |data| data["device"] == "cram0")?;
    }
    hold.verify("random", 1)?.expect_good()?;
    hold.page_out()?;
    hold.verify("stride", 2)?.expect_good()?;
    guest.qmp()?.call(
        "device_add",
        json!({
            "driver": "vhost-user-cram-pci", "id": "cram0", "chardev": "cramchr0",
            "num-queues": 2, "bus": "port0",
        }),
    )?;
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
        wait_empty(&daemon)?;
        guest.swap_on()?;
        guest.load(&brief())?;
        let reading = guest.reading()?;
        ensure!(reading.disk_written_bytes == 0, "the disk was used");
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}
