// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any chain of descriptors over any memory: it is parsed, executed against a real store, and
//! answered within its bounds.

#![no_main]

mod guest;

use std::cell::RefCell;
use std::sync::Arc;

use arbitrary::Arbitrary;
use cram_abi::wire::{MAX_WRITABLE, feature};
use cram_store::{Client, Store};
use guest::{POOLS, RING, Write, empty, memory, store, table_at, wipe};
use libfuzzer_sys::fuzz_target;
use vhost_device_cram::balance::{Balance, Policy};
use vhost_device_cram::execute::{Target, Workspace, execute};
use vhost_device_cram::request::{Parsed, Table, Terms};
use vhost_device_cram::vhost::memory::Memory;

/// Longer ones only take longer.
const STEPS_MAX: usize = 48;

#[derive(Arbitrary, Debug)]
struct Input {
    features: u8,
    indirect: bool,
    steps: Vec<Step>,
}

#[derive(Arbitrary, Debug)]
enum Step {
    Write(Write),
    Run { table: u8, head: u8 },
}

struct Host {
    memory: Memory,
    store: Arc<Store>,
    client: Arc<Client>,
    balance: Balance,
    workspace: Workspace,
}

thread_local! {
    static HOST: RefCell<Host> = RefCell::new(Host::new());
}

impl Host {
    fn new() -> Self {
        let (store, client) = store();
        let (memory, _file) = memory();
        Self {
            memory,
            store,
            client,
            balance: Balance::new(Policy::default()),
            workspace: Workspace::new(),
        }
    }

    /// As it was in the beginning.
    fn reset(&mut self) {
        wipe(&self.memory);
        empty(&self.client);
    }

    fn run(&mut self, table: u8, head: u8, terms: &Terms) {
        let table = Table {
            address: table_at(u64::from(table)),
            len: u32::from(RING),
        };
        let parsed = self
            .workspace
            .chain()
            .parse(&self.memory, table, u16::from(head % 18), terms);
        let target = Target {
            store: &self.store,
            client: &self.client,
            balance: &self.balance,
            features: terms.features,
            max_pools: POOLS,
        };
        let effect = execute(target, &self.memory, &mut self.workspace, parsed);
        assert!(effect.used as usize <= MAX_WRITABLE);
        if parsed == Parsed::Unanswerable {
            assert_eq!(effect.used, 0);
        }
    }
}

fuzz_target!(|input: Input| {
    let terms = Terms {
        features: u64::from(input.features) & feature::ALL,
        indirect: input.indirect,
    };
    HOST.with_borrow_mut(|host| {
        host.reset();
        for step in input.steps.iter().take(STEPS_MAX) {
            match step {
                Step::Write(write) => write.apply(&host.memory),
                Step::Run { table, head } => host.run(*table, *head, &terms),
            }
        }
        assert!(host.store.stats().mem_used_total <= host.store.capacity_bytes());
    });
});
