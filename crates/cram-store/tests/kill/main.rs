// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Killed at any moment, a store loses nothing that it acknowledged.
//!
//! Each round a child process opens the arena that the last one left, loads it
//! from several threads while it is compacted and recompressed, and is killed
//! with SIGKILL after a random time. Before each operation the child writes into
//! a file (the [`board`]) what it is about to do, and after it what came of it.
//! Then this process opens the arena, and every page must be in the state that
//! was acknowledged, or in the one that was about to be.
//!
//! A second test leaves nothing to chance: it steps through a child instruction
//! by instruction (see [`step`]).
//!
//! A program of its own, since it has to be started again as the child.

#![allow(missing_docs, unreachable_pub)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod board;
mod child;
#[path = "../pages/mod.rs"]
mod pages;
mod step;

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use board::{Board, State};
use child::{POOLS, is_small, open, page_for};
use cram_store::{GetResult, ObjectId, PAGE_SIZE, PoolId, Scratch};
use pages::{Random, seed, times};

/// The tests, by name.
const TESTS: [(&str, fn()); 2] = [
    (
        "a_store_that_is_killed_loses_nothing_that_it_acknowledged",
        rounds,
    ),
    (
        "a_store_may_be_killed_at_any_instruction",
        step::every_instruction,
    ),
];
const ROUNDS: u64 = 500;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [what, folder] = &arguments[..] {
        let folder = Path::new(folder);
        match what.as_str() {
            "--child" => return child::run(folder),
            "--stepped-child" => return child::run_script(folder),
            _ => (),
        }
    }
    // As the test harness does: options are not for us, anything else is part of a name.
    let filters: Vec<_> = arguments
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let is_wanted =
        |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(*filter));
    let tests: Vec<_> = TESTS.iter().filter(|(name, _)| is_wanted(name)).collect();
    if arguments.iter().any(|argument| argument == "--list") {
        tests.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    println!("running {} tests", tests.len());
    for (name, test) in &tests {
        test();
        println!("test {name} ... ok");
    }
    println!(
        "\ntest result: ok. {} passed; 0 failed; 0 ignored",
        tests.len()
    );
}

/// The child of one round; killed when this is dropped, whatever happens.
struct Victim(Child);

impl Victim {
    fn start(folder: &Path) -> Self {
        let own = std::env::current_exe().unwrap();
        let mut child = Command::new(own)
            .arg("--child")
            .arg(folder)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It says when it has begun; or it ends, having failed.
        let mut byte = [0];
        let begun = child.stdout.as_mut().unwrap().read(&mut byte).unwrap();
        assert_eq!(begun, 1, "the child failed: {:?}", child.wait());
        Self(child)
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn rounds() {
    let seed = seed();
    let mut random = Random(seed);
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let board = folder.path().join("board");
    Board::make(&board);
    let rounds = times(ROUNDS);
    let (mut pages, mut in_flight) = (0, 0);
    for round in 0..rounds {
        // Every now and then an arena that has had no earlier life.
        if round % 50 == 49 {
            std::fs::remove_file(arena(folder.path())).unwrap();
            Board::make(&board);
        }
        let mut victim = Victim::start(folder.path());
        std::thread::sleep(Duration::from_micros(random.below(40_000)));
        let has_ended = victim.0.try_wait().unwrap();
        assert_eq!(has_ended, None, "the child gave up in round {round}");
        drop(victim);
        let found = verify(
            folder.path(),
            &Board::open(&board),
            &format!("round {round}"),
        );
        pages += found.pages;
        in_flight += found.in_flight;
    }
    println!(
        "{rounds} rounds: {pages} pages verified, {in_flight} operations cut off in the middle"
    );
    assert!(pages > rounds * 50 && in_flight > 0, "it tested nothing");
}

fn arena(folder: &Path) -> PathBuf {
    folder.join("arena")
}

#[derive(Default)]
struct Found {
    pages: u64,
    in_flight: u64,
}

/// Opens the arena in `folder` and compares it with the board, which is brought up to date.
fn verify(folder: &Path, board: &Board, moment: &str) -> Found {
    let began = Instant::now();
    let store = open(folder);
    store
        .check()
        .unwrap_or_else(|error| panic!("{moment}: {error}"));
    let mut found = Found::default();
    let Some(client) = store.client("guest") else {
        let is_empty = |(_, state)| matches!(state, State::Done(0) | State::Between(0, _));
        assert!(
            board.read().into_iter().all(is_empty),
            "{moment}: no client"
        );
        return found;
    };
    let mut scratch = Scratch::new();
    let known = board.read().into_iter();
    for (key, state) in known.filter(|(key, _)| key.thread == 0 || !is_small(folder)) {
        let mut page = [0; PAGE_SIZE];
        let object = ObjectId([u64::from(key.thread), 0, 7]);
        let got = match client.pool(PoolId(key.pool)) {
            Some(pool) => pool.get(object, key.index, &mut page, &mut scratch),
            None => GetResult::Missing,
        };
        let is_one = |version| match got {
            GetResult::Found => version != 0 && page == page_for(&key, version),
            GetResult::Missing => version == 0,
            GetResult::Corrupt => false,
        };
        match state {
            State::Done(version) => {
                let context = || format!("{moment}, {key:?}: version {version}, {got:?}");
                assert!(is_one(version), "{}", context());
            }
            State::Between(before, after) => {
                found.in_flight += 1;
                assert!(
                    is_one(before) || is_one(after),
                    "{moment}, {key:?}: {before} or {after}, {got:?}"
                );
            }
        }
        found.pages += u64::from(got == GetResult::Found);
        // Exclusive gets have taken it out; the board must say so.
        if POOLS[key.pool as usize].1 {
            board.write(&key, State::Done(0));
        } else if let State::Between(before, after) = state {
            let version = if is_one(after) { after } else { before };
            board.write(&key, State::Done(version));
        }
    }
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "opening takes for ever"
    );
    found
}
