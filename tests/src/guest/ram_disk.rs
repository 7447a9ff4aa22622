// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A disk in the host's memory that `qemu-storage-daemon` exports over vhost-user-blk: the same
//! way to another process and back as our device's, and nothing done to the pages there.

use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::process::Process;

/// How long it may take to open its socket.
const START_LIMIT: Duration = Duration::from_secs(20);
/// A file system that is in memory.
const MEMORY: &str = "/dev/shm";

/// A running `qemu-storage-daemon` with one disk. Dropping it kills it and frees the memory.
#[derive(Debug)]
pub struct RamDisk {
    process: Process,
    socket: PathBuf,
    /// What is in the disk; removed when this goes.
    _file: tempfile::NamedTempFile,
}

impl RamDisk {
    /// Starts it with its socket and its log in `folder`.
    ///
    /// # Errors
    ///
    /// When it does not open its socket in time.
    pub fn start(folder: &Path, mib: u64) -> Result<Self> {
        let file = tempfile::Builder::new()
            .prefix("cram-ram-disk-")
            .tempfile_in(MEMORY)
            .with_context(|| format!("a file in {MEMORY}"))?;
        file.as_file().set_len(mib << 20)?;
        let socket = folder.join("disk.sock");
        let mut command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!(
                "driver=file,node-name=disk,discard=unmap,filename={}",
                file.path().display()
            ))
            .arg("--export")
            .arg(format!(
                "type=vhost-user-blk,id=export,node-name=disk,writable=on,\
                 addr.type=unix,addr.path={}",
                socket.display()
            ));
        let log = folder.join("storage-daemon.log");
        let mut disk = Self {
            process: Process::start("qemu-storage-daemon", command, &log)?,
            socket,
            _file: file,
        };
        disk.wait_open()?;
        Ok(disk)
    }

    fn wait_open(&mut self) -> Result<()> {
        let until = Instant::now() + START_LIMIT;
        while !std::fs::metadata(&self.socket).is_ok_and(|data| data.file_type().is_socket()) {
            self.process.expect_running()?;
            ensure!(
                Instant::now() < until,
                "qemu-storage-daemon opens no socket"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Where a guest connects to.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }
}
