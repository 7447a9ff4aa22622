// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's kernels, and the module built against each.
//!
//! The pristine source is unpacked once. A patched tree is a copy of it made
//! of hard links, where only the patched files are new. Object trees are kept,
//! because a module in Rust is built against the kernel's own Rust metadata.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, Key, KeyBuilder, Part, files_below, remove_tree};
use crate::command::{run, run_counted};
use crate::parts::sources::{KERNEL_SERIES, Source};
use crate::parts::toolchain::{self, KernelRust};
use crate::progress::Step;
use crate::system::version_of;

/// Which of the two kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavour {
    /// What guests run
    Release,
    /// With lockdep, KASAN and the like
    Debug,
}

impl Flavour {
    fn part(self) -> Part {
        match self {
            Self::Release => Part::Kernel,
            Self::Debug => Part::KernelDebug,
        }
    }

    /// The kernel has Rust and KASAN together only when clang compiles it. The
    /// assembler and the linker are the same for both.
    fn compiler(self) -> &'static str {
        match self {
            Self::Release => "gcc",
            Self::Debug => "clang-19",
        }
    }

    fn step(self) -> &'static str {
        match self {
            Self::Release => "kernel",
            Self::Debug => "debug kernel",
        }
    }

    fn fragments(self, root: &Path) -> Vec<PathBuf> {
        let images = root.join("images");
        match self {
            Self::Release => vec![images.join("kernel.config")],
            Self::Debug => vec![
                images.join("kernel.config"),
                images.join("kernel-debug.config"),
            ],
        }
    }
}

/// Patched source, and its key.
#[derive(Clone, Debug)]
pub struct KernelSource {
    /// Top of the tree.
    pub tree: PathBuf,
    /// Of base and patches.
    pub key: Key,
}

/// A built kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    flavour: Flavour,
    source: KernelSource,
    dir: PathBuf,
    key: Key,
}

impl Kernel {
    /// The ELF file that QEMU boots through PVH.
    pub fn vmlinux(&self) -> PathBuf {
        self.objects().join("vmlinux")
    }

    /// The kernel's own modules.
    pub fn modules(&self) -> Result<Vec<PathBuf>> {
        let all = files_below(&self.objects())?;
        Ok(all
            .into_iter()
            .filter(|path| path.extension().is_some_and(|ext| ext == "ko"))
            .collect())
    }

    /// Of everything that went in.
    pub fn key(&self) -> &Key {
        &self.key
    }

    fn objects(&self) -> PathBuf {
        self.dir.join("objects")
    }
}

/// The patches of a series, in order.
pub fn series(dir: &Path) -> Result<Vec<PathBuf>> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    Ok(files_below(dir)?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|ext| ext == "patch"))
        .collect())
}

/// Adds a series to a key.
pub fn key_with_series(mut key: KeyBuilder, patches: &[PathBuf]) -> Result<KeyBuilder> {
    for patch in patches {
        key = key.file(patch)?;
    }
    Ok(key)
}

/// Applies one patch; a hunk that does not fit is an error, fuzz is not.
pub fn apply_patch(step: &mut Step, tree: &Path, patch: &Path) -> Result<()> {
    run(
        step,
        Command::new("patch")
            .args([
                "-p1",
                "--batch",
                "--forward",
                "--no-backup-if-mismatch",
                "-i",
            ])
            .arg(patch)
            .arg("-d")
            .arg(tree),
    )
    .with_context(|| format!("{} does not apply", patch.display()))
}

/// Where the kernel's patches are.
pub fn patches(root: &Path) -> Result<Vec<PathBuf>> {
    series(&root.join("guest-driver/kernel-patches"))
}

/// The source as published, unpacked.
pub fn base(cache: &Cache, source: &Source) -> Result<(PathBuf, Key)> {
    let key = KeyBuilder::new("kernel base 1")
        .text("source", source.key()?.as_str())
        .finish();
    let dir = cache.ensure(Part::KernelBase, &key, |work| {
        let mut step = Step::begin(cache, "kernel source")?;
        let tree = work.join("tree");
        source.unpack(cache, &mut step, &tree)?;
        expect_series(&tree)?;
        if tree.join(".config").exists() {
            step.say("cleaning");
            run(
                &mut step,
                Command::new("make").arg("-C").arg(&tree).arg("mrproper"),
            )?;
        }
        step.finish();
        Ok(())
    })?;
    Ok((dir.join("tree"), key))
}

/// The source with our patches.
pub fn patched(cache: &Cache, root: &Path, source: &Source) -> Result<KernelSource> {
    let (base, base_key) = base(cache, source)?;
    let patches = patches(root)?;
    let key = KeyBuilder::new("kernel source 1").text("base", base_key.as_str());
    let key = key_with_series(key, &patches)?.finish();
    let dir = cache.ensure(Part::KernelSource, &key, |work| {
        let mut step = Step::begin(cache, "patching the kernel")?;
        let tree = work.join("tree");
        link_tree(&mut step, &base, &tree)?;
        for patch in &patches {
            apply_patch(&mut step, &tree, patch)?;
        }
        step.finish();
        Ok(())
    })?;
    Ok(KernelSource {
        tree: dir.join("tree"),
        key,
    })
}

/// Copies a tree as hard links. `patch` writes a new file and renames it, so the original stays.
pub fn link_tree(step: &mut Step, from: &Path, to: &Path) -> Result<()> {
    run(step, Command::new("cp").arg("-al").arg(from).arg(to))
}

fn expect_series(tree: &Path) -> Result<()> {
    let makefile =
        fs::read_to_string(tree.join("Makefile")).context("the kernel's source has no Makefile")?;
    let value = |name: &str| {
        makefile
            .lines()
            .find_map(|line| line.strip_prefix(name)?.trim().strip_prefix('='))
            .map(str::trim)
            .unwrap_or_default()
            .to_owned()
    };
    let version = format!("{}.{}", value("VERSION"), value("PATCHLEVEL"));
    if version != KERNEL_SERIES {
        bail!("this is the source of Linux {version}; the patches are for {KERNEL_SERIES}");
    }
    Ok(())
}

/// make, with the compilers that the kernel is built with.
pub struct Make {
    rust: KernelRust,
    bindgen: PathBuf,
    libclang: PathBuf,
    jobs: usize,
}

impl Make {
    /// Finds the compilers.
    pub fn new(cache: &Cache, jobs: usize) -> Result<Self> {
        Ok(Self {
            rust: KernelRust::find()?,
            bindgen: toolchain::bindgen(cache)?,
            libclang: toolchain::libclang_dir()?,
            jobs,
        })
    }

    /// make on a source tree, with its objects elsewhere.
    pub fn command(&self, flavour: Flavour, tree: &Path, objects: &Path) -> Command {
        let assign = |name: &str, value: &Path| {
            let mut text = std::ffi::OsString::from(name);
            text.push("=");
            text.push(value);
            text
        };
        let mut command = Command::new("make");
        command
            .arg("-C")
            .arg(tree)
            .arg(format!("-j{}", self.jobs))
            .arg(format!("CC={}", flavour.compiler()))
            .arg(assign("O", objects))
            .arg(assign("RUSTC", &self.rust.rustc()))
            .arg(assign("HOSTRUSTC", &self.rust.rustc()))
            .arg(assign("RUSTDOC", &self.rust.rustdoc()))
            .arg(assign("BINDGEN", &self.bindgen))
            .env("LIBCLANG_PATH", &self.libclang)
            .env("KBUILD_BUILD_USER", "cram")
            .env("KBUILD_BUILD_HOST", "cram")
            .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
            // An outer make, or cargo's flags for our crates, are not the kernel's business.
            .env_remove("MAKEFLAGS")
            .env_remove("RUSTFLAGS")
            .env_remove("ARCH");
        command
    }

    fn key(&self, recipe: &str, flavour: Flavour) -> Result<KeyBuilder> {
        Ok(KeyBuilder::new(recipe)
            .text("rustc", self.rust.version())
            .text("bindgen", &self.bindgen.to_string_lossy())
            .text("libclang", &self.libclang.to_string_lossy())
            .text("cc", &version_of(flavour.compiler())?)
            .text("hostcc", &version_of("gcc")?)
            .text("ld", &version_of("ld")?))
    }
}

/// Whether a line of a fragment without effect is an error.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Strictness {
    /// It is.
    WholeSeries,
    /// Not in the middle of the series: a later patch may add the option.
    EarlyInSeries,
}

/// What to configure.
pub struct ConfigTarget<'a> {
    /// The source.
    pub tree: &'a Path,
    /// Where the objects will be.
    pub objects: &'a Path,
    /// What to make of lines without effect.
    pub strictness: Strictness,
}

/// Writes the configuration: nothing, and the fragments on top.
pub fn configure(
    step: &mut Step,
    make: &Make,
    root: &Path,
    flavour: Flavour,
    target: &ConfigTarget<'_>,
) -> Result<()> {
    let objects = target.objects;
    let mut wanted = String::new();
    for fragment in flavour.fragments(root) {
        wanted += &fs::read_to_string(&fragment)
            .with_context(|| format!("cannot read {}", fragment.display()))?;
        wanted.push('\n');
    }
    fs::create_dir_all(objects).with_context(|| format!("cannot make {}", objects.display()))?;
    let fragment = objects.join("fragment.config");
    fs::write(&fragment, &wanted)
        .with_context(|| format!("cannot write {}", fragment.display()))?;
    run(
        step,
        make.command(flavour, target.tree, objects)
            .env("KCONFIG_ALLCONFIG", &fragment)
            .arg("allnoconfig"),
    )?;
    let config = fs::read_to_string(objects.join(".config"))
        .context("the kernel's configuration was not written")?;
    let lost = lost_lines(&wanted, &config);
    if !lost.is_empty() && target.strictness == Strictness::WholeSeries {
        bail!(
            "these lines of images/*.config have no effect, for want of another option or \
             because the kernel has no such option: {}",
            lost.join(", ")
        );
    }
    Ok(())
}

/// The lines of a fragment that did not end up in the configuration.
fn lost_lines<'a>(fragment: &'a str, config: &str) -> Vec<&'a str> {
    fragment
        .lines()
        .map(str::trim)
        .filter(|line| line.starts_with("CONFIG_"))
        .filter(|line| match line.strip_suffix("=n") {
            Some(name) => config
                .lines()
                .any(|have| have.starts_with(&format!("{name}="))),
            None => !config.lines().any(|have| have == *line),
        })
        .collect()
}

/// Whether a line of make's output is one finished object: "  CC      mm/page_io.o".
pub fn is_object_line(line: &str) -> bool {
    line.strip_prefix("  ")
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_uppercase()))
}

/// Builds a kernel and its modules.
pub fn build(
    cache: &Cache,
    root: &Path,
    make: &Make,
    source: &KernelSource,
    flavour: Flavour,
) -> Result<Kernel> {
    let mut key = make
        .key("kernel 1", flavour)?
        .text("source", source.key.as_str());
    for fragment in flavour.fragments(root) {
        key = key.file(&fragment)?;
    }
    let key = key.finish();
    let dir = cache.ensure_resumable(flavour.part(), &key, |work| {
        let mut step = Step::begin(cache, flavour.step())?;
        let objects = work.join("objects");
        step.say("configuring");
        let target = ConfigTarget {
            tree: &source.tree,
            objects: &objects,
            strictness: Strictness::WholeSeries,
        };
        configure(&mut step, make, root, flavour, &target)?;
        step.say("compiling");
        let mut command = make.command(flavour, &source.tree, &objects);
        run_counted(
            cache,
            &mut step,
            command.args(["vmlinux", "modules"]),
            is_object_line,
        )?;
        step.say("pruning");
        prune(&objects)?;
        step.finish();
        Ok(())
    })?;
    Ok(Kernel {
        flavour,
        source: source.clone(),
        dir,
        key,
    })
}

/// Removes the objects that went into vmlinux: modules are linked with none of them.
fn prune(objects: &Path) -> Result<()> {
    // What a module's build runs, includes or imports.
    const KEPT: [&str; 4] = ["include", "rust", "scripts", "tools"];
    for path in files_below(objects)? {
        let below = path.strip_prefix(objects).unwrap_or(&path);
        if KEPT.iter().any(|dir| below.starts_with(dir)) {
            continue;
        }
        let name = below.to_string_lossy();
        let object = [".o", ".a", ".cmd"].iter().any(|end| name.ends_with(end));
        let spare = name.starts_with(".tmp_vmlinux") || name == "vmlinux.unstripped";
        if object || spare {
            fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// Builds cram.ko against a kernel. Returns the module's path.
pub fn module(cache: &Cache, root: &Path, make: &Make, kernel: &Kernel) -> Result<PathBuf> {
    let driver = root.join("guest-driver/cram");
    let wire = root.join("crates/cram-abi/src/wire.rs");
    let mut key = make
        .key("module 1", kernel.flavour)?
        .text("kernel", kernel.key.as_str())
        .file(&wire)?;
    for file in driver_sources(&driver)? {
        let name = file
            .strip_prefix(&driver)
            .unwrap_or(&file)
            .to_string_lossy()
            .into_owned();
        key = key.text("name", &name).file(&file)?;
    }
    let key = key.finish();
    let dir = cache.ensure(Part::Module, &key, |work| {
        let mut step = Step::begin(cache, "cram.ko")?;
        // kbuild writes beside the source, so it works on a copy, with the
        // wire format at the same place relative to it as in the checkout.
        let copy = work.join("build/guest-driver/cram");
        copy_files(&driver_sources(&driver)?, &driver, &copy)?;
        let wire_copy = work.join("build/crates/cram-abi/src");
        fs::create_dir_all(&wire_copy).context("cannot make the module's folder")?;
        fs::copy(&wire, wire_copy.join("wire.rs")).context("cannot copy wire.rs")?;
        let mut command = make.command(kernel.flavour, &kernel.source.tree, &kernel.objects());
        let mut assign = std::ffi::OsString::from("M=");
        assign.push(&copy);
        run(&mut step, command.arg(assign).arg("modules"))?;
        fs::rename(copy.join("cram.ko"), work.join("cram.ko"))
            .context("the build made no cram.ko")?;
        remove_tree(&work.join("build"))?;
        step.finish();
        Ok(())
    })?;
    Ok(dir.join("cram.ko"))
}

/// The driver's files, without what a build in the checkout may have left.
fn driver_sources(driver: &Path) -> Result<Vec<PathBuf>> {
    Ok(files_below(driver)?
        .into_iter()
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let source = name.ends_with(".rs") || name.ends_with(".c") || name.ends_with(".h");
            (source && !name.ends_with(".mod.c")) || name == "Kbuild" || name == "Makefile"
        })
        .collect())
}

fn copy_files(files: &[PathBuf], from: &Path, to: &Path) -> Result<()> {
    for path in files {
        let target = to.join(path.strip_prefix(from).unwrap_or(path));
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)
                .with_context(|| format!("cannot make {}", parent.display()))?;
        }
        fs::copy(path, &target).with_context(|| format!("cannot copy {}", path.display()))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::lost_lines;

    #[test]
    fn a_fragment_line_without_effect_is_found() {
        let fragment = "# words\nCONFIG_A=y\nCONFIG_B=m\nCONFIG_C=n\nCONFIG_D=n\n";
        let config = "CONFIG_A=y\nCONFIG_B=y\n# CONFIG_C is not set\nCONFIG_D=y\n";
        assert_eq!(lost_lines(fragment, config), ["CONFIG_B=m", "CONFIG_D=n"]);
    }
}
