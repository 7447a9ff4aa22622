// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where in the guest the instructions go, function by function.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::rig::{CASES, Case, Rig};
use super::run::{self, Ended, load_of};
use super::{Bench, LOAD_LIMIT, exact, roomy};
use crate::bench::figures::Figures;
use crate::guest::{Counting, Guest};

/// The cases that are looked into.
const PROFILED: [&str; 3] = ["cram", "mthp", "disk"];
/// How many functions of each are shown.
const SHOWN: usize = 45;
/// How the module's functions are marked.
const DRIVER: &str = "[cram]";
/// Addresses below are programs'.
const KERNEL: u64 = 1 << 63;

/// Instructions by function.
type Functions = BTreeMap<String, u64>;

/// Writes `guest-profile.txt`, and gives no figures.
pub(super) fn run(bench: &Bench<'_>) -> Result<Figures> {
    let mut text = String::from(
        "Instructions of the guest for each page moved, by function: what a load takes in a guest\n\
         that swaps, less what it takes in one that has room.\n",
    );
    let mut base: BTreeMap<bool, Functions> = BTreeMap::new();
    for large_folios in [false, true] {
        let case = roomy(large_folios);
        let (functions, _) = profile(bench, &case, bench.extent.roomy_mib)?;
        base.insert(large_folios, functions);
    }
    for case in CASES.iter().filter(|case| PROFILED.contains(&case.name)) {
        let (functions, pages) = profile(bench, case, bench.extent.memory_mib)?;
        let empty = Functions::new();
        let without = base.get(&case.large_folios).unwrap_or(&empty);
        write_table(&mut text, case, &functions, without, pages)?;
    }
    let path = bench.out.join("guest-profile.txt");
    std::fs::write(&path, &text).with_context(|| format!("cannot write {}", path.display()))?;
    println!("{text}\n  profile: {}", path.display());
    Ok(Figures::default())
}

fn write_table(
    text: &mut String,
    case: &Case,
    functions: &Functions,
    without: &Functions,
    pages: u64,
) -> Result<()> {
    let mut rows: Vec<(&str, f64)> = functions
        .iter()
        .map(|(name, count)| {
            let base = without.get(name).copied().unwrap_or(0);
            (name.as_str(), (exact(*count) - exact(base)) / exact(pages))
        })
        .collect();
    rows.sort_by(|(_, one), (_, other)| other.total_cmp(one));
    let sum: f64 = rows.iter().map(|(_, value)| value).sum();
    let driver = rows.iter().filter(|(name, _)| name.ends_with(DRIVER));
    let driver: f64 = driver.map(|(_, value)| value).sum();
    writeln!(
        text,
        "\n{}: {sum:.0} for each of {pages} pages, {driver:.0} of them in {DRIVER}",
        case.name
    )?;
    for (name, value) in rows.iter().take(SHOWN) {
        writeln!(text, "  {value:>8.1}  {name}")?;
    }
    Ok(())
}

/// Runs the load once; gives what it took by function, and the pages moved.
fn profile(bench: &Bench<'_>, case: &Case, memory_mib: u32) -> Result<(Functions, u64)> {
    eprint!("    {}, profiled:", case.name);
    let rig = Rig::start(bench.artifacts, case, memory_mib, Some(Counting::Profile))?;
    let counter = rig.guest().counter()?;
    let symbols = Symbols::read(bench, rig.guest())?;
    let before = counter.profile()?;
    let outcome = run::run(&rig, &load_of(bench.extent.load_mib), LOAD_LIMIT)?;
    ensure!(outcome.ended == Ended::Completed, "{outcome:?}");
    let mut functions = Functions::new();
    for (address, count) in counter.profile()? {
        let count = count - before.get(&address).copied().unwrap_or(0);
        *functions.entry(symbols.name(address)).or_default() += count;
    }
    eprintln!(" = {:.1} s", outcome.wall_s);
    Ok((functions, outcome.moved.pages()))
}

/// Where functions begin.
struct Symbols(BTreeMap<u64, String>);

impl Symbols {
    /// The kernel's from its file, the modules' from the guest.
    fn read(bench: &Bench<'_>, guest: &Guest) -> Result<Self> {
        let output = Command::new("nm")
            .arg(&bench.artifacts.kernel)
            .output()
            .context("cannot start nm")?;
        ensure!(output.status.success(), "nm failed on the guest's kernel");
        let kernel = String::from_utf8_lossy(&output.stdout);
        let modules = guest.shell("grep '\\[' /proc/kallsyms || true")?;
        Ok(Self(
            kernel
                .lines()
                .chain(modules.lines())
                .filter_map(symbol)
                .collect(),
        ))
    }

    fn name(&self, address: u64) -> String {
        if address < KERNEL {
            return "(programs)".to_owned();
        }
        let below = self.0.range(..=address).next_back();
        below.map_or_else(|| format!("{address:x}"), |(_, name)| name.clone())
    }
}

/// "ffffffff81000000 T _text", and after that maybe the module.
fn symbol(line: &str) -> Option<(u64, String)> {
    let mut words = line.split_whitespace();
    let address = u64::from_str_radix(words.next()?, 16).ok()?;
    let kind = words.next()?;
    let name = words.next()?;
    let module = words.next().unwrap_or_default();
    matches!(kind, "t" | "T" | "w" | "W")
        .then(|| (address, format!("{name} {module}").trim_end().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_the_names_of_the_functions_they_are_in() {
        let lines =
            "ffffffff81000000 T first\nffffffff81000010 d data\nffffffffc0000000 t own\t[cram]";
        let symbols = Symbols(lines.lines().filter_map(symbol).collect());
        assert_eq!(symbols.name(0xffff_ffff_8100_0020), "first");
        assert_eq!(symbols.name(0xffff_ffff_c000_0000), "own [cram]");
        assert_eq!(symbols.name(0x40_0000), "(programs)");
    }
}
