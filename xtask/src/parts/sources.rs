// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the kernel's and QEMU's sources come from: what the user names, else
//! Debian's source packages, else the publisher's tarball, checked against the
//! publisher's signature.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, Key, KeyBuilder, Part, files_below, sha256_of};
use crate::command::{Keep, is_installed, output_of, run, run_counted, run_watched};
use crate::parts::debian::{self, Apt};
use crate::progress::Step;

/// The kernel's series; any 7.3.x will do.
pub const KERNEL_SERIES: &str = "7.3";
/// The newest of the series that is known to work, for the publisher's tarball.
const KERNEL_TARBALL: &str = "7.3.4";
/// QEMU's series, the long-term branch.
pub const QEMU_SERIES: &str = "10.0";
const QEMU_TARBALL: &str = "10.0.13";

/// Who signs what the publishers offer: kernel.org's own key for checksums, and
/// the key of QEMU's release manager (the one that Debian's package checks too).
const KERNEL_SIGNER: &str = "B8868C80BA62A1FFFAF5FDA9632D3A06589DA6B1";
const QEMU_SIGNER: &str = "CEACC9E15534EBABB82D3FA03353C9CEF108B584";

/// Source code as it was found.
#[derive(Clone, Debug)]
pub enum Source {
    /// Debian's package `linux-source-…`
    DebianPackage(PathBuf),
    /// The .dsc of a Debian source package, its other files beside it
    Dsc(PathBuf),
    /// A tarball whose contents are in one folder
    Tarball(PathBuf),
    /// A source tree
    Tree(PathBuf),
}

impl Source {
    /// What the user named: a folder or a tarball.
    fn named(path: &Path, option: &str) -> Result<Self> {
        let path = fs::canonicalize(path)
            .with_context(|| format!("{option}: cannot open {}", path.display()))?;
        Ok(if path.is_dir() {
            Self::Tree(path)
        } else {
            Self::Tarball(path)
        })
    }

    /// What was downloaded into this folder.
    fn downloaded(dir: &Path) -> Result<Self> {
        for path in files_below(dir)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if name.ends_with(".dsc") {
                return Ok(Self::Dsc(path));
            }
            if name.ends_with(".deb") {
                return Ok(Self::DebianPackage(path));
            }
            if name.starts_with("upstream-") {
                return Ok(Self::Tarball(path));
            }
        }
        bail!("no source in {}: remove it and start again", dir.display())
    }

    /// The source's identity. What was downloaded is known by its name, having
    /// been verified when it came; what the user named is looked at each time.
    pub fn key(&self) -> Result<Key> {
        let key = KeyBuilder::new("source 1");
        Ok(match self {
            Self::DebianPackage(path) | Self::Dsc(path) => key.text(
                "package",
                &path.file_name().unwrap_or_default().to_string_lossy(),
            ),
            Self::Tarball(path) => key.text("tarball", &stamp(path)?),
            Self::Tree(dir) => {
                let mut key = key.text("tree", &dir.to_string_lossy());
                for path in files_below(dir)? {
                    if !path.components().any(|part| part.as_os_str() == ".git") {
                        key = key.text("file", &stamp(&path)?);
                    }
                }
                key
            }
        }
        .finish())
    }

    /// Unpacks it, so that `into` is the top of the source tree.
    pub fn unpack(&self, cache: &Cache, step: &mut Step, into: &Path) -> Result<()> {
        fs::create_dir_all(into).with_context(|| format!("cannot make {}", into.display()))?;
        match self {
            Self::Tarball(path) => untar(cache, step, path, into),
            Self::DebianPackage(package) => {
                let holder = into.with_extension("deb");
                debian::unpack(step, package, &holder)?;
                let tarball = files_below(&holder)?
                    .into_iter()
                    .find(|path| path.extension().is_some_and(|ext| ext == "xz"))
                    .filter(|path| path.to_string_lossy().ends_with(".tar.xz"))
                    .with_context(|| format!("no tarball in {}", package.display()))?;
                untar(cache, step, &tarball, into)?;
                crate::cache::remove_tree(&holder)
            }
            Self::Dsc(dsc) => {
                // dpkg-source makes the folder itself.
                fs::remove_dir(into).with_context(|| format!("cannot use {}", into.display()))?;
                run(
                    step,
                    Command::new("dpkg-source")
                        .args(["--no-check", "-x"])
                        .arg(dsc)
                        .arg(into),
                )
            }
            Self::Tree(dir) => copy_tree(step, dir, into),
        }
    }
}

/// Name, size and time of a file.
fn stamp(path: &Path) -> Result<String> {
    let meta = fs::metadata(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(format!(
        "{} {} {}.{}",
        path.display(),
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec()
    ))
}

fn untar(cache: &Cache, step: &mut Step, tarball: &Path, into: &Path) -> Result<()> {
    let mut command = Command::new("tar");
    command
        .arg("-xvf")
        .arg(tarball)
        .args(["--no-same-owner", "--strip-components=1", "-C"])
        .arg(into);
    run_counted(cache, step, &mut command, |_| true)
}

fn copy_tree(step: &mut Step, from: &Path, into: &Path) -> Result<()> {
    step.say(&format!("copying {}", from.display()));
    let mut reader = Command::new("tar")
        .arg("-C")
        .arg(from)
        .args(["--exclude-vcs", "-cf", "-", "."])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start tar")?;
    let pipe = reader.stdout.take().context("tar has no output")?;
    let written = Command::new("tar")
        .args(["--no-same-owner", "-xf", "-", "-C"])
        .arg(into)
        .stdin(pipe)
        .status()
        .context("cannot start tar")?;
    let read = reader.wait().context("cannot wait for tar")?;
    if !read.success() || !written.success() {
        bail!("cannot copy {}", from.display());
    }
    Ok(())
}

/// The kernel's source.
pub fn kernel(cache: &Cache, named: Option<&Path>) -> Result<Source> {
    if let Some(path) = named {
        return Source::named(path, "--kernel-source");
    }
    let key = KeyBuilder::new("kernel download 1")
        .text("series", KERNEL_SERIES)
        .finish();
    let dir = cache.ensure(Part::Downloads, &key, |work| {
        let mut step = Step::begin(cache, "fetching the kernel")?;
        let package = format!("linux-source-{KERNEL_SERIES}");
        let debian =
            Apt::open(cache, &mut step).and_then(|apt| apt.download(&mut step, work, &[&package]));
        if let Err(error) = debian {
            note_fallback(&mut step, &package, &error);
            kernel_upstream(&mut step, work).with_context(|| no_source("kernel", &error))?;
        }
        step.finish();
        Ok(())
    })?;
    Source::downloaded(&dir)
}

/// QEMU's source.
pub fn qemu(cache: &Cache, named: Option<&Path>) -> Result<Source> {
    if let Some(path) = named {
        return Source::named(path, "--qemu-source");
    }
    let key = KeyBuilder::new("qemu download 1")
        .text("series", QEMU_SERIES)
        .finish();
    let dir = cache.ensure(Part::Downloads, &key, |work| {
        let mut step = Step::begin(cache, "fetching QEMU")?;
        let debian = Apt::open(cache, &mut step)
            .and_then(|apt| apt.source(&mut step, work, "qemu"))
            .and_then(|()| expect_qemu_series(work));
        if let Err(error) = debian {
            note_fallback(&mut step, "qemu", &error);
            qemu_upstream(&mut step, work).with_context(|| no_source("qemu", &error))?;
        }
        step.finish();
        Ok(())
    })?;
    Source::downloaded(&dir)
}

fn no_source(part: &str, error: &anyhow::Error) -> String {
    format!(
        "no source for the {part} (from Debian: {error:#}); you can name one with \
         --{part}-source FOLDER or TARBALL"
    )
}

fn note_fallback(step: &mut Step, package: &str, error: &anyhow::Error) {
    step.log(&format!("Debian has no {package}: {error:#}"));
    step.say("Debian has it not: trying the publisher");
}

fn expect_qemu_series(dir: &Path) -> Result<()> {
    let wanted = format!("qemu_{QEMU_SERIES}.");
    let files = files_below(dir)?;
    if files.iter().any(|path| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with(&wanted))
    }) {
        return Ok(());
    }
    for path in files {
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
    }
    bail!("Debian's QEMU is no longer of the series {QEMU_SERIES}")
}

/// kernel.org signs a list of SHA-256 sums, one for each tarball.
fn kernel_upstream(step: &mut Step, dir: &Path) -> Result<()> {
    let base = format!(
        "https://cdn.kernel.org/pub/linux/kernel/v{}.x",
        major(KERNEL_TARBALL)
    );
    let name = format!("linux-{KERNEL_TARBALL}.tar.xz");
    let sums = dir.join("sha256sums.asc");
    download(step, &format!("{base}/sha256sums.asc"), &sums)?;
    let text = verify(step, &sums, None, KERNEL_SIGNER)?;
    let expected = text
        .lines()
        .find_map(|line| line.split_once("  ").filter(|(_, file)| *file == name))
        .map(|(sum, _)| sum.to_owned())
        .with_context(|| format!("the publisher's list does not name {name}"))?;
    let tarball = dir.join(format!("upstream-{name}"));
    download(step, &format!("{base}/{name}"), &tarball)?;
    let got = sha256_of(&tarball)?;
    if got != expected {
        bail!("{name} is not what its publisher signed: SHA-256 {got}, should be {expected}");
    }
    Ok(())
}

/// qemu.org signs each tarball.
fn qemu_upstream(step: &mut Step, dir: &Path) -> Result<()> {
    let name = format!("qemu-{QEMU_TARBALL}.tar.xz");
    let url = format!("https://download.qemu.org/{name}");
    let signature = dir.join(format!("{name}.sig"));
    let tarball = dir.join(format!("upstream-{name}"));
    download(step, &format!("{url}.sig"), &signature)?;
    download(step, &url, &tarball)?;
    verify(step, &signature, Some(&tarball), QEMU_SIGNER)?;
    Ok(())
}

fn major(version: &str) -> &str {
    version.split('.').next().unwrap_or(version)
}

fn download(step: &mut Step, url: &str, into: &Path) -> Result<()> {
    require_tool("curl", "curl")?;
    step.say(&format!("fetching {url}"));
    let mut command = Command::new("curl");
    command
        .args(["--fail", "--location", "--proto", "=https", "--retry", "3"])
        .args(["--connect-timeout", "20", "--progress-bar", "--output"])
        .arg(into)
        .arg(url);
    run_watched(step, &mut command, |step, line| {
        // "####      12.3%"
        let percent = line.trim_matches(['#', ' ', '%', '=', 'O', '-']);
        if let Some(percent) = percent.split('.').next().and_then(|text| text.parse().ok()) {
            step.advance(percent, 100);
            return Keep::Dropped;
        }
        Keep::Logged
    })
    .with_context(|| format!("cannot fetch {url}"))
}

/// Checks a signature by exactly this key, and returns the signed text when it
/// is in the same file. The keyring is our own and lasts for one call.
fn verify(
    step: &mut Step,
    signed: &Path,
    data: Option<&Path>,
    fingerprint: &str,
) -> Result<String> {
    require_tool("gpg", "gpg")?;
    let home = tempfile::tempdir().context("cannot make a temporary folder")?;
    let gpg = || {
        let mut command = Command::new("gpg");
        command.arg("--batch").arg("--homedir").arg(home.path());
        command
    };
    run(step, gpg().args(["--recv-keys", fingerprint]))
        .with_context(|| format!("cannot get the publisher's key {fingerprint}"))?;
    let mut check = gpg();
    check.args(["--status-fd", "1"]);
    let text = home.path().join("signed");
    match data {
        Some(data) => check.arg("--verify").arg(signed).arg(data),
        None => check
            .arg("--output")
            .arg(&text)
            .arg("--decrypt")
            .arg(signed),
    };
    let status = output_of(&mut check).context("the publisher's signature is not valid")?;
    let by_key = |line: &str| {
        line.starts_with("[GNUPG:] VALIDSIG ") && line.split_whitespace().any(|w| w == fingerprint)
    };
    if !status.lines().any(by_key) {
        bail!(
            "{} is not signed by the key {fingerprint}",
            signed.display()
        );
    }
    if data.is_some() {
        return Ok(String::new());
    }
    fs::read_to_string(&text).context("cannot read what was signed")
}

fn require_tool(program: &str, package: &str) -> Result<()> {
    if is_installed(program) {
        return Ok(());
    }
    bail!("{program} is needed for the publisher's tarball: apt-get install {package}")
}
