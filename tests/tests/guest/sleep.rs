// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest sleeps while its pages are in the device.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{Failed, Guest, GuestOptions, Hold, Kernel, Stage};

use crate::scale::{ROOMY, guest_of, pages, small, wait_freed, wait_in_use, wait_stored};

/// Has the guest do something that freezes all its programs, also the one that answers us.
fn sleep(guest: &Guest, command: &str) -> Result<()> {
    let limit = guest.patient(Duration::from_secs(120));
    let done = guest.agent()?.exec(command, None, limit)?;
    ensure!(done.good(), "the guest did not sleep: {done:?}");
    Ok(())
}

/// A guest is suspended, as far as its devices, with its pages in the device: they stay there. It
/// hibernates: they come back before, since it may wake up elsewhere. Afterwards the device is used
/// as before.
pub(crate) fn suspended_and_hibernated(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(GuestOptions {
        words: vec!["resume=/dev/vdb".to_owned()],
        ..guest_of(&daemon, kernel)
    })?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;

    sleep(
        &guest,
        "echo 1 > /sys/module/suspend/parameters/pm_test_delay && echo devices > /sys/power/pm_test \
         && echo freeze > /sys/power/state && echo none > /sys/power/pm_test",
    )?;
    let stored = daemon.control().stats()?.get("pages_stored")?;
    ensure!(stored >= pages(&load) / 2, "the pages came back: {stored}");
    hold.verify("random", 1)?.expect_good()?;
    wait_in_use(&guest, &daemon, &hold, &load)?;

    // The image is written to the disk and read back, and what was running goes on from it.
    sleep(
        &guest,
        "echo test_resume > /sys/power/disk && echo disk > /sys/power/state",
    )?;
    let said = guest.shell("dmesg | grep -c 'frontswap: backend registered'")?;
    ensure!(said.trim() == "2", "the pages did not come back: {said}");
    hold.verify("random", 2)?.expect_good()?;
    wait_in_use(&guest, &daemon, &hold, &load)?;
    hold.verify("stride", 3)?.expect_good()?;
    hold.finish()?;
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn asleep() -> Result<(), Failed> {
    Stage::run("asleep", |stage| {
        suspended_and_hibernated(stage, Kernel::Plain)
    })
}
