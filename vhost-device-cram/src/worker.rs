// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The threads of a connection: they wait to be woken, have the device serve its rings, and end when
//! the connection does.
//!
//! Not `vhost_user_backend`'s own workers, since those end, and say nothing, when a read of a kick
//! fails; a front-end can bring that about.
//!
//! What wakes them, the driver's kicks and a bell of ours, is waited for by edges and never read: each
//! write to an eventfd is one, whoever else reads it. A front-end can neither make a worker wait for
//! a descriptor, nor take a kick from it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use rustix::event::{EventfdFlags, eventfd};
use vhost_user_backend::VhostUserBackend;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::signal::register_signal_handler;

use crate::device::Device;

/// How long a thread may take to end before it is interrupted, again and again.
const INTERRUPT_AFTER: Duration = Duration::from_millis(20);
/// The signal that interrupts. What it interrupts fails with EINTR.
const INTERRUPT: i32 = libc::SIGUSR2;

/// What wakes a worker.
#[derive(Debug)]
pub struct Wakers {
    epoll: Epoll,
    /// Rung to end the worker, or to have it look at its rings.
    bell: OwnedFd,
}

impl Wakers {
    /// A bell, and nothing else yet.
    ///
    /// # Errors
    /// When there are no descriptors left.
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let wakers = Wakers { epoll, bell };
        wakers.add(&wakers.bell)?;
        Ok(wakers)
    }

    /// Wakes the worker.
    pub fn ring(&self) {
        // It fails only when the counter is full, after more rings than there will ever be.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    /// Is woken by this descriptor, too, from now on.
    ///
    /// # Errors
    /// When nobody can be woken by it.
    pub fn add(&self, fd: &(impl AsRawFd + ?Sized)) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, 0);
        self.epoll.ctl(ControlOperation::Add, fd.as_raw_fd(), event)
    }

    /// Is no longer woken by it.
    pub fn remove(&self, fd: &(impl AsRawFd + ?Sized)) {
        let event = EpollEvent::default();
        // It fails only when it was not there.
        let _ = self
            .epoll
            .ctl(ControlOperation::Delete, fd.as_raw_fd(), event);
    }

    /// Waits to be woken, and says what there was of.
    fn wait(&self) -> EventSet {
        let mut events = [EpollEvent::default()];
        // Whatever woke it: all rings are looked at.
        let interrupted = |found: &io::Result<usize>| {
            let error = found.as_ref().err();
            error.is_some_and(|error| error.kind() == io::ErrorKind::Interrupted)
        };
        while interrupted(&self.epoll.wait(-1, &mut events)) {}
        let [event] = events;
        event.event_set()
    }
}

/// The running workers of a connection. Dropping them ends them.
pub struct Workers {
    device: Arc<Device>,
    running: Arc<Running>,
    /// By the worker's number, once it runs.
    threads: Vec<Option<JoinHandle<()>>>,
}

/// Which threads have not ended.
#[derive(Default)]
struct Running {
    threads: Mutex<Vec<i32>>,
    one_ended: Condvar,
}

/// Says that the calling thread runs, for as long as it lives.
struct Registered<'a> {
    running: &'a Running,
    thread: i32,
}

impl Running {
    fn register(&self) -> Registered<'_> {
        let thread = rustix::thread::gettid().as_raw_pid();
        self.threads.lock().push(thread);
        Registered {
            running: self,
            thread,
        }
    }

    /// Waits until all have ended; interrupts those that do not.
    fn wait_ended(&self) {
        let mut threads = self.threads.lock();
        while !threads.is_empty() {
            if self
                .one_ended
                .wait_for(&mut threads, INTERRUPT_AFTER)
                .timed_out()
            {
                // The list is locked: none of them ends now, so the numbers are theirs.
                threads.iter().copied().for_each(interrupt);
            }
        }
    }
}

impl Drop for Registered<'_> {
    fn drop(&mut self) {
        self.running
            .threads
            .lock()
            .retain(|thread| *thread != self.thread);
        self.running.one_ended.notify_all();
    }
}

impl Workers {
    /// The workers of `device`: that of events, and the others when they are needed.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start(device: &Arc<Device>) -> io::Result<Self> {
        take_interrupts()?;
        let mut workers = Workers {
            device: Arc::clone(device),
            running: Arc::default(),
            threads: (0..device.queues_per_thread().len())
                .map(|_| None)
                .collect(),
        };
        workers.start_needed()?;
        Ok(workers)
    }

    /// Starts those of which a queue was started in the meantime.
    ///
    /// # Errors
    /// When there are no threads left.
    pub fn start_needed(&mut self) -> io::Result<()> {
        for (number, slot) in self.threads.iter_mut().enumerate() {
            if slot.is_some() || self.device.wakers(number).is_none() {
                continue;
            }
            let (device, running) = (Arc::clone(&self.device), Arc::clone(&self.running));
            let (ready, is_ready) = std::sync::mpsc::sync_channel(1);
            let work = move || {
                let _registered = running.register();
                let _ = ready.send(());
                run(&device, number);
            };
            let thread = thread::Builder::new().name("worker".to_owned());
            *slot = Some(thread.spawn(work)?);
            // Registered before anybody can wait for its end.
            let _ = is_ready.recv();
        }
        Ok(())
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.device.close();
        self.running.wait_ended();
        for thread in self.threads.drain(..).flatten() {
            if thread.join().is_err() {
                log::error!("a worker could not even end");
            }
        }
    }
}

fn run(device: &Device, number: usize) {
    guard(device, || {
        while let Some(wakers) = device.wakers(number) {
            let woken_by = wakers.wait();
            if device.is_closing() {
                break;
            }
            if let Err(error) = device.handle_event(0, woken_by, &[], number) {
                log::error!("a worker cannot serve: {error}");
                device.fail("a worker cannot serve");
            }
        }
    });
}

/// Ends the connection when the work panics, which is a defect of ours: a connection that lacks a
/// worker would hang its guest; one that ends is seen, and begun anew.
fn guard(device: &Device, work: impl FnOnce()) {
    if catch_unwind(AssertUnwindSafe(work)).is_err() {
        device.fail("a worker panicked");
    }
}

extern "C" fn on_interrupt(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

/// Has the signal interrupt, and do nothing else.
fn take_interrupts() -> io::Result<()> {
    static TAKEN: OnceLock<Result<(), i32>> = OnceLock::new();
    let take = || register_signal_handler(INTERRUPT, on_interrupt).map_err(|e| e.errno());
    TAKEN
        .get_or_init(take)
        .map_err(io::Error::from_raw_os_error)
}

#[allow(unsafe_code)]
fn interrupt(thread: i32) {
    let process = rustix::process::getpid().as_raw_pid();
    // SAFETY: the call takes numbers only. The signal is handled, and a thread that has ended is none.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, INTERRUPT) };
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::device::tests::device;

    #[test]
    fn a_worker_that_panics_ends_the_connection() {
        let device = device(2, 16);
        let workers = Workers::start(&device).unwrap();
        guard(&device, || panic!("on purpose"));
        let mut over = [PollFd::from_borrowed_fd(device.over(), PollFlags::IN)];
        assert_eq!(poll(&mut over, None), Ok(1));
        assert_eq!(device.failure(), Some("a worker panicked"));
        assert!(device.is_closing());
        drop(workers);
    }

    #[test]
    fn a_worker_that_waits_in_the_kernel_is_interrupted() {
        let device = device(2, 16);
        take_interrupts().unwrap();
        let running = Arc::new(Running::default());
        let full = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rustix::io::write(&full, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        let (ready, is_ready) = std::sync::mpsc::channel();
        let thread = thread::spawn({
            let running = Arc::clone(&running);
            move || {
                let _registered = running.register();
                ready.send(()).unwrap();
                rustix::io::write(&full, &1u64.to_ne_bytes())
            }
        });
        is_ready.recv().unwrap();
        running.wait_ended();
        assert_eq!(thread.join().unwrap(), Err(rustix::io::Errno::INTR));
        drop(device);
    }
}
