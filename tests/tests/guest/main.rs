// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The chain from the guest's reclaim to the host's store and back, in whole guests.
//!
//! `cargo xtask test` builds what these need and names it in `CRAM_ARTIFACTS`;
//! without that they say so and fail. docs/testing.md tells more.
//!
//! A test whose name begins with `debug_` is another test once more, on the
//! kernel that checks itself.

mod attack;
mod balance;
mod chaos;
mod conformance;
mod debug;
mod lifecycle;
mod loss;
mod scale;
mod sleep;
mod stall;
mod swap;
mod variants;
