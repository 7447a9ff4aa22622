// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The client in docs/control.md, taken from there and run against a real daemon.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "all of it is a test, helpers included"
)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use vhost_device_cram::control::client::Caller;

/// How long anything may take that takes milliseconds on an idle machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The example, as the document has it.
fn example() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/control.md");
    let text = std::fs::read_to_string(path).unwrap();
    let (_, rest) = text.split_once("```python\n").unwrap();
    rest.split_once("```").unwrap().0.to_owned()
}

struct Daemon {
    child: Child,
    folder: tempfile::TempDir,
}

impl Daemon {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("client.py"), example()).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_vhost-device-cram"))
            .args(["-s", "vm1.sock", "-C", "control.sock", "-c", "64M"])
            .current_dir(folder.path())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let daemon = Daemon { child, folder };
        let until = Instant::now() + PATIENCE;
        while Caller::connect(&daemon.path("control.sock")).is_err() {
            assert!(Instant::now() < until, "the daemon does not answer");
            std::thread::sleep(Duration::from_millis(10));
        }
        daemon
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Runs the example.
    fn python(&self, method: &str, params: &Value) -> Output {
        Command::new("python3")
            .args(["client.py", "control.sock", method, &params.to_string()])
            .current_dir(self.folder.path())
            .output()
            .unwrap()
    }

    fn ask(&self, method: &str, params: &Value) -> Value {
        let output = self.python(method, params);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{method} {params}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The methods that the document's table has.
fn documented() -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/control.md");
    let text = std::fs::read_to_string(path).unwrap();
    let rows = text
        .lines()
        .filter(|line| line.contains(" | read | ") || line.contains(" | change | "));
    let cells = rows.filter_map(|row| row.split('|').nth(1).map(str::to_owned));
    let names: Vec<_> = cells
        .flat_map(|cell| {
            cell.split('`')
                .skip(1)
                .step_by(2)
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(names.len() > 15);
    names
}

#[test]
fn a_client_written_from_the_document_drives_every_method() {
    let daemon = Daemon::start();
    let listed = daemon.ask("methods", &json!({}));
    let mut names: Vec<_> = listed["methods"]
        .as_array()
        .unwrap()
        .iter()
        .map(|method| method["name"].as_str().unwrap().to_owned())
        .collect();
    let mut told = documented();
    names.sort();
    told.sort();
    assert_eq!(names, told, "the document's table is not what there is");

    let uuid = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
    for (method, params, field, wanted) in [
        ("version", json!({}), "schema", json!(1)),
        ("stats", json!({}), "schema", json!(1)),
        (
            "stats.histogram",
            json!({ "client": "vm1" }),
            "timed_one_in",
            json!(17),
        ),
        ("clients", json!({}), "", Value::Null),
        ("rpc.discover", json!({}), "openrpc", json!("1.3.2")),
        ("store.anatomy", json!({}), "damaged_records", json!(0)),
        (
            "guest.add",
            json!({ "name": "vm2", "socket": "vm2.sock", "quota": "12M", "weight": 50 }),
            "quota_bytes",
            json!(12 << 20),
        ),
        (
            "guest.set",
            json!({ "client": "vm2", "weight": 60 }),
            "weight",
            json!(60),
        ),
        (
            "client.quota",
            json!({ "client": "vm2", "bytes": "8M" }),
            "quota_bytes",
            json!(8 << 20),
        ),
        (
            "client.weight",
            json!({ "client": "vm2", "weight": 70 }),
            "weight",
            json!(70),
        ),
        (
            "client.freeze",
            json!({ "client": "vm2" }),
            "frozen",
            json!(true),
        ),
        (
            "client.thaw",
            json!({ "client": "vm2" }),
            "frozen",
            json!(false),
        ),
        (
            "client.flush",
            json!({ "client": "vm2" }),
            "pages",
            json!(0),
        ),
        (
            "client.give_back",
            json!({ "client": "vm2", "pages": 5 }),
            "connected",
            json!(false),
        ),
        (
            "client.policy",
            json!({ "client": "vm2", "copies": "keep" }),
            "copies",
            json!("keep"),
        ),
        (
            "client.reset",
            json!({ "client": "vm2" }),
            "pages",
            json!(0),
        ),
        (
            "pool.authorise",
            json!({ "client": "vm2", "uuid": uuid }),
            "authorised",
            json!(true),
        ),
        (
            "guest.remove",
            json!({ "client": "vm2" }),
            "forgotten",
            json!(false),
        ),
        (
            "client.remove",
            json!({ "client": "vm2" }),
            "pages",
            json!(0),
        ),
        ("store.compact", json!({}), "", Value::Null),
        (
            "store.recompress",
            json!({ "cold_after_s": 1 }),
            "recompressed_pages",
            json!(0),
        ),
    ] {
        let answer = daemon.ask(method, &params);
        assert!(
            field.is_empty() || answer[field] == wanted,
            "{method}: {answer}"
        );
    }
    for (method, params, code) in [
        ("nonsense", json!({}), "-32601"),
        ("client.quota", json!({}), "-32602"),
        ("client.quota", json!({ "client": "vm9" }), "-32001"),
        (
            "client.squeeze",
            json!({ "client": "vm1", "pages": 1 }),
            "-32602",
        ),
    ] {
        let output = daemon.python(method, &params);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(
            !output.status.success() && said.contains(code),
            "{method}: {said}"
        );
    }
}
