// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Chains that are wrong, and what they are answered: section 6.1.1 of the protocol. (What any
//! driver could send is in the table of conformance; here are descriptors that only lie in memory.)
//!
//! Each is followed by a good one on the same queue: a wrong request hurts nobody.

use anyhow::Result;
use cram_abi::wire::{MAX_DESCRIPTORS, RESPONSE_SIZE, pool_flag, result, status};
use cram_tests::frontend::{Descriptor, Guest, Options, Piece, Request, TestDaemon, page};
use serde_json::json;

const WRITE: u16 = 2;
const NEXT: u16 = 1;
const INDIRECT: u16 = 4;
const UNTOUCHED: u8 = 0xa5;

fn start() -> Result<(TestDaemon, Guest)> {
    let daemon = TestDaemon::start(1, 64 << 20)?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1])?;
    Ok((daemon, guest))
}

fn still_works(guest: &mut Guest) -> Result<()> {
    assert_eq!(guest.get(0, &[1, 2])?, [result::OK, result::MISSING]);
    Ok(())
}

/// A good put of page 2, in pieces that a test then spoils.
fn good_put(guest: &Guest) -> Result<[Piece; 2]> {
    let request = Request::put(0, 0, &[(2, page(2))]);
    let readable = guest.memory.allocate(request.readable.len(), 8)?;
    guest.memory.write(readable, &request.readable)?;
    let writable = guest.memory.allocate(RESPONSE_SIZE, 8)?;
    Ok([
        Piece {
            address: readable,
            len: u32::try_from(request.readable.len())?,
            writable: false,
        },
        Piece {
            address: writable,
            len: u32::try_from(RESPONSE_SIZE)?,
            writable: true,
        },
    ])
}

#[test]
fn chains_in_a_wrong_shape_are_answered_as_far_as_they_can_be() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    let hole = guest.memory.unmapped();
    let edge = guest.memory.before_the_hole(10);
    let [readable, writable] = good_put(&guest)?;
    let at = |address| Piece {
        address,
        ..readable
    };
    let answer_at = |address| Piece {
        address,
        ..writable
    };
    let none = |piece: Piece| Piece { len: 0, ..piece };
    let long = |piece: Piece| Piece {
        len: u32::MAX,
        ..piece
    };
    // Nothing can be answered.
    for (what, pieces) in [
        ("no room for an answer", vec![readable]),
        (
            "79 bytes",
            vec![
                readable,
                Piece {
                    len: 79,
                    ..writable
                },
            ],
        ),
        ("an empty answer", vec![readable, none(writable)]),
        ("an answer in the hole", vec![readable, answer_at(hole)]),
        ("an answer over the edge", vec![readable, answer_at(edge)]),
        (
            "an answer at the end of all",
            vec![readable, answer_at(u64::MAX - 8)],
        ),
        ("nothing at all", vec![none(readable)]),
    ] {
        let head = guest.ring(1).submit(&pieces)?;
        let answer = guest.finish(1, head, writable.address, RESPONSE_SIZE)?;
        assert_eq!(answer.used, 0, "{what}");
        still_works(&mut guest)?;
    }
    // Something is wrong with what is to be read.
    for (what, pieces) in [
        ("wrong order", vec![writable, readable]),
        (
            "an answer between",
            vec![
                Piece {
                    len: 40,
                    ..readable
                },
                writable,
                readable,
            ],
        ),
        ("nothing to read", vec![writable]),
        ("a header in the hole", vec![at(hole), writable]),
        ("a header over the edge", vec![at(edge), writable]),
        (
            "a header at the end of all",
            vec![at(u64::MAX - 8), writable],
        ),
        ("4 GiB to read", vec![long(readable), writable]),
        (
            "4 GiB, 100 times",
            [vec![long(readable); 100], vec![writable]].concat(),
        ),
        (
            "4 GiB to write",
            vec![readable, writable, long(answer_at(hole))],
        ),
    ] {
        guest
            .memory
            .write(writable.address, &[UNTOUCHED; RESPONSE_SIZE])?;
        let answer = guest.call_pieces(1, &pieces, writable.address)?;
        assert_eq!(answer.used as usize, RESPONSE_SIZE, "{what}");
        assert_eq!(answer.response.status, status::BAD_REQUEST, "{what}");
        still_works(&mut guest)?;
    }
    // Indexes in the hole, though the header is good.
    let header = Piece {
        len: 40,
        ..readable
    };
    let body = Piece {
        address: hole,
        len: 4 + 4096,
        writable: false,
    };
    let answer = guest.call_pieces(1, &[header, body, writable], writable.address)?;
    assert_eq!(answer.response.status, status::BAD_REQUEST);
    // Empty pieces mean nothing.
    let pieces = [
        none(at(hole)),
        none(readable),
        readable,
        none(answer_at(hole)),
        writable,
    ];
    let answer = guest.call_pieces(1, &pieces, writable.address)?;
    assert_eq!(answer.response.status, status::OK);
    assert_eq!(guest.get(0, &[2])?, [result::OK]);
    Ok(())
}

#[test]
fn long_chains_end_at_the_limit() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    let [readable, writable] = good_put(&guest)?;
    let empty = Piece { len: 0, ..readable };
    for (count, works) in [
        (MAX_DESCRIPTORS, true),
        (MAX_DESCRIPTORS + 1, false),
        (5000, false),
    ] {
        let mut pieces = vec![empty; count - 2];
        pieces.extend([readable, writable]);
        let answer = guest.call_pieces(1, &pieces, writable.address)?;
        assert_eq!(answer.used > 0, works, "{count} descriptors");
        assert_eq!(guest.get(0, &[2])? == [result::OK], works);
        guest.call(1, &Request::flush_page(0, 0, &[(2, 1)]))?;
    }
    Ok(())
}

#[test]
fn loops_and_wrong_tables_end() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    let [readable, writable] = good_put(&guest)?;
    let table = guest.memory.allocate(4096, 16)?;
    let read = Descriptor {
        address: readable.address,
        len: readable.len,
        flags: NEXT,
        next: 1,
    };
    let write = Descriptor {
        address: writable.address,
        len: writable.len,
        flags: WRITE,
        next: 0,
    };
    let indirect = |address, len| Descriptor {
        address,
        len,
        flags: INDIRECT,
        next: 0,
    };
    let looped = Descriptor {
        flags: WRITE | NEXT,
        next: 0,
        ..write
    };
    let nested = indirect(table, 32);
    let cases = [
        ("a good table", indirect(table, 32), [read, write], true),
        // The device shall ignore that flag.
        (
            "a writable table",
            Descriptor {
                flags: INDIRECT | WRITE,
                ..nested
            },
            [read, write],
            true,
        ),
        (
            "more table than is used",
            indirect(table, 4096),
            [read, write],
            true,
        ),
        ("an empty table", indirect(table, 0), [read, write], false),
        (
            "half a descriptor",
            indirect(table, 24),
            [read, write],
            false,
        ),
        (
            "a table of one byte",
            indirect(table, 1),
            [read, write],
            false,
        ),
        (
            "a table in the hole",
            indirect(guest.memory.unmapped(), 32),
            [read, write],
            false,
        ),
        (
            "a table at the end of all",
            indirect(u64::MAX - 15, 32),
            [read, write],
            false,
        ),
        (
            "a table with next",
            Descriptor {
                flags: INDIRECT | NEXT,
                ..nested
            },
            [read, write],
            false,
        ),
        (
            "next beyond the table",
            indirect(table, 16),
            [read, write],
            false,
        ),
        (
            "a loop in the table",
            indirect(table, 32),
            [read, looped],
            false,
        ),
        (
            "a table in a table",
            indirect(table, 32),
            [read, nested],
            false,
        ),
    ];
    for (what, first, content, works) in cases {
        for (k, descriptor) in (0..).zip(content) {
            // The table's descriptors are written where a ring would have them.
            let mut bytes = descriptor.address.to_le_bytes().to_vec();
            bytes.extend(descriptor.len.to_le_bytes());
            bytes.extend(descriptor.flags.to_le_bytes());
            bytes.extend(descriptor.next.to_le_bytes());
            guest.memory.write(table + 16 * k, &bytes)?;
        }
        let head = guest.ring(1).reserve_head()?;
        guest.ring(1).write_descriptor(head, first)?;
        guest.ring(1).make_available(head)?;
        let answer = guest.finish(1, head, writable.address, RESPONSE_SIZE)?;
        assert_eq!(answer.used > 0, works, "{what}");
        assert_eq!(guest.get(0, &[2])? == [result::OK], works, "{what}");
        guest.call(1, &Request::flush_page(0, 0, &[(2, 1)]))?;
    }

    // In the ring itself: a descriptor that is its own next, and one that is none.
    for (next, what) in [
        (None, "itself"),
        (Some(256), "beyond the ring"),
        (Some(u16::MAX), "far"),
    ] {
        let head = guest.ring(1).reserve_head()?;
        let next = next.unwrap_or(head);
        guest
            .ring(1)
            .write_descriptor(head, Descriptor { next, ..looped })?;
        guest.ring(1).make_available(head)?;
        assert_eq!(
            guest.finish(1, head, writable.address, RESPONSE_SIZE)?.used,
            0,
            "{what}"
        );
        still_works(&mut guest)?;
    }
    Ok(())
}

#[test]
fn indirect_tables_must_be_negotiated() -> Result<()> {
    let (daemon, guest) = start()?;
    drop(guest);
    let options = Options {
        indirect: false,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    let head = guest.ring(1).reserve_head()?;
    let table = guest.memory.allocate(32, 16)?;
    let descriptor = Descriptor {
        address: table,
        len: 32,
        flags: INDIRECT,
        next: 0,
    };
    guest.ring(1).write_descriptor(head, descriptor)?;
    guest.ring(1).make_available(head)?;
    assert_eq!(guest.finish(1, head, table, RESPONSE_SIZE)?.used, 0);
    still_works(&mut guest)
}

#[test]
fn malformed_requests_are_counted() -> Result<()> {
    let (daemon, mut guest) = start()?;
    for _ in 0..3 {
        guest.call(2, &Request::put(0, 0, &[]))?;
    }
    // What the device does not know is not malformed.
    guest.call(2, &Request::new(Request::header(8, 0, 0, 0), &[]))?;
    assert_eq!(daemon.client_stats(0)?["device"]["malformed"], json!(3));
    Ok(())
}

#[test]
fn empty_descriptors_add_no_bytes_but_count_and_have_a_direction() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    let nowhere = guest.memory.unmapped();
    let empty = |writable| Piece {
        address: nowhere,
        len: 0,
        writable,
    };
    let [readable, writable] = good_put(&guest)?;
    let response = writable.address;
    for pieces in [
        vec![empty(false), readable, empty(false), writable],
        vec![readable, empty(true), writable, empty(true)],
    ] {
        let answer = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(answer.results(1), [result::OK]);
    }
    // Behind a writable one there is none that is readable, and be it empty.
    for pieces in [
        vec![readable, writable, empty(false)],
        vec![empty(true), readable, writable],
    ] {
        let answer = guest.call_pieces(1, &pieces, response)?;
        assert_eq!(answer.response.status, status::BAD_REQUEST);
    }
    let full = vec![empty(false); MAX_DESCRIPTORS - 2];
    let answer = guest.call_pieces(1, &[&full[..], &[readable, writable]].concat(), response)?;
    assert_eq!(answer.results(1), [result::OK]);
    let more = vec![empty(false); MAX_DESCRIPTORS - 1];
    let answer = guest.call_pieces(1, &[&more[..], &[readable, writable]].concat(), response)?;
    assert_eq!(answer.used, 0);
    guest.call(1, &Request::flush_page(0, 0, &[(2, 1)]))?;
    still_works(&mut guest)
}
