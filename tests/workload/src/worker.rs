// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! One process of a load: its part of the data, the sums of it, and the orders
//! that come in over standard input, one JSON object per line, each answered
//! with one line.

use std::fs::File;
use std::io::{BufRead, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{Advice, Mode, OFlags};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::arguments::Arguments;
use crate::order::{Order, mix};
use crate::region::{PAGE, Page, Region, lock_process};

type Sum = [u8; 32];

/// Most wrong pages that are described one by one.
const DESCRIBED: usize = 4;
/// Pages read from the source at once.
pub(crate) const CHUNK_PAGES: usize = 64;

/// What a worker is asked to do.
#[derive(Serialize, Deserialize, Clone, Debug)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Ask {
    /// Fill the region from the source and note the sums.
    Load,
    /// Read every page back and compare.
    Verify {
        /// In which order.
        order: Order,
        /// The order's seed.
        seed: u64,
        /// How many forked children do it at the same time; 0: the worker itself.
        #[serde(default)]
        forks: u32,
    },
    /// Change some of the pages, so that older copies of them are out of date.
    Rewrite {
        /// Which pages, and what they become.
        seed: u64,
        /// How many of each thousand.
        permille: u64,
    },
    /// Have the kernel swap the region out.
    Pageout,
}

/// What came of it. Counts that do not apply are zero.
#[derive(Serialize, Deserialize, Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Pages loaded, read or changed.
    pub(crate) pages: u64,
    /// Pages whose bytes were wrong.
    pub(crate) mismatches: u64,
    /// Pages that the device lost (SIGBUS).
    pub(crate) lost: u64,
    /// How long it took.
    pub(crate) seconds: f64,
    /// SHA-256 over the sums of all pages, after a load.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) sum: String,
    /// The first wrong pages, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) wrong: Vec<String>,
    /// Why it could not be done.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

struct Worker {
    source: File,
    offset_bytes: u64,
    region: Region,
    sums: Vec<Sum>,
}

/// Runs the mode: `worker --source F --offset-page N --pages N [--die-on-sigbus]`.
pub(crate) fn run(words: &[String]) -> Result<ExitCode> {
    let options = ["source", "offset-page", "pages"];
    let given = Arguments::parse(words, &options, &["die-on-sigbus"])?;
    lock_process()?;
    let pages = usize::try_from(given.required_number("pages")?)?;
    let region = Region::map(pages)?;
    if !given.flag("die-on-sigbus") {
        region.catch_lost_pages()?;
    }
    let mut worker = Worker {
        source: open_source(given.required("source")?)?,
        offset_bytes: given.required_number("offset-page")? * PAGE as u64,
        region,
        sums: vec![[0; 32]; pages],
    };
    let input = std::io::stdin().lock();
    let mut output = std::io::stdout().lock();
    for line in input.lines() {
        let outcome = serde_json::from_str(&line?)
            .map_err(anyhow::Error::from)
            .and_then(|ask| worker.answer(&ask))
            .unwrap_or_else(|error| Outcome {
                error: Some(format!("{error:#}")),
                ..Outcome::default()
            });
        serde_json::to_writer(&mut output, &outcome)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Opens the data so that reading it leaves nothing in the page cache, where the
/// file system or device allows it.
pub(crate) fn open_source(path: &str) -> Result<File> {
    let open = |flags| rustix::fs::open(path, flags, Mode::empty());
    let fd: OwnedFd = open(OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC)
        .or_else(|_| open(OFlags::RDONLY | OFlags::CLOEXEC))
        .with_context(|| format!("cannot open {path}"))?;
    Ok(File::from(fd))
}

/// A page-aligned buffer, as direct reading wants it.
#[repr(C, align(4096))]
pub(crate) struct Chunk(pub(crate) [u8; CHUNK_PAGES * PAGE]);

impl Worker {
    fn answer(&mut self, ask: &Ask) -> Result<Outcome> {
        let begin = Instant::now();
        let mut outcome = match *ask {
            Ask::Load => self.load()?,
            Ask::Verify {
                order,
                seed,
                forks: 0,
            } => self.verify(order, seed),
            Ask::Verify { order, seed, forks } => self.verify_forked(order, seed, forks)?,
            Ask::Rewrite { seed, permille } => self.rewrite(seed, permille),
            Ask::Pageout => {
                self.region.page_out()?;
                Outcome::default()
            }
        };
        outcome.seconds = begin.elapsed().as_secs_f64();
        Ok(outcome)
    }

    fn load(&mut self) -> Result<Outcome> {
        let mut chunk = Box::new(Chunk([0; CHUNK_PAGES * PAGE]));
        let pages = self.region.pages();
        for first in (0..pages).step_by(CHUNK_PAGES) {
            let count = CHUNK_PAGES.min(pages - first);
            let bytes = &mut chunk.0[..count * PAGE];
            let at = self.offset_bytes + first as u64 * PAGE as u64;
            self.source
                .read_exact_at(bytes, at)
                .with_context(|| format!("cannot read {} bytes at {at}", bytes.len()))?;
            // Summed here, in locked memory, before any of it can have been swapped.
            for (index, page) in bytes.as_chunks::<PAGE>().0.iter().enumerate() {
                self.sums[first + index] = Sha256::digest(page).into();
                self.region.write(first + index, page);
            }
        }
        // Where direct reading was not to be had: leave no copy of the data in the page cache.
        let length = std::num::NonZeroU64::new(pages as u64 * PAGE as u64);
        let _ = rustix::fs::fadvise(&self.source, self.offset_bytes, length, Advice::DontNeed);
        let mut whole = Sha256::new();
        for sum in &self.sums {
            whole.update(sum);
        }
        Ok(Outcome {
            pages: pages as u64,
            sum: hex(&whole.finalize()),
            ..Outcome::default()
        })
    }

    fn verify(&self, order: Order, seed: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let mut page: Page = [0; PAGE];
        for number in order.pages(self.region.pages() as u64, seed) {
            let Ok(index) = usize::try_from(number) else {
                continue;
            };
            outcome.pages += 1;
            if !self.region.read(index, &mut page) {
                outcome.lost += 1;
                continue;
            }
            let sum: Sum = Sha256::digest(page).into();
            if sum != self.sums[index] {
                outcome.mismatches += 1;
                if outcome.wrong.len() < DESCRIBED {
                    outcome.wrong.push(self.describe(index, &page, &sum));
                }
            }
        }
        outcome
    }

    /// Says what a wrong page holds instead: that is most of the way to the mistake.
    fn describe(&self, index: usize, page: &Page, sum: &Sum) -> String {
        let what = if page.iter().all(|&byte| byte == page[0]) {
            format!("is filled with {:#04x}", page[0])
        } else if let Some(other) = self.sums.iter().position(|known| known == sum) {
            format!("holds the bytes of page {other}")
        } else {
            format!("holds unknown bytes, beginning {}", hex(&page[..16]))
        };
        let address = self.region.address_of(index);
        format!("page {index} at {address:#x} {what}")
    }

    /// Several children read the same pages at the same time, so that they meet in the swap cache.
    fn verify_forked(&self, order: Order, seed: u64, forks: u32) -> Result<Outcome> {
        let mut children = Vec::new();
        for child in 0..forks {
            let (mut reader, writer) = std::io::pipe()?;
            // SAFETY: a worker has a single thread, so the child may go on as the parent would.
            let pid = unsafe { libc::fork() };
            match pid {
                -1 => bail!("fork: {}", std::io::Error::last_os_error()),
                0 => {
                    let outcome = self.verify(order, mix(seed ^ u64::from(child)));
                    let told = serde_json::to_writer(writer, &outcome).is_ok();
                    // SAFETY: the child ends here, without running the parent's clean-up.
                    unsafe { libc::_exit(i32::from(!told)) }
                }
                _ => {
                    drop(writer);
                    children.push((pid, move || {
                        let mut text = String::new();
                        reader.read_to_string(&mut text).map(|_| text)
                    }));
                }
            }
        }
        let mut total = Outcome::default();
        for (pid, mut read) in children {
            let text = read()?;
            let mut status = 0;
            // SAFETY: `status` is a valid place for the result, and `pid` is a child of this process.
            let waited = unsafe { libc::waitpid(pid, &mut status, 0) };
            ensure!(waited == pid && status == 0, "child ended with {status:#x}");
            total.add(serde_json::from_str(&text)?);
        }
        Ok(total)
    }

    fn rewrite(&mut self, seed: u64, permille: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let mut page: Page = [0; PAGE];
        for index in 0..self.region.pages() {
            let draw = mix(seed ^ index as u64);
            if draw % 1000 >= permille {
                continue;
            }
            // Whether the old bytes were there is the business of `verify`; here they are only material.
            self.region.read(index, &mut page);
            for (place, salt) in page.chunks_exact_mut(512).zip(0..) {
                place[..8].copy_from_slice(&mix(draw ^ salt).to_le_bytes());
            }
            self.sums[index] = Sha256::digest(page).into();
            self.region.write(index, &page);
            outcome.pages += 1;
        }
        outcome
    }
}

impl Outcome {
    /// Adds another process's outcome to this one; the times overlap, so the longest counts.
    pub(crate) fn add(&mut self, other: Outcome) {
        self.pages += other.pages;
        self.mismatches += other.mismatches;
        self.lost += other.lost;
        self.seconds = self.seconds.max(other.seconds);
        self.wrong.extend(other.wrong);
        if self.error.is_none() {
            self.error = other.error;
        }
    }
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
