// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What the density figures are, and what was aimed at.

use crate::bench::figures::{Aim, Target, aim};

/// In the order in which they are printed. Each arm of each load has more, such as
/// `cycle_cram_384_peak_mib`: see docs/density.md.
pub const AIMS: &[Aim] = &[
    aim(
        "cycle_pool_vs_needed",
        "cycle: bytes the pool holds / images of the pages that are not in the guest's RAM",
        Some(Target::AtMost(1.15)),
    ),
    aim(
        "cycle_host_vs_noswap",
        "… peak of the host's bytes, the RAM size that is best / a guest with enough RAM",
        Some(Target::AtMost(0.88)),
    ),
    aim("cycle_load_s", "… seconds for the load at that size", None),
    aim(
        "cold_host_vs_noswap",
        "cold: the same, of the sizes whose work is at least 0.93",
        Some(Target::AtMost(0.80)),
    ),
    aim(
        "cold_work_vs_noswap",
        "… work a second on the hot part at that size",
        Some(Target::AtLeast(0.93)),
    ),
    aim(
        "cold_host_vs_noswap_recompressed",
        "… bytes once cold pages have been recompressed, both at rest",
        Some(Target::AtMost(0.68)),
    ),
    aim(
        "cold_work_vs_noswap_recompressed",
        "… work a second then",
        Some(Target::AtLeast(0.93)),
    ),
    aim(
        "cold_host_vs_host_zram",
        "… bytes at rest / those with which host zram does as much work",
        Some(Target::AtMost(1.0)),
    ),
    aim(
        "cold_host_vs_host_zram_recompressed",
        "… once cold pages have been recompressed",
        Some(Target::AtMost(0.9)),
    ),
    aim(
        "squeeze_half_s",
        "seconds until an idle guest has given half of its RAM back",
        None,
    ),
    aim(
        "squeeze_host_after_vs_before",
        "… the host's bytes after that / before",
        Some(Target::AtMost(0.70)),
    ),
    aim(
        "squeeze_host_after_vs_before_recompressed",
        "… once what is cold was recompressed",
        Some(Target::AtMost(0.70)),
    ),
    aim(
        "unsqueeze",
        "… 99th percentile of a touch once all was given back / without a squeeze",
        Some(Target::AtMost(1.0)),
    ),
    aim(
        "twins_host_bytes_per_guest",
        "three guests with mostly equal data: bytes for each, --dedup all / off",
        Some(Target::AtMost(0.6)),
    ),
    aim(
        "twins_host_bytes_per_guest_own",
        "… --dedup guest / off",
        None,
    ),
    aim(
        "codec_lz4_bytes",
        "bytes of an image, lz4: mean over the kinds",
        None,
    ),
    aim(
        "codec_zram_bytes",
        "… what zsmalloc holds for it (a model)",
        None,
    ),
    aim("codec_lz4_pack_us", "… microseconds to pack a page", None),
    aim("codec_lz4_unpack_us", "… and to unpack one", None),
    aim(
        "codec_lz4_16k_bytes",
        "bytes of an image, lz4, 4 pages together",
        None,
    ),
    aim("codec_lz4_64k_bytes", "… 16 pages together", None),
    aim("codec_zstd1_bytes", "bytes of an image, zstd 1", None),
    aim("codec_zstd1_pack_us", "… microseconds to pack a page", None),
    aim("codec_zstd1_unpack_us", "… and to unpack one", None),
    aim("codec_zstd3_bytes", "bytes of an image, zstd 3", None),
    aim("codec_zstd3_pack_us", "… microseconds to pack a page", None),
    aim("codec_zstd3_unpack_us", "… and to unpack one", None),
    aim(
        "codec_zstd1_dict_bytes",
        "bytes of an image, zstd 1 with a dictionary of 16 KiB for the kind",
        None,
    ),
    aim(
        "codec_zstd1_dict_pack_us",
        "… microseconds to pack a page",
        None,
    ),
    aim("codec_zstd1_dict_unpack_us", "… and to unpack one", None),
    aim(
        "codec_zstd3_dict_bytes",
        "bytes of an image, zstd 3 with one",
        None,
    ),
    aim(
        "codec_zstd3_dict_pack_us",
        "… microseconds to pack a page",
        None,
    ),
    aim("codec_zstd3_dict_unpack_us", "… and to unpack one", None),
];
