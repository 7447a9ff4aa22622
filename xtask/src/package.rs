// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask package` and `cargo xtask man`: Debian packages of the daemon, its tools and the guest's
//! module, and the manual pages that are in them.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::output_of;
use crate::workspace;

const VERSION: &str = env!("CARGO_PKG_VERSION");
const MAINTAINER: &str = "the maintainers of vhost-device-cram <vhost-device-cram@localhost>";

/// What packages are made from.
struct Source<'a> {
    /// The checkout.
    root: &'a Path,
    /// Where the built programs are.
    programs: &'a Path,
    /// Where the manual pages are.
    manuals: &'a Path,
}

/// One package.
struct Package {
    name: &'static str,
    architecture: &'static str,
    depends: &'static str,
    summary: &'static str,
    /// Files of the packages, from where, with which mode.
    files: Vec<(String, PathBuf, u32)>,
    /// Files that the administrator may change.
    configuration: &'static [&'static str],
    /// What is done when it is installed, and removed.
    scripts: &'static [(&'static str, &'static str)],
}

const AFTER_INSTALL: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ]; then
    systemd-sysusers vhost-device-cram.conf
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        systemctl try-restart vhost-device-cram.service
    fi
fi
";
const BEFORE_REMOVAL: &str = "#!/bin/sh
set -e
if [ \"$1\" = remove ] && [ -d /run/systemd/system ]; then
    systemctl disable --now vhost-device-cram.service
fi
";
const AFTER_DKMS_INSTALL: &str = "#!/bin/sh
set -e
if [ \"$1\" = configure ]; then
    dkms add -m cram -v VERSION --rpm_safe_upgrade || true
fi
";
const BEFORE_DKMS_REMOVAL: &str = "#!/bin/sh
set -e
dkms remove -m cram -v VERSION --all || true
";

/// Builds the programs and writes all packages; where they are.
pub fn run() -> Result<Vec<PathBuf>> {
    let root = workspace::root()?;
    let programs = build(&root, true)?;
    let manuals = workspace::target_dir(&root).join("man");
    write_manuals(&programs, &manuals)?;
    let out = workspace::target_dir(&root).join("packages");
    fs::create_dir_all(&out)?;
    let source = Source {
        root: &root,
        programs: &programs,
        manuals: &manuals,
    };
    let packages = write_packages(&source, &out)?;
    for package in &packages {
        println!("{}", package.display());
    }
    Ok(packages)
}

/// Writes the manual pages into `target/man`.
pub fn manuals() -> Result<()> {
    let root = workspace::root()?;
    let programs = build(&root, false)?;
    let manuals = workspace::target_dir(&root).join("man");
    write_manuals(&programs, &manuals)?;
    println!("{}", manuals.display());
    Ok(())
}

fn build(root: &Path, release: bool) -> Result<PathBuf> {
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "vhost-device-cram", "--bins"]);
    if release {
        cargo.arg("--release");
    }
    let status = cargo.current_dir(root).status()?;
    if !status.success() {
        bail!("cargo build failed ({status})");
    }
    let profile = if release { "release" } else { "debug" };
    Ok(workspace::target_dir(root).join(profile))
}

/// `cramctl` knows all of them.
fn write_manuals(programs: &Path, manuals: &Path) -> Result<()> {
    let cramctl = programs.join("cramctl");
    fs::create_dir_all(manuals)?;
    let text = output_of(Command::new(cramctl).arg("man").arg(manuals))?;
    if !text.is_empty() {
        bail!("cramctl man said: {text}");
    }
    Ok(())
}

fn write_packages(source: &Source<'_>, out: &Path) -> Result<Vec<PathBuf>> {
    let packages = [daemon(source)?, tools(source)?, module(source)?];
    let written = packages.iter().map(|package| write(package, out));
    written.collect()
}

fn architecture() -> Result<&'static str> {
    match std::env::consts::ARCH {
        "x86_64" => Ok("amd64"),
        "aarch64" => Ok("arm64"),
        "riscv64" => Ok("riscv64"),
        other => bail!("no package is made for {other}"),
    }
}

fn daemon(source: &Source<'_>) -> Result<Package> {
    let dist = |name: &str| source.root.join("dist").join(name);
    let ops = |name: &str| source.root.join("ops").join(name);
    let share = "usr/share/vhost-device-cram";
    Ok(Package {
        name: "vhost-device-cram",
        architecture: architecture()?,
        depends: "libc6, systemd",
        summary: "compressed memory as a device for virtual machines",
        files: vec![
            entry(
                "usr/bin/vhost-device-cram",
                source.programs.join("vhost-device-cram"),
                0o755,
            ),
            entry(
                "usr/lib/systemd/system/vhost-device-cram.service",
                dist("vhost-device-cram.service"),
                0o644,
            ),
            entry(
                "usr/lib/sysusers.d/vhost-device-cram.conf",
                dist("vhost-device-cram.sysusers"),
                0o644,
            ),
            entry(
                "etc/vhost-device-cram.toml",
                dist("vhost-device-cram.toml"),
                0o644,
            ),
            entry(
                "usr/share/qemu/vhost-user/50-vhost-device-cram.json",
                dist("50-vhost-device-cram.json"),
                0o644,
            ),
            entry(&format!("{share}/alerts.yml"), ops("alerts.yml"), 0o644),
            entry(&format!("{share}/grafana.json"), ops("grafana.json"), 0o644),
            entry(
                &format!("{share}/libvirt-hook"),
                dist("libvirt-hook"),
                0o755,
            ),
            entry(
                "usr/share/man/man1/vhost-device-cram.1",
                source.manuals.join("vhost-device-cram.1"),
                0o644,
            ),
        ],
        configuration: &["/etc/vhost-device-cram.toml"],
        scripts: &[("postinst", AFTER_INSTALL), ("prerm", BEFORE_REMOVAL)],
    })
}

fn tools(source: &Source<'_>) -> Result<Package> {
    let mut files = vec![entry(
        "usr/bin/cramctl",
        source.programs.join("cramctl"),
        0o755,
    )];
    for page in sorted(source.manuals)? {
        let name = file_name(&page)?;
        if name.starts_with("cramctl") {
            files.push(entry(&format!("usr/share/man/man1/{name}"), page, 0o644));
        }
    }
    Ok(Package {
        name: "vhost-device-cram-tools",
        architecture: architecture()?,
        depends: "libc6",
        summary: "looks into a running vhost-device-cram",
        files,
        configuration: &[],
        scripts: &[],
    })
}

/// The module's sources as DKMS wants them. The interface to the daemon is beside them.
fn module(source: &Source<'_>) -> Result<Package> {
    let place = format!("usr/src/cram-{VERSION}");
    let mut files = vec![entry(
        &format!("{place}/dkms.conf"),
        source.root.join("dist/dkms.conf"),
        0o644,
    )];
    let driver = source.root.join("guest-driver/cram");
    add_folder(&driver, &format!("{place}/guest-driver/cram"), &mut files)?;
    let wire = "crates/cram-abi/src/wire.rs";
    files.push(entry(
        &format!("{place}/{wire}"),
        source.root.join(wire),
        0o644,
    ));
    Ok(Package {
        name: "cram-dkms",
        architecture: "all",
        depends: "dkms",
        summary: "the guest's driver for vhost-user-cram, for kernels with frontswap and Rust",
        files,
        configuration: &[],
        scripts: &[
            ("postinst", AFTER_DKMS_INSTALL),
            ("prerm", BEFORE_DKMS_REMOVAL),
        ],
    })
}

fn entry(place: &str, from: PathBuf, mode: u32) -> (String, PathBuf, u32) {
    (place.to_owned(), from, mode)
}

fn sorted(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

fn file_name(path: &Path) -> Result<String> {
    let name = path.file_name().context("a path without a name")?;
    Ok(name.to_string_lossy().into_owned())
}

fn add_folder(folder: &Path, place: &str, files: &mut Vec<(String, PathBuf, u32)>) -> Result<()> {
    for path in sorted(folder)? {
        let place = format!("{place}/{}", file_name(&path)?);
        if path.is_dir() {
            add_folder(&path, &place, files)?;
        } else {
            files.push(entry(&place, path, 0o644));
        }
    }
    Ok(())
}

fn write(package: &Package, out: &Path) -> Result<PathBuf> {
    let folder = tempfile::tempdir()?;
    let tree = folder.path().join("tree");
    let put = |place: &str, bytes: &[u8], mode: u32| -> Result<()> {
        let path = tree.join(place);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        fs::write(&path, bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    let mut size = 0;
    for (place, from, mode) in &package.files {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        size += bytes.len().div_ceil(1024);
        put(place, &bytes, *mode)?;
    }
    let Package {
        name,
        architecture,
        depends,
        summary,
        ..
    } = package;
    let control = format!(
        "Package: {name}\nVersion: {VERSION}\nArchitecture: {architecture}\nDepends: {depends}\n\
         Installed-Size: {size}\nSection: admin\nPriority: optional\nMaintainer: {MAINTAINER}\n\
         Description: {summary}\n"
    );
    put("DEBIAN/control", control.as_bytes(), 0o644)?;
    if !package.configuration.is_empty() {
        let list = format!("{}\n", package.configuration.join("\n"));
        put("DEBIAN/conffiles", list.as_bytes(), 0o644)?;
    }
    for (script, text) in package.scripts {
        let text = text.replace("VERSION", VERSION);
        put(&format!("DEBIAN/{script}"), text.as_bytes(), 0o755)?;
    }
    for folder in folders(&tree)? {
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
    }
    let deb = out.join(format!("{name}_{VERSION}_{architecture}.deb"));
    let mut command = Command::new("dpkg-deb");
    command.args(["--root-owner-group", "--build"]);
    output_of(command.arg(&tree).arg(&deb))?;
    Ok(deb)
}

fn folders(tree: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![tree.to_owned()];
    for path in sorted(tree)? {
        if path.is_dir() {
            found.extend(folders(&path)?);
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dpkg(root: &Path, words: &[&str]) -> String {
        let mut command = Command::new("dpkg");
        command.arg(format!("--root={}", root.display()));
        command.args([
            "--force-not-root",
            "--force-depends",
            "--force-script-chrootless",
        ]);
        output_of(command.args(words)).unwrap()
    }

    /// Packages are made from the tree, unpacked into a root of their own, and removed from it. The
    /// programs in them are this one: what is tested is the packages.
    #[test]
    fn packages_are_made_unpacked_and_removed() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        for name in ["programs", "manuals", "out", "root"] {
            fs::create_dir(at(name)).unwrap();
        }
        for name in ["vhost-device-cram", "cramctl"] {
            fs::copy("/proc/self/exe", at("programs").join(name)).unwrap();
            fs::write(at("manuals").join(format!("{name}.1")), ".TH\n").unwrap();
        }
        let root = workspace::root().unwrap();
        let source = Source {
            root: &root,
            programs: &at("programs"),
            manuals: &at("manuals"),
        };
        let packages = write_packages(&source, &at("out")).unwrap();
        assert_eq!(packages.len(), 3);
        for path in ["var/lib/dpkg/info", "var/lib/dpkg/updates"] {
            fs::create_dir_all(at("root").join(path)).unwrap();
        }
        for path in ["status", "available"] {
            fs::write(at("root").join("var/lib/dpkg").join(path), "").unwrap();
        }
        for package in &packages {
            dpkg(&at("root"), &["--unpack", package.to_str().unwrap()]);
        }
        let there = |place: &str| at("root").join(place);
        for place in [
            "usr/bin/vhost-device-cram",
            "usr/bin/cramctl",
            "usr/lib/systemd/system/vhost-device-cram.service",
            "usr/share/man/man1/cramctl.1",
        ] {
            assert!(there(place).is_file(), "{place}");
        }
        let mode = fs::metadata(there("usr/bin/cramctl"))
            .unwrap()
            .permissions();
        assert_eq!(mode.mode() & 0o777, 0o755);
        // What dpkg leaves beside a file of the administrator's, or in its place.
        let given = [
            "etc/vhost-device-cram.toml",
            "etc/vhost-device-cram.toml.dpkg-new",
        ];
        assert!(given.iter().any(|place| there(place).is_file()));
        // The module finds the interface where it looks for it.
        let sources = there(&format!("usr/src/cram-{VERSION}"));
        let module = fs::read_to_string(sources.join("guest-driver/cram/cram.rs")).unwrap();
        let wire = module
            .lines()
            .find_map(|line| line.trim().strip_prefix("#[path = \"")?.strip_suffix("\"]"));
        let wire = sources.join("guest-driver/cram").join(wire.unwrap());
        assert!(wire.is_file(), "{}", wire.display());
        let conf = fs::read_to_string(sources.join("dkms.conf")).unwrap();
        assert!(
            conf.contains(&format!("PACKAGE_VERSION=\"{VERSION}\"")),
            "{conf}"
        );

        dpkg(&at("root"), &["--remove", "vhost-device-cram-tools"]);
        assert!(!there("usr/bin/cramctl").exists());
        assert!(there("usr/bin/vhost-device-cram").exists());
    }
}
