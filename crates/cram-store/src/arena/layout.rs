// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How an arena is cut up.

use super::Layout;
use super::file::fitted;

/// How the arena of a store of this capacity is cut up: into 64 spans or more, of 16 KiB to 1 MiB,
/// so that a small store does not strand a good part of itself in spans that are half full.
pub(crate) fn layout_for(capacity_bytes: u64) -> Layout {
    let span_shift = (capacity_bytes / 64).max(1).ilog2().clamp(14, 20);
    let reach = |granule_shift: u32| 1_u64 << (u32::BITS + granule_shift);
    let granule_shift = (4..6)
        .find(|shift| capacity_bytes < reach(*shift) / 2)
        .unwrap_or(6);
    fitted(
        Layout {
            span_shift,
            granule_shift,
            spans: 2,
        },
        capacity_bytes,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_suit_their_capacity() {
        let of = |capacity: u64| {
            let layout = layout_for(capacity);
            assert!(layout.len_bytes() <= capacity / 16 * 17 + 3 * layout.span_bytes());
            assert!(layout.len_bytes() >> layout.granule_shift <= 1 << 32);
            (layout.span_bytes(), layout.granule_shift)
        };
        assert_eq!(of(256 << 10), (16 << 10, 4));
        assert_eq!(of(4 << 20), (64 << 10, 4));
        assert_eq!(of(1 << 30), (1 << 20, 4));
        assert_eq!(of(31 << 30), (1 << 20, 4));
        assert_eq!(of(60 << 30), (1 << 20, 5));
        assert_eq!(of(128 << 30), (1 << 20, 6));
    }
}
