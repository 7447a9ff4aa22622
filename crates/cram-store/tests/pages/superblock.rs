// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The first bytes of an arena's file, changed by hand.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Whether the file was closed.
pub const CLEAN_AT: usize = 20;
/// Of which start of the machine it is.
pub const BOOT_ID_AT: usize = 40;

/// Changes what both copies of the superblock say, sums included.
pub fn rewrite(path: &Path, at: usize, new: &[u8]) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    for copy in [0, 2048] {
        let mut bytes = [0; 256];
        file.read_exact_at(&mut bytes, copy).unwrap();
        bytes[at..at + new.len()].copy_from_slice(new);
        let sum = twox_hash::XxHash3_64::oneshot(&bytes[..248]);
        bytes[248..].copy_from_slice(&sum.to_le_bytes());
        file.write_all_at(&bytes, copy).unwrap();
    }
}
