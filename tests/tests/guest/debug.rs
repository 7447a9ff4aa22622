// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The tests that reach every path of driver and kernel hook, on the kernel that checks itself
//! (lockdep, sleep in atomic context, RCU, KASAN). What it finds it prints, and that fails the test.

use anyhow::{Result, ensure};
use cram_tests::guest::{Failed, Kernel, Stage};

use crate::{balance, chaos, lifecycle, loss, sleep, stall, swap};

fn debug(name: &str, body: impl FnOnce(&Stage, Kernel) -> Result<()>) -> Result<(), Failed> {
    Stage::run(name, |stage| {
        ensure!(
            stage.artifacts().kernel_debug.is_some(),
            "the debug kernel was not built: run cargo xtask test"
        );
        body(stage, Kernel::Debug)
    })
}

#[test]
fn debug_verified_swap() -> Result<(), Failed> {
    debug("debug_verified_swap", swap::all_through_the_device)
}

#[test]
fn debug_tiny_capacity() -> Result<(), Failed> {
    debug("debug_tiny_capacity", swap::overflow_to_the_disk)
}

#[test]
fn debug_swapoff_brings_back() -> Result<(), Failed> {
    debug("debug_swapoff_brings_back", swap::off_and_on)
}

#[test]
fn debug_daemon_killed() -> Result<(), Failed> {
    debug("debug_daemon_killed", loss::killed_with_pages_out)
}

#[test]
fn debug_module_reload() -> Result<(), Failed> {
    debug("debug_module_reload", lifecycle::module_goes_and_comes)
}

#[test]
fn debug_hot_unplug() -> Result<(), Failed> {
    debug("debug_hot_unplug", lifecycle::unplugged_with_pages_out)
}

#[test]
fn debug_kills() -> Result<(), Failed> {
    debug("debug_kills", chaos::kills_on_debug_kernel)
}

#[test]
fn debug_kept_once() -> Result<(), Failed> {
    debug("debug_kept_once", balance::no_page_is_kept_twice)
}

#[test]
fn debug_squeezed() -> Result<(), Failed> {
    debug("debug_squeezed", balance::squeezed_and_given_back)
}

#[test]
fn debug_daemon_stopped() -> Result<(), Failed> {
    debug("debug_daemon_stopped", stall::stopped_while_swapping)
}

#[test]
fn debug_daemon_stopped_for_long() -> Result<(), Failed> {
    debug("debug_daemon_stopped_for_long", stall::stopped_for_long)
}

#[test]
fn debug_pci_function_reset() -> Result<(), Failed> {
    debug("debug_pci_function_reset", stall::function_reset)
}

#[test]
fn debug_unload_under_loads() -> Result<(), Failed> {
    debug("debug_unload_under_loads", stall::unloaded_under_loads)
}

#[test]
fn debug_freed_while_the_daemon_is_lost() -> Result<(), Failed> {
    debug(
        "debug_freed_while_the_daemon_is_lost",
        stall::freed_while_lost,
    )
}

#[test]
fn debug_asleep() -> Result<(), Failed> {
    debug("debug_asleep", sleep::suspended_and_hibernated)
}
