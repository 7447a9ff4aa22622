// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The vhost-user side of a connection: what a front-end says, and what that means.
//!
//! - [`message`]: bytes of messages become checked values, and answers become bytes.
//! - [`channel`]: messages and descriptors come from the socket, and answers go there; every wait has
//!   an end.
//! - [`notifier`]: the descriptors by which both sides wake each other.
//! - [`memory`]: the guest's memory, as one connection has it mapped.
//! - [`session`]: the state that messages change. It knows no socket, so that it can be driven by a
//!   fuzzer.
//!
//! Written here, rather than taken from the `vhost` and `vhost-user-backend` crates, for what those do
//! not promise: that a connection ends whatever the descriptors are that it brought, that a change is
//! in force when it is acknowledged, and that what is wrong is said.

pub mod channel;
pub mod memory;
pub mod message;
pub mod notifier;
pub mod session;
