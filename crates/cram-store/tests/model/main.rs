// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Random operations of two clients on all kinds of pools, in a store so small
//! that it is always in trouble, against a plain map. After every operation
//! the whole store must agree with itself; and at any time it may be closed and
//! opened again, with everything in it.

#![allow(missing_docs, unreachable_pub)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod machine;
#[path = "../pages/mod.rs"]
mod pages;

use machine::{Model, Operation, QUOTA_BYTES, Which};
use pages::{content, times};
use proptest::prelude::*;

fn index() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => 0_u32..200,
        1 => Just(u32::MAX),
        1 => Just(u32::MAX - 63),
        1 => (0_u32..8).prop_map(|step| step << 24),
    ]
}

fn operation() -> impl Strategy<Value = Operation> {
    let at = || (0..2_usize, 0..3_usize).prop_map(|(client, pool)| Which { client, pool });
    let object = || 0..3_u64;
    let count = prop_oneof![0..70_u64, Just(1 << 32), Just(u64::MAX), Just(1 << 20)];
    prop_oneof![
        8 => (at(), object(), index(), prop_oneof![3 => 1..2_u32, 1 => 1..90_u32], content())
            .prop_map(|(at, object, first, count, content)| {
                Operation::Put { at, object, first, count, content }
            }),
        8 => (at(), object(), index())
            .prop_map(|(at, object, index)| Operation::Get { at, object, index }),
        2 => (at(), object(), index(), count)
            .prop_map(|(at, object, first, count)| Operation::FlushPage { at, object, first, count }),
        1 => (at(), object()).prop_map(|(at, object)| Operation::FlushObject { at, object }),
        1 => at().prop_map(|at| Operation::NewPool { at }),
        1 => at().prop_map(|at| Operation::DestroyPool { at }),
        1 => (0..2_usize, any::<bool>())
            .prop_map(|(client, is_frozen)| Operation::Freeze { client, is_frozen }),
        1 => (0..2_usize, prop::option::of(0..QUOTA_BYTES))
            .prop_map(|(client, quota)| Operation::SetQuota { client, quota }),
        1 => (0..2_usize, 0..QUOTA_BYTES)
            .prop_map(|(client, bytes)| Operation::Evict { client, bytes }),
        1 => Just(Operation::Compact),
        1 => Just(Operation::Recompress),
        1 => Just(Operation::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: u32::try_from(times(600)).unwrap(),
        failure_persistence: None,
        max_shrink_iters: 4000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn the_store_does_what_a_map_does(
        operations in prop::collection::vec(operation(), 1..150),
        is_grouped: bool,
    ) {
        let mut model = Model::new(is_grouped);
        for operation in operations {
            model.run(operation);
            model.verify();
        }
        model.finish();
    }
}
