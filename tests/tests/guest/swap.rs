// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Swapping real data out and in again, and every byte of it compared.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Result, ensure};
use cram_tests::guest::{
    DaemonOptions, DaemonReading, Failed, Guest, GuestOptions, Hold, Kernel, LoadOptions, Stage,
};

use serde_json::json;

use crate::scale::{
    ROOMY, brief, expect_travelled, guest_of, large, pages, small, wait_freed, wait_stored,
};

/// The harness itself, without the device: what fails here is not the device's fault.
#[test]
fn disk_swap_alone() -> Result<(), Failed> {
    Stage::run("disk_swap_alone", |stage| {
        let guest = stage.guest(GuestOptions::default())?;
        guest.swap_on()?;
        guest.load(&LoadOptions {
            passes: "random".to_owned(),
            ..LoadOptions::default()
        })?;
        let written = guest.reading()?.disk_written_bytes;
        ensure!(written > 10 << 20, "only {written} bytes were swapped");
        guest.finish()
    })
}

/// The instrument itself: bytes that are changed behind the guest's back are found.
#[test]
fn wrong_bytes_are_found() -> Result<(), Failed> {
    Stage::run("wrong_bytes_are_found", |stage| {
        let guest = stage.guest(GuestOptions::default())?;
        guest.swap_on()?;
        let load = small(Kernel::Plain);
        let hold = Hold::start(&guest, &load)?;
        hold.page_out()?;
        let disk = File::options()
            .write(true)
            .open(stage.folder().join("guest0.swap.img"))?;
        let zeros = vec![0; 1 << 20];
        for mib in 0..load.mib {
            // Behind the first page, which is the swap area's own.
            disk.write_all_at(&zeros, 4096 + (mib << 20))?;
        }
        let seen = hold.verify("random", 1)?;
        ensure!(seen.mismatches > 0, "zeros instead of data were not found");
        ensure!(seen.lost == 0 && !seen.wrong.is_empty(), "{seen:?}");
        hold.finish()?;
        guest.finish()
    })
}

/// While the device has room, no page goes to the disk, and all come back.
pub(crate) fn all_through_the_device(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    guest.load(&large(kernel))?;
    let stats = expect_travelled(&guest, &daemon)?;
    ensure!(stats.get("puts_refused")? == 0, "pages were refused");
    let written = guest.reading()?.disk_written_bytes;
    ensure!(written == 0, "{written} bytes were swapped to the disk");
    // The processes are gone, and with them their pages.
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn verified_swap() -> Result<(), Failed> {
    Stage::run("verified_swap", |stage| {
        all_through_the_device(stage, Kernel::Plain)
    })
}

/// Pages that went to the disk since the device refused them, or had announced in time that it would,
/// so that the driver did not even try.
fn refused(guest: &Guest, stats: &DaemonReading) -> Result<u64> {
    Ok(stats.get("puts_refused")? + guest.reading()?.device.get("puts_not_tried")?)
}

/// What a small device refuses is on the disk, and all of it comes back.
pub(crate) fn overflow_to_the_disk(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon("32M")?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    guest.load(&large(kernel))?;
    let stats = expect_travelled(&guest, &daemon)?;
    ensure!(refused(&guest, &stats)? > 0, "nothing was refused");
    let held = stats.get("mem_used_max")?;
    ensure!(held <= 32 << 20, "the pool held {held} bytes of 32 MiB");
    let written = guest.reading()?.disk_written_bytes;
    ensure!(written > 0, "the refused pages are not on the disk");
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn tiny_capacity() -> Result<(), Failed> {
    Stage::run("tiny_capacity", |stage| {
        overflow_to_the_disk(stage, Kernel::Plain)
    })
}

/// swapoff reads every page back; then swap is used again.
pub(crate) fn off_and_on(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    guest.shell("swapoff /dev/vdb")?;
    wait_freed(&guest, &daemon)?;
    hold.verify("random", 1)?.expect_good()?;
    guest.shell("swapon /dev/vdb")?;
    hold.rewrite(2, 500)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    hold.verify("reverse", 2)?.expect_good()?;
    hold.finish()?;
    let written = guest.reading()?.disk_written_bytes;
    ensure!(written == 0, "{written} bytes were swapped to the disk");
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn swapoff_brings_back() -> Result<(), Failed> {
    Stage::run("swapoff_brings_back", |stage| {
        off_and_on(stage, Kernel::Plain)
    })
}

/// A guest over its quota is refused, though the pool has room, and swaps to its disk.
#[test]
fn over_quota() -> Result<(), Failed> {
    Stage::run("over_quota", |stage| {
        let quota: u64 = 16 << 20;
        let daemon = stage.daemon_with(DaemonOptions {
            more: vec!["--quota".to_owned(), quota.to_string()],
            ..DaemonOptions::default()
        })?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        let hold = Hold::start(&guest, &small(Kernel::Plain))?;
        hold.page_out()?;
        hold.verify("random", 1)?.expect_good()?;
        hold.rewrite(2, 500)?;
        hold.page_out()?;
        hold.verify("sequential", 2)?.expect_good()?;
        let stats = expect_travelled(&guest, &daemon)?;
        ensure!(stats.get("refused_over_quota")? > 0, "nothing was refused");
        let held = stats.raw["clients"][0]["mem_used_max"].as_u64();
        ensure!(
            held.is_some_and(|held| held > 0 && held <= quota),
            "the guest's pages held {held:?} bytes of {quota}"
        );
        let written = guest.reading()?.disk_written_bytes;
        ensure!(written > 0, "the refused pages are not on the disk");
        hold.finish()?;
        guest.finish()
    })
}

/// A frozen guest keeps what it has in the pool, and swaps to its disk until it is thawed.
#[test]
fn frozen_and_thawed() -> Result<(), Failed> {
    Stage::run("frozen_and_thawed", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        let load = small(Kernel::Plain);
        let hold = Hold::start(&guest, &load)?;
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        let control = daemon.control();
        control.call("client.freeze", json!({ "client": "guest0" }))?;
        hold.verify("random", 1)?.expect_good()?;
        hold.rewrite(2, 500)?;
        hold.page_out()?;
        hold.verify("reverse", 2)?.expect_good()?;
        // The driver may know by the pressure, and not even ask.
        let written = guest.reading()?.disk_written_bytes;
        ensure!(written > 0, "a frozen guest did not use its disk");
        control.call("client.thaw", json!({ "client": "guest0" }))?;
        hold.rewrite(3, 1000)?;
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        hold.verify("stride", 3)?.expect_good()?;
        hold.finish()?;
        guest.finish()
    })
}

/// Pages that are changed again and again, with older copies in the device or on the disk:
/// none of those may ever be read.
#[test]
fn changed_pages() -> Result<(), Failed> {
    Stage::run("changed_pages", |stage| {
        // Too small for all, so that a page's newer copy is refused where its older one was taken.
        let daemon = stage.daemon("24M")?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        let hold = Hold::start(&guest, &small(Kernel::Plain))?;
        for round in 0..8 {
            hold.page_out()?;
            hold.rewrite(round, 400)?;
            hold.page_out()?;
            let order = ["random", "sequential", "stride"][(round % 3) as usize];
            hold.verify(order, round)?.expect_good()?;
        }
        let stats = expect_travelled(&guest, &daemon)?;
        ensure!(refused(&guest, &stats)? > 0, "nothing was refused");
        hold.finish()?;
        guest.finish()
    })
}

/// Several processes that share pages swap them in at the same time.
#[test]
fn shared_pages() -> Result<(), Failed> {
    Stage::run("shared_pages", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        guest.load(&LoadOptions {
            mib: 240,
            passes: "forked,forked".to_owned(),
            rewrite_permille: 300,
            ..LoadOptions::default()
        })?;
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}

/// One daemon serves two guests from one pool, each with its own data.
#[test]
fn two_guests() -> Result<(), Failed> {
    Stage::run("two_guests", |stage| {
        let daemon = stage.daemon_with(DaemonOptions {
            sockets: 2,
            ..DaemonOptions::default()
        })?;
        let mut guests = Vec::new();
        for number in 0..2 {
            guests.push(stage.guest(GuestOptions {
                name: format!("guest{number}"),
                sockets: vec![daemon.socket(number).to_owned()],
                ..guest_of(&daemon, Kernel::Plain)
            })?);
        }
        let load = |number: usize| LoadOptions {
            offset_mib: number as u64 * 400,
            seed: number as u64,
            ..brief()
        };
        std::thread::scope(|scope| {
            let runs: Vec<_> = guests
                .iter()
                .enumerate()
                .map(|(number, guest)| {
                    scope.spawn(move || {
                        guest.swap_on()?;
                        guest.load(&load(number))
                    })
                })
                .collect();
            for run in runs {
                match run.join() {
                    Ok(report) => drop(report?),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            anyhow::Ok(())
        })?;
        for guest in guests {
            let reading = guest.reading()?;
            ensure!(reading.device.get("puts_ok")? > 0, "a guest put no page");
            ensure!(reading.disk_written_bytes == 0, "a guest used its disk");
            guest.finish()?;
        }
        ensure!(daemon.control().stats()?.get("gets_corrupt")? == 0);
        Ok(())
    })
}
