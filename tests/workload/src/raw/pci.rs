// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Finding the device, and where its registers are (VIRTIO 1.3, section 4.1).

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};

use super::mapped::Mapped;

const VENDOR: &str = "0x1af4";
/// Where the PCI ids of modern virtio devices begin.
const FIRST_ID: u32 = 0x1040;
/// docs/protocol.md, section 1.
const DEVICE_ID: u32 = 63;
const COMMAND: u64 = 4;
const MEMORY_AND_MASTER: u16 = 6;
const CAPABILITIES: u64 = 0x34;
const VENDOR_SPECIFIC: u8 = 9;

/// A structure of registers: the mapping that it is in, and where it begins there.
pub(crate) struct Structure {
    pub(crate) bar: Mapped,
    pub(crate) at: usize,
    /// Of the notifications: bytes from one queue's register to the next one's.
    pub(crate) stride: usize,
}

/// The registers.
pub(crate) struct Registers {
    pub(crate) common: Structure,
    pub(crate) notify: Structure,
    pub(crate) device: Structure,
}

/// Takes the only cram device that no driver has.
pub(crate) fn open() -> Result<Registers> {
    let id = format!("{:#06x}", FIRST_ID + DEVICE_ID);
    let says = |path: &Path, file: &str, text: &str| {
        fs::read_to_string(path.join(file)).is_ok_and(|found| found.trim() == text)
    };
    let folder = fs::read_dir("/sys/bus/pci/devices")
        .context("no PCI bus")?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| says(path, "vendor", VENDOR) && says(path, "device", &id))
        .context("there is no cram device")?;
    // virtio-pci has it, as it has every virtio device, until it is told to let go.
    if folder.join("driver").exists() {
        let name = folder.file_name().context("a device without name")?;
        fs::write(folder.join("driver/unbind"), name.as_encoded_bytes())
            .context("cannot unbind the kernel's driver")?;
    }
    fs::write(folder.join("enable"), "1").context("cannot enable the device")?;
    let config = fs::File::options()
        .read(true)
        .write(true)
        .open(folder.join("config"))
        .context("no configuration space")?;
    let mut command = [0; 2];
    config.read_exact_at(&mut command, COMMAND)?;
    let command = u16::from_le_bytes(command) | MEMORY_AND_MASTER;
    config.write_all_at(&command.to_le_bytes(), COMMAND)?;
    find_structures(&folder, &config)
}

fn find_structures(folder: &Path, config: &fs::File) -> Result<Registers> {
    const COMMON: u8 = 1;
    const NOTIFY: u8 = 2;
    const DEVICE: u8 = 4;
    let byte = |at: u64| -> Result<u8> {
        let mut byte = [0];
        config.read_exact_at(&mut byte, at)?;
        Ok(byte[0])
    };
    let word = |at: u64| -> Result<usize> {
        let mut word = [0; 4];
        config.read_exact_at(&mut word, at)?;
        Ok(usize::try_from(u32::from_le_bytes(word))?)
    };
    let mut found: [Option<Structure>; 5] = [const { None }; 5];
    let mut at = u64::from(byte(CAPABILITIES)?);
    let mut seen = 0;
    while at != 0 {
        seen += 1;
        ensure!(seen < 64, "the list of capabilities has no end");
        let (kind, next) = (byte(at)?, byte(at + 1)?);
        if kind == VENDOR_SPECIFIC {
            let (what, bar) = (byte(at + 3)?, byte(at + 4)?);
            if let Some(place @ None) = found.get_mut(usize::from(what)) {
                // Others (access by configuration space) have no BAR of their own to map.
                if [COMMON, NOTIFY, DEVICE].contains(&what) {
                    *place = Some(Structure {
                        bar: Mapped::registers(&folder.join(format!("resource{bar}")))?,
                        at: word(at + 8)?,
                        stride: if what == NOTIFY { word(at + 16)? } else { 0 },
                    });
                }
            }
        }
        at = u64::from(next);
    }
    let [_, Some(common), Some(notify), _, Some(device)] = found else {
        bail!("the device lacks registers");
    };
    Ok(Registers {
        common,
        notify,
        device,
    })
}
