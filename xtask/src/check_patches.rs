// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the kernel's own community asks of a series: checkpatch.pl has nothing
//! to say, and the kernel builds after each patch, not only after the last.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use clap::Args;

use crate::cache::{Key, KeyBuilder, Part, remove_tree};
use crate::command::{run as run_program, run_counted};
use crate::parts::kernel::{self, Flavour, Strictness, is_object_line};
use crate::parts::{Builder, SourceArgs};
use crate::progress::Step;

/// Options of `cargo xtask check-patches`.
#[derive(Args)]
pub struct CheckPatchesArgs {
    /// Only run checkpatch.pl, which takes seconds
    #[arg(long)]
    no_build: bool,
}

/// Runs `cargo xtask check-patches`.
pub fn run(args: &CheckPatchesArgs, sources: SourceArgs) -> Result<()> {
    let builder = Builder::open(sources)?;
    let count = checkpatch(&builder)?;
    println!("checkpatch.pl: {count} patches, nothing to complain about");
    if !args.no_build {
        let count = build_each(&builder)?;
        println!("the kernel builds after each of {count} patches");
    }
    Ok(())
}

fn series_key(recipe: &str, base: &Key, patches: &[PathBuf]) -> Result<KeyBuilder> {
    kernel::key_with_series(KeyBuilder::new(recipe).text("base", base.as_str()), patches)
}

/// Runs checkpatch.pl on every patch; the result is remembered. Returns how many there are.
pub fn checkpatch(builder: &Builder) -> Result<usize> {
    let patches = kernel::patches(builder.root())?;
    let cache = builder.cache();
    let (tree, base_key) = kernel::base(cache, &builder.kernel_origin()?)?;
    let key = series_key("checkpatch 2", &base_key, &patches)?.finish();
    cache.ensure(Part::Checks, &key, |work| {
        let mut step = Step::begin(cache, "checkpatch.pl")?;
        for patch in &patches {
            let name = patch.file_name().unwrap_or_default().to_string_lossy();
            step.say(&name);
            run_program(
                &mut step,
                Command::new("perl")
                    .current_dir(&tree)
                    .args(["scripts/checkpatch.pl", "--quiet", "--show-types"])
                    .arg(patch),
            )
            .with_context(|| format!("checkpatch.pl complains about {name}"))?;
        }
        fs::write(work.join("passed"), "checkpatch.pl\n").context("cannot write the result")?;
        step.finish();
        Ok(())
    })?;
    Ok(patches.len())
}

/// Builds the kernel after each patch. One tree of objects serves all, so that
/// only what a patch touches is compiled again.
fn build_each(builder: &Builder) -> Result<usize> {
    let patches = kernel::patches(builder.root())?;
    let cache = builder.cache();
    let (base, base_key) = kernel::base(cache, &builder.kernel_origin()?)?;
    let config = builder.root().join("images/kernel.config");
    let key = series_key("each patch builds 1", &base_key, &patches)?
        .file(&config)?
        .finish();
    cache.ensure(Part::Checks, &key, |work| {
        // Not in `work`, whose name changes with every change to a patch.
        let place = cache.folder("work/check-patches")?;
        let tree = place.join("source");
        let objects = place.join("objects");
        let mut step = Step::begin(cache, "each patch builds")?;
        step.say("preparing");
        remove_tree(&tree)?;
        kernel::link_tree(&mut step, &base, &tree)?;
        for (index, patch) in patches.iter().enumerate() {
            let name = patch.file_name().unwrap_or_default().to_string_lossy();
            step.say(&name);
            kernel::apply_patch(&mut step, &tree, patch)?;
            if index == 0 {
                touch_patched(&tree, &patches)?;
            }
            let make = builder.make()?;
            let target = kernel::ConfigTarget {
                tree: &tree,
                objects: &objects,
                strictness: Strictness::EarlyInSeries,
            };
            kernel::configure(&mut step, make, builder.root(), Flavour::Release, &target)?;
            let mut command = make.command(Flavour::Release, &tree, &objects);
            command.args(["vmlinux", "modules"]);
            run_counted(cache, &mut step, &mut command, is_object_line)
                .with_context(|| format!("the kernel does not build after {name}"))?;
        }
        fs::write(work.join("passed"), "each patch builds\n").context("cannot write the result")?;
        step.finish();
        Ok(())
    })?;
    Ok(patches.len())
}

/// Gives every file that any patch of the series touches a new time: the objects
/// may be of a later state of it, and make goes by time alone.
fn touch_patched(tree: &Path, patches: &[PathBuf]) -> Result<()> {
    let mut files = BTreeSet::new();
    for patch in patches {
        let text = fs::read_to_string(patch)
            .with_context(|| format!("cannot read {}", patch.display()))?;
        files.extend(
            text.lines()
                .filter_map(|line| line.strip_prefix("--- a/"))
                .map(|line| line.split('\t').next().unwrap_or(line).to_owned()),
        );
    }
    for name in files {
        let path = tree.join(name);
        if !path.exists() {
            continue;
        }
        // Not in place: the file may be a hard link to the pristine tree's.
        let copy = path.with_extension("touched");
        fs::copy(&path, &copy)
            .and_then(|_| fs::rename(&copy, &path))
            .with_context(|| format!("cannot touch {}", path.display()))?;
    }
    Ok(())
}
