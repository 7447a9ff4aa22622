// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A driver that lies: about its ring, its chains, where things are, and in which state the device is.
//!
//! After each lie the device is what it was: a chain that cannot be followed is completed with nothing
//! written, a ring that cannot be trusted is served no more until the device is reset, and what was put
//! before is there. Nobody else notices anything; that is looked at from the host.

use anyhow::{Context, Result, ensure};
use cram_abi::wire::{PAGE_SIZE, RESPONSE_SIZE, pool_flag, result, status};
use cram_conformance::{Channel, Part, Request, page};

use super::device::{
    AVAILABLE, DATA, DESCRIPTORS, DRIVER_OK, Device, FLAG_INDIRECT, FLAG_NEXT, FLAG_WRITE, NOWHERE,
    QUEUE, SIZE, TABLE, USED, common,
};

/// What is expected of the queue after an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum After {
    /// It is served as if nothing had been.
    Served,
    /// Nothing, until the device is reset.
    Moot,
}

type Attack = fn(&mut Device, &mut Random) -> Result<After>;

const ATTACKS: &[(&str, Attack)] = &[
    ("a chain that loops", looping_chain),
    ("an indirect chain that loops", looping_table),
    ("a chain that leaves the ring", leaving_chain),
    ("descriptors of nothing", empty_descriptors),
    ("indirect tables that are none", wrong_tables),
    ("chains by chance", chains_by_chance),
    ("doorbells of other queues", wrong_doorbells),
    ("a descriptor that does not exist", missing_head),
    ("an index that jumps too far", jump_too_far),
    ("an index that goes back", jump_back),
    ("an answer into the used ring", answer_into_used_ring),
    (
        "an answer into the available ring",
        answer_into_available_ring,
    ),
    ("an answer into the descriptors", answer_into_descriptors),
    ("a ring where there is no memory", ring_nowhere),
    ("all parts of a ring in one place", ring_in_one_place),
    ("a reset in the middle of puts", reset_in_the_middle),
    ("states in a wrong order", wrong_states),
    ("sizes that no ring has", wrong_sizes),
];

/// Pages that must be there after whatever was done.
const KEPT_OBJECT: u64 = 7;
const KEPT: [u32; 4] = [0, 1, 63, u32::MAX];

/// Runs all attacks so many times; how many that were.
///
/// # Errors
/// With the first after which the device is not what it was.
pub(super) fn run(device: &mut Device, seed: u64, rounds: u64) -> Result<u64> {
    let mut random = Random(seed | 1);
    let mut attacks = 0;
    keep(device)?;
    for round in 0..rounds {
        for (name, attack) in ATTACKS {
            let about = || format!("round {round}: {name}");
            let after = attack(device, &mut random).with_context(about)?;
            if after == After::Served {
                expect_kept(device)
                    .context("before a reset")
                    .with_context(about)?;
            }
            device.begin().with_context(about)?;
            expect_kept(device).with_context(about)?;
            attacks += 1;
        }
    }
    Ok(attacks)
}

/// A small generator with a seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: u16) -> u16 {
        u16::try_from(self.next() % u64::from(limit)).unwrap_or_default()
    }
}

fn kept_page(index: u32) -> [u8; PAGE_SIZE] {
    page(u64::from(index) + 1000)
}

fn keep(device: &mut Device) -> Result<()> {
    let pool = Request::new_pool(0, pool_flag::PERSISTENT, [0; 16]);
    let made = device.exchange(&pool.parts())?;
    ensure!(
        made.written.first() == Some(&status::OK),
        "there is no pool"
    );
    let pages = KEPT.map(|index| (index, kept_page(index)));
    let put = device.exchange(&Request::put(0, KEPT_OBJECT, &pages).parts())?;
    expect_results(&put.written)
}

fn expect_results(written: &[u8]) -> Result<()> {
    let results = written.get(16..16 + KEPT.len());
    ensure!(
        written.first() == Some(&status::OK) && results == Some(&[result::OK; KEPT.len()]),
        "the device answered {:?} and {results:?}",
        written.first()
    );
    Ok(())
}

fn expect_kept(device: &mut Device) -> Result<()> {
    let got = device.exchange(&Request::get(0, KEPT_OBJECT, &KEPT).parts())?;
    expect_results(&got.written)?;
    let pages = got.written.get(RESPONSE_SIZE..).unwrap_or_default();
    for (index, found) in KEPT.iter().zip(pages.chunks(PAGE_SIZE)) {
        ensure!(found == kept_page(*index), "page {index} is another one");
    }
    Ok(())
}

/// Makes a chain available, and expects it to be completed with nothing written.
fn expect_nothing(device: &mut Device, head: u16) -> Result<()> {
    let slot = usize::from(device.sent % SIZE);
    device.make_available(head);
    device.ring_doorbell(QUEUE);
    device.wait_used(device.sent)?;
    let written: u32 = device.buffers.numbers().read(USED + 4 + 8 * slot + 4);
    ensure!(written == 0, "{written} bytes were written");
    Ok(())
}

fn at(entry: u16) -> usize {
    DESCRIPTORS + 16 * usize::from(entry)
}

fn looping_chain(device: &mut Device, _: &mut Random) -> Result<After> {
    let data = device.buffers.physical(DATA);
    for (from, to) in [(0, 0), (1, 2), (2, 1)] {
        device.describe(at(from), (data, 64, FLAG_NEXT, to));
    }
    expect_nothing(device, 0)?;
    expect_nothing(device, 1)?;
    // One that is written to, too.
    device.describe(at(3), (data, 4096, FLAG_NEXT | FLAG_WRITE, 3));
    expect_nothing(device, 3)?;
    Ok(After::Served)
}

fn looping_table(device: &mut Device, _: &mut Random) -> Result<After> {
    let (data, table) = (
        device.buffers.physical(DATA),
        device.buffers.physical(TABLE),
    );
    device.describe(TABLE, (data, 64, FLAG_NEXT, 1));
    device.describe(TABLE + 16, (data, 64, FLAG_NEXT | FLAG_WRITE, 0));
    device.describe(at(0), (table, 32, FLAG_INDIRECT, 0));
    expect_nothing(device, 0)?;
    Ok(After::Served)
}

fn leaving_chain(device: &mut Device, _: &mut Random) -> Result<After> {
    let data = device.buffers.physical(DATA);
    for next in [SIZE, SIZE + 1, 0x7fff, u16::MAX] {
        device.describe(at(0), (data, 64, FLAG_NEXT, next));
        expect_nothing(device, 0)?;
    }
    Ok(After::Served)
}

fn empty_descriptors(device: &mut Device, _: &mut Random) -> Result<After> {
    device.describe(at(0), (NOWHERE, 0, 0, 0));
    expect_nothing(device, 0)?;
    for entry in 0..SIZE - 1 {
        device.describe(at(entry), (0, 0, FLAG_NEXT, entry + 1));
    }
    device.describe(at(SIZE - 1), (u64::MAX, u32::MAX, FLAG_WRITE, 0));
    expect_nothing(device, 0)?;
    Ok(After::Served)
}

fn wrong_tables(device: &mut Device, _: &mut Random) -> Result<After> {
    let table = device.buffers.physical(TABLE);
    device.describe(TABLE, (table, 16, FLAG_INDIRECT, 0));
    for (address, bytes, flags) in [
        (table, 0, FLAG_INDIRECT),
        (table, 17, FLAG_INDIRECT),
        (table, 16, FLAG_INDIRECT | FLAG_NEXT),
        // One that leads to another, and to itself.
        (table, 16, FLAG_INDIRECT),
        (NOWHERE, 1 << 20, FLAG_INDIRECT),
        (u64::MAX - 15, 32, FLAG_INDIRECT),
        (table, u32::MAX - 15, FLAG_INDIRECT),
    ] {
        device.describe(at(0), (address, bytes, flags, 0));
        expect_nothing(device, 0)?;
    }
    Ok(After::Served)
}

/// Descriptors that lead anywhere but to where the ring is, as long as that is written to.
fn chains_by_chance(device: &mut Device, random: &mut Random) -> Result<After> {
    for word in (TABLE..device.buffers.len()).step_by(8) {
        device.buffers.numbers().write(word, random.next());
    }
    for entry in 0..SIZE {
        let place = DATA + 4096 * usize::from(random.below(64)) + usize::from(random.below(4096));
        let address = match random.below(4) {
            0 => random.next(),
            1 => NOWHERE,
            _ => device.buffers.physical(place),
        };
        let room = u32::try_from(4096 - place % 4096)?;
        let length = match random.below(3) {
            0 => u32::from(random.below(100)).min(room),
            1 => room,
            // Beyond, where it is only read.
            _ => u32::from(random.below(u16::MAX)),
        };
        let flags = random.below(8);
        let is_safe = flags & FLAG_WRITE == 0 || length <= room;
        let flags = if is_safe { flags } else { flags & !FLAG_WRITE };
        device.describe(at(entry), (address, length, flags, random.below(SIZE + 2)));
    }
    for _ in 0..SIZE {
        device.make_available(random.below(SIZE));
    }
    device.ring_doorbell(QUEUE);
    // Each of them is completed, whatever it was.
    device.wait_used(device.sent)?;
    Ok(After::Served)
}

fn wrong_doorbells(device: &mut Device, random: &mut Random) -> Result<After> {
    for queue in (0..8).chain([63, 64, 65, 1023, 1024, u16::MAX]) {
        device.ring_doorbell(queue);
        device.ring_doorbell(random.below(u16::MAX));
    }
    Ok(After::Served)
}

fn missing_head(device: &mut Device, random: &mut Random) -> Result<After> {
    device.make_available(SIZE + random.below(1000));
    device.ring_doorbell(QUEUE);
    Ok(After::Moot)
}

fn jump_too_far(device: &mut Device, random: &mut Random) -> Result<After> {
    device.jump(device.sent.wrapping_add(SIZE + 1 + random.below(30_000)));
    device.ring_doorbell(QUEUE);
    Ok(After::Moot)
}

fn jump_back(device: &mut Device, _: &mut Random) -> Result<After> {
    device.jump(device.sent.wrapping_sub(1));
    device.ring_doorbell(QUEUE);
    Ok(After::Moot)
}

/// A query whose answer is to be written there.
fn answer_into(device: &mut Device, place: usize) -> After {
    let request = Request::query();
    device.buffers.write_bytes(DATA, &request.readable);
    let (data, place) = (
        device.buffers.physical(DATA),
        device.buffers.physical(place),
    );
    device.describe(at(0), (data, 40, FLAG_NEXT, 1));
    device.describe(at(1), (place, 256, FLAG_WRITE, 0));
    for _ in 0..3 {
        device.make_available(0);
        device.ring_doorbell(QUEUE);
    }
    After::Moot
}

fn answer_into_used_ring(device: &mut Device, _: &mut Random) -> Result<After> {
    Ok(answer_into(device, USED))
}

fn answer_into_available_ring(device: &mut Device, _: &mut Random) -> Result<After> {
    Ok(answer_into(device, AVAILABLE))
}

fn answer_into_descriptors(device: &mut Device, _: &mut Random) -> Result<After> {
    Ok(answer_into(device, DESCRIPTORS))
}

/// A device that is told of a ring at these places, and used.
fn start_at(device: &mut Device, places: [u64; 3]) -> Result<After> {
    device.reset()?;
    device.negotiate()?;
    device.start_queue_at(places)?;
    device.set_status(DRIVER_OK);
    device.ring_doorbell(QUEUE);
    Ok(After::Moot)
}

fn ring_nowhere(device: &mut Device, random: &mut Random) -> Result<After> {
    let good = [DESCRIPTORS, AVAILABLE, USED].map(|place| device.buffers.physical(place));
    for part in 0..3 {
        for address in [NOWHERE, !0xfff, random.next() & !0xf] {
            let mut places = good;
            if let Some(place) = places.get_mut(part) {
                *place = address;
            }
            start_at(device, places)?;
        }
    }
    Ok(After::Moot)
}

fn ring_in_one_place(device: &mut Device, random: &mut Random) -> Result<After> {
    let place = device.buffers.physical(DATA);
    start_at(device, [place; 3])?;
    for word in (DATA..DATA + 4096).step_by(8) {
        device.buffers.numbers().write(word, random.next());
    }
    device.ring_doorbell(QUEUE);
    Ok(After::Moot)
}

/// Puts that may be executed or not when the device is reset, and begun anew at once.
fn reset_in_the_middle(device: &mut Device, random: &mut Random) -> Result<After> {
    for _ in 0..10 {
        let index = u32::try_from(random.next() >> 32)?;
        let pages = [(index, kept_page(1))];
        let request = Request::put(0, KEPT_OBJECT + 1, &pages);
        let Some(Part::Read(bytes)) = request.parts().into_iter().next() else {
            continue;
        };
        device.buffers.write_bytes(DATA, &bytes);
        let physical = |place| device.buffers.physical(place);
        // A header, an index and a page: two pages of the buffer.
        let first = 4096;
        let rest = u32::try_from(bytes.len() - first)?;
        device.describe(at(0), (physical(DATA), 4096, FLAG_NEXT, 1));
        device.describe(at(1), (physical(DATA + first), rest, FLAG_NEXT, 2));
        device.describe(at(2), (physical(DATA + 2 * 4096), 80, FLAG_WRITE, 0));
        for _ in 0..SIZE {
            device.make_available(0);
        }
        device.ring_doorbell(QUEUE);
        device.begin()?;
    }
    Ok(After::Served)
}

fn wrong_states(device: &mut Device, random: &mut Random) -> Result<After> {
    device.reset()?;
    // Without features, without a queue, failed, and whatever.
    device.set_status(DRIVER_OK);
    device.ring_doorbell(QUEUE);
    let status = {
        let common = &device.registers.common;
        move |bits: u8| common.bar.write(common.at + common::STATUS, bits)
    };
    status(128);
    for _ in 0..20 {
        status(random.next().to_le_bytes()[0]);
    }
    Ok(After::Moot)
}

fn wrong_sizes(device: &mut Device, random: &mut Random) -> Result<After> {
    for size in [0, 3, 0x8000, u16::MAX, random.below(u16::MAX)] {
        device.reset()?;
        device.negotiate()?;
        let places = [DESCRIPTORS, AVAILABLE, USED].map(|place| device.buffers.physical(place));
        let common = &device.registers.common;
        let write = |register: usize, value: u16| common.bar.write(common.at + register, value);
        write(common::QUEUE_SELECT, u16::MAX);
        write(common::QUEUE_SIZE, size);
        write(common::QUEUE_ENABLE, 1);
        write(common::QUEUE_SELECT, QUEUE);
        write(common::QUEUE_SIZE, size);
        for (register, place) in [
            common::QUEUE_DESCRIPTORS,
            common::QUEUE_DRIVER,
            common::QUEUE_DEVICE,
        ]
        .into_iter()
        .zip(places)
        {
            let [low, high] = [place & u64::from(u32::MAX), place >> 32];
            let (bar, at) = (&common.bar, common.at);
            bar.write(at + register, u32::try_from(low)?);
            bar.write(at + register + 4, u32::try_from(high)?);
        }
        write(common::QUEUE_ENABLE, 1);
        device.set_status(DRIVER_OK);
        device.ring_doorbell(QUEUE);
    }
    Ok(After::Moot)
}
