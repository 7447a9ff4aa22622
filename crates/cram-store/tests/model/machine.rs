// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A store and the plain map that it must agree with. The property test runs it with operations that
//! proptest draws, the fuzz target with those that the fuzzer makes.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use cram_store::{
    Backing, Client, GetResult, NoPool, ObjectId, PAGE_SIZE, Page, PoolError, PoolId, PoolKind,
    PoolSpec, PutResult, Refusal, Scratch, Store, StoreConfig,
};

use crate::pages::{Content, config_of, page_of};

const CAPACITY_BYTES: u64 = 512 << 10;
const UUID: [u8; 16] = [9; 16];
const KINDS: [PoolKind; 3] = [
    PoolKind::Persistent,
    PoolKind::PrivateEphemeral,
    PoolKind::SharedEphemeral { uuid: UUID },
];
/// The quota of the second client; the first has none, until an operation sets one.
pub const QUOTA_BYTES: u64 = 200 << 10;

/// A pool: which client's, and which of [`KINDS`], which is also its id.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub struct Which {
    pub client: usize,
    pub pool: usize,
}

#[derive(Debug, Clone)]
#[cfg_attr(fuzzing, derive(arbitrary::Arbitrary))]
pub enum Operation {
    Put {
        at: Which,
        object: u64,
        first: u32,
        count: u32,
        content: Content,
    },
    Get {
        at: Which,
        object: u64,
        index: u32,
    },
    FlushPage {
        at: Which,
        object: u64,
        first: u32,
        count: u64,
    },
    FlushObject {
        at: Which,
        object: u64,
    },
    NewPool {
        at: Which,
    },
    DestroyPool {
        at: Which,
    },
    Freeze {
        client: usize,
        is_frozen: bool,
    },
    SetQuota {
        client: usize,
        quota: Option<u64>,
    },
    Evict {
        client: usize,
        bytes: u64,
    },
    Compact,
    Recompress,
    Reopen,
}

#[cfg(fuzzing)]
impl Operation {
    /// With numbers of the range that the model has clients, pools and objects of.
    pub fn confined(mut self) -> Self {
        let confine = |at: &mut Which| {
            at.client %= 2;
            at.pool %= 3;
        };
        match &mut self {
            Self::Put {
                at,
                object,
                first,
                count,
                ..
            } => {
                confine(at);
                *object %= 3;
                *first = small(*first);
                *count = *count % 40 + 1;
            }
            Self::Get { at, object, index } => {
                confine(at);
                *object %= 3;
                *index = small(*index);
            }
            Self::FlushPage {
                at, object, first, ..
            } => {
                confine(at);
                *object %= 3;
                *first = small(*first);
            }
            Self::FlushObject { at, object } => {
                confine(at);
                *object %= 3;
            }
            Self::NewPool { at } | Self::DestroyPool { at } => confine(at),
            Self::Freeze { client, .. } => *client %= 2,
            Self::SetQuota { client, quota } => {
                *client %= 2;
                *quota = quota.map(|quota| quota % QUOTA_BYTES);
            }
            Self::Evict { client, bytes } => {
                *client %= 2;
                *bytes %= QUOTA_BYTES;
            }
            Self::Compact | Self::Recompress | Self::Reopen => (),
        }
        self
    }
}

/// Mostly small, so that operations meet.
#[cfg(fuzzing)]
fn small(index: u32) -> u32 {
    if index.is_multiple_of(8) {
        index
    } else {
        index % 200
    }
}

/// A page in the model: how to make it again.
type Made = (Content, u64);

/// What is gone while a store is opened again.
struct Opened {
    store: Arc<Store>,
    clients: [Arc<Client>; 2],
}

pub struct Model {
    opened: Option<Opened>,
    folder: tempfile::TempDir,
    is_open: [[bool; 3]; 2],
    is_frozen: [bool; 2],
    quota: [Option<u64>; 2],
    /// By space (0 to 3 private, 4 shared), object and index.
    pages: HashMap<(usize, u64, u32), Made>,
    next_number: u64,
    scratch: Scratch,
}

fn space_of(at: Which) -> usize {
    if at.pool == 2 {
        4
    } else {
        at.client * 2 + at.pool
    }
}

fn id_of(at: Which) -> PoolId {
    PoolId(u32::try_from(at.pool).unwrap())
}

fn object_of(object: u64) -> ObjectId {
    ObjectId([object, 0, object])
}

impl Model {
    /// `is_grouped`: both clients store equal pages once, together.
    pub fn new(is_grouped: bool) -> Self {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let store = Self::open(&folder);
        let add = |name: &str, quota| match is_grouped {
            true => store.add_client_to_group(name, quota, "both").unwrap(),
            false => store.add_client(name, quota).unwrap(),
        };
        let clients = [add("first", None), add("second", Some(QUOTA_BYTES))];
        let mut model = Self {
            opened: Some(Opened { store, clients }),
            folder,
            is_open: [[false; 3]; 2],
            is_frozen: [false; 2],
            quota: [None, Some(QUOTA_BYTES)],
            pages: HashMap::new(),
            next_number: 0,
            scratch: Scratch::new(),
        };
        for client in 0..2 {
            model.client(client).authorise(UUID);
            for pool in 0..3 {
                model.new_pool(Which { client, pool });
            }
        }
        model
    }

    fn open(folder: &tempfile::TempDir) -> Arc<Store> {
        let backing = Backing::File(folder.path().join("arena"));
        Store::new(StoreConfig {
            backing,
            ..config_of(CAPACITY_BYTES)
        })
        .unwrap()
    }

    fn reopen(&mut self) {
        let before = self.store().stats();
        let generation = self.store().generation();
        self.opened = None;
        let store = Self::open(&self.folder);
        assert_eq!(store.generation(), generation);
        assert_eq!(store.recovery().discarded, 0);
        let after = store.stats();
        assert_eq!(
            (
                before.pages_stored,
                before.compr_data_size,
                before.pages_shared
            ),
            (
                after.pages_stored,
                after.compr_data_size,
                after.pages_shared
            )
        );
        let clients = ["first", "second"].map(|name| store.client(name).unwrap());
        self.opened = Some(Opened { store, clients });
        // What the operator decides is the operator's to say again.
        for client in 0..2 {
            self.client(client).authorise(UUID);
            self.client(client).freeze(self.is_frozen[client]);
            self.client(client).set_quota(self.quota[client]);
        }
    }

    fn store(&self) -> &Arc<Store> {
        &self.opened.as_ref().unwrap().store
    }

    fn client(&self, client: usize) -> Arc<Client> {
        self.opened.as_ref().unwrap().clients[client].clone()
    }

    fn is_persistent(space: usize) -> bool {
        space == 0 || space == 2
    }

    fn new_pool(&mut self, at: Which) {
        let spec = PoolSpec {
            kind: KINDS[at.pool],
            refuse_incompressible: at.client == 1,
        };
        let client = self.client(at.client);
        let is_open = &mut self.is_open[at.client][at.pool];
        match client.new_pool(id_of(at), spec) {
            Ok(pages) => {
                let space = space_of(at);
                let expected = self.pages.keys().filter(|key| key.0 == space).count() as u64;
                assert!(pages <= expected);
                assert!(!Self::is_persistent(space) || pages == expected);
                *is_open = true;
                let other = PoolSpec {
                    refuse_incompressible: at.client == 0,
                    ..spec
                };
                assert_eq!(client.new_pool(id_of(at), other), Err(PoolError::Exists));
            }
            Err(why) => assert_eq!((why, *is_open), (PoolError::NoSpace, false)),
        }
    }

    fn destroy_pool(&mut self, at: Which) {
        let space = space_of(at);
        let mut expected = self.pages.keys().filter(|key| key.0 == space).count() as u64;
        let was_open = std::mem::replace(&mut self.is_open[at.client][at.pool], false);
        let is_shared_still = at.pool == 2 && self.is_open[1 - at.client][2];
        if is_shared_still {
            expected = 0;
        }
        match self.client(at.client).destroy_pool(id_of(at)) {
            Err(NoPool) => assert!(!was_open),
            Ok(pages) => {
                assert!(was_open && pages <= expected);
                assert!(!Self::is_persistent(space) || pages == expected);
                if !is_shared_still {
                    self.pages.retain(|key, _| key.0 != space);
                }
            }
        }
    }

    fn put(&mut self, at: Which, object: u64, index: u32, content: Content) {
        let Some(pool) = self.client(at.client).pool(id_of(at)) else {
            return;
        };
        self.next_number += 1;
        // Some pages are the same as others, and some are put again as they were.
        let number = match self.next_number % 5 {
            0 => self.next_number / 40,
            _ => self.next_number + (1 << 32),
        };
        let made = (content, number);
        let key = (space_of(at), object, index);
        match pool.put(
            object_of(object),
            index,
            &page_of(made.0, made.1),
            &mut self.scratch,
        ) {
            PutResult::Stored => {
                assert!(!self.is_frozen[at.client]);
                self.pages.insert(key, made);
            }
            PutResult::Refused(why) => {
                self.pages.remove(&key);
                assert_eq!(why == Refusal::Frozen, self.is_frozen[at.client]);
                assert!(why != Refusal::OverQuota || self.quota[at.client].is_some());
                assert!(
                    why != Refusal::Incompressible || (at.client == 1 && content == Content::Noise)
                );
            }
        }
    }

    fn get(&mut self, at: Which, object: u64, index: u32) {
        let Some(pool) = self.client(at.client).pool(id_of(at)) else {
            return;
        };
        let mut page: Page = [0xa5; PAGE_SIZE];
        let space = space_of(at);
        let key = (space, object, index);
        let expected = self.pages.get(&key).copied();
        match pool.get(object_of(object), index, &mut page, &mut self.scratch) {
            GetResult::Found => {
                let (content, number) = expected.expect("a page that should not be there");
                assert!(page == page_of(content, number), "wrong bytes of {key:?}");
                if space == 1 || space == 3 {
                    self.pages.remove(&key);
                }
            }
            GetResult::Missing => {
                assert!(
                    expected.is_none() || !Self::is_persistent(space),
                    "{key:?} is lost"
                );
                assert_eq!(page, [0xa5; PAGE_SIZE]);
                self.pages.remove(&key);
            }
            GetResult::Corrupt => panic!("{key:?} is corrupt"),
        }
    }

    fn flush(&mut self, at: Which, object: u64, first: u32, count: Option<u64>) {
        let Some(pool) = self.client(at.client).pool(id_of(at)) else {
            return;
        };
        let space = space_of(at);
        let end = u64::from(first).saturating_add(count.unwrap_or(u64::MAX));
        let is_hit = |key: &(usize, u64, u32)| {
            (key.0, key.1) == (space, object) && (u64::from(first)..end).contains(&u64::from(key.2))
        };
        let expected = self.pages.keys().filter(|key| is_hit(key)).count() as u64;
        let removed = match count {
            Some(count) => pool.flush_page(object_of(object), first, count),
            None => pool.flush_object(object_of(object)),
        };
        assert!(removed <= expected);
        assert!(!Self::is_persistent(space) || removed == expected);
        self.pages.retain(|key, _| !is_hit(key));
    }

    pub fn run(&mut self, operation: Operation) {
        match operation {
            Operation::Put {
                at,
                object,
                first,
                count,
                content,
            } => {
                for step in 0..count {
                    self.put(at, object, first.wrapping_add(step), content);
                }
            }
            Operation::Get { at, object, index } => self.get(at, object, index),
            Operation::FlushPage {
                at,
                object,
                first,
                count,
            } => {
                self.flush(at, object, first, Some(count));
            }
            Operation::FlushObject { at, object } => self.flush(at, object, 0, None),
            Operation::NewPool { at } => self.new_pool(at),
            Operation::DestroyPool { at } => self.destroy_pool(at),
            Operation::Freeze { client, is_frozen } => {
                self.is_frozen[client] = is_frozen;
                self.client(client).freeze(is_frozen);
            }
            Operation::SetQuota { client, quota } => {
                self.quota[client] = quota;
                self.client(client).set_quota(quota);
            }
            Operation::Compact => _ = self.store().compact(),
            Operation::Recompress => self.store().recompress(Duration::ZERO),
            Operation::Reopen => self.reopen(),
            Operation::Evict { client, bytes } => _ = self.client(client).evict(bytes),
        }
    }

    pub fn verify(&self) {
        self.store().check().unwrap();
        assert!(self.store().stats().mem_used_max <= CAPACITY_BYTES);
        for space in [0, 2] {
            let Some(pool) = self.client(space / 2).pool(PoolId(0)) else {
                continue;
            };
            let expected = self.pages.keys().filter(|key| key.0 == space).count() as u64;
            assert_eq!(pool.pages(), expected, "a persistent pool lost pages");
        }
    }

    /// Gets and compares everything, and leaves an empty store.
    pub fn finish(mut self) {
        // At last everything that the model still has is got and compared.
        let keys: Vec<_> = self.pages.keys().copied().collect();
        for (space, object, index) in keys {
            let at = match space {
                4 => Which {
                    client: usize::from(!self.is_open[0][2]),
                    pool: 2,
                },
                space => Which {
                    client: space / 2,
                    pool: space % 2,
                },
            };
            self.get(at, object, index);
        }
        self.verify();
        for name in ["first", "second"] {
            assert!(self.store().remove_client(name));
        }
        self.pages.clear();
        self.store().compact();
        self.store().check().unwrap();
        let held = self.store().stats();
        assert_eq!((held.pages_stored, held.compr_data_size), (0, 0));
        // A sharing group outlives its clients: the two copies of its record are in spans of their own,
        // of 16 KiB each here, and the reserve stays as long as anything is stored. The rest is tables
        // of fixed size.
        assert!(
            held.mem_used_total < (3 * 16 + 16) << 10,
            "an empty store holds {}",
            held.mem_used_total
        );
    }
}
