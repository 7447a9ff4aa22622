// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where the built things lie.

use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Everything a guest is made of, as `cargo xtask` built it.
#[derive(Serialize, Deserialize, Clone, Debug)]
pub struct Artifacts {
    /// The patched `qemu-system-x86_64`.
    pub qemu: PathBuf,
    /// Folders of firmware for QEMU's `-L`.
    pub firmware: Vec<PathBuf>,
    /// The patched kernel, as a PVH `vmlinux`.
    pub kernel: PathBuf,
    /// The root image with the module for `kernel`.
    pub image: PathBuf,
    /// The kernel that checks itself.
    pub kernel_debug: Option<PathBuf>,
    /// The root image with the module for `kernel_debug`.
    pub image_debug: Option<PathBuf>,
    /// Real data to load, whole MiB, read-only.
    pub corpus: PathBuf,
    /// The program `vhost-device-cram`.
    pub daemon: PathBuf,
    /// The program `cramctl`.
    pub cramctl: PathBuf,
    /// QEMU's own test of the device, when it was built.
    pub qtest: Option<PathBuf>,
    /// The plugin with which QEMU counts instructions, when benchmarks are to run.
    #[serde(default)]
    pub plugin: Option<PathBuf>,
}

/// The environment variable that names the file with the artifacts.
const VARIABLE: &str = "CRAM_ARTIFACTS";

impl Artifacts {
    /// The artifacts that the environment names; none when it names none.
    ///
    /// # Errors
    ///
    /// When the named file cannot be read or is not a list of artifacts.
    pub fn from_env() -> Result<Option<Self>> {
        let Some(path) = std::env::var_os(VARIABLE) else {
            return Ok(None);
        };
        let path = PathBuf::from(path);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("{VARIABLE} names {}", path.display()))?;
        let artifacts = serde_json::from_str(&text)
            .with_context(|| format!("{} is not a list of artifacts", path.display()))?;
        Ok(Some(artifacts))
    }
}
