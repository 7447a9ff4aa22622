// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cargo xtask run`: a guest to play with.

use std::fs::File;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use clap::Args;
use cram_tests::guest::{Accelerator, Artifacts, Daemon, DaemonOptions};

use crate::parts::{Builder, SourceArgs};

/// Options of `cargo xtask run`.
#[derive(Args)]
pub struct RunArgs {
    /// The guest's memory, as QEMU takes it
    #[arg(long, default_value = "512M", value_name = "SIZE")]
    memory: String,
    /// The guest's processors; each gets a queue of its own
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16))]
    cpus: u16,
    /// The host's pool of compressed pages, as the daemon takes it
    #[arg(long, default_value = "1G", value_name = "SIZE")]
    capacity: String,
    /// The disk beneath, which takes what the pool refuses
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    swap_mib: u64,
    /// Start the kernel with lockdep and KASAN
    #[arg(long)]
    debug_kernel: bool,
}

/// Runs `cargo xtask run`.
pub fn run(args: &RunArgs, sources: SourceArgs) -> Result<ExitCode> {
    let artifacts = Builder::open(sources)?.artifacts(args.debug_kernel)?;
    let folder = tempfile::Builder::new()
        .prefix("cram-run-")
        .tempdir()
        .context("cannot make a temporary folder")?;
    let swap = folder.path().join("swap.img");
    File::create(&swap)
        .and_then(|file| file.set_len(args.swap_mib << 20))
        .with_context(|| format!("cannot make the swap disk {}", swap.display()))?;
    let options = DaemonOptions {
        capacity: args.capacity.clone(),
        ..DaemonOptions::default()
    };
    let daemon = Daemon::start(&artifacts, folder.path(), options)?;
    let accelerator = Accelerator::detect(&artifacts);
    eprintln!("accelerator: {}", accelerator.name());
    eprintln!(
        "in another terminal: {} --control-socket {} stats",
        artifacts.cramctl.display(),
        daemon.control_socket().display()
    );
    eprintln!("to leave: `poweroff` in the guest, or Ctrl-A then X from anywhere");
    let status = qemu(args, &artifacts, accelerator, daemon.socket(0), &swap)?
        .status()
        .context("cannot start QEMU")?;
    if !status.success() {
        bail!("QEMU ended with {status}");
    }
    Ok(ExitCode::SUCCESS)
}

fn qemu(
    args: &RunArgs,
    artifacts: &Artifacts,
    accelerator: Accelerator,
    socket: &Path,
    swap: &Path,
) -> Result<Command> {
    let (kernel, image) = if args.debug_kernel {
        let kernel = artifacts.kernel_debug.as_ref();
        let image = artifacts.image_debug.as_ref();
        kernel
            .zip(image)
            .context("the debug kernel was not built")?
    } else {
        (&artifacts.kernel, &artifacts.image)
    };
    let mut command = Command::new(&artifacts.qemu);
    for folder in &artifacts.firmware {
        command.arg("-L").arg(folder);
    }
    match accelerator {
        Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        Accelerator::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
    };
    command
        .args([
            "-nodefaults",
            "-no-user-config",
            "-display",
            "none",
            "-no-reboot",
        ])
        .args(["-m", &args.memory, "-smp", &args.cpus.to_string()])
        .arg("-object")
        .arg(format!(
            "memory-backend-memfd,id=mem,size={},share=on",
            args.memory
        ))
        .args(["-machine", "q35,memory-backend=mem"])
        .args(["-serial", "mon:stdio"])
        .arg("-kernel")
        .arg(kernel)
        .args([
            "-append",
            "console=ttyS0 quiet root=/dev/vda ro init=/init panic=-1 cram.shell",
        ]);
    let disk = |path: &Path, more: &str| format!("file={},format=raw,if=virtio{more}", comma(path));
    command
        .args(["-drive", &disk(image, ",readonly=on")])
        .args(["-drive", &disk(swap, ",cache=unsafe")])
        .args(["-drive", &disk(&artifacts.corpus, ",readonly=on")])
        .arg("-chardev")
        .arg(format!(
            "socket,id=cram0,path={},reconnect-ms=500",
            comma(socket)
        ))
        .arg("-device")
        .arg(format!(
            "vhost-user-cram-pci,chardev=cram0,num-queues={}",
            args.cpus
        ))
        .stdin(Stdio::inherit());
    Ok(command)
}

/// A path inside one of QEMU's comma-separated options.
fn comma(path: &Path) -> String {
    path.to_string_lossy().replace(',', ",,")
}
