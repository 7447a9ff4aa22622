// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The event queue (section 8), and changes of the configuration space (section 4).

use std::time::Duration;

use anyhow::Result;
use cram_abi::wire::{Report, event, feature, policy, pool_flag, progress, result, status};
use cram_tests::frontend::{Guest, Options, PATIENCE, Piece, Request, TestDaemon};
use serde_json::json;

const QUOTA: u64 = 1 << 20;

fn start() -> Result<(TestDaemon, Guest)> {
    let daemon = TestDaemon::start_with(1, 64 << 20, |options| options.quota_bytes = Some(QUOTA))?;
    let mut guest = daemon.connect(0)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    Ok((daemon, guest))
}

/// Puts pages until one is refused.
fn fill(guest: &mut Guest) -> Result<()> {
    for first in (0..).step_by(16) {
        let numbers: Vec<u32> = (first..first + 16).collect();
        if guest.put(0, &numbers)?.contains(&result::OVER_QUOTA) {
            return Ok(());
        }
    }
    Ok(())
}

#[test]
fn pressure_is_announced_both_ways_and_not_too_often() -> Result<()> {
    let (_daemon, mut guest) = start()?;
    let buffers = guest.give_event_buffers(32)?;
    fill(&mut guest)?;
    let mut told = 0;
    while told < 850 {
        told = guest.wait_event(event::PRESSURE, &buffers)?.value.get();
    }
    assert!(guest.wait_config_change(PATIENCE)?);
    assert!(guest.config()?.pressure.get() >= 900);
    guest.call(1, &Request::flush_object(0, 0))?;
    while told > 0 {
        told = guest.wait_event(event::PRESSURE, &buffers)?.value.get();
    }
    assert_eq!(guest.config()?.pressure.get(), 0);

    // Up and down for half a second: not more than ten announcements a second.
    while guest.wait_config_change(Duration::from_millis(300))? {}
    let until = std::time::Instant::now() + Duration::from_millis(500);
    while std::time::Instant::now() < until {
        fill(&mut guest)?;
        guest.call(1, &Request::flush_object(0, 0))?;
    }
    let mut announced = 0;
    while guest.wait_config_change(Duration::from_millis(300))? {
        announced += 1;
    }
    assert!(
        announced <= 10,
        "{announced} announcements in little more than half a second"
    );
    Ok(())
}

#[test]
fn who_is_refused_for_want_of_quota_sees_full_pressure() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let limits = |guest: &mut Guest| guest.call(1, &Request::query())?.limits();
    for quota in [QUOTA, 3 * QUOTA, QUOTA / 2] {
        daemon.call("client.quota", json!({"client": "guest0", "bytes": quota}))?;
        guest.call(1, &Request::flush_object(0, 0))?;
        fill(&mut guest)?;
        assert_eq!(guest.config()?.pressure.get(), 1000, "{quota}");
        assert_eq!(limits(&mut guest)?.pressure.get(), 1000, "{quota}");
    }
    Ok(())
}

#[test]
fn a_quota_below_what_is_held_takes_nothing_away() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let numbers: Vec<u32> = (0..60).collect();
    assert_eq!(guest.put(0, &numbers)?, [result::OK; 60]);
    let quota = 64 << 10;
    daemon.call("client.quota", json!({"client": "guest0", "bytes": quota}))?;
    let limits = guest.call(1, &Request::query())?.limits()?;
    assert_eq!(limits.quota_bytes.get(), quota);
    assert!(limits.held_bytes.get() > quota && limits.pressure.get() == 1000);
    // Everything is there, and nothing more is taken: whoever would grow is refused.
    assert_eq!(guest.get(0, &numbers)?, [result::OK; 60]);
    assert_eq!(guest.put(0, &[100])?, [result::OVER_QUOTA]);
    for first in (0..60).step_by(10) {
        guest.call(1, &Request::flush_page(0, 0, &[(first, 10)]))?;
    }
    assert_eq!(guest.put(0, &[100])?, [result::OK]);
    Ok(())
}

#[test]
fn an_operator_asks_for_pages_and_changes_the_quota() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let buffers = guest.give_event_buffers(4)?;
    let answer = daemon.call(
        "client.give_back",
        json!({ "client": "guest0", "pages": 123 }),
    )?;
    assert_eq!(answer["connected"], json!(true));
    let given = guest.wait_event(event::GIVE_BACK, &buffers)?;
    assert_eq!((given.value.get(), given.wide.get()), (123, 0));

    daemon.call("client.quota", json!({ "client": "guest0", "bytes": "3M" }))?;
    let changed = guest.wait_event(event::QUOTA, &buffers)?;
    assert_eq!((changed.value.get(), changed.wide.get()), (0, 3 << 20));
    assert!(guest.wait_config_change(PATIENCE)?);
    assert_eq!(guest.config()?.quota_bytes.get(), 3 << 20);
    Ok(())
}

#[test]
fn without_a_buffer_the_newest_of_each_kind_waits() -> Result<()> {
    let (daemon, mut guest) = start()?;
    for pages in [1, 2, 3] {
        daemon.call(
            "client.give_back",
            json!({ "client": "guest0", "pages": pages }),
        )?;
    }
    daemon.call(
        "client.quota",
        json!({ "client": "guest0", "bytes": 2 << 20 }),
    )?;
    assert!(guest.wait_config_change(PATIENCE)?);
    let buffers = guest.give_event_buffers(8)?;
    assert_eq!(guest.wait_event(event::GIVE_BACK, &buffers)?.value.get(), 3);
    assert_eq!(
        guest.wait_event(event::QUOTA, &buffers)?.wide.get(),
        2 << 20
    );
    std::thread::sleep(Duration::from_millis(50));
    assert!(
        guest.ring(0).take_used()?.is_none(),
        "nothing else was waiting"
    );

    // Also over a reconnect.
    drop(guest);
    let until = std::time::Instant::now() + PATIENCE;
    while daemon.client_stats(0)?["connected"] == json!(true) {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    let answer = daemon.call(
        "client.give_back",
        json!({ "client": "guest0", "pages": 9 }),
    )?;
    assert_eq!(answer["connected"], json!(false));
    let mut guest = daemon.connect(0)?;
    let buffers = guest.give_event_buffers(2)?;
    assert_eq!(guest.wait_event(event::GIVE_BACK, &buffers)?.value.get(), 9);
    Ok(())
}

#[test]
fn a_wrong_buffer_is_given_back_and_the_event_kept() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let address = guest.memory.allocate(64, 8)?;
    let good = Piece {
        address,
        len: 16,
        writable: true,
    };
    let hole = guest.memory.unmapped();
    let wrong = [
        vec![Piece { len: 15, ..good }],
        vec![Piece {
            writable: false,
            ..good
        }],
        vec![Piece {
            address: hole,
            ..good
        }],
        vec![
            Piece {
                writable: false,
                ..good
            },
            good,
        ],
        vec![Piece { len: 0, ..good }; 200],
    ];
    for pieces in &wrong {
        guest.ring(0).submit(pieces)?;
    }
    guest.ring(0).submit(&[good])?;
    guest.ring(0).notify()?;
    daemon.call(
        "client.give_back",
        json!({ "client": "guest0", "pages": 5 }),
    )?;
    for _ in &wrong {
        assert_eq!(guest.ring(0).wait_used(PATIENCE)?.1, 0);
    }
    assert_eq!(guest.ring(0).wait_used(PATIENCE)?.1, 16);
    assert_eq!(guest.memory.read(address, 8)?, [2, 0, 0, 0, 5, 0, 0, 0]);
    Ok(())
}

#[test]
fn a_driver_that_wants_no_events_gets_none() -> Result<()> {
    let (daemon, guest) = start()?;
    drop(guest);
    let options = Options {
        features: feature::ALL & !feature::EVENTS,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    guest.give_event_buffers(4)?;
    daemon.call(
        "client.give_back",
        json!({ "client": "guest0", "pages": 5 }),
    )?;
    fill(&mut guest)?;
    // The configuration space is announced all the same.
    assert!(guest.wait_config_change(PATIENCE)?);
    assert!(guest.ring(0).take_used()?.is_none());
    Ok(())
}

#[test]
fn a_lying_event_queue_stops_no_request() -> Result<()> {
    let (daemon, mut guest) = start()?;
    guest.ring(0).set_available_index(5000)?;
    guest.ring(0).notify_always()?;
    daemon.call(
        "client.give_back",
        json!({ "client": "guest0", "pages": 5 }),
    )?;
    assert_eq!(guest.put(0, &[1])?, [result::OK]);
    let until = std::time::Instant::now() + PATIENCE;
    while daemon.client_stats(0)?["device"]["queues_stopped"] != json!(1) {
        assert!(std::time::Instant::now() < until);
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(guest.get(0, &[1])?, [result::OK]);
    guest.reset_queue(0, &Options::default())?;
    let buffers = guest.give_event_buffers(2)?;
    assert_eq!(guest.wait_event(event::GIVE_BACK, &buffers)?.value.get(), 5);
    Ok(())
}

#[test]
fn a_guest_is_squeezed_and_its_driver_reports() -> Result<()> {
    let (daemon, mut guest) = start()?;
    let buffers = guest.give_event_buffers(4)?;
    daemon.call(
        "client.squeeze",
        json!({ "client": "guest0", "bytes": "1M" }),
    )?;
    let asked = guest.wait_event(event::SQUEEZE, &buffers)?;
    assert_eq!((asked.value.get(), asked.wide.get()), (256, 0));
    assert_eq!(
        daemon.client_stats(0)?["squeeze"],
        json!({ "state": "asked", "asked_pages": 256, "done_pages": 0 })
    );

    let mut report = Report {
        kind: event::SQUEEZE.into(),
        state: progress::THROTTLED.into(),
        asked: 256.into(),
        done: 100.into(),
        free: 3.into(),
        total: 1000.into(),
        reserved: 0.into(),
    };
    let answer = guest.call(1, &Request::report(&report))?;
    assert_eq!(answer.response.status, status::OK);
    let stats = daemon.client_stats(0)?;
    assert_eq!(
        stats["squeeze"],
        json!({ "state": "throttled", "asked_pages": 256, "done_pages": 100 })
    );
    assert_eq!(
        stats["guest_memory"],
        json!({ "free_pages": 3, "total_pages": 1000 })
    );

    // Nonsense is shown as it is, or ignored; it changes nothing else.
    report.kind = 77.into();
    report.state = 99.into();
    assert_eq!(
        guest.call(1, &Request::report(&report))?.response.status,
        status::OK
    );
    assert_eq!(daemon.client_stats(0)?["squeeze"], stats["squeeze"]);
    report.reserved = 1.into();
    assert_eq!(
        guest.call(1, &Request::report(&report))?.response.status,
        status::BAD_REQUEST
    );
    Ok(())
}

#[test]
fn a_driver_without_the_feature_is_not_squeezed() -> Result<()> {
    let (daemon, guest) = start()?;
    drop(guest);
    let options = Options {
        features: feature::ALL & !feature::SQUEEZE,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.socket(0), &options)?;
    let refused = daemon.call("client.squeeze", json!({ "client": "guest0", "pages": 1 }));
    assert!(refused.is_err(), "an old driver was asked");
    let report = Request::report(&Report::default());
    assert_eq!(guest.call(1, &report)?.response.status, status::UNSUPPORTED);
    Ok(())
}

#[test]
fn a_policy_is_announced() -> Result<()> {
    let (daemon, mut guest) = start()?;
    assert_eq!(guest.config()?.policy.get(), 0);
    daemon.call(
        "client.policy",
        json!({ "client": "guest0", "copies": "keep", "auto_squeeze": true }),
    )?;
    assert!(guest.wait_config_change(PATIENCE)?);
    let both = policy::KEEP_COPIES | policy::AUTO_SQUEEZE;
    assert_eq!(guest.config()?.policy.get(), both);

    // An adaptive pool gives its copies up when it fills.
    let adaptive = json!({ "client": "guest0", "copies": "adaptive", "auto_squeeze": false });
    daemon.call("client.policy", adaptive)?;
    assert!(guest.wait_config_change(PATIENCE)?);
    assert_eq!(guest.config()?.policy.get(), policy::KEEP_COPIES);
    fill(&mut guest)?;
    let until = std::time::Instant::now() + PATIENCE;
    while guest.config()?.policy.get() != 0 {
        assert!(std::time::Instant::now() < until);
        guest.wait_config_change(PATIENCE)?;
    }
    Ok(())
}
