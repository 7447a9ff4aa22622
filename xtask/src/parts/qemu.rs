// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! QEMU with our device, and the firmware that Debian's source leaves out.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{Cache, KeyBuilder, Part, remove_tree};
use crate::command::{Keep, run, run_watched};
use crate::parts::debian::{Apt, Closure};
use crate::parts::kernel::{apply_patch, key_with_series, series};
use crate::parts::sources::Source;
use crate::progress::Step;
use crate::system::version_of;

/// QEMU 10.0's build system, from PyPI: Debian 12's is too old.
const PYTHON_PACKAGES: [&str; 2] = ["meson==1.5.0", "pycotap==1.3.1"];

const CONFIGURE: [&str; 11] = [
    "--target-list=x86_64-softmmu",
    "--without-default-features",
    "--enable-system",
    "--enable-tcg",
    "--enable-kvm",
    "--enable-vhost-user",
    "--enable-pixman",
    "--enable-fdt=system",
    "--enable-plugins",
    "--disable-docs",
    "--disable-install-blobs",
];

const EMULATOR: &str = "qemu-system-x86_64";
/// The device's own test, which the series adds.
const QTEST: &str = "tests/qtest/vhost-user-cram-test";

/// What QEMU loads to boot a vmlinux without a disk: Debian package, file in it.
const FIRMWARE: [(&str, &str); 5] = [
    ("seabios", "usr/share/seabios/bios-256k.bin"),
    ("seabios", "usr/share/seabios/bios.bin"),
    ("qemu-system-data", "usr/share/qemu/pvh.bin"),
    ("qemu-system-data", "usr/share/qemu/linuxboot_dma.bin"),
    ("qemu-system-data", "usr/share/qemu/kvmvapic.bin"),
];

/// A built QEMU.
pub struct Qemu {
    /// The emulator.
    pub emulator: PathBuf,
    /// The device's test, when the series has one.
    pub qtest: Option<PathBuf>,
}

/// Builds QEMU; keeps the programs and nothing else.
pub fn build(
    cache: &Cache,
    root: &Path,
    source: &Source,
    firmware: &Path,
    jobs: usize,
) -> Result<Qemu> {
    let patches = series(&root.join("qemu-patches"))?;
    let key = KeyBuilder::new("qemu 1")
        .text("source", source.key()?.as_str())
        .text("configure", &CONFIGURE.join(" "))
        .text("python", &PYTHON_PACKAGES.join(" "))
        .text("gcc", &version_of("gcc")?);
    let key = key_with_series(key, &patches)?.finish();
    let dir = cache.ensure_resumable(Part::Qemu, &key, |work| {
        let mut step = Step::begin(cache, "QEMU")?;
        let tree = work.join("source");
        let build = work.join("build");
        if !build.join("build.ninja").exists() {
            prepare(cache, &mut step, source, &patches, work, &tree, &build)?;
        }
        step.say("compiling");
        let mut targets = vec![EMULATOR];
        if tree.join(format!("{QTEST}.c")).exists() {
            targets.push(QTEST);
        }
        let mut command = Command::new("ninja");
        command
            .arg("-C")
            .arg(&build)
            .arg(format!("-j{jobs}"))
            .args(&targets);
        run_watched(&mut step, &mut command, |step, line| {
            if let Some((done, total)) = ninja_progress(line) {
                step.advance(done, total);
            }
            Keep::Logged
        })?;
        step.say("keeping what was asked for");
        let bin = work.join("bin");
        fs::create_dir_all(&bin).context("cannot make QEMU's folder")?;
        for target in targets {
            let name = target.rsplit('/').next().unwrap_or(target);
            fs::copy(build.join(target), bin.join(name))
                .with_context(|| format!("the build made no {target}"))?;
        }
        for rest in ["build", "source", "venv"] {
            remove_tree(&work.join(rest))?;
        }
        step.finish();
        Ok(())
    })?;
    link_firmware(&dir, firmware)?;
    let qtest = dir
        .join("bin")
        .join(QTEST.rsplit('/').next().unwrap_or(QTEST));
    Ok(Qemu {
        emulator: dir.join("bin").join(EMULATOR),
        qtest: qtest.exists().then_some(qtest),
    })
}

/// Puts the firmware where an installed QEMU looks for it, relative to its own
/// place: its own tests start it without -L, and so do people.
fn link_firmware(dir: &Path, firmware: &Path) -> Result<()> {
    let share = dir.join("share");
    let link = share.join("qemu");
    if fs::read_link(&link).is_ok_and(|target| target == firmware) {
        return Ok(());
    }
    match fs::remove_file(&link) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", link.display()));
        }
        _ => {}
    }
    fs::create_dir_all(&share)
        .and_then(|()| symlink(firmware, &link))
        .with_context(|| format!("cannot make the link {}", link.display()))
}

fn prepare(
    cache: &Cache,
    step: &mut Step,
    source: &Source,
    patches: &[PathBuf],
    work: &Path,
    tree: &Path,
    build: &Path,
) -> Result<()> {
    for dir in [tree, build] {
        remove_tree(dir)?;
    }
    step.say("unpacking");
    source.unpack(cache, step, tree)?;
    for patch in patches {
        apply_patch(step, tree, patch)?;
    }
    step.say("fetching meson");
    let venv = work.join("venv");
    run(
        step,
        // The system's own interpreter: the one that python3-venv belongs to.
        Command::new("/usr/bin/python3")
            .args(["-m", "venv", "--clear"])
            .arg(&venv),
    )?;
    run(
        step,
        Command::new(venv.join("bin/python3"))
            .args([
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ])
            .args(PYTHON_PACKAGES),
    )
    .context("cannot fetch meson from PyPI: is there a network?")?;
    step.say("configuring");
    fs::create_dir_all(build).context("cannot make QEMU's build folder")?;
    let mut python = std::ffi::OsString::from("--python=");
    python.push(venv.join("bin/python3"));
    run(
        step,
        Command::new(tree.join("configure"))
            .current_dir(build)
            .arg(python)
            .args(CONFIGURE),
    )
}

/// "[12/1234] Compiling …"
fn ninja_progress(line: &str) -> Option<(u64, u64)> {
    let (done, total) = line.strip_prefix('[')?.split_once(']')?.0.split_once('/')?;
    Some((done.parse().ok()?, total.parse().ok()?))
}

/// The folder for QEMU's -L.
pub fn firmware(cache: &Cache) -> Result<PathBuf> {
    let mut key = KeyBuilder::new("firmware 1");
    for (package, file) in FIRMWARE {
        key = key.text(package, file);
    }
    let dir = cache.ensure(Part::Firmware, &key.finish(), |work| {
        let mut step = Step::begin(cache, "firmware")?;
        let apt = Apt::open(cache, &mut step)?;
        let scratch = tempfile::tempdir_in(work).context("cannot make a temporary folder")?;
        let tree = scratch.path().join("tree");
        let downloads = scratch.path().join("downloads");
        let mut closure = Closure::new(&apt, &downloads, &tree);
        closure.add(&mut step, &["seabios", "qemu-system-data"])?;
        for (package, file) in FIRMWARE {
            let name = file.rsplit('/').next().unwrap_or(file);
            fs::copy(tree.join(file), work.join(name))
                .with_context(|| format!("{package} has no {file}"))?;
        }
        step.finish();
        Ok(())
    })?;
    Ok(dir)
}

#[cfg(test)]
mod tests {
    use super::ninja_progress;

    #[test]
    fn ninja_says_how_far_it_is() {
        assert_eq!(
            ninja_progress("[7/1200] Compiling C object x.o"),
            Some((7, 1200))
        );
        assert_eq!(ninja_progress("ninja: no work to do."), None);
    }
}
