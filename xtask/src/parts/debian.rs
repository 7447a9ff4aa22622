// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Fetching from Debian without touching the machine's own apt.
//!
//! Adding a newer suite to the system's sources would pull half the system
//! forward. So apt runs with lists, sources and state of our own, kept in the
//! cache; it checks Debian's signatures as always. The mirror is the one that
//! the machine is configured for.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, CacheLock};
use crate::command::{Keep, output_of, run, run_watched};
use crate::progress::Step;

/// The suite of the guest's programs and firmware.
const BASE_SUITE: &str = "bookworm";
/// The suite with the binary package of the kernel's source.
const KERNEL_SUITE: &str = "trixie-backports";
/// The suite with QEMU's source package.
const QEMU_SUITE: &str = "trixie";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// The address that the machine's apt uses for Debian itself.
pub fn mirror() -> Result<String> {
    let targets = output_of(Command::new("apt-get").args([
        "indextargets",
        "--format",
        "$(REPO_URI) $(CODENAME) $(ORIGIN)",
        "Created-By: Packages",
    ]))?;
    let own = fs::read_to_string("/etc/os-release")
        .unwrap_or_default()
        .lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map_or_else(
            || BASE_SUITE.to_owned(),
            |name| name.trim_matches('"').to_owned(),
        );
    targets
        .lines()
        .find_map(|line| {
            let mut words = line.split_whitespace();
            let uri = words.next()?;
            let codename = words.next()?;
            let origin = words.next()?;
            (codename == own && origin == "Debian").then(|| uri.to_owned())
        })
        .with_context(|| {
            format!("apt knows no Debian mirror for {own} yet: run apt-get update as root")
        })
}

/// Progress from a line of apt's status output.
pub fn apt_percent(line: &str) -> Option<u64> {
    let mut fields = line.split(':');
    let kind = fields.next()?;
    if kind != "dlstatus" && kind != "pmstatus" {
        return None;
    }
    let _subject = fields.next()?;
    fields.next()?.split('.').next()?.parse().ok()
}

/// apt with state of our own.
pub struct Apt {
    options: Vec<String>,
    _lock: CacheLock,
}

impl Apt {
    /// Sets the state up and fetches the lists.
    pub fn open(cache: &Cache, step: &mut Step) -> Result<Self> {
        let lock = cache.lock("apt")?;
        let dir = cache.folder("apt")?;
        for sub in ["lists/partial", "cache/archives/partial"] {
            cache.folder(&format!("apt/{sub}"))?;
        }
        let uri = mirror()?;
        let sources = dir.join("sources.list");
        let line =
            |kind: &str, suite: &str| format!("{kind} [signed-by={KEYRING}] {uri} {suite} main\n");
        let text = [
            line("deb", BASE_SUITE),
            line("deb", KERNEL_SUITE),
            line("deb-src", QEMU_SUITE),
        ]
        .concat();
        fs::write(&sources, text).context("cannot write apt's sources")?;
        // What is installed here must not decide which version is fetched.
        let status = dir.join("status");
        fs::write(&status, "").context("cannot write apt's status")?;
        let none = cache.folder("apt/empty")?;
        let options = [
            format!("Dir::Etc::SourceList={}", sources.display()),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!(
                "Dir::Etc::Preferences={}",
                dir.join("preferences").display()
            ),
            format!("Dir::Etc::PreferencesParts={}", none.display()),
            format!("Dir::State::Lists={}", dir.join("lists").display()),
            format!("Dir::State::status={}", status.display()),
            format!("Dir::Cache={}", dir.join("cache").display()),
            // Debian's container images switch these off, and then every call reads the lists anew.
            "Dir::Cache::pkgcache=pkgcache.bin".to_owned(),
            "Dir::Cache::srcpkgcache=srcpkgcache.bin".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            "APT::Update::Error-Mode=any".to_owned(),
            "APT::Status-Fd=1".to_owned(),
        ]
        .into();
        let apt = Self {
            options,
            _lock: lock,
        };
        step.say("fetching Debian's package lists");
        apt.get(step, &dir, &["update"])
            .context("Debian's mirror cannot be reached: is there a network?")?;
        Ok(apt)
    }

    /// Fetches a binary package into `dir`.
    pub fn download(&self, step: &mut Step, dir: &Path, packages: &[&str]) -> Result<()> {
        let mut args = vec!["download"];
        args.extend(packages);
        self.get(step, dir, &args)
    }

    /// Fetches the files of a source package into `dir`.
    pub fn source(&self, step: &mut Step, dir: &Path, package: &str) -> Result<()> {
        self.get(step, dir, &["source", "--download-only", package])
    }

    /// The packages that these need at once, not what those need in turn.
    fn depends(&self, packages: &[String]) -> Result<BTreeSet<String>> {
        let mut command = self.command("apt-cache");
        command.arg("depends");
        for kind in [
            "recommends",
            "suggests",
            "conflicts",
            "breaks",
            "replaces",
            "enhances",
        ] {
            command.arg(format!("--no-{kind}"));
        }
        let text = output_of(command.args(packages))?;
        Ok(text
            .lines()
            .filter_map(|line| line.trim_start_matches([' ', '|']).split_once("Depends: "))
            .map(|(_, name)| name.trim().to_owned())
            .filter(|name| !name.starts_with('<'))
            .collect())
    }

    fn get(&self, step: &mut Step, dir: &Path, args: &[&str]) -> Result<()> {
        let mut command = self.command("apt-get");
        command.current_dir(dir).arg("-q").args(args);
        run_watched(step, &mut command, |step, line| {
            if let Some(percent) = apt_percent(line) {
                step.advance(percent, 100);
                return Keep::Dropped;
            }
            Keep::Logged
        })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        for option in &self.options {
            command.args(["-o", option]);
        }
        command
    }
}

/// Unpacks a binary package.
pub fn unpack(step: &mut Step, package: &Path, into: &Path) -> Result<()> {
    run(
        step,
        Command::new("dpkg-deb").arg("-x").arg(package).arg(into),
    )
}

/// Fetches programs and the shared libraries that they load, and nothing else.
///
/// A package's declared dependencies reach far (a benchmark that can draw pulls
/// in a compiler for shaders), so they are only followed while a library is
/// missing that a program asks for by name.
pub struct Closure<'a> {
    apt: &'a Apt,
    /// Where packages are unpacked.
    tree: PathBuf,
    /// Where they are downloaded to.
    downloads: PathBuf,
    fetched: BTreeSet<String>,
    frontier: Vec<String>,
}

impl<'a> Closure<'a> {
    /// Begins with nothing, in two folders that exist.
    pub fn new(apt: &'a Apt, downloads: &Path, tree: &Path) -> Self {
        Self {
            apt,
            tree: tree.to_path_buf(),
            downloads: downloads.to_path_buf(),
            fetched: BTreeSet::new(),
            frontier: Vec::new(),
        }
    }

    /// Fetches and unpacks packages.
    pub fn add(&mut self, step: &mut Step, packages: &[&str]) -> Result<()> {
        let new: Vec<&str> = packages
            .iter()
            .copied()
            .filter(|name| self.fetched.insert((*name).to_owned()))
            .collect();
        if new.is_empty() {
            return Ok(());
        }
        step.say(&format!("fetching {}", new.join(" ")));
        let round = self.downloads.join(format!("round-{}", self.fetched.len()));
        fs::create_dir_all(&round).with_context(|| format!("cannot make {}", round.display()))?;
        self.apt.download(step, &round, &new)?;
        for package in crate::cache::files_below(&round)? {
            unpack(step, &package, &self.tree)?;
        }
        self.frontier
            .extend(new.iter().map(|name| (*name).to_owned()));
        Ok(())
    }

    /// Fetches libraries until `program` (a path in the tree) has all it loads.
    /// Returns the libraries' paths in the tree, by the name they are asked for.
    pub fn libraries_of(
        &mut self,
        step: &mut Step,
        program: &str,
    ) -> Result<BTreeMap<String, PathBuf>> {
        loop {
            let (found, missing) = self.resolve(program)?;
            if missing.is_empty() {
                return Ok(found);
            }
            let next = self.apt.depends(&std::mem::take(&mut self.frontier))?;
            let next: Vec<&str> = next.iter().map(String::as_str).collect();
            if next.iter().all(|name| self.fetched.contains(*name)) {
                bail!("no package that {program} depends on has {missing:?}");
            }
            self.add(step, &next)?;
        }
    }

    fn resolve(&self, program: &str) -> Result<(BTreeMap<String, PathBuf>, Vec<String>)> {
        let mut found = BTreeMap::new();
        let mut missing = Vec::new();
        let mut open = vec![self.tree.join(program)];
        while let Some(file) = open.pop() {
            for name in needed_by(&file)? {
                if found.contains_key(&name) || missing.contains(&name) {
                    continue;
                }
                match self.library(&name) {
                    Some(path) => {
                        open.push(path.clone());
                        found.insert(name, path);
                    }
                    None => missing.push(name),
                }
            }
        }
        Ok((found, missing))
    }

    fn library(&self, name: &str) -> Option<PathBuf> {
        const FOLDERS: [&str; 4] = [
            "lib/x86_64-linux-gnu",
            "usr/lib/x86_64-linux-gnu",
            "lib64",
            "usr/lib",
        ];
        FOLDERS
            .iter()
            .map(|dir| self.tree.join(dir).join(name))
            .find(|path| path.exists())
    }
}

/// The shared libraries that an ELF file asks for.
fn needed_by(file: &Path) -> Result<Vec<String>> {
    let text = output_of(Command::new("readelf").arg("-dW").arg(file))?;
    Ok(text
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .collect())
}
