// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Any sequence of operations on a small store, against a plain map. The machine is that of the
//! property test; here the fuzzer looks for the sequence.

#![no_main]
#![allow(dead_code)]

#[path = "../../crates/cram-store/tests/model/machine.rs"]
mod machine;
#[path = "../../crates/cram-store/tests/pages/mod.rs"]
mod pages;

use libfuzzer_sys::fuzz_target;
use machine::{Model, Operation};

/// Longer ones only take longer.
const OPERATIONS_MAX: usize = 60;

fuzz_target!(|input: (bool, Vec<Operation>)| {
    let (is_grouped, operations) = input;
    let mut model = Model::new(is_grouped);
    for operation in operations.into_iter().take(OPERATIONS_MAX) {
        model.run(operation.confined());
    }
    model.verify();
    model.finish();
});
