// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first rule: a duplicate put either overwrites, or is refused *and*
//! removes the older copy. Whatever the store's state, the pool's kind and the
//! page, the older bytes are never seen again.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use cram_store::{
    GetResult, ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Refusal, Scratch,
};
use pages::{Content, content, page_of, store_of};
use proptest::prelude::*;

const UUID: [u8; 16] = [7; 16];
const OBJECT: ObjectId = ObjectId([1, 2, 3]);

fn kind() -> impl Strategy<Value = PoolKind> {
    prop_oneof![
        Just(PoolKind::Persistent),
        Just(PoolKind::PrivateEphemeral),
        Just(PoolKind::SharedEphemeral { uuid: UUID }),
    ]
}

/// What makes the second put hard.
#[derive(Debug, Clone, Copy)]
enum Trouble {
    None,
    Frozen,
    StoreFull,
    QuotaUsedUp,
    QuotaLowered,
}

fn trouble() -> impl Strategy<Value = Trouble> {
    prop_oneof![
        Just(Trouble::None),
        Just(Trouble::Frozen),
        Just(Trouble::StoreFull),
        Just(Trouble::QuotaUsedUp),
        Just(Trouble::QuotaLowered),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_put_never_leaves_an_older_copy(
        kind in kind(),
        trouble in trouble(),
        refuse_incompressible: bool,
        first in content(),
        second in content(),
        index: u32,
    ) {
        let store = store_of(512 << 10);
        let client = store.add_client("one", Some(300 << 10)).unwrap();
        client.authorise(UUID);
        client.new_pool(PoolId(0), PoolSpec { kind, refuse_incompressible }).unwrap();
        let pool = client.pool(PoolId(0)).unwrap();
        let mut scratch = Scratch::new();
        let _ = pool.put(OBJECT, index, &page_of(first, 1), &mut scratch);

        // Fill with pages of another object that nobody may evict.
        let mut fill = |name: &str, pages: u32| {
            let other = store.add_client(name, None).unwrap();
            let spec = PoolSpec { kind: PoolKind::Persistent, refuse_incompressible: false };
            other.new_pool(PoolId(1), spec).unwrap();
            let pool = other.pool(PoolId(1)).unwrap();
            for number in 0..pages {
                let page = page_of(Content::Noise, u64::from(number) + 100);
                let _ = pool.put(OBJECT, number, &page, &mut scratch);
            }
        };
        match trouble {
            Trouble::None => (),
            Trouble::Frozen => client.freeze(true),
            Trouble::StoreFull => fill("two", 200),
            Trouble::QuotaUsedUp => {
                let spec = PoolSpec { kind: PoolKind::Persistent, refuse_incompressible: false };
                client.new_pool(PoolId(1), spec).unwrap();
                let filler = client.pool(PoolId(1)).unwrap();
                for number in 0..100 {
                    let page = page_of(Content::Noise, u64::from(number) + 100);
                    let _ = filler.put(OBJECT, number, &page, &mut scratch);
                }
            }
            Trouble::QuotaLowered => client.set_quota(Some(1)),
        }

        let newer = page_of(second, 2);
        let put = pool.put(OBJECT, index, &newer, &mut scratch);
        let mut page = [0xee; PAGE_SIZE];
        let got = pool.get(OBJECT, index, &mut page, &mut scratch);
        match put {
            PutResult::Stored => {
                prop_assert_eq!(got, GetResult::Found);
                prop_assert!(page == newer, "other bytes than those put last");
            }
            PutResult::Refused(why) => {
                prop_assert_eq!(got, GetResult::Missing, "after {:?}", why);
                prop_assert!(page == [0xee; PAGE_SIZE], "a miss touched the buffer");
                let expected = match why {
                    Refusal::Frozen => matches!(trouble, Trouble::Frozen),
                    Refusal::Incompressible => refuse_incompressible && second == Content::Noise,
                    Refusal::NoSpace => matches!(trouble, Trouble::StoreFull),
                    Refusal::OverQuota => {
                        matches!(trouble, Trouble::QuotaLowered | Trouble::QuotaUsedUp)
                    }
                };
                prop_assert!(expected, "{:?} for {:?}", why, trouble);
                // And what is missing stays missing.
                prop_assert_eq!(pool.get(OBJECT, index, &mut page, &mut scratch), GetResult::Missing);
            }
        }
        if matches!(trouble, Trouble::None) && !(refuse_incompressible && second == Content::Noise) {
            prop_assert_eq!(put, PutResult::Stored);
        }
        prop_assert_eq!(store.check(), Ok(()));
    }
}
