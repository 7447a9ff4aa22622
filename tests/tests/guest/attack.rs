// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A hostile driver inside a guest, through QEMU's device: rings and chains that lie, resets in the
//! middle, states in any order (`tests/workload/src/raw/attack.rs`). The daemon, and another guest of
//! it, do not notice; and the same guest's own driver finds a device in order afterwards.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cram_abi::wire::{pool_flag, result};
use cram_tests::frontend::{self, Options};
use cram_tests::guest::{DaemonOptions, Failed, GuestOptions, Kernel, Stage, seed_from_env};

use crate::scale::{ROOMY, brief, expect_travelled, guest_of};

#[test]
fn hostile_driver() -> Result<(), Failed> {
    attack("hostile_driver", Kernel::Plain)
}

pub(crate) fn attack(name: &str, kernel: Kernel) -> Result<(), Failed> {
    Stage::run(name, |stage| {
        let seed = seed_from_env(name);
        let daemon = stage.daemon_with(DaemonOptions {
            sockets: 2,
            capacity: ROOMY.to_owned(),
            ..DaemonOptions::default()
        })?;
        let guest = stage.guest(GuestOptions {
            words: vec!["cram.noload".to_owned()],
            ..guest_of(&daemon, kernel)
        })?;
        let over = AtomicBool::new(false);
        let (done, rounds) = std::thread::scope(|scope| {
            let other = scope.spawn(|| honest_neighbour(daemon.socket(1), &over));
            let limit = guest.patient(Duration::from_secs(120));
            let command = format!("cram-workload attack --seed {seed} --rounds 3");
            let done = guest
                .agent()
                .and_then(|agent| agent.exec(&command, None, limit));
            over.store(true, Ordering::Relaxed);
            let rounds = other.join().ok().context("the neighbour panicked")?;
            Ok::<_, anyhow::Error>((done?, rounds?))
        })?;
        ensure!(done.good(), "the device is not what it was: {done:?}");
        let said: serde_json::Value = serde_json::from_str(done.stdout.trim())
            .with_context(|| format!("the guest said {:?}", done.stdout))?;
        let attacks = said["attacks"].as_u64().context("no number of attacks")?;
        ensure!(attacks >= 50, "{attacks} attacks only");
        eprintln!("{name}: {attacks} attacks, {rounds} rounds of the neighbour's");
        let stats = daemon.control().stats()?;
        let stopped = &stats.raw["clients"][0]["device"]["queues_stopped"];
        ensure!(
            stopped.as_u64().unwrap_or(0) > 0,
            "no queue was ever stopped"
        );
        ensure!(stats.get("gets_corrupt")? == 0);

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

/// Another guest of the same daemon, which puts and gets all the while. How often it did.
fn honest_neighbour(socket: &std::path::Path, over: &AtomicBool) -> Result<u64> {
    let mut guest = frontend::Guest::connect(socket, &Options::default())?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    let mut rounds = 0;
    while !over.load(Ordering::Relaxed) || rounds == 0 {
        let first = u32::try_from(rounds % 1000)? * 32;
        let numbers: Vec<u32> = (first..first + 32).collect();
        ensure!(guest.put(0, &numbers)? == [result::OK; 32]);
        // Its bytes are compared.
        ensure!(guest.get(0, &numbers)? == [result::OK; 32]);
        rounds += 1;
    }
    Ok(rounds)
}
