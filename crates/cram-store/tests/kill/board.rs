//! What a child was about to do with each page, and what came of it: a file of two numbers for each.
//! What was written to a file is there also when the writer was killed.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// A page of the test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    pub pool: u32,
    pub thread: u32,
    pub index: u32,
}

pub const POOLS: u32 = 2;
pub const THREADS: u32 = 3;
pub const INDEXES: u32 = 200;

impl Key {
    fn at(&self) -> u64 {
        let number = (self.pool * THREADS + self.thread) * INDEXES + self.index;
        u64::from(number) * 16
    }
}

/// Versions of a page; 0: it is not there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Acknowledged.
    Done(u64),
    /// An operation that leads from the first to the second is under way.
    Between(u64, u64),
}

pub struct Board(File);

impl Board {
    /// A board on which no page is there.
    pub fn make(path: &Path) {
        let len = u64::from(POOLS * THREADS * INDEXES) * 16;
        let file = File::create(path).unwrap();
        file.set_len(len).unwrap();
    }

    pub fn open(path: &Path) -> Self {
        Self(
            OpenOptions::new()
                .read(true)
                .write(true)
                .open(path)
                .unwrap(),
        )
    }

    pub fn write(&self, key: &Key, state: State) {
        let (before, after) = match state {
            State::Done(version) => (version, version),
            State::Between(before, after) => (before, after),
        };
        // In this order: when an operation begins, only the second changes; when it is done, the
        // first follows.
        self.0
            .write_all_at(&after.to_le_bytes(), key.at() + 8)
            .unwrap();
        self.0
            .write_all_at(&before.to_le_bytes(), key.at())
            .unwrap();
    }

    pub fn state(&self, key: &Key) -> State {
        let mut bytes = [0; 16];
        self.0.read_exact_at(&mut bytes, key.at()).unwrap();
        state_of(&bytes)
    }

    pub fn read(&self) -> Vec<(Key, State)> {
        let mut bytes = vec![0; (POOLS * THREADS * INDEXES) as usize * 16];
        self.0.read_exact_at(&mut bytes, 0).unwrap();
        let keys = (0..POOLS).flat_map(|pool| {
            (0..THREADS).flat_map(move |thread| {
                (0..INDEXES).map(move |index| Key {
                    pool,
                    thread,
                    index,
                })
            })
        });
        keys.zip(bytes.as_chunks::<16>().0)
            .map(|(key, bytes)| (key, state_of(bytes)))
            .collect()
    }
}

fn state_of(bytes: &[u8; 16]) -> State {
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    match (word(0), word(8)) {
        (before, after) if before == after => State::Done(after),
        (before, after) => State::Between(before, after),
    }
}
