//! A child that is stopped after every instruction. Whenever the arena has changed, a copy of it is
//! opened, as it would be if the child were killed there.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use nix::sys::ptrace;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::fs::{SeekFrom, seek};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::board::Board;
use crate::verify;

/// The process that is stepped through. It ends with this.
struct Stepped(Pid);

impl Stepped {
    fn start(folder: &Path) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("--stepped-child").arg(folder);
        // SAFETY: between fork and exec only a system call is made.
        unsafe {
            command.pre_exec(|| ptrace::traceme().map_err(std::io::Error::from));
        }
        #[allow(
            clippy::zombie_processes,
            reason = "waited for by its number, in `drop`"
        )]
        let child = command.spawn().unwrap();
        let child = Self(Pid::from_raw(child.id() as i32));
        assert_eq!(child.wait(), WaitStatus::Stopped(child.0, Signal::SIGTRAP));
        ptrace::setoptions(child.0, ptrace::Options::PTRACE_O_EXITKILL).unwrap();
        // To where the script begins.
        ptrace::cont(child.0, None).unwrap();
        assert_eq!(child.wait(), WaitStatus::Stopped(child.0, Signal::SIGSTOP));
        child
    }

    fn wait(&self) -> WaitStatus {
        waitpid(self.0, None).unwrap()
    }

    /// One instruction. False when the script is over.
    fn step(&self) -> bool {
        ptrace::step(self.0, None).unwrap();
        match self.wait() {
            WaitStatus::Stopped(_, Signal::SIGTRAP) => true,
            WaitStatus::Stopped(_, Signal::SIGSTOP) => false,
            other => panic!("the child did not go on: {other:?}"),
        }
    }
}

impl Drop for Stepped {
    fn drop(&mut self) {
        let _ = ptrace::kill(self.0);
        let _ = waitpid(self.0, None);
    }
}

/// What a file has that is not a hole: pieces, by where they are.
type Pieces = Vec<(u64, Vec<u8>)>;

/// Reads a file's pieces into memory that is used again and again.
fn read_pieces(file: &File, pieces: &mut Pieces) {
    let (mut at, mut count) = (0, 0);
    while let Ok(start) = seek(file, SeekFrom::Data(at)) {
        at = seek(file, SeekFrom::Hole(start)).unwrap();
        if pieces.len() == count {
            pieces.push((0, Vec::new()));
        }
        let (place, bytes) = &mut pieces[count];
        *place = start;
        bytes.resize((at - start) as usize, 0);
        file.read_exact_at(bytes, start).unwrap();
        count += 1;
    }
    pieces.truncate(count);
}

/// Has this thread and the processes that it starts share one processor: a step is then a switch on
/// the spot, and not a call to another processor that has to wake up first.
fn share_a_processor() {
    let mut one = CpuSet::new();
    let all = sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|cpu| all.is_set(*cpu)).unwrap();
    one.set(first);
    sched_setaffinity(None, &one).unwrap();
}

pub fn every_instruction() {
    share_a_processor();
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let copy = tempfile::tempdir_in("/dev/shm").unwrap();
    for folder in [&folder, &copy] {
        File::create(folder.path().join("small")).unwrap();
    }
    let board = folder.path().join("board");
    Board::make(&board);
    let child = Stepped::start(folder.path());
    let (mut pieces, mut last) = (Pieces::new(), Pieces::new());
    let mut file = None;
    let (mut steps, mut states) = (0_u64, 0_u64);
    let arena = folder.path().join("arena");
    while child.step() {
        steps += 1;
        if file.is_none() {
            file = File::open(&arena).ok();
        }
        let Some(file) = &file else { continue };
        read_pieces(file, &mut pieces);
        if pieces == last {
            continue;
        }
        last.clone_from(&pieces);
        states += 1;
        fs::copy(&board, copy.path().join("board")).unwrap();
        write_pieces(&pieces, file, &copy.path().join("arena"));
        let copied = Board::open(&copy.path().join("board"));
        verify(copy.path(), &copied, &format!("instruction {steps}"));
    }
    println!("{steps} instructions, {states} states of the arena opened and verified");
    assert!(states > 1000, "it tested nothing");
}

/// Makes a file with the same pieces and holes.
fn write_pieces(pieces: &Pieces, like: &File, to: &Path) {
    let file = File::create(to).unwrap();
    file.set_len(like.metadata().unwrap().len()).unwrap();
    for (at, bytes) in pieces {
        file.write_all_at(bytes, *at).unwrap();
    }
}
