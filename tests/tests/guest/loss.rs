// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon dies while it has the guest's pages.

use anyhow::{Result, ensure};
use cram_tests::guest::{Failed, Hold, Kernel, LoadOptions, Stage};

use crate::scale::{ROOMY, expect_used, guest_of, pages, small, wait_in_use, wait_stored};

/// SIGBUS, which a process gets that touches a lost page.
const SIGBUS: i32 = 7;

/// Whoever touches a lost page gets SIGBUS, never other bytes; everything else goes on; a new
/// daemon is used again.
pub(crate) fn killed_with_pages_out(stage: &Stage, kernel: Kernel) -> Result<()> {
    let mut daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    let victim = Hold::start(
        &guest,
        &LoadOptions {
            mib: 8,
            offset_mib: 300,
            die_on_sigbus: true,
            ..LoadOptions::default()
        },
    )?;
    hold.page_out()?;
    victim.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;

    daemon.kill()?;
    guest.expect_qemu_running()?;
    let seen = hold.verify("random", 1)?;
    seen.expect_no_wrong_byte()?;
    ensure!(seen.lost > 0, "no page was lost with the daemon");
    let died = victim.verify("sequential", 1)?.died;
    ensure!(
        !died.is_empty() && died.iter().all(|&(_, signal)| signal == SIGBUS),
        "processes that touched lost pages ended with {died:?}"
    );
    victim.finish()?;
    guest.expect_alive()?;

    // Without a daemon, swap is the disk.
    hold.rewrite(2, 1000)?;
    hold.page_out()?;
    hold.verify("reverse", 2)?.expect_good()?;
    let on_disk = guest.reading()?.disk_written_bytes;
    ensure!(on_disk > 0, "nothing was swapped while there was no daemon");

    // A new daemon has none of the old pages, and is used again.
    daemon.restart()?;
    daemon.wait_open()?;
    wait_in_use(&guest, &daemon, &hold, &load)?;
    hold.verify("random", 4)?.expect_good()?;
    hold.verify("stride", 5)?.expect_good()?;
    hold.finish()?;
    expect_used(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn daemon_killed() -> Result<(), Failed> {
    Stage::run("daemon_killed", |stage| {
        killed_with_pages_out(stage, Kernel::Plain)
    })
}

/// A guest that starts before its daemon: it swaps to the disk, and to the device once that is there.
#[test]
fn daemon_comes_late() -> Result<(), Failed> {
    Stage::run("daemon_comes_late", |stage| {
        let mut daemon = stage.daemon(ROOMY)?;
        let options = guest_of(&daemon, Kernel::Plain);
        let mut guest =
            cram_tests::guest::Guest::launch(stage.artifacts(), stage.folder(), options)?;
        guest.connect()?;
        daemon.kill()?;
        guest.wait_booted()?;
        guest.swap_on()?;
        let load = small(Kernel::Plain);
        let hold = Hold::start(&guest, &load)?;
        hold.page_out()?;
        hold.verify("random", 1)?.expect_good()?;
        daemon.restart()?;
        daemon.wait_open()?;
        wait_in_use(&guest, &daemon, &hold, &load)?;
        hold.verify("random", 2)?.expect_good()?;
        hold.finish()?;
        guest.finish()
    })
}
