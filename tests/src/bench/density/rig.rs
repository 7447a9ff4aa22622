// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guests of an arm, and all that stands behind them.

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::arms::{Arm, Swap};
use super::host_swap::{Gauge, HostSwap};
use crate::bench::guest::{Backing, swap_on};
use crate::guest::{Artifacts, Control, Counting, Daemon, DaemonOptions, Guest, GuestOptions};
use crate::guest::{Ledger, Role};

/// Room for whatever is swapped out. Nobody is measured at being full.
const SWAP_MIB: u64 = 1536;
/// The pool of all guests together.
const CAPACITY: &str = "3G";

/// Guests that are ready to swap. What is dropped first goes first.
pub(super) struct Rig {
    guests: Vec<Guest>,
    daemon: Option<Daemon>,
    host: Option<HostSwap>,
    folder: TempDir,
}

impl Rig {
    /// Boots guests with one processor each, and sets their swap up.
    ///
    /// # Errors
    /// When anything of it fails.
    pub(super) fn start(
        artifacts: &Artifacts,
        arm: &Arm,
        guests: usize,
        counting: Option<Counting>,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("cram-density-")
            .tempdir()
            .context("a folder for the guests' files")?;
        let mut rig = Self {
            guests: Vec::new(),
            daemon: None,
            host: None,
            folder,
        };
        match arm.swap {
            Swap::Cram { copies, dedup } => {
                let options = daemon_options(guests, copies, dedup);
                rig.daemon = Some(Daemon::start(artifacts, rig.folder.path(), options)?);
            }
            Swap::Host(means, limit_mib) => {
                rig.host = Some(HostSwap::start(means, SWAP_MIB, limit_mib)?);
            }
            Swap::None | Swap::Zram | Swap::Zswap | Swap::Disk => {}
        }
        for number in 0..guests {
            let booted = rig.boot(artifacts, arm, number, counting);
            if booted.is_err() {
                rig.keep_logs();
            }
            booted?;
        }
        Ok(rig)
    }

    /// Leaves the logs where somebody can read them.
    pub(super) fn keep_logs(&mut self) {
        self.folder.disable_cleanup(true);
        eprint!(" (logs: {})", self.folder.path().display());
    }

    fn boot(
        &mut self,
        artifacts: &Artifacts,
        arm: &Arm,
        number: usize,
        counting: Option<Counting>,
    ) -> Result<()> {
        let mut options = GuestOptions {
            name: format!("guest{number}"),
            queues: 1,
            memory_mib: arm.memory_mib,
            cpus: 1,
            swap_mib: SWAP_MIB,
            counting,
            reports_free_pages: arm.squeezed,
            ..GuestOptions::default()
        };
        match &self.daemon {
            Some(daemon) => options.sockets.push(daemon.socket(number).to_owned()),
            None => options.words.push("cram.noload".to_owned()),
        }
        let mut guest = Guest::launch(artifacts, self.folder.path(), options)?;
        if let Some(host) = &self.host {
            host.take(guest.pid())?;
        }
        guest.connect()?;
        guest.wait_booted()?;
        let backing = match arm.swap {
            Swap::None | Swap::Host(..) => None,
            Swap::Cram { .. } => Some(Backing::Cram),
            Swap::Zram => Some(Backing::Zram),
            Swap::Zswap => Some(Backing::Zswap),
            Swap::Disk => Some(Backing::Disk),
        };
        if let Some(backing) = backing {
            swap_on(&guest, backing, SWAP_MIB)?;
        }
        self.guests.push(guest);
        Ok(())
    }

    pub(super) fn guests(&self) -> &[Guest] {
        &self.guests
    }

    /// Counts what its processes have.
    ///
    /// # Errors
    /// When one is gone, or we may not look at it.
    pub(super) fn ledger(&mut self) -> Result<Ledger> {
        let mut processes: Vec<_> = self
            .guests
            .iter()
            .map(|guest| (guest.pid(), Role::Qemu))
            .collect();
        if let Some(daemon) = &mut self.daemon {
            processes.push((daemon.process_id()?, Role::Daemon));
        }
        Ledger::new(&processes)
    }

    /// How much the host's swap holds, when this arm uses it.
    pub(super) fn gauge(&self) -> Option<Gauge> {
        self.host.as_ref().map(HostSwap::gauge)
    }

    /// The daemon's control socket, when there is a daemon.
    pub(super) fn control(&self) -> Option<Control> {
        self.daemon.as_ref().map(Daemon::control)
    }

    /// The daemon's name of the only guest.
    ///
    /// # Errors
    /// When the daemon knows none.
    pub(super) fn client(&self) -> Result<String> {
        let control = self.control().context("there is no daemon")?;
        let clients = control.call("clients", Value::Null)?;
        let list = clients.as_array().or_else(|| clients["clients"].as_array());
        let name = list.and_then(|list| list.first()?["name"].as_str());
        Ok(name.context("the daemon knows no client")?.to_owned())
    }

    /// How far a squeeze (`squeeze`) or a give-back (`give_back`) has come: what the daemon says of
    /// the only client.
    ///
    /// # Errors
    /// When the daemon does not say.
    pub(super) fn progress(&self, of: &str) -> Result<Value> {
        let control = self.control().context("there is no daemon")?;
        let stats = control.stats()?.raw;
        let progress = &stats["clients"][0][of];
        ensure!(progress.is_object(), "the daemon does not tell of a {of}");
        Ok(progress.clone())
    }

    /// Asks for so many pages of the only guest's RAM, or gives so many back.
    ///
    /// # Errors
    /// When the daemon refuses.
    pub(super) fn ask_client(&self, method: &str, pages: u64) -> Result<()> {
        let control = self.control().context("there is no daemon")?;
        let client = self.client()?;
        control
            .call(method, json!({ "client": client, "pages": pages }))
            .map(drop)
    }
}

fn daemon_options(
    guests: usize,
    copies: Option<&'static str>,
    dedup: &'static str,
) -> DaemonOptions {
    let mut more = vec!["--dedup".to_owned(), dedup.to_owned()];
    if let Some(copies) = copies {
        more.extend(["--copies".to_owned(), copies.to_owned()]);
    }
    if !rustix::process::geteuid().is_root() {
        // Of a daemon that has given its rights up only root may see how much memory it has.
        more.extend(["--sandbox".to_owned(), "off".to_owned()]);
    }
    DaemonOptions {
        sockets: guests,
        capacity: CAPACITY.to_owned(),
        more,
    }
}
