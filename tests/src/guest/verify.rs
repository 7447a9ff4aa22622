// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Real data in the guest's memory, and the proof that it comes back.
//!
//! The guest sums what it read from the corpus; the harness sums the same part
//! of the corpus by itself, so a guest that read wrong data is found as well.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::agent::{JobEvent, JobId};
use super::machine::Guest;
use super::readings::Named;

/// The control group of loads: the one that may be swapped out.
const GROUP: &str = "work";
/// Time for each step of a load of ordinary size, with KVM.
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// How often reclaim is asked to empty the swap cache.
const RECLAIMS: u32 = 20;
/// A swap cache smaller than this counts as empty.
const SWAP_CACHE_KIB: u64 = 1024;
const PAGE: usize = 4096;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE as u64;

/// What is loaded, and how it is read back.
#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Size, over all processes.
    pub mib: u64,
    /// Where in the corpus it begins.
    pub offset_mib: u64,
    /// Processes that share it.
    pub processes: u64,
    /// Orders to read in, separated by commas; see `cram-workload --help`.
    pub passes: String,
    /// Seed of the random orders.
    pub seed: u64,
    /// Pages of each thousand that are changed after the first pass.
    pub rewrite_permille: u64,
    /// Swap everything out before each pass, rather than wait for memory to be short.
    pub pageout: bool,
    /// Let lost pages kill their processes.
    pub die_on_sigbus: bool,
}

impl Default for LoadOptions {
    fn default() -> Self {
        Self {
            mib: 300,
            offset_mib: 0,
            processes: 2,
            passes: "sequential,reverse,random".to_owned(),
            seed: 1,
            rewrite_permille: 100,
            pageout: false,
            die_on_sigbus: false,
        }
    }
}

impl LoadOptions {
    fn common(&self) -> String {
        let mut words = format!(
            "--source /dev/vdc --mib {} --offset-mib {} --processes {}",
            self.mib, self.offset_mib, self.processes
        );
        if self.die_on_sigbus {
            words.push_str(" --die-on-sigbus");
        }
        words
    }

    /// The command that runs the whole load in the guest.
    #[must_use]
    pub fn command(&self) -> String {
        let mut words = format!(
            "exec cram-workload load {} --passes {} --seed {} --rewrite {}",
            self.common(),
            self.passes,
            self.seed,
            self.rewrite_permille
        );
        if self.pageout {
            words.push_str(" --pageout");
        }
        words
    }

    /// Fails unless the guest's sums are those of the corpus itself.
    ///
    /// # Errors
    ///
    /// As it says, or when the corpus cannot be read.
    pub fn check_sums(&self, corpus: &Path, sums: &[String]) -> Result<()> {
        let pages = self.mib * PAGES_PER_MIB;
        let first = self.offset_mib * PAGES_PER_MIB;
        ensure!(
            sums.len() as u64 == self.processes,
            "{} sums of {} processes",
            sums.len(),
            self.processes
        );
        for (number, sum) in (0..).zip(sums) {
            let begin = pages * number / self.processes;
            let end = pages * (number + 1) / self.processes;
            let expected = corpus_sum(corpus, first + begin, end - begin)?;
            ensure!(
                *sum == expected,
                "process {number} loaded other data than the corpus holds"
            );
        }
        Ok(())
    }
}

/// SHA-256 over the SHA-256 of each page of a part of the corpus.
///
/// # Errors
///
/// When the corpus cannot be read.
pub fn corpus_sum(corpus: &Path, first_page: u64, pages: u64) -> Result<String> {
    let file = File::open(corpus).with_context(|| corpus.display().to_string())?;
    let mut whole = Sha256::new();
    let mut page = [0; PAGE];
    for number in first_page..first_page + pages {
        file.read_exact_at(&mut page, number * PAGE as u64)
            .with_context(|| format!("page {number} of {}", corpus.display()))?;
        whole.update(Sha256::digest(page));
    }
    Ok(whole
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect())
}

/// What a finished load reports.
#[derive(Deserialize, Clone, Debug, Default)]
pub struct LoadReport {
    /// Size of the data.
    pub bytes: u64,
    /// Pages read back and compared, over all passes.
    pub pages_verified: u64,
    /// Pages with wrong bytes.
    pub mismatches: u64,
    /// Pages that raised SIGBUS.
    pub lost: u64,
    /// The sum of each process's data, as it was loaded.
    pub sums: Vec<String>,
    /// Each step and its seconds.
    pub steps: Vec<(String, f64)>,
    /// The first wrong pages, in words.
    pub wrong: Vec<String>,
    /// Processes that ended early, and the signal.
    pub died: Vec<(usize, i32)>,
}

impl LoadReport {
    /// Fails unless every page came back as it was.
    ///
    /// # Errors
    ///
    /// As it says.
    pub fn expect_good(&self) -> Result<()> {
        if self.mismatches != 0 || self.lost != 0 || !self.died.is_empty() {
            bail!(
                "{} pages wrong, {} lost, processes ended: {:?}; {}",
                self.mismatches,
                self.lost,
                self.died,
                self.wrong.join("; ")
            );
        }
        ensure!(self.pages_verified > 0, "nothing was verified");
        Ok(())
    }
}

/// What a running load tells.
#[derive(Clone, Debug)]
pub enum LoadEvent {
    /// A step is done: its name and seconds.
    Step(String, f64),
    /// All is done. Whether all is well is for the reader of the report to say.
    Finished(LoadReport),
}

/// A load that runs.
pub struct LoadRun<'a> {
    guest: &'a Guest,
    job: JobId,
    report: Option<LoadReport>,
    complaints: Vec<String>,
}

impl<'a> LoadRun<'a> {
    /// Starts a load.
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn start(guest: &'a Guest, options: &LoadOptions) -> Result<Self> {
        let job = guest.agent()?.start(&options.command(), Some(GROUP))?;
        Ok(Self {
            guest,
            job,
            report: None,
            complaints: Vec::new(),
        })
    }

    /// What it tells next, if it tells something within `limit`.
    ///
    /// # Errors
    ///
    /// When it ends without a report.
    pub fn poll(&mut self, limit: Duration) -> Result<Option<LoadEvent>> {
        while let Some(event) = self.guest.agent()?.poll_event(self.job, limit)? {
            match event {
                JobEvent::Line(line) => {
                    let mut value: Value = serde_json::from_str(&line)?;
                    if let Some(step) = value["step"].as_str() {
                        let seconds = value["answer"]["seconds"].as_f64().unwrap_or_default();
                        return Ok(Some(LoadEvent::Step(step.to_owned(), seconds)));
                    }
                    self.report = Some(serde_json::from_value(value["report"].take())?);
                }
                JobEvent::ErrorLine(line) => self.complaints.push(line),
                JobEvent::End(end) => {
                    let report = self.report.take().with_context(|| {
                        format!(
                            "the load ended with status {:?}, signal {:?}: {}",
                            end.status,
                            end.signal,
                            self.complaints.join("; ")
                        )
                    })?;
                    return Ok(Some(LoadEvent::Finished(report)));
                }
            }
        }
        Ok(None)
    }
}

impl Guest {
    /// Loads, verifies, and checks the sums against the corpus. Every page must come back.
    ///
    /// # Errors
    ///
    /// When one does not, or the guest does not answer.
    pub fn load(&self, options: &LoadOptions) -> Result<LoadReport> {
        let mut run = LoadRun::start(self, options)?;
        let limit = self.patient(STEP_LIMIT);
        loop {
            let event = run.poll(limit)?;
            match event.with_context(|| format!("no step of the load ended within {limit:?}"))? {
                LoadEvent::Step(step, seconds) => log::info!("{step}: {seconds:.1} s"),
                LoadEvent::Finished(report) => {
                    report.expect_good()?;
                    options.check_sums(self.corpus(), &report.sums)?;
                    return Ok(report);
                }
            }
        }
    }
}

/// The answer to one step of a [`Hold`].
#[derive(Deserialize, Clone, Debug)]
pub struct Answer {
    /// Pages loaded, read or changed.
    pub pages: u64,
    /// Pages with wrong bytes.
    pub mismatches: u64,
    /// Pages that raised SIGBUS.
    pub lost: u64,
    /// How long it took.
    pub seconds: f64,
    /// Why it could not be done.
    pub error: Option<String>,
    /// The first wrong pages, in words.
    #[serde(default)]
    pub wrong: Vec<String>,
    /// Sums of the loaded data.
    #[serde(default)]
    pub sums: Vec<String>,
    /// Processes that ended early, and the signal.
    pub died: Vec<(usize, i32)>,
}

impl Answer {
    /// Fails when a page had wrong bytes. Lost pages are allowed.
    ///
    /// # Errors
    ///
    /// As it says.
    pub fn expect_no_wrong_byte(&self) -> Result<()> {
        ensure!(
            self.mismatches == 0,
            "{} pages wrong: {}",
            self.mismatches,
            self.wrong.join("; ")
        );
        Ok(())
    }

    /// Fails unless every page came back as it was.
    ///
    /// # Errors
    ///
    /// As it says.
    pub fn expect_good(&self) -> Result<()> {
        self.expect_no_wrong_byte()?;
        ensure!(self.lost == 0, "{} pages lost", self.lost);
        ensure!(self.died.is_empty(), "processes ended: {:?}", self.died);
        Ok(())
    }
}

/// Data that stays in the guest's memory, verified step by step.
pub struct Hold<'a> {
    guest: &'a Guest,
    job: JobId,
    mib: u64,
}

impl<'a> Hold<'a> {
    /// Loads the data. Only the size, the place and the processes of `options` matter.
    ///
    /// # Errors
    ///
    /// When it cannot be loaded, or is not what the corpus holds.
    pub fn start(guest: &'a Guest, options: &LoadOptions) -> Result<Self> {
        let command = format!("exec cram-workload hold {}", options.common());
        let job = guest.agent()?.start(&command, Some(GROUP))?;
        let mib = options.mib;
        let hold = Self { guest, job, mib };
        let loaded = hold.answer()?;
        options.check_sums(guest.corpus(), &loaded.sums)?;
        Ok(hold)
    }

    fn answer(&self) -> Result<Answer> {
        let limit = self.guest.patient(STEP_LIMIT);
        let line = self.guest.agent()?.next_line(self.job, limit)?;
        let answer: Answer = serde_json::from_str(&line)?;
        if let Some(error) = &answer.error {
            bail!("the load in the guest: {error}");
        }
        Ok(answer)
    }

    fn ask(&self, ask: &Value) -> Result<Answer> {
        let line = format!("{}\n", json!({ "ask": ask }));
        self.guest.agent()?.send(self.job, Some(&line))?;
        self.answer()
    }

    /// Reads every page back in `order` (sequential, reverse, random, stride).
    ///
    /// # Errors
    ///
    /// When the guest does not answer; what came of it is in the answer.
    pub fn verify(&self, order: &str, seed: u64) -> Result<Answer> {
        self.ask(&json!({ "verify": { "order": order, "seed": seed } }))
    }

    /// Changes some pages, so that older copies are out of date.
    ///
    /// # Errors
    ///
    /// When the guest does not answer.
    pub fn rewrite(&self, seed: u64, permille: u64) -> Result<Answer> {
        self.ask(&json!({ "rewrite": { "seed": seed, "permille": permille } }))
    }

    /// Has the kernel swap everything out, and forget the copies that it keeps in the swap cache.
    ///
    /// # Errors
    ///
    /// When the guest does not answer, or keeps what it should let go.
    pub fn page_out(&self) -> Result<Answer> {
        let answer = self.ask(&json!("pageout"))?;
        // What is on its way out stays in the swap cache until reclaim meets it once more.
        let size = self.mib;
        let reclaim = format!("echo {size}M > /sys/fs/cgroup/{GROUP}/memory.reclaim");
        let agent = self.guest.agent()?;
        for _ in 0..RECLAIMS {
            // Asked for more than there is, it ends with EAGAIN.
            agent.exec(&reclaim, None, self.guest.patient(STEP_LIMIT))?;
            let meminfo = Named::parse(&agent.read("/proc/meminfo")?);
            if meminfo.get("SwapCached")? < SWAP_CACHE_KIB {
                return Ok(answer);
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        bail!("the guest keeps its swapped pages in the swap cache")
    }

    /// Lets the data go.
    ///
    /// # Errors
    ///
    /// When the program does not end well.
    pub fn finish(self) -> Result<()> {
        let agent = self.guest.agent()?;
        agent.send(self.job, None)?;
        let end = agent.wait_end(self.job, self.guest.patient(STEP_LIMIT))?;
        ensure!(
            end.good(),
            "the program that held the data ended with {end:?}"
        );
        Ok(())
    }
}
