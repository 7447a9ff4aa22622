// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The parts that a guest is made of, and the order in which they are made.

pub mod corpus;
pub mod debian;
pub mod image;
pub mod kernel;
pub mod plugin;
pub mod qemu;
pub mod sources;
pub mod toolchain;

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use cram_tests::guest::Artifacts;

use crate::cache::Cache;
use crate::parts::kernel::{Flavour, Kernel, KernelSource, Make};
use crate::progress::human_duration;
use crate::workspace::HostPrograms;

/// Where sources come from, and how hard the machine may work.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Building what is missing")]
pub struct SourceArgs {
    /// Build the kernel from this tree or tarball of Linux 7.3 instead of Debian's package
    #[arg(
        long,
        value_name = "PATH",
        env = "CRAM_KERNEL_SOURCE",
        hide_env_values = true
    )]
    kernel_source: Option<PathBuf>,
    /// Build QEMU from this tree or tarball of QEMU 10.0 instead of Debian's package
    #[arg(
        long,
        value_name = "PATH",
        env = "CRAM_QEMU_SOURCE",
        hide_env_values = true
    )]
    qemu_source: Option<PathBuf>,
    /// Compile this many files at once [default: one for each processor]
    #[arg(long, short, value_name = "N")]
    jobs: Option<usize>,
}

/// What `cargo xtask build` builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Nothing: only fetch what the others are made of, for building without a network later
    Fetch,
    /// The daemon, cramctl and the guest's workload
    Host,
    /// The guest's kernel and cram.ko
    Kernel,
    /// The kernel with lockdep and KASAN, and its cram.ko
    KernelDebug,
    /// QEMU and its firmware
    Qemu,
    /// The root image
    Image,
    /// The real data that guests are made to swap out
    Corpus,
}

/// Options of `cargo xtask build`.
#[derive(Args)]
pub struct BuildArgs {
    /// What to build [default: everything]
    #[arg(value_enum)]
    targets: Vec<Target>,
}

/// Runs `cargo xtask build`.
pub fn build(args: &BuildArgs, sources: SourceArgs) -> Result<()> {
    let started = Instant::now();
    let builder = Builder::open(sources)?;
    if args.targets.is_empty() {
        let artifacts = builder.artifacts(true)?;
        println!("qemu      {}", artifacts.qemu.display());
        println!("kernel    {}", artifacts.kernel.display());
        println!("image     {}", artifacts.image.display());
        println!("daemon    {}", artifacts.daemon.display());
        println!("all paths {}", builder.artifacts_path().display());
    }
    for target in &args.targets {
        let path = match target {
            Target::Fetch => builder.fetch()?,
            Target::Host => builder.programs()?.daemon.clone(),
            Target::Kernel => {
                builder.module(Flavour::Release)?;
                builder.kernel(Flavour::Release)?.vmlinux()
            }
            Target::KernelDebug => {
                builder.module(Flavour::Debug)?;
                builder.kernel(Flavour::Debug)?.vmlinux()
            }
            Target::Qemu => builder.qemu()?.emulator,
            Target::Image => builder.image(Flavour::Release)?,
            Target::Corpus => builder.corpus()?,
        };
        println!("{}", path.display());
    }
    println!("done in {}", human_duration(started.elapsed()));
    Ok(())
}

/// Makes parts, each when it is first asked for.
pub struct Builder {
    root: PathBuf,
    cache: Cache,
    sources: SourceArgs,
    jobs: usize,
    make: OnceCell<Make>,
    source: OnceCell<KernelSource>,
    release: OnceCell<Kernel>,
    debug: OnceCell<Kernel>,
    programs: OnceCell<HostPrograms>,
}

impl Builder {
    /// Prepares the machine: installs what is missing, or says what to type.
    pub fn open(sources: SourceArgs) -> Result<Self> {
        let cache = Cache::open()?;
        crate::system::prepare(&cache)?;
        let jobs = match sources.jobs {
            Some(jobs) => jobs.max(1),
            None => std::thread::available_parallelism().map_or(1, usize::from),
        };
        Ok(Self {
            root: crate::workspace::root()?,
            cache,
            sources,
            jobs,
            make: OnceCell::new(),
            source: OnceCell::new(),
            release: OnceCell::new(),
            debug: OnceCell::new(),
            programs: OnceCell::new(),
        })
    }

    /// Everything that a guest needs; with the debug kernel when asked for.
    /// Leaves the paths in `target/artifacts.json` for the tests.
    pub fn artifacts(&self, with_debug: bool) -> Result<Artifacts> {
        // The host's programs first: an error of the person at the keyboard is
        // found in seconds, not behind a kernel build.
        let programs = self.programs()?;
        let image = self.image(Flavour::Release)?;
        let qemu = self.qemu()?;
        let mut artifacts = Artifacts {
            qemu: qemu.emulator,
            firmware: vec![self.firmware()?],
            kernel: self.kernel(Flavour::Release)?.vmlinux(),
            image,
            kernel_debug: None,
            image_debug: None,
            corpus: self.corpus()?,
            daemon: programs.daemon.clone(),
            cramctl: programs.cramctl.clone(),
            qtest: qemu.qtest,
            plugin: None,
        };
        if with_debug {
            artifacts.image_debug = Some(self.image(Flavour::Debug)?);
            artifacts.kernel_debug = Some(self.kernel(Flavour::Debug)?.vmlinux());
        }
        write_artifacts(&self.artifacts_path(), &artifacts)?;
        Ok(artifacts)
    }

    /// Everything that a guest needs whose instructions are counted.
    pub fn artifacts_for_bench(&self) -> Result<Artifacts> {
        let source = sources::qemu(&self.cache, self.sources.qemu_source.as_deref())?;
        let plugin = plugin::build(&self.cache, &self.root, &source)?;
        let artifacts = Artifacts {
            plugin: Some(plugin),
            ..self.artifacts(false)?
        };
        write_artifacts(&self.artifacts_path(), &artifacts)?;
        Ok(artifacts)
    }

    /// Where the list of paths is left.
    pub fn artifacts_path(&self) -> PathBuf {
        crate::workspace::target_dir(&self.root).join("artifacts.json")
    }

    /// The checkout.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The cache.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The kernel's make.
    pub fn make(&self) -> Result<&Make> {
        get_or_make(&self.make, || Make::new(&self.cache, self.jobs))
    }

    /// The kernel's source as it was fetched.
    pub fn kernel_origin(&self) -> Result<sources::Source> {
        sources::kernel(&self.cache, self.sources.kernel_source.as_deref())
    }

    /// The kernel's source with our patches.
    pub fn kernel_source(&self) -> Result<&KernelSource> {
        get_or_make(&self.source, || {
            kernel::patched(&self.cache, &self.root, &self.kernel_origin()?)
        })
    }

    /// Fetches and builds nothing. Returns the folder of the downloads.
    fn fetch(&self) -> Result<PathBuf> {
        self.kernel_origin()?;
        sources::qemu(&self.cache, self.sources.qemu_source.as_deref())?;
        self.firmware()?;
        image::debian_files(&self.cache)?;
        self.cache.folder("parts/downloads")
    }

    fn kernel(&self, flavour: Flavour) -> Result<&Kernel> {
        let cell = match flavour {
            Flavour::Release => &self.release,
            Flavour::Debug => &self.debug,
        };
        get_or_make(cell, || {
            let source = self.kernel_source()?;
            kernel::build(&self.cache, &self.root, self.make()?, source, flavour)
        })
    }

    fn module(&self, flavour: Flavour) -> Result<PathBuf> {
        let kernel = self.kernel(flavour)?;
        kernel::module(&self.cache, &self.root, self.make()?, kernel)
    }

    fn image(&self, flavour: Flavour) -> Result<PathBuf> {
        let contents = image::Contents {
            kernel: self.kernel(flavour)?,
            module: &self.module(flavour)?,
            workload: &self.programs()?.workload,
        };
        image::build(&self.cache, &self.root, &contents)
    }

    fn qemu(&self) -> Result<qemu::Qemu> {
        let source = sources::qemu(&self.cache, self.sources.qemu_source.as_deref())?;
        qemu::build(
            &self.cache,
            &self.root,
            &source,
            &self.firmware()?,
            self.jobs,
        )
    }

    fn firmware(&self) -> Result<PathBuf> {
        qemu::firmware(&self.cache)
    }

    fn corpus(&self) -> Result<PathBuf> {
        let (tree, key) = kernel::base(&self.cache, &self.kernel_origin()?)?;
        corpus::build(&self.cache, &tree, &key)
    }

    fn programs(&self) -> Result<&HostPrograms> {
        get_or_make(&self.programs, || {
            crate::workspace::build_programs(&self.root, &self.cache)
        })
    }
}

/// Writes the list of paths that tests find through `CRAM_ARTIFACTS`.
fn write_artifacts(path: &Path, artifacts: &Artifacts) -> Result<()> {
    let text = serde_json::to_string_pretty(artifacts).context("cannot write artifacts.json")?;
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn get_or_make<T>(cell: &OnceCell<T>, make: impl FnOnce() -> Result<T>) -> Result<&T> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = make()?;
    Ok(cell.get_or_init(|| value))
}
