// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What can be asked for on the control socket.
//!
//! The table below is what `methods` and `rpc.discover` answer with; a method that is not in it does
//! not exist. What a method takes and answers are types, of which the schemas are made.

mod about;
mod client;
mod guest;
mod params;
mod stats;
mod store;

use std::sync::LazyLock;

use schemars::generate::SchemaSettings;
use schemars::{JsonSchema, Schema};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

use crate::control::peer::{Access, Peer};
use crate::control::rpc::{Error, FORBIDDEN, INTERNAL_ERROR, INVALID_PARAMS, METHOD_NOT_FOUND};
use crate::shared::Shared;

/// Version of the answers' shapes. Fields may be added within one; none go, and none change.
pub const SCHEMA: u32 = 1;

type Run = Box<dyn Fn(&Shared, &Map<String, Value>) -> Result<Value, Error> + Send + Sync>;

struct Method {
    name: &'static str,
    access: Access,
    /// The parameters for people.
    params: &'static str,
    description: &'static str,
    run: Run,
    params_schema: fn() -> Schema,
    result_schema: fn() -> Schema,
}

static METHODS: LazyLock<Vec<Method>> = LazyLock::new(|| {
    use Access::{Change, Read};
    vec![
        method("methods", Read, "", "List the methods.", about::methods),
        method(
            "rpc.discover",
            Read,
            "",
            "Describe the methods, with a JSON Schema of what each takes and answers (OpenRPC).",
            about::discover,
        ),
        method(
            "version",
            Read,
            "",
            "The daemon's version, the protocol's, and that of these answers (schema).",
            about::version,
        ),
        method(
            "stats",
            Read,
            "",
            "Figures of the store, of each client and of each pool.",
            stats::stats,
        ),
        method(
            "stats.histogram",
            Read,
            "client (optional)",
            "How long puts and gets of each client took, and how long requests waited for those \
             before them. One request of some is timed.",
            stats::histogram,
        ),
        method(
            "clients",
            Read,
            "",
            "The clients: name, socket, whether connected.",
            stats::clients,
        ),
        method(
            "guest.add",
            Change,
            "name, socket, quota (number or size; optional), weight (number; optional), copies \
             (\"free\", \"keep\" or \"adaptive\"; optional), auto_squeeze (true or false; optional), \
             trust_socket (true or false; optional)",
            "Listen for another guest. If the arena knows a client of that name, it has its pages and \
             the settings that it had.",
            guest::add,
        ),
        method(
            "guest.set",
            Change,
            "client, quota (number or size; optional), weight (number; optional), frozen (true or \
             false; optional), copies (optional), auto_squeeze (true or false; optional)",
            "Change what is wanted of a guest: all that is given, or nothing.",
            guest::set,
        ),
        method(
            "guest.remove",
            Change,
            "client, force (true or false; optional), forget (true or false; optional)",
            "Listen for a guest no more. Its pages and settings stay until it is added again, unless \
             forget is true. With force also while it is connected.",
            guest::remove,
        ),
        method(
            "client.quota",
            Change,
            "client, bytes (number or size such as \"512M\"; optional)",
            "Tell a client's quota, or set it. Pages above a smaller quota stay.",
            client::quota,
        ),
        method(
            "client.weight",
            Change,
            "client, weight (number; optional)",
            "Tell what a client counts for when the store is full, or set it. 100 is usual; who uses \
             more than a share by weight gives way first.",
            client::weight,
        ),
        method(
            "client.reset",
            Change,
            "client, force (true or false; optional)",
            "Drop all pools and pages of a client, which gets another generation. Its settings stay. \
             With force also while it is connected: it loses what it has there.",
            client::reset,
        ),
        method(
            "client.remove",
            Change,
            "client",
            "Forget a client that the arena knows and that has no socket, with its pages.",
            client::remove,
        ),
        method(
            "store.compact",
            Change,
            "",
            "Move what is stored together, and give all that is free back to the host.",
            store::compact,
        ),
        method(
            "store.recompress",
            Change,
            "cold_after_s (number of seconds; optional: 0)",
            "Compress pages once more, and better, that were cold for so long.",
            store::recompress,
        ),
        method(
            "store.anatomy",
            Read,
            "",
            "How large the stored images are (a count for each 64 bytes), how cold how much is, what \
             is metadata, what was damaged, what was found at the start.",
            store::anatomy,
        ),
        method(
            "client.freeze",
            Change,
            "client",
            "Refuse all further puts of a client. Gets and flushes go on.",
            client::freeze,
        ),
        method(
            "client.thaw",
            Change,
            "client",
            "Undo client.freeze.",
            client::thaw,
        ),
        method(
            "client.flush",
            Change,
            "client, bytes (number or size; optional: all)",
            "Drop ephemeral pages of a client, which it expects at any time. Persistent pages are \
             never dropped.",
            client::flush,
        ),
        method(
            "client.squeeze",
            Change,
            "client, bytes (number or size) or pages (number); 0 ends it",
            "Ask a client to free so much of its own memory: its cold pages come to the pool, slower \
             while its tasks wait for memory. \"stats\" says how it goes.",
            client::squeeze,
        ),
        method(
            "client.give_back",
            Change,
            "client, bytes (number or size) or pages (number); 0 ends it",
            "Ask a client to take pages back into its own memory, as far as it has free memory for \
             them. \"stats\" says how it goes.",
            client::give_back,
        ),
        method(
            "client.policy",
            Change,
            "client, copies (\"free\", \"keep\" or \"adaptive\"; optional), auto_squeeze (true or \
             false; optional)",
            "Tell, or set, what becomes of the pool's copy of a page that the client loaded back, and \
             whether it frees by itself what it does not use.",
            client::policy,
        ),
        method(
            "pool.authorise",
            Change,
            "client, uuid, revoke (true or false; optional)",
            "Let a client make the shared pool of that uuid, or with revoke no longer.",
            client::authorise,
        ),
    ]
});

/// A method of these types.
fn method<P, R>(
    name: &'static str,
    access: Access,
    params: &'static str,
    description: &'static str,
    run: fn(&Shared, P) -> Result<R, Error>,
) -> Method
where
    P: DeserializeOwned + JsonSchema + 'static,
    R: Serialize + JsonSchema + 'static,
{
    let run = move |shared: &Shared, given: &Map<String, Value>| {
        let given = serde_json::from_value(Value::Object(given.clone()))
            .map_err(|error| Error::new(INVALID_PARAMS, error.to_string()))?;
        serde_json::to_value(run(shared, given)?)
            .map_err(|error| Error::new(INTERNAL_ERROR, error.to_string()))
    };
    Method {
        name,
        access,
        params,
        description,
        run: Box::new(run),
        params_schema: schema::<P>,
        result_schema: schema::<R>,
    }
}

/// All of it in one piece, so that no part of it has to be looked for elsewhere.
fn schema<T: JsonSchema>() -> Schema {
    let settings =
        SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<T>()
}

/// Calls a method on behalf of `peer`. What changes something is logged, with who asked for it.
///
/// # Errors
/// What the caller is told: no such method, not allowed, parameters that do not fit, or what the
/// method says.
pub fn call(
    shared: &Shared,
    peer: &Peer,
    name: &str,
    params: &Map<String, Value>,
) -> Result<Value, Error> {
    let Some(method) = METHODS.iter().find(|method| method.name == name) else {
        return Err(Error::new(
            METHOD_NOT_FOUND,
            format!("there is no method \"{name}\"; \"methods\" lists them"),
        ));
    };
    if method.access == Access::Read {
        return (method.run)(shared, params);
    }
    let outcome = if peer.may(method.access) {
        (method.run)(shared, params)
    } else {
        let message = format!(
            "{peer} may look and change nothing, and \"{name}\" can change something; ask as root or \
             as the user of the daemon"
        );
        Err(Error::new(FORBIDDEN, message))
    };
    let given = Value::Object(params.clone());
    match &outcome {
        Ok(_) => log::info!("{peer}: {name} {given}: done"),
        Err(error) => log::warn!("{peer}: {name} {given}: refused: {}", error.message),
    }
    outcome
}
