// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What is compared, and with which loads.

use std::collections::BTreeSet;

use anyhow::{Result, bail};

use super::Extent;
use super::host_swap::{self, Means};

/// A load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Load {
    /// All pages, in order and at random.
    Cycle,
    /// A hot quarter, and at last all pages once.
    Cold,
    /// A hot quarter that moves, and is written to.
    Phases,
    /// Files read again and again beside a little memory of a program's own.
    PageCache,
    /// Three guests with mostly the same data.
    Twins,
    /// An idle guest, of which the host wants half of the RAM back.
    Squeeze,
}

impl Load {
    pub(super) const ALL: [Self; 6] = [
        Self::Cycle,
        Self::Cold,
        Self::Phases,
        Self::PageCache,
        Self::Twins,
        Self::Squeeze,
    ];

    /// On the command line, and in the names of figures.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Cycle => "cycle",
            Self::Cold => "cold",
            Self::Phases => "phases",
            Self::PageCache => "page-cache",
            Self::Twins => "twins",
            Self::Squeeze => "squeeze",
        }
    }

    /// Guests that run it at the same time.
    pub(super) fn guests(self) -> usize {
        match self {
            Self::Twins => 3,
            _ => 1,
        }
    }
}

/// What a guest's memory goes to when it is short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Swap {
    /// It has enough.
    None,
    /// Our device.
    Cram {
        /// The daemon's `--copies`; its default when none is said.
        copies: Option<&'static str>,
        /// The daemon's `--dedup`.
        dedup: &'static str,
    },
    /// Compressed memory in the guest, as a block device.
    Zram,
    /// Compressed memory in the guest, before a disk.
    Zswap,
    /// A virtio-blk disk.
    Disk,
    /// The host swaps, and keeps the guest's RAM to a limit.
    Host(Means, u64),
}

/// A way to run a load.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Arm {
    pub(super) name: String,
    pub(super) swap: Swap,
    /// RAM of each guest.
    pub(super) memory_mib: u32,
    /// The operator has the guest give RAM back, which it then reports as free.
    pub(super) squeezed: bool,
}

/// The device as it is when nothing is said.
const CRAM: Swap = Swap::Cram {
    copies: None,
    dedup: "guest",
};
/// What the daemon may be told about copies.
const COPIES: [&str; 3] = ["keep", "free", "adaptive"];

impl Arm {
    fn new(name: String, swap: Swap, memory_mib: u32) -> Self {
        Self {
            name,
            swap,
            memory_mib,
            squeezed: false,
        }
    }
}

/// What of the device there is to measure.
#[derive(Clone, Debug)]
pub(super) struct Abilities {
    /// What becomes of copies of pages that the guest has read back, when nothing is said; none when
    /// the daemon cannot be told.
    pub(super) copies: Option<String>,
    /// The operator can have a guest give RAM back.
    pub(super) squeeze: bool,
}

/// Why some arms cannot be had here, each reason once.
pub(super) type LeftOut = BTreeSet<String>;

/// All arms of a load but for those that cannot be had here.
pub(super) fn arms(
    load: Load,
    extent: &Extent,
    abilities: &Abilities,
    left_out: &mut LeftOut,
) -> Vec<Arm> {
    let mut arms = Vec::new();
    match load {
        Load::Cycle => {
            arms.push(no_swap(extent.cycle_roomy_mib));
            add_cram(&mut arms, extent.cycle_memory_mib, abilities, left_out);
            add_inside(&mut arms, extent.cycle_inside_mib);
            add_host(
                &mut arms,
                extent.cycle_roomy_mib,
                extent.cycle_limits_mib,
                left_out,
            );
        }
        Load::Cold => {
            arms.push(no_swap(extent.cold_roomy_mib));
            add_cram(&mut arms, extent.cold_memory_mib, abilities, left_out);
            add_squeezed(&mut arms, extent.cold_roomy_mib, abilities, left_out);
            if !extent.is_quick {
                add_inside(&mut arms, extent.cold_inside_mib);
            }
            add_host(
                &mut arms,
                extent.cold_roomy_mib,
                extent.cold_limits_mib,
                left_out,
            );
        }
        Load::Phases => {
            arms.push(no_swap(extent.cold_roomy_mib));
            add_cram(&mut arms, few(extent.cold_memory_mib), abilities, left_out);
            add_host(
                &mut arms,
                extent.cold_roomy_mib,
                few(extent.cold_limits_mib),
                left_out,
            );
        }
        Load::PageCache => {
            arms.push(no_swap(extent.cache_roomy_mib));
            add_cram(&mut arms, &[extent.cache_memory_mib], abilities, left_out);
            let inside = Swap::Disk;
            let name = format!("disk-{}", extent.cache_memory_mib);
            arms.push(Arm::new(name, inside, extent.cache_memory_mib));
        }
        Load::Twins => {
            arms.push(no_swap(extent.twins_roomy_mib));
            for dedup in ["off", "guest", "all"] {
                let swap = Swap::Cram {
                    copies: None,
                    dedup,
                };
                let name = format!("cram-{}-dedup-{dedup}", extent.twins_memory_mib);
                arms.push(Arm::new(name, swap, extent.twins_memory_mib));
            }
        }
        Load::Squeeze => {
            if abilities.squeeze {
                let memory = extent.squeeze_memory_mib;
                arms.push(squeezed(memory));
            } else {
                left_out.insert(NO_SQUEEZE.to_owned());
            }
        }
    }
    arms
}

/// The middle one of several sizes.
fn few<T>(sizes: &[T]) -> &[T] {
    let middle = sizes.len() / 2;
    sizes.get(middle..=middle).unwrap_or(sizes)
}

fn no_swap(memory_mib: u32) -> Arm {
    Arm::new("noswap".to_owned(), Swap::None, memory_mib)
}

/// Of all sizes with everything at its default, and of the middle one with copies treated otherwise.
fn add_cram(arms: &mut Vec<Arm>, sizes_mib: &[u32], abilities: &Abilities, left_out: &mut LeftOut) {
    for size in sizes_mib {
        arms.push(Arm::new(format!("cram-{size}"), CRAM, *size));
    }
    let Some(default) = &abilities.copies else {
        left_out.insert("copies kept or freed: the daemon has no option --copies".to_owned());
        return;
    };
    for size in few(sizes_mib) {
        for copies in COPIES.iter().filter(|copies| *copies != default) {
            let swap = Swap::Cram {
                copies: Some(copies),
                dedup: "guest",
            };
            arms.push(Arm::new(format!("cram-{size}-{copies}"), swap, *size));
        }
    }
}

fn squeezed(memory_mib: u32) -> Arm {
    Arm {
        squeezed: true,
        ..Arm::new(format!("cram-{memory_mib}-squeezed"), CRAM, memory_mib)
    }
}

const NO_SQUEEZE: &str = "squeezed guests: the daemon has no method client.squeeze";

/// A guest that has the RAM it was promised, and gives back what it does not use.
fn add_squeezed(
    arms: &mut Vec<Arm>,
    memory_mib: u32,
    abilities: &Abilities,
    left_out: &mut LeftOut,
) {
    if abilities.squeeze {
        arms.push(squeezed(memory_mib));
    } else {
        left_out.insert(NO_SQUEEZE.to_owned());
    }
}

fn add_inside(arms: &mut Vec<Arm>, memory_mib: u32) {
    for (name, swap) in [
        ("zram", Swap::Zram),
        ("zswap", Swap::Zswap),
        ("disk", Swap::Disk),
    ] {
        arms.push(Arm::new(format!("{name}-{memory_mib}"), swap, memory_mib));
    }
}

fn add_host(arms: &mut Vec<Arm>, memory_mib: u32, limits_mib: &[u64], left_out: &mut LeftOut) {
    for (name, means, limits) in [
        ("host-zram", Means::Zram, limits_mib),
        ("host-zswap", Means::Zswap, few(limits_mib)),
    ] {
        if let Some(why) = host_swap::missing(means) {
            left_out.insert(format!("{name}: {why}"));
            continue;
        }
        for limit in limits {
            let swap = Swap::Host(means, *limit);
            arms.push(Arm::new(format!("{name}-{limit}"), swap, memory_mib));
        }
    }
}

/// What is asked for on the command line: `LOAD`, `ARM` or `LOAD:ARM`. An arm is named by as much of
/// the beginning of its name as one likes.
pub(super) fn chosen(words: &[String], load: Load, arm: &Arm) -> bool {
    let is_arm = |word: &str| !word.is_empty() && arm.name.starts_with(word);
    words.is_empty()
        || words.iter().any(|word| match word.split_once(':') {
            Some((of_load, of_arm)) => of_load == load.name() && is_arm(of_arm),
            None => word == load.name() || is_arm(word),
        })
}

/// Fails when a word chooses nothing.
pub(super) fn check(words: &[String], all: &[(Load, Vec<Arm>)]) -> Result<()> {
    for word in words {
        let only = std::slice::from_ref(word);
        let chooses = |(load, arms): &(Load, Vec<Arm>)| {
            *word == load.name() || arms.iter().any(|arm| chosen(only, *load, arm))
        };
        if word != super::CODEC && !all.iter().any(chooses) {
            let loads: Vec<_> = Load::ALL.iter().map(|load| load.name()).collect();
            let mut arms: Vec<_> = all.iter().flat_map(|(_, arms)| arms).collect();
            arms.sort_by(|one, other| one.name.cmp(&other.name));
            arms.dedup_by(|one, other| one.name == other.name);
            let arms: Vec<_> = arms.iter().map(|arm| arm.name.as_str()).collect();
            bail!(
                "nothing is called {word}; there are loads: {} {}; and arms: {}",
                loads.join(" "),
                super::CODEC,
                arms.join(" ")
            );
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_choose() {
        let arm = Arm::new("cram-384-free".to_owned(), CRAM, 384);
        let is = |words: &[&str]| {
            let words: Vec<_> = words.iter().map(|word| (*word).to_owned()).collect();
            chosen(&words, Load::Cycle, &arm)
        };
        assert!(is(&[]) && is(&["cycle"]) && is(&["cram"]) && is(&["cold", "cycle:cram-384"]));
        assert!(!is(&["cold"]) && !is(&["cold:cram"]) && !is(&["cram-320"]) && !is(&["codec"]));
        let all = [(Load::Cycle, vec![arm])];
        assert!(check(&["codec".to_owned(), "cram".to_owned()], &all).is_ok());
        assert!(check(&["dram".to_owned()], &all).is_err());
    }

    #[test]
    fn arms_follow_what_there_is() {
        let names = |copies: Option<&str>, squeeze| -> Vec<String> {
            let abilities = Abilities {
                copies: copies.map(str::to_owned),
                squeeze,
            };
            let arms = arms(Load::Cold, &Extent::QUICK, &abilities, &mut LeftOut::new());
            arms.into_iter().map(|arm| arm.name).collect()
        };
        let (all, none) = (names(Some("free"), true), names(None, false));
        assert!(all.iter().any(|name| name.ends_with("-keep")));
        // That is the default already.
        assert!(!all.iter().any(|name| name.ends_with("-free")));
        assert!(all.iter().any(|name| name.ends_with("-squeezed")));
        assert!(none.len() < all.len() && none.contains(&"noswap".to_owned()));
        assert_eq!(few(&[1, 2, 3]), [2]);
    }
}
