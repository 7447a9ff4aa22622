// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Kernels that have only a part of it, played by a filter that answers as they would.

use std::collections::BTreeMap;
use std::path::Path;

use libc::c_long;
use rustix::io::Errno;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};
use vhost_device_cram::sandbox::seccomp::Reaction;
use vhost_device_cram::sandbox::{SandboxError, confine};
use vhost_device_cram::server::Ready;

use crate::child::{self, options, refused};

/// From now on this thread's kernel answers a call with an error.
fn play(call: c_long, error: Errno) {
    let filter = SeccompFilter::new(
        BTreeMap::from([(call, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(error.raw_os_error().unsigned_abs()),
        std::env::consts::ARCH.try_into().unwrap(),
    );
    let program: BpfProgram = filter.unwrap().try_into().unwrap();
    apply_filter(&program).unwrap();
}

fn without_landlock(folder: &Path, error: Errno) {
    let options = options(folder);
    let _ready = Ready::new(&options).unwrap();
    play(libc::SYS_landlock_create_ruleset, error);
    let confinement = confine(&options, Reaction::Refuse).unwrap();
    assert!(!confinement.is_whole());
    assert_eq!(
        confinement.to_string(),
        "confined by seccomp alone: this kernel has no landlock, or it is not enabled"
    );
    refused("reading", std::fs::File::open("/etc/passwd"), Errno::PERM);
}

#[test]
fn without_landlock_there_is_seccomp() {
    let name = "kernels::without_landlock_there_is_seccomp";
    child::run(name, |folder| without_landlock(folder, Errno::NOSYS)).expect_done();
}

#[test]
fn where_landlock_is_not_enabled_there_is_seccomp() {
    let name = "kernels::where_landlock_is_not_enabled_there_is_seccomp";
    child::run(name, |folder| without_landlock(folder, Errno::OPNOTSUPP)).expect_done();
}

#[test]
fn without_seccomp_there_is_an_error_that_says_what_to_do() {
    let name = "kernels::without_seccomp_there_is_an_error_that_says_what_to_do";
    let ended = child::run(name, |folder| {
        let options = options(folder);
        let ready = Ready::new(&options).unwrap();
        play(libc::SYS_seccomp, Errno::INVAL);
        let error = confine(&options, Reaction::Refuse).unwrap_err();
        assert!(matches!(error, SandboxError::Seccomp(_)));
        let text = error.to_string();
        assert!(text.starts_with("cannot filter system calls: "), "{text}");
        assert!(text.ends_with("--sandbox off goes without"), "{text}");
        // What was made before is removed, although landlock is in force.
        drop(ready);
        assert!(options.guests.iter().all(|guest| !guest.socket.exists()));
    });
    ended.expect_done();
}

/// A socket's directory that goes away between the two steps.
#[test]
fn a_directory_that_is_gone_is_named() {
    let ended = child::run("kernels::a_directory_that_is_gone_is_named", |folder| {
        let options = options(folder);
        let _ready = Ready::new(&options).unwrap();
        std::fs::remove_dir_all(folder.join("guests")).unwrap();
        let error = confine(&options, Reaction::Refuse).unwrap_err().to_string();
        assert!(
            error.starts_with("cannot restrict the use of files to "),
            "{error}"
        );
        assert!(
            error.contains("/guests") && !error.contains('\n'),
            "{error}"
        );
    });
    ended.expect_done();
}
