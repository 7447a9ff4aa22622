// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmarks: what they are made of. The program is `src/bin/cram-bench.rs`, which
//! `cargo xtask bench` builds and runs.
//!
//! Every figure that is compared with something is measured beside it, in turns, in one process:
//! machines are noisy, and ratios are what can be trusted.

pub mod chart;
mod codec;
pub mod corpus;
pub mod density;
pub mod device;
pub mod figures;
pub mod guest;
pub mod page;
pub mod policies;
pub mod rivals;
pub mod store;
pub mod traces;
