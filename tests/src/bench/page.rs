// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! All results on one page, for a browser: pictures and tables of whatever was measured so far.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::chart::{self, Panel};
use super::figures::{Aim, Figures, show};
use super::{density, device, guest, store};

/// A subject: its name, what is on top of its part, its aims and its picture.
type Part = (
    &'static str,
    &'static str,
    &'static [Aim],
    fn(&Figures, &[Aim]) -> Vec<Panel>,
);

const PARTS: [Part; 4] = [
    (
        "store",
        "The store, by itself",
        store::AIMS,
        chart::store as fn(&Figures, &[Aim]) -> Vec<Panel>,
    ),
    (
        "device",
        "The device, over a real socket and real rings",
        device::AIMS,
        chart::device,
    ),
    (
        "guest",
        "Whole guests, and what else they could swap to",
        guest::AIMS,
        chart::guest,
    ),
    (
        "density",
        "The host's memory, all told",
        density::AIMS,
        chart::density,
    ),
];

const HEAD: &str = "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>\n\
    <meta name='viewport' content='width=device-width'>\n<title>vhost-device-cram: benchmarks</title>\n\
    <style>\n\
    body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;\n\
           padding: 0 1rem; }\n\
    h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }\n\
    svg { width: 100%; height: auto; border: 1px solid #ddd; border-radius: 6px; }\n\
    table { border-collapse: collapse; width: 100%; margin-top: 1rem; font-size: 0.9rem; }\n\
    td, th { padding: 0.25rem 0.6rem; border-bottom: 1px solid #eee; text-align: left; }\n\
    td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }\n\
    .met { color: #2a9d5c; } .missed { color: #c0392b; font-weight: 600; }\n\
    code { font-size: 0.9em; }\n\
    </style></head><body>\n";

/// Writes `report.html` into the folder of the results, from all that are there.
///
/// # Errors
/// When files cannot be read or written.
pub fn write(folder: &Path) -> Result<()> {
    let mut page = HEAD.to_owned();
    page += "<h1>vhost-device-cram: benchmarks</h1>\n<p>Ratios compare two things in one run, in turns. \
             What each figure means, and what it was measured on, is in <code>docs/performance.md</code>; \
             all figures are in the JSON files beside this page.</p>\n";
    for (name, title, aims, panels) in PARTS {
        let path = folder.join(format!("{name}.json"));
        let Ok(text) = fs::read_to_string(&path) else {
            continue;
        };
        let figures =
            Figures::from_json(&text).with_context(|| format!("in {}", path.display()))?;
        let _ = writeln!(page, "<h2>{title}</h2>");
        page += &chart::svg(&panels(&figures, aims));
        table(&figures, aims, &mut page);
    }
    page += "</body></html>\n";
    let path = folder.join("report.html");
    fs::write(&path, page).with_context(|| format!("cannot write {}", path.display()))
}

fn table(figures: &Figures, aims: &[Aim], page: &mut String) {
    *page += "<table><tr><th>figure</th><th></th><th>aim</th><th></th><th></th></tr>\n";
    for aim in aims {
        let Some(value) = figures.get(aim.name) else {
            continue;
        };
        let (wanted, verdict) = match aim.target {
            Some(target) if target.is_met(value) => (target.text(), "<span class='met'>met</span>"),
            Some(target) => (target.text(), "<span class='missed'>missed</span>"),
            None => (String::new(), ""),
        };
        let _ = writeln!(
            page,
            "<tr><td><code>{}</code></td><td class='number'>{}</td><td class='number'>{wanted}</td>\
             <td>{verdict}</td><td>{}</td></tr>",
            aim.name,
            show(value),
            aim.meaning
        );
    }
    *page += "</table>\n";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_what_was_measured() {
        let folder = tempfile::tempdir().unwrap();
        let mut figures = Figures::default();
        figures.set("put_vs_codec", 0.5);
        figures.write(&folder.path().join("store.json")).unwrap();
        write(folder.path()).unwrap();
        let page = fs::read_to_string(folder.path().join("report.html")).unwrap();
        assert!(page.contains("The store, by itself") && !page.contains("The device"));
        assert!(page.contains("missed") && page.contains("put_vs_codec") && page.contains("<svg"));
    }
}
