// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The benchmarks: what they are made of. The program is `src/bin/cram-bench.rs`, which
//! `cargo xtask bench` builds and runs.

pub mod corpus;
