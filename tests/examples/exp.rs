use cram_store::*;
use cram_tests::bench::corpus;
use lz4_flex::block::*;
use std::time::Instant;
fn main() {
    let c = corpus::gather(12000).unwrap();
    let mut pages = corpus::mixed(&c);
    let n = pages.len();
    let mut out = vec![0u8; get_maximum_output_size(4096)];
    let mut tab = CompressTable::small();
    let mk = |share| {
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
        (store, pool)
    };
    let (s1, p1) = mk(true);
    let (s2, p2) = mk(false);
    let mut sc = Scratch::new();
    let mut stamp = 0u64;
    let secret = [7u8; 192];
    let mut arena = vec![0u8; 256 << 20];
    for round in 0..5 {
        for p in &mut pages {
            stamp += 1;
            p[2048..2056].copy_from_slice(&stamp.to_le_bytes());
        }
        let t = |f: &mut dyn FnMut(usize)| {
            let s = Instant::now();
            for i in 0..n {
                f(i)
            }
            s.elapsed().as_secs_f64() * 1e6 / n as f64
        };
        let raw = t(&mut |i| {
            compress_into_with_table(&pages[i], &mut out, &mut tab).unwrap();
        });
        let mut x = 0u64;
        let h = t(&mut |i| {
            x ^= twox_hash::XxHash3_64::oneshot_with_secret(&secret, &pages[i]).unwrap();
        });
        let rawh = t(&mut |i| {
            x ^= twox_hash::XxHash3_64::oneshot_with_secret(&secret, &pages[i]).unwrap();
            compress_into_with_table(&pages[i], &mut out, &mut tab).unwrap();
        });
        let mut at = 0;
        let rawc = t(&mut |i| {
            let l = compress_into_with_table(&pages[i], &mut out, &mut tab).unwrap();
            arena[at..at + l].copy_from_slice(&out[..l]);
            at += l;
        });
        let mut at = 0;
        let rawd = t(&mut |i| {
            let l =
                compress_into_with_table(&pages[i], &mut arena[at..at + 4600], &mut tab).unwrap();
            at += l;
        });
        let mut buf = [0u8; 4096];
        let rawhot = t(&mut |i| {
            buf = pages[i];
            std::hint::black_box(&mut buf);
            compress_into_with_table(&buf, &mut out, &mut tab).unwrap();
        });
        let puthot = t(&mut |i| {
            buf = pages[i];
            std::hint::black_box(&mut buf);
            assert_eq!(
                p1.put(ObjectId([1; 3]), i as u32, &buf, &mut sc),
                PutResult::Stored
            );
        });
        let puthotn = t(&mut |i| {
            buf = pages[i];
            std::hint::black_box(&mut buf);
            assert_eq!(
                p2.put(ObjectId([1; 3]), i as u32, &buf, &mut sc),
                PutResult::Stored
            );
        });
        println!(
            "hot: raw {rawhot:.3} put {puthot:.3} {:.3} noshare {puthotn:.3} {:.3}",
            rawhot / puthot,
            rawhot / puthotn
        );
        for p in &mut pages {
            stamp += 1;
            p[2048..2056].copy_from_slice(&stamp.to_le_bytes());
        }
        let put = t(&mut |i| {
            assert_eq!(
                p1.put(ObjectId([1; 3]), i as u32, &pages[i], &mut sc),
                PutResult::Stored
            );
        });
        let putn = t(&mut |i| {
            assert_eq!(
                p2.put(ObjectId([1; 3]), i as u32, &pages[i], &mut sc),
                PutResult::Stored
            );
        });
        println!(
            "{round}: raw {raw:.3} hash {h:.3} raw+hash {rawh:.3} raw+copy {rawc:.3} rawdirect {rawd:.3} put {put:.3} put-noshare {putn:.3}  {x}"
        );
    }
    drop((s1, s2));
}
