// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest: QEMU with the project's kernel and image, and its three lines out
//! (console, agent, monitor).

use std::fs::File;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::accelerator::Accelerator;
use super::agent::Agent;
use super::artifacts::Artifacts;
use super::console::Console;
use super::counter::{self, Counter, Counting};
use super::process::Process;
use super::qmp::Qmp;

/// How long QEMU may take to open its lines.
const OPEN_LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to boot, with KVM.
const BOOT_LIMIT: Duration = Duration::from_secs(30);
/// Blocks of so many free pages are reported to the host, as a power of two. By default they are of
/// 2 MiB, and reclaim rarely frees so many neighbours.
const REPORTING_ORDER: u32 = 2;
/// How long QEMU may take to end when asked.
const QUIT_LIMIT: Duration = Duration::from_secs(30);

/// Which kernel a guest runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// As users would build it.
    Plain,
    /// With lockdep, sleep and memory checks.
    Debug,
}

/// How a guest is made.
#[derive(Clone, Debug)]
pub struct GuestOptions {
    /// Names its files in the folder of the test.
    pub name: String,
    /// The daemon's sockets, one cram device for each.
    pub sockets: Vec<PathBuf>,
    /// Request queues of each device.
    pub queues: u32,
    /// Put the devices behind root ports, so that they may be unplugged.
    pub pluggable: bool,
    /// Memory.
    pub memory_mib: u32,
    /// Processors.
    pub cpus: u32,
    /// Size of the swap disk beneath.
    pub swap_mib: u64,
    /// Sockets of vhost-user-blk exports, which become /dev/vdd and so on.
    pub disk_sockets: Vec<PathBuf>,
    /// Whether and how instructions are counted; it takes the emulator to do that.
    pub counting: Option<Counting>,
    /// Which kernel and image.
    pub kernel: Kernel,
    /// Give the guest a balloon that reports its free pages, so that they become the host's.
    pub reports_free_pages: bool,
    /// More words of the kernel's command line.
    pub words: Vec<String>,
    /// Let a reset reboot the guest rather than end QEMU.
    pub reboots: bool,
}

impl Default for GuestOptions {
    fn default() -> Self {
        Self {
            name: "guest0".to_owned(),
            sockets: Vec::new(),
            queues: 2,
            pluggable: false,
            memory_mib: 256,
            cpus: 2,
            swap_mib: 1024,
            disk_sockets: Vec::new(),
            counting: None,
            kernel: Kernel::Plain,
            reports_free_pages: false,
            words: Vec::new(),
            reboots: false,
        }
    }
}

/// The lines of a guest whose QEMU answers.
struct Lines {
    agent: Agent,
    qmp: Mutex<Qmp>,
    counter: Option<Counter>,
}

/// A guest. Dropping it kills its QEMU.
pub struct Guest {
    options: GuestOptions,
    accelerator: Accelerator,
    corpus: PathBuf,
    console: Console,
    process: Mutex<Process>,
    agent_listener: UnixListener,
    qmp_listener: UnixListener,
    counter_listener: Option<UnixListener>,
    lines: Option<Lines>,
    /// Bytes written to the swap disk before it was used as one.
    pub(super) written_before_swap: Mutex<u64>,
}

impl Guest {
    /// Starts a guest and waits until the program inside answers.
    ///
    /// # Errors
    ///
    /// When QEMU does not start or the guest does not boot.
    pub fn start(artifacts: &Artifacts, folder: &Path, options: GuestOptions) -> Result<Self> {
        let mut guest = Self::launch(artifacts, folder, options)?;
        guest.connect()?;
        guest.wait_booted()?;
        Ok(guest)
    }

    /// Starts QEMU and waits for nothing. Call it from the thread that runs the test.
    ///
    /// # Errors
    ///
    /// When QEMU cannot be started.
    pub fn launch(artifacts: &Artifacts, folder: &Path, options: GuestOptions) -> Result<Self> {
        let accelerator = match options.counting {
            Some(_) => Accelerator::Tcg,
            None => Accelerator::detect(artifacts),
        };
        let files = Files::new(folder, &options.name);
        File::create(&files.swap)?.set_len(options.swap_mib << 20)?;
        File::create(&files.console)?;
        let (agent_listener, qmp_listener) = (listen(&files.agent)?, listen(&files.qmp)?);
        let mut command = Command::new(&artifacts.qemu);
        for folder in &artifacts.firmware {
            command.arg("-L").arg(folder);
        }
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        command.args(accelerator.arguments());
        add_machine(&mut command, &options);
        add_system(&mut command, artifacts, &files, &options)?;
        add_lines(&mut command, &files);
        add_devices(&mut command, &options);
        let counter_listener = add_counter(&mut command, artifacts, &files, &options)?;
        log::debug!("{command:?}");
        let process = Process::start("QEMU", command, &files.log)?;
        Ok(Self {
            options,
            accelerator,
            corpus: artifacts.corpus.clone(),
            console: Console::new(files.console),
            process: Mutex::new(process),
            agent_listener,
            qmp_listener,
            counter_listener,
            lines: None,
            written_before_swap: Mutex::new(0),
        })
    }

    /// Takes QEMU's connections. The monitor answers once every device is realized.
    ///
    /// # Errors
    ///
    /// When QEMU ends instead, or takes too long.
    pub fn connect(&mut self) -> Result<()> {
        let agent = self.accept(&self.agent_listener)?;
        let qmp = self.accept(&self.qmp_listener)?;
        let counter = match &self.counter_listener {
            Some(listener) => Some(Counter::new(self.accept(listener)?)?),
            None => None,
        };
        self.lines = Some(Lines {
            agent: Agent::new(agent)?,
            qmp: Mutex::new(Qmp::new(qmp)?),
            counter,
        });
        Ok(())
    }

    fn accept(&self, listener: &UnixListener) -> Result<UnixStream> {
        let until = Instant::now() + OPEN_LIMIT;
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    stream.set_nonblocking(false)?;
                    return Ok(stream);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.process().expect_running()?;
            ensure!(Instant::now() < until, "QEMU does not connect");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the program inside answers.
    ///
    /// # Errors
    ///
    /// When it does not in time.
    pub fn wait_booted(&self) -> Result<()> {
        self.agent()?.wait_ready(self.patient(BOOT_LIMIT))
    }

    /// A limit that is fair with KVM, made fair for the accelerator and kernel in use.
    #[must_use]
    pub fn patient(&self, limit: Duration) -> Duration {
        let slower = match self.options.kernel {
            Kernel::Plain => 1,
            Kernel::Debug => 4,
        };
        limit * self.accelerator.patience() * slower
    }

    /// The program inside.
    ///
    /// # Errors
    ///
    /// Before [`Guest::connect`].
    pub fn agent(&self) -> Result<&Agent> {
        let lines = self.lines.as_ref().context("the guest is not connected")?;
        Ok(&lines.agent)
    }

    /// QEMU's monitor.
    ///
    /// # Errors
    ///
    /// Before [`Guest::connect`].
    pub fn qmp(&self) -> Result<MutexGuard<'_, Qmp>> {
        let lines = self.lines.as_ref().context("the guest is not connected")?;
        Ok(lines.qmp.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// What counts the guest's instructions.
    ///
    /// # Errors
    ///
    /// When they are not counted, or before [`Guest::connect`].
    pub fn counter(&self) -> Result<&Counter> {
        let lines = self.lines.as_ref().context("the guest is not connected")?;
        let counter = lines.counter.as_ref();
        counter.context("the guest's instructions are not counted")
    }

    /// QEMU's process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// What the kernel printed.
    #[must_use]
    pub fn console(&self) -> &Console {
        &self.console
    }

    /// The data that the guest loads.
    #[must_use]
    pub fn corpus(&self) -> &Path {
        &self.corpus
    }

    /// How guest instructions are run.
    #[must_use]
    pub fn accelerator(&self) -> Accelerator {
        self.accelerator
    }

    /// How the guest was made.
    #[must_use]
    pub fn options(&self) -> &GuestOptions {
        &self.options
    }

    /// Runs a shell command that must succeed, and gives what it printed.
    ///
    /// # Errors
    ///
    /// When it fails or takes longer than a minute.
    pub fn shell(&self, command: &str) -> Result<String> {
        self.agent()?.shell(command)
    }

    /// Fails unless QEMU runs, its monitor says so, and the program inside answers.
    ///
    /// # Errors
    ///
    /// As it says.
    pub fn expect_alive(&self) -> Result<()> {
        self.process().expect_running()?;
        self.qmp()?.expect_running()?;
        self.agent()?.ping(self.patient(Duration::from_secs(15)))
    }

    /// Fails when QEMU has ended.
    ///
    /// # Errors
    ///
    /// As it says.
    pub fn expect_qemu_running(&self) -> Result<()> {
        self.process().expect_running()
    }

    /// Checks the guest once more and has QEMU quit: it must end well.
    ///
    /// # Errors
    ///
    /// When the guest is not alive, its kernel complained, or QEMU ends badly.
    pub fn finish(self) -> Result<()> {
        self.expect_alive()?;
        let splats = self.console.splats()?;
        if !splats.is_empty() {
            bail!("the kernel complained:\n{}", splats.join("\n"));
        }
        // QEMU may close the monitor before its answer is read.
        let _ = self.qmp()?.call("quit", serde_json::json!({}));
        let status = self.process().wait(QUIT_LIMIT)?;
        ensure!(status.success(), "QEMU ended with {status}");
        Ok(())
    }
}

/// The files of a guest.
struct Files {
    swap: PathBuf,
    console: PathBuf,
    log: PathBuf,
    agent: PathBuf,
    qmp: PathBuf,
    counter: PathBuf,
}

impl Files {
    fn new(folder: &Path, name: &str) -> Self {
        let path = |suffix: &str| folder.join(format!("{name}.{suffix}"));
        Self {
            swap: path("swap.img"),
            console: path("console.log"),
            log: path("qemu.log"),
            agent: path("agent.sock"),
            qmp: path("qmp.sock"),
            counter: path("counter.sock"),
        }
    }
}

/// A socket that QEMU connects to, so that nothing it says is lost before somebody listens.
fn listen(path: &Path) -> Result<UnixListener> {
    let listener =
        UnixListener::bind(path).with_context(|| format!("socket {}", path.display()))?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

fn add_machine(command: &mut Command, options: &GuestOptions) {
    let memory = options.memory_mib;
    let backend = format!("memory-backend-memfd,id=mem,size={memory}M,share=on");
    // Native PCIe hotplug: the guest's kernel has no ACPI hotplug.
    let native_hotplug = "ICH9-LPC.acpi-pci-hotplug-with-bridge-support=off";
    command
        .args(["-smp", &options.cpus.to_string()])
        .args(["-m", &format!("{memory}M")])
        .args(["-object", &backend])
        .args(["-machine", "q35,memory-backend=mem"])
        .args(["-global", native_hotplug]);
    if !options.reboots {
        command.arg("-no-reboot");
    }
}

/// Kernel and disks: /dev/vda the root, /dev/vdb for swap, /dev/vdc the corpus.
fn add_system(
    command: &mut Command,
    artifacts: &Artifacts,
    files: &Files,
    options: &GuestOptions,
) -> Result<()> {
    let (kernel, image) = match options.kernel {
        Kernel::Plain => (&artifacts.kernel, &artifacts.image),
        Kernel::Debug => artifacts
            .kernel_debug
            .as_ref()
            .zip(artifacts.image_debug.as_ref())
            .context("the debug kernel and its image were not built")?,
    };
    command.arg("-kernel").arg(kernel);
    command.args(["-append", &command_line(options)]);
    let read_only = "readonly=on";
    for (id, file, access) in [
        ("root", image, read_only),
        ("swap", &files.swap, "cache=unsafe,discard=unmap"),
        ("corpus", &artifacts.corpus, read_only),
    ] {
        let file = comma_escaped(file);
        let drive = format!("if=none,id={id},file={file},format=raw,{access}");
        command
            .args(["-drive", &drive])
            .args(["-device", &format!("virtio-blk-pci,drive={id}")]);
    }
    Ok(())
}

/// Console on the first serial line, agent on the second, monitor on a socket.
fn add_lines(command: &mut Command, files: &Files) {
    let chardev = |kind: &str, id: &str, path: &Path| {
        let path = comma_escaped(path);
        ["-chardev".to_owned(), format!("{kind},id={id},path={path}")]
    };
    command
        .args(chardev("file", "console", &files.console))
        .args(["-serial", "chardev:console"])
        .args(chardev("socket", "agent", &files.agent))
        .args(["-serial", "chardev:agent"])
        .args(chardev("socket", "qmp", &files.qmp))
        .args(["-mon", "chardev=qmp,mode=control"]);
}

fn add_devices(command: &mut Command, options: &GuestOptions) {
    if options.reports_free_pages {
        command.args(["-device", "virtio-balloon-pci,free-page-reporting=on"]);
    }
    let queues = options.queues;
    for (number, socket) in options.sockets.iter().enumerate() {
        let path = comma_escaped(socket);
        let chardev = format!("socket,id=cramchr{number},path={path},reconnect-ms=200");
        let mut device = format!(
            "vhost-user-cram-pci,id=cram{number},chardev=cramchr{number},num-queues={queues}"
        );
        command.args(["-chardev", &chardev]);
        if options.pluggable {
            let slot = number + 1;
            let port = format!("pcie-root-port,id=port{number},chassis={slot},slot={slot}");
            command.args(["-device", &port]);
            device.push_str(&format!(",bus=port{number}"));
        }
        command.args(["-device", &device]);
    }
    for (number, socket) in options.disk_sockets.iter().enumerate() {
        let path = comma_escaped(socket);
        command
            .args([
                "-chardev",
                &format!("socket,id=diskchr{number},path={path}"),
            ])
            .args([
                "-device",
                &format!("vhost-user-blk-pci,chardev=diskchr{number},num-queues=1"),
            ]);
    }
}

fn add_counter(
    command: &mut Command,
    artifacts: &Artifacts,
    files: &Files,
    options: &GuestOptions,
) -> Result<Option<UnixListener>> {
    let Some(counting) = options.counting else {
        return Ok(None);
    };
    let plugin = artifacts.plugin.as_ref();
    let plugin = plugin.context("the counting plugin was not built")?;
    let listener = listen(&files.counter)?;
    let argument = counter::argument(plugin, &files.counter, counting);
    command.args(["-plugin", &argument]);
    Ok(Some(listener))
}

fn command_line(options: &GuestOptions) -> String {
    let mut words = vec![
        "console=ttyS0 root=/dev/vda ro init=/init panic=-1 cram.agent",
        // The kernel counts timer interrupts for a moment and panics when there are too few, as there
        // are in an emulator that gets no processor just then.
        "no_timer_check",
    ];
    if options.pluggable {
        // The firmware's consent to native hotplug is not asked for, since a kernel without
        // extended configuration space would not get it.
        words.push("pcie_ports=native");
    }
    let order = format!("page_reporting.page_reporting_order={REPORTING_ORDER}");
    if options.reports_free_pages {
        words.push(&order);
    }
    words.extend(options.words.iter().map(String::as_str));
    words.join(" ")
}

/// A path as a value in QEMU's option lists, where a comma is written twice.
fn comma_escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}
