// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Which pages the store keeps when it cannot keep all, beside plain policies that may keep as many.

use anyhow::{Context, Result};
use cram_store::{
    GetResult, ObjectId, PoolId, PoolKind, PoolSpec, PutResult, Scratch, Store, StoreConfig,
};

use crate::bench::corpus::PAGE_SIZE;
use crate::bench::figures::Figures;
use crate::bench::policies::{Fifo, Lru, Name, Policy, S3Fifo, Sieve, miss_ratio};
use crate::bench::traces::{self, Trace};

/// Of the pages of a trace, so many fit: one in this number.
const SHARES: [usize; 3] = [10, 4, 2];
/// And so many are in the guest's own cache.
const GUEST_SHARE: usize = 20;
/// Larger traces only take longer.
const REQUESTS_MAX: usize = 3_000_000;

pub(super) fn run() -> Result<Figures> {
    let folder = tempfile::tempdir().context("cannot make a folder")?;
    let mut figures = Figures::default();
    let mut sums = [0.0; 5];
    let mut count = 0.0;
    for mut trace in traces::record(folder.path())? {
        trace.pages.truncate(REQUESTS_MAX);
        // A guest has a page cache of its own, of plain LRU: what it misses comes to the store.
        let mut guest = Lru::new(trace.distinct() / GUEST_SHARE);
        trace.pages.retain(|page| !guest.ask(*page));
        for share in SHARES {
            let ratios = compare(&trace, share, &mut figures)?;
            sums.iter_mut()
                .zip(ratios)
                .for_each(|(sum, ratio)| *sum += ratio);
            count += 1.0;
        }
    }
    for (name, sum) in ["fifo", "lru", "sieve", "s3fifo", "store"].iter().zip(sums) {
        figures.set(format!("misses_{name}"), sum / count);
    }
    figures.set("store_misses_vs_lru", sums[4] / sums[1]);
    Ok(figures)
}

fn compare(trace: &Trace, share: usize, figures: &mut Figures) -> Result<[f64; 5]> {
    let wanted = (trace.distinct() / share).max(64);
    let (store, size) = store_misses(&trace.pages, wanted)?;
    let mut policies: [Box<dyn Policy>; 4] = [
        Box::new(Fifo::new(size)),
        Box::new(Lru::new(size)),
        Box::new(Sieve::new(size)),
        Box::new(S3Fifo::new(size)),
    ];
    let mut ratios = [0.0; 5];
    for (policy, ratio) in policies.iter_mut().zip(&mut ratios) {
        *ratio = miss_ratio(&mut **policy, &trace.pages);
        let name = format!("misses_{}_{}_{}", trace.name, share, policy.name());
        figures.set(name, *ratio);
    }
    ratios[4] = store;
    figures.set(format!("misses_{}_{share}_store", trace.name), store);
    Ok(ratios)
}

/// Misses of a shared ephemeral pool of about so many pages, and how many it held in the end.
fn store_misses(trace: &[Name], wanted: usize) -> Result<(f64, usize)> {
    // Pages that all are stored in about half of their size.
    const BYTES_PER_PAGE: u64 = 2250;
    let store = Store::new(StoreConfig {
        capacity_bytes: (wanted as u64 * BYTES_PER_PAGE).max(1 << 20),
        background: None,
        share_equal_pages: false,
        ..StoreConfig::default()
    })?;
    let client = store.add_client("guest", None)?;
    client.authorise([1; 16]);
    let spec = PoolSpec {
        kind: PoolKind::SharedEphemeral { uuid: [1; 16] },
        refuse_incompressible: false,
    };
    client.new_pool(PoolId(0), spec)?;
    let pool = client.pool(PoolId(0)).context("the pool is there")?;
    let mut scratch = Scratch::new();
    let mut page = [0; PAGE_SIZE];
    let (mut misses, mut most) = (0_u64, 0);
    for name in trace {
        let object = ObjectId([name >> 32, 0, 0]);
        let index = u32::try_from(name & u64::from(u32::MAX))?;
        if pool.get(object, index, &mut page, &mut scratch) == GetResult::Found {
            continue;
        }
        misses += 1;
        fill(&mut page, *name);
        let _: PutResult = pool.put(object, index, &page, &mut scratch);
        most = most.max(pool.pages());
    }
    #[allow(clippy::cast_precision_loss, reason = "a share")]
    let ratio = misses as f64 / trace.len().max(1) as f64;
    Ok((ratio, usize::try_from(most)?))
}

/// A page that compresses to half.
fn fill(page: &mut [u8; PAGE_SIZE], name: u64) {
    let mut random = super::Random(name);
    page.fill(7);
    for word in page.as_chunks_mut::<8>().0.iter_mut().take(255) {
        *word = random.next().to_le_bytes();
    }
}
