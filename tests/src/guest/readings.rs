// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guest's kernel and the daemon say about memory and swap.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use anyhow::{Context, Result};

use super::control::DaemonReading;
use super::machine::Guest;

/// Numbers by name, as the kernel's text files give them.
#[derive(Clone, Debug, Default)]
pub struct Named(BTreeMap<String, u64>);

impl Named {
    /// Reads `name value` lines (also `name: value kB`); values of one name are added up.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let mut numbers = BTreeMap::new();
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let (Some(name), Some(value)) = (words.next(), words.next()) else {
                continue;
            };
            if let Ok(value) = value.parse::<u64>() {
                *numbers
                    .entry(name.trim_end_matches(':').to_owned())
                    .or_default() += value;
            }
        }
        Self(numbers)
    }

    /// A number that must be there.
    ///
    /// # Errors
    ///
    /// When it is not.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.0
            .get(name)
            .copied()
            .with_context(|| format!("no {name:?} among {:?}", self.0.keys()))
    }

    /// A number, or 0.
    #[must_use]
    pub fn get_or_zero(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }
}

/// One reading of a guest.
#[derive(Clone, Debug)]
pub struct GuestReading {
    /// `/proc/meminfo`, in KiB.
    pub meminfo: Named,
    /// `/proc/vmstat`.
    pub vmstat: Named,
    /// The module's statistics, of all its devices; empty while it is not loaded.
    pub device: Named,
    /// Bytes written to the swap disk since it is in use.
    pub disk_written_bytes: u64,
    /// Bytes read from it.
    pub disk_read_bytes: u64,
}

impl Guest {
    /// Reads the guest's numbers.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub fn reading(&self) -> Result<GuestReading> {
        let agent = self.agent()?;
        let device = agent.shell("cat /sys/kernel/debug/cram/*/stats 2>/dev/null || true")?;
        let (read, written) = self.disk_bytes()?;
        let before = *self
            .written_before_swap
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        Ok(GuestReading {
            meminfo: Named::parse(&agent.read("/proc/meminfo")?),
            vmstat: Named::parse(&agent.read("/proc/vmstat")?),
            device: Named::parse(&device),
            disk_written_bytes: written.saturating_sub(before),
            disk_read_bytes: read,
        })
    }

    /// What the module says of its one device: the word after "state".
    ///
    /// # Errors
    ///
    /// When it is not loaded.
    pub fn device_state(&self) -> Result<String> {
        let text = self.shell("grep -h '^state ' /sys/kernel/debug/cram/*/stats")?;
        let state = text.split_whitespace().nth(1).context("no state")?;
        Ok(state.to_owned())
    }

    /// Bytes read from and written to the swap disk, since boot.
    fn disk_bytes(&self) -> Result<(u64, u64)> {
        let text = self.agent()?.read("/sys/block/vdb/stat")?;
        let fields: Vec<u64> = text
            .split_whitespace()
            .map_while(|word| word.parse().ok())
            .collect();
        let sectors = |place: usize| fields.get(place).copied().context("/sys/block/vdb/stat");
        Ok((sectors(2)? * 512, sectors(6)? * 512))
    }

    /// Makes the swap disk a swap area and uses it.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn swap_on(&self) -> Result<()> {
        self.make_swap()?;
        self.shell("swapon /dev/vdb").map(drop)
    }

    /// Writes the swap disk's signature, and counts what is written from here on.
    ///
    /// # Errors
    ///
    /// When a step fails.
    pub fn make_swap(&self) -> Result<()> {
        self.shell("mkswap /dev/vdb && sync && echo 100 > /proc/sys/vm/swappiness")?;
        let written = self.disk_bytes()?.1;
        *self
            .written_before_swap
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = written;
        Ok(())
    }
}

impl DaemonReading {
    /// A number of the whole store, by the name the store's statistics have for it.
    ///
    /// # Errors
    ///
    /// When the daemon gave no such number.
    pub fn get(&self, name: &str) -> Result<u64> {
        self.raw["store"][name]
            .as_u64()
            .with_context(|| format!("the daemon's statistics have no {name:?}: {}", self.raw))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_added_up() {
        let named = Named::parse("MemFree:  12 kB\nputs_ok 3\nputs_ok 4\nword\n");
        assert_eq!(named.get("MemFree").unwrap(), 12);
        assert_eq!(named.get("puts_ok").unwrap(), 7);
        assert_eq!(named.get_or_zero("word"), 0);
        assert!(named.get("word").is_err());
    }

    #[test]
    fn a_daemon_number_is_the_stores() {
        let raw = serde_json::json!({ "store": { "pages_stored": 5 }, "clients": [] });
        let reading = DaemonReading { raw };
        assert_eq!(reading.get("pages_stored").unwrap(), 5);
        assert!(reading.get("absent").is_err());
    }
}
