// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The demo's picture, written as SVG: three panels over one time axis.

use std::fmt::Write;

use super::sample::{Sample, Series};

const WIDTH: f64 = 1000.0;
const LEFT: f64 = 80.0;
const RIGHT: f64 = 20.0;
const TOP: f64 = 88.0;
const PANEL: f64 = 190.0;
const GAP: f64 = 58.0;
const BOTTOM: f64 = 54.0;
/// About so many marks on an axis.
const MARKS: f64 = 5.0;

/// One line of a panel.
struct Curve {
    name: &'static str,
    colour: &'static str,
    value: fn(&Sample) -> f64,
}

/// Some lines that share an axis.
struct Panel {
    title: &'static str,
    unit: &'static str,
    curves: &'static [Curve],
}

#[allow(clippy::cast_precision_loss, reason = "points of a picture")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

const PANELS: &[Panel] = &[
    Panel {
        title: "Guest memory",
        unit: "MiB",
        curves: &[
            Curve {
                name: "available",
                colour: "#2a9d5c",
                value: |sample| mib(sample.guest.available_bytes),
            },
            Curve {
                name: "anonymous, in RAM",
                colour: "#3465a4",
                value: |sample| mib(sample.guest.anon_bytes),
            },
            Curve {
                name: "in swap",
                colour: "#d9822b",
                value: |sample| mib(sample.guest.swapped_bytes),
            },
        ],
    },
    Panel {
        title: "The host's pool",
        unit: "MiB",
        curves: &[
            Curve {
                name: "pages stored, uncompressed",
                colour: "#d9822b",
                value: |sample| mib(sample.host.orig_bytes),
            },
            Curve {
                name: "held by the store",
                colour: "#8e44ad",
                value: |sample| mib(sample.host.held_bytes),
            },
            Curve {
                name: "daemon in RAM, store included",
                colour: "#7f8c8d",
                value: |sample| mib(sample.host.resident_bytes),
            },
        ],
    },
    Panel {
        title: "Traffic",
        unit: "pages/s",
        curves: &[
            Curve {
                name: "puts",
                colour: "#c0392b",
                value: |sample| sample.puts_per_s,
            },
            Curve {
                name: "gets",
                colour: "#3465a4",
                value: |sample| sample.gets_per_s,
            },
        ],
    },
];

/// Draws the series. `subtitle` says what was run, and on what.
pub fn svg(series: &Series, subtitle: &str) -> String {
    #[allow(clippy::cast_precision_loss, reason = "a handful of panels")]
    let panels = PANELS.len() as f64;
    let height = TOP + panels * PANEL + (panels - 1.0) * GAP + BOTTOM;
    let end_s = series.samples.last().map_or(1.0, |last| last.at_s.max(1.0));
    let mut out = String::new();
    // Writing to a string cannot fail.
    let _ = write!(
        out,
        r##"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif" font-size="12" fill="#222">
<rect width="{WIDTH}" height="{height}" fill="#fff"/>
<text x="{LEFT}" y="24" font-size="17" font-weight="bold">Swapping into the host's compressed pool</text>
<text x="{LEFT}" y="44" fill="#555">{}</text>
"##,
        escaped(subtitle)
    );
    let mut top = TOP;
    for panel in PANELS {
        draw_panel(&mut out, panel, series, top, end_s);
        top += PANEL + GAP;
    }
    let axis = top - GAP;
    for mark in marks(end_s) {
        let x = x_of(mark, end_s);
        let _ = writeln!(
            out,
            r##"<text x="{x:.1}" y="{:.1}" text-anchor="middle">{mark}</text>"##,
            axis + 18.0
        );
    }
    let middle = LEFT + (WIDTH - LEFT - RIGHT) / 2.0;
    let _ = writeln!(
        out,
        r##"<text x="{middle:.1}" y="{:.1}" text-anchor="middle">seconds</text>
</svg>"##,
        axis + 40.0
    );
    out
}

fn x_of(at_s: f64, end_s: f64) -> f64 {
    LEFT + (WIDTH - LEFT - RIGHT) * at_s / end_s
}

fn draw_panel(out: &mut String, panel: &Panel, series: &Series, top: f64, end_s: f64) {
    let values = panel
        .curves
        .iter()
        .flat_map(|curve| series.samples.iter().map(curve.value));
    // Room above for the names of the phases.
    let high = values.fold(1.0, f64::max) * 1.15;
    let y_of = |value: f64| top + PANEL * (1.0 - value / high);
    let base = top + PANEL;
    let right = WIDTH - RIGHT;
    draw_phases(out, series, top, end_s);
    for mark in marks(high) {
        let y = y_of(mark);
        let _ = writeln!(
            out,
            r##"<path d="M{LEFT} {y:.1}H{right}" stroke="#ddd"/><text x="{:.1}" y="{:.1}" text-anchor="end">{mark}</text>"##,
            LEFT - 8.0,
            y + 4.0
        );
    }
    let _ = writeln!(
        out,
        r##"<path d="M{LEFT} {top}V{base}H{right}" stroke="#888" fill="none"/>
<text x="{LEFT}" y="{:.1}" font-weight="bold">{} ({})</text>"##,
        top - 8.0,
        escaped(panel.title),
        escaped(panel.unit)
    );
    let mut legend = right;
    for curve in panel.curves {
        let mut path = String::new();
        for (place, sample) in series.samples.iter().enumerate() {
            let pen = if place == 0 { 'M' } else { 'L' };
            let (x, y) = (x_of(sample.at_s, end_s), y_of((curve.value)(sample)));
            let _ = write!(path, "{pen}{x:.1} {y:.1}");
        }
        let _ = writeln!(
            out,
            r##"<path d="{path}" stroke="{}" stroke-width="1.8" fill="none" stroke-linejoin="round"/>
<text x="{legend:.1}" y="{:.1}" text-anchor="end" fill="{}">{}</text>"##,
            curve.colour,
            top - 8.0,
            curve.colour,
            escaped(curve.name)
        );
        #[allow(clippy::cast_precision_loss, reason = "length of a name")]
        let width = curve.name.len() as f64 * 6.6 + 18.0;
        legend -= width;
    }
}

/// Every other phase on a grey ground, each with its name.
fn draw_phases(out: &mut String, series: &Series, top: f64, end_s: f64) {
    for (number, (begin, name)) in series.phases.iter().enumerate() {
        let end = series
            .phases
            .get(number + 1)
            .map_or(end_s, |(next, _)| *next);
        let (from, to) = (x_of(*begin, end_s), x_of(end.min(end_s), end_s));
        let fill = if number % 2 == 0 { "#f4f4f4" } else { "#fff" };
        let _ = writeln!(
            out,
            r##"<rect x="{from:.1}" y="{top}" width="{:.1}" height="{PANEL}" fill="{fill}"/>"##,
            (to - from).max(0.0)
        );
        if to - from > 40.0 {
            let _ = writeln!(
                out,
                r##"<text x="{:.1}" y="{:.1}" fill="#999" font-size="11">{}</text>"##,
                from + 4.0,
                top + 13.0,
                escaped(name)
            );
        }
    }
}

/// Round numbers from 0 up to `high`.
fn marks(high: f64) -> Vec<f64> {
    let rough = (high / MARKS).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .map(|factor| factor * power)
        .find(|&step| step >= rough)
        .unwrap_or(rough);
    let mut marks = Vec::new();
    let mut mark = 0.0;
    while mark <= high {
        marks.push(mark);
        mark += step;
    }
    marks
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::super::sample::{GuestNumbers, HostNumbers};
    use super::*;

    #[test]
    fn marks_are_round_and_reach_the_top() {
        assert_eq!(marks(10.0), [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]);
        assert_eq!(marks(1234.0), [0.0, 500.0, 1000.0]);
        assert!(marks(0.0).len() < 10);
    }

    #[test]
    fn a_picture_of_little_is_whole() {
        let mut series = Series::new();
        series.phase("a < b");
        series.add(GuestNumbers::default(), HostNumbers::default());
        let text = svg(&series, "x & y");
        assert!(text.starts_with("<svg") && text.trim_end().ends_with("</svg>"));
        assert!(text.contains("x &amp; y") && !text.contains("NaN") && !text.contains("inf"));
    }
}
