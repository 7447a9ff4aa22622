// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One load under one arm, and what came of it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde_json::{Value, json};

use super::arms::{Arm, Load};
use super::pace::{Done, Pace, Stop, Times, Work};
use super::rig::Rig;
use super::sampler::{Sample, Sampler};
use super::{Bench, Extent};
use crate::guest::Counting;

/// How long guests are watched before they are given something to do.
const IDLE: Duration = Duration::from_secs(2);
/// Pages that were not touched for so long are packed once more, when a load asks for that.
const COLD_AFTER_S: u32 = 2;
/// The longest that packing them may take.
const REPACK_LIMIT: Duration = Duration::from_secs(120);
/// Room in which the host's bytes come to rest after something was asked for.
const SETTLE: Duration = Duration::from_secs(2);
/// The longest that a squeeze may take.
const SQUEEZE_LIMIT: Duration = Duration::from_secs(180);
const LOOK: Duration = Duration::from_millis(100);
/// Of each thousand pages of a twin so many are its own.
const OWN_PERMILLE: u64 = 50;
/// Of each thousand touches so many write, in the load whose hot part moves.
const WRITE_PERMILLE: u64 = 125;

/// What a run measured, by name.
pub(super) type Values = BTreeMap<String, f64>;

/// How a run ended.
pub(super) enum Ended {
    Completed(Values),
    OutOfMemory,
    Stuck,
}

/// Runs a load. Every page of it is compared at the end.
///
/// # Errors
/// When something is broken, or a page was not as it should be.
pub(super) fn run(
    bench: &Bench<'_>,
    load: Load,
    arm: &Arm,
    counting: Option<Counting>,
) -> Result<Ended> {
    let mut rig = Rig::start(bench.artifacts()?, arm, load.guests(), counting)?;
    let ledger = rig.ledger()?;
    let cpu_before = ledger.cpu_s()?;
    let sampler = Sampler::start(ledger, rig.gauge())?;
    std::thread::sleep(IDLE);
    let outcome = {
        let mut course = Course::start(&rig, &sampler, &bench.extent, load)?;
        let outcome = course.run(load, arm);
        outcome.map(|()| course.values)
    };
    let mut values = match outcome {
        Ok(values) => values,
        Err(Stop::OutOfMemory) => return Ok(Ended::OutOfMemory),
        Err(Stop::Stuck) => return Ok(Ended::Stuck),
        Err(Stop::Failed(error)) => {
            rig.keep_logs();
            return Err(error);
        }
    };
    let cpu_s = rig.ledger()?.cpu_s()? - cpu_before;
    values.insert("host_cpu_s".to_owned(), cpu_s);
    let course = sampler.finish()?;
    values.insert("samples_per_s".to_owned(), course.rate());
    values.insert("sample_error".to_owned(), course.error);
    course.write(&bench.course_path(load, arm)?)?;
    for guest in rig.guests() {
        guest.expect_alive()?;
    }
    Ok(Ended::Completed(values))
}

/// A run that is going on.
struct Course<'a> {
    rig: &'a Rig,
    sampler: &'a Sampler,
    extent: &'a Extent,
    paces: Vec<Pace<'a>>,
    values: Values,
    times: Times,
    /// When the load began.
    began_s: f64,
}

impl<'a> Course<'a> {
    fn start(
        rig: &'a Rig,
        sampler: &'a Sampler,
        extent: &'a Extent,
        load: Load,
    ) -> Result<Course<'a>> {
        let mib = match load {
            Load::Cycle => extent.cycle_mib,
            Load::Cold | Load::Phases => extent.cold_mib,
            Load::PageCache => extent.cache_own_mib,
            Load::Twins => extent.twins_mib,
            Load::Squeeze => extent.squeeze_mib,
        };
        let mut course = Self {
            rig,
            sampler,
            extent,
            paces: Vec::new(),
            values: Values::new(),
            times: Times::default(),
            began_s: 0.0,
        };
        let now_s = sampler.now_s();
        course.note_bytes("idle", now_s - 1.0, now_s);
        for guest in rig.guests() {
            course.paces.push(Pace::start(guest, 0, mib)?);
        }
        Ok(course)
    }

    fn set(&mut self, name: impl Into<String>, value: f64) {
        self.values.insert(name.into(), value);
    }

    fn run(&mut self, load: Load, arm: &Arm) -> Result<(), Stop> {
        self.began_s = self.sampler.now_s();
        match load {
            Load::Cycle => self.cycle()?,
            Load::Cold => self.cold(arm)?,
            Load::Phases => self.phases()?,
            Load::PageCache => self.page_cache()?,
            Load::Twins => self.twins()?,
            Load::Squeeze => self.squeeze()?,
        }
        let now_s = self.sampler.now_s();
        let peak = self.sampler.between(self.began_s, now_s).peak();
        self.set("peak_mib", mib(peak));
        self.set("load_s", now_s - self.began_s);
        for (name, permille) in [("touch_p50_us", 500), ("touch_p99_us", 990)] {
            if let Some(us) = self.times.permille_us(permille) {
                self.set(name, us);
            }
        }
        self.note_pages_moved()?;
        Ok(())
    }

    // ---- the loads

    fn cycle(&mut self) -> Result<(), Stop> {
        self.fill(0)?;
        let (mut pages, mut seconds, mut needed) = (0, 0.0, Vec::new());
        for order in ["sequential", "random"] {
            let before = self.instructions()?;
            let (done, from_s) = self.pass(order)?;
            self.note_instructions(before, done.pages)?;
            self.note_bytes("steady", from_s, self.sampler.now_s());
            pages += done.pages;
            seconds += done.seconds;
            self.times.add(&done);
            needed.extend(self.pool_vs_needed(done.away_pages)?);
            self.note_pool()?;
            self.note_swap_cache(order, done.away_pages)?;
        }
        self.set("work_per_s", number(pages) / seconds);
        if let Some(worst) = needed.into_iter().reduce(f64::max) {
            self.set("pool_vs_needed", worst);
        }
        Ok(())
    }

    fn cold(&mut self, arm: &Arm) -> Result<(), Stop> {
        self.fill(0)?;
        let pages = self.extent.cold_mib * 256;
        let hot = Work {
            pages: pages / 4,
            seconds: self.extent.hot_s,
            seed: 1,
            ..Work::default()
        };
        if arm.squeezed {
            // All that is cold.
            let goal = pages - hot.pages;
            self.rig.ask_client("client.squeeze", goal)?;
        }
        let done = self.work(&hot, "steady", "work_per_s")?;
        if let Some(ratio) = self.pool_vs_needed(done.away_pages)? {
            self.set("pool_vs_needed", ratio);
        }
        self.note_pool()?;
        if self.recompress()? {
            let shorter = Work {
                seconds: self.extent.hot_s / 2.0,
                seed: 2,
                ..hot
            };
            self.work(&shorter, "recompressed", "work_recompressed_per_s")?;
        }
        let (done, _) = self.pass("sequential")?;
        self.set("last_pass_s", done.seconds);
        let mut times = Times::default();
        times.add(&done);
        if let Some(us) = times.permille_us(990) {
            self.set("last_pass_p99_us", us);
        }
        Ok(())
    }

    fn phases(&mut self) -> Result<(), Stop> {
        const PHASES: u64 = 4;
        self.fill(0)?;
        let pages = self.extent.cold_mib * 256;
        let (mut touches, mut seconds, mut rests) = (0, 0.0, Vec::new());
        for phase in 0..PHASES {
            let hot = Work {
                first: pages / PHASES * phase,
                pages: pages / PHASES,
                seconds: self.extent.phase_s,
                seed: phase + 1,
                write_permille: WRITE_PERMILLE,
                with_tree: false,
            };
            let done = self.work(&hot, "steady", "work_per_s")?;
            touches += done.touches;
            seconds += done.seconds;
            rests.extend(self.values.get("steady_mib").copied());
        }
        self.set("work_per_s", number(touches) / seconds);
        let mean = rests.iter().sum::<f64>() / number(PHASES);
        self.set("steady_mib", mean);
        self.pass("sequential").map(drop)
    }

    fn page_cache(&mut self) -> Result<(), Stop> {
        self.fill(0)?;
        let pages = self.extent.cache_own_mib * 256;
        for pace in &self.paces {
            pace.ask_for_tree(self.extent.cache_own_mib, self.extent.cache_tree_mib)?;
        }
        self.answers(Duration::ZERO)?;
        let work = Work {
            pages: pages / 4,
            seconds: self.extent.hot_s,
            seed: 1,
            with_tree: true,
            ..Work::default()
        };
        let done = self.work(&work, "steady", "work_per_s")?;
        self.set("work_per_s", number(done.tree_pages) / done.seconds);
        self.pass("sequential").map(drop)
    }

    fn twins(&mut self) -> Result<(), Stop> {
        self.fill(OWN_PERMILLE)?;
        let pages = self.extent.twins_mib * 256;
        let work = Work {
            pages: pages / 4,
            seconds: self.extent.hot_s / 2.0,
            seed: 1,
            ..Work::default()
        };
        self.work(&work, "steady", "work_per_s")?;
        let guests = number(self.paces.len() as u64);
        if let Some(steady) = self.values.get("steady_mib").copied() {
            self.set("steady_per_guest_mib", steady / guests);
        }
        self.pass("sequential").map(drop)
    }

    fn squeeze(&mut self) -> Result<(), Stop> {
        self.fill(0)?;
        // What it costs to touch everything once, before anything was squeezed.
        let (done, _) = self.pass("random")?;
        let mut times = Times::default();
        times.add(&done);
        let without_us = times.permille_us(990);
        let goal = u64::from(self.extent.squeeze_memory_mib) * 256 / 2;
        self.settle_as("before")?;
        let (seconds, done) = self.change("squeeze", goal)?;
        self.set("squeeze_half_s", seconds);
        self.set("squeeze_done", number(done) / number(goal));
        self.settle_as("steady")?;
        if self.recompress()? {
            self.settle_as("recompressed")?;
        }
        let (done, _) = self.pass("random")?;
        let mut times = Times::default();
        times.add(&done);
        if let Some(us) = times.permille_us(990) {
            self.set("squeezed_touch_p99_us", us);
        }
        let (seconds, _) = self.change("give_back", goal)?;
        self.set("unsqueeze_s", seconds);
        let (done, _) = self.pass("random")?;
        self.times.add(&done);
        let with_us = self.times.permille_us(990);
        if let Some((with_us, without_us)) = with_us.zip(without_us) {
            self.set("unsqueeze_touch_p99_ratio", with_us / without_us);
        }
        Ok(())
    }

    // ---- steps of them

    fn fill(&mut self, own_permille: u64) -> Result<(), Stop> {
        let from = Instant::now();
        for (pace, seed) in self.paces.iter().zip(1..) {
            pace.ask_to_fill(own_permille, seed)?;
        }
        let all = self.answers(Duration::ZERO)?;
        for (pace, done) in self.paces.iter().zip(&all) {
            pace.check_fill(done)?;
        }
        self.set("fill_s", from.elapsed().as_secs_f64());
        eprint!(" fill {:.1} s", from.elapsed().as_secs_f64());
        Ok(())
    }

    /// All guests' answers.
    fn answers(&self, ahead: Duration) -> Result<Vec<Done>, Stop> {
        self.paces.iter().map(|pace| pace.answer(ahead)).collect()
    }

    /// Reads every page; also says when that began.
    fn pass(&mut self, order: &str) -> Result<(Done, f64), Stop> {
        let from_s = self.sampler.now_s();
        for pace in &self.paces {
            pace.ask_for_pass(order, 1)?;
        }
        let done = together(self.answers(Duration::ZERO)?);
        let expected: u64 = self.paces.iter().map(Pace::pages).sum();
        if done.pages != expected {
            return Err(anyhow!("{} of {expected} pages were read", done.pages).into());
        }
        eprint!(" {order} {:.1} s", done.seconds);
        Ok((done, from_s))
    }

    /// Works for a while; the bytes that count are those of its second half.
    fn work(&mut self, work: &Work, bytes: &str, rate: &str) -> Result<Done, Stop> {
        let before = self.instructions()?;
        let from_s = self.sampler.now_s();
        for pace in &self.paces {
            pace.ask_to_work(work)?;
        }
        let done = together(self.answers(Duration::from_secs_f64(work.seconds))?);
        let to_s = self.sampler.now_s();
        self.note_instructions(before, done.touches)?;
        self.note_bytes(bytes, from_s + (to_s - from_s) / 2.0, to_s);
        self.set(rate, number(done.touches) / done.seconds);
        self.times.add(&done);
        eprint!(" {:.0}/s", number(done.touches) / done.seconds);
        Ok(done)
    }

    /// Has the operator change the guest's RAM, and waits until that is done. Gives the seconds, and
    /// the pages of what was asked that were done.
    fn change(&self, method: &str, pages: u64) -> Result<(f64, u64), Stop> {
        let from = Instant::now();
        self.rig.ask_client(&format!("client.{method}"), pages)?;
        loop {
            let progress = self.rig.progress(method)?;
            let done = progress["done_pages"].as_u64().unwrap_or(0);
            // The guest may find that it can do no more.
            let is_over = matches!(progress["state"].as_str(), Some("done" | "stopped"));
            if is_over && progress["asked_pages"].as_u64() == Some(pages) {
                return Ok((from.elapsed().as_secs_f64(), done));
            }
            if from.elapsed() > SQUEEZE_LIMIT {
                return Err(anyhow!("{method}: {progress} after {SQUEEZE_LIMIT:?}").into());
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Packs what is cold once more. False when there is no device.
    fn recompress(&self) -> Result<bool, Stop> {
        let Some(control) = self.rig.control() else {
            return Ok(false);
        };
        let cold = json!({ "cold_after_s": COLD_AFTER_S });
        let repacked = control.call_within(REPACK_LIMIT, "store.recompress", cold);
        repacked.context("recompression")?;
        Ok(true)
    }

    /// Lets the bytes come to rest.
    fn settle_as(&mut self, bytes: &str) -> Result<(), Stop> {
        std::thread::sleep(SETTLE);
        let now_s = self.sampler.now_s();
        self.note_bytes(bytes, now_s - 1.0, now_s);
        Ok(())
    }

    // ---- what is noted

    fn note_bytes(&mut self, name: &str, from_s: f64, to_s: f64) {
        let samples = self.sampler.between(from_s, to_s);
        type Part = fn(&Sample) -> u64;
        let parts: [(&str, Part); 5] = [
            ("", Sample::total),
            ("_guest", |sample| sample.bytes.guest),
            ("_qemu", |sample| sample.bytes.qemu),
            ("_daemon", |sample| sample.bytes.daemon),
            ("_host_pool", |sample| sample.host_pool),
        ];
        for (part, of) in parts {
            let middle = samples.middle(of);
            if middle > 0.0 {
                self.set(format!("{name}{part}_mib"), mib(middle));
            }
        }
    }

    /// Where the pool's bytes go, at this moment.
    fn note_pool(&mut self) -> Result<()> {
        let Some(control) = self.rig.control() else {
            return Ok(());
        };
        let stats = control.stats()?;
        let anatomy = control.call("store.anatomy", Value::Null)?;
        let metadata = anatomy["metadata_bytes"].as_u64();
        let metadata = metadata.context("the daemon does not say what is metadata")?;
        let images = stats.get("compr_data_size")?;
        let held = stats.get("mem_used_total")?;
        // Records that are dead, rounding, and what is taken from the host and not yet filled.
        let rest = held.saturating_sub(images + metadata);
        for (name, bytes) in [
            ("pool_held_mib", held),
            ("pool_images_mib", images),
            ("pool_metadata_mib", metadata),
            ("pool_rest_mib", rest),
        ] {
            self.set(name, mib(number(bytes)));
        }
        self.set("pool_pages", number(stats.get("pages_stored")?));
        Ok(())
    }

    /// What the pool holds for a byte of images of pages that are not in the guest's memory.
    fn pool_vs_needed(&self, away_pages: u64) -> Result<Option<f64>> {
        let Some(control) = self.rig.control() else {
            return Ok(None);
        };
        let stats = control.stats()?;
        let stored = stats.get("pages_stored")?;
        let image = number(stats.get("compr_data_size")?) / number(stored.max(1));
        let needed = image * number(away_pages);
        let held = number(stats.get("mem_used_total")?);
        Ok((needed > 0.0).then(|| held / needed))
    }

    fn instructions(&self) -> Result<Option<u64>> {
        let mut total = None;
        for pace in &self.paces {
            if let Ok(counter) = pace.guest().counter() {
                total = Some(total.unwrap_or(0) + counter.total()?);
            }
        }
        Ok(total)
    }

    fn note_instructions(&mut self, before: Option<u64>, work: u64) -> Result<()> {
        if let Some((before, after)) = before.zip(self.instructions()?) {
            let each = number(after.saturating_sub(before)) / number(work.max(1));
            self.set("guest_insn_per_work", each);
        }
        Ok(())
    }

    /// What is in the guest's memory and in the pool, and how well the guest reads ahead.
    fn note_swap_cache(&mut self, order: &str, away_pages: u64) -> Result<()> {
        const PAGE_KIB: u64 = 4;
        let [mut cached, mut ahead, mut used] = [0, 0, 0];
        for pace in &self.paces {
            let agent = pace.guest().agent()?;
            let vmstat = crate::guest::Named::parse(&agent.read("/proc/vmstat")?);
            let meminfo = crate::guest::Named::parse(&agent.read("/proc/meminfo")?);
            cached += meminfo.get("SwapCached")? / PAGE_KIB;
            ahead += vmstat.get("swap_ra")?;
            used += vmstat.get("swap_ra_hit")?;
        }
        for (name, value) in [
            ("away_pages", away_pages),
            ("swap_cached_pages", cached),
            ("read_ahead_pages", ahead),
            ("read_ahead_used", used),
        ] {
            self.set(format!("{order}_{name}"), number(value));
        }
        Ok(())
    }

    fn note_pages_moved(&mut self) -> Result<()> {
        let (mut out, mut back) = (0, 0);
        for pace in &self.paces {
            let vmstat = pace.guest().agent()?.read("/proc/vmstat")?;
            let vmstat = crate::guest::Named::parse(&vmstat);
            out += vmstat.get("pswpout")? + vmstat.get("zswpout")?;
            back += vmstat.get("pswpin")? + vmstat.get("zswpin")?;
        }
        self.set("pages_out", number(out));
        self.set("pages_in", number(back));
        if let Some(control) = self.rig.control() {
            let stats = control.stats()?;
            for name in ["puts", "gets", "flushes"] {
                self.set(name, number(stats.get(name)?));
            }
            let raw: &Value = &stats.raw;
            if let Some(most) = raw["store"]["mem_used_max"].as_u64() {
                self.set("pool_most_mib", mib(number(most)));
            }
        }
        Ok(())
    }
}

/// The same step in several guests at the same time.
fn together(all: Vec<Done>) -> Done {
    let mut total = Done::default();
    for done in all {
        total.pages += done.pages;
        total.touches += done.touches;
        total.tree_pages += done.tree_pages;
        total.away_pages += done.away_pages;
        total.seconds = total.seconds.max(done.seconds);
        total.times_ns.extend(done.times_ns);
    }
    total
}

fn mib(bytes: f64) -> f64 {
    bytes / f64::from(1 << 20)
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn number(count: u64) -> f64 {
    count as f64
}
