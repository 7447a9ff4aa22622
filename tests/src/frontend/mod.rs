// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU and guest in one: a vhost-user front-end with a virtqueue driver of its own.
//!
//! Everything is real: the unix socket, the memory that is shared by a memfd, the rings in it,
//! the eventfds. Only the guest is missing, and so a test can do what no kernel would do.
//!
//! - [`TestDaemon`] runs the daemon in this process, in a folder of its own.
//! - [`Guest`] connects to it, and calls operations one by one.
//! - [`RawFrontend`] sends messages one by one, wrong ones too.
//! - [`Ring`] is one queue, for tests that want many requests in flight, or wrong ones.
//! - [`Disk`] drives a vhost-user-blk device, which is not ours, to compare with.
//! - [`Flow`] sends requests that are laid out once, at full speed.
//! - [`Request`] is the readable part of a request as bytes, to be sent as it is or damaged.

mod block;
mod daemon;
mod device;
mod flow;
mod memory;
mod raw;
mod ring;

pub use block::{Disk, Transfer};
pub use cram_conformance::{Request, page};
pub use daemon::TestDaemon;
pub use device::{Answer, Guest, Options};
pub use flow::{Ask, Done, Flow, Wait};
pub use memory::Memory;
pub use raw::RawFrontend;
pub use ring::{Descriptor, Piece, Ring};

/// How long anything may take that takes milliseconds on an idle machine.
pub const PATIENCE: std::time::Duration = std::time::Duration::from_secs(20);
