// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The driver at full speed: what it sends arrives, on every queue, however it waits.

use anyhow::{Result, ensure};
use cram_abi::wire::{PAGE_SIZE, pool_flag};
use cram_tests::frontend::{Ask, Guest, Options, TestDaemon, Wait, page};

const CAPACITY: u64 = 64 << 20;
const PAGES: u32 = 1000;

#[test]
fn pages_come_back_through_every_kind_of_flow() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    for event_idx in [true, false] {
        let options = Options {
            event_idx,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        guest.new_pool(0, pool_flag::PERSISTENT)?;
        for (queue, lanes, batch, wait) in [
            (1, 1, 1, Wait::Sleep),
            (1, 4, 32, Wait::Spin),
            (2, 7, 64, Wait::Sleep),
            (2, 2, 3, Wait::Spin),
        ] {
            let mark = guest.memory.mark();
            let bytes = PAGES as usize * PAGE_SIZE;
            let (from, to) = (
                guest.memory.allocate(bytes, 4096)?,
                guest.memory.allocate(bytes, 4096)?,
            );
            let at = |base: u64, number: u32| base + u64::from(number) * PAGE_SIZE as u64;
            let salt = u64::try_from(lanes * batch)?;
            for number in 0..PAGES {
                let bytes = page(u64::from(number) * 1000 + salt);
                guest.memory.write(at(from, number), &bytes)?;
            }
            let batches = |base| {
                let mut number = 0;
                move |pages: &mut Vec<(u32, u64)>| {
                    let until = PAGES.min(number + u32::try_from(batch).unwrap_or(1));
                    pages.extend((number..until).map(|number| (number, at(base, number))));
                    number = until;
                    !pages.is_empty()
                }
            };
            let mut flow = guest.flow(queue, 0, lanes, batch, wait)?;
            assert_eq!(flow.drive(Ask::Put, batches(from))?, u64::from(PAGES));
            assert_eq!(flow.drive(Ask::Get, batches(to))?, u64::from(PAGES));
            drop(flow);
            let memory = &guest.memory;
            ensure!(
                memory.read(from, bytes)? == memory.read(to, bytes)?,
                "pages are wrong: {lanes} lanes of {batch}"
            );
            memory.release(mark);
            guest.ring(queue).watch(false)?;
        }
    }
    daemon.check_store()
}
