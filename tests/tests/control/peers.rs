// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Who may do what, and how the methods describe themselves.

use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result};
use cram_tests::frontend::TestDaemon;
use serde_json::{Map, json};
use vhost_device_cram::control::methods;
use vhost_device_cram::control::peer::Peer;
use vhost_device_cram::socket::Permissions;

use crate::{CAPACITY, start};

const OWN: u32 = 1000;

#[test]
fn who_is_neither_root_nor_the_daemons_user_may_only_look() -> Result<()> {
    let daemon = start()?;
    let shared = daemon.daemon().shared();
    let before = daemon.call("stats", json!({}))?["clients"].clone();
    let listed = daemon.call("methods", json!({}))?;
    let methods = listed["methods"].as_array().context("no list")?;
    let (root, own, other) = (
        Peer::new(0, 1, OWN),
        Peer::new(OWN, 1, OWN),
        Peer::new(OWN + 1, 7, OWN),
    );
    let mut changing = 0;
    for method in methods {
        let name = method["name"].as_str().context("no name")?;
        let none = Map::new();
        let outcome = methods::call(shared, &other, name, &none);
        if method["access"] == "read" {
            assert!(outcome.is_ok(), "{name}");
            continue;
        }
        changing += 1;
        let error = outcome.err().context(name.to_owned())?;
        assert_eq!(error.code, -32002, "{name}");
        let words = ["user 1001, process 7", "ask as root"];
        assert!(
            words.iter().all(|word| error.message.contains(word)),
            "{}",
            error.message
        );
        for peer in [&root, &own] {
            let outcome = methods::call(shared, peer, name, &none);
            assert!(
                outcome.is_ok() || outcome.is_err_and(|error| error.code == -32602),
                "{name}"
            );
        }
    }
    assert!(changing > 10 && methods.len() - changing > 5);
    assert_eq!(daemon.call("stats", json!({}))?["clients"], before);
    Ok(())
}

#[test]
fn the_control_socket_has_the_mode_and_group_that_were_asked_for() -> Result<()> {
    // A group that we are in, whoever we are.
    let group = rustix::process::getegid().as_raw();
    let daemon = TestDaemon::start_with(1, CAPACITY, |options| {
        options.control_permissions = Permissions {
            mode: 0o660,
            group: Some(group),
        };
    })?;
    let found = std::fs::metadata(daemon.control_socket())?;
    assert_eq!((found.mode() & 0o777, found.gid()), (0o660, group));
    assert!(daemon.call("version", json!({})).is_ok());
    Ok(())
}

#[test]
fn methods_describe_themselves() -> Result<()> {
    let daemon = start()?;
    let document = daemon.call("rpc.discover", json!({}))?;
    assert_eq!(document["openrpc"], json!("1.3.2"));
    let described = document["methods"].as_array().context("no methods")?;
    let listed = daemon.call("methods", json!({}))?;
    let listed = listed["methods"].as_array().context("no list")?;
    assert_eq!(described.len(), listed.len());
    let find = |name: &str| described.iter().find(|method| method["name"] == name);
    let add = find("guest.add").context("no guest.add")?;
    let params = add["params"].as_array().context("no params")?;
    let required = |name: &str| {
        let param = params.iter().find(|param| param["name"] == name);
        param.map(|param| param["required"].clone())
    };
    assert_eq!(required("name"), Some(json!(true)));
    assert_eq!(required("quota"), Some(json!(false)));
    // What is answered is what the schema says: names of fields, at the least.
    for name in [
        "version",
        "stats",
        "clients",
        "stats.histogram",
        "store.anatomy",
    ] {
        let answer = daemon.call(name, json!({}))?;
        let schema = &find(name).context(name)?["result"]["schema"];
        let properties = schema["properties"].as_object().context(name)?;
        for key in answer.as_object().context(name)?.keys() {
            assert!(properties.contains_key(key), "{name}: {key}");
        }
    }
    // Nothing has to be looked for elsewhere.
    assert!(!document.to_string().contains("$ref"));
    Ok(())
}
