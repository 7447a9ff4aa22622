// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's console: what the kernel and its first process print.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Words in a kernel's log that no test may cause.
const SPLATS: &[&str] = &[
    "BUG:",
    "WARNING:",
    "KASAN:",
    "UBSAN:",
    "Oops",
    "general protection",
    "Kernel panic",
    "possible recursive locking",
    "possible circular locking",
    "inconsistent lock state",
    "suspicious RCU",
    "DEBUG_LOCKS_WARN_ON",
    "held lock freed",
    "INFO: task",
    "refcount_t:",
    "list_add corruption",
    "list_del corruption",
    "rcu: INFO:",
    "Out of memory:",
];

/// A console that QEMU writes to a file.
#[derive(Debug, Clone)]
pub struct Console {
    path: PathBuf,
}

impl Console {
    pub(super) fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Everything printed so far.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn text(&self) -> Result<String> {
        read_lossy(&self.path)
    }

    /// Whether `marker` was printed so far.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn has(&self, marker: &str) -> Result<bool> {
        Ok(self.text()?.contains(marker))
    }

    /// Waits until `marker` is printed.
    ///
    /// # Errors
    ///
    /// When it is not printed within `limit`.
    pub fn wait_for(&self, marker: &str, limit: Duration) -> Result<()> {
        let until = Instant::now() + limit;
        while !self.has(marker)? {
            if Instant::now() > until {
                bail!("the console did not show {marker:?} within {limit:?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// The first lines that tell of a mistake in the kernel, with some lines after each.
    ///
    /// # Errors
    ///
    /// When the file cannot be read.
    pub fn splats(&self) -> Result<Vec<String>> {
        Ok(find_splats(&self.text()?))
    }
}

fn read_lossy(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| path.display().to_string())?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// A test that lets its guest run out of memory has this written to the console first.
pub const MAY_RUN_OUT: &str = "cram-tests: the guest may run out of memory";
const OUT_OF_MEMORY: &str = "Out of memory:";

fn find_splats(text: &str) -> Vec<String> {
    let may_run_out = text.contains(MAY_RUN_OUT);
    text.lines()
        .filter(|line| SPLATS.iter().any(|word| line.contains(word)))
        .filter(|line| !(may_run_out && line.contains(OUT_OF_MEMORY)))
        .take(8)
        .map(|line| line.trim_end().to_owned())
        .collect()
}

/// The last `count` lines of a log, for a person to read.
pub(super) fn last_lines(path: &Path, count: usize) -> String {
    let text = read_lossy(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let first = lines.len().saturating_sub(count);
    lines[first..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splats_are_found_and_ordinary_lines_are_not() {
        let text = "[ 1.0] Linux version 7.3\n\
                    [ 2.0] WARNING: possible circular locking dependency detected\n\
                    [ 2.1] kasan: KernelAddressSanitizer initialized\n\
                    [ 3.0] BUG: sleeping function called from invalid context\n\
                    [ 4.0] Read-error on swap-device (254:16:8)\n";
        let found = find_splats(text);
        assert_eq!(found.len(), 2, "{found:?}");
        assert!(found[1].contains("sleeping"));
        let text = "[ 1.0] Out of memory: Killed process 7\n[ 1.0] BUG: else\n";
        assert_eq!(find_splats(text).len(), 2);
        assert_eq!(
            find_splats(&format!("[ 0.1] {MAY_RUN_OUT}\n{text}")).len(),
            1
        );
    }
}
