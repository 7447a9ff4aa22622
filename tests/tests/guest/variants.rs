// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Other ways into the swap device: large folios, zswap above it, another load, a late driver.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{Failed, GuestOptions, Hold, Kernel, LoadOptions, MAY_RUN_OUT, Stage};

use crate::scale::{ROOMY, brief, expect_travelled, guest_of, pages, small, wait_stored};

const HUGE: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB";

/// Anonymous memory in folios of 64 KiB, swapped out whole.
#[test]
fn large_folios() -> Result<(), Failed> {
    Stage::run("large_folios", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.shell(&format!("echo always > {HUGE}/enabled"))?;
        guest.swap_on()?;
        guest.load(&brief())?;
        let whole = guest.shell(&format!("cat {HUGE}/stats/swpout"))?;
        ensure!(whole.trim() != "0", "no large folio was swapped out whole");
        expect_travelled(&guest, &daemon)?;
        let written = guest.reading()?.disk_written_bytes;
        ensure!(written == 0, "{written} bytes were swapped to the disk");
        guest.finish()
    })
}

/// zswap compresses in the guest first; what it writes back or rejects goes to the device.
#[test]
fn zswap_above() -> Result<(), Failed> {
    Stage::run("zswap_above", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.shell(
            "cd /sys/module/zswap/parameters && echo lz4 > compressor && \
             echo 5 > max_pool_percent && echo Y > enabled",
        )?;
        guest.swap_on()?;
        guest.load(&brief())?;
        let vmstat = guest.reading()?.vmstat;
        ensure!(vmstat.get("zswpout")? > 0, "zswap took nothing");
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}

/// A program that is not the project's own, checking its own memory.
#[test]
fn stress_ng() -> Result<(), Failed> {
    Stage::run("stress_ng", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        // stress-ng has the kernel populate more than there is (MADV_POPULATE_READ), which marks every
        // page as used; then reclaim finds none to take, now and then, with a plain disk as well.
        guest.shell(&format!("echo '{MAY_RUN_OUT}' > /dev/kmsg"))?;
        let done = guest.agent()?.exec(
            "cd /tmp && stress-ng --vm 2 --vm-bytes 320m --vm-keep --vm-populate \
             --oomable --verify --timeout 20s --temp-path /tmp",
            Some("work"),
            guest.patient(Duration::from_secs(60)),
        )?;
        ensure!(done.good(), "stress-ng: {done:?}");
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}

/// The driver comes when swap is in use already: what is on the disk stays there and is read
/// from there, what is swapped from then on goes to the device.
#[test]
fn late_driver() -> Result<(), Failed> {
    Stage::run("late_driver", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(GuestOptions {
            words: vec!["cram.noload".to_owned()],
            ..guest_of(&daemon, Kernel::Plain)
        })?;
        guest.swap_on()?;
        let hold = Hold::start(&guest, &small(Kernel::Plain))?;
        hold.page_out()?;
        let on_disk = guest.reading()?.disk_written_bytes;
        ensure!(on_disk > 0, "nothing was swapped to the disk");
        guest.shell("insmod /lib/modules/cram.ko")?;
        let load = LoadOptions {
            offset_mib: 200,
            ..small(Kernel::Plain)
        };
        let second = Hold::start(&guest, &load)?;
        second.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        hold.verify("random", 1)?.expect_good()?;
        second.verify("random", 2)?.expect_good()?;
        hold.rewrite(3, 300)?;
        hold.page_out()?;
        second.page_out()?;
        second.verify("stride", 3)?.expect_good()?;
        hold.verify("stride", 4)?.expect_good()?;
        hold.finish()?;
        second.finish()?;
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}
