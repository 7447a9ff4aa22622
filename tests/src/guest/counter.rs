// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Counting what a guest executes, through the plugin `tests/plugin/count.c`.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long an answer may take.
const LIMIT: Duration = Duration::from_secs(30);
/// Between two looks at a guest that should become idle.
const LOOK: Duration = Duration::from_millis(250);
/// A guest that executes no more than this between two looks is idle: its timer ticks, and no more.
const IDLE_INSTRUCTIONS: u64 = 250_000;

/// How a guest's instructions are counted. Each way slows the guest down; none changes what it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Counting {
    /// Block by block; a block that is left in the middle counts as a whole.
    Blocks,
    /// One by one.
    Exact,
    /// Block by block, and for each block where it is.
    Profile,
}

/// Adds the plugin to QEMU's command line.
pub(super) fn argument(plugin: &Path, socket: &Path, counting: Counting) -> String {
    let more = match counting {
        Counting::Blocks => "",
        Counting::Exact => ",exact=on",
        Counting::Profile => ",profile=on",
    };
    let escaped = |path: &Path| path.display().to_string().replace(',', ",,");
    format!("{},socket={}{more}", escaped(plugin), escaped(socket))
}

/// The plugin of one guest.
#[derive(Debug)]
pub struct Counter {
    line: Mutex<BufReader<UnixStream>>,
}

impl Counter {
    pub(super) fn new(line: UnixStream) -> Result<Self> {
        line.set_read_timeout(Some(LIMIT))?;
        Ok(Self {
            line: Mutex::new(BufReader::new(line)),
        })
    }

    fn ask(&self, question: &str) -> Result<MutexGuard<'_, BufReader<UnixStream>>> {
        let mut line = self.line.lock().unwrap_or_else(PoisonError::into_inner);
        line.get_mut()
            .write_all(format!("{question}\n").as_bytes())
            .context("the counting plugin")?;
        Ok(line)
    }

    /// Instructions that all the guest's processors have executed so far.
    ///
    /// # Errors
    ///
    /// When the plugin does not answer.
    pub fn total(&self) -> Result<u64> {
        let mut text = String::new();
        self.ask("total")?.read_line(&mut text)?;
        text.trim()
            .parse()
            .with_context(|| format!("the counting plugin answered {text:?}"))
    }

    /// The same, once the guest has nothing more to do: what a program left to be done, such as
    /// telling the device which pages are free, is then counted too.
    ///
    /// # Errors
    ///
    /// When the plugin does not answer, or the guest is still busy after `limit`.
    pub fn total_when_idle(&self, limit: Duration) -> Result<u64> {
        let until = Instant::now() + limit;
        let mut before = self.total()?;
        loop {
            std::thread::sleep(LOOK);
            let now = self.total()?;
            if now.saturating_sub(before) <= IDLE_INSTRUCTIONS {
                return Ok(now);
            }
            if Instant::now() > until {
                bail!("the guest is still busy after {limit:?}");
            }
            before = now;
        }
    }

    /// Instructions by the address of the block they are in; empty unless that is counted.
    ///
    /// # Errors
    ///
    /// When the plugin does not answer.
    pub fn profile(&self) -> Result<BTreeMap<u64, u64>> {
        let mut line = self.ask("profile")?;
        let mut blocks = BTreeMap::new();
        let mut text = String::new();
        loop {
            text.clear();
            if line.read_line(&mut text)? == 0 {
                bail!("the counting plugin is gone");
            }
            let Some((address, count)) = text.trim().split_once(' ') else {
                return Ok(blocks);
            };
            let address = u64::from_str_radix(address, 16).context("an address")?;
            blocks.insert(address, count.parse().context("a count")?);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn answers_are_understood() {
        let (near, far) = UnixStream::pair().unwrap();
        let counter = Counter::new(near).unwrap();
        let plugin = std::thread::spawn(move || {
            let mut questions = BufReader::new(far);
            let mut text = String::new();
            for answer in ["123\n", "ffffffff81000000 7\n400000 9\n\n"] {
                questions.read_line(&mut text).unwrap();
                questions.get_mut().write_all(answer.as_bytes()).unwrap();
            }
            text
        });
        assert_eq!(counter.total().unwrap(), 123);
        let profile = counter.profile().unwrap();
        assert_eq!(profile.get(&0xffff_ffff_8100_0000), Some(&7));
        assert_eq!(profile.len(), 2);
        assert_eq!(plugin.join().unwrap(), "total\nprofile\n");
    }

    #[test]
    fn commas_are_escaped() {
        let text = argument(Path::new("/a,b.so"), Path::new("/s"), Counting::Exact);
        assert_eq!(text, "/a,,b.so,socket=/s,exact=on");
    }
}
