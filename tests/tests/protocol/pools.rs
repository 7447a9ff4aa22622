// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! query, new_pool, destroy_pool: section 6.2 of the protocol.

use anyhow::Result;
use cram_abi::wire::{
    self, NewPool, PAGE_SHIFT, RESPONSE_SIZE, feature, op, pool_flag, result, status,
};
use cram_tests::frontend::{Guest, Options, Request, TestDaemon, page};
use serde_json::json;
use zerocopy::IntoBytes;

const CAPACITY: u64 = 64 << 20;
const UUID: [u8; 16] = [0x6b; 16];
const UUID_TEXT: &str = "6b6b6b6b-6b6b-6b6b-6b6b-6b6b6b6b6b6b";
const EPHEMERAL: u32 = 0;

fn status_of(guest: &mut Guest, request: &Request) -> Result<u8> {
    let answer = guest.call(1, request)?;
    let response = answer.response;
    assert_eq!(response.reserved, [0; 3]);
    assert!(response.result.iter().all(|&r| r == result::NOT_DONE));
    if response.status != status::OK {
        assert_eq!((response.count.get(), response.pages.get()), (0, 0));
    }
    Ok(response.status)
}

#[test]
fn query_tells_limits_and_use() -> Result<()> {
    let daemon =
        TestDaemon::start_with(1, CAPACITY, |options| options.quota_bytes = Some(8 << 20))?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    guest.put(0, &[1, 2, 3])?;
    let answer = guest.call(1, &Request::query())?;
    assert_eq!(answer.response.status, status::OK);
    assert_eq!(answer.used as usize, RESPONSE_SIZE + wire::LIMITS_SIZE);
    let limits = answer.limits()?;
    assert_eq!(limits.quota_bytes.get(), 8 << 20);
    assert_eq!(limits.capacity_bytes.get(), CAPACITY);
    assert_eq!(limits.stored_pages.get(), 3);
    assert_eq!(limits.max_pools.get(), 16);
    assert!((3 * 1024..8 << 20).contains(&limits.held_bytes.get()));
    assert_eq!(limits.generation, guest.config()?.generation);
    assert!(limits.pressure.get() < 1000 && limits.reserved == [0u64; 2]);
    Ok(())
}

#[test]
fn a_pool_is_made_once_and_found_again() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    assert_eq!(guest.new_pool(3, pool_flag::PERSISTENT)?, 0);
    guest.put(3, &[10, 11])?;
    assert_eq!(guest.new_pool(3, pool_flag::PERSISTENT)?, 2);
    let other = Request::new_pool(3, EPHEMERAL, [0; 16]);
    assert_eq!(status_of(&mut guest, &other)?, status::POOL_EXISTS);
    let picky = pool_flag::PERSISTENT | pool_flag::REFUSE_INCOMPRESSIBLE;
    let other = Request::new_pool(3, picky, [0; 16]);
    assert_eq!(status_of(&mut guest, &other)?, status::POOL_EXISTS);

    let answer = guest.call(1, &Request::destroy_pool(3))?;
    assert_eq!(
        (answer.response.status, answer.response.pages.get()),
        (status::OK, 2)
    );
    assert_eq!(answer.used as usize, RESPONSE_SIZE);
    assert_eq!(
        status_of(&mut guest, &Request::destroy_pool(3))?,
        status::NO_POOL
    );
    assert_eq!(guest.new_pool(3, EPHEMERAL)?, 0);
    Ok(())
}

#[test]
fn pools_that_cannot_be_are_refused() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let mut guest = daemon.connect(0)?;
    let persistent = pool_flag::PERSISTENT;
    for (what, pool, flags, uuid, wanted) in [
        ("the last id", 15, persistent, [0; 16], status::OK),
        ("an id too high", 16, persistent, [0; 16], status::DENIED),
        (
            "the highest id",
            u32::MAX,
            persistent,
            [0; 16],
            status::DENIED,
        ),
        (
            "unknown flag",
            0,
            persistent | 8,
            [0; 16],
            status::UNSUPPORTED,
        ),
        ("every flag", 0, u32::MAX, UUID, status::UNSUPPORTED),
        (
            "uuid of a private pool",
            0,
            persistent,
            UUID,
            status::BAD_REQUEST,
        ),
        (
            "shared without uuid",
            0,
            pool_flag::SHARED,
            [0; 16],
            status::BAD_REQUEST,
        ),
        (
            "shared and persistent",
            0,
            persistent | pool_flag::SHARED,
            UUID,
            status::DENIED,
        ),
        ("not authorised", 0, pool_flag::SHARED, UUID, status::DENIED),
    ] {
        let request = Request::new_pool(pool, flags, uuid);
        assert_eq!(status_of(&mut guest, &request)?, wanted, "{what}");
    }
    let header = Request::header(op::NEW_POOL, 0, 0, 0);
    for (page_shift, reserved, wanted) in [
        (PAGE_SHIFT + 1, [0; 3], status::UNSUPPORTED),
        (0, [0; 3], status::UNSUPPORTED),
        (PAGE_SHIFT, [0, 0, 1], status::BAD_REQUEST),
    ] {
        let body = NewPool {
            flags: persistent.into(),
            page_shift,
            reserved,
            uuid: [0; 16],
        };
        let request = Request::new(header, body.as_bytes());
        assert_eq!(status_of(&mut guest, &request)?, wanted);
    }
    let answer = guest.call(1, &Request::put(0, 0, &[]))?;
    assert_eq!(
        answer.response.status,
        status::BAD_REQUEST,
        "none of them made pool 0"
    );
    Ok(())
}

#[test]
fn what_was_not_negotiated_is_unsupported() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let options = Options {
        features: 0,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    for (flags, uuid) in [
        (EPHEMERAL, [0; 16]),
        (pool_flag::SHARED, UUID),
        (
            pool_flag::PERSISTENT | pool_flag::REFUSE_INCOMPRESSIBLE,
            [0; 16],
        ),
    ] {
        let request = Request::new_pool(1, flags, uuid);
        assert_eq!(status_of(&mut guest, &request)?, status::UNSUPPORTED);
    }
    Ok(())
}

#[test]
fn a_shared_pool_is_shared_by_those_who_may() -> Result<()> {
    let daemon = TestDaemon::start(3, CAPACITY)?;
    for client in ["guest0", "guest1"] {
        daemon.call(
            "pool.authorise",
            json!({ "client": client, "uuid": UUID_TEXT }),
        )?;
    }
    let mut guests = [daemon.connect(0)?, daemon.connect(1)?, daemon.connect(2)?];
    let request = |id| Request::new_pool(id, pool_flag::SHARED, UUID);
    let [first, second, third] = &mut guests;
    assert_eq!(status_of(first, &request(0))?, status::OK);
    first.put(0, &[1, 2])?;
    // Another id, the same pool.
    let answer = second.call(1, &request(5))?;
    assert_eq!(
        (answer.response.status, answer.response.pages.get()),
        (status::OK, 2)
    );
    assert_eq!(status_of(third, &request(0))?, status::DENIED);

    // A get keeps the page, for both.
    for _ in 0..2 {
        assert_eq!(
            second.get(5, &[1, 2, 3])?,
            [result::OK, result::OK, result::MISSING]
        );
        assert_eq!(first.get(0, &[1])?, [result::OK]);
    }
    second.put(5, &[3])?;
    assert_eq!(first.get(0, &[3])?, [result::OK]);

    // The pages stay until the last one leaves.
    let answer = first.call(1, &Request::destroy_pool(0))?;
    assert_eq!(
        (answer.response.status, answer.response.pages.get()),
        (status::OK, 0)
    );
    assert_eq!(second.get(5, &[1])?, [result::OK]);
    let answer = second.call(1, &Request::destroy_pool(5))?;
    assert_eq!(
        (answer.response.status, answer.response.pages.get()),
        (status::OK, 3)
    );

    // Authority can be taken back.
    daemon.call(
        "pool.authorise",
        json!({ "client": "guest0", "uuid": UUID_TEXT, "revoke": true }),
    )?;
    assert_eq!(status_of(first, &request(0))?, status::DENIED);
    daemon.check_store()
}

#[test]
fn who_is_no_longer_authorised_loses_the_shared_pool() -> Result<()> {
    let daemon = TestDaemon::start(2, CAPACITY)?;
    let shared = Request::new_pool(1, pool_flag::SHARED, UUID);
    let authorise = |client: &str, revoke: bool| {
        let params = json!({"client": client, "uuid": UUID_TEXT, "revoke": revoke});
        daemon.call("pool.authorise", params)
    };
    let (mut first, mut second) = (daemon.connect(0)?, daemon.connect(1)?);
    for (guest, name) in [(&mut first, "guest0"), (&mut second, "guest1")] {
        authorise(name, false)?;
        assert_eq!(status_of(guest, &shared)?, status::OK);
    }
    assert_eq!(first.put(1, &[1, 2])?, [result::OK; 2]);
    authorise("guest0", true)?;
    for request in [
        Request::put(1, 0, &[(3, page(3))]),
        Request::get(1, 0, &[1]),
        Request::flush_object(1, 0),
        Request::destroy_pool(1),
    ] {
        assert_eq!(status_of(&mut first, &request)?, status::NO_POOL);
    }
    assert_eq!(status_of(&mut first, &shared)?, status::DENIED);
    // The others keep what is there.
    assert_eq!(second.get(1, &[1, 2, 3])?[..2], [result::OK; 2]);
    daemon.check_store()
}

#[test]
fn a_shared_pool_has_one_id() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let params = json!({"client": "guest0", "uuid": UUID_TEXT});
    daemon.call("pool.authorise", params)?;
    let mut guest = daemon.connect(0)?;
    let shared = |id| Request::new_pool(id, pool_flag::SHARED, UUID);
    assert_eq!(status_of(&mut guest, &shared(1))?, status::OK);
    assert_eq!(status_of(&mut guest, &shared(2))?, status::DENIED);
    assert_eq!(status_of(&mut guest, &shared(1))?, status::OK);
    assert_eq!(
        status_of(&mut guest, &Request::destroy_pool(1))?,
        status::OK
    );
    assert_eq!(status_of(&mut guest, &shared(2))?, status::OK);
    daemon.check_store()
}

#[test]
fn a_pool_of_a_kind_that_this_driver_did_not_accept_can_only_be_destroyed() -> Result<()> {
    let daemon = TestDaemon::start(1, CAPACITY)?;
    let params = json!({"client": "guest0", "uuid": UUID_TEXT});
    daemon.call("pool.authorise", params)?;
    let picky = pool_flag::PERSISTENT | pool_flag::REFUSE_INCOMPRESSIBLE;
    let kinds = [
        (0, pool_flag::PERSISTENT, [0; 16], 0),
        (1, EPHEMERAL, [0; 16], feature::EPHEMERAL),
        (
            2,
            pool_flag::SHARED,
            UUID,
            feature::SHARED | feature::EPHEMERAL,
        ),
        (3, picky, [0; 16], feature::REFUSE_INCOMPRESSIBLE),
    ];
    for accepted in [
        0,
        feature::EPHEMERAL,
        feature::EPHEMERAL | feature::SHARED,
        feature::REFUSE_INCOMPRESSIBLE,
    ] {
        let mut guest = daemon.connect(0)?;
        for (id, flags, uuid, _) in kinds {
            let new = Request::new_pool(id, flags, uuid);
            assert_eq!(status_of(&mut guest, &new)?, status::OK);
        }
        drop(guest);
        let options = Options {
            features: accepted,
            ..Options::default()
        };
        let mut guest = Guest::connect(&daemon.socket(0), &options)?;
        for (id, _, _, needed) in kinds {
            let wanted = if needed & !accepted == 0 {
                status::OK
            } else {
                status::UNSUPPORTED
            };
            for request in [
                Request::put(id, 0, &[(1, page(1))]),
                Request::get(id, 0, &[1]),
                Request::flush_page(id, 0, &[(1, 1)]),
                Request::flush_object(id, 0),
            ] {
                let answer = guest.call(1, &request)?;
                assert_eq!(answer.response.status, wanted, "{id} of {accepted:#x}");
            }
            let gone = status_of(&mut guest, &Request::destroy_pool(id))?;
            assert_eq!(gone, status::OK);
        }
    }
    daemon.check_store()
}

#[test]
fn a_pool_beyond_a_lower_limit_is_still_there() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let start = |max_pools| {
        let arena = folder.path().join("arena");
        TestDaemon::start_with(1, CAPACITY, |options| {
            options.store.arena = Some(arena);
            options.offer.max_pools = max_pools;
        })
    };
    let daemon = start(16)?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(9, pool_flag::PERSISTENT)?;
    guest.put(9, &[1, 2])?;
    drop((guest, daemon));
    let daemon = start(4)?;
    let mut guest = daemon.connect(0)?;
    assert_eq!(guest.config()?.max_pools.get(), 4);
    assert_eq!(guest.new_pool(9, pool_flag::PERSISTENT)?, 2);
    assert_eq!(guest.get(9, &[1, 2])?, [result::OK; 2]);
    assert_eq!(guest.put(9, &[3])?, [result::OK]);
    let again = Request::new_pool(9, pool_flag::PERSISTENT, [0; 16]);
    assert_eq!(
        status_of(&mut guest, &Request::destroy_pool(9))?,
        status::OK
    );
    assert_eq!(status_of(&mut guest, &again)?, status::DENIED);
    Ok(())
}
