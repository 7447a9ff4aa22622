// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Landlock alone, without the filter of system calls before it: each of the two must hold when
//! the other fails.

use std::fs;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixListener;
use std::path::Path;

use rustix::io::Errno;
use vhost_device_cram::sandbox::landlock::{Level, Places, restrict};

use crate::child::{self, options, refused};

#[test]
fn landlock_alone_keeps_from_files_and_network() {
    let ended = child::run(
        "files::landlock_alone_keeps_from_files_and_network",
        |folder| {
            let server = TcpListener::bind("127.0.0.1:0").unwrap();
            let address = server.local_addr().unwrap();
            let places = Places::of(&options(folder));
            let [guests, control] = ["guests", "control"].map(|name| folder.join(name));
            for place in [folder, &guests, &control] {
                fs::write(place.join("file"), "x").unwrap();
            }
            rustix::thread::set_no_new_privs(true).unwrap();
            let Level::Abi(abi) = restrict(&places).unwrap() else {
                println!("this kernel has no landlock: nothing was tried");
                return;
            };
            let denied = |what: &str, result| refused(what, result, Errno::ACCESS);
            for place in [
                Path::new("/etc/passwd"),
                &guests.join("file"),
                &control.join("file"),
            ] {
                denied("reading", fs::read(place).map(drop));
                denied(
                    "writing",
                    fs::OpenOptions::new().append(true).open(place).map(drop),
                );
            }
            for place in [Path::new("/"), folder, &guests, &control] {
                denied("listing", fs::read_dir(place).map(drop));
            }
            for place in [folder, &guests, &control] {
                denied("a file", fs::write(place.join("new"), "x"));
                denied("a directory", fs::create_dir(place.join("new")));
                denied("a link", std::os::unix::fs::symlink("x", place.join("new")));
            }
            let run = std::process::Command::new("/bin/true").spawn();
            denied("a program", run.map(drop));
            for place in [folder, &control] {
                denied(
                    "a socket",
                    UnixListener::bind(place.join("new.sock")).map(drop),
                );
            }
            denied("removing", fs::remove_file(folder.join("file")));
            if abi >= 4 {
                denied("TCP", TcpStream::connect(address).map(drop));
                denied("a port", TcpListener::bind("127.0.0.1:0").map(drop));
            }
            // What is left.
            drop(UnixListener::bind(guests.join("new.sock")).unwrap());
            fs::remove_file(guests.join("new.sock")).unwrap();
            fs::remove_file(guests.join("file")).unwrap();
            fs::remove_file(control.join("file")).unwrap();
        },
    );
    ended.expect_done();
}
