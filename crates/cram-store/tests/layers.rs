// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The crate's modules import each other in one direction only.

#![allow(missing_docs)]
// Failing is what tests do, also in functions that are no tests themselves.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What each module (a file, or a folder) imports of the others.
type Imports = BTreeMap<String, BTreeSet<String>>;

/// The names after `crate::` in a source, its comments and its tests left out.
fn imported(source: &str) -> impl Iterator<Item = String> {
    let code = source
        .lines()
        .take_while(|line| !line.starts_with("mod tests"))
        .filter(|line| !line.trim_start().starts_with("//"));
    let names = code.flat_map(|line| line.split("crate::").skip(1));
    names.map(|rest| {
        rest.chars()
            .take_while(|letter| letter.is_ascii_alphanumeric() || *letter == '_')
            .collect()
    })
}

fn gather(folder: &Path, module: Option<&str>, imports: &mut Imports) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let own = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let module = module.unwrap_or(&own);
        if path.is_dir() {
            gather(&path, Some(module), imports);
            continue;
        }
        let found = imports.entry(module.to_owned()).or_default();
        found.extend(imported(&std::fs::read_to_string(&path).unwrap()));
    }
}

/// Modules that import nothing of those that are left go, until none does; what is left has circles.
fn circles(mut imports: Imports) -> Imports {
    loop {
        let names: BTreeSet<_> = imports.keys().cloned().collect();
        let before = imports.len();
        for (module, imported) in &mut imports {
            // What is no module is a type of the crate's root, which all may know.
            imported.retain(|name| names.contains(name) && name != module);
        }
        imports.retain(|_, imported| !imported.is_empty());
        if imports.len() == before {
            return imports;
        }
    }
}

#[test]
fn no_module_imports_another_in_a_circle() {
    let mut imports = Imports::new();
    let sources = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    gather(&sources, None, &mut imports);
    // It knows all, and nobody knows it.
    imports.remove("lib");
    assert!(imports.len() > 30 && imports["space"].contains("ledger"));
    let circles = circles(imports);
    assert!(circles.is_empty(), "{circles:#?}");
}

#[test]
fn a_circle_is_found() {
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let mut imports = Imports::from([
        ("a".to_owned(), set(&["b"])),
        ("b".to_owned(), set(&["c", "Page"])),
        ("c".to_owned(), set(&[])),
    ]);
    assert!(circles(imports.clone()).is_empty());
    imports.insert("c".to_owned(), set(&["a"]));
    assert_eq!(circles(imports).len(), 3);
    let names: Vec<_> =
        imported("use crate::b::{C, D};\n// crate::no\nlet x = crate::e::f(crate::g());").collect();
    assert_eq!(names, ["b", "e", "g"]);
}
