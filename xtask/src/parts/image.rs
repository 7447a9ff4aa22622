// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The guest's root image: busybox, stress-ng, the workload, the modules, and
//! images/init. Made of Debian packages, without root rights and without a mount.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cache::{Cache, Key, KeyBuilder, Part, files_below, sha256_of};
use crate::command::{output_of, run};
use crate::parts::debian::{Apt, Closure};
use crate::parts::kernel::Kernel;
use crate::progress::Step;

/// Programs from Debian: package, path in it.
const PROGRAMS: [(&str, &str); 2] = [
    ("busybox-static", "bin/busybox"),
    ("stress-ng", "usr/bin/stress-ng"),
];
const LOADER: &str = "lib64/ld-linux-x86-64.so.2";
const LIBRARIES: &str = "lib/x86_64-linux-gnu";

/// Folders that init mounts something on, and others that must be there.
const FOLDERS: [&str; 12] = [
    "bin", "dev", "etc", "lib", "lib64", "mnt", "proc", "root", "run", "sys", "tmp", "var",
];

/// Room beside the files.
const SPARE_MIB: u64 = 8;

/// What one image is made of.
pub struct Contents<'a> {
    /// Whose modules go in.
    pub kernel: &'a Kernel,
    /// Built against that kernel.
    pub module: &'a Path,
    /// Statically linked.
    pub workload: &'a Path,
}

/// Makes the image of one kernel. Returns its path.
pub fn build(cache: &Cache, root: &Path, contents: &Contents<'_>) -> Result<PathBuf> {
    let (debian, debian_key) = debian_files(cache)?;
    let init = root.join("images/init");
    let key = KeyBuilder::new("image 3")
        .text("debian", debian_key.as_str())
        .text("kernel", contents.kernel.key().as_str())
        .file(&init)?
        .file(contents.module)?
        .text("workload", &sha256_of(contents.workload)?)
        .finish();
    let dir = cache.ensure(Part::Image, &key, |work| {
        let mut step = Step::begin(cache, "image")?;
        let tree = work.join("tree");
        for folder in FOLDERS {
            fs::create_dir_all(tree.join(folder)).context("cannot make the image's folders")?;
        }
        run(
            &mut step,
            Command::new("cp")
                .arg("-a")
                .arg(debian.join("."))
                .arg(&tree),
        )?;
        install(&init, &tree.join("init"), 0o755)?;
        install(contents.workload, &tree.join("bin/cram-workload"), 0o755)?;
        let modules = tree.join("lib/modules");
        fs::create_dir_all(&modules).context("cannot make the image's folders")?;
        install(contents.module, &modules.join("cram.ko"), 0o644)?;
        for module in contents.kernel.modules()? {
            let name = module.file_name().unwrap_or_default();
            install(&module, &modules.join(name), 0o644)?;
        }
        write_etc(&tree.join("etc"))?;
        link_applets(&tree)?;
        make_file_system(&mut step, &tree, &work.join("root.img"))?;
        crate::cache::remove_tree(&tree)?;
        step.finish();
        Ok(())
    })?;
    Ok(dir.join("root.img"))
}

/// The files from Debian; fetched once, and from then on always the same.
pub fn debian_files(cache: &Cache) -> Result<(PathBuf, Key)> {
    let mut key = KeyBuilder::new("image packages 1");
    for (package, program) in PROGRAMS {
        key = key.text(package, program);
    }
    let key = key.finish();
    let dir = cache.ensure(Part::Downloads, &key, |work| {
        let mut step = Step::begin(cache, "programs of the image")?;
        let apt = Apt::open(cache, &mut step)?;
        let scratch = tempfile::tempdir_in(work).context("cannot make a temporary folder")?;
        let tree = scratch.path().join("tree");
        let downloads = scratch.path().join("downloads");
        let files = work.join("files");
        let mut closure = Closure::new(&apt, &downloads, &tree);
        let packages: Vec<&str> = PROGRAMS.iter().map(|(package, _)| *package).collect();
        closure.add(&mut step, &packages)?;
        for (_, program) in PROGRAMS {
            let name = program.rsplit('/').next().unwrap_or(program);
            install(&tree.join(program), &files.join("bin").join(name), 0o755)?;
            for (name, library) in closure.libraries_of(&mut step, program)? {
                install(&library, &files.join(LIBRARIES).join(name), 0o644)?;
            }
        }
        // The loader is asked for by path, not as a library.
        let loader = files.join(LOADER);
        install(&tree.join(LOADER), &loader, 0o755).or_else(|_| {
            install(
                &tree.join(LIBRARIES).join("ld-linux-x86-64.so.2"),
                &loader,
                0o755,
            )
        })?;
        step.finish();
        Ok(())
    })?;
    let files = dir.join("files");
    // Which versions they are decides about the image, so the key is of their contents.
    let contents = KeyBuilder::new("image files 1").tree(&files)?.finish();
    Ok((files, contents))
}

fn install(from: &Path, to: &Path, mode: u32) -> Result<()> {
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    fs::copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(mode))
        .with_context(|| format!("cannot set the mode of {}", to.display()))
}

/// For shells on the console. By itself `poweroff` only asks the first process,
/// which here is a script that does not listen; and busybox's shell takes its own
/// programs before any in the path, so that only an alias helps.
const PROFILE: &str = "\
export PATH=/bin HOME=/root PS1='guest# '
alias poweroff='poweroff -f' halt='halt -f' reboot='reboot -f'
";

fn write_etc(etc: &Path) -> Result<()> {
    let files = [
        ("passwd", "root::0:0:root:/root:/bin/sh\n"),
        ("group", "root:x:0:\n"),
        ("hostname", "cram-guest\n"),
        ("profile", PROFILE),
    ];
    for (name, text) in files {
        fs::write(etc.join(name), text).with_context(|| format!("cannot write etc/{name}"))?;
    }
    Ok(())
}

/// A link for each of busybox's programs that nothing else provides.
fn link_applets(tree: &Path) -> Result<()> {
    let list = output_of(Command::new(tree.join("bin/busybox")).arg("--list"))?;
    for applet in list.lines() {
        let link = tree.join("bin").join(applet);
        if !link.exists() {
            symlink("busybox", &link).with_context(|| format!("cannot link {applet}"))?;
        }
    }
    Ok(())
}

/// ext4 with no journal, since it is mounted read-only; the same bytes each
/// time, but for what mke2fs itself decides.
fn make_file_system(step: &mut Step, tree: &Path, image: &Path) -> Result<()> {
    let mut bytes = 0;
    for file in files_below(tree)? {
        let meta =
            fs::metadata(&file).with_context(|| format!("cannot open {}", file.display()))?;
        bytes += meta.len().next_multiple_of(4096);
    }
    // mke2fs is in a folder that is not in everybody's path.
    let path = std::env::var("PATH").unwrap_or_default();
    run(
        step,
        Command::new("mke2fs")
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .args([
                "-q",
                "-t",
                "ext4",
                "-O",
                "^has_journal,^metadata_csum_seed,^orphan_file",
            ])
            .args(["-E", "root_owner=0:0,lazy_itable_init=0,no_copy_xattrs"])
            .args(["-m", "0", "-L", "cram-root", "-d"])
            .arg(tree)
            .arg(image)
            .arg(format!("{}m", (bytes >> 20) + SPARE_MIB)),
    )
}
