// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The machine: which Debian packages the builds need, and getting them.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::command::{Keep, is_installed, output_of, run_watched};
use crate::parts::debian::apt_percent;
use crate::parts::toolchain::{self, KernelRust};
use crate::progress::Step;

/// Packages that the builds need, each with the part that needs it.
const PACKAGES: &[(&str, &str)] = &[
    ("gcc", "everything"),
    ("g++", "fuzzing"),
    ("libc6-dev", "everything"),
    ("make", "everything"),
    ("patch", "everything"),
    ("perl", "everything"),
    ("pkg-config", "everything"),
    ("xz-utils", "everything"),
    ("bzip2", "everything"),
    ("dpkg-dev", "fetching sources"),
    ("debian-archive-keyring", "fetching sources"),
    ("ca-certificates", "fetching sources"),
    ("flex", "the kernel"),
    ("bison", "the kernel"),
    ("bc", "the kernel"),
    ("cpio", "the kernel"),
    ("libelf-dev", "the kernel"),
    ("libssl-dev", "the kernel"),
    ("libclang1-19", "the kernel"),
    ("clang-19", "the debug kernel"),
    ("python3", "QEMU"),
    ("python3-venv", "QEMU"),
    ("ninja-build", "QEMU"),
    ("libglib2.0-dev", "QEMU"),
    ("libpixman-1-dev", "QEMU"),
    ("libfdt-dev", "QEMU"),
    ("zlib1g-dev", "QEMU"),
    ("e2fsprogs", "the image"),
    ("binutils", "benchmarks"),
    ("strace", "benchmarks"),
    // It has qemu-storage-daemon.
    ("qemu-system-common", "benchmarks"),
    ("mount", "measuring the host's own swap"),
];

/// Needed when the user's own Rust has no library sources.
const KERNEL_RUST_PACKAGES: &[(&str, &str)] =
    &[("rustc-web", "the kernel"), ("rust-web-src", "the kernel")];

/// Installs what is missing, or says what to type.
pub fn prepare(cache: &Cache) -> Result<()> {
    require_debian()?;
    let missing = missing_packages()?;
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    let lists_empty = crate::parts::debian::mirror().is_err();
    if names.is_empty() && !lists_empty {
        return Ok(());
    }
    if !rustix::process::geteuid().is_root() {
        bail!(
            "some Debian packages are missing. Type this, then start again:\n  \
             sudo apt-get update && sudo apt-get install --no-install-recommends -y {}",
            names.join(" ")
        );
    }
    let mut step = Step::begin(cache, "Debian packages")?;
    step.say("apt-get update");
    apt_get(&mut step, &["update"]).context("apt-get update failed: is there a network?")?;
    if !names.is_empty() {
        step.say(&format!("installing {} packages", names.len()));
        let mut args = vec!["install", "--no-install-recommends", "-y"];
        args.extend(&names);
        apt_get(&mut step, &args)?;
    }
    step.finish();
    let left = missing_packages()?;
    if let Some((name, what)) = left.first() {
        bail!("apt-get did not install {name}, which {what} needs");
    }
    Ok(())
}

/// `cargo xtask doctor`: what [`prepare`] would do, and what it cannot.
pub fn doctor() -> Result<ExitCode> {
    require_debian()?;
    let missing = missing_packages()?;
    for (name, what) in &missing {
        println!("missing package: {name} (for {what})");
    }
    match KernelRust::find() {
        Ok(rust) => println!("Rust for the kernel: {}", rust.description()),
        Err(error) => println!("Rust for the kernel: {error:#}"),
    }
    match toolchain::libclang_dir() {
        Ok(dir) => println!("libclang: {}", dir.display()),
        Err(error) => println!("libclang: {error:#}"),
    }
    match crate::parts::debian::mirror() {
        Ok(uri) => println!("Debian mirror: {uri}"),
        Err(error) => println!("Debian mirror: {error:#}"),
    }
    println!("cache: {}", Cache::open()?.root().display());
    if has_virtualisation() {
        println!("accelerator: KVM, if a probe boot succeeds");
    } else {
        println!("accelerator: TCG (no usable KVM here; guests run about 10 times slower)");
    }
    if missing.is_empty() {
        println!("nothing is missing");
        return Ok(ExitCode::SUCCESS);
    }
    let names: Vec<&str> = missing.iter().map(|(name, _)| *name).collect();
    println!(
        "as root, cargo xtask installs these by itself; or type:\n  sudo apt-get update && \
         sudo apt-get install --no-install-recommends -y {}",
        names.join(" ")
    );
    Ok(ExitCode::FAILURE)
}

/// /dev/kvm can exist on machines whose processor cannot do it, and then guests hang.
fn has_virtualisation() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = flags
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    capable && Path::new("/dev/kvm").exists()
}

fn require_debian() -> Result<()> {
    if is_installed("apt-get") && is_installed("dpkg-query") {
        return Ok(());
    }
    bail!(
        "this is not Debian: the guest's image is made from Debian packages, so apt-get and \
         dpkg are needed (Debian 12 is what has been tried)"
    );
}

fn missing_packages() -> Result<Vec<(&'static str, &'static str)>> {
    let mut wanted = PACKAGES.to_vec();
    if !KernelRust::users_own_will_do() {
        wanted.extend(KERNEL_RUST_PACKAGES);
    }
    let mut command = Command::new("dpkg-query");
    command.args(["-W", "-f", "${Package} ${db:Status-Status}\\n"]);
    command.args(wanted.iter().map(|(name, _)| name));
    // It fails when it does not know a package; what it prints about the others counts.
    let output = command.output().context("cannot start dpkg-query")?;
    let text = String::from_utf8_lossy(&output.stdout);
    Ok(wanted
        .into_iter()
        .filter(|(name, _)| {
            !text
                .lines()
                .any(|line| line.split_once(' ') == Some((name, "installed")))
        })
        .collect())
}

fn apt_get(step: &mut Step, args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-q", "-o", "APT::Status-Fd=1"])
        .args(args);
    run_watched(step, &mut command, |step, line| {
        if let Some(percent) = apt_percent(line) {
            step.advance(percent, 100);
            return Keep::Dropped;
        }
        Keep::Logged
    })
}

/// The version of a program, for keys: the first line that `--version` prints.
pub fn version_of(program: &str) -> Result<String> {
    let text = output_of(Command::new(program).arg("--version"))
        .with_context(|| format!("{program} is needed"))?;
    Ok(text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::path::{Path, PathBuf};

    use super::PACKAGES;

    /// Where each program comes from that is started by name. What every Debian has is "essential";
    /// what is asked for where it is needed, "asked for".
    const PROGRAMS: &[(&str, &str)] = &[
        ("/bin/sh", "essential"),
        ("/bin/true", "essential"),
        ("/usr/bin/python3", "python3"),
        ("apt-get", "essential"),
        ("cargo", "asked for"),
        ("cp", "essential"),
        ("curl", "asked for"),
        ("dpkg", "essential"),
        ("dpkg-deb", "essential"),
        ("dpkg-query", "essential"),
        ("dpkg-source", "dpkg-dev"),
        ("gcc", "gcc"),
        ("gpg", "asked for"),
        ("make", "make"),
        ("mkswap", "essential"),
        ("mke2fs", "e2fsprogs"),
        ("ninja", "ninja-build"),
        ("nm", "binutils"),
        ("patch", "patch"),
        ("perl", "perl"),
        ("pkg-config", "pkg-config"),
        ("python3", "python3"),
        ("qemu-storage-daemon", "qemu-system-common"),
        ("readelf", "binutils"),
        ("sh", "essential"),
        ("sleep", "essential"),
        ("strace", "strace"),
        ("swapon", "mount"),
        ("tar", "essential"),
        // The program itself, under a name that is always there.
        ("/proc/self/exe", "essential"),
    ];

    fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && path.file_name().is_none_or(|name| name != "target") {
                sources(&path, found);
            } else if path.extension().is_some_and(|ending| ending == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn no_program_is_taken_for_granted() {
        const START: &str = "Command::new(\"";
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        let mut files = Vec::new();
        for folder in ["crates", "fuzz", "tests", "vhost-device-cram", "xtask"] {
            sources(&root.join(folder), &mut files);
        }
        let owners: BTreeMap<&str, &str> = PROGRAMS.iter().copied().collect();
        let mut started = 0;
        for file in files {
            let text = fs::read_to_string(&file).unwrap();
            for rest in text.split(START).skip(1) {
                let program = rest.split('"').next().unwrap();
                if program.is_empty() || program.starts_with(')') {
                    continue;
                }
                let owner = owners.get(program);
                let owner = owner.unwrap_or_else(|| panic!("{}: {program}", file.display()));
                let is_there = ["essential", "asked for"].contains(owner)
                    || PACKAGES.iter().any(|(package, _)| package == owner);
                assert!(is_there, "{}: {program} is of {owner}", file.display());
                started += 1;
            }
        }
        assert!(started > 20, "{started} programs only");
    }
}
