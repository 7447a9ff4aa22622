// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the tests of whole devices are made of.
//!
//! - [`frontend`] takes the place of QEMU and guest: it speaks vhost-user with the daemon over
//!   a real socket, and drives real rings in shared memory. Quick, exact, and free to misbehave.
//! - [`guest`] boots real guests and puts real load on them.

//! - [`bench`] holds what the benchmarks are made of.

#[cfg(feature = "bench")]
pub mod bench;
#[cfg(feature = "frontend")]
pub mod frontend;
pub mod guest;
