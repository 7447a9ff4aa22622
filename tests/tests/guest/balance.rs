// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where pages are: in the guest or in the pool, and not in both; and who moves them at the
//! host's wish.

use std::time::Duration;

use anyhow::{Result, ensure};
use cram_tests::guest::{
    Daemon, Failed, Guest, GuestOptions, Hold, Kernel, Ledger, Role, Stage, wait_until,
};
use serde_json::{Value, json};

use crate::scale::{ROOMY, guest_of, pages, small, wait_stored};

/// A part of a load that may be in the pool and in the guest for reasons of its own: pages that
/// were read ahead and nobody has touched yet, and those that were busy when they were looked at.
const TOLERATED: u64 = 20;

fn stored(daemon: &Daemon) -> Result<u64> {
    daemon.control().stats()?.get("pages_stored")
}

fn wait_stored_at_most(guest: &Guest, daemon: &Daemon, limit: u64) -> Result<()> {
    let what = format!("at most {limit} pages in the device");
    let patience = guest.patient(Duration::from_secs(30));
    wait_until(&what, patience, || Ok(stored(daemon)? <= limit))
}

fn policy(daemon: &Daemon, copies: &str) -> Result<()> {
    let params = json!({ "client": "guest0", "copies": copies });
    daemon.control().call("client.policy", params).map(drop)
}

/// What the pool gave back it does not keep; unless the operator wants it to, and then only for
/// so long.
pub(crate) fn no_page_is_kept_twice(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(guest_of(&daemon, kernel))?;
    guest.swap_on()?;
    let load = small(kernel);
    let few = pages(&load) / TOLERATED;
    let hold = Hold::start(&guest, &load)?;
    for order in ["sequential", "random"] {
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) * 9 / 10)?;
        hold.verify(order, 1)?.expect_good()?;
        wait_stored_at_most(&guest, &daemon, few)?;
    }

    policy(&daemon, "keep")?;
    wait_policy(&guest, &daemon, "keep")?;
    hold.page_out()?;
    wait_stored(&daemon, pages(&load) * 9 / 10)?;
    hold.verify("random", 2)?.expect_good()?;
    let kept = stored(&daemon)?;
    ensure!(
        kept >= pages(&load) * 8 / 10,
        "only {kept} of {} pages were kept",
        pages(&load)
    );
    // Clean pages need not be put again, but those that are changed must.
    let puts = daemon.control().stats()?.get("puts")?;
    hold.page_out()?;
    let again = daemon.control().stats()?.get("puts")? - puts;
    ensure!(again <= few, "{again} pages were put again, though clean");
    hold.rewrite(3, 500)?;
    hold.verify("sequential", 3)?.expect_good()?;

    policy(&daemon, "free")?;
    wait_stored_at_most(&guest, &daemon, few)?;
    hold.verify("random", 4)?.expect_good()?;
    let written = guest.reading()?.disk_written_bytes;
    ensure!(written == 0, "{written} bytes were swapped to the disk");
    hold.finish()?;
    guest.finish()
}

/// Waits until the guest's driver follows a policy, which it says when it reports.
fn wait_policy(guest: &Guest, daemon: &Daemon, copies: &str) -> Result<()> {
    ensure!(client(daemon)?["copies"] == json!(copies));
    let what = format!("a driver whose copies are: {copies}");
    let line = format!("copies {copies}");
    wait_until(&what, guest.patient(Duration::from_secs(10)), || {
        let stats = guest.shell("cat /sys/kernel/debug/cram/*/stats")?;
        Ok(stats.lines().any(|have| have == line))
    })
}

fn client(daemon: &Daemon) -> Result<Value> {
    Ok(daemon.control().stats()?.raw["clients"][0].clone())
}

/// Waits until an errand has ended. Returns the pages that were moved.
fn wait_ended(guest: &Guest, daemon: &Daemon, errand: &str) -> Result<u64> {
    let mut done = 0;
    let what = format!("{errand} to end");
    wait_until(&what, guest.patient(Duration::from_secs(60)), || {
        let now = &client(daemon)?[errand];
        done = now["done_pages"].as_u64().unwrap_or_default();
        Ok(now["state"] == json!("done") || now["state"] == json!("stopped"))
    })?;
    Ok(done)
}

/// The host asks for memory and gets it: the pages come to the pool, and what they lay in is the
/// host's again. Then the guest takes them back.
pub(crate) fn squeezed_and_given_back(stage: &Stage, kernel: Kernel) -> Result<()> {
    let daemon = stage.daemon(ROOMY)?;
    let guest = stage.guest(GuestOptions {
        reports_free_pages: true,
        ..guest_of(&daemon, kernel)
    })?;
    guest.swap_on()?;
    let load = small(kernel);
    let hold = Hold::start(&guest, &load)?;
    let bytes = load.mib << 20;
    let ledger = Ledger::new(&[(guest.pid(), Role::Qemu)])?;
    let before = ledger.quick()?.guest;

    let squeeze = |bytes: u64| {
        let params = json!({ "client": "guest0", "bytes": bytes });
        daemon.control().call("client.squeeze", params)
    };
    squeeze(bytes)?;
    let freed = wait_ended(&guest, &daemon, "squeeze")?;
    ensure!(
        freed >= pages(&load) / 2,
        "{freed} of {} pages were freed",
        pages(&load)
    );
    wait_stored(&daemon, pages(&load) / 4)?;
    // Some of what was freed are the holes that the load left, or pages of files.
    let enough = bytes / 3;
    let what = format!("{enough} bytes of {before} given back to the host");
    wait_until(&what, guest.patient(Duration::from_secs(60)), || {
        Ok(ledger.quick()?.guest + enough <= before)
    })?;
    hold.verify("random", 1)?.expect_good()?;

    squeeze(bytes)?;
    wait_ended(&guest, &daemon, "squeeze")?;
    let out = stored(&daemon)?;
    let give_back = json!({ "client": "guest0", "bytes": bytes });
    daemon.control().call("client.give_back", give_back)?;
    wait_ended(&guest, &daemon, "give_back")?;
    let left = stored(&daemon)?;
    ensure!(
        left <= out / 2,
        "{left} of {out} pages are still in the pool"
    );
    hold.verify("sequential", 2)?.expect_good()?;
    hold.rewrite(5, 500)?;
    hold.page_out()?;
    hold.verify("reverse", 5)?.expect_good()?;
    let written = guest.reading()?.disk_written_bytes;
    ensure!(written == 0, "{written} bytes were swapped to the disk");
    hold.finish()?;
    guest.finish()
}

#[test]
fn kept_once() -> Result<(), Failed> {
    Stage::run("kept_once", |stage| {
        no_page_is_kept_twice(stage, Kernel::Plain)
    })
}

#[test]
fn squeezed() -> Result<(), Failed> {
    Stage::run("squeezed", |stage| {
        squeezed_and_given_back(stage, Kernel::Plain)
    })
}

/// An idle guest gives up what it does not use, by itself.
#[test]
fn squeezes_itself() -> Result<(), Failed> {
    Stage::run("squeezes_itself", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        let load = small(Kernel::Plain);
        let hold = Hold::start(&guest, &load)?;
        ensure!(stored(&daemon)? == 0, "pages were put before anybody asked");
        let on = json!({ "client": "guest0", "auto_squeeze": true });
        daemon.control().call("client.policy", on)?;
        wait_stored(&daemon, 2000)?;
        let off = json!({ "client": "guest0", "auto_squeeze": false });
        daemon.control().call("client.policy", off)?;
        hold.verify("random", 1)?.expect_good()?;
        ensure!(guest.reading()?.device.get("squeezed_pages")? > 0);
        hold.finish()?;
        guest.finish()
    })
}
