//! What is killed.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cram_store::{
    Backing, Client, GetResult, ObjectId, PAGE_SIZE, Page, Pool, PoolId, PoolKind, PoolSpec,
    PutResult, Scratch, Store, StoreConfig,
};

use crate::board::{Board, INDEXES, Key, State, THREADS};
use crate::pages::{Content, Random, config_of, page_of, some_content};

/// The pools: of which kind, and whether a get takes the page out.
pub const POOLS: [(PoolKind, bool); 2] = [
    (PoolKind::Persistent, false),
    (PoolKind::PrivateEphemeral, true),
];

/// Room for everything: a refused or evicted page would be no loss, and prove nothing.
const CAPACITY_BYTES: u64 = 16 << 20;
/// For the child that is stepped through: as little as there can be, since it is compared and copied
/// at each step.
const SMALL_CAPACITY_BYTES: u64 = 256 << 10;

/// Whether a folder is that of a child that is stepped through.
pub fn is_small(folder: &Path) -> bool {
    folder.join("small").exists()
}

pub fn open(folder: &Path) -> Arc<Store> {
    Store::new(StoreConfig {
        backing: Backing::File(folder.join("arena")),
        ..config_of(if is_small(folder) {
            SMALL_CAPACITY_BYTES
        } else {
            CAPACITY_BYTES
        })
    })
    .unwrap()
}

/// The bytes of a page's version. Some versions of different pages are the same.
pub fn page_for(key: &Key, version: u64) -> Page {
    // Versions of the script are small.
    if version < 1 << 32 {
        return script_page(version % 100, version);
    }
    let own = version.wrapping_mul(0x9e37_79b9_7f4a_7c15)
        ^ (u64::from(key.pool) << 24 | u64::from(key.thread) << 16 | u64::from(key.index));
    let number = if version.is_multiple_of(4) {
        1000 + version % 7
    } else {
        own
    };
    page_of(some_content(number), number)
}

fn guest(store: &Store) -> Arc<Client> {
    let client = match store.client("guest") {
        Some(client) => client,
        None => store.add_client("guest", None).unwrap(),
    };
    for (id, (kind, _)) in (0..).zip(POOLS) {
        let spec = PoolSpec {
            kind,
            refuse_incompressible: false,
        };
        client.new_pool(PoolId(id), spec).unwrap();
    }
    client
}

pub fn run(folder: &Path) {
    let store = open(folder);
    let client = guest(&store);
    let mut out = std::io::stdout();
    out.write_all(b"!").and_then(|()| out.flush()).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let board = Board::open(&folder.join("board"));
            let pools = [0, 1].map(|id| client.pool(PoolId(id)).unwrap());
            scope.spawn(move || load(thread, &board, &pools));
        }
        loop {
            store.compact();
            store.recompress(Duration::ZERO);
        }
    });
}

/// A number that no page had before, in this process or an earlier one: an older copy that came back
/// would be known by it.
fn new_version() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    since.as_nanos() as u64
}

/// Does one of everything, once. Stops itself before, and when all is done.
pub fn run_script(folder: &Path) {
    let board = Board::open(&folder.join("board"));
    let mut scratch = Scratch::new();
    // What is allocated once is no part of what is to be seen.
    let _ = scratch_is_warm(&mut scratch);
    stop();
    let store = open(folder);
    let client = guest(&store);
    let pools = [0, 1].map(|id| client.pool(PoolId(id)).unwrap());
    let mut script = Script {
        board,
        pools,
        scratch,
        version: 0,
    };
    for pool in [0, 1] {
        script.put(pool, 0, 1);
        // Another one; longer, one word, none that compresses.
        for content in [1, 5, 0, 64] {
            script.put(pool, 1, content);
        }
        script.flush(pool, 1);
        script.get(pool, 0);
    }
    // The same page three times over, and one after the other something else.
    script.version += 1;
    for index in 10..13 {
        script.put_version(0, index, script.version * 100 + 5);
    }
    for index in 10..12 {
        script.put(0, index, 2);
    }
    store.compact();
    if std::env::var_os("CRAM_LONG").is_some() {
        store.recompress(Duration::ZERO);
    }
    for index in 0..16 {
        script.flush(0, index);
    }
    stop();
}

/// Has all code and memory of a put in place.
fn scratch_is_warm(scratch: &mut Scratch) -> PutResult {
    let store = Store::new(config_of(SMALL_CAPACITY_BYTES)).unwrap();
    let pool = guest(&store).pool(PoolId(0)).unwrap();
    pool.put(ObjectId([0; 3]), 0, &script_page(3, 7), scratch)
}

fn stop() {
    nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).unwrap();
}

/// The bytes of a version in the script: its last two digits say how much of it does not compress,
/// in 64ths. Little, mostly, since every instruction of the codec is stepped through.
pub fn script_page(share: u64, version: u64) -> Page {
    let content = match share {
        0 => Content::Filled,
        64 => Content::Noise,
        share => Content::Packs(share as u8),
    };
    page_of(content, version)
}

struct Script {
    board: Board,
    pools: [Arc<Pool>; 2],
    scratch: Scratch,
    version: u64,
}

impl Script {
    fn put(&mut self, pool: u32, index: u32, share: u64) {
        self.version += 1;
        self.put_version(pool, index, self.version * 100 + share);
    }

    fn put_version(&mut self, pool: u32, index: u32, version: u64) {
        let (key, before) = self.look(pool, index);
        self.board.write(&key, State::Between(before, version));
        let page = script_page(version % 100, version);
        let pool = &self.pools[pool as usize];
        let put = pool.put(OBJECT, index, &page, &mut self.scratch);
        assert_eq!(put, PutResult::Stored);
        self.board.write(&key, State::Done(version));
    }

    fn get(&mut self, pool: u32, index: u32) {
        let (key, before) = self.look(pool, index);
        let after = if POOLS[pool as usize].1 { 0 } else { before };
        self.board.write(&key, State::Between(before, after));
        let mut page = [0; PAGE_SIZE];
        let pool = &self.pools[pool as usize];
        let got = pool.get(OBJECT, index, &mut page, &mut self.scratch);
        assert_eq!(got, GetResult::Found);
        self.board.write(&key, State::Done(after));
    }

    fn flush(&mut self, pool: u32, index: u32) {
        let (key, before) = self.look(pool, index);
        self.board.write(&key, State::Between(before, 0));
        self.pools[pool as usize].flush_page(OBJECT, index, 1);
        self.board.write(&key, State::Done(0));
    }

    fn look(&self, pool: u32, index: u32) -> (Key, u64) {
        let key = Key {
            pool,
            thread: 0,
            index,
        };
        match self.board.state(&key) {
            State::Done(version) => (key, version),
            State::Between(..) => panic!("{key:?} is under way already"),
        }
    }
}

/// The only object of the script.
const OBJECT: ObjectId = ObjectId([0, 0, 7]);

/// Puts, gets and flushes pages of its own, for ever.
fn load(thread: u32, board: &Board, pools: &[Arc<Pool>; 2]) -> ! {
    // Another course each time, wherever the last one ended.
    let mut random = Random(std::process::id().into());
    (0..=thread).for_each(|_| _ = random.below(2));
    let mut scratch = Scratch::new();
    let object = ObjectId([u64::from(thread), 0, 7]);
    let mut page = [0; PAGE_SIZE];
    loop {
        let key = Key {
            pool: random.below(2) as u32,
            thread,
            index: random.below(u64::from(INDEXES)) as u32,
        };
        let State::Done(before) = board.state(&key) else {
            panic!("{key:?} is under way already");
        };
        let pool = &pools[key.pool as usize];
        let is_exclusive = POOLS[key.pool as usize].1;
        match random.below(10) {
            0..6 => {
                let version = new_version();
                board.write(&key, State::Between(before, version));
                let put = pool.put(object, key.index, &page_for(&key, version), &mut scratch);
                assert_eq!(put, PutResult::Stored);
                board.write(&key, State::Done(version));
            }
            6..8 => {
                let after = if is_exclusive { 0 } else { before };
                board.write(&key, State::Between(before, after));
                let got = pool.get(object, key.index, &mut page, &mut scratch);
                match got {
                    GetResult::Found => assert!(page == page_for(&key, before), "{key:?}"),
                    GetResult::Missing => assert_eq!(before, 0, "{key:?}"),
                    GetResult::Corrupt => panic!("{key:?} is corrupt"),
                }
                board.write(&key, State::Done(after));
            }
            _ => {
                board.write(&key, State::Between(before, 0));
                let flushed = pool.flush_page(object, key.index, 1);
                assert_eq!(flushed, u64::from(before != 0), "{key:?}");
                board.write(&key, State::Done(0));
            }
        }
    }
}
