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
//! The device is a back-end of the `vhost-user-backend` crate ([`backend`](crate::backend)): a session
//! drives it through that crate's trait, and a [`ring`](crate::ring) keeps what is set up in that
//! crate's vring. The features and their names are those of the `vhost` crate.
//!
//! What serves a connection is ours, in place of that crate's daemon, handler and workers, for what
//! those do not promise: that a connection ends whatever the descriptors are that it brought, that a
//! change is in force when it is acknowledged, that nothing read from memory that is gone is used, and
//! that what is wrong is said. In version 0.24
//! - a worker ends, and nobody hears of it, when it reads a kick that somebody else has read;
//! - a front-end that makes its notifiers blocking ones has workers wait for it without end;
//! - a kick that is set while a ring runs is not listened to;
//! - a size that no ring has is acknowledged, and ignored;
//! - nothing can tell memory that was taken away from memory full of zeroes, before it is believed.

pub mod channel;
pub mod memory;
pub mod message;
pub mod notifier;
pub mod session;
