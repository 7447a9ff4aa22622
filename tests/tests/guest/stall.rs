// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon is there and does not answer, or goes while the driver is busy: nobody waits who does
//! not want its pages, and nothing is owed for ever.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{
    Daemon, DaemonOptions, Failed, Guest, GuestOptions, Hold, Kernel, LoadOptions, Stage,
    wait_until,
};

use crate::scale::{
    ROOMY, brief, expect_used, guest_of, pages, small, wait_freed, wait_in_use, wait_stored,
};

/// A guest whose driver is inserted with parameters.
fn guest_with(
    stage: &Stage,
    daemon: &Daemon,
    kernel: Kernel,
    parameters: &str,
    pluggable: bool,
) -> Result<Guest> {
    let guest = stage.guest(GuestOptions {
        words: vec!["cram.noload".to_owned()],
        pluggable,
        ..guest_of(daemon, kernel)
    })?;
    guest.shell(&format!("insmod /lib/modules/cram.ko {parameters}"))?;
    guest.swap_on()?;
    Ok(guest)
}

fn wait_state(guest: &Guest, wanted: &str) -> Result<()> {
    wait_until(
        &format!("the device {wanted}"),
        guest.patient(Duration::from_secs(30)),
        || Ok(guest.device_state()? == wanted),
    )
}

/// Reads some pages of the processes that hold data, from outside, so that an error hurts nobody.
/// Returns how many could be read, and how many could not.
fn peek(guest: &Guest) -> Result<(usize, usize)> {
    let script = "for pid in $(pidof cram-workload); do \
                  while read -r range mode rest; do \
                  begin=${range%-*}; end=${range#*-}; \
                  [ $mode = rw-p ] && [ $((0x$end - 0x$begin)) -ge 8388608 ] || continue; \
                  for page in 0 1 100 1000 2000; do \
                  if dd if=/proc/$pid/mem of=/dev/null bs=4096 count=1 \
                  skip=$((0x$begin / 4096 + page)) 2>/dev/null; then echo got; \
                  else echo failed; fi; done; done < /proc/$pid/maps; done";
    let limit = guest.patient(Duration::from_secs(60));
    let done = guest.agent()?.exec(script, None, limit)?;
    ensure!(done.good(), "the pages were not asked for: {done:?}");
    let count = |word: &str| done.stdout.lines().filter(|line| *line == word).count();
    let (got, failed) = (count("got"), count("failed"));
    ensure!(got + failed > 0, "there are no pages to ask for");
    Ok((got, failed))
}

/// The daemon is stopped while the guest swaps more than it has memory. The guest goes on, to the
/// disk; when the daemon goes on, all is as it was.
pub(crate) fn stopped_while_swapping(stage: &Stage, kernel: Kernel) -> Result<()> {
    let mut daemon = stage.daemon(ROOMY)?;
    let guest = guest_with(stage, &daemon, kernel, "load_timeout_ms=4000000", false)?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    let before = guest.reading()?.disk_written_bytes;

    daemon.pause()?;
    // Nobody asks for a page of `hold`. Whoever reclaims memory for this must not wait.
    let other = LoadOptions {
        offset_mib: 200,
        ..brief()
    };
    guest.load(&other)?;
    guest.expect_alive()?;
    ensure!(
        guest.device_state()? == "stalled",
        "the device is not stalled"
    );
    let written = guest.reading()?.disk_written_bytes - before;
    ensure!(written > 0, "nothing was swapped to the disk meanwhile");

    daemon.resume()?;
    wait_state(&guest, "running")?;
    hold.verify("random", 1)?.expect_good()?;
    let stalls = guest.reading()?.device.get("stalls")?;
    ensure!(stalls > 0, "no stall was counted");
    wait_in_use(&guest, &daemon, &hold, &load)?;
    hold.verify("random", 2)?.expect_good()?;
    hold.finish()?;
    expect_used(&guest, &daemon)?;
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn daemon_stopped() -> Result<(), Failed> {
    Stage::run("daemon_stopped", |stage| {
        stopped_while_swapping(stage, Kernel::Plain)
    })
}

/// The daemon is stopped for longer than loads are to wait: who asks for a page gets an error, in
/// bounded time. When it goes on, the pages can be had again, those that were asked for, too.
pub(crate) fn stopped_for_long(stage: &Stage, kernel: Kernel) -> Result<()> {
    let mut daemon = stage.daemon(ROOMY)?;
    let parameters = "stall_ms=300 load_timeout_ms=2000";
    let guest = guest_with(stage, &daemon, kernel, parameters, false)?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;

    daemon.pause()?;
    let (_, failed) = peek(&guest)?;
    ensure!(failed > 0, "pages came from a daemon that is stopped");
    ensure!(guest.device_state()? == "hung", "the device is not hung");
    // A swap device that comes or goes does not wait, either.
    guest.shell(
        "insmod /lib/modules/loop.ko && dd if=/dev/zero of=/tmp/swap bs=4096 count=256 && losetup /dev/loop0 /tmp/swap && \
         mkswap /dev/loop0 && swapon /dev/loop0 && swapoff /dev/loop0",
    )?;

    daemon.resume()?;
    wait_state(&guest, "running")?;
    let (_, failed) = peek(&guest)?;
    ensure!(failed == 0, "{failed} pages cannot be had any more");
    hold.verify("random", 2)?.expect_good()?;
    hold.page_out()?;
    hold.verify("stride", 3)?.expect_good()?;
    hold.finish()?;
    expect_used(&guest, &daemon)?;
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn daemon_stopped_for_long() -> Result<(), Failed> {
    Stage::run("daemon_stopped_for_long", |stage| {
        stopped_for_long(stage, Kernel::Plain)
    })
}

/// Pages of a file in memory (tmpfs) that were asked for in vain, and those that were to be read
/// ahead with them, can be had again when the daemon goes on.
pub(crate) fn shared_memory_stopped(stage: &Stage, kernel: Kernel) -> Result<()> {
    const MIB: u64 = 24;
    let mut daemon = stage.daemon(ROOMY)?;
    let parameters = "stall_ms=300 load_timeout_ms=2000";
    let guest = guest_with(stage, &daemon, kernel, parameters, false)?;
    guest.shell(&format!(
        "cd /sys/fs/cgroup && echo +memory > cgroup.subtree_control && mkdir files && \
         mount -t tmpfs -o size=64m files /mnt && \
         sh -c 'echo 0 > files/cgroup.procs && exec dd if=/dev/vdc of=/mnt/file bs=1M count={MIB}' && \
         echo {MIB}M > files/memory.reclaim || true"
    ))?;
    wait_stored(&daemon, MIB * 256 / 2)?;

    daemon.pause()?;
    let limit = guest.patient(Duration::from_secs(60));
    let read = guest
        .agent()?
        .exec("cat /mnt/file > /dev/null", None, limit)?;
    ensure!(
        !read.good(),
        "the file could be read from a daemon that is stopped"
    );
    ensure!(guest.device_state()? == "hung", "the device is not hung");

    daemon.resume()?;
    wait_state(&guest, "running")?;
    guest.shell(&format!(
        "cmp -n $(({MIB} << 20)) /mnt/file /dev/vdc && rm /mnt/file && umount /mnt"
    ))?;
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn daemon_stopped_under_shared_memory() -> Result<(), Failed> {
    Stage::run("daemon_stopped_under_shared_memory", |stage| {
        shared_memory_stopped(stage, Kernel::Plain)
    })
}

/// Somebody resets the PCI function again and again while pages are out and come in. Requests that
/// were under way are made once more, and what was to be freed is.
pub(crate) fn function_reset(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = guest_with(stage, &daemon, kernel, "", true)?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    let resets = guest.agent()?.start(
        "for device in /sys/bus/virtio/devices/*; do \
         if [ $(cat $device/device) = 0x003f ]; then pci=$(readlink -f $device/..); fi; done; \
         for n in 1 2 3 4 5 6 7 8 9 10; do echo 1 > $pci/reset || exit 1; sleep 1; done",
        None,
    )?;
    for round in 1..=3 {
        hold.verify("random", round)?.expect_good()?;
        hold.rewrite(round, 500)?;
        hold.page_out()?;
    }
    let limit = guest.patient(Duration::from_secs(60));
    let done = guest.agent()?.wait_end(resets, limit)?;
    ensure!(done.good(), "the function was not reset: {done:?}");
    ensure!(
        guest.device_state()? == "running",
        "the device does not run"
    );
    hold.verify("random", 4)?.expect_good()?;
    hold.finish()?;
    expect_used(&guest, &daemon)?;
    wait_freed(&guest, &daemon)?;
    guest.finish()
}

#[test]
fn pci_function_reset() -> Result<(), Failed> {
    Stage::run("pci_function_reset", |stage| {
        function_reset(stage, Kernel::Plain)
    })
}

/// The module is unloaded while others load pages without a pause.
pub(crate) fn unloaded_under_loads(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    let agent = guest.agent()?;
    let removed = agent.start("rmmod cram", None)?;
    hold.verify("random", 1)?.expect_good()?;
    let limit = guest.patient(Duration::from_secs(60));
    let done = agent.wait_end(removed, limit)?;
    ensure!(done.good(), "the module was not removed: {done:?}");
    hold.verify("random", 2)?.expect_good()?;
    hold.finish()?;
    guest.finish()
}

#[test]
fn unload_under_loads() -> Result<(), Failed> {
    Stage::run("unload_under_loads", |stage| {
        unloaded_under_loads(stage, Kernel::Plain)
    })
}

/// The daemon dies for good while its pages are being asked for. Who asks gets an error, and the
/// module can be unloaded: nothing is under way to a device that has no back-end.
pub(crate) fn unloaded_when_lost(stage: &Stage, kernel: Kernel) -> Result<()> {
    let mut daemon = stage.daemon(ROOMY)?;
    let guest = guest_with(stage, &daemon, kernel, "down_grace_ms=300", false)?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    daemon.kill()?;
    // Some are asked for before the pages are given up, some while, some after.
    let seen = hold.verify("random", 1)?;
    seen.expect_no_wrong_byte()?;
    ensure!(seen.lost > 0, "no page was lost with the daemon");
    ensure!(guest.device_state()? == "lost", "the device is not lost");
    let limit = guest.patient(Duration::from_secs(60));
    let removed = guest.agent()?.exec("rmmod cram", None, limit)?;
    ensure!(removed.good(), "the module was not removed: {removed:?}");
    hold.rewrite(2, 1000)?;
    hold.page_out()?;
    hold.verify("stride", 2)?.expect_good()?;
    hold.finish()?;
    guest.finish()
}

#[test]
fn unload_when_lost() -> Result<(), Failed> {
    Stage::run("unload_when_lost", |stage| {
        unloaded_when_lost(stage, Kernel::Plain)
    })
}

/// The daemon dies, and the module is unloaded before its pages are given up: the drain waits, and
/// then neither it nor the restart of the device waits for the other.
pub(crate) fn unloaded_before_lost(stage: &Stage, kernel: Kernel) -> Result<()> {
    let mut daemon = stage.daemon_with(DaemonOptions {
        capacity: ROOMY.to_owned(),
        more: vec!["--num-queues".to_owned(), "8".to_owned()],
        ..DaemonOptions::default()
    })?;
    let guest = stage.guest(GuestOptions {
        words: vec!["cram.noload".to_owned()],
        queues: 8,
        ..guest_of(&daemon, kernel)
    })?;
    guest.shell("insmod /lib/modules/cram.ko down_grace_ms=2000")?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    daemon.kill()?;
    wait_state(&guest, "down")?;
    let limit = guest.patient(Duration::from_secs(60));
    let removed = guest.agent()?.exec("rmmod cram", None, limit)?;
    ensure!(removed.good(), "the module was not removed: {removed:?}");
    hold.finish()?;
    guest.finish()
}

#[test]
fn unload_before_lost() -> Result<(), Failed> {
    Stage::run("unload_before_lost", |stage| {
        unloaded_before_lost(stage, Kernel::Plain)
    })
}

/// While the daemon is away, the guest frees pages, and a whole swap device. The daemon comes back
/// with all that it had, and is told.
pub(crate) fn freed_while_lost(stage: &Stage, kernel: Kernel) -> Result<()> {
    let arena = stage.folder().join("arena");
    let mut daemon = stage.daemon_with(DaemonOptions {
        capacity: ROOMY.to_owned(),
        more: vec!["--arena".to_owned(), arena.display().to_string()],
        ..DaemonOptions::default()
    })?;
    let guest = guest_with(stage, &daemon, kernel, "down_grace_ms=10000", false)?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    daemon.kill()?;
    wait_state(&guest, "down")?;
    hold.finish()?;
    // The reset that comes with this takes every request back that is under way.
    wait_state(&guest, "lost")?;
    guest.shell("swapoff /dev/vdb")?;
    daemon.restart()?;
    daemon.wait_open()?;
    wait_state(&guest, "running")?;
    wait_until(
        "a device without pages",
        guest.patient(Duration::from_secs(20)),
        || Ok(daemon.control().stats()?.get("pages_stored")? == 0),
    )?;
    // The same number again, and none of the old pages.
    guest.shell("swapon /dev/vdb")?;
    let hold = Hold::start(&guest, &load)?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) / 2)?;
    hold.verify("random", 1)?.expect_good()?;
    hold.finish()?;
    guest.finish()
}

#[test]
fn freed_while_the_daemon_is_lost() -> Result<(), Failed> {
    Stage::run("freed_while_the_daemon_is_lost", |stage| {
        freed_while_lost(stage, Kernel::Plain)
    })
}
