// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Whole guests: a daemon, QEMU, a kernel, and a program inside that answers.
//!
//! A test is a [`Stage`]: a folder of its own, with whatever daemons and guests
//! it starts. When it fails, the folder stays and the last lines of every log
//! in it are shown; a kernel message that should never appear fails it too.
//!
//! - [`Artifacts`] says where QEMU, kernel, image and daemon were built.
//! - [`Daemon`] is a running `vhost-device-cram`, which may be killed and started again.
//! - [`Guest`] is a running QEMU; [`Agent`] speaks with the program inside,
//!   [`Qmp`] with QEMU, [`Console`] reads what the kernel says.
//! - [`Counter`] counts what a guest executes; [`RamDisk`] is something else to swap to.
//! - [`Ledger`] counts what all of it costs the host.
//! - [`Hold`] and [`Guest::load`] put real data into the guest's memory and verify it.
//!
//! Nothing here needs the daemon's own code: it is run as a user runs it.

mod accelerator;
mod agent;
mod artifacts;
mod console;
mod control;
mod counter;
mod daemon;
mod host_bytes;
mod machine;
mod process;
mod qmp;
mod ram_disk;
mod readings;
mod stage;
mod verify;

pub use accelerator::Accelerator;
pub use agent::{Agent, Finished, JobEvent, JobId};
pub use artifacts::Artifacts;
pub use console::{Console, MAY_RUN_OUT};
pub use control::{Control, DaemonReading};
pub use counter::{Counter, Counting};
pub use daemon::{Daemon, DaemonOptions};
pub use host_bytes::{HostBytes, Ledger, Role, knows_residence};
pub use machine::{Guest, GuestOptions, Kernel};
pub use qmp::Qmp;
pub use ram_disk::RamDisk;
pub use readings::{GuestReading, Named};
pub use stage::{Failed, Stage, seed_from_env, wait_until};
pub use verify::{Answer, Hold, LoadEvent, LoadOptions, LoadReport, LoadRun, corpus_sum};
