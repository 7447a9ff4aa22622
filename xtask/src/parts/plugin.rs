// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The plugin with which QEMU counts what a guest executes; only benchmarks load it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, KeyBuilder, Part, remove_tree};
use crate::command::{output_of, run};
use crate::parts::sources::Source;
use crate::progress::Step;
use crate::system::version_of;

/// The interface of plugins, in QEMU's source. QEMU is not installed, so it is found nowhere else.
const HEADER: &str = "include/qemu/qemu-plugin.h";

const FLAGS: [&str; 6] = [
    "-shared",
    "-fPIC",
    "-O2",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
];

/// Builds it for the QEMU of this source. Returns its path.
pub fn build(cache: &Cache, root: &Path, source: &Source) -> Result<PathBuf> {
    let program = root.join("tests/plugin/count.c");
    let key = KeyBuilder::new("plugin 1")
        .text("source", source.key()?.as_str())
        .text("flags", &FLAGS.join(" "))
        .text("gcc", &version_of("gcc")?)
        .file(&program)?
        .finish();
    let dir = cache.ensure(Part::Plugin, &key, |work| {
        let mut step = Step::begin(cache, "counting plugin")?;
        step.say("unpacking QEMU's header");
        let tree = work.join("source");
        source.unpack(cache, &mut step, &tree)?;
        let name = HEADER.rsplit('/').next().unwrap_or(HEADER);
        fs::copy(tree.join(HEADER), work.join(name))
            .with_context(|| format!("QEMU's source has no {HEADER}"))?;
        remove_tree(&tree)?;
        step.say("compiling");
        let glib = glib_flags()?;
        run(
            &mut step,
            Command::new("gcc")
                .args(FLAGS)
                .arg("-I")
                .arg(work)
                .arg("-o")
                .arg(work.join("count.so"))
                .arg(&program)
                .args(glib.split_whitespace()),
        )?;
        step.finish();
        Ok(())
    })?;
    Ok(dir.join("count.so"))
}

/// QEMU's header includes glib's.
fn glib_flags() -> Result<String> {
    let flags = output_of(Command::new("pkg-config").args(["--cflags", "--libs", "glib-2.0"]))?;
    if flags.trim().is_empty() {
        bail!("pkg-config knows no flags for glib-2.0");
    }
    Ok(flags)
}
