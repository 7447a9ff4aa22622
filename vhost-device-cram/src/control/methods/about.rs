// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Methods about the methods.

use cram_abi::wire;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};

use super::params::Nothing;
use super::{METHODS, Method, SCHEMA};
use crate::control::peer::Access;
use crate::control::rpc::Error;
use crate::shared::Shared;

/// The answer to "methods".
#[derive(Serialize, JsonSchema)]
pub(super) struct Methods {
    methods: Vec<MethodEntry>,
}

/// A method.
#[derive(Serialize, JsonSchema)]
struct MethodEntry {
    /// What it is called by.
    name: &'static str,
    /// What it takes, in words.
    params: &'static str,
    /// What it does.
    description: &'static str,
    /// Who only reads may call those that read.
    access: Access,
}

pub(super) fn methods(_: &Shared, _: Nothing) -> Result<Methods, Error> {
    let entry = |method: &Method| MethodEntry {
        name: method.name,
        params: method.params,
        description: method.description,
        access: method.access,
    };
    Ok(Methods {
        methods: METHODS.iter().map(entry).collect(),
    })
}

/// The answer to "version".
#[derive(Serialize, JsonSchema)]
pub(super) struct Version {
    /// The program.
    daemon: &'static str,
    /// Its version.
    version: &'static str,
    /// The version of the protocol that it speaks with guests.
    protocol: u32,
    /// The version of these answers: fields may be added within one; none go, and none change.
    schema: u32,
}

pub(super) fn version(_: &Shared, _: Nothing) -> Result<Version, Error> {
    Ok(Version {
        daemon: env!("CARGO_PKG_NAME"),
        version: env!("CARGO_PKG_VERSION"),
        protocol: wire::VERSION,
        schema: SCHEMA,
    })
}

/// An OpenRPC document.
pub(super) fn discover(_: &Shared, _: Nothing) -> Result<Value, Error> {
    Ok(json!({
        "openrpc": "1.3.2",
        "info": {
            "title": env!("CARGO_PKG_NAME"),
            "version": env!("CARGO_PKG_VERSION"),
        },
        "methods": METHODS.iter().map(describe).collect::<Vec<_>>(),
    }))
}

/// A method as OpenRPC has it: its parameters one by one.
fn describe(method: &Method) -> Value {
    let taken = (method.params_schema)().to_value();
    let is_required = |name: &str| {
        let required = taken.get("required").and_then(Value::as_array);
        required.is_some_and(|names| names.iter().any(|other| other == name))
    };
    let properties = taken.get("properties").and_then(Value::as_object);
    let params: Vec<_> = properties
        .into_iter()
        .flatten()
        .map(|(name, schema)| json!({ "name": name, "required": is_required(name), "schema": schema }))
        .collect();
    json!({
        "name": method.name,
        "description": method.description,
        "paramStructure": "by-name",
        "params": params,
        "result": { "name": "answer", "schema": (method.result_schema)().to_value() },
        "x-access": method.access,
    })
}
