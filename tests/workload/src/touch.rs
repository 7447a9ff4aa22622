// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `touch`: takes memory and holds it for a while, to push others' pages out.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::arguments::Arguments;
use crate::order::mix;
use crate::region::{PAGE, Page, Region};

/// Runs the mode.
pub(crate) fn run(words: &[String]) -> Result<ExitCode> {
    let given = Arguments::parse(words, &["mib", "seconds"], &[])?;
    let bytes = given
        .required_number("mib")?
        .checked_mul(1 << 20)
        .context("--mib is too large")?;
    let region = Region::map(usize::try_from(bytes)? / PAGE)?;
    let mut page: Page = [0; PAGE];
    let mut state = mix(bytes);
    for index in 0..region.pages() {
        // A few changing bytes keep the pages from being same-filled.
        for place in page.chunks_exact_mut(64) {
            state = mix(state);
            place[..8].copy_from_slice(&state.to_le_bytes());
        }
        region.write(index, &page);
    }
    println!("{{\"touched\":{}}}", region.pages());
    std::thread::sleep(Duration::from_secs(given.number_or("seconds", 0)?));
    Ok(ExitCode::SUCCESS)
}
