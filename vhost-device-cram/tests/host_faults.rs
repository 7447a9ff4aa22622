// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A host in need: no descriptors left, no room for the log, an arena that somebody cuts short. What
//! holds then is in docs/threat-model.md.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of it is a test, helpers included"
)]

use std::fs::File;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use cram_abi::wire::{PAGE_SIZE, pool_flag, result};
use cram_tests::frontend::{Guest, Options, Request, page};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use tempfile::TempDir;
use vhost_device_cram::control::client::Caller;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-cram");
/// How long anything may take that takes milliseconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

struct Daemon {
    child: Child,
    folder: TempDir,
}

impl Daemon {
    /// One for two guests, whose log goes to a file.
    fn start(folder: TempDir, more: &[&str]) -> Self {
        let log = File::create(folder.path().join("log")).unwrap();
        let daemon = Self::start_with_log(folder, more, log);
        // Without a connection, which would leave a descriptor for a moment.
        wait(|| daemon.log().contains("control socket control.sock"));
        daemon
    }

    fn start_with_log(folder: TempDir, more: &[&str], log: File) -> Self {
        let child = Command::new(DAEMON)
            .args(["-s", "vm1.sock", "-s", "vm2.sock"])
            .args(["-C", "control.sock", "-c", "64M"])
            .args(more)
            .current_dir(folder.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        Self { child, folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// What the control socket says, if it does.
    fn version(&self) -> Option<serde_json::Value> {
        let mut caller = Caller::connect(&self.path("control.sock")).ok()?;
        caller.call("version", &serde_json::json!({})).ok()
    }

    fn connect(&self, socket: &str) -> anyhow::Result<Guest> {
        Guest::connect(&self.path(socket), &Options::default())
    }

    fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap()
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap()).unwrap()
    }

    /// The numbers of its descriptors, in order.
    fn descriptors(&self) -> Vec<u64> {
        let folder = format!("/proc/{}/fd", self.child.id());
        let entries = std::fs::read_dir(folder).unwrap().flatten();
        let mut numbers: Vec<u64> = entries
            .map(|entry| entry.file_name().to_str().unwrap().parse().unwrap())
            .collect();
        numbers.sort_unstable();
        numbers
    }

    /// The lowest number that a new descriptor may have: with this as the limit there are no more.
    fn first_free(&self) -> u64 {
        let used = self.descriptors();
        (0..).find(|number| !used.contains(number)).unwrap()
    }

    /// Lets it have so many descriptors from now on.
    fn limit_descriptors(&self, limit: Option<u64>) {
        let resource = Resource::Nofile;
        let now = rustix::process::getrlimit(resource);
        let new = Rlimit {
            current: limit.or(now.current),
            maximum: now.maximum,
        };
        prlimit(Some(self.pid()), resource, new).unwrap();
    }

    fn wait_ended(&mut self) -> ExitStatus {
        let mut status = None;
        wait(|| {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn wait(mut is_over: impl FnMut() -> bool) {
    let until = Instant::now() + PATIENCE;
    while !is_over() {
        assert!(Instant::now() < until, "it takes too long");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn in_memory() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// Whatever the step at which descriptors run out: the attempt ends or waits, nobody else notices, and
/// as soon as there are some, all is well.
#[test]
fn without_descriptors_who_is_connected_is_served_and_others_wait() {
    // Not confined, so that its descriptors can be counted by everybody.
    let daemon = Daemon::start(tempfile::tempdir().unwrap(), &["--sandbox", "off"]);
    let mut honest = daemon.connect("vm1.sock").unwrap();
    honest.new_pool(0, pool_flag::PERSISTENT).unwrap();
    assert_eq!(honest.put(0, &[1, 2, 3]).unwrap(), [result::OK; 3]);
    let (used, first) = (daemon.descriptors(), daemon.first_free());
    let refusals = || daemon.log().matches("cannot accept a connection").count();
    let mut outcomes = [0; 3];
    for more in 0.. {
        wait(|| daemon.descriptors() == used);
        let before = refusals();
        daemon.limit_descriptors(Some(first + more));
        let connected = std::thread::scope(|scope| {
            let attempt = scope.spawn(|| daemon.connect("vm2.sock").is_ok());
            wait(|| attempt.is_finished() || refusals() > before);
            let had_to_wait = !attempt.is_finished();
            assert_eq!(honest.get(0, &[1, 2, 3]).unwrap(), [result::OK; 3]);
            daemon.limit_descriptors(None);
            let is_connected = attempt.join().unwrap();
            outcomes[usize::from(had_to_wait) + 2 * usize::from(is_connected && !had_to_wait)] += 1;
            is_connected && !had_to_wait
        });
        // All is well again.
        let mut other = daemon.connect("vm2.sock").unwrap();
        other.new_pool(0, pool_flag::PERSISTENT).unwrap();
        assert_eq!(other.put(0, &[7]).unwrap(), [result::OK]);
        assert!(daemon.version().is_some());
        if connected {
            break;
        }
    }
    // It was refused at the door, and on the way, and not at last.
    assert!(
        outcomes[0] > 3 && outcomes[1] > 0 && outcomes[2] == 1,
        "{outcomes:?}"
    );
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

#[test]
fn without_descriptors_the_control_socket_waits() {
    let daemon = Daemon::start(tempfile::tempdir().unwrap(), &["--sandbox", "off"]);
    let (used, first) = (daemon.descriptors(), daemon.first_free());
    for more in 0..3 {
        let before = daemon.log().len();
        daemon.limit_descriptors(Some(first + more));
        std::thread::scope(|scope| {
            let attempt = scope.spawn(|| daemon.version());
            wait(|| attempt.is_finished() || daemon.log().len() > before);
            daemon.limit_descriptors(None);
            // Answered, or hung up on; what matters is that it ends.
            let _ = attempt.join().unwrap();
        });
        assert!(daemon.version().is_some());
        wait(|| daemon.descriptors() == used);
    }
    assert!(!daemon.log().contains("panicked"), "{}", daemon.log());
}

/// It ends, at once, rather than deliver zeroes for what was there.
#[test]
fn an_arena_that_is_cut_short_ends_the_daemon_and_delivers_nothing_wrong() {
    let mut daemon = Daemon::start(in_memory(), &["-a", "arena"]);
    let mut guest = daemon.connect("vm1.sock").unwrap();
    guest.new_pool(0, pool_flag::PERSISTENT).unwrap();
    let numbers: Vec<u32> = (0..64).collect();
    assert_eq!(guest.put(0, &numbers).unwrap(), vec![result::OK; 64]);
    let arena = File::options().write(true).open(daemon.path("arena"));
    arena.unwrap().set_len(4096).unwrap();
    for number in numbers {
        match guest.call(1, &Request::get(0, 0, &[number])) {
            Ok(answer) => {
                assert_eq!(answer.results(1), [result::OK]);
                assert_eq!(answer.page(0)[..PAGE_SIZE], page(u64::from(number)));
            }
            Err(_) => break,
        }
    }
    assert_eq!(
        daemon.wait_ended().signal(),
        Some(Signal::BUS.as_raw()),
        "{}",
        daemon.log()
    );
    // The next one says what happened, and what to do.
    let again = again(daemon.folder.path());
    assert_eq!(again.0.code(), Some(1));
    assert!(again.1.contains("arena is damaged: it was cut short"));
    assert!(again.1.contains("remove it"), "{}", again.1);
    std::fs::remove_file(daemon.path("arena")).unwrap();
}

fn again(folder: &Path) -> (ExitStatus, String) {
    let words = ["-s", "vm1.sock", "-c", "64M", "-a", "arena"];
    let output = Command::new(DAEMON)
        .args(words)
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    (output.status, text)
}

#[test]
fn a_full_disk_under_the_log_ends_nothing() {
    let full = || File::options().write(true).open("/dev/full").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start_with_log(folder, &["--log-level", "trace"], full());
    wait(|| daemon.version().is_some());
    for _ in 0..3 {
        let mut guest = daemon.connect("vm1.sock").unwrap();
        guest.new_pool(0, pool_flag::PERSISTENT).unwrap();
        assert_eq!(guest.put(0, &[1]).unwrap(), [result::OK]);
        assert_eq!(guest.get(0, &[1]).unwrap(), [result::OK]);
        // A ring that lies, which is worth a warning.
        let here = guest.ring(2).base().unwrap();
        guest
            .ring(2)
            .set_available_index(here.wrapping_sub(1))
            .unwrap();
        guest.ring(2).notify_always().unwrap();
        assert_eq!(guest.get(0, &[1]).unwrap(), [result::OK]);
    }
    kill_process(daemon.pid(), Signal::TERM).unwrap();
    assert_eq!(daemon.wait_ended().code(), Some(0));
    // Nor does it change what a wrong command line comes to.
    let status = Command::new(DAEMON)
        .arg("--nonsense")
        .stderr(full())
        .status()
        .unwrap();
    assert_eq!(status.code(), Some(2));
}
