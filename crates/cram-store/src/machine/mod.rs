// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the store takes from the machine: locks and atomics, a bounded amount of
//! memory, cache lines. Knows nothing of pages.

pub(crate) mod budget;
pub(crate) mod prefetch;
pub(crate) mod sync;
