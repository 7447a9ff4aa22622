// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The crate's layers import downwards only, and the parts of a layer do not
//! import each other in a circle.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// From the floor up, as `lib.rs` lists them.
const LAYERS: [&str; 12] = [
    "spec", "machine", "codec", "arena", "log", "ledger", "space", "engine", "recover", "maintain",
    "store", "forge",
];
/// What these consist of is one thing in several files, which know each other.
const UNDIVIDED: [&str; 2] = ["arena", "recover"];

/// A layer and, if it is divided, the part of it; "" is the layer's own file.
type Room = (String, String);
type Imports = BTreeMap<Room, BTreeSet<Room>>;

/// A source without its tests, its comments and its white space.
fn code(source: &str) -> String {
    let lines = source
        .lines()
        .take_while(|line| !line.starts_with("mod tests"))
        .filter(|line| !line.trim_start().starts_with("//"));
    lines.flat_map(str::split_whitespace).collect()
}

fn name(text: &str) -> &str {
    let end = text.find(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    &text[..end.unwrap_or(text.len())]
}

/// The names that stand at the head of a path's rest: one, or those in the outermost braces.
fn heads(rest: &str) -> Vec<&str> {
    let Some(inner) = rest.strip_prefix('{') else {
        return vec![name(rest)];
    };
    let (mut depth, mut heads) = (0_usize, vec![name(inner)]);
    for (at, letter) in inner.char_indices() {
        match letter {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => heads.push(name(&inner[at + 1..])),
            _ => (),
        }
    }
    heads.retain(|head| !head.is_empty());
    heads
}

/// All paths in a source that begin at the crate's root, each cut off behind the second name.
fn paths(source: &str, own: &[&str]) -> Vec<[String; 2]> {
    let mut code = code(source);
    // From the root instead of from here.
    let above = |levels: usize| {
        let path = &own[..own.len().saturating_sub(levels)];
        path.iter()
            .fold("crate::".to_owned(), |path, part| path + part + "::")
    };
    code = code.replace("super::super::", &above(2));
    code = code.replace("super::", &above(1));
    let mut paths = Vec::new();
    for rest in code.split("crate::").skip(1) {
        for first in heads(rest) {
            let below = match rest.strip_prefix(first) {
                Some(below) if !rest.starts_with('{') => below.strip_prefix("::"),
                _ => None,
            };
            let seconds = below.map_or_else(|| vec![""], heads);
            paths.extend(
                seconds
                    .iter()
                    .map(|second| [first, second].map(str::to_owned)),
            );
        }
    }
    paths
}

/// Reads all sources below `folder`, which is the module `own`.
fn gather(folder: &Path, own: &[&str], sources: &mut Vec<(Vec<String>, String)>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap();
        let mut module = own.to_vec();
        if !["lib", "mod"].contains(&stem) {
            module.push(stem);
        }
        if path.is_dir() {
            gather(&path, &module, sources);
        } else {
            let module = module.iter().map(|part| (*part).to_owned()).collect();
            sources.push((module, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

/// What each room imports of the others. `lib.rs` knows all.
fn imports(sources: &[(Vec<String>, String)]) -> Imports {
    let room = |layer: &str, part: &str| {
        let is_part = !UNDIVIDED.contains(&layer)
            && sources
                .iter()
                .any(|(module, _)| module.len() > 1 && module[0] == layer && module[1] == part);
        let part = if is_part { part } else { "" };
        (layer.to_owned(), part.to_owned())
    };
    let mut imports = Imports::new();
    for (module, source) in sources.iter().filter(|(module, _)| !module.is_empty()) {
        let own: Vec<_> = module.iter().map(String::as_str).collect();
        let from = room(own[0], own.get(1).unwrap_or(&""));
        let found = imports.entry(from.clone()).or_default();
        let rooms = paths(source, &own);
        let rooms = rooms.iter().map(|[layer, part]| room(layer, part));
        found.extend(rooms.filter(|to| *to != from));
    }
    imports
}

/// Imports that run up, or to something that is no layer: what the crate's root shows to others is
/// not for its own modules.
fn upward(imports: &Imports) -> Vec<String> {
    let rank = |layer: &str| LAYERS.iter().position(|name| *name == layer);
    let arrows = imports
        .iter()
        .flat_map(|(from, rooms)| rooms.iter().map(move |to| (from, to)));
    arrows
        .filter(|(from, to)| rank(&to.0).is_none() || rank(&to.0) > rank(&from.0))
        .map(|(from, to)| format!("{from:?} imports {to:?}"))
        .collect()
}

/// Rooms that import nothing of those that are left go, until none does; what is left has circles.
fn circles(mut imports: Imports) -> Imports {
    loop {
        let rooms: BTreeSet<_> = imports.keys().cloned().collect();
        let before = imports.len();
        for imported in imports.values_mut() {
            imported.retain(|room| rooms.contains(room));
        }
        imports.retain(|_, imported| !imported.is_empty());
        if imports.len() == before {
            return imports;
        }
    }
}

fn own_imports() -> Imports {
    let mut sources = Vec::new();
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    gather(&folder, &[], &mut sources);
    imports(&sources)
}

#[test]
fn imports_go_down_the_layers() {
    let imports = own_imports();
    let upward = upward(&imports);
    assert!(upward.is_empty(), "{upward:#?}");
    // It does see them.
    let room = |layer: &str, part: &str| (layer.to_owned(), part.to_owned());
    assert!(imports[&room("space", "")].contains(&room("ledger", "objects")));
    let layers: BTreeSet<_> = imports.keys().map(|(layer, _)| layer.as_str()).collect();
    assert_eq!(layers, BTreeSet::from(LAYERS));
}

#[test]
fn no_part_of_a_layer_imports_another_in_a_circle() {
    let circles = circles(own_imports());
    assert!(circles.is_empty(), "{circles:#?}");
}

fn forged(sources: &[(&str, &str)]) -> Imports {
    let split = |(module, source): &(&str, &str)| {
        let module = module.split('/').map(str::to_owned).collect();
        (module, (*source).to_owned())
    };
    imports(&sources.iter().map(split).collect::<Vec<_>>())
}

#[test]
fn an_arrow_that_runs_up_is_found() {
    let down = (
        "ledger/replace",
        "use crate::log::{Log, Target};\n// crate::store::no",
    );
    let floor = (
        "log",
        "let x = f(crate::arena::g());\nmod tests {\n use crate::store;",
    );
    assert!(upward(&forged(&[down, floor])).is_empty());
    for up in [
        "use crate::ledger::Ledger;",
        "use crate::{\n    spec::Page,\n    ledger,\n};",
        "let x = crate::ledger::f();",
        "use super::ledger::Ledger;",
        // The root's own name for something.
        "use crate::Store;",
    ] {
        assert_eq!(upward(&forged(&[down, ("log", up)])).len(), 1, "{up}");
    }
}

#[test]
fn a_circle_inside_a_layer_is_found() {
    let forge = |last: &str| {
        circles(forged(&[
            ("ledger", "use crate::ledger::{a::A, b::B};"),
            ("ledger/a", "use crate::ledger::b::{B, C};"),
            ("ledger/b", "use super::c;"),
            ("ledger/c", last),
        ]))
    };
    assert!(forge("use crate::log::Log;").is_empty());
    assert_eq!(forge("use super::a;").len(), 4);
    assert_eq!(forge("use crate::ledger::{\n    Ledger,\n};").len(), 4);
}
