// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which page to evict: four policies, plainly, to be compared on traces with each other and with the
//! store. Each is a set of names that a number of them fit into.

use std::collections::{HashMap, HashSet, VecDeque};

/// A page of a trace.
pub type Name = u64;

/// A cache of names.
pub trait Policy {
    /// For people and figures.
    fn name(&self) -> &'static str;
    /// The page is asked for: whether it is there. If not, it comes in, and another one goes.
    fn ask(&mut self, page: Name) -> bool;
}

/// Misses of a policy on a trace, as a share of the requests.
pub fn miss_ratio(policy: &mut dyn Policy, trace: &[Name]) -> f64 {
    let misses = trace.iter().filter(|page| !policy.ask(**page)).count();
    #[allow(clippy::cast_precision_loss, reason = "a share")]
    let ratio = misses as f64 / trace.len().max(1) as f64;
    ratio
}

/// First in, first out.
pub struct Fifo {
    size: usize,
    order: VecDeque<Name>,
    present: HashSet<Name>,
}

impl Fifo {
    /// For so many pages.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            size,
            order: VecDeque::new(),
            present: HashSet::new(),
        }
    }
}

impl Policy for Fifo {
    fn name(&self) -> &'static str {
        "fifo"
    }

    fn ask(&mut self, page: Name) -> bool {
        if !self.present.insert(page) {
            return true;
        }
        self.order.push_back(page);
        if self.order.len() > self.size
            && let Some(oldest) = self.order.pop_front()
        {
            self.present.remove(&oldest);
        }
        false
    }
}

/// Least recently used.
pub struct Lru {
    size: usize,
    clock: u64,
    used: HashMap<Name, u64>,
    /// Every use; only the last one of a page counts.
    order: VecDeque<(Name, u64)>,
}

impl Lru {
    /// For so many pages.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            size,
            clock: 0,
            used: HashMap::new(),
            order: VecDeque::new(),
        }
    }
}

impl Policy for Lru {
    fn name(&self) -> &'static str {
        "lru"
    }

    fn ask(&mut self, page: Name) -> bool {
        self.clock += 1;
        let was_there = self.used.insert(page, self.clock).is_some();
        self.order.push_back((page, self.clock));
        while self.used.len() > self.size {
            match self.order.pop_front() {
                Some((page, at)) if self.used.get(&page) == Some(&at) => {
                    self.used.remove(&page);
                }
                Some(_) => (),
                None => break,
            }
        }
        was_there
    }
}

/// SIEVE (Y. Zhang et al., "SIEVE is Simpler than LRU", NSDI 2024): a hand goes from old to new; what
/// was used since it last came by stays where it is, the next that was not goes.
pub struct Sieve {
    size: usize,
    /// From old to new; pages that are gone are left as `None` until they are swept out.
    order: Vec<Option<Name>>,
    hand: usize,
    used: HashMap<Name, bool>,
}

impl Sieve {
    /// For so many pages.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            size,
            order: Vec::new(),
            hand: 0,
            used: HashMap::new(),
        }
    }

    fn evict(&mut self) {
        loop {
            if self.hand >= self.order.len() {
                self.hand = 0;
            }
            let Some(entry) = self.order.get_mut(self.hand) else {
                return;
            };
            self.hand += 1;
            let Some(page) = *entry else { continue };
            match self.used.get_mut(&page) {
                Some(used @ true) => *used = false,
                _ => {
                    *entry = None;
                    self.used.remove(&page);
                    return;
                }
            }
        }
    }
}

impl Policy for Sieve {
    fn name(&self) -> &'static str {
        "sieve"
    }

    fn ask(&mut self, page: Name) -> bool {
        if let Some(used) = self.used.get_mut(&page) {
            *used = true;
            return true;
        }
        if self.used.len() >= self.size {
            self.evict();
        }
        self.used.insert(page, false);
        self.order.push(Some(page));
        if self.order.len() > 2 * self.size + 64 {
            let before = self.order.iter().take(self.hand);
            self.hand = before.filter(|entry| entry.is_some()).count();
            self.order.retain(Option::is_some);
        }
        false
    }
}

/// S3-FIFO (J. Yang et al., "FIFO Queues are All You Need for Cache Eviction", SOSP 2023): a small
/// queue for what comes in, a main one for what proved useful, and the names of what was evicted from
/// the small one.
pub struct S3Fifo {
    size: usize,
    small: VecDeque<Name>,
    main: VecDeque<Name>,
    ghosts: VecDeque<Name>,
    ghost_set: HashSet<Name>,
    /// How often each page that is there was used, up to 3.
    uses: HashMap<Name, u8>,
}

impl S3Fifo {
    /// For so many pages.
    #[must_use]
    pub fn new(size: usize) -> Self {
        Self {
            size,
            small: VecDeque::new(),
            main: VecDeque::new(),
            ghosts: VecDeque::new(),
            ghost_set: HashSet::new(),
            uses: HashMap::new(),
        }
    }

    fn evict(&mut self) {
        if self.small.len() * 10 >= self.size {
            self.evict_small();
        } else {
            self.evict_main();
        }
    }

    fn evict_small(&mut self) {
        while let Some(page) = self.small.pop_front() {
            if self.uses.get(&page).is_some_and(|uses| *uses > 1) {
                self.uses.insert(page, 0);
                self.main.push_back(page);
                if self.main.len() * 10 > self.size * 9 {
                    self.evict_main();
                    return;
                }
            } else {
                self.uses.remove(&page);
                self.remember(page);
                return;
            }
        }
        self.evict_main();
    }

    fn evict_main(&mut self) {
        while let Some(page) = self.main.pop_front() {
            match self.uses.get_mut(&page) {
                Some(uses) if *uses > 0 => {
                    *uses -= 1;
                    self.main.push_back(page);
                }
                _ => {
                    self.uses.remove(&page);
                    return;
                }
            }
        }
    }

    fn remember(&mut self, page: Name) {
        if self.ghost_set.insert(page) {
            self.ghosts.push_back(page);
        }
        while self.ghosts.len() > self.size {
            if let Some(oldest) = self.ghosts.pop_front() {
                self.ghost_set.remove(&oldest);
            }
        }
    }
}

impl Policy for S3Fifo {
    fn name(&self) -> &'static str {
        "s3fifo"
    }

    fn ask(&mut self, page: Name) -> bool {
        if let Some(uses) = self.uses.get_mut(&page) {
            *uses = (*uses + 1).min(3);
            return true;
        }
        while self.uses.len() >= self.size {
            self.evict();
        }
        self.uses.insert(page, 0);
        if self.ghost_set.remove(&page) {
            self.main.push_back(page);
        } else {
            self.small.push_back(page);
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(size: usize) -> [Box<dyn Policy>; 4] {
        [
            Box::new(Fifo::new(size)),
            Box::new(Lru::new(size)),
            Box::new(Sieve::new(size)),
            Box::new(S3Fifo::new(size)),
        ]
    }

    #[test]
    fn what_fits_is_missed_once() {
        let trace: Vec<Name> = (0..20).cycle().take(2000).collect();
        for mut policy in all(20) {
            let misses = miss_ratio(&mut *policy, &trace);
            assert!((misses - 0.01).abs() < 1e-9, "{}: {misses}", policy.name());
        }
    }

    #[test]
    fn what_is_used_survives_a_scan_where_it_should() {
        let mut trace: Vec<Name> = Vec::new();
        for round in 0..200 {
            (0..3).for_each(|_| trace.extend(0..40));
            trace.extend((0..100).map(|page| 1000 + round * 100 + page));
        }
        let misses: Vec<_> = all(60)
            .into_iter()
            .map(|mut policy| miss_ratio(&mut *policy, &trace))
            .collect();
        // Fifo and LRU miss the 40 once in each round, the others hardly ever. (S3-FIFO wants two
        // uses beside the first to believe in a page, and remembers fewer that went than a scan has.)
        assert!(misses[0] > 0.6 && misses[1] > 0.6, "{misses:?}");
        assert!(misses[2] < 0.5 && misses[3] < 0.5, "{misses:?}");
    }
}
