// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The two programs as people meet them: command lines, messages, signals, exit statuses.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of it is a test, helpers included"
)]

use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-cram");
const CRAMCTL: &str = env!("CARGO_BIN_EXE_cramctl");
/// How long anything may take that takes milliseconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a program to its end.
fn run(program: &str, folder: &Path, words: &[&str]) -> Output {
    Command::new(program)
        .args(words)
        .current_dir(folder)
        .env_remove("RUST_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// What a program said on standard error: one line, after its name.
fn complaint(program: &str, folder: &Path, words: &[&str], status: i32) -> String {
    let output = run(program, folder, words);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{words:?}: {text}");
    assert!(output.stdout.is_empty(), "{words:?}");
    assert_eq!(text.lines().count(), 1, "{words:?}: {text}");
    let name = Path::new(program).file_name().unwrap().to_str().unwrap();
    let message = text.trim_end().strip_prefix(&format!("{name}: "));
    message
        .unwrap_or_else(|| panic!("{words:?}: {text}"))
        .to_owned()
}

struct Daemon {
    child: Child,
    folder: TempDir,
}

impl Daemon {
    fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), &[])
    }

    fn start_in(folder: TempDir, more: &[&str]) -> Self {
        let child = Command::new(DAEMON)
            .args([
                "-s",
                "vm1.sock",
                "-s",
                "vm2.sock",
                "-C",
                "control.sock",
                "-c",
                "64M",
            ])
            .args(more)
            .current_dir(folder.path())
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Daemon { child, folder };
        let until = Instant::now() + PATIENCE;
        while !run(
            CRAMCTL,
            daemon.folder.path(),
            &["-C", "control.sock", "version"],
        )
        .status
        .success()
        {
            assert!(Instant::now() < until, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn cramctl(&self, words: &[&str]) -> String {
        let words = [&["-C", "control.sock"], words].concat();
        let output = run(CRAMCTL, self.folder.path(), &words);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{words:?}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Sends a signal and waits for the end; the exit status.
    fn end(&mut self, signal: Signal) -> Option<i32> {
        let pid = Pid::from_raw(self.child.id().try_into().unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
        let until = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < until, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn help_and_version_read_well() {
    let folder = tempfile::tempdir().unwrap();
    for program in [DAEMON, CRAMCTL] {
        for flag in ["--help", "-h", "--version"] {
            let output = run(program, folder.path(), &[flag]);
            assert!(output.status.success() && output.stderr.is_empty());
            let text = String::from_utf8(output.stdout).unwrap();
            let longest = text.lines().map(|line| line.chars().count()).max().unwrap();
            assert!(longest <= 120, "{text}");
        }
    }
    let help = run(DAEMON, folder.path(), &["--help"]).stdout;
    let help = String::from_utf8(help).unwrap();
    for word in [
        "--socket-path",
        "--control-socket",
        "--capacity",
        "--quota",
        "--num-queues",
        "--sandbox",
        "Example:",
    ] {
        assert!(help.contains(word), "{word}");
    }
}

#[test]
fn a_wrong_command_line_gets_one_line_that_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    for (words, message) in [
        (
            &[][..],
            "--socket-path <SOCKET>, --capacity <SIZE> is missing; see --help",
        ),
        (&["-s", "x"], "--capacity <SIZE> is missing; see --help"),
        (
            &["-c", "1G"],
            "--socket-path <SOCKET> is missing; see --help",
        ),
        (
            &["-s", "x", "-c"],
            "--capacity <SIZE> needs a value; see --help",
        ),
        (
            &["-s", "x", "-c", "12Q"],
            "invalid value '12Q' for '--capacity <SIZE>': \"12Q\" is not a size; write a whole \
             number and K, M, G or T, such as 512M or 1G",
        ),
        (
            &["-s", "x", "-c", "4K"],
            "--capacity 4 KiB is too small; give at least 1 MiB",
        ),
        (
            &["-s", "x", "-c", "1M", "-q", "2M"],
            "--quota 2 MiB is more than --capacity 1 MiB; a guest cannot have more than there is",
        ),
        (
            &["-s", "x", "-s", "y", "-C", "x", "-c", "1G"],
            "socket x is given twice; each needs a path of its own",
        ),
        (
            &["-s", "x", "-c", "1G", "--capactiy", "1"],
            "there is no --capactiy; did you mean --capacity?",
        ),
        (
            &["-s", "x", "-c", "1G", "word"],
            "there is no word; see --help",
        ),
        (
            &["-s", "x", "-c", "1G", "--num-queues", "0"],
            "invalid value '0' for '--num-queues <N>': 0 is not in 1..=63",
        ),
        (
            &["-s", "x", "-c", "1G", "--queue-size", "100"],
            "invalid value '100' for '--queue-size <N>': write a power of two up to 32768, such as 256",
        ),
        (
            &["-s", "x", "-c", "1G", "--pin", "5-3"],
            "invalid value '5-3' for '--pin <CPUS>': write numbers of processors and ranges of \
             them, such as 2,3,6-9",
        ),
        (
            &["-s", "x", "-c", "1G", "--sandbox", "maybe"],
            "invalid value 'maybe' for '--sandbox <HOW>'",
        ),
        (
            &["-s", "x", "-c", "1G", "--log-level", "loud"],
            "invalid value 'loud' for '--log-level <LEVEL>': write off, error, warn, info, debug or trace",
        ),
    ] {
        assert_eq!(complaint(DAEMON, at, words, 2), message);
    }
    let huge = complaint(DAEMON, at, &["-s", "x", "-c", "100P"], 2);
    assert!(
        huge.starts_with("--capacity 100 PiB is too large; give at most "),
        "{huge}"
    );
    assert_eq!(
        std::fs::read_dir(at).unwrap().count(),
        0,
        "nothing was left behind"
    );
}

#[test]
fn a_socket_that_cannot_be_is_explained() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("file"), "x").unwrap();
    std::fs::create_dir(at.join("folder")).unwrap();
    let _other = UnixListener::bind(at.join("busy")).unwrap();
    let long = "x".repeat(120);
    for (path, message) in [
        (
            "busy",
            "another process is listening on it; stop that one, or choose another path",
        ),
        (
            "file",
            "a file that is not a socket has this name; remove it, or choose another path",
        ),
        (
            "folder",
            "a file that is not a socket has this name; remove it, or choose another path",
        ),
        ("absent/x", "there is no directory absent; create it first"),
        ("file/x", "there is no directory file; create it first"),
        (
            &long,
            "the path is longer than 107 bytes; choose a shorter one",
        ),
    ] {
        for words in [
            vec!["-c", "1G", "-s", path],
            vec!["-c", "1G", "-s", "good", "-C", path],
            vec!["-c", "1G", "-s", "good", "-s", path],
        ] {
            let said = complaint(DAEMON, at, &words, 1);
            assert_eq!(said, format!("socket {path}: {message}"));
        }
    }
    assert!(
        !at.join("good").exists(),
        "what was made before the error is gone"
    );
    assert!(at.join("file").exists() && at.join("busy").exists());
}

#[test]
fn an_arena_that_cannot_be_is_explained_and_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    std::fs::write(at.join("letters"), "x".repeat(9000)).unwrap();
    std::fs::create_dir(at.join("folder")).unwrap();
    for (path, message) in [
        (
            "letters",
            "letters is not an arena, and not empty; give another path, or remove it",
        ),
        ("folder", "cannot open folder: Is a directory (os error 21)"),
        (
            "absent/x",
            "cannot open absent/x: No such file or directory (os error 2)",
        ),
    ] {
        let words = ["-c", "64M", "-s", "socket", "--arena", path];
        let said = complaint(DAEMON, at, &words, 1);
        assert_eq!(said, format!("the store cannot be made: {message}"));
        assert!(!at.join("socket").exists(), "{path}");
    }
    let letters = std::fs::read_to_string(at.join("letters")).unwrap();
    assert_eq!(letters, "x".repeat(9000));
}

#[test]
fn the_arena_of_a_killed_daemon_is_taken_over_and_that_of_a_living_one_is_not() {
    let more = ["--arena", "pages"];
    let mut daemon = Daemon::start_in(tempfile::tempdir().unwrap(), &more);
    let words = ["-c", "64M", "-s", "other.sock", "--arena", "pages"];
    let said = complaint(DAEMON, daemon.folder.path(), &words, 1);
    assert_eq!(
        said,
        "the store cannot be made: pages is in use by another process"
    );
    let generation = |daemon: &Daemon| {
        let stats: serde_json::Value =
            serde_json::from_str(&daemon.cramctl(&["stats", "--json"])).unwrap();
        stats["store"]["generation"].clone()
    };
    let before = generation(&daemon);
    assert_eq!(daemon.end(Signal::KILL), None);
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let again = Daemon::start_in(folder, &more);
    assert_eq!(generation(&again), before);
}

#[test]
fn a_signal_ends_the_daemon_and_removes_its_sockets() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut daemon = Daemon::start();
        let sockets = ["vm1.sock", "vm2.sock", "control.sock"].map(|name| daemon.path(name));
        for path in &sockets {
            assert!(std::fs::metadata(path).unwrap().file_type().is_socket());
        }
        assert_eq!(daemon.end(signal), Some(0));
        assert!(sockets.iter().all(|path| !path.exists()));
    }
    // One for which there is a handler ends it all the same, when somebody sends it.
    assert_eq!(Daemon::start().end(Signal::BUS), None);
}

#[test]
fn sockets_of_a_killed_daemon_are_replaced_and_those_of_others_kept() {
    let mut daemon = Daemon::start();
    assert_eq!(daemon.end(Signal::KILL), None);
    assert!(daemon.path("vm1.sock").exists());
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let mut again = Daemon::start_in(folder, &[]);
    assert!(again.cramctl(&["clients"]).contains("vm1"));

    // A second one on the same sockets does not disturb the first.
    let said = complaint(
        DAEMON,
        again.folder.path(),
        &["-s", "vm1.sock", "-c", "1G"],
        1,
    );
    assert!(said.contains("another process is listening"), "{said}");
    assert!(again.cramctl(&["stats"]).contains("vm2"));

    // A socket that somebody put in the place of ours is not ours to remove.
    std::fs::remove_file(again.path("vm2.sock")).unwrap();
    let _theirs = UnixListener::bind(again.path("vm2.sock")).unwrap();
    assert_eq!(again.end(Signal::TERM), Some(0));
    assert!(again.path("vm2.sock").exists() && !again.path("vm1.sock").exists());
}

#[test]
fn a_client_that_talks_nonsense_or_leaves_does_not_matter() {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    let mut daemon = Daemon::start();
    for bytes in [&b""[..], b"\x01", &[0xff; 5000]] {
        for socket in ["vm1.sock", "control.sock"] {
            let mut stream = UnixStream::connect(daemon.path(socket)).unwrap();
            // The daemon may hang up in the middle.
            let _ = stream.write_all(bytes);
        }
    }
    assert!(daemon.cramctl(&["stats"]).contains("vm1"));
    assert_eq!(daemon.end(Signal::TERM), Some(0));
}

#[test]
fn cramctl_shows_and_sets() {
    let daemon = Daemon::start();
    let stats = daemon.cramctl(&["stats"]);
    assert!(stats.starts_with("held      "), "{stats}");
    assert!(
        stats.contains(" of 64 MiB (0%)") && stats.contains("vm2     away"),
        "{stats}"
    );
    let json = daemon.cramctl(&["stats", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["schema"], 1);
    assert_eq!(daemon.cramctl(&["quota", "vm1"]), "vm1: quota 64 MiB\n");
    assert_eq!(
        daemon.cramctl(&["quota", "vm1", "12M"]),
        "vm1: quota 12 MiB\n"
    );
    assert_eq!(daemon.cramctl(&["quota", "vm1"]), "vm1: quota 12 MiB\n");
    assert_eq!(
        daemon.cramctl(&["freeze", "vm1"]),
        "vm1: frozen, puts are refused\n"
    );
    assert!(daemon.cramctl(&["clients"]).contains("away, frozen"));
    assert_eq!(daemon.cramctl(&["thaw", "vm1"]), "vm1: thawed\n");
    assert_eq!(
        daemon.cramctl(&["flush", "vm1"]),
        "vm1: 0 ephemeral pages dropped\n"
    );
    let asked = "vm1: asked to take back 5 MiB (when it connects)\n";
    assert_eq!(daemon.cramctl(&["give-back", "vm1", "5M", "--wait"]), asked);
    assert_eq!(
        daemon.cramctl(&["policy", "vm1"]),
        "vm1: copies free, auto-squeeze off\n"
    );
    let changed = [
        "policy",
        "vm1",
        "--copies",
        "keep",
        "--auto-squeeze",
        "true",
    ];
    assert_eq!(
        daemon.cramctl(&changed),
        "vm1: copies keep, auto-squeeze on\n"
    );
    let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    assert!(
        daemon
            .cramctl(&["authorise", "vm1", uuid])
            .contains("authorised for")
    );
    assert!(
        daemon.cramctl(&["methods"]).contains(
            "client.give_back(client, bytes (number or size) or pages (number); 0 ends it)"
        )
    );
    assert!(
        daemon
            .cramctl(&["call", "version"])
            .contains("\"schema\":1")
    );
}

/// With a process of another user, where we may start one; root may change everything either way.
#[test]
fn who_is_let_in_by_the_mode_may_only_look() {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;

    const NOBODY: u32 = 65534;
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    // The place where it was built may be out of nobody's reach.
    let copy = folder.path().join("cramctl");
    std::fs::copy(CRAMCTL, &copy).unwrap();
    let daemon = Daemon::start_in(folder, &["--control-mode", "0666"]);
    assert_eq!(daemon.cramctl(&["weight", "vm1", "7"]), "vm1: weight 7\n");
    let is_root = rustix::process::geteuid().is_root();
    let ask = |words: &[&str]| {
        let mut command = Command::new(&copy);
        command.args(["-C", "control.sock"]).args(words);
        if is_root {
            command.uid(NOBODY).gid(NOBODY);
        }
        command.current_dir(daemon.folder.path()).output().unwrap()
    };
    let looked = ask(&["clients"]);
    assert!(looked.status.success(), "{looked:?}");
    let changed = ask(&["weight", "vm1", "8"]);
    let said = String::from_utf8_lossy(&changed.stderr);
    assert_eq!(changed.status.success(), !is_root, "{said}");
    assert_eq!(said.contains("user 65534, process "), is_root, "{said}");
    let now = if is_root { "7" } else { "8" };
    assert_eq!(
        daemon.cramctl(&["--json", "call", "client.weight", r#"{"client":"vm1"}"#]),
        format!("{{\"client\":\"vm1\",\"weight\":{now}}}\n")
    );
}

/// A daemon's options and guests from a file; what is given by hand counts more.
#[test]
fn a_configuration_file_has_options_and_guests() {
    let folder = tempfile::tempdir().unwrap();
    let text = "capacity = \"32M\"\ncontrol-socket = \"other.sock\"\nnum-queues = 3\n\n\
                [[guest]]\nname = \"db\"\nsocket = \"db.sock\"\nquota = \"12M\"\nweight = 50\n\
                copies = \"keep\"\n";
    std::fs::write(folder.path().join("cram.toml"), text).unwrap();
    let daemon = Daemon::start_in(folder, &["--config", "cram.toml"]);
    let guests = daemon.cramctl(&["guests"]);
    let row = guests.lines().find(|line| line.starts_with("db ")).unwrap();
    for word in ["keep", "12 MiB", "50"] {
        assert!(row.contains(word), "{guests}");
    }
    assert!(daemon.cramctl(&["clients"]).contains("vm2"));
    assert!(daemon.cramctl(&["stats"]).contains(" of 64 MiB"));
    assert!(!daemon.path("other.sock").exists());
}

#[test]
fn a_wrong_configuration_file_is_explained_with_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let at = folder.path();
    let guest =
        |name: &str, socket: &str| format!("[[guest]]\nname = \"{name}\"\nsocket = \"{socket}\"\n");
    for (text, message) in [
        (
            "capacity = \"1G\"\ncolour = 1\n".to_owned(),
            "file, line 2: unknown field `colour`",
        ),
        (
            "capacity = \"1G\"\n\nnum-queues = 99\n".to_owned(),
            "file, line 3: invalid value '99' for '--num-queues <N>'",
        ),
        (
            "capacity = \"12Q\"\n".to_owned(),
            "file, line 1: invalid value '12Q' for '--capacity <SIZE>'",
        ),
        (
            format!("capacity = \"1G\"\n{}colour = 1\n", guest("a", "a.sock")),
            "file, line 5: unknown field `colour`",
        ),
        (
            format!("capacity = \"1G\"\n{}{}", guest("a", "x"), guest("a", "y")),
            "two guests would be called a;",
        ),
        (
            format!("capacity = \"1G\"\n{}{}", guest("a", "x"), guest("b", "x")),
            "socket x is given twice;",
        ),
        (
            format!("capacity = \"1M\"\n{}quota = \"2M\"\n", guest("a", "x")),
            "a: quota 2 MiB is more than --capacity 1 MiB;",
        ),
        (guest("a", "x"), "--capacity <SIZE> is missing; see --help"),
        (
            "capacity = \"1G\"\n".to_owned(),
            "there is no guest; give --socket-path",
        ),
    ] {
        std::fs::write(at.join("file"), &text).unwrap();
        let said = complaint(DAEMON, at, &["--config", "file"], 2);
        assert!(said.starts_with(message), "{text}: {said}");
    }
    let said = complaint(DAEMON, at, &["--config", "absent"], 2);
    assert!(
        said.starts_with("cannot read absent: No such file"),
        "{said}"
    );
    let words = ["-c", "1G", "-s", "x", "--control-group", "0"];
    let said = complaint(DAEMON, at, &words, 2);
    assert!(said.contains("need a --control-socket"), "{said}");
    assert!(!at.join("x").exists());
}

#[test]
fn guests_come_and_go_by_cramctl() {
    let daemon = Daemon::start();
    let added = daemon.cramctl(&[
        "guest", "add", "db", "db.sock", "--quota", "12M", "--weight", "50",
    ]);
    assert_eq!(
        added,
        "db: away, on db.sock; quota 12 MiB, weight 50, copies free, auto-squeeze off; 0 pages\n"
    );
    assert!(daemon.path("db.sock").exists());
    let set = daemon.cramctl(&["guest", "set", "db", "--frozen", "true", "--copies", "keep"]);
    assert!(
        set.contains("away, frozen") && set.contains("copies keep"),
        "{set}"
    );
    assert!(daemon.cramctl(&["pools"]).starts_with("client  pool  kind"));
    assert!(
        daemon
            .cramctl(&["histogram", "db"])
            .contains("one request in 17")
    );
    let json = daemon.cramctl(&["--json", "guests"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["clients"][2]["name"], "db");
    assert_eq!(
        daemon.cramctl(&["guest", "remove", "db"]),
        "db: removed; 0 pages kept for when it is added again\n"
    );
    assert!(!daemon.path("db.sock").exists());
}

#[test]
fn shells_get_completions() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let output = run(CRAMCTL, folder.path(), &["completions", shell]);
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            output.status.success() && text.contains("give-back"),
            "{shell}"
        );
    }
}

#[test]
fn cramctl_complains_in_one_line() {
    let daemon = Daemon::start();
    let at = daemon.folder.path();
    let control = ["-C", "control.sock"];
    std::fs::write(at.join("file"), "x").unwrap();
    drop(UnixListener::bind(at.join("dead")).unwrap());
    for (words, status, message) in [
        (
            &["stats"][..],
            2,
            "--control-socket <SOCKET> is missing; see --help",
        ),
        (
            &["-C", "absent", "stats"],
            1,
            "there is no socket absent; is the daemon running with --control-socket absent?",
        ),
        (
            &["-C", "dead", "stats"],
            1,
            "nobody listens on dead; the daemon has ended, start it again",
        ),
        (
            &["-C", "file", "stats"],
            1,
            "nobody listens on file; the daemon has ended, start it again",
        ),
    ] {
        assert_eq!(complaint(CRAMCTL, at, words, status), message);
    }
    for (words, status, message) in [
        (
            &["quota", "vm9"][..],
            1,
            "there is no client \"vm9\"; there are: vm1, vm2",
        ),
        (
            &["quota", "vm1", "1G"],
            1,
            "1 GiB is more than the store's capacity of 64 MiB",
        ),
        (
            &["authorise", "vm1", "zzz"],
            1,
            "\"zzz\" is not a uuid, such as 6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        ),
        (
            &["call", "nonsense"],
            1,
            "there is no method \"nonsense\"; \"methods\" lists them",
        ),
        (
            &["stats", "--watch", "0"],
            2,
            "invalid value '0' for '--watch [<SECS>]': write a number of seconds, 0.1 or more",
        ),
        (
            &["call", "stats", "{"],
            2,
            "PARAMS is not JSON: EOF while parsing an object at line 1 column 1",
        ),
    ] {
        assert_eq!(
            complaint(CRAMCTL, at, &[&control[..], words].concat(), status),
            message
        );
    }
    let said = complaint(CRAMCTL, at, &["-C", "control.sock", "nope"], 2);
    assert_eq!(said, "there is no command nope; see --help");
    let said = complaint(CRAMCTL, at, &["-C", "control.sock"], 2);
    assert_eq!(said, "say what to do; see --help");
}

#[test]
fn names_depend_on_nobody_else() {
    let folder = tempfile::tempdir().unwrap();
    for name in ["a", "b"] {
        std::fs::create_dir(folder.path().join(name)).unwrap();
    }
    let twice = ["-c", "64M", "-s", "a/vm0.sock", "-s", "b/vm0.sock"];
    let said = complaint(DAEMON, folder.path(), &twice, 2);
    assert!(said.contains("two guests would be called vm0"), "{said}");
    let named = "name=other,socket=b/vm0.sock";
    let daemon = Daemon::start_in(folder, &["-s", "a/vm0.sock", "--guest", named]);
    let clients = daemon.cramctl(&["clients"]);
    for name in ["vm0", "vm1", "vm2", "other"] {
        assert!(clients.contains(name), "{clients}");
    }
    assert_eq!(
        daemon.cramctl(&["quota", "other", "12M"]),
        "other: quota 12 MiB\n"
    );
    assert_eq!(daemon.cramctl(&["quota", "vm0"]), "vm0: quota 64 MiB\n");
    assert_eq!(
        daemon.cramctl(&["reset", "other"]),
        "other: 0 pages dropped\n"
    );
}

#[test]
fn cramctl_watches_until_nobody_looks() {
    use std::io::{BufRead, BufReader};

    let daemon = Daemon::start();
    let mut child = Command::new(CRAMCTL)
        .args(["-C", "control.sock", "stats", "--watch", "0.1"])
        .current_dir(daemon.folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let rates = lines
        .by_ref()
        .map(Result::unwrap)
        .find(|line| line.contains(", 0/s;"));
    assert!(rates.is_some());
    // Like `| head`: it ends, and is content.
    drop(lines);
    let until = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        assert!(Instant::now() < until, "cramctl does not end");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(child.wait().unwrap().code(), Some(0));
}
