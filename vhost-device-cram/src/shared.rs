// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What every thread of the daemon may look at.

use std::sync::Arc;
use std::time::Instant;

use cram_store::Store;

use crate::roster::Roster;

/// See the text of the module.
pub struct Shared {
    /// The store.
    pub store: Arc<Store>,
    /// The guests.
    pub guests: Roster,
    /// When the daemon started.
    pub started: Instant,
}
