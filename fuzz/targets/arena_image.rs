// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any arena that a store is told to open: it ends in an error, or in a store that agrees with itself
//! and goes on working.

#![no_main]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use arbitrary::Arbitrary;
use cram_store::forge::{Forge, Forged};
use cram_store::{
    Backing, GetResult, ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store,
    StoreConfig,
};
use libfuzzer_sys::fuzz_target;

const CAPACITY_BYTES: u64 = 256 << 10;

#[derive(Arbitrary, Debug)]
enum Payload {
    Account { holder: u8, group: u16, name: u8 },
    Space { keeping: u8, account: u8, uuid: u8 },
    Pool { space: u8, flags: u8 },
    Object { space: u8, owner: u8, id: u8 },
    ImageNumber(u8),
    Word(u64),
    Zero,
    Whole(u8),
    Any(Vec<u8>),
}

impl Payload {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::Account {
                holder,
                group,
                name,
            } => {
                let mut bytes = vec![holder % 6];
                bytes.extend((if *group < 4 { *group } else { u16::MAX }).to_le_bytes());
                // No quota, the usual weight, not frozen; generation and instance.
                bytes.extend(u64::MAX.to_le_bytes());
                bytes.extend(100_u32.to_le_bytes());
                bytes.push(0);
                bytes.extend([0; 8 + 16]);
                // Of the uuids that it says it has, some may be missing.
                let uuids = name / 64;
                bytes.push(uuids);
                (0..uuids % 3).for_each(|uuid| bytes.extend([uuid; 16]));
                bytes.push(b'a' + name % 26);
                bytes
            }
            Self::Space {
                keeping,
                account,
                uuid,
            } => {
                let mut bytes = vec![keeping % 5];
                bytes.extend(u16::from(account % 4).to_le_bytes());
                bytes.extend([uuid % 3; 16]);
                bytes
            }
            Self::Pool { space, flags } => {
                let mut bytes = u32::from(space % 4).to_le_bytes().to_vec();
                bytes.push(flags % 3);
                bytes.extend(u64::from(flags / 128).to_le_bytes());
                bytes
            }
            Self::Object { space, owner, id } => {
                let mut bytes = u32::from(space % 4).to_le_bytes().to_vec();
                bytes.extend(u16::from(owner % 4).to_le_bytes());
                bytes.extend([id % 4; 24]);
                bytes
            }
            Self::ImageNumber(number) => u32::from(number % 8).to_le_bytes().repeat(3),
            Self::Word(word) => word.to_le_bytes().to_vec(),
            Self::Zero => Vec::new(),
            Self::Whole(byte) => vec![*byte; PAGE_SIZE],
            Self::Any(bytes) => bytes.clone(),
        }
    }
}

#[derive(Arbitrary, Debug)]
struct Record {
    kind: u8,
    number: u32,
    index: u32,
    is_zstd: bool,
    generation: u8,
    is_dead: bool,
    is_wrong: bool,
    payload: Payload,
}

#[derive(Arbitrary, Debug)]
struct Span {
    span: u8,
    role: u8,
    owner: u8,
    sequence: u8,
    records: Vec<Record>,
}

#[derive(Arbitrary, Debug)]
struct Image {
    /// There is a catalogue that makes sense, of some of everything.
    has_catalogue: bool,
    spans: Vec<Span>,
    flips: Vec<u32>,
}

/// Mostly small, so that records refer to each other.
fn small(number: u32) -> u32 {
    if number.is_multiple_of(16) {
        number
    } else {
        number % 6
    }
}

fuzz_target!(|image: Image| {
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = folder.path().join("arena");
    write(&image, &path);
    let config = StoreConfig {
        capacity_bytes: CAPACITY_BYTES,
        backing: Backing::File(path),
        background: None,
        ..StoreConfig::default()
    };
    for life in 0..2 {
        let Ok(store) = Store::new(config.clone()) else {
            return;
        };
        store
            .check()
            .unwrap_or_else(|error| panic!("opened, life {life}: {error} {image:?}"));
        use_it(&store, life);
        store
            .check()
            .unwrap_or_else(|error| panic!("used, life {life}: {error} {image:?}"));
    }
});

fn write(image: &Image, path: &std::path::Path) {
    let mut forge = Forge::new(CAPACITY_BYTES);
    if image.has_catalogue {
        write_catalogue(&mut forge);
    }
    for span in image.spans.iter().take(12) {
        forge.span(
            span.span.into(),
            span.role,
            u16::from(span.owner % 4),
            span.sequence.into(),
        );
        for record in span.records.iter().take(40) {
            forge.record(&Forged {
                kind: record.kind,
                number: small(record.number),
                index: small(record.index),
                is_zstd: record.is_zstd,
                generation: record.generation,
                is_live: !record.is_dead,
                is_right: !record.is_wrong,
                payload: &record.payload.bytes(),
            });
        }
    }
    for flip in image.flips.iter().take(64) {
        forge.flip((*flip).into());
    }
    let bytes = forge.finish();
    let file = File::create(path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (at, page) in (0_u64..).step_by(PAGE_SIZE).zip(bytes.chunks(PAGE_SIZE)) {
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, at).unwrap();
        }
    }
}

/// Two clients, the second in a sharing group; a pool of each kind; objects 0 to 5, two a space.
fn write_catalogue(forge: &mut Forge) {
    let account = |holder, group, name| Payload::Account {
        holder,
        group,
        name,
    };
    let space = |keeping, account, uuid| Payload::Space {
        keeping,
        account,
        uuid,
    };
    let entries = [
        (4, 0, 0, account(1, 4, 0)),
        (4, 1, 0, account(1, 3, 1)),
        (4, 2, 0, account(2, 4, 2)),
        (4, 3, 0, account(3, 4, 3)),
        (5, 0, 0, space(1, 0, 0)),
        (5, 1, 0, space(2, 1, 0)),
        (5, 2, 0, space(3, 2, 1)),
        (6, 0, 0, Payload::Pool { space: 0, flags: 0 }),
        (6, 1, 0, Payload::Pool { space: 1, flags: 1 }),
        (6, 0, 1, Payload::Pool { space: 2, flags: 0 }),
        (6, 1, 1, Payload::Pool { space: 2, flags: 0 }),
    ];
    let objects = (0..6_u8).map(|number| {
        let space = number / 2;
        let owner = if space == 2 { number % 2 } else { space };
        let id = if space == 2 { 1 } else { number };
        (7, number.into(), 0, Payload::Object { space, owner, id })
    });
    forge.span(15, 2, 0, 1000);
    for (kind, number, index, payload) in entries.into_iter().chain(objects) {
        for _ in 0..2 {
            forge.record(&Forged {
                kind,
                number,
                index,
                is_zstd: false,
                generation: 0,
                is_live: true,
                is_right: true,
                payload: &payload.bytes(),
            });
        }
    }
}

/// What a guest and an operator might do with what they find.
fn use_it(store: &Store, life: u64) {
    let mut scratch = Scratch::new();
    let mut page = [0; PAGE_SIZE];
    for client in store.clients() {
        for (_, pool) in client.pools() {
            for object in 0..4_u64 {
                let id = ObjectId([object * 0x0101_0101_0101_0101; 3]);
                for index in 0..6 {
                    let _ = pool.get(id, index, &mut page, &mut scratch);
                }
                let new = [life as u8 + 1; PAGE_SIZE];
                if pool.put(id, 3, &new, &mut scratch) == PutResult::Stored {
                    let found = pool.get(id, 3, &mut page, &mut scratch);
                    assert_eq!((found, page), (GetResult::Found, new));
                }
                pool.flush_page(id, 1, 2);
            }
        }
    }
    store.recompress(Duration::ZERO);
    store.compact();
    if let Ok(client) = store.add_client("new", None) {
        let spec = PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        };
        if client.new_pool(PoolId(0), spec).is_ok() {
            let pool = client.pool(PoolId(0)).unwrap();
            let _ = pool.put(ObjectId([9; 3]), 0, &[9; PAGE_SIZE], &mut scratch);
        }
    }
    if life == 1 {
        for client in store.clients() {
            store.remove_client(client.name());
        }
    }
}
