// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What somebody would do who took the daemon over, tried in a process that is confined as it is.

use std::ffi::CString;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process;
use std::ptr::{null, null_mut};

use libc::{c_int, c_long};
use rustix::io::Errno;
use vhost_device_cram::first_touch::Allowance;
use vhost_device_cram::sandbox::confine;
use vhost_device_cram::sandbox::landlock::Level;
use vhost_device_cram::sandbox::seccomp::Reaction;
use vhost_device_cram::server::{Options, Ready};
use vhost_device_cram::sigbus::{Fate, Loss, watch};

use crate::child::{self, options, refused};

/// A system call with any arguments.
fn call(number: c_long, arguments: [usize; 5]) -> io::Result<usize> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: of the calls that are tried here, those that would do harm are forbidden; that they
    // are is what is tested, and a child has nothing to lose.
    match unsafe { libc::syscall(number, a, b, c, d, e) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(usize::try_from(result).unwrap_or_default()),
    }
}

fn bits(value: c_int) -> usize {
    usize::try_from(value).unwrap()
}

/// A path for the kernel; it stays for as long as the child lives.
fn path(text: &str) -> usize {
    CString::new(text).unwrap().into_raw() as usize
}

fn with_path(number: c_long, text: &str) -> io::Result<usize> {
    call(number, [path(text), 0, 0, 0, 0])
}

/// Confines this process as the daemon does.
fn locked(folder: &Path, reaction: Reaction) -> Ready {
    let options = options(folder);
    let ready = Ready::new(&options).unwrap();
    confine(&options, reaction).unwrap();
    ready
}

fn own_pid() -> usize {
    usize::try_from(process::id()).unwrap()
}

#[test]
fn nothing_is_executed_and_no_process_made_or_touched() {
    let ended = child::run(
        "forbidden::nothing_is_executed_and_no_process_made_or_touched",
        |folder| {
            let parent = usize::try_from(std::os::unix::process::parent_id()).unwrap();
            let _ready = locked(folder, Reaction::Refuse);
            let denied = |what: &str, result| refused(what, result, Errno::PERM);
            denied("execve", with_path(libc::SYS_execve, "/bin/true"));
            let at = [bits(-libc::AT_FDCWD), path("/bin/true"), 0, 0, 0];
            denied("execveat", call(libc::SYS_execveat, at));
            // SAFETY: a child that should not be there ends at once.
            let forked = match unsafe { libc::fork() } {
                -1 => Err(io::Error::last_os_error()),
                // SAFETY: as above.
                0 => unsafe { libc::_exit(0) },
                _ => Ok(()),
            };
            refused("fork", forked, Errno::PERM);
            let spawned = process::Command::new("/bin/true").spawn();
            refused("posix_spawn", spawned, Errno::PERM);
            // As if it did not exist: C libraries then take another one.
            let cloned = call(libc::SYS_clone3, [0; 5]);
            refused("clone3", cloned, Errno::NOSYS);
            let space = bits(libc::CLONE_NEWUSER);
            denied("a name space", call(libc::SYS_unshare, [space, 0, 0, 0, 0]));
            let traced = [
                bits(libc::PTRACE_ATTACH.try_into().unwrap()),
                parent,
                0,
                0,
                0,
            ];
            denied("ptrace", call(libc::SYS_ptrace, traced));
            denied(
                "reading memory",
                call(libc::SYS_process_vm_readv, [parent, 0, 0, 0, 0]),
            );
            denied(
                "writing memory",
                call(libc::SYS_process_vm_writev, [parent, 0, 0, 0, 0]),
            );
            denied(
                "a descriptor",
                call(libc::SYS_pidfd_open, [parent, 0, 0, 0, 0]),
            );
            denied("kill", call(libc::SYS_kill, [parent, 0, 0, 0, 0]));
            denied("tgkill", call(libc::SYS_tgkill, [parent, parent, 0, 0, 0]));
            let [which, nice] = [bits(0), 5];
            denied(
                "nice",
                call(libc::SYS_setpriority, [which, parent, nice, 0, 0]),
            );
        },
    );
    ended.expect_done();
}

#[test]
fn no_memory_is_executable() {
    let ended = child::run("forbidden::no_memory_is_executable", |folder| {
        let _ready = locked(folder, Reaction::Refuse);
        let map = |protection| {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            // SAFETY: a new mapping, at a place that the kernel chooses.
            match unsafe { libc::mmap(null_mut(), 4096, protection, flags, -1, 0) } {
                libc::MAP_FAILED => Err(io::Error::last_os_error()),
                address => Ok(address as usize),
            }
        };
        let all = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        refused("mmap", map(all), Errno::PERM);
        let page = map(libc::PROT_READ | libc::PROT_WRITE).unwrap();
        for protection in [all, libc::PROT_EXEC] {
            let result = call(libc::SYS_mprotect, [page, 4096, bits(protection), 0, 0]);
            refused("mprotect", result, Errno::PERM);
        }
        let key = [page, 4096, bits(libc::PROT_EXEC), 0, 0];
        refused(
            "pkey_mprotect",
            call(libc::SYS_pkey_mprotect, key),
            Errno::PERM,
        );
        let persona = [0x0040_0000, 0, 0, 0, 0];
        refused(
            "READ_IMPLIES_EXEC",
            call(libc::SYS_personality, persona),
            Errno::PERM,
        );
        let poison = [page, 4096, bits(libc::MADV_HWPOISON), 0, 0];
        refused("poison", call(libc::SYS_madvise, poison), Errno::PERM);
    });
    ended.expect_done();
}

#[test]
fn there_is_no_network_and_no_way_around() {
    let ended = child::run(
        "forbidden::there_is_no_network_and_no_way_around",
        |folder| {
            // Who cannot be asked to add a guest makes no socket.
            let options = Options {
                control_socket: None,
                ..options(folder)
            };
            let _ready = Ready::new(&options).unwrap();
            confine(&options, Reaction::Refuse).unwrap();
            let denied = |what: &str, result| refused(what, result, Errno::PERM);
            let stream = bits(libc::SOCK_STREAM);
            for family in [
                libc::AF_INET,
                libc::AF_INET6,
                libc::AF_NETLINK,
                libc::AF_VSOCK,
            ] {
                denied(
                    "a socket",
                    call(libc::SYS_socket, [bits(family), stream, 0, 0, 0]),
                );
            }
            let local = bits(libc::AF_UNIX);
            for kind in [
                libc::SOCK_STREAM,
                libc::SOCK_DGRAM,
                libc::SOCK_SEQPACKET,
                libc::SOCK_RAW,
            ] {
                denied(
                    "a local socket",
                    call(libc::SYS_socket, [local, bits(kind), 0, 0, 0]),
                );
            }
            denied("connecting", call(libc::SYS_connect, [0; 5]));
            denied("listening", call(libc::SYS_listen, [0; 5]));
            denied(
                "a pair",
                call(libc::SYS_socketpair, [local, stream, 0, 0, 0]),
            );
            denied("io_uring", call(libc::SYS_io_uring_setup, [8, 0, 0, 0, 0]));
            denied("bpf", call(libc::SYS_bpf, [0; 5]));
            denied("userfaultfd", call(libc::SYS_userfaultfd, [0; 5]));
            denied("perf", call(libc::SYS_perf_event_open, [0; 5]));
            denied("keys", call(libc::SYS_keyctl, [0; 5]));
            denied("ioctl", call(libc::SYS_ioctl, [0; 5]));
            denied("a memory file", with_path(libc::SYS_memfd_create, "x"));
            denied(
                "dumpable",
                call(libc::SYS_prctl, [bits(libc::PR_SET_DUMPABLE), 1, 0, 0, 0]),
            );
            denied("a filter", call(libc::SYS_seccomp, [1, 0, 0, 0, 0]));
            denied("setuid", call(libc::SYS_setuid, [1, 0, 0, 0, 0]));
            denied("limits", call(libc::SYS_prlimit64, [own_pid(), 4, 0, 0, 0]));
            let owner = [0, bits(libc::F_SETOWN), own_pid(), 0, 0];
            denied("signals of descriptors", call(libc::SYS_fcntl, owner));
            let buffer = [0, bits(libc::SOL_SOCKET), bits(libc::SO_RCVBUF), 0, 0];
            denied("other options", call(libc::SYS_setsockopt, buffer));
            denied(
                "a longer file",
                call(libc::SYS_fallocate, [0, 0, 0, 4096, 0]),
            );
            denied("a shorter file", call(libc::SYS_ftruncate, [0; 5]));
            // Calls of the same kernel by other numbers: those of x32 have a bit set.
            #[cfg(target_arch = "x86_64")]
            {
                let other = 0x4000_0000 | libc::SYS_getpid;
                denied("x32", call(other, [0; 5]));
            }
        },
    );
    ended.expect_done();
}

#[test]
fn no_file_is_opened_made_or_removed() {
    let ended = child::run("forbidden::no_file_is_opened_made_or_removed", |folder| {
        let inside = folder.join("guests/file");
        let outside = folder.join("file");
        // Abstract, and not of the daemon.
        let name = format!("cram-test-{}", process::id());
        let address = {
            use std::os::linux::net::SocketAddrExt;
            std::os::unix::net::SocketAddr::from_abstract_name(&name).unwrap()
        };
        let other = UnixListener::bind_addr(&address).unwrap();
        std::fs::write(&outside, "x").unwrap();
        let options = options(folder);
        let _ready = Ready::new(&options).unwrap();
        std::fs::write(&inside, "x").unwrap();
        std::fs::write(folder.join("control/file"), "x").unwrap();
        let confinement = confine(&options, Reaction::Refuse).unwrap();

        for place in [
            Path::new("/etc/passwd"),
            Path::new("/proc/self/mem"),
            &inside,
            folder,
        ] {
            refused("reading", std::fs::File::open(place), Errno::PERM);
        }
        for place in [&inside, &folder.join("guests/new")] {
            refused("writing", std::fs::write(place, "y"), Errno::PERM);
        }
        let at = |name| path(folder.join("guests").join(name).to_str().unwrap());
        for (what, number) in [
            ("mkdirat", libc::SYS_mkdirat),
            ("mknodat", libc::SYS_mknodat),
            ("fchmodat", libc::SYS_fchmodat),
            ("fchownat", libc::SYS_fchownat),
            ("openat2", libc::SYS_openat2),
        ] {
            let result = call(number, [bits(-libc::AT_FDCWD), at("new"), 0, 0, 0]);
            refused(what, result, Errno::PERM);
        }
        let moved = std::fs::rename(&inside, folder.join("guests/moved"));
        refused("rename", moved, Errno::PERM);
        refused(
            "link",
            std::fs::hard_link(&inside, folder.join("guests/new")),
            Errno::PERM,
        );
        refused("chdir", std::env::set_current_dir("/"), Errno::PERM);
        refused("listing", std::fs::read_dir(folder), Errno::PERM);
        for call in [libc::SYS_mount, libc::SYS_chroot, libc::SYS_truncate] {
            refused("mount, chroot, truncate", with_path(call, "/"), Errno::PERM);
        }

        // The rest is landlock's.
        let Level::Abi(_) = confinement.landlock else {
            println!("this kernel has no landlock: sockets were not tried");
            return;
        };
        refused("removing", std::fs::remove_file(&outside), Errno::ACCESS);
        for place in [folder.join("new.sock"), folder.join("control/new.sock")] {
            refused("a socket", UnixListener::bind(place), Errno::ACCESS);
        }
        std::fs::remove_file(&inside).unwrap();
        std::fs::remove_file(folder.join("control/file")).unwrap();
        refused(
            "abstract sockets",
            UnixStream::connect_addr(&address),
            Errno::PERM,
        );
        drop(other);
    });
    ended.expect_done();
}

/// Guests can be added: local sockets of streams are listened on, in their folders, and no others.
#[test]
fn sockets_of_guests_are_all_that_is_made() {
    let name = "forbidden::sockets_of_guests_are_all_that_is_made";
    let ended = child::run(name, |folder| {
        let _ready = locked(folder, Reaction::Refuse);
        let denied = |what: &str, result| refused(what, result, Errno::PERM);
        let close = libc::SOCK_CLOEXEC;
        for (family, kind) in [
            (libc::AF_INET, libc::SOCK_STREAM | close),
            (libc::AF_INET6, libc::SOCK_STREAM | close),
            (libc::AF_NETLINK, libc::SOCK_RAW | close),
            (libc::AF_VSOCK, libc::SOCK_STREAM | close),
            (libc::AF_UNIX, libc::SOCK_DGRAM | close),
            (libc::AF_UNIX, libc::SOCK_SEQPACKET | close),
            (libc::AF_UNIX, libc::SOCK_STREAM),
        ] {
            let result = call(libc::SYS_socket, [bits(family), bits(kind), 0, 0, 0]);
            denied("a socket of another kind", result);
        }
        denied("connecting", call(libc::SYS_connect, [0; 5]));
        let made = UnixListener::bind(folder.join("guests/new.sock")).unwrap();
        drop(made);
        std::fs::remove_file(folder.join("guests/new.sock")).unwrap();
    });
    ended.expect_done();
}

/// What the daemon and its libraries do need, beyond what its life shows.
#[test]
fn what_is_needed_can_be_done() {
    let ended = child::run("forbidden::what_is_needed_can_be_done", |folder| {
        let (near, far) = UnixStream::pair().unwrap();
        let ready = locked(folder, Reaction::Refuse);
        let socket = folder.join("guests/vm1.sock");
        far.set_read_timeout(Some(std::time::Duration::from_millis(1)))
            .unwrap();
        refused("reading", io::Read::read(&mut &far, &mut [0]), Errno::AGAIN);
        drop((near, far.try_clone().unwrap()));
        assert!(far.as_raw_fd() > 2);
        // Large and small memory from many threads: the allocator maps, grows, shrinks and unmaps.
        let threads: Vec<_> = (0..16)
            .map(|number: usize| {
                std::thread::spawn(move || {
                    let mut vectors: Vec<Vec<usize>> = Vec::new();
                    for size in 0..200 {
                        let mut vector = vec![number; size * 1000];
                        vector.extend(0..size * 500);
                        vectors.push(vector);
                        if size % 3 == 0 {
                            vectors.swap_remove(size / 7);
                        }
                    }
                    vectors.iter().map(Vec::len).sum::<usize>()
                })
            })
            .collect();
        for thread in threads {
            assert!(thread.join().unwrap() > 0);
        }
        // A thread that panics ends alone, with a backtrace asked for.
        assert!(std::thread::spawn(|| panic!("on purpose")).join().is_err());
        // New hash tables, time, sleep.
        let table: std::collections::HashSet<u32> = [1, 2].into();
        assert_eq!(table.len(), 2);
        std::thread::sleep(std::time::Duration::from_millis(1));
        // A handler for what another process does to shared memory.
        vmm_sys_util::signal::register_signal_handler(libc::SIGBUS, nothing).unwrap();
        // SAFETY: the signal is handled.
        assert_eq!(unsafe { libc::raise(libc::SIGBUS) }, 0);
        // And to put other memory in its place.
        let page = call_map(null(), libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        let again = call_map(
            page,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
        );
        assert_eq!(page, again);
        // The daemon runs, and ends.
        ready.run().unwrap().stop();
        assert!(!std::fs::exists(&socket).unwrap());
    });
    ended.expect_done();
    assert!(ended.text.contains("on purpose"), "{}", ended.text);
}

extern "C" fn nothing(_: c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

fn call_map(at: *const libc::c_void, flags: c_int) -> *const libc::c_void {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    // SAFETY: anonymous memory, at a free place or in that of a page that nobody uses.
    let page = unsafe { libc::mmap(at.cast_mut(), 4096, protection, flags, -1, 0) };
    assert_ne!(page, libc::MAP_FAILED);
    page
}

/// Guests' memory may go away; what is gone anywhere else ends the process, rather than be zeroes.
#[test]
fn memory_that_is_no_guests_is_not_replaced() {
    let name = "forbidden::memory_that_is_no_guests_is_not_replaced";
    let ended = child::run(name, |folder| {
        let path = folder.join("memory");
        std::fs::write(&path, [1; 4096]).unwrap();
        let file = std::fs::File::options().read(true).write(true).open(&path);
        let file = file.unwrap();
        let map = || {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let (flags, fd) = (libc::MAP_SHARED, file.as_raw_fd());
            // SAFETY: a new mapping, at a place that the kernel chooses.
            let at = unsafe { libc::mmap(null_mut(), 4096, protection, flags, fd, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            at.cast::<u8>()
        };
        let (guests, ours) = (map(), map());
        let fate = std::sync::Arc::<Fate>::default();
        let begin = guests as usize;
        let watch = watch(begin..begin + 4096, &fate).unwrap();
        file.set_len(0).unwrap();
        // SAFETY: it is mapped, and what is gone there is replaced.
        assert_eq!(unsafe { guests.read_volatile() }, 0);
        assert_eq!(fate.loss(), Some(Loss::Gone));
        drop(watch);
        println!("the guest's is replaced");
        // SAFETY: it is mapped; the process ends here.
        assert_eq!(unsafe { ours.read_volatile() }, 0);
        println!("and ours, too");
    });
    assert_eq!(ended.signal, Some(libc::SIGBUS), "{}", ended.text);
    assert!(
        ended.text.contains("the guest's is replaced"),
        "{}",
        ended.text
    );
    assert!(!ended.text.contains("and ours"), "{}", ended.text);
}

/// That takes calls which nobody else has, and which strangers to the daemon cannot make.
#[test]
fn first_touches_are_metered_by_a_confined_process() {
    let name = "forbidden::first_touches_are_metered_by_a_confined_process";
    let ended = child::run(name, |folder| {
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, 8192).unwrap();
        let (protection, fd) = (libc::PROT_READ | libc::PROT_WRITE, file.as_raw_fd());
        // SAFETY: a new mapping, at a place that the kernel chooses.
        let at = unsafe { libc::mmap(null_mut(), 8192, protection, libc::MAP_SHARED, fd, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let at = at.cast::<u8>();
        let _ready = locked(folder, Reaction::Kill);
        let allowance = std::sync::Arc::new(Allowance::new(4096));
        let fate = std::sync::Arc::new(Fate::with_allowance(allowance.clone()));
        let begin = at as usize;
        let _watch = watch(begin..begin + 8192, &fate).unwrap();
        // SAFETY: it is mapped, and nobody else has it.
        unsafe { at.write_volatile(1) };
        assert_eq!((allowance.touched_bytes(), fate.loss()), (4096, None));
        // SAFETY: it is mapped, and nobody else has it.
        unsafe { at.wrapping_add(4096).write_volatile(1) };
        assert_eq!(fate.loss(), Some(Loss::Overdrawn));
        assert_eq!(allowance.touched_bytes(), 4096);
    });
    ended.expect_done();
}

/// `abort` is how the standard library ends a process that cannot go on; it must not hang.
#[test]
fn a_process_can_abort() {
    let ended = child::run("forbidden::a_process_can_abort", |folder| {
        let _ready = locked(folder, Reaction::Refuse);
        process::abort();
    });
    assert_eq!(ended.signal, Some(libc::SIGABRT), "{}", ended.text);
}

/// The strict reaction, upon which the test of a whole life relies.
#[test]
fn strict_is_deadly_but_for_what_libraries_try() {
    let name = "forbidden::strict_is_deadly_but_for_what_libraries_try";
    let ended = child::run(name, |folder| {
        let _ready = locked(folder, Reaction::Kill);
        refused("reading", std::fs::File::open("/etc/passwd"), Errno::PERM);
        refused("clone3", call(libc::SYS_clone3, [0; 5]), Errno::NOSYS);
        println!("still alive");
        let _ = with_path(libc::SYS_chdir, "/");
        println!("and after that");
    });
    assert_eq!(ended.signal, Some(libc::SIGSYS), "{}", ended.text);
    assert!(ended.text.contains("still alive") && !ended.text.contains("after that"));
}

/// Landlock is not laid on threads that run already: there must be none.
#[test]
fn nothing_runs_yet_when_the_process_is_confined() {
    let name = "forbidden::nothing_runs_yet_when_the_process_is_confined";
    let ended = child::run(name, |folder| {
        let threads = || std::fs::read_dir("/proc/self/task").unwrap().count();
        let before = threads();
        let ready = Ready::new(&options(folder)).unwrap();
        assert_eq!(threads(), before);
        let daemon = ready.run().unwrap();
        assert!(threads() >= before + 4);
        daemon.stop();
    });
    ended.expect_done();
}
