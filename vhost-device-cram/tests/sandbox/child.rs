// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A process to lock up: this test program once more, so that the sandbox is not laid on the
//! tests beside.

use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::io::Errno;
use vhost_device_cram::client::Offer;
use vhost_device_cram::server::{GuestOptions, Options, StoreOptions};
use vhost_device_cram::socket::Permissions;

/// Names the folder to a child, and makes it one.
const FOLDER: &str = "CRAM_SANDBOXED_IN";
/// What a child prints when it has come to its end.
const DONE: &str = "all attempts were made";

/// How a child ended.
pub(crate) struct Ended {
    pub(crate) signal: Option<i32>,
    pub(crate) text: String,
    is_success: bool,
}

impl Ended {
    /// Everything was as the child expected it, up to its last line.
    pub(crate) fn expect_done(&self) {
        assert!(self.is_success && self.text.contains(DONE), "{}", self.text);
    }
}

/// Runs `attempts` in a child; `test` is the full name of the test that calls this. In the child
/// itself that never returns.
pub(crate) fn run(test: &str, attempts: impl FnOnce(&Path)) -> Ended {
    if let Some(folder) = std::env::var_os(FOLDER) {
        attempts(Path::new(&folder));
        println!("{DONE}");
        std::process::exit(0);
    }
    let folder = tempfile::tempdir().unwrap();
    let output = Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder.path())
        // With it a panic looks for the program's file, and must do without.
        .env("RUST_BACKTRACE", "1")
        .output()
        .unwrap();
    let texts = [output.stdout, output.stderr];
    Ended {
        signal: output.status.signal(),
        text: texts
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .join("\n"),
        is_success: output.status.success(),
    }
}

/// Options of a daemon whose sockets for guests are in one folder, and whose control socket in
/// another.
pub(crate) fn options(folder: &Path) -> Options {
    let [guests, control] = ["guests", "control"].map(|name| made(folder, name));
    Options {
        guests: vec![GuestOptions::of_socket(guests.join("vm1.sock"))],
        keep: None,
        control_socket: Some(control.join("control.sock")),
        control_permissions: Permissions::PRIVATE,
        metrics: None,
        guest_folders: Vec::new(),
        store: StoreOptions::with_capacity(64 << 20),
        quota_bytes: None,
        offer: Offer {
            request_queues: 2,
            queue_size: 256,
            max_pools: 16,
            poll: std::time::Duration::ZERO,
            workers: None,
            pin: Vec::new(),
            policy: vhost_device_cram::balance::Policy::default(),
            first_touch_bytes: 16 << 20,
        },
    }
}

/// A new folder.
pub(crate) fn made(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    std::fs::create_dir(&path).unwrap();
    path
}

/// What an attempt must come to: this error.
pub(crate) fn refused<T>(what: &str, attempt: std::io::Result<T>, errno: Errno) {
    match attempt {
        Ok(_) => panic!("{what} was possible"),
        Err(error) => assert_eq!(error.raw_os_error(), Some(errno.raw_os_error()), "{what}"),
    }
}
