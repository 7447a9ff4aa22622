// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What `docs/protocol.md` says of requests, as a table: what is asked, and what has to be answered.
//!
//! The table knows nothing of how a request gets to the device. Three channels do: the daemon's parser
//! called directly, the tests' front-end over a real socket, and a driver in user space inside of a
//! guest, through QEMU. What one of them answers, all have to.

mod cases;
mod request;
mod run;

pub use cases::{Case, Expect, Step, cases};
pub use request::{Request, page};
pub use run::{Channel, Part, Reply, run};
