// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The wire format between a guest's driver and the cram device.
//!
//! Everything is in [`wire`], which the guest's kernel module compiles too.
//! `docs/protocol.md` is the contract that it follows. This crate checks
//! nothing and trusts nothing: turning guest bytes into checked values is the
//! work of the device's request parser alone.

#![no_std]
#![forbid(unsafe_code)]

pub mod wire;

pub use wire::*;
