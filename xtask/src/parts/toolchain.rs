// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The compilers of the kernel's Rust side: a rustc that has its library's
//! sources, bindgen, libclang.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{Cache, KeyBuilder, Part};
use crate::command::{output_of, run_counted};
use crate::progress::Step;
use crate::workspace::cargo;

/// The kernel asks for 0.71.1 or newer.
const BINDGEN_VERSION: &str = "0.72.1";
/// The oldest libclang that the kernel takes.
const LIBCLANG_MIN: u32 = 17;
/// The newest to look for.
const LIBCLANG_MAX: u32 = 40;
/// Debian 12's `libclang1-19`.
const LIBCLANG_KNOWN: u32 = 19;

/// A Rust compiler that can build the kernel's Rust side.
pub struct KernelRust {
    sysroot: PathBuf,
    version: String,
}

impl KernelRust {
    /// The user's own compiler when it has its library's sources, else Debian's.
    pub fn find() -> Result<Self> {
        for rustc in ["rustc", "/usr/bin/rustc"] {
            if let Some(rust) = Self::with_sources(rustc) {
                return Ok(rust);
            }
        }
        bail!(
            "no rustc here has its library's sources: install Debian's rustc-web and \
             rust-web-src, or type: rustup component add rust-src"
        )
    }

    /// Whether Debian's compiler is not needed.
    pub fn users_own_will_do() -> bool {
        Self::with_sources("rustc").is_some()
    }

    fn with_sources(rustc: &str) -> Option<Self> {
        let sysroot = output_of(Command::new(rustc).args(["--print", "sysroot"])).ok()?;
        let sysroot = PathBuf::from(sysroot.trim());
        let core = "lib/rustlib/src/rust/library/core/src/lib.rs";
        if !sysroot.join(core).is_file() {
            return None;
        }
        let version = output_of(Command::new(sysroot.join("bin/rustc")).arg("-vV")).ok()?;
        Some(Self { sysroot, version })
    }

    /// All that `rustc -vV` says, for keys.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// For people.
    pub fn description(&self) -> String {
        let first = self.version.lines().next().unwrap_or_default();
        format!("{first}, in {}", self.sysroot.display())
    }

    /// The compiler.
    pub fn rustc(&self) -> PathBuf {
        self.sysroot.join("bin/rustc")
    }

    /// Its documentation generator; the kernel's build wants its name even if it is not run.
    pub fn rustdoc(&self) -> PathBuf {
        self.sysroot.join("bin/rustdoc")
    }
}

/// The folder of a libclang: the one that the builds are known to work with, else the newest.
pub fn libclang_dir() -> Result<PathBuf> {
    let folder = |version: u32| PathBuf::from(format!("/usr/lib/llvm-{version}/lib"));
    std::iter::once(LIBCLANG_KNOWN)
        .chain((LIBCLANG_MIN..=LIBCLANG_MAX).rev())
        .map(folder)
        .find(|dir| has_libclang(dir))
        .with_context(|| format!("no libclang {LIBCLANG_MIN} or newer: install libclang1-19"))
}

/// Not every folder of LLVM has it, and its name comes with and without a version.
fn has_libclang(dir: &Path) -> bool {
    let is_it = |name: &str| name.starts_with("libclang.so") || name.starts_with("libclang-");
    fs::read_dir(dir).is_ok_and(|entries| {
        entries
            .flatten()
            .any(|entry| entry.file_name().to_str().is_some_and(is_it))
    })
}

/// bindgen of the version that the kernel is known to build with.
pub fn bindgen(cache: &Cache) -> Result<PathBuf> {
    let key = KeyBuilder::new("bindgen 1")
        .text("version", BINDGEN_VERSION)
        .finish();
    let dir = cache.ensure(Part::Bindgen, &key, |work| {
        let mut step = Step::begin(cache, "bindgen")?;
        let mut command = cargo();
        command
            .args([
                "install",
                "--locked",
                "bindgen-cli",
                "--version",
                BINDGEN_VERSION,
            ])
            .arg("--root")
            .arg(work)
            .env("CARGO_TARGET_DIR", work.join("build"))
            .env_remove("RUSTFLAGS")
            // cargo would otherwise apply this checkout's configuration.
            .current_dir(work);
        run_counted(cache, &mut step, &mut command, |line| {
            line.trim_start().starts_with("Compiling ")
        })?;
        crate::cache::remove_tree(&work.join("build"))?;
        step.finish();
        Ok(())
    })?;
    Ok(dir.join("bin/bindgen"))
}
