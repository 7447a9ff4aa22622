// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Figures that follow from those of the runs: one arm's over another's.

use crate::bench::figures::Figures;

/// An arm's work must be this share of that of a guest with enough RAM for its bytes to count.
const WORK_MIN: f64 = 0.93;

/// An arm of a load, as far as it matters here.
struct Point {
    /// Names of its figures begin so.
    prefix: String,
    peak_mib: f64,
    steady_mib: f64,
    work_per_s: f64,
    load_s: f64,
}

/// Whose arms.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::bench) enum Family {
    /// A guest with enough RAM.
    NoSwap,
    /// Our device, as it is when nothing is said.
    Cram,
    /// Our device, told what to do with copies.
    CramKeep,
    /// Our device, told what to do with copies.
    CramFree,
    /// Our device, told what to do with copies.
    CramAdaptive,
    /// A guest with our device that is squeezed.
    CramSqueezed,
    /// The host swaps to zram.
    HostZram,
    /// The host swaps to zswap.
    HostZswap,
    /// The guest swaps to something of its own.
    Inside,
}

impl Family {
    /// By the arm's name, as in figures.
    pub(in crate::bench) fn of(arm: &str) -> Self {
        match arm {
            "noswap" => Self::NoSwap,
            _ if arm.starts_with("host_zram") => Self::HostZram,
            _ if arm.starts_with("host_zswap") => Self::HostZswap,
            _ if !arm.starts_with("cram") => Self::Inside,
            _ if arm.ends_with("_keep") => Self::CramKeep,
            _ if arm.ends_with("_free") => Self::CramFree,
            _ if arm.ends_with("_adaptive") => Self::CramAdaptive,
            _ if arm.ends_with("_squeezed") => Self::CramSqueezed,
            _ => Self::Cram,
        }
    }
}

/// Arms of a load that came to their end, by name.
pub(in crate::bench) fn arms_of<'a>(
    figures: &'a Figures,
    load: &'a str,
) -> impl Iterator<Item = &'a str> {
    let rest = move |name: &'a str| name.strip_prefix(load)?.strip_prefix('_');
    figures
        .iter()
        .filter_map(move |(name, _)| rest(name)?.strip_suffix("_peak_mib"))
}

fn points(figures: &Figures, load: &str, wanted: impl Fn(Family) -> bool) -> Vec<Point> {
    let point = |arm: &str| {
        let prefix = format!("{load}_{arm}");
        let get = |what: &str| figures.get(&format!("{prefix}_{what}"));
        Some(Point {
            peak_mib: get("peak_mib")?,
            steady_mib: get("steady_mib")?,
            work_per_s: get("work_per_s")?,
            load_s: get("load_s")?,
            prefix,
        })
    };
    arms_of(figures, load)
        .filter(|arm| wanted(Family::of(arm)))
        .filter_map(point)
        .collect()
}

/// Adds what follows. Nothing is added for what was not measured.
pub(super) fn derive(figures: &mut Figures) {
    cycle(figures);
    cold(figures);
    squeeze(figures);
    twins(figures);
}

fn is_ours(family: Family) -> bool {
    matches!(family, Family::Cram | Family::CramSqueezed)
}

fn cycle(figures: &mut Figures) {
    let base = points(figures, "cycle", |family| family == Family::NoSwap);
    let ours = points(figures, "cycle", is_ours);
    let best = ours
        .iter()
        .min_by(|one, other| one.peak_mib.total_cmp(&other.peak_mib));
    let (Some(base), Some(best)) = (base.first(), best) else {
        return;
    };
    figures.set("cycle_host_vs_noswap", best.peak_mib / base.peak_mib);
    figures.set("cycle_load_s", best.load_s);
    if let Some(ratio) = figures.get(&format!("{}_pool_vs_needed", best.prefix)) {
        figures.set("cycle_pool_vs_needed", ratio);
    }
}

fn cold(figures: &mut Figures) {
    let base = points(figures, "cold", |family| family == Family::NoSwap);
    let ours = points(figures, "cold", is_ours);
    let zram = points(figures, "cold", |family| family == Family::HostZram);
    let Some(base) = base.first() else {
        return;
    };
    // Bytes and work, before and after what is cold was packed once more.
    let plain = ours.iter().map(|point| (point.peak_mib, point.work_per_s));
    if let Some((bytes, work)) = best(plain, base.work_per_s) {
        figures.set("cold_host_vs_noswap", bytes / base.peak_mib);
        figures.set("cold_work_vs_noswap", work / base.work_per_s);
    }
    let steady = ours
        .iter()
        .map(|point| (point.steady_mib, point.work_per_s));
    if let Some((bytes, work)) = best(steady, base.work_per_s)
        && let Some(theirs) = bytes_at(&zram, work)
    {
        figures.set("cold_host_vs_host_zram", bytes / theirs);
    }
    let repacked: Vec<(f64, f64)> = ours
        .iter()
        .filter_map(|point| {
            let get = |what: &str| figures.get(&format!("{}_{what}", point.prefix));
            Some((get("recompressed_mib")?, get("work_recompressed_per_s")?))
        })
        .collect();
    if let Some((bytes, work)) = best(repacked.into_iter(), base.work_per_s) {
        figures.set("cold_host_vs_noswap_recompressed", bytes / base.steady_mib);
        figures.set("cold_work_vs_noswap_recompressed", work / base.work_per_s);
        if let Some(theirs) = bytes_at(&zram, work) {
            figures.set("cold_host_vs_host_zram_recompressed", bytes / theirs);
        }
    }
}

/// The fewest bytes of those whose work is enough; the most work, when none's is.
fn best(points: impl Iterator<Item = (f64, f64)>, full_work: f64) -> Option<(f64, f64)> {
    let points: Vec<_> = points.collect();
    let enough = points
        .iter()
        .filter(|(_, work)| *work >= WORK_MIN * full_work)
        .min_by(|one, other| one.0.total_cmp(&other.0));
    let most = points.iter().max_by(|one, other| one.1.total_cmp(&other.1));
    enough.or(most).copied()
}

/// Bytes with which others do so much work: on the line between two that were measured, and beyond
/// them the nearer one's.
fn bytes_at(points: &[Point], work: f64) -> Option<f64> {
    let mut sorted: Vec<_> = points
        .iter()
        .map(|point| (point.work_per_s, point.steady_mib))
        .collect();
    sorted.sort_by(|one, other| one.0.total_cmp(&other.0));
    let above = sorted.iter().position(|(theirs, _)| *theirs >= work);
    match above {
        None => sorted.last().map(|(_, bytes)| *bytes),
        Some(0) => sorted.first().map(|(_, bytes)| *bytes),
        Some(at) => {
            let ((low, low_bytes), (high, high_bytes)) = (*sorted.get(at - 1)?, *sorted.get(at)?);
            let share = (work - low) / (high - low).max(f64::MIN_POSITIVE);
            Some(low_bytes + share * (high_bytes - low_bytes))
        }
    }
}

fn squeeze(figures: &mut Figures) {
    let Some(point) = points_any(figures, "squeeze", "squeeze_half_s") else {
        return;
    };
    let get = |what: &str| figures.get(&format!("{point}_{what}"));
    let (seconds, before, after) = (get("squeeze_half_s"), get("before_mib"), get("steady_mib"));
    let recompressed = get("recompressed_mib");
    let touches = get("unsqueeze_touch_p99_ratio");
    if let Some(seconds) = seconds {
        figures.set("squeeze_half_s", seconds);
    }
    if let Some((before, after)) = before.zip(after) {
        figures.set("squeeze_host_after_vs_before", after / before);
    }
    if let Some((before, after)) = before.zip(recompressed) {
        figures.set("squeeze_host_after_vs_before_recompressed", after / before);
    }
    if let Some(touches) = touches {
        figures.set("unsqueeze", touches);
    }
}

/// The first arm of a load that has a figure of that name.
fn points_any(figures: &Figures, load: &str, what: &str) -> Option<String> {
    arms_of(figures, load)
        .map(|arm| format!("{load}_{arm}"))
        .find(|prefix| figures.get(&format!("{prefix}_{what}")).is_some())
}

fn twins(figures: &mut Figures) {
    let of = |dedup: &str| {
        let ending = format!("_dedup_{dedup}");
        let arm = arms_of(figures, "twins").find(|arm| arm.ends_with(&ending))?;
        figures.get(&format!("twins_{arm}_steady_per_guest_mib"))
    };
    let (off, guest, all) = (of("off"), of("guest"), of("all"));
    if let Some((off, all)) = off.zip(all) {
        figures.set("twins_host_bytes_per_guest", all / off);
    }
    if let Some((off, guest)) = off.zip(guest) {
        figures.set("twins_host_bytes_per_guest_own", guest / off);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(figures: &mut Figures, arm: &str, bytes: f64, work: f64) {
        for (what, value) in [
            ("peak_mib", bytes),
            ("steady_mib", bytes),
            ("work_per_s", work),
            ("load_s", 1.0),
        ] {
            figures.set(format!("{arm}_{what}"), value);
        }
    }

    #[test]
    fn the_smallest_arm_that_works_enough_is_compared() {
        let mut figures = Figures::default();
        set(&mut figures, "cold_noswap", 1000.0, 100.0);
        set(&mut figures, "cold_cram_256", 500.0, 50.0);
        set(&mut figures, "cold_cram_320", 700.0, 95.0);
        set(&mut figures, "cold_cram_448", 900.0, 98.0);
        set(&mut figures, "cold_cram_448_keep", 1.0, 100.0);
        set(&mut figures, "cold_host_zram_400", 600.0, 90.0);
        set(&mut figures, "cold_host_zram_480", 800.0, 100.0);
        derive(&mut figures);
        assert_eq!(figures.get("cold_host_vs_noswap"), Some(0.7));
        assert_eq!(figures.get("cold_work_vs_noswap"), Some(0.95));
        // At 95 they take 700.
        assert_eq!(figures.get("cold_host_vs_host_zram"), Some(1.0));
        assert_eq!(figures.get("cold_host_vs_noswap_recompressed"), None);
    }

    #[test]
    fn beyond_what_was_measured_the_nearer_end_counts() {
        let point = |work_per_s, steady_mib| Point {
            prefix: String::new(),
            peak_mib: 0.0,
            steady_mib,
            work_per_s,
            load_s: 0.0,
        };
        let points = [point(90.0, 600.0), point(100.0, 800.0)];
        assert_eq!(bytes_at(&points, 80.0), Some(600.0));
        assert_eq!(bytes_at(&points, 110.0), Some(800.0));
        assert_eq!(bytes_at(&[], 80.0), None);
    }

    #[test]
    fn families() {
        assert_eq!(Family::of("cram_384"), Family::Cram);
        assert_eq!(Family::of("cram_384_free"), Family::CramFree);
        assert_eq!(Family::of("host_zram_480"), Family::HostZram);
        assert_eq!(Family::of("zram_384"), Family::Inside);
    }

    #[test]
    fn twins_are_compared_with_those_that_share_nothing() {
        let mut figures = Figures::default();
        for (dedup, bytes) in [("off", 400.0), ("all", 200.0)] {
            let arm = format!("twins_cram_256_dedup_{dedup}");
            set(&mut figures, &arm, bytes, 1.0);
            figures.set(format!("{arm}_steady_per_guest_mib"), bytes);
        }
        derive(&mut figures);
        assert_eq!(figures.get("twins_host_bytes_per_guest"), Some(0.5));
    }
}
