// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The program that runs inside the test guest.
//!
//! - `agent TTY` answers the harness over a serial line: it runs commands,
//!   reads files and keeps jobs. It holds no memory that can be swapped, so it
//!   stays when pages are lost.
//! - `load` fills anonymous memory with real data, has it swapped out, reads it
//!   back in several orders from several processes, and compares SHA-256 sums.
//! - `hold` does the same step by step, as its standard input asks.
//! - `pace` works on a part of its memory for a while, and says how fast that went and how long
//!   its touches took.
//! - `touch` takes memory, to push others out.
//! - `conform` drives the device itself, with every request that docs/protocol.md
//!   has something to say about ([`raw`]); `attack` drives it as nobody should.
//!
//! `worker` is what `load` and `hold` start, once for each process.
//!
//! A page that the device lost must raise SIGBUS, never show other bytes; so
//! lost pages and wrong pages are counted apart ([`region`]).

mod agent;
mod arguments;
mod crew;
mod job;
mod order;
mod pace;
mod raw;
mod region;
mod times;
mod touch;
mod worker;

use std::process::ExitCode;

const USAGE: &str = "\
usage: cram-workload agent TTY
       cram-workload load --source FILE --mib N [options]
       cram-workload hold --source FILE --mib N [options]
       cram-workload pace --source FILE --mib N [--offset-mib N]
       cram-workload touch --mib N [--seconds S]
       cram-workload conform
       cram-workload attack [--seed N] [--rounds N]

options of load and hold:
  --source FILE      real data to fill memory with (read directly, past the page cache)
  --offset-mib N     where in it to begin (0)
  --mib N            how much memory to fill, over all processes
  --processes P      how many processes share it (2)
  --die-on-sigbus    let a lost page kill its process instead of counting it
options of load:
  --passes LIST      orders to read in: sequential, reverse, random, stride, forked
                     (sequential,reverse,random,stride)
  --seed N           seed of the random orders (1)
  --rewrite N        after the first pass, change N of every 1000 pages
  --pageout          ask the kernel to swap everything out before each pass
";

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1);
    let mode = words.next().unwrap_or_default();
    let rest: Vec<String> = words.collect();
    let outcome = match mode.as_str() {
        "agent" => agent::run(&rest),
        "load" => crew::run_load(&rest),
        "hold" => crew::run_hold(&rest),
        "pace" => pace::run(&rest),
        "touch" => touch::run(&rest),
        "conform" => raw::conform(&rest),
        "attack" => raw::attack(&rest),
        "worker" => worker::run(&rest),
        "--help" | "-h" | "help" => {
            print!("{USAGE}");
            return ExitCode::SUCCESS;
        }
        _ => {
            eprint!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match outcome {
        Ok(code) => code,
        Err(error) => {
            eprintln!("cram-workload {mode}: {error:#}");
            ExitCode::from(1)
        }
    }
}
