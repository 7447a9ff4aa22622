// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which accelerator QEMU can use here.

use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::artifacts::Artifacts;

/// How guest instructions are run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// By the processor.
    Kvm,
    /// By translation, about ten times slower; the daemon still runs at full speed.
    Tcg,
}

/// How long the trial guest may take to reach the panic it is sent into.
const TRIAL: Duration = Duration::from_secs(20);

impl Accelerator {
    /// Finds out, once in a process. `/dev/kvm` alone proves nothing: it can exist on a
    /// machine whose processor cannot do it, where guests hang. So a kernel is tried.
    #[must_use]
    pub fn detect(artifacts: &Artifacts) -> Self {
        static FOUND: OnceLock<Accelerator> = OnceLock::new();
        *FOUND.get_or_init(|| {
            if processor_can() && trial_boot(artifacts) {
                Self::Kvm
            } else {
                Self::Tcg
            }
        })
    }

    /// The name as reports show it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    /// How many times longer than with KVM a test may take.
    #[must_use]
    pub fn patience(self) -> u32 {
        match self {
            Self::Kvm => 1,
            Self::Tcg => 4,
        }
    }

    pub(super) fn arguments(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

fn processor_can() -> bool {
    let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    let usable = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm")
        .is_ok();
    usable && (has("vmx") || has("svm"))
}

/// Boots the kernel without a root: with working KVM it panics, and QEMU ends, within a second or two.
fn trial_boot(artifacts: &Artifacts) -> bool {
    let mut command = Command::new(&artifacts.qemu);
    for folder in &artifacts.firmware {
        command.arg("-L").arg(folder);
    }
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none"])
        .args(["-no-reboot", "-machine", "q35", "-m", "256M"])
        .args(Accelerator::Kvm.arguments())
        .arg("-kernel")
        .arg(&artifacts.kernel)
        .args(["-append", "panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let Ok(mut child) = command.spawn() else {
        return false;
    };
    let until = Instant::now() + TRIAL;
    while Instant::now() < until {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) => std::thread::sleep(Duration::from_millis(20)),
            Err(_) => break,
        }
    }
    // It hangs, as it does where KVM only seems to be there.
    let _ = child.kill();
    let _ = child.wait();
    false
}
