// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A flipped bit is an error for its page and for nobody else; never wrong bytes.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation
)]

mod pages;

use cram_store::{GetResult, ObjectId, PAGE_SIZE, PoolId, PoolKind, PoolSpec, PutResult, Scratch};
use pages::{Content, page_of, store_of};

const OBJECT: ObjectId = ObjectId([5, 6, 7]);

#[test]
fn every_flipped_bit_is_noticed() {
    let store = store_of(64 << 20);
    let client = store.add_client("a", None).unwrap();
    client.authorise([1; 16]);
    let kinds = [
        PoolKind::Persistent,
        PoolKind::PrivateEphemeral,
        PoolKind::SharedEphemeral { uuid: [1; 16] },
    ];
    let mut scratch = Scratch::new();
    for (id, kind) in (0..).zip(kinds) {
        client
            .new_pool(
                PoolId(id),
                PoolSpec {
                    kind,
                    refuse_incompressible: false,
                },
            )
            .unwrap();
        let pool = client.pool(PoolId(id)).unwrap();
        for (index, content) in (0..).zip([
            Content::Filled,
            Content::Packs(9),
            Content::Packs(40),
            Content::Noise,
        ]) {
            let page = page_of(content, 77);
            for bit in (0..4096 * 8).step_by(11) {
                let put = pool.put(OBJECT, index, &page, &mut scratch);
                assert_eq!(put, PutResult::Stored);
                assert!(pool.flip_stored_bit(OBJECT, index, bit));
                let mut back = [0xee; PAGE_SIZE];
                match pool.get(OBJECT, index, &mut back, &mut scratch) {
                    GetResult::Corrupt => assert_eq!(back, [0; PAGE_SIZE]),
                    // Some bits of an lz4 block say nothing: two ways to write the same bytes.
                    GetResult::Found => assert!(back == page),
                    GetResult::Missing => panic!("{kind:?} {content:?} bit {bit}"),
                }
            }
            // A corrupt page stays, even where gets remove pages; a put heals it.
            assert_eq!(
                pool.put(OBJECT, index, &page, &mut scratch),
                PutResult::Stored
            );
            assert!(pool.flip_stored_bit(OBJECT, index, 3));
            let mut back = [0; PAGE_SIZE];
            for _ in 0..2 {
                assert_eq!(
                    pool.get(OBJECT, index, &mut back, &mut scratch),
                    GetResult::Corrupt
                );
            }
            assert_eq!(
                pool.put(OBJECT, index, &page, &mut scratch),
                PutResult::Stored
            );
            assert_eq!(
                pool.get(OBJECT, index, &mut back, &mut scratch),
                GetResult::Found
            );
            assert_eq!(back, page);
        }
        assert!(pool.stats().gets_corrupt > 0);
        assert_eq!(pool.stats().gets_missing, 0);
    }
    assert_eq!(store.check(), Ok(()));
}
