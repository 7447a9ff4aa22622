// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Rings that lie, messages that are none, and chains of random content.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::Result;
use cram_abi::wire::{PAGE_SIZE, RESPONSE_SIZE, pool_flag, result};
use cram_tests::frontend::{Ask, Descriptor, Guest, Options, PATIENCE, Request, TestDaemon, Wait};
use serde_json::json;

use crate::ends::stopped;

const CAPACITY: u64 = 64 << 20;

#[test]
fn a_ring_that_lies_is_stopped_alone_until_it_is_reset() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1])?;
    let options = Options::default();
    for (times, lie) in (1..).zip(["a jump", "a jump by one too many", "no such descriptor"]) {
        let ring = guest.ring(2);
        let here = ring.base()?;
        match lie {
            "a jump" => ring.set_available_index(here.wrapping_sub(1))?,
            "a jump by one too many" => ring.set_available_index(here.wrapping_add(257))?,
            _ => ring.make_available(256)?,
        }
        ring.notify_always()?;
        stopped(&daemon, times)?;
        // Queue 2 is deaf, and queue 1 is not.
        guest.submit(2, &Request::get(0, 0, &[1]))?;
        guest.ring(2).notify_always()?;
        assert_eq!(guest.get(0, &[1])?, [result::OK], "{lie}");
        assert!(guest.ring(2).take_used()?.is_none(), "{lie}");
        guest.reset_queue(2, &options)?;
        let answer = guest.call(2, &Request::get(0, 0, &[1]))?;
        assert_eq!(answer.results(1), [result::OK], "{lie}");
    }
    Ok(())
}

#[test]
fn pages_that_change_while_they_are_put_are_stored_as_they_were_at_some_moment() -> Result<()> {
    const PAGES: u32 = 64;
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    let memory = guest.memory.clone();
    let from = memory.allocate(PAGES as usize * PAGE_SIZE, 4096)?;
    let to = memory.allocate(PAGES as usize * PAGE_SIZE, 4096)?;
    let place = |base: u64, k: u32| base + u64::from(k) * PAGE_SIZE as u64;
    let is_over = std::sync::atomic::AtomicBool::new(false);
    let mut changes = 0u64;
    std::thread::scope(|scope| -> Result<()> {
        let changing = scope.spawn(|| -> Result<u64> {
            let (mut random, mut changes) = (Random(7), 0);
            while !is_over.load(std::sync::atomic::Ordering::Relaxed) {
                // Words of pages, now filled, now not; and whole pages.
                let page_at = place(from, u32::try_from(random.below(u64::from(PAGES)))?);
                let word = random.next() >> (random.below(4) * 16);
                memory.write(page_at + random.below(512) * 8, &word.to_le_bytes())?;
                if changes % 64 == 0 {
                    memory.write(page_at, &word.to_le_bytes().repeat(512))?;
                }
                changes += 1;
            }
            Ok(changes)
        });
        let mut driving = || -> Result<()> {
            let mut flow = guest.flow(1, 0, 2, PAGES as usize, Wait::Sleep)?;
            for _ in 0..400 {
                for (ask, base) in [(Ask::Put, from), (Ask::Get, to)] {
                    let mut left = Some((0..PAGES).map(|k| (k, place(base, k))));
                    let good = flow.drive(ask, |pages| {
                        pages.extend(left.take().into_iter().flatten());
                        !pages.is_empty()
                    })?;
                    // Had anything been read twice, checksums would not agree.
                    assert_eq!(good, u64::from(PAGES), "{ask:?}");
                }
            }
            Ok(())
        };
        let driven = driving();
        is_over.store(true, std::sync::atomic::Ordering::Relaxed);
        changes = changing
            .join()
            .map_err(|_| anyhow::anyhow!("it panicked"))??;
        driven
    })?;
    assert!(changes > 1000, "{changes} changes only");
    assert_eq!(
        daemon.call("stats", json!({}))?["store"]["gets_corrupt"],
        json!(0)
    );
    daemon.check_store()
}

#[test]
fn what_is_no_message_ends_the_connection_only() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let mut other = daemon.connect(1)?;
    other.new_pool(0, pool_flag::PERSISTENT)?;
    let header =
        |request: u32, flags: u32, size: u32| [request, flags, size].map(u32::to_le_bytes).concat();
    let cases: [(&str, Vec<u8>); 8] = [
        ("nothing", vec![]),
        ("half a header", vec![1, 0, 0]),
        ("noise", (0..200u8).map(|k| k.wrapping_mul(91)).collect()),
        ("an unknown request", header(9999, 1, 0)),
        ("a wrong version", header(1, 2, 0)),
        ("a huge body", header(2, 1, u32::MAX)),
        ("a body that is cut off", header(2, 1, 8)),
        (
            "a ring before any memory",
            [header(9, 1, 40), vec![0xff; 40]].concat(),
        ),
    ];
    for (what, bytes) in cases {
        let mut stream = UnixStream::connect(daemon.socket(0))?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.write_all(&bytes)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        // The daemon hangs up, and takes the next one.
        let mut rest = Vec::new();
        let ended = stream.read_to_end(&mut rest);
        assert!(ended.is_ok() || rest.is_empty(), "{what}: {ended:?}");
        let mut guest = daemon.connect(0)?;
        assert_eq!(guest.config()?.version.get(), 1, "{what}");
        assert_eq!(other.put(0, &[1])?, [result::OK], "{what}");
    }
    Ok(())
}

/// A small generator with a seed, so that what it finds can be found again.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn place(&mut self, n: u8) -> usize {
        usize::from(u8::try_from(self.below(u64::from(n))).unwrap_or_default())
    }
}

#[test]
fn random_chains_are_completed_and_break_nothing() -> Result<()> {
    let daemon = TestDaemon::start(2, 8 << 20)?;
    let options = Options {
        queue_size: 16,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    let mut other = daemon.connect(1)?;
    other.new_pool(0, pool_flag::PERSISTENT)?;
    other.put(0, &[1, 2, 3])?;
    for pool in 0..3 {
        guest.new_pool(pool, u32::from(pool != 1))?;
    }
    let seed = std::env::var("CRAM_TEST_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(4711);
    println!("CRAM_TEST_SEED={seed}");
    let mut random = Random(seed | 1);

    // Plausible requests lie around; descriptors point at them, near them, and elsewhere.
    let arena = guest.memory.allocate(1 << 20, 4096)?;
    let until = Instant::now() + Duration::from_secs(3);
    let mut rounds = 0u64;
    while Instant::now() < until {
        rounds += 1;
        for k in 0..16u64 {
            let mut bytes = vec![0; 64];
            bytes[0] = u8::try_from(random.below(8))?;
            bytes[4] = u8::try_from(random.below(4))?;
            bytes[32] = u8::try_from(random.below(66))?;
            bytes[40..].copy_from_slice(&random.next().to_le_bytes().repeat(3));
            if random.below(4) == 0 {
                let at = usize::try_from(random.below(64))?;
                bytes[at] = u8::try_from(random.below(256))?;
            }
            guest.memory.write(arena + k * 4096, &bytes)?;
        }
        let mut waiting = 0;
        for head in 0..16u16 {
            let place = arena + random.below(16) * 4096 + [0, 0, 40, 7][random.place(4)];
            let address = match random.below(12) {
                0 => random.next(),
                1 => guest.memory.unmapped(),
                2 => guest.memory.before_the_hole(random.below(100)),
                _ => place,
            };
            let len = match random.below(6) {
                0 => u32::try_from(random.below(1 << 32))?,
                1 => 4096,
                2 => 80,
                3 => 44,
                4 => u32::try_from(random.below(20_000))?,
                _ => 40,
            };
            let flags = [0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7][random.place(12)];
            let next = u16::try_from(random.below(18))?;
            guest.ring(1).write_descriptor(
                head,
                Descriptor {
                    address,
                    len,
                    flags,
                    next,
                },
            )?;
        }
        for _ in 0..random.below(16) {
            let head = guest.ring(1).reserve_head()?;
            guest.ring(1).make_available(head)?;
            waiting += 1;
        }
        guest.ring(1).notify()?;
        for _ in 0..waiting {
            guest.ring(1).wait_used(PATIENCE)?;
        }
        assert_eq!(guest.ring(1).in_flight(), 0);
    }
    println!("{rounds} rounds");
    assert!(rounds > 50);
    assert_eq!(
        daemon.client_stats(0)?["device"]["queues_stopped"],
        json!(0)
    );
    assert_eq!(other.get(0, &[1, 2, 3])?, [result::OK; 3]);
    assert_eq!(
        guest.call(2, &Request::query())?.used as usize,
        RESPONSE_SIZE + 64
    );
    daemon.check_store()
}
