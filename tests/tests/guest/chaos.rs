// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A hundred kills and restarts of the daemon at random moments of guests' lives; and some of a
//! daemon that keeps its pages in a file, after which not one page is missing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cram_tests::guest::{
    Daemon, DaemonOptions, Failed, Guest, Hold, Kernel, LoadOptions, Stage, seed_from_env,
};

use crate::scale::{ROOMY, expect_used, guest_of, pages, small, wait_in_use, wait_stored};

/// Guests that live one after another, so that boot and probe get their share of the kills.
const LIVES: u32 = 10;
/// Kills in each of those lives.
const KILLS: u32 = 10;
/// Lives on the debug kernel, which takes its time.
const DEBUG_LIVES: u32 = 1;
/// The longest that a killed daemon stays away, in milliseconds: less than what the driver waits
/// for it before it gives pages up.
const AWAY_MS: u64 = 800;

/// Random numbers that a seed repeats (SplitMix64).
struct Lots(u64);

impl Lots {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % limit
    }
}

/// What the guest does while its daemon comes and goes: boot, swap, verify, idle, again and again.
fn live(guest: &mut Guest, over: &AtomicBool) -> Result<()> {
    guest.connect()?;
    guest.wait_booted()?;
    guest.swap_on()?;
    let hold = Hold::start(guest, &small(guest.options().kernel))?;
    let mut round = 0;
    while !over.load(Ordering::SeqCst) {
        round += 1;
        hold.page_out()?;
        // Pages may be lost at any moment. Wrong they may never be.
        hold.verify("random", round)?.expect_no_wrong_byte()?;
        hold.rewrite(round, 500)?;
        std::thread::sleep(Duration::from_millis(300 * (round % 3)));
    }
    hold.finish()
}

#[test]
fn a_hundred_kills() -> Result<(), Failed> {
    let seed = seed_from_env("a_hundred_kills");
    Stage::run("a_hundred_kills", |stage| {
        lives(stage, Kernel::Plain, LIVES, seed)
    })
}

/// Some more kills, on the kernel that checks itself.
pub(crate) fn kills_on_debug_kernel(stage: &Stage, kernel: Kernel) -> Result<()> {
    let seed = seed_from_env("debug_kills");
    lives(stage, kernel, DEBUG_LIVES, seed)
}

fn lives(stage: &Stage, kernel: Kernel, count: u32, seed: u64) -> Result<()> {
    let mut lots = Lots(seed);
    for number in 0..count {
        one_life(stage, kernel, number, &mut lots)
            .with_context(|| format!("life {number} of CRAM_SEED={seed}"))?;
    }
    Ok(())
}

fn one_life(stage: &Stage, kernel: Kernel, number: u32, lots: &mut Lots) -> Result<()> {
    let mut daemon = stage.daemon(ROOMY)?;
    let mut options = guest_of(&daemon, kernel);
    options.name = format!("life{number}");
    // Both the guest and the daemon are started here: they die with the thread that starts them.
    let mut guest = Guest::launch(stage.artifacts(), stage.folder(), options)?;
    // On the debug kernel everything takes longer, so the kills come further apart.
    let longest_ms = match kernel {
        Kernel::Plain => 2500,
        Kernel::Debug => 10_000,
    };
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let life = scope.spawn(|| {
            let lived = live(&mut guest, &over);
            over.store(true, Ordering::SeqCst);
            lived
        });
        let killed = (0..KILLS).try_for_each(|_| {
            // Never two lives alike: some kills come while QEMU still realizes the device.
            sleep_unless(Duration::from_millis(lots.below(longest_ms)), &over);
            daemon.kill()?;
            sleep_unless(Duration::from_millis(lots.below(AWAY_MS)), &over);
            daemon.restart()
        });
        let opened = killed.and_then(|()| daemon.wait_open());
        over.store(true, Ordering::SeqCst);
        match life.join() {
            Ok(lived) => lived?,
            Err(panic) => std::panic::resume_unwind(panic),
        }
        opened
    })?;
    // Peace: the device is used again, and nothing is lost any more.
    guest.expect_alive()?;
    let load = LoadOptions {
        offset_mib: 500,
        ..small(kernel)
    };
    let hold = Hold::start(&guest, &load)?;
    wait_in_use(&guest, &daemon, &hold, &load)?;
    hold.verify("random", 1)?.expect_good()?;
    hold.finish()?;
    ensure!(daemon.control().stats()?.get("gets_corrupt")? == 0);
    guest.finish()
}

/// A daemon with an arena in a file is killed while the guest swaps, and started again. Pages that
/// it had acknowledged are there again, requests in flight are answered by the new one, and the
/// guest, which only sees a back-end that is away for a moment, gets every byte back.
#[test]
fn kills_that_lose_nothing() -> Result<(), Failed> {
    let seed = seed_from_env("kills_that_lose_nothing");
    Stage::run("kills_that_lose_nothing", |stage| {
        let mut lots = Lots(seed);
        let arena = stage.folder().join("arena");
        let mut daemon = stage.daemon_with(DaemonOptions {
            capacity: ROOMY.to_owned(),
            more: vec!["--arena".to_owned(), arena.display().to_string()],
            ..DaemonOptions::default()
        })?;
        let guest = stage.guest(guest_of(&daemon, Kernel::Plain))?;
        guest.swap_on()?;
        let load = small(Kernel::Plain);
        let hold = Hold::start(&guest, &load)?;
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        let generation = generation(&daemon)?;
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let life = scope.spawn(|| {
                let lived = swap_without_loss(&hold, &over);
                over.store(true, Ordering::SeqCst);
                lived
            });
            let killed = (0..KILLS).try_for_each(|number| {
                sleep_unless(Duration::from_millis(lots.below(2500)), &over);
                daemon.kill()?;
                sleep_unless(Duration::from_millis(lots.below(AWAY_MS)), &over);
                daemon.restart()?;
                daemon.wait_open()?;
                let now = self::generation(&daemon)?;
                ensure!(now == generation, "kill {number}: not the same store");
                Ok(())
            });
            over.store(true, Ordering::SeqCst);
            match life.join() {
                Ok(lived) => lived?,
                Err(panic) => std::panic::resume_unwind(panic),
            }
            killed
        })
        .with_context(|| format!("CRAM_SEED={seed}"))?;
        hold.page_out()?;
        wait_stored(&daemon, pages(&load) / 2)?;
        hold.verify("stride", 1)?.expect_good()?;
        hold.finish()?;
        expect_used(&guest, &daemon)?;
        guest.finish()
    })
}

fn generation(daemon: &Daemon) -> Result<String> {
    let text = daemon.control().stats()?.raw["store"]["generation"].clone();
    Ok(text.as_str().context("no generation")?.to_owned())
}

/// Pages out and in again, and changed in between, until it is over. Not one may be missing.
fn swap_without_loss(hold: &Hold<'_>, over: &AtomicBool) -> Result<()> {
    let mut round = 0;
    while !over.load(Ordering::SeqCst) {
        round += 1;
        hold.page_out()?;
        hold.verify("random", round)?.expect_good()?;
        hold.rewrite(round, 500)?;
    }
    Ok(())
}

fn sleep_unless(time: Duration, over: &AtomicBool) {
    let until = Instant::now() + time;
    while Instant::now() < until && !over.load(Ordering::SeqCst) {
        std::thread::sleep(Duration::from_millis(5));
    }
}
