// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Pictures of figures, as SVG: bars beside what was aimed at, and bars beside each other.

use std::fmt::Write;

use super::density::{Family, arms_of};
use super::figures::{Aim, Figures, show};

const WIDTH: f64 = 960.0;
const LABEL: f64 = 300.0;
const VALUE: f64 = 90.0;
const ROW: f64 = 26.0;
const TITLE: f64 = 44.0;
const GAP: f64 = 22.0;
/// Height of a plane with points.
const PLANE: f64 = 300.0;

const GOOD: &str = "#2a9d5c";
const BAD: &str = "#c0392b";
const OURS: &str = "#3465a4";
const THEIRS: &str = "#b0b7c0";

/// One part of a picture.
pub struct Panel {
    title: String,
    /// What stands below the title.
    note: String,
    body: Body,
}

enum Body {
    Bars(Vec<Row>),
    Points(Vec<Series>),
}

/// Points of one kind, joined by a line.
pub struct Series {
    /// What they are of.
    pub name: &'static str,
    /// Of the line and the points.
    pub colour: &'static str,
    /// Across, up, and what stands beside the point.
    pub points: Vec<(f64, f64, String)>,
}

struct Row {
    label: String,
    value: f64,
    /// How much of the row's width the bar takes, 0 to 1.
    share: f64,
    colour: &'static str,
    /// Where the target is, and what it says.
    mark: Option<(f64, String)>,
}

/// Figures beside what they should be: every target stands at the same place.
#[must_use]
pub fn aimed_at(title: &str, figures: &Figures, aims: &[Aim]) -> Panel {
    const PLACE: f64 = 0.6;
    let rows = aims.iter().filter_map(|aim| {
        let (value, target) = (figures.get(aim.name)?, aim.target?);
        // Nothing is a share of nothing.
        let target = Some(target).filter(|target| target.bound() != 0.0)?;
        let share = (value / target.bound() * PLACE).clamp(0.0, 1.0);
        Some(Row {
            label: aim.name.to_owned(),
            value,
            share,
            colour: if target.is_met(value) { GOOD } else { BAD },
            mark: Some((PLACE, target.text())),
        })
    });
    Panel {
        title: title.to_owned(),
        note: "Each bar as a share of its target (the line); green where it is met.".to_owned(),
        body: Body::Bars(rows.collect()),
    }
}

/// Values of one kind beside each other; `ours` is the label of the one that it is about.
#[must_use]
pub fn beside(title: &str, note: &str, ours: &[&str], values: &[(&str, f64)]) -> Panel {
    let most = values.iter().map(|(_, value)| *value).fold(0.0, f64::max);
    let rows = values.iter().map(|(label, value)| Row {
        label: (*label).to_owned(),
        value: *value,
        share: if most > 0.0 { value / most } else { 0.0 },
        colour: if ours.contains(label) { OURS } else { THEIRS },
        mark: None,
    });
    Panel {
        title: title.to_owned(),
        note: note.to_owned(),
        body: Body::Bars(rows.collect()),
    }
}

/// Points in a plane: what one pays to the right, what one gets for it upwards.
#[must_use]
pub fn plane(title: &str, note: &str, series: Vec<Series>) -> Panel {
    let mut series = series;
    series.retain(|series| !series.points.is_empty());
    for one in &mut series {
        one.points.sort_by(|(a, ..), (b, ..)| a.total_cmp(b));
    }
    Panel {
        title: title.to_owned(),
        note: note.to_owned(),
        body: Body::Points(series),
    }
}

/// Panels one below the other.
#[must_use]
pub fn svg(panels: &[Panel]) -> String {
    let panels: Vec<_> = panels.iter().filter(|panel| !panel.is_empty()).collect();
    let height: f64 = panels.iter().map(|panel| panel.height()).sum::<f64>() + GAP;
    let mut out = format!(
        "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' \
         font-family='system-ui, sans-serif' font-size='13'>\n\
         <rect width='100%' height='100%' fill='#fff'/>\n"
    );
    let mut top = GAP / 2.0;
    for panel in panels {
        panel.draw(top, &mut out);
        top += panel.height();
    }
    out += "</svg>\n";
    out
}

#[allow(clippy::cast_precision_loss, reason = "points of a picture")]
fn row_at(row: usize) -> f64 {
    row as f64 * ROW
}

impl Panel {
    fn is_empty(&self) -> bool {
        match &self.body {
            Body::Bars(rows) => rows.is_empty(),
            Body::Points(series) => series.is_empty(),
        }
    }

    fn height(&self) -> f64 {
        let body = match &self.body {
            Body::Bars(rows) => row_at(rows.len()),
            Body::Points(_) => PLANE,
        };
        TITLE + body + GAP
    }

    fn draw(&self, top: f64, out: &mut String) {
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "<text x='16' y='{}' font-size='16' font-weight='600'>{}</text>\
             <text x='16' y='{}' fill='#666' font-size='12'>{}</text>",
            top + 18.0,
            escaped(&self.title),
            top + 36.0,
            escaped(&self.note)
        );
        match &self.body {
            Body::Bars(rows) => {
                for (at, row) in rows.iter().enumerate() {
                    row.draw(top + TITLE + row_at(at), out);
                }
            }
            Body::Points(series) => draw_plane(series, top + TITLE, out),
        }
    }
}

impl Row {
    fn draw(&self, y: f64, out: &mut String) {
        let width = WIDTH - LABEL - VALUE - 16.0;
        let _ = writeln!(
            out,
            "<text x='{}' y='{}' text-anchor='end'>{}</text>\
             <rect x='{LABEL}' y='{}' width='{:.1}' height='{}' rx='2' fill='{}'/>\
             <text x='{}' y='{}' text-anchor='end' font-variant-numeric='tabular-nums'>{}</text>",
            LABEL - 10.0,
            y + 16.0,
            escaped(&self.label),
            y + 4.0,
            (self.share * width).max(1.0),
            ROW - 9.0,
            self.colour,
            WIDTH - 16.0,
            y + 16.0,
            show(self.value)
        );
        if let Some((place, text)) = &self.mark {
            let x = LABEL + place * width;
            let _ = writeln!(
                out,
                "<line x1='{x}' x2='{x}' y1='{}' y2='{}' stroke='#333' stroke-width='1.5'/>\
                 <text x='{}' y='{}' fill='#444' font-size='11' stroke='#fff' stroke-width='3' \
                 paint-order='stroke'>{}</text>",
                y + 1.0,
                y + ROW - 2.0,
                x + 5.0,
                y + 15.0,
                escaped(text)
            );
        }
    }
}

/// Both axes begin at nothing, so that distances are what they seem.
fn draw_plane(series: &[Series], top: f64, out: &mut String) {
    const LEFT: f64 = 90.0;
    const RIGHT: f64 = WIDTH - 200.0;
    let bottom = top + PLANE - 30.0;
    let all = || series.iter().flat_map(|series| &series.points);
    let widest = all().map(|point| point.0).fold(0.0, f64::max) * 1.08;
    let highest = all().map(|point| point.1).fold(0.0, f64::max) * 1.08;
    if widest <= 0.0 || highest <= 0.0 {
        return;
    }
    let x_of = |value: f64| LEFT + value / widest * (RIGHT - LEFT);
    let y_of = |value: f64| bottom - value / highest * (bottom - top);
    for quarter in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (x, y) = (x_of(widest * quarter), y_of(highest * quarter));
        let _ = writeln!(
            out,
            "<line x1='{LEFT}' x2='{RIGHT}' y1='{y:.1}' y2='{y:.1}' stroke='#eee'/>\
             <text x='{}' y='{:.1}' text-anchor='end' fill='#666' font-size='11'>{}</text>\
             <text x='{x:.1}' y='{}' text-anchor='middle' fill='#666' font-size='11'>{:.0}</text>",
            LEFT - 8.0,
            y + 4.0,
            show(highest * quarter),
            bottom + 18.0,
            widest * quarter
        );
    }
    for (number, series) in series.iter().enumerate() {
        let colour = series.colour;
        let path: Vec<String> = series
            .points
            .iter()
            .map(|(x, y, _)| format!("{:.1},{:.1}", x_of(*x), y_of(*y)))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points='{}' fill='none' stroke='{colour}' stroke-width='2'/>\
             <text x='{}' y='{}' fill='{colour}' font-weight='600'>{}</text>",
            path.join(" "),
            RIGHT + 14.0,
            top + 14.0 + row_at(number) * 0.8,
            escaped(series.name)
        );
        for (x, y, label) in &series.points {
            let (x, y) = (x_of(*x), y_of(*y));
            let _ = writeln!(
                out,
                "<circle cx='{x:.1}' cy='{y:.1}' r='4' fill='{colour}'/>\
                 <text x='{:.1}' y='{:.1}' fill='#444' font-size='11'>{}</text>",
                x + 6.0,
                y - 6.0,
                escaped(label)
            );
        }
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn pick<'a>(figures: &Figures, names: &[(&'a str, &str)]) -> Vec<(&'a str, f64)> {
    names
        .iter()
        .filter_map(|(label, name)| Some((*label, figures.get(name)?)))
        .collect()
}

/// The device's picture.
#[must_use]
pub fn device(figures: &Figures, aims: &[Aim]) -> Vec<Panel> {
    vec![
        aimed_at("The device: what was aimed at", figures, aims),
        beside(
            "Pages in a second",
            "One queue, batches of 32; the codec is one thread of lz4_flex alone.",
            &["puts", "gets"],
            &pick(
                figures,
                &[
                    ("puts", "put_per_s"),
                    ("compressions (codec)", "codec_put_per_s"),
                    ("gets", "get_per_s"),
                    ("decompressions (codec)", "codec_get_per_s"),
                    ("refused by the store", "null_pages_per_s"),
                    ("vhost-user-blk, writes", "blk_write_pages_per_s"),
                    ("vhost-user-blk, 32 at once", "blk_merged_write_pages_per_s"),
                    ("vhost-user-blk, reads", "blk_read_pages_per_s"),
                ],
            ),
        ),
        beside(
            "Microseconds for one page, one at a time",
            "From before the driver lays the request out until it has read the answer.",
            &["get, half of all", "put, half of all"],
            &pick(
                figures,
                &[
                    ("decompression alone", "codec_get_p50_us"),
                    ("get, half of all", "get_qd1_p50_us"),
                    ("get, 99 in a hundred", "get_qd1_p99_us"),
                    ("get, 999 in a thousand", "get_qd1_p999_us"),
                    ("get, both sides sleeping", "get_qd1_sleeping_p50_us"),
                    ("put, half of all", "put_qd1_p50_us"),
                ],
            ),
        ),
    ]
}

/// The store's picture.
#[must_use]
pub fn store(figures: &Figures, aims: &[Aim]) -> Vec<Panel> {
    vec![
        aimed_at("The store: what was aimed at", figures, aims),
        beside(
            "Bytes held for a byte of compressed data",
            "Process memory; the models of the kernel's allocators are computed from the same sizes.",
            &["store, filled", "store, churned, half freed, compacted"],
            &pick(
                figures,
                &[
                    ("store, filled", "held_vs_compressed"),
                    ("zsmalloc (model), filled", "zsmalloc_vs_compressed"),
                    ("zbud (model), filled", "zbud_vs_compressed"),
                    ("hash map of boxes, filled", "hash_map_vs_compressed"),
                    (
                        "store, churned, half freed, compacted",
                        "held_vs_compressed_churned",
                    ),
                    (
                        "zsmalloc (model), half freed",
                        "zsmalloc_vs_compressed_half",
                    ),
                    ("zbud (model), half freed", "zbud_vs_compressed_half"),
                ],
            ),
        ),
        beside(
            "Misses of a second-level cache",
            "Share of requests, on average over the traces of three real programs and three sizes.",
            &["store"],
            &pick(
                figures,
                &[
                    ("FIFO", "misses_fifo"),
                    ("LRU", "misses_lru"),
                    ("SIEVE", "misses_sieve"),
                    ("S3-FIFO", "misses_s3fifo"),
                    ("store", "misses_store"),
                ],
            ),
        ),
    ]
}

/// The guests' picture.
#[must_use]
pub fn guest(figures: &Figures, aims: &[Aim]) -> Vec<Panel> {
    // What a figure of each way to swap is called in the picture.
    const LABELS: [(&str, &str); 6] = [
        ("zram", "zram, lz4"),
        ("zswap", "zswap, lz4"),
        ("disk", "virtio-blk disk"),
        ("vhost_user_blk", "RAM disk over vhost-user-blk"),
        ("cram", "cram"),
        ("mthp", "cram, folios of 64 KiB"),
    ];
    let pick = |of: &str| -> Vec<(&'static str, f64)> {
        LABELS
            .iter()
            .filter_map(|(case, label)| {
                let value = figures.get(&format!("{of}_{case}"));
                // Our own device's figure may be the one without a further name.
                let bare = (*case == "cram").then(|| figures.get(of)).flatten();
                Some((*label, value.or(bare)?))
            })
            .collect()
    };
    let ours = ["cram", "cram, folios of 64 KiB"];
    vec![
        aimed_at("Guests: what was aimed at", figures, aims),
        beside(
            "Instructions of the guest for a page moved",
            "What a load takes in a guest that swaps, less what it takes in one with room.",
            &ours,
            &pick("guest_insn_per_page"),
        ),
        beside(
            "Seconds for the load",
            "By the host's clock; in emulation unless KVM is there.",
            &ours,
            &pick("guest_wall_s"),
        ),
    ]
}

/// The picture of the host's bytes.
#[must_use]
pub fn density(figures: &Figures, aims: &[Aim]) -> Vec<Panel> {
    let mut panels = vec![aimed_at(
        "The host's bytes: what was aimed at",
        figures,
        aims,
    )];
    for (load, title, work) in [
        (
            "cycle",
            "cycle: all pages, in order and at random",
            "pages read a second",
        ),
        ("cold", "cold: a hot quarter", "touches a second"),
        (
            "phases",
            "phases: a hot quarter that moves",
            "touches a second",
        ),
        (
            "page_cache",
            "page cache: files read again and again",
            "pages read a second",
        ),
    ] {
        let note = format!("Across: MiB that the host has to have, at rest. Up: {work}.");
        panels.push(plane(title, &note, curves(figures, load)));
    }
    for load in ["cycle", "cold", "twins"] {
        let arms: Vec<&str> = arms_of(figures, load).collect();
        let value = |arm: &str| figures.get(&format!("{load}_{arm}_peak_mib"));
        let values: Vec<_> = arms
            .iter()
            .filter_map(|arm| Some((*arm, value(arm)?)))
            .collect();
        let ours: Vec<&str> = arms
            .iter()
            .copied()
            .filter(|arm| arm.starts_with("cram"))
            .collect();
        panels.push(beside(
            &format!("{load}: MiB at the peak"),
            "Emulators, daemon, pool and the host's own compressed swap, each page once.",
            &ours,
            &values,
        ));
    }
    panels
}

/// Work over bytes, a line for each family of arms.
fn curves(figures: &Figures, load: &str) -> Vec<Series> {
    const FAMILIES: [(Family, &str, &str); 9] = [
        (Family::Cram, "cram", OURS),
        (Family::CramKeep, "cram, copies kept", "#8fb1de"),
        (Family::CramFree, "cram, copies freed", "#1d3f6e"),
        (Family::CramAdaptive, "cram, copies adaptive", "#4fa3a3"),
        (Family::CramSqueezed, "cram, squeezed", "#7a3fa0"),
        (Family::HostZram, "host zram beneath", "#d9822b"),
        (Family::HostZswap, "host zswap beneath", "#b58b00"),
        (Family::NoSwap, "no swap", "#333"),
        (Family::Inside, "in the guest", "#8a929c"),
    ];
    let families = FAMILIES.iter().map(|(family, name, colour)| Series {
        name,
        colour,
        points: arms_of(figures, load)
            .filter(|arm| Family::of(arm) == *family)
            .filter_map(|arm| {
                let get = |what: &str| figures.get(&format!("{load}_{arm}_{what}"));
                let label = arm.split('_').find(|word| word.parse::<u32>().is_ok());
                let label = match family {
                    // These differ in more than their size.
                    Family::Inside => arm,
                    _ => label.unwrap_or_default(),
                };
                Some((get("steady_mib")?, get("work_per_s")?, label.to_owned()))
            })
            .collect(),
    });
    families.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_has_a_bar_for_each_figure_and_no_raw_text() {
        let panel = beside("a < b", "", &["x"], &[("x", 1.0), ("y & z", 2.0)]);
        let picture = svg(&[panel]);
        assert_eq!(picture.matches("<rect").count(), 3);
        assert!(picture.contains("a &lt; b") && picture.contains("y &amp; z"));
    }

    #[test]
    fn a_curve_has_a_point_for_each_arm() {
        let mut figures = Figures::default();
        for (arm, bytes) in [("cram_256", 500.0), ("cram_384", 600.0), ("noswap", 700.0)] {
            for (what, value) in [
                ("steady_mib", bytes),
                ("peak_mib", bytes),
                ("work_per_s", 9.0),
            ] {
                figures.set(format!("cold_{arm}_{what}"), value);
            }
        }
        let picture = svg(&density(&figures, &[]));
        assert_eq!(picture.matches("<circle").count(), 3);
        assert!(picture.contains(">no swap<") && !picture.contains("host zram beneath"));
    }
}
