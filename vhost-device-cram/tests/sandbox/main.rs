// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The sandbox: what the daemon needs it can do, and what it does not need it cannot.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of it is a test, helpers included"
)]

mod child;
mod files;
mod forbidden;
mod kernels;
mod life;
