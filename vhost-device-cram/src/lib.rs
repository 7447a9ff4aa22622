// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The cram device's back-end: many guests, one compressed store.
//!
//! ```text
//! QEMU ── vhost-user socket ──► connection ─► vhost (messages, memory) ─► backend (the rings' set-up)
//!   guest ── virtqueues ──────► worker ─► device ─► ring ─► request ─► execute ─► cram-store
//!                                          events ◄── announce (pressure, quota)
//! cramctl ── control socket ──► control ─► methods
//! ```
//!
//! What each room may know:
//! - [`vhost`] is the only place that looks at what a front-end says.
//! - [`backend`] is the device as `vhost-user-backend` has it: its trait, by which all of this is driven.
//! - [`request`] is the only place that looks at bytes of a guest. What leaves it has been
//!   copied and checked; nothing in it may panic, whatever the bytes are.
//! - [`execute`] turns a checked request into calls of the store, and the store's answers into
//!   a response. It knows no descriptor.
//! - [`ring`] takes chains from a ring (a vring of `vhost-user-backend`) and completes them; a ring
//!   that cannot be trusted any more is stopped alone.
//! - [`sigbus`] keeps the daemon alive when a guest's memory is taken away under it: whoever touched it
//!   finds it lost, completes nothing, and the connection ends.
//! - [`first_touch`] bounds how much of a guest's memory is charged to the daemon, since nobody else
//!   touched it before.
//! - [`device`] is one connection (a front-end that is attached now); [`client`] is the guest
//!   behind a socket, which outlives its connections.
//! - [`roster`] is the list of guests, which come and go while the daemon runs.
//! - [`balance`] is what the operator wants of a guest's memory, and what its driver reports.
//! - [`sandbox`] is what the process gives up when all is open and nothing runs yet: afterwards,
//!   a room that opens a file, or makes an unusual system call, finds that it cannot.
//!
//! `docs/protocol.md` is the contract with the guest, `docs/threat-model.md` says who is
//! trusted with what.

pub mod address;
pub mod announce;
pub mod backend;
pub mod balance;
pub mod cli;
pub mod client;
pub mod config;
mod connection;
pub mod control;
pub mod device;
pub mod events;
pub mod execute;
pub mod figures;
pub mod first_touch;
pub mod limits;
pub mod metrics;
pub mod options;
pub mod patience;
pub mod report;
pub mod request;
pub mod ring;
pub mod roster;
pub mod sandbox;
pub mod server;
pub mod service;
pub mod shared;
pub mod sigbus;
pub mod size;
pub mod socket;
mod stop;
pub mod vhost;
pub mod worker;
