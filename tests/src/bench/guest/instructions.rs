// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Instructions of the guest for each page moved: what a load takes in a guest that swaps, less
//! what it takes in one that has room, divided by the pages that went out and came back.

use anyhow::{Context, Result, ensure};

use super::rig::{CASES, Case, Moved};
use super::{Bench, exact, roomy};
use crate::bench::figures::{Figures, median};
use crate::guest::Counting;

/// Those that are counted in every round. Which pages go out is a matter of moments, so what is
/// compared closely is counted more than once; the others are far away.
const OFTEN: [&str; 4] = ["cram", "mthp", "disk", "vhost_user_blk"];

/// What loads took that did not swap.
struct Base {
    small_folios: u64,
    large_folios: u64,
}

impl Base {
    fn of(&self, case: &Case) -> u64 {
        if case.large_folios {
            self.large_folios
        } else {
            self.small_folios
        }
    }
}

/// One load's instructions, and the pages that it moved.
#[derive(Clone, Copy)]
struct Count {
    total: u64,
    moved: Moved,
}

impl Count {
    fn per_page(&self, base: u64) -> f64 {
        exact(self.total.saturating_sub(base)) / exact(self.moved.pages())
    }
}

/// Runs the section.
pub(super) fn run(bench: &Bench<'_>) -> Result<Figures> {
    let mut figures = Figures::default();
    let base = Base {
        small_folios: without_swap(bench, &roomy(false), &mut figures)?,
        large_folios: without_swap(bench, &roomy(true), &mut figures)?,
    };
    let mut counts = vec![Vec::new(); CASES.len()];
    for round in 0..bench.extent.rounds {
        for (case, counts) in CASES.iter().zip(&mut counts) {
            if round == 0 || OFTEN.contains(&case.name) {
                counts.push(count(bench, case)?);
            }
        }
    }
    for (case, counts) in CASES.iter().zip(&counts) {
        note(case, counts, base.of(case), &mut figures);
    }
    let each = |name: &str| -> Vec<f64> {
        let mut of_case = CASES
            .iter()
            .zip(&counts)
            .filter(|(case, _)| case.name == name);
        let each = |(case, counts): (&Case, &Vec<Count>)| {
            counts
                .iter()
                .map(|count| count.per_page(base.of(case)))
                .collect()
        };
        of_case.next().map(each).unwrap_or_default()
    };
    for other in ["disk", "vhost_user_blk", "zram", "zswap"] {
        // Round by round, as far as there are rounds of both.
        let rounds = each("cram").into_iter().zip(each(other));
        let ratios = rounds.map(|(ours, theirs)| ours / theirs).collect();
        figures.set(format!("guest_insn_per_page_vs_{other}"), median(ratios));
    }
    Ok(figures)
}

fn without_swap(bench: &Bench<'_>, case: &Case, figures: &mut Figures) -> Result<u64> {
    let memory = bench.extent.roomy_mib;
    let total = bench.completed(case, memory, Some(Counting::Blocks), |outcome| {
        let pages = outcome.moved.pages();
        ensure!(pages == 0, "a guest with room swapped {pages} pages");
        outcome.instructions.context("nothing was counted")
    })?;
    figures.set(format!("guest_insn_total_{}", case.name), exact(total));
    Ok(total)
}

fn count(bench: &Bench<'_>, case: &Case) -> Result<Count> {
    let memory = bench.extent.memory_mib;
    bench.completed(case, memory, Some(Counting::Blocks), |outcome| {
        ensure!(outcome.moved.pages() > 0, "a guest did not swap");
        Ok(Count {
            total: outcome.instructions.context("nothing was counted")?,
            moved: outcome.moved,
        })
    })
}

fn note(case: &Case, counts: &[Count], base: u64, figures: &mut Figures) {
    let each = |count: &Count| count.per_page(base);
    let middle = |take: &dyn Fn(&Count) -> f64| median(counts.iter().map(take).collect());
    let name = case.name;
    figures.set(per_page(name), middle(&each));
    let totals = [
        ("guest_insn_total", middle(&|count| exact(count.total))),
        ("pages_out", middle(&|count| exact(count.moved.pages_out))),
        ("pages_in", middle(&|count| exact(count.moved.pages_in))),
        ("guest_insn_spread", spread(counts.iter().map(each))),
    ];
    for (of, value) in totals {
        figures.set(format!("{of}_{name}"), value);
    }
}

/// How much more the most is than the least.
fn spread(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let least = values.clone().fold(f64::INFINITY, f64::min);
    values.fold(0.0, f64::max) / least - 1.0
}

/// The name of the figure: our device's is the bare one.
fn per_page(case: &str) -> String {
    match case {
        "cram" => "guest_insn_per_page".to_owned(),
        other => format!("guest_insn_per_page_{other}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_swapping_takes_is_divided_by_the_pages() {
        let counted = |total, pages_out, pages_in| Count {
            total,
            moved: Moved {
                pages_out,
                pages_in,
            },
        };
        let mut figures = Figures::default();
        let counts = [
            counted(1_500, 2, 3),
            counted(1_900, 4, 5),
            counted(1_600, 2, 3),
        ];
        note(&CASES[0], &counts, 1_000, &mut figures);
        assert_eq!(figures.get("guest_insn_per_page"), Some(100.0));
        assert_eq!(figures.get("guest_insn_total_cram"), Some(1_600.0));
        assert_eq!(figures.get("pages_out_cram"), Some(2.0));
        let spread = figures.get("guest_insn_spread_cram").unwrap_or_default();
        assert!((spread - 0.2).abs() < 1e-9, "{spread}");
    }
}
