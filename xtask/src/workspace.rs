// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the checkout is, and what cargo builds from it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::command::run_counted;
use crate::progress::Step;

/// The root of the checkout.
pub fn root() -> Result<PathBuf> {
    // Set by `cargo run`; the value from compile time serves a program that was started directly.
    let here = std::env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    let root = here.parent().unwrap_or(&here).to_path_buf();
    if !root.join("images").is_dir() {
        bail!("{} is not a checkout of vhost-device-cram", root.display());
    }
    Ok(root)
}

/// The cargo that started this program.
pub fn cargo() -> Command {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| OsString::from("cargo"));
    let mut command = Command::new(cargo);
    // What `cargo run` set for this program is not for the crates that we build.
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("CARGO_PKG_") || text.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
    command
}

/// cargo's target folder, also where reports and `artifacts.json` go.
pub fn target_dir(root: &Path) -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(dir) => root.join(dir),
        None => root.join("target"),
    }
}

/// The programs that run on the host and in the guest.
pub struct HostPrograms {
    /// The back-end.
    pub daemon: PathBuf,
    /// The inspector.
    pub cramctl: PathBuf,
    /// The workload and agent, linked statically.
    pub workload: PathBuf,
}

/// Builds the daemon, `cramctl` and the guest's workload.
pub fn build_programs(root: &Path, cache: &Cache) -> Result<HostPrograms> {
    let host = build(
        root,
        cache,
        "daemon and cramctl",
        &["--package", "vhost-device-cram", "--bins"],
        false,
    )?;
    let guest = build(
        root,
        cache,
        "guest workload",
        &["--package", "cram-workload", "--bins"],
        true,
    )?;
    Ok(HostPrograms {
        daemon: find(&host, "vhost-device-cram")?,
        cramctl: find(&host, "cramctl")?,
        workload: find(&guest, "cram-workload")?,
    })
}

/// Builds the benchmarks.
pub fn build_bench(root: &Path, cache: &Cache) -> Result<PathBuf> {
    let args = ["--package", "cram-tests", "--features", "bench", "--bins"];
    let programs = build(root, cache, "benchmarks", &args, false)?;
    find(&programs, "cram-bench")
}

fn find(programs: &[PathBuf], name: &str) -> Result<PathBuf> {
    programs
        .iter()
        .find(|path| path.file_name().is_some_and(|file| file == name))
        .cloned()
        .with_context(|| format!("cargo built no program named {name}"))
}

fn build(
    root: &Path,
    cache: &Cache,
    name: &str,
    args: &[&str],
    static_link: bool,
) -> Result<Vec<PathBuf>> {
    let mut command = cargo();
    command
        .current_dir(root)
        .args([
            "build",
            "--release",
            "--message-format=json-render-diagnostics",
        ])
        .args(args);
    if static_link {
        // With an explicit target the flag does not reach build scripts and derive macros.
        command
            .args(["--target", "x86_64-unknown-linux-gnu"])
            .env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    let mut step = Step::begin(cache, name)?;
    let mut programs = Vec::new();
    run_counted(cache, &mut step, &mut command, |line| {
        let Ok(message) = serde_json::from_str::<serde_json::Value>(line) else {
            return false;
        };
        if let Some(path) = message["executable"].as_str() {
            programs.push(PathBuf::from(path));
        }
        message["reason"] == "compiler-artifact"
    })?;
    step.finish();
    Ok(programs)
}
