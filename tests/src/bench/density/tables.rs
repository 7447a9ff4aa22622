// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The figures as tables in Markdown, for people and for docs/density.md.

use std::fmt::Write as _;

use super::arms::Load;
use super::codec;
use super::derive::arms_of;
use crate::bench::corpus::Kind;
use crate::bench::figures::Figures;

/// What is told of each arm, and with how many digits.
const COLUMNS: [(&str, &str, usize); 13] = [
    ("peak_mib", "peak MiB", 0),
    ("steady_mib", "steady MiB", 0),
    ("steady_guest_mib", "guest", 0),
    ("steady_qemu_mib", "QEMU", 0),
    ("steady_daemon_mib", "daemon", 0),
    ("steady_host_pool_mib", "host's swap", 0),
    ("recompressed_mib", "recompressed MiB", 0),
    ("work_per_s", "work/s", 0),
    ("touch_p50_us", "p50 µs", 1),
    ("touch_p99_us", "p99 µs", 0),
    ("load_s", "load s", 1),
    ("host_cpu_s", "CPU s", 1),
    ("guest_insn_per_work", "guest instructions", 0),
];

/// All tables.
#[must_use]
pub fn tables(figures: &Figures) -> String {
    let mut text = String::new();
    for load in Load::ALL {
        let name = load.name().replace('-', "_");
        let get = |arm: &str, what: &str| figures.get(&format!("{name}_{arm}_{what}"));
        let arms: Vec<_> = arms_of(figures, &name).collect();
        // A column that nobody has is not shown.
        let columns: Vec<_> = COLUMNS
            .iter()
            .filter(|(what, ..)| arms.iter().any(|arm| get(arm, what).is_some()))
            .collect();
        if columns.is_empty() {
            continue;
        }
        let headings: Vec<_> = columns.iter().map(|(_, heading, _)| *heading).collect();
        heading(&mut text, load.name(), &headings);
        for arm in arms {
            let cells = columns.iter().map(|(what, _, digits)| {
                let value = get(arm, what);
                value.map_or_else(String::new, |value| format!("{value:.digits$}"))
            });
            row(&mut text, arm, cells);
        }
        for arm in failures(figures, &name) {
            let _ = writeln!(text, "\n{arm}");
        }
    }
    codecs(figures, &mut text);
    text
}

/// Arms that ended otherwise, in words.
fn failures(figures: &Figures, load: &str) -> Vec<String> {
    let mut lines = Vec::new();
    for (name, value) in figures.iter() {
        let arm = name
            .strip_prefix(load)
            .and_then(|rest| rest.strip_prefix('_'));
        let (Some(arm), true) = (arm, value > 0.0) else {
            continue;
        };
        if let Some(arm) = arm.strip_suffix("_oom") {
            lines.push(format!("{arm}: out of memory."));
        } else if let Some(arm) = arm.strip_suffix("_stuck") {
            lines.push(format!("{arm}: not done in time."));
        }
    }
    lines
}

fn codecs(figures: &Figures, text: &mut String) {
    if figures.get("codec_lz4_bytes").is_none() {
        return;
    }
    let mut headings = vec!["bytes", "pack µs", "unpack µs"];
    headings.extend(Kind::ALL.iter().map(|kind| kind.name()));
    heading(text, "way", &headings);
    for way in codec::ways() {
        let get = |name: &str| figures.get(name).unwrap_or(f64::NAN);
        let mut cells = vec![
            format!("{:.0}", get(&format!("codec_{way}_bytes"))),
            format!("{:.1}", get(&format!("codec_{way}_pack_us"))),
            format!("{:.1}", get(&format!("codec_{way}_unpack_us"))),
        ];
        cells.extend(Kind::ALL.iter().map(|kind| {
            let bytes = get(&format!("codec_{}_{way}_bytes", kind.name()));
            format!("{bytes:.0}")
        }));
        row(text, way, cells.into_iter());
    }
    if let Some(zram) = figures.get("codec_zram_bytes") {
        let _ = writeln!(
            text,
            "\nzsmalloc (a model) for the lz4 images: {zram:.0} bytes."
        );
    }
}

// Writing to a string cannot fail.

fn heading(text: &mut String, first: &str, others: &[&str]) {
    let _ = writeln!(text, "\n| {first} | {} |", others.join(" | "));
    let _ = writeln!(text, "|---|{}", "---:|".repeat(others.len()));
}

fn row(text: &mut String, first: &str, cells: impl Iterator<Item = String>) {
    let cells: Vec<_> = cells.collect();
    let _ = writeln!(text, "| {first} | {} |", cells.join(" | "));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_has_a_row_for_each_arm_and_columns_that_somebody_has() {
        let mut figures = Figures::default();
        for (name, value) in [
            ("cycle_noswap_peak_mib", 601.2),
            ("cycle_cram_384_peak_mib", 773.0),
            ("cycle_cram_384_steady_daemon_mib", 290.0),
            ("cycle_zram_384_oom", 1.0),
            ("codec_lz4_bytes", 1823.0),
        ] {
            figures.set(name, value);
        }
        let text = tables(&figures);
        assert!(text.contains("| cycle | peak MiB | daemon |"));
        assert!(text.contains("| noswap | 601 |  |") && text.contains("| cram_384 | 773 | 290 |"));
        assert!(text.contains("zram_384: out of memory."));
        assert!(text.contains("| lz4 | 1823 |") && !text.contains("| cold |"));
    }
}
