use cram_store::*;
use cram_tests::bench::corpus;
use std::time::Instant;
fn main() {
    let share = std::env::args().nth(1).as_deref() == Some("share");
    let c = corpus::gather(12000).unwrap();
    let mut pages = corpus::mixed(&c);
    let n = pages.len();
    let store = Store::new(StoreConfig {
        capacity_bytes: 2 << 30,
        background: None,
        share_equal_pages: share,
        ..Default::default()
    })
    .unwrap();
    let cl = store.add_client("a", None).unwrap();
    cl.new_pool(
        PoolId(0),
        PoolSpec {
            kind: PoolKind::Persistent,
            refuse_incompressible: false,
        },
    )
    .unwrap();
    let pool = cl.pool(PoolId(0)).unwrap();
    let mut sc = Scratch::new();
    let mut stamp = 0u64;
    for _ in 0..15 {
        for p in &mut pages {
            stamp += 1;
            p[2048..2056].copy_from_slice(&stamp.to_le_bytes());
        }
        let s = Instant::now();
        for i in 0..n {
            assert_eq!(
                pool.put(ObjectId([1; 3]), i as u32, &pages[i], &mut sc),
                PutResult::Stored
            );
        }
        println!("{:.3}", s.elapsed().as_secs_f64() * 1e6 / n as f64);
    }
}
