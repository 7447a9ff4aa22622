// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Records that come, are read, and go, on several threads. Small enough for Miri, which these
//! tests are for as well: everything unsafe in the arena is reached from here.

// Failing is what tests do, also in functions that are no tests themselves.
#![allow(clippy::unwrap_used)]

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::thread;

use super::*;
use crate::machine::budget::Budget;

const SPAN_BYTES: u64 = 16 << 10;
const SPANS: u32 = 12;

fn arena() -> Arena {
    let layout = Layout {
        span_shift: SPAN_BYTES.ilog2(),
        granule_shift: 4,
        spans: SPANS,
    };
    let region = region::Region::for_tests(layout.len_bytes());
    let budget = Arc::new(Budget::new(u64::from(SPANS) * SPAN_BYTES));
    Arena {
        superblock: Superblock {
            span_shift: layout.span_shift,
            granule_shift: layout.granule_shift,
            len_bytes: layout.len_bytes(),
            generation: 1,
            boot_id: [0; 16],
            is_clean: false,
            secret: Secret::new([7; Secret::BYTES]),
        },
        found: None,
        is_committed: AtomicBool::new(true),
        flipped: crate::machine::sync::Mutex::default(),
        path: None,
        layout,
        secret: Secret::new([7; Secret::BYTES]),
        salt: 7,
        spans: Spans::new(region, layout, None, budget, 7),
        damaged: AtomicU64::new(0),
        corrected: AtomicU64::new(0),
    }
}

fn header_of(number: u32, index: u32, len: usize) -> Header {
    Header {
        kind: Kind::Page,
        number,
        index,
        len,
        is_zstd: false,
        check: index ^ 0x5555,
        generation: 0,
        is_used: false,
    }
}

/// The bytes of a page's payload, made of its name.
fn payload_of(number: u32, index: u32) -> Vec<u8> {
    let seed = mix(u64::from(number) << 32 | u64::from(index));
    let len = usize::try_from(seed % 900).unwrap_or(0);
    (0..len)
        .map(|at| u8::try_from((seed >> (at % 8 * 8)) & 0xff).unwrap_or(0) ^ 0x5a)
        .collect()
}

/// What stands in for the index: under its lock, a record that is in it lives.
type Known = Mutex<HashMap<(u32, u32), Place>>;

fn put(arena: &Arena, head: &Head, known: &Known, number: u32, index: u32) -> bool {
    let payload = payload_of(number, index);
    let record = Record {
        header: header_of(number, index, payload.len()),
        payload: &payload,
    };
    let mut known = known.lock().unwrap();
    let Ok(place) = arena.append(head, record, None, Urgency::Normal, |_| ()) else {
        return false;
    };
    if let Some(old) = known.insert((number, index), place) {
        arena.kill(old).unwrap();
    }
    true
}

fn check(arena: &Arena, known: &Known, number: u32, index: u32) {
    let (pin, place, header) = {
        let known = known.lock().unwrap();
        let Some(place) = known.get(&(number, index)).copied() else {
            return;
        };
        (arena.pin(place), place, arena.header(place).unwrap())
    };
    // Without the lock: others replace the page meanwhile, and its span stays.
    assert_eq!((header.number, header.index), (number, index));
    assert_eq!(pin.payload(place, &header), payload_of(number, index));
    arena.mark_used(place);
}

#[test]
fn records_come_and_go_on_several_threads() {
    let rounds: u64 = if cfg!(miri) { 60 } else { 3000 };
    let arena = arena();
    let heads = [Head::new(Role::Pages), Head::new(Role::Pages)];
    let known = Known::default();
    thread::scope(|scope| {
        for (number, head) in (0..).zip(&heads) {
            let (arena, known) = (&arena, &known);
            scope.spawn(move || {
                for round in 0..rounds {
                    let chosen = mix(u64::from(number) << 32 | round);
                    let index = u32::try_from(chosen % 40).unwrap();
                    if !put(arena, head, known, number, index) {
                        // Full of what is dead: the oldest spans go when all in them is.
                        let mut known = known.lock().unwrap();
                        for (_, place) in known.drain() {
                            arena.kill(place).unwrap();
                        }
                        arena.seal_head(head);
                    }
                    let other = u32::try_from(chosen >> 8 & 1).unwrap();
                    check(
                        arena,
                        known,
                        other,
                        u32::try_from(chosen >> 16 & 31).unwrap(),
                    );
                    if round.is_multiple_of(16) {
                        arena.trim(1);
                    }
                }
            });
        }
    });
    // What is in the arena is what is known.
    heads.iter().for_each(|head| arena.seal_head(head));
    let known = known.into_inner().unwrap();
    let mut found = HashMap::new();
    for info in arena.spans().in_use() {
        for record in arena
            .walk(info.span, info.filled)
            .filter(|found| found.is_live)
        {
            assert_eq!(record.trust, Trust::Header);
            found.insert((record.header.number, record.header.index), record.place);
        }
    }
    assert_eq!(found, known);
    for place in known.into_values() {
        arena.kill(place).unwrap();
    }
    arena.trim(0);
    assert_eq!(arena.spans().held_bytes(), 0);
}

#[test]
fn any_place_can_be_looked_at() {
    let arena = arena();
    let head = Head::new(Role::Pages);
    let known = Known::default();
    for index in 0..20 {
        assert!(put(&arena, &head, &known, 0, index));
    }
    let known = known.into_inner().unwrap();
    let layout = arena.layout();
    let mut seen = 0;
    for granule in layout.span_granules()..3 * layout.span_granules() {
        let place = Place(granule);
        let Some(pin) = arena.pin_written(place) else {
            continue;
        };
        arena.prefetch_header(place);
        if let Some(header) = arena.header_at(place, &pin) {
            // The middle of a record may well look like a header.
            let payload = pin.payload(place, &header);
            if known.get(&(header.number, header.index)) == Some(&place) {
                assert_eq!(payload, payload_of(0, header.index));
                seen += 1;
            }
        }
    }
    assert_eq!(seen, 20);
}
