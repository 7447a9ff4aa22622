// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which system calls the daemon can still make.
//!
//! A call that is not on the list fails with EPERM. It would be usual to kill the process for it,
//! but then a new version of the C library, with a call that this list does not know, ends the
//! daemon and takes the pages of all guests with it: the worst that can happen here. Whoever took
//! the daemon over gets nothing from an error either. Tests kill ([`Reaction::Kill`]), so that a
//! call that is missing here is seen.
//!
//! The list is what the daemon, the standard library and the C library (glibc's or musl's) do on
//! the way from [`Ready::run`](crate::server::Ready::run) to the end of the process. The kernel
//! remembers which calls are allowed whatever their arguments are, and does not run a filter for
//! them; so what is called for each request has no condition.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, apply_filter_all_threads,
};

use crate::first_touch;

/// Calls that are allowed whatever their arguments are.
#[rustfmt::skip]
const PLAIN: &[c_long] = &[
    // Requests: bells, interrupts, messages, locks.
    libc::SYS_read, libc::SYS_write, libc::SYS_writev, libc::SYS_close,
    libc::SYS_recvfrom, libc::SYS_recvmsg, libc::SYS_sendto, libc::SYS_sendmsg,
    libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait, libc::SYS_ppoll,
    libc::SYS_eventfd2, libc::SYS_futex, libc::SYS_sched_yield,
    // Connections: accepted, never made.
    libc::SYS_accept4, libc::SYS_shutdown, libc::SYS_getsockopt,
    // What kind a descriptor is; and the end of all sockets: landlock says where.
    libc::SYS_statx, libc::SYS_newfstatat, libc::SYS_unlinkat,
    // Memory. How it comes is restricted below.
    libc::SYS_munmap, libc::SYS_mremap, libc::SYS_brk,
    // An arena that is closed is on its disk first.
    libc::SYS_msync,
    // Time.
    libc::SYS_clock_gettime, libc::SYS_clock_nanosleep, libc::SYS_nanosleep,
    // A call that a stop signal (or a debugger) interrupted goes on with this one.
    libc::SYS_restart_syscall,
    // Threads: they begin, say who they are, and end.
    libc::SYS_set_robust_list, libc::SYS_rseq, libc::SYS_sigaltstack, libc::SYS_gettid,
    libc::SYS_getpid, libc::SYS_sched_getaffinity, libc::SYS_exit, libc::SYS_exit_group,
    // Signals: waited for, and handled.
    libc::SYS_rt_sigprocmask, libc::SYS_rt_sigaction, libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    // Seeds of hash tables.
    libc::SYS_getrandom,
    // What the other filters answer, or let pass.
    libc::SYS_clone3, libc::SYS_openat,
];

/// Older forms of some of the above, where the architecture still has them.
#[cfg(target_arch = "x86_64")]
const PLAIN_OLD: &[c_long] = &[
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_unlink,
    libc::SYS_open,
];
#[cfg(not(target_arch = "x86_64"))]
const PLAIN_OLD: &[c_long] = &[];

/// What a thread must share with us, so that a new process is none.
const THREAD: u64 = flags(libc::CLONE_VM | libc::CLONE_SIGHAND | libc::CLONE_THREAD);
/// What it may be made with besides; all else is refused, the new name spaces for instance.
const THREAD_MAY: u64 = flags(
    libc::CLONE_FS
        | libc::CLONE_FILES
        | libc::CLONE_SYSVSEM
        | libc::CLONE_SETTLS
        | libc::CLONE_PARENT_SETTID
        | libc::CLONE_CHILD_SETTID
        | libc::CLONE_CHILD_CLEARTID
        | libc::CLONE_DETACHED,
);
/// Priorities of a thread. (In the `libc` crate its type depends on the C library.)
const PRIO_PROCESS: u64 = 0;

/// The bits of an argument of type `int`.
#[allow(clippy::cast_sign_loss, reason = "it is the bits that count")]
const fn flags(value: i32) -> u64 {
    value as u32 as u64
}

/// What a call meets that is not on the list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reaction {
    /// It fails with EPERM.
    Refuse,
    /// The process is killed with SIGSYS.
    Kill,
}

/// Filters the system calls of all threads. Only who adds guests later makes sockets.
///
/// # Errors
/// When the kernel refuses.
pub fn restrict(reaction: Reaction, makes_sockets: bool) -> Result<(), Error> {
    // Compiled before the first is in force. The kernel asks all of them, and takes the strictest
    // answer; so the list comes last, and need not allow that a filter is laid on.
    let filters = [absent()?, unopened()?, listed(reaction, makes_sockets)?];
    filters
        .iter()
        .try_for_each(|filter| apply_filter_all_threads(filter))
}

/// clone3 takes its flags from memory, where no filter can see them. If it does not exist, C
/// libraries make threads with clone; if it is merely forbidden, they make none.
fn absent() -> Result<BpfProgram, Error> {
    let calls = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    program(calls, SeccompAction::Allow, errno(libc::ENOSYS))
}

/// Nothing is opened but directories to go through, as descriptors of the kind that neither reads
/// nor writes. This has a filter of its own because C libraries try, and can do without: glibc looks
/// for the number of processors and the rules of overcommitment, and nobody shall die of that.
fn unopened() -> Result<BpfProgram, Error> {
    let reads_or_writes = |argument| Ok::<_, Error>(vec![rule([lacks(argument, libc::O_PATH)?])?]);
    let calls = BTreeMap::from([
        (libc::SYS_openat, reads_or_writes(2)?),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_open, reads_or_writes(1)?),
    ]);
    program(calls, SeccompAction::Allow, errno(libc::EPERM))
}

fn listed(reaction: Reaction, makes_sockets: bool) -> Result<BpfProgram, Error> {
    let plain = PLAIN.iter().chain(PLAIN_OLD);
    let mut calls: BTreeMap<c_long, Vec<SeccompRule>> =
        plain.map(|call| (*call, Vec::new())).collect();
    calls.extend(conditional()?);
    if makes_sockets {
        calls.extend(listening()?);
    }
    let otherwise = match reaction {
        Reaction::Refuse => errno(libc::EPERM),
        Reaction::Kill => SeccompAction::KillProcess,
    };
    program(calls, otherwise, SeccompAction::Allow)
}

/// Sockets that are listened on: local ones of streams, which cannot send to an address. Landlock says
/// where. Nothing connects them.
fn listening() -> Result<Vec<(c_long, Vec<SeccompRule>)>, Error> {
    let streams = rule([
        is(0, flags(libc::AF_UNIX))?,
        is(1, flags(libc::SOCK_STREAM | libc::SOCK_CLOEXEC))?,
    ])?;
    Ok(vec![
        (libc::SYS_socket, vec![streams]),
        (libc::SYS_bind, Vec::new()),
        (libc::SYS_listen, Vec::new()),
    ])
}

fn errno(number: i32) -> SeccompAction {
    SeccompAction::Errno(number.unsigned_abs())
}

fn program(
    calls: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    listed: SeccompAction,
) -> Result<BpfProgram, Error> {
    let architecture = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(calls, otherwise, listed, architecture)?;
    Ok(filter.try_into()?)
}

/// Calls that are allowed with some arguments only: one of the rules must hold.
fn conditional() -> Result<Vec<(c_long, Vec<SeccompRule>)>, Error> {
    let mut calls = vec![
        (
            libc::SYS_setsockopt,
            any([libc::SO_RCVTIMEO, libc::SO_SNDTIMEO], |option| {
                rule([is(1, flags(libc::SOL_SOCKET))?, is(2, flags(option))?])
            })?,
        ),
        (
            libc::SYS_fcntl,
            any(
                [
                    libc::F_DUPFD_CLOEXEC,
                    libc::F_GETFD,
                    libc::F_GETFL,
                    libc::F_SETFL,
                    libc::F_GET_SEALS,
                ],
                |command| rule([is(1, flags(command))?]),
            )?,
        ),
        // No memory that is executed.
        (libc::SYS_mmap, vec![rule([lacks(2, libc::PROT_EXEC)?])?]),
        (
            libc::SYS_mprotect,
            vec![rule([lacks(2, libc::PROT_EXEC)?])?],
        ),
        // Any advice but to take the machine's memory for broken.
        (
            libc::SYS_madvise,
            vec![rule([
                is_not(2, flags(libc::MADV_HWPOISON))?,
                is_not(2, flags(libc::MADV_SOFT_OFFLINE))?,
            ])?],
        ),
        // The arena takes and gives back memory, and is never made longer or shorter.
        (
            libc::SYS_fallocate,
            any(
                [
                    libc::FALLOC_FL_KEEP_SIZE,
                    libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_PUNCH_HOLE,
                ],
                |mode| rule([is(1, flags(mode))?]),
            )?,
        ),
        // Threads, and no processes.
        (
            libc::SYS_clone,
            vec![rule([SeccompCondition::new(
                0,
                SeccompCmpArgLen::Qword,
                SeccompCmpOp::MaskedEq(!THREAD_MAY),
                THREAD,
            )?])?],
        ),
        (
            libc::SYS_prctl,
            vec![rule([is(0, flags(libc::PR_SET_NAME))?])?],
        ),
        // The store's thread is nice, once.
        (libc::SYS_getpriority, vec![own_priority()?]),
        (libc::SYS_setpriority, vec![own_priority()?]),
        // A worker that is pinned to a processor does that itself.
        (libc::SYS_sched_setaffinity, vec![rule([is(0, 0)?])?]),
        // abort() sends a signal to this process, and a worker that does not end is interrupted by one.
        (
            libc::SYS_tgkill,
            vec![rule([is(0, u64::from(std::process::id()))?])?],
        ),
    ];
    // First touches of guests' memory, by a descriptor that is there already, are metered and made.
    let metered = first_touch::descriptor_number().map(|fd| {
        let rules =
            first_touch::CALLS.map(|call| rule([is(0, flags(fd))?, is(1, u64::from(call))?]));
        rules.into_iter().collect::<Result<Vec<_>, _>>()
    });
    let metered = metered.transpose()?.map(|rules| (libc::SYS_ioctl, rules));
    calls.extend(metered);
    Ok(calls)
}

/// That of the calling thread.
fn own_priority() -> Result<SeccompRule, Error> {
    rule([is(0, PRIO_PROCESS)?, is(1, 0)?])
}

fn rule<const N: usize>(conditions: [SeccompCondition; N]) -> Result<SeccompRule, Error> {
    Ok(SeccompRule::new(conditions.into())?)
}

/// One rule for each of some values.
fn any<const N: usize>(
    values: [i32; N],
    rule: impl Fn(i32) -> Result<SeccompRule, Error>,
) -> Result<Vec<SeccompRule>, Error> {
    values.into_iter().map(rule).collect()
}

/// An argument of type `int` has this value.
fn is(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    condition(argument, SeccompCmpOp::Eq, value)
}

/// An argument of type `int` has another value.
fn is_not(argument: u8, value: u64) -> Result<SeccompCondition, Error> {
    condition(argument, SeccompCmpOp::Ne, value)
}

/// An argument has none of these bits (of which there are none beyond those of an `int`).
fn lacks(argument: u8, bits: i32) -> Result<SeccompCondition, Error> {
    masked(argument, flags(bits), 0)
}

fn masked(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, Error> {
    condition(argument, SeccompCmpOp::MaskedEq(mask), value)
}

fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompCondition, Error> {
    // The kernel, too, looks at the lower half only of what is an `int`.
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    Ok(condition)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_call_is_listed_twice() {
        let mut calls: Vec<c_long> = PLAIN.iter().chain(PLAIN_OLD).copied().collect();
        calls.extend(conditional().unwrap().iter().map(|(call, _)| *call));
        calls.extend(listening().unwrap().iter().map(|(call, _)| *call));
        let count = calls.len();
        calls.sort_unstable();
        calls.dedup();
        // The second of two would take the first one's place, with its conditions.
        assert_eq!(calls.len(), count);
    }

    #[test]
    fn what_opens_a_way_out_is_not_on_the_list() {
        let calls = PLAIN.iter().chain(PLAIN_OLD);
        let listed: Vec<c_long> = calls.copied().collect();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_io_uring_setup,
            libc::SYS_ioctl,
            libc::SYS_kill,
            libc::SYS_clone,
            libc::SYS_mmap,
            libc::SYS_mprotect,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_memfd_create,
            libc::SYS_ftruncate,
        ] {
            assert!(!listed.contains(&call), "{call}");
        }
    }
}
