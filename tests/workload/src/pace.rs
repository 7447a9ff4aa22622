// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `pace`: real data in memory, and work on a part of it for a while.
//!
//! Work is touches at random, each of one word, which is compared with what it should be; a pass
//! reads whole pages and compares their sums. Both take the time of touches. What is to be done
//! comes in over standard input, one JSON object per line, each answered with one line.

use std::fs::File;
use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::arguments::Arguments;
use crate::order::{Order, mix};
use crate::region::{PAGE, Page, Region, lock_process};
use crate::times::Times;
use crate::worker::{CHUNK_PAGES, Chunk, hex, open_source};

const WORDS: u64 = (PAGE / 8) as u64;
const PAGES_PER_MIB: u64 = (1 << 20) / PAGE as u64;
/// Touches between two looks at the clock.
const BURST: u64 = 32;
/// Pages of the tree that are read in between.
const TREE_BURST: usize = 32;
/// One touch in so many is timed, since looking at the clock costs as much as a touch.
const TIMED: u64 = 8;
/// Most wrong pages that are described.
const DESCRIBED: usize = 4;

/// What can be asked.
#[derive(Deserialize, Debug)]
#[serde(rename_all = "snake_case")]
enum Ask {
    /// Fill the memory from the source.
    Fill {
        /// Pages of each thousand that become unlike those of others with another seed.
        #[serde(default)]
        stamp_permille: u64,
        #[serde(default)]
        seed: u64,
    },
    /// Take note of the files that [`Ask::Work`] reads: a part of the source.
    Tree { offset_mib: u64, mib: u64 },
    /// Read and compare every page once.
    Pass { order: Order, seed: u64 },
    /// Touch pages of a part of the memory at random.
    Work {
        first: usize,
        pages: usize,
        seconds: f64,
        seed: u64,
        /// Touches of each thousand that write.
        #[serde(default)]
        write_permille: u64,
        /// Read the tree between the touches, again and again.
        #[serde(default)]
        with_tree: bool,
    },
}

/// What came of it.
#[derive(Serialize, Default, Debug)]
struct Done {
    pages: u64,
    touches: u64,
    tree_pages: u64,
    mismatches: u64,
    lost: u64,
    seconds: f64,
    /// SHA-256 over the sums of the pages as they were read from the source, after a fill.
    sum: String,
    /// How many touches took how many nanoseconds.
    times_ns: Vec<(u64, u32)>,
    /// Pages of the memory that are not in the guest's memory.
    away_pages: u64,
    wrong: Vec<String>,
    error: Option<String>,
}

/// What a page should be.
#[derive(Clone, Copy, Default)]
struct Known {
    /// The beginning of its SHA-256 as it was filled.
    sum: [u8; 16],
    /// The word that is touched, as it was filled.
    word: u64,
    /// How often that was written since.
    writes: u32,
}

impl Known {
    fn of(page: &Page, place: usize) -> Self {
        Self {
            sum: sum_of(page),
            word: word_at(page, place),
            writes: 0,
        }
    }

    /// What the touched word is now.
    fn expected(&self) -> u64 {
        match self.writes {
            0 => self.word,
            writes => self.word ^ mix(u64::from(writes)),
        }
    }
}

struct Pace {
    source: File,
    offset_bytes: u64,
    region: Region,
    known: Vec<Known>,
    tree: Tree,
}

/// Files that are read through the page cache.
#[derive(Default)]
struct Tree {
    file: Option<File>,
    offset_bytes: u64,
    sums: Vec<[u8; 16]>,
    next: usize,
}

/// Runs the mode.
pub(crate) fn run(words: &[String]) -> Result<ExitCode> {
    let given = Arguments::parse(words, &["source", "offset-mib", "mib"], &[])?;
    lock_process()?;
    let pages = usize::try_from(given.required_number("mib")? * PAGES_PER_MIB)?;
    let region = Region::map(pages)?;
    region.catch_lost_pages()?;
    let source = given.required("source")?;
    let mut pace = Pace {
        source: open_source(source)?,
        offset_bytes: given.number_or("offset-mib", 0)? << 20,
        region,
        known: vec![Known::default(); pages],
        tree: Tree::default(),
    };
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let done = serde_json::from_str(&line?)
            .map_err(anyhow::Error::from)
            .and_then(|ask| pace.answer(ask, source))
            .unwrap_or_else(|error| Done {
                error: Some(format!("{error:#}")),
                ..Done::default()
            });
        serde_json::to_writer(&mut output, &done)?;
        output.write_all(b"\n")?;
        output.flush()?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Pace {
    fn answer(&mut self, ask: Ask, source: &str) -> Result<Done> {
        let began = Instant::now();
        let mut done = match ask {
            Ask::Fill {
                stamp_permille,
                seed,
            } => self.fill(stamp_permille, seed)?,
            Ask::Tree { offset_mib, mib } => self.note_tree(source, offset_mib, mib)?,
            Ask::Pass { order, seed } => self.pass(order, seed),
            Ask::Work {
                first,
                pages,
                seconds,
                seed,
                write_permille,
                with_tree,
            } => {
                let end = first.checked_add(pages);
                let end = end.filter(|end| *end <= self.region.pages() && pages > 0);
                end.context("a part that is not in the memory")?;
                let part = Part { first, pages };
                let limit = Duration::try_from_secs_f64(seconds)?;
                self.work(&part, limit, seed, write_permille, with_tree)?
            }
        };
        done.seconds = began.elapsed().as_secs_f64();
        done.away_pages = self.region.away_pages()?;
        Ok(done)
    }

    fn fill(&mut self, stamp_permille: u64, seed: u64) -> Result<Done> {
        let mut chunk = Box::new(Chunk([0; CHUNK_PAGES * PAGE]));
        let mut whole = Sha256::new();
        let pages = self.region.pages();
        for first in (0..pages).step_by(CHUNK_PAGES) {
            let count = CHUNK_PAGES.min(pages - first);
            let bytes = &mut chunk.0[..count * PAGE];
            let at = self.offset_bytes + first as u64 * PAGE as u64;
            self.source
                .read_exact_at(bytes, at)
                .with_context(|| format!("cannot read {} bytes at {at}", bytes.len()))?;
            for (index, page) in (first..).zip(bytes.as_chunks_mut::<PAGE>().0) {
                whole.update(Sha256::digest(&page[..]));
                let draw = mix(seed ^ mix(index as u64));
                if draw % 1000 < stamp_permille {
                    stamp(page, draw);
                }
                self.known[index] = Known::of(page, place_in(index));
                self.region.write(index, page);
            }
        }
        Ok(Done {
            pages: pages as u64,
            sum: hex(&whole.finalize()),
            ..Done::default()
        })
    }

    fn note_tree(&mut self, source: &str, offset_mib: u64, mib: u64) -> Result<Done> {
        let pages = usize::try_from(mib * PAGES_PER_MIB)?;
        ensure!(pages > 0, "a tree without pages");
        let mut chunk = Box::new(Chunk([0; CHUNK_PAGES * PAGE]));
        let mut sums = Vec::with_capacity(pages);
        while sums.len() < pages {
            let count = CHUNK_PAGES.min(pages - sums.len());
            let bytes = &mut chunk.0[..count * PAGE];
            let at = (offset_mib << 20) + (sums.len() * PAGE) as u64;
            self.source.read_exact_at(bytes, at)?;
            sums.extend(bytes.as_chunks::<PAGE>().0.iter().map(sum_of));
        }
        self.tree = Tree {
            file: Some(File::open(source).with_context(|| format!("cannot open {source}"))?),
            offset_bytes: offset_mib << 20,
            sums,
            next: 0,
        };
        Ok(Done {
            pages: pages as u64,
            ..Done::default()
        })
    }

    fn pass(&self, order: Order, seed: u64) -> Done {
        let mut done = Done::default();
        let mut times = Times::new();
        let mut page: Page = [0; PAGE];
        for number in order.pages(self.region.pages() as u64, seed) {
            let Ok(index) = usize::try_from(number) else {
                continue;
            };
            let began = Instant::now();
            let is_there = self.region.read(index, &mut page);
            times.note(began.elapsed());
            done.pages += 1;
            if !is_there {
                done.lost += 1;
                continue;
            }
            let place = place_in(index);
            let found = word_at(&page, place);
            // As it was filled, so that its sum is what it was then.
            page[place * 8..][..8].copy_from_slice(&self.known[index].word.to_le_bytes());
            if found != self.known[index].expected() || sum_of(&page) != self.known[index].sum {
                done.wrong(&format!("page {index} holds other bytes"));
            }
        }
        done.times_ns = times.counts();
        done
    }

    fn work(
        &mut self,
        part: &Part,
        limit: Duration,
        seed: u64,
        write_permille: u64,
        with_tree: bool,
    ) -> Result<Done> {
        let mut done = Done::default();
        let mut times = Times::new();
        let mut chunk = Box::new(Chunk([0; CHUNK_PAGES * PAGE]));
        let mut state = mix(seed);
        let began = Instant::now();
        while began.elapsed() < limit {
            if with_tree {
                self.tree.read_some(&mut chunk, &mut done)?;
            }
            for touch in 0..BURST {
                state = mix(state);
                let index = part.first + usize::try_from(state % part.pages as u64)?;
                let is_write = mix(state) % 1000 < write_permille;
                if touch % TIMED == 0 {
                    let began = Instant::now();
                    self.touch(index, is_write, &mut done);
                    times.note(began.elapsed());
                } else {
                    self.touch(index, is_write, &mut done);
                }
            }
            done.touches += BURST;
        }
        done.times_ns = times.counts();
        Ok(done)
    }

    fn touch(&mut self, index: usize, is_write: bool, done: &mut Done) {
        let place = place_in(index);
        let known = &mut self.known[index];
        match self.region.read_word(index, place) {
            None => done.lost += 1,
            Some(word) if word != known.expected() => {
                done.wrong(&format!("word {place} of page {index} is {word:#x}"));
            }
            Some(_) if is_write => {
                known.writes = known.writes.wrapping_add(1);
                self.region.write_word(index, place, known.expected());
            }
            Some(_) => {}
        }
    }
}

/// Pages that are worked on.
struct Part {
    first: usize,
    pages: usize,
}

impl Tree {
    /// Reads the next pages as programs do, and compares them.
    fn read_some(&mut self, chunk: &mut Chunk, done: &mut Done) -> Result<()> {
        let Some(file) = &self.file else {
            bail!("there is no tree to read")
        };
        let left = self.sums.get(self.next..).unwrap_or_default();
        let sums = &left[..left.len().min(TREE_BURST)];
        let bytes = &mut chunk.0[..sums.len() * PAGE];
        file.read_exact_at(bytes, self.offset_bytes + (self.next * PAGE) as u64)?;
        for (page, sum) in bytes.as_chunks::<PAGE>().0.iter().zip(sums) {
            if sum_of(page) != *sum {
                done.wrong("a page of the tree holds other bytes");
            }
        }
        done.tree_pages += sums.len() as u64;
        self.next += sums.len();
        if self.next >= self.sums.len() {
            self.next = 0;
        }
        Ok(())
    }
}

impl Done {
    fn wrong(&mut self, what: &str) {
        self.mismatches += 1;
        if self.wrong.len() < DESCRIBED {
            self.wrong.push(what.to_owned());
        }
    }
}

/// The word of a page that is touched.
fn place_in(index: usize) -> usize {
    usize::try_from(mix(index as u64) % WORDS).unwrap_or(0)
}

fn word_at(page: &Page, place: usize) -> u64 {
    let words = page.as_chunks::<8>().0;
    words.get(place).copied().map_or(0, u64::from_le_bytes)
}

fn sum_of(page: &Page) -> [u8; 16] {
    let whole: [u8; 32] = Sha256::digest(page).into();
    let mut sum = [0; 16];
    sum.copy_from_slice(&whole[..16]);
    sum
}

/// Makes a page unlike its twins, though still much like itself.
fn stamp(page: &mut Page, draw: u64) {
    for (place, salt) in page.chunks_exact_mut(512).zip(0..) {
        place[..8].copy_from_slice(&mix(draw ^ salt).to_le_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_written_word_is_known_and_a_wrong_one_is_found() {
        let mut file = tempfile::tempfile().unwrap();
        let data: Vec<u8> = (0..8 * PAGE)
            .map(|at| mix(at as u64).to_le_bytes()[0])
            .collect();
        file.write_all(&data).unwrap();
        let mut pace = Pace {
            source: file,
            offset_bytes: 0,
            region: Region::map(8).unwrap(),
            known: vec![Known::default(); 8],
            tree: Tree::default(),
        };
        pace.fill(500, 3).unwrap();
        let part = Part { first: 0, pages: 8 };
        let limit = Duration::from_millis(20);
        let done = pace.work(&part, limit, 1, 300, false).unwrap();
        assert!(done.touches >= BURST && done.mismatches == 0);
        assert!(pace.known.iter().any(|known| known.writes > 0));
        assert_eq!(pace.pass(Order::Random, 1).mismatches, 0);
        let word = pace.region.read_word(5, 7).unwrap();
        pace.region.write_word(5, 7, word ^ 1);
        let done = pace.pass(Order::Sequential, 1);
        assert_eq!((done.pages, done.mismatches), (8, 1));
        assert_eq!(done.times_ns.iter().map(|(_, count)| count).sum::<u32>(), 8);
    }

    #[test]
    fn what_is_asked_for_is_understood() {
        let line = r#"{"work":{"first":4,"pages":8,"seconds":0.5,"seed":1}}"#;
        assert!(matches!(
            serde_json::from_str(line).unwrap(),
            Ask::Work {
                first: 4,
                write_permille: 0,
                with_tree: false,
                ..
            }
        ));
        let line = r#"{"fill":{}}"#;
        assert!(matches!(
            serde_json::from_str(line).unwrap(),
            Ask::Fill { seed: 0, .. }
        ));
    }
}
