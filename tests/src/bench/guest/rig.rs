// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest with something to swap to, and all that stands behind it.

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::guest::{
    Artifacts, Counting, Daemon, DaemonOptions, Guest, GuestOptions, Named, RamDisk,
};

/// What a guest can swap to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::bench) enum Backing {
    /// Our device, above the disk.
    Cram,
    /// Compressed memory in the guest, as a block device.
    Zram,
    /// Compressed memory in the guest, above the disk.
    Zswap,
    /// A virtio-blk disk: a file in the host's page cache.
    Disk,
    /// A disk in the host's memory, exported by another process.
    VhostUserBlk,
}

/// A way of swapping that is compared with others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    /// As in the names of figures.
    pub(super) name: &'static str,
    /// What the guest swaps to.
    pub(super) backing: Backing,
    /// Whether anonymous memory comes in folios of 64 KiB where it can.
    pub(super) large_folios: bool,
}

/// The ways that are compared.
pub(super) const CASES: [Case; 6] = [
    case("cram", Backing::Cram),
    case("zram", Backing::Zram),
    case("zswap", Backing::Zswap),
    case("disk", Backing::Disk),
    case("vhost_user_blk", Backing::VhostUserBlk),
    Case {
        name: "mthp",
        backing: Backing::Cram,
        large_folios: true,
    },
];

const fn case(name: &'static str, backing: Backing) -> Case {
    Case {
        name,
        backing,
        large_folios: false,
    }
}

/// Room for whatever is swapped out. Nobody is measured at being full.
const SWAP_MIB: u64 = 1024;
/// The daemon's pool; the pages come to less than half of their size in it.
const CAPACITY: &str = "1G";
const LARGE_FOLIOS: &str = "/sys/kernel/mm/transparent_hugepage/hugepages-64kB/enabled";

/// A guest that is ready to swap. What is dropped first goes first.
pub(super) struct Rig {
    guest: Guest,
    daemon: Option<Daemon>,
    _disk: Option<RamDisk>,
    _folder: TempDir,
}

impl Rig {
    /// Boots a guest with one processor, so that the process behind its device has one too, and
    /// sets its swap up.
    ///
    /// # Errors
    /// When anything of it fails.
    pub(super) fn start(
        artifacts: &Artifacts,
        case: &Case,
        memory_mib: u32,
        counting: Option<Counting>,
    ) -> Result<Self> {
        let folder = tempfile::Builder::new()
            .prefix("cram-bench-")
            .tempdir()
            .context("a folder for the guest's files")?;
        let mut options = GuestOptions {
            queues: 1,
            memory_mib,
            cpus: 1,
            swap_mib: SWAP_MIB,
            counting,
            ..GuestOptions::default()
        };
        let (mut daemon, mut disk) = (None, None);
        match case.backing {
            Backing::Cram => {
                let pool = DaemonOptions {
                    capacity: CAPACITY.to_owned(),
                    ..DaemonOptions::default()
                };
                let started = Daemon::start(artifacts, folder.path(), pool)?;
                options.sockets.push(started.socket(0).to_owned());
                daemon = Some(started);
            }
            Backing::VhostUserBlk => {
                let started = RamDisk::start(folder.path(), SWAP_MIB)?;
                options.disk_sockets.push(started.socket().to_owned());
                disk = Some(started);
            }
            Backing::Zram | Backing::Zswap | Backing::Disk => {}
        }
        if case.backing != Backing::Cram {
            options.words.push("cram.noload".to_owned());
        }
        let guest = Guest::start(artifacts, folder.path(), options)?;
        if case.large_folios {
            guest.shell(&format!("echo always > {LARGE_FOLIOS}"))?;
        }
        swap_on(&guest, case.backing, SWAP_MIB)?;
        Ok(Self {
            guest,
            daemon,
            _disk: disk,
            _folder: folder,
        })
    }

    /// The guest.
    pub(super) fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The process behind our device.
    ///
    /// # Errors
    /// When this guest has no such device.
    pub(super) fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("there is no daemon")
    }

    /// Pages that went out and came back since boot.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub(super) fn moved(&self) -> Result<Moved> {
        let vmstat = Named::parse(&self.guest.agent()?.read("/proc/vmstat")?);
        Ok(Moved {
            // zswap's own writing of old pages to the disk is no page of the programs' going out.
            pages_out: (vmstat.get("pswpout")? + vmstat.get("zswpout")?)
                .saturating_sub(vmstat.get("zswpwb")?),
            pages_in: vmstat.get("pswpin")? + vmstat.get("zswpin")?,
        })
    }
}

/// Pages moved.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Moved {
    /// Swapped out.
    pub(super) pages_out: u64,
    /// Swapped in, those among them that were read ahead.
    pub(super) pages_in: u64,
}

impl Moved {
    /// What was moved after `earlier`.
    pub(super) fn since(self, earlier: Moved) -> Moved {
        Moved {
            pages_out: self.pages_out.saturating_sub(earlier.pages_out),
            pages_in: self.pages_in.saturating_sub(earlier.pages_in),
        }
    }

    /// Both ways.
    pub(super) fn pages(self) -> u64 {
        self.pages_out + self.pages_in
    }
}

/// Everything but what is swapped to is the kernel's default, and the same for all.
///
/// # Errors
/// When a step fails.
pub(in crate::bench) fn swap_on(guest: &Guest, backing: Backing, zram_mib: u64) -> Result<()> {
    let on = |device: &str| {
        format!("mkswap {device} && sync && echo 100 > /proc/sys/vm/swappiness && swapon {device}")
    };
    match backing {
        Backing::Cram | Backing::Disk => guest.swap_on(),
        Backing::Zswap => {
            guest.shell(
                "cd /sys/module/zswap/parameters && echo lz4 > compressor && echo Y > enabled",
            )?;
            guest.swap_on()
        }
        Backing::Zram => guest
            .shell(&format!(
                "insmod /lib/modules/zram.ko && echo lz4 > /sys/block/zram0/comp_algorithm && \
                 echo {zram_mib}M > /sys/block/zram0/disksize && {}",
                on("/dev/zram0")
            ))
            .map(drop),
        Backing::VhostUserBlk => guest.shell(&on("/dev/vdd")).map(drop),
    }
}
