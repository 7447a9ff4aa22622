// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The commands: what they look like, which method each calls, and how its answer is shown.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use clap_complete::Shell;
use serde_json::{Value, json};
use vhost_device_cram::balance::Copies;
use vhost_device_cram::{report, size};

use crate::seconds;

#[derive(Subcommand)]
pub(crate) enum Command {
    /// Show what is stored, for whom, and how well it compresses
    Stats {
        /// Show it again every SECS seconds, with what happened in between
        #[arg(long, value_name = "SECS", num_args = 0..=1, default_missing_value = "1",
              value_parser = seconds)]
        watch: Option<Duration>,
    },
    /// Show a live picture: graphs of what is held and done, and a row for each guest
    Top {
        /// Seconds between two readings
        #[arg(long, value_name = "SECS", default_value = "1", value_parser = seconds)]
        interval: Duration,
    },
    /// List the clients and their sockets
    Clients,
    /// List the guests: what they hold, may hold and are told
    Guests,
    /// List the pools of all guests
    Pools {
        /// Only those of this client
        client: Option<String>,
    },
    /// Add, change or remove a guest
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Show how long requests took and waited
    Histogram {
        /// Only of this client
        client: Option<String>,
    },
    /// Show a client's quota, or set it
    Quota {
        /// The client's name
        client: String,
        /// The new quota, such as 512M
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Show what a client counts for when the store is full, or set it (100 is usual)
    Weight {
        /// The client's name
        client: String,
        /// The new weight
        weight: Option<u32>,
    },
    /// Drop all pages of a client, for instance of a virtual machine that does not come back
    Reset {
        /// The client's name
        client: String,
        /// Also while it is connected: it loses what it has there
        #[arg(long)]
        force: bool,
    },
    /// Forget a client that has no socket any more, with its pages
    Remove {
        /// The client's name
        client: String,
    },
    /// Move what is stored together, and give what is free back to the host
    Compact,
    /// Compress cold pages once more, and better
    Recompress {
        /// Only pages that were cold for so many seconds
        #[arg(default_value_t = 0)]
        cold_after: u32,
    },
    /// Show how large the stored images are, how cold, and what else is held
    Anatomy,
    /// Refuse all further puts of a client
    Freeze {
        /// The client's name
        client: String,
    },
    /// Take puts of a client again
    Thaw {
        /// The client's name
        client: String,
    },
    /// Drop ephemeral pages of a client (persistent ones are never dropped)
    Flush {
        /// The client's name
        client: String,
        /// How much; everything when not given
        #[arg(value_parser = size::parse)]
        size: Option<u64>,
    },
    /// Ask a client to free so much of its memory: its cold pages come to the pool
    Squeeze {
        /// The client's name
        client: String,
        /// How much, such as 512M; 0 ends a squeeze that goes on
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Stay until it is done, and show how it goes
        #[arg(long)]
        wait: bool,
    },
    /// Ask a client to take pages back into its own memory
    GiveBack {
        /// The client's name
        client: String,
        /// How much, such as 512M; 0 ends what goes on
        #[arg(value_parser = size::parse)]
        size: u64,
        /// Stay until it is done, and show how it goes
        #[arg(long)]
        wait: bool,
    },
    /// Show what is wanted of a client's memory, or change it
    Policy {
        /// The client's name
        client: String,
        /// What becomes of the pool's copy of a page that was loaded back
        #[arg(long, value_enum)]
        copies: Option<Copies>,
        /// Whether the client frees by itself what it does not use
        #[arg(long, value_name = "BOOL")]
        auto_squeeze: Option<bool>,
    },
    /// Let a client use the shared pool of a uuid
    Authorise {
        /// The client's name
        client: String,
        /// The pool's uuid
        uuid: String,
        /// No longer let it
        #[arg(long)]
        revoke: bool,
    },
    /// Write a file for a shell to complete commands with
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages of cramctl and of the daemon into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        folder: PathBuf,
    },
    /// List the methods of the control socket
    Methods,
    /// Show the daemon's version
    Version,
    /// Call a method, and show the answer as JSON
    Call {
        /// The method's name
        method: String,
        /// Its parameters, a JSON object
        #[arg(default_value = "{}")]
        params: String,
    },
}

#[derive(Subcommand)]
pub(crate) enum GuestCommand {
    /// Listen for another guest
    Add {
        /// By which its account is known for ever
        name: String,
        /// Where to listen for its QEMU
        socket: PathBuf,
        #[command(flatten)]
        wishes: Wishes,
        /// Whoever connects is taken for the virtual machine that was there before
        #[arg(long)]
        trust_socket: bool,
    },
    /// Change what is wanted of a guest: all of it, or nothing
    Set {
        /// The client's name
        client: String,
        #[command(flatten)]
        wishes: Wishes,
        /// Whether its puts are refused
        #[arg(long, value_name = "BOOL")]
        frozen: Option<bool>,
    },
    /// Listen for a guest no more; its pages stay until it is added again
    Remove {
        /// The client's name
        client: String,
        /// Also while it is connected
        #[arg(long)]
        force: bool,
        /// Its pages and settings go, too
        #[arg(long)]
        forget: bool,
    },
}

/// What is wanted of a guest.
#[derive(clap::Args)]
pub(crate) struct Wishes {
    /// Memory that it may hold, such as 512M
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    quota: Option<u64>,
    /// What it counts for when the store is full (100 is usual)
    #[arg(long, value_name = "N")]
    weight: Option<u32>,
    /// What becomes of the pool's copy of a page that was loaded back
    #[arg(long, value_enum)]
    copies: Option<Copies>,
    /// Whether it frees by itself what it does not use
    #[arg(long, value_name = "BOOL")]
    auto_squeeze: Option<bool>,
}

impl Wishes {
    fn params(&self, mut params: Value) -> Value {
        let wishes = [
            ("quota", self.quota.map(Value::from)),
            ("weight", self.weight.map(Value::from)),
            ("copies", self.copies.map(|copies| copies.name().into())),
            ("auto_squeeze", self.auto_squeeze.map(Value::from)),
        ];
        for (name, value) in wishes {
            if let Some(value) = value {
                params[name] = value;
            }
        }
        params
    }
}

/// A call, and how its answer is shown to people.
pub(crate) struct Call {
    pub(crate) method: &'static str,
    pub(crate) params: Value,
    pub(crate) show: Box<dyn FnOnce(&Value) -> String>,
}

fn call(
    method: &'static str,
    params: Value,
    show: impl FnOnce(&Value) -> String + 'static,
) -> Option<Call> {
    Some(Call {
        method,
        params,
        show: Box::new(show),
    })
}

fn number(answer: &Value, name: &str) -> u64 {
    answer.get(name).and_then(Value::as_u64).unwrap_or_default()
}

impl Command {
    /// The call that it consists of; `None` when there is more to it.
    pub(crate) fn call(&self) -> Option<Call> {
        let none = json!({});
        match self {
            Command::Clients => call("clients", none, report::clients),
            Command::Guests => call("stats", none, report::guests),
            Command::Pools { client } => {
                let client = client.clone();
                call("stats", none, move |answer| {
                    report::pools(answer, client.as_deref())
                })
            }
            Command::Histogram { client } => {
                let params = match client {
                    Some(client) => json!({ "client": client }),
                    None => none,
                };
                call("stats.histogram", params, report::histogram)
            }
            Command::Methods => call("methods", none, report::methods),
            Command::Version => call("version", none, report::version),
            Command::Guest(command) => command.call(),
            Command::Quota { client, size } => {
                let mut params = json!({ "client": client });
                if let Some(size) = size {
                    params["bytes"] = (*size).into();
                }
                let client = client.clone();
                call("client.quota", params, move |answer| {
                    let quota = size::show(number(answer, "quota_bytes"));
                    format!("{client}: quota {quota}\n")
                })
            }
            Command::Weight { client, weight } => {
                let mut params = json!({ "client": client });
                if let Some(weight) = weight {
                    params["weight"] = (*weight).into();
                }
                let client = client.clone();
                call("client.weight", params, move |answer| {
                    format!("{client}: weight {}\n", number(answer, "weight"))
                })
            }
            Command::Reset { client, force } => {
                let params = json!({ "client": client, "force": force });
                let client = client.clone();
                call("client.reset", params, move |answer| {
                    format!("{client}: {} pages dropped\n", number(answer, "pages"))
                })
            }
            Command::Remove { client } => {
                let params = json!({ "client": client });
                let client = client.clone();
                call("client.remove", params, move |answer| {
                    let pages = number(answer, "pages");
                    format!("{client}: removed, with {pages} pages\n")
                })
            }
            Command::Compact => call("store.compact", none, report::compacted),
            Command::Recompress { cold_after } => {
                let params = json!({ "cold_after_s": cold_after });
                call("store.recompress", params, report::recompressed)
            }
            Command::Anatomy => call("store.anatomy", none, report::anatomy),
            Command::Freeze { client } => {
                let (params, client) = (json!({ "client": client }), client.clone());
                call("client.freeze", params, move |_| {
                    format!("{client}: frozen, puts are refused\n")
                })
            }
            Command::Thaw { client } => {
                let (params, client) = (json!({ "client": client }), client.clone());
                call("client.thaw", params, move |_| {
                    format!("{client}: thawed\n")
                })
            }
            Command::Flush { client, size } => {
                let mut params = json!({ "client": client });
                if let Some(size) = size {
                    params["bytes"] = (*size).into();
                }
                let client = client.clone();
                call("client.flush", params, move |answer| {
                    let pages = number(answer, "pages");
                    format!("{client}: {pages} ephemeral pages dropped\n")
                })
            }
            Command::Squeeze { client, size, .. } => {
                let params = json!({ "client": client, "bytes": size });
                let (client, size) = (client.clone(), size::show(*size));
                call("client.squeeze", params, move |_| {
                    format!("{client}: asked to free {size}\n")
                })
            }
            Command::GiveBack { client, size, .. } => {
                let params = json!({ "client": client, "bytes": size });
                let (client, size) = (client.clone(), size::show(*size));
                call("client.give_back", params, move |answer| {
                    let connected = answer.get("connected").and_then(Value::as_bool);
                    let note = match connected {
                        Some(true) => "",
                        _ => " (when it connects)",
                    };
                    format!("{client}: asked to take back {size}{note}\n")
                })
            }
            Command::Policy {
                client,
                copies,
                auto_squeeze,
            } => {
                let mut params = json!({ "client": client });
                if let Some(copies) = copies {
                    params["copies"] = copies.name().into();
                }
                if let Some(auto) = auto_squeeze {
                    params["auto_squeeze"] = (*auto).into();
                }
                call("client.policy", params, report::policy)
            }
            Command::Authorise {
                client,
                uuid,
                revoke,
            } => {
                let params = json!({ "client": client, "uuid": uuid, "revoke": revoke });
                let word = match revoke {
                    true => "no longer authorised",
                    false => "authorised",
                };
                let text = format!("{client}: {word} for the shared pool {uuid}\n");
                call("pool.authorise", params, move |_| text)
            }
            Command::Stats { .. }
            | Command::Top { .. }
            | Command::Completions { .. }
            | Command::Man { .. }
            | Command::Call { .. } => None,
        }
    }
}

impl GuestCommand {
    fn call(&self) -> Option<Call> {
        match self {
            GuestCommand::Add {
                name,
                socket,
                wishes,
                trust_socket,
            } => {
                let params =
                    json!({ "name": name, "socket": socket, "trust_socket": trust_socket });
                call("guest.add", wishes.params(params), report::guest)
            }
            GuestCommand::Set {
                client,
                wishes,
                frozen,
            } => {
                let mut params = wishes.params(json!({ "client": client }));
                if let Some(frozen) = frozen {
                    params["frozen"] = (*frozen).into();
                }
                call("guest.set", params, report::guest)
            }
            GuestCommand::Remove {
                client,
                force,
                forget,
            } => {
                let params = json!({ "client": client, "force": force, "forget": forget });
                let (client, forget) = (client.clone(), *forget);
                call("guest.remove", params, move |answer| {
                    let pages = number(answer, "pages");
                    let fate = match forget {
                        true => "forgotten with it",
                        false => "kept for when it is added again",
                    };
                    format!("{client}: removed; {pages} pages {fate}\n")
                })
            }
        }
    }
}
