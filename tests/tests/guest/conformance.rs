// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table of conformance from inside a guest, through QEMU's device. The same cases go through the
//! parser and the front-end in `tests/tests/protocol/conformance.rs`.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cram_tests::guest::{Failed, GuestOptions, Kernel, Stage};

use crate::scale::{ROOMY, brief, expect_travelled, guest_of};

#[test]
fn conformance() -> Result<(), Failed> {
    Stage::run("conformance", |stage| {
        let daemon = stage.daemon(ROOMY)?;
        let guest = stage.guest(GuestOptions {
            words: vec!["cram.noload".to_owned()],
            ..guest_of(&daemon, Kernel::Plain)
        })?;
        let limit = guest.patient(Duration::from_secs(120));
        let done = guest.agent()?.exec("cram-workload conform", None, limit)?;
        ensure!(done.good(), "a case failed: {done:?}");
        let cases = cases_in(&done.stdout)?;
        ensure!(cases > 60, "{cases} cases only");
        let stats = daemon.control().stats()?;
        ensure!(stats.raw["clients"][0]["device"]["queues_stopped"] == 0);

        // Whoever comes next finds a device in order.
        guest.shell(
            "echo 1 > /sys/bus/pci/rescan; for device in /sys/bus/pci/devices/*; do \
                     if [ $(cat $device/device) = 0x107f ]; then \
                     basename $device > /sys/bus/pci/drivers/virtio-pci/bind; fi; done",
        )?;
        guest.shell("insmod /lib/modules/cram.ko")?;
        guest.swap_on()?;
        guest.load(&brief())?;
        expect_travelled(&guest, &daemon)?;
        guest.finish()
    })
}

/// `{"cases":N}`
fn cases_in(text: &str) -> Result<u64> {
    let said: serde_json::Value =
        serde_json::from_str(text.trim()).with_context(|| format!("the guest said {text:?}"))?;
    said["cases"].as_u64().context("no number of cases")
}
