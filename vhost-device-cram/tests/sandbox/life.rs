// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The real daemon, confined, from its start to its end. It runs with `--sandbox strict`: a call
//! that its list lacks would kill it.

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cram_abi::wire::{PAGE_SIZE, event, pool_flag, result};
use cram_tests::frontend::{Guest, Options, PATIENCE, Request};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use tempfile::TempDir;
use vhost::VhostBackend;
use vhost_device_cram::control::client::Caller;

/// A user who owns nothing on the machine.
const NOBODY: u32 = 65534;
/// Pages that are put: enough for several spans of the arena.
const PAGES: u32 = 8000;

struct Daemon {
    child: Child,
    folder: TempDir,
}

impl Daemon {
    /// Starts one in a folder of its own; as nobody, if that can be.
    fn start(as_nobody: bool, more: &[&str]) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut program = PathBuf::from(env!("CARGO_BIN_EXE_vhost-device-cram"));
        if as_nobody {
            // The place where it was built may be out of nobody's reach.
            let copy = folder.path().join("daemon");
            fs::copy(&program, &copy)?;
            program = copy;
            chown(folder.path(), Some(NOBODY), Some(NOBODY))?;
        }
        let mut command = Command::new(program);
        command
            .args(["-s", "vm1.sock", "-s", "vm2.sock", "-C", "control.sock"])
            .args(["-c", "64M", "-q", "48M", "--num-queues", "2", "--pin", "0"])
            .args(more)
            .current_dir(folder.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(File::create(folder.path().join("log"))?);
        if as_nobody {
            command.uid(NOBODY).gid(NOBODY);
        }
        let child = command.spawn()?;
        let mut daemon = Self { child, folder };
        daemon.wait("the control socket", |daemon| {
            Ok(daemon.call("version", json!({})).is_ok())
        })?;
        Ok(daemon)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn call(&self, method: &str, params: Value) -> Result<Value> {
        Ok(Caller::connect(&self.path("control.sock"))?.call(method, &params)?)
    }

    fn connect(&self, name: &str) -> Result<Guest> {
        Guest::connect(&self.path(name), &Options::default())
    }

    /// Waits until something is so; fails at once when the daemon ended.
    fn wait(&mut self, what: &str, mut is_so: impl FnMut(&Self) -> Result<bool>) -> Result<()> {
        let until = Instant::now() + PATIENCE;
        loop {
            let ended = self.child.try_wait()?;
            ensure!(
                ended.is_none(),
                "the daemon ended: {ended:?}\n{}",
                self.log()
            );
            if is_so(self)? {
                return Ok(());
            }
            ensure!(Instant::now() < until, "{what} did not come");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?).context("no process")?;
        Ok(kill_process(pid, signal)?)
    }

    /// The status of each thread, as the kernel tells it.
    fn threads(&self) -> Result<Vec<String>> {
        let mut statuses = Vec::new();
        for task in fs::read_dir(format!("/proc/{}/task", self.child.id()))? {
            match fs::read_to_string(task?.path().join("status")) {
                Ok(status) => statuses.push(status),
                // One that served the control socket, and is gone.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(statuses)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What `/proc` says behind a name.
fn field<'a>(status: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = status.lines().filter_map(|line| line.split_once(':'));
    Some(fields.find(|(key, _)| *key == name)?.1.trim())
}

/// Every thread that there is has the filters. Landlock does not show from outside.
fn expect_confined(daemon: &Daemon) -> Result<()> {
    let threads = daemon.threads()?;
    // The main one, the keeper, two that accept, control, announce; a guest's workers.
    ensure!(threads.len() > 7, "{} threads", threads.len());
    for status in &threads {
        ensure!(field(status, "Seccomp") == Some("2"), "{status}");
        ensure!(field(status, "NoNewPrivs") == Some("1"), "{status}");
    }
    Ok(())
}

/// A page of words, told from others by its number. Packing it twice pays.
fn page(number: u32) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut lots = u64::from(number) << 8 | 1;
    for word in page.as_chunks_mut::<8>().0 {
        lots = lots
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        *word = *[b"guests  ", b"daemons ", b"pages   ", b"sockets "][(lots >> 62) as usize];
    }
    page
}

fn put_all(guest: &mut Guest) -> Result<()> {
    for first in (0..PAGES).step_by(50) {
        let pages: Vec<_> = (first..first + 50).map(|k| (k, page(k))).collect();
        let answer = guest.call(1, &Request::put(0, 0, &pages))?;
        ensure!(answer.results(50) == [result::OK; 50]);
    }
    Ok(())
}

/// Gets and compares every page that was not flushed.
fn get_all(guest: &mut Guest) -> Result<()> {
    for first in (0..PAGES).step_by(50) {
        let numbers: Vec<u32> = (first..first + 50).filter(|k| is_kept(*k)).collect();
        let answer = guest.call(1, &Request::get(0, 0, &numbers))?;
        for (k, number) in numbers.iter().enumerate() {
            ensure!(answer.results(k + 1)[k] == result::OK, "page {number}");
            ensure!(answer.page(k) == page(*number), "page {number}");
        }
    }
    Ok(())
}

fn get_some(guest: &mut Guest) -> Result<()> {
    let answer = guest.call(1, &Request::get(0, 0, &[0]))?;
    ensure!(answer.page(0) == page(0));
    Ok(())
}

/// One page of four stays.
fn is_kept(number: u32) -> bool {
    number.is_multiple_of(4)
}

fn flush_most(guest: &mut Guest) -> Result<()> {
    for number in (0..PAGES).step_by(4) {
        let flush = Request::flush_page(0, 0, &[(number + 1, 3)]);
        ensure!(guest.call(1, &flush)?.response.pages.get() == 3);
    }
    Ok(())
}

fn live(as_nobody: bool, more: &[&str]) -> Result<()> {
    let usual = [
        "--cold-after",
        "1",
        "--background-cpu",
        "100",
        "--metrics",
        "unix:metrics.sock",
    ];
    let more = [&usual[..], more].concat();
    let mut daemon = Daemon::start(as_nobody, &more)?;
    let mut guest = daemon.connect("vm1.sock")?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    let buffers = guest.give_event_buffers(16)?;
    put_all(&mut guest)?;
    expect_confined(&daemon)?;

    // Each of these does something else with memory.
    flush_most(&mut guest)?;
    daemon.call("store.compact", json!({}))?;
    // By the store's own thread, and then by that of the control socket.
    daemon.wait("recompression", |daemon| {
        let stats = daemon.call("stats", json!({}))?;
        Ok(stats["store"]["recompressed_pages"].as_u64() > Some(0))
    })?;
    daemon.call("store.recompress", json!({}))?;
    get_all(&mut guest)?;
    for method in ["methods", "clients", "store.anatomy"] {
        daemon.call(method, json!({}))?;
    }
    daemon.call("client.give_back", json!({ "client": "vm1", "pages": 5 }))?;
    guest.wait_event(event::GIVE_BACK, &buffers)?;
    let smaller = json!({ "client": "vm1", "bytes": 47 << 20 });
    daemon.call("client.quota", smaller)?;
    ensure!(guest.wait_config_change(PATIENCE)?);

    // Stopped and continued: waiting calls are started again by the kernel.
    daemon.signal(Signal::STOP)?;
    daemon.wait("the stop", |daemon| {
        let states = daemon.threads()?;
        Ok(states
            .iter()
            .all(|status| field(status, "State").is_some_and(|state| state.starts_with('T'))))
    })?;
    daemon.signal(Signal::CONT)?;
    get_all(&mut guest)?;

    // A guest that is added, served and removed. A socket that is there already is left alone: nobody
    // asks it whose it is.
    daemon.call("guest.add", json!({ "name": "vm3", "socket": "vm3.sock" }))?;
    let mut added = daemon.connect("vm3.sock")?;
    added.new_pool(1, 0)?;
    added.put(1, &[1])?;
    let metrics = scrape(&daemon.path("metrics.sock"))?;
    ensure!(
        metrics.contains("cram_guest_pages{guest=\"vm3\"} 1"),
        "{metrics}"
    );
    drop(added);
    daemon.call(
        "guest.remove",
        json!({ "client": "vm3", "force": true, "forget": true }),
    )?;
    ensure!(!daemon.path("vm3.sock").exists());

    // A second guest, with memory told in a table; a malformed message; the first once more.
    let options = Options {
        memory_slots: false,
        ..Options::default()
    };
    let mut other = Guest::connect(&daemon.path("vm2.sock"), &options)?;
    other.new_pool(1, 0)?;
    other.put(1, &[1, 2, 3])?;
    ensure!(other.frontend().set_vring_num(0, u16::MAX).is_err());
    drop(other);
    let mut other = daemon.connect("vm2.sock")?;
    ensure!(other.get(1, &[1, 2, 3])? == [result::OK; 3]);
    // Its memory is taken away: the handler of SIGBUS puts zeroes there.
    other.memory.take_away(true)?;
    other.ring(1).notify_always()?;
    daemon.wait("a stopped queue", |daemon| {
        let stats = daemon.call("stats", json!({}))?;
        let stopped = &stats["clients"][1]["device"]["queues_stopped"];
        Ok(stopped.as_u64().is_some_and(|stopped| stopped > 0))
    })?;
    drop(other);
    for _ in 0..10 {
        guest = guest.reconnect(&daemon.path("vm1.sock"), &Options::default())?;
        get_some(&mut guest)?;
    }
    get_all(&mut guest)?;
    expect_confined(&daemon)?;
    expect_kept_secret(&daemon)?;
    end(daemon)
}

fn scrape(socket: &Path) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: here\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}

/// The service manager hears of the start, of the life and of the end of a confined daemon.
#[test]
fn the_service_manager_is_told() -> Result<()> {
    let manager = tempfile::tempdir()?;
    let place = manager.path().join("notify");
    let line = UnixDatagram::bind(&place)?;
    line.set_read_timeout(Some(PATIENCE))?;
    let told = || -> Result<String> {
        let mut buffer = [0; 256];
        let length = line.recv(&mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer[..length]).trim().to_owned())
    };
    let folder = tempfile::tempdir()?;
    let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-cram"))
        .args(["-s", "vm1.sock", "-c", "64M", "--sandbox", "strict"])
        .current_dir(folder.path())
        .env("NOTIFY_SOCKET", &place)
        .env("WATCHDOG_USEC", "300000")
        .stderr(File::create(folder.path().join("log"))?)
        .spawn()?;
    let mut daemon = Daemon { child, folder };
    ensure!(told()? == "READY=1");
    // It is ready when somebody can connect.
    ensure!(daemon.path("vm1.sock").exists());
    for _ in 0..3 {
        ensure!(told()? == "WATCHDOG=1");
    }
    daemon.signal(Signal::TERM)?;
    let mut last = told()?;
    while last == "WATCHDOG=1" {
        last = told()?;
    }
    ensure!(last == "STOPPING=1", "{last}");
    let status = daemon.child.wait()?;
    ensure!(status.success(), "{status}\n{}", daemon.log());
    Ok(())
}

/// How many descriptors there are.
fn descriptors(daemon: &Daemon) -> Result<u64> {
    let entries = fs::read_dir(format!("/proc/{}/fd", daemon.child.id()))?;
    Ok(u64::try_from(entries.count())?)
}

/// Eight queues with the daemon's own defaults; threads and descriptors come with what is used.
#[test]
fn what_the_driver_uses_is_served_and_nothing_else_paid_for() -> Result<()> {
    const QUEUES: u16 = 8;
    let workers = "6";
    let mut daemon = Daemon::start(false, &["--num-queues", "63", "--workers", workers])?;
    let before = descriptors(&daemon)?;
    let options = Options {
        request_queues: 2,
        ..Options::default()
    };
    let guest = Guest::connect(&daemon.path("vm1.sock"), &options)?;
    // That of events, and one for each of two queues.
    daemon.wait("three workers", |daemon| {
        let threads = daemon.threads()?;
        let workers = threads
            .iter()
            .filter(|of| of.starts_with("Name:\tworker\n"));
        Ok(workers.count() == 3)
    })?;
    drop(guest);
    daemon.wait("their end", |daemon| Ok(descriptors(daemon)? <= before))?;
    let options = Options {
        request_queues: QUEUES,
        ..Options::default()
    };
    let mut guest = Guest::connect(&daemon.path("vm2.sock"), &options)?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    for queue in 1..=QUEUES {
        let answer = guest.call(queue.into(), &Request::put(0, 0, &[(1, page(1))]))?;
        ensure!(answer.results(1) == [result::OK], "queue {queue}");
    }
    let taken = descriptors(&daemon)?.saturating_sub(before);
    let promised = vhost_device_cram::limits::of_a_guest(QUEUES.into(), workers.parse()?);
    ensure!(
        taken <= promised,
        "{taken} descriptors, {promised} promised"
    );
    ensure!(daemon.log().contains(" descriptors: room for "));
    Ok(())
}

/// Nobody but root may look into the process, not even another one of the same user; that also is
/// how the kernel shows that it makes no core dump.
fn expect_kept_secret(daemon: &Daemon) -> Result<()> {
    let owner = fs::metadata(format!("/proc/{}/mem", daemon.child.id()))?.uid();
    ensure!(owner == 0, "the memory is user {owner}'s");
    Ok(())
}

fn end(mut daemon: Daemon) -> Result<()> {
    daemon.signal(Signal::TERM)?;
    let until = Instant::now() + PATIENCE;
    let status = loop {
        if let Some(status) = daemon.child.try_wait()? {
            break status;
        }
        ensure!(Instant::now() < until, "the daemon does not end");
        std::thread::sleep(Duration::from_millis(10));
    };
    let log = daemon.log();
    ensure!(status.success(), "{status}\n{log}");
    ensure!(log.contains("confined by seccomp"), "{log}");
    // Nothing is lost without a word, and nothing is said to be lost that is kept.
    let is_lost = log.contains("pages end with this daemon");
    let is_kept = daemon.path("pages").exists();
    ensure!(is_lost != is_kept, "{log}");
    // What was done to it is told, and maybe the want of landlock; nothing else went wrong.
    let expected = [
        "connection ended",
        "no landlock",
        "memory is gone",
        "pages end with this daemon",
    ];
    let bad = log.lines().find(|line| {
        (line.contains("WARN") || line.contains("ERROR"))
            && !expected.iter().any(|text| line.contains(text))
    });
    ensure!(bad.is_none(), "{log}");
    ensure!(!log.contains("panicked"), "{log}");
    let left = sockets(daemon.folder.path())?;
    ensure!(left.is_empty(), "{left:?} were left behind");
    Ok(())
}

fn sockets(folder: &Path) -> Result<Vec<PathBuf>> {
    let paths: Result<Vec<_>, std::io::Error> = fs::read_dir(folder)?
        .map(|entry| Ok(entry?.path()))
        .collect();
    let is_socket = |path: &PathBuf| {
        path.extension()
            .is_some_and(|extension| extension == "sock")
            || path.to_string_lossy().contains(".vhost-device-cram")
    };
    Ok(paths?.into_iter().filter(is_socket).collect())
}

#[test]
fn a_whole_life_with_pages_in_memory() -> Result<()> {
    live(false, &["--sandbox", "strict"])
}

#[test]
fn a_whole_life_with_pages_in_a_file() -> Result<()> {
    live(false, &["--sandbox", "strict", "--arena", "pages"])
}

/// Who has no privileges must be able to do it as well: what of `/proc` is his, and what root's,
/// changes with the sandbox.
#[test]
fn a_whole_life_as_nobody() -> Result<()> {
    let is_root = rustix::process::geteuid().is_root();
    live(is_root, &["--sandbox", "strict", "--arena", "pages"])
}

#[test]
fn off_is_off_and_says_so() -> Result<()> {
    let daemon = Daemon::start(false, &["--sandbox", "off"])?;
    for status in daemon.threads()? {
        ensure!(field(&status, "Seccomp") == Some("0"), "{status}");
    }
    let log = daemon.log();
    ensure!(
        log.contains("WARN ") && log.contains("not confined: --sandbox is off"),
        "{log}"
    );
    Ok(())
}

#[test]
fn on_is_what_it_is_without_a_word() -> Result<()> {
    let daemon = Daemon::start(false, &[])?;
    let mut guest = daemon.connect("vm1.sock")?;
    guest.new_pool(0, pool_flag::PERSISTENT)?;
    put_all(&mut guest)?;
    expect_confined(&daemon)?;
    let mode = fs::metadata(daemon.path("control.sock"))?.permissions();
    ensure!(mode.mode() & 0o777 == 0o600);
    end(daemon)
}
