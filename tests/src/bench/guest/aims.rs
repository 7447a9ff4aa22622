// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the guests' figures are, and what was aimed at.

use crate::bench::figures::{Aim, Target, aim};

/// In the order in which they are printed. Each case has more: `guest_insn_total_…`,
/// `guest_insn_spread_…` (most / least of its rounds, less 1), `pages_out_…`, `pages_in_…`,
/// `tight_…_wall_s`, `tight_…_stuck`.
pub const AIMS: &[Aim] = &[
    aim(
        "guest_insn_per_page",
        "instructions of the guest for a page moved, cram",
        Some(Target::AtMost(10_800.0)),
    ),
    aim(
        "guest_insn_per_page_mthp",
        "… cram, with folios of 64 KiB",
        Some(Target::AtMost(6_500.0)),
    ),
    aim("guest_insn_per_page_disk", "… a virtio-blk disk", None),
    aim(
        "guest_insn_per_page_vhost_user_blk",
        "… a RAM disk over vhost-user-blk",
        None,
    ),
    aim("guest_insn_per_page_zram", "… zram with lz4", None),
    aim("guest_insn_per_page_zswap", "… zswap with lz4", None),
    aim(
        "guest_insn_per_page_vs_disk",
        "cram / the disk",
        Some(Target::AtMost(1.0)),
    ),
    aim(
        "guest_insn_per_page_vs_zram",
        "cram / zram",
        Some(Target::AtMost(0.26)),
    ),
    aim(
        "guest_insn_per_page_vs_zswap",
        "cram / zswap",
        Some(Target::AtMost(0.27)),
    ),
    aim("guest_wall_s_cram", "seconds for the load, cram", None),
    aim("guest_wall_s_mthp", "… cram, with folios of 64 KiB", None),
    aim("guest_wall_s_disk", "… a virtio-blk disk", None),
    aim(
        "guest_wall_s_vhost_user_blk",
        "… a RAM disk over vhost-user-blk",
        None,
    ),
    aim("guest_wall_s_zram", "… zram with lz4", None),
    aim("guest_wall_s_zswap", "… zswap with lz4", None),
    aim(
        "guest_wall_vs_vhost_user_blk",
        "cram / vhost-user-blk, in turns",
        Some(Target::AtMost(1.0)),
    ),
    aim(
        "guest_wall_vs_vhost_user_blk_least",
        "… the turn in which it was least",
        None,
    ),
    aim(
        "guest_wall_vs_vhost_user_blk_most",
        "… the turn in which it was most",
        None,
    ),
    aim(
        "tight_cram_oom",
        "1: out of memory in a guest too small to keep what it compresses",
        Some(Target::AtMost(0.0)),
    ),
    aim("tight_disk_oom", "… a virtio-blk disk", None),
    aim(
        "tight_vhost_user_blk_oom",
        "… a RAM disk over vhost-user-blk",
        None,
    ),
    aim("tight_zram_oom", "… zram with lz4", None),
    aim("tight_zswap_oom", "… zswap with lz4", None),
    aim(
        "idle_cpu",
        "share of a processor for the daemon of an idle guest",
        Some(Target::AtMost(0.001)),
    ),
];
