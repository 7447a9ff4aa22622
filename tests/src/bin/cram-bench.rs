use cram_store::*;
use cram_tests::bench::corpus;
use lz4_flex::block::*;
use std::time::Instant;
fn main() {
    let c = corpus::gather(12000).unwrap();
    for k in &c {
        println!("{} {}", k.kind.name(), k.pages.len());
    }
    let mut pages = corpus::mixed(&c);
    println!("{}", pages.len());
    let n = pages.len();
    let mut out = vec![0u8; get_maximum_output_size(4096)];
    let mut tab = CompressTable::small();
    let bg = std::env::args().nth(1).as_deref() == Some("bg");
    let store = Store::new(StoreConfig {
        capacity_bytes: 2 << 30,
        background: if bg {
            Some(Background {
                cold_after: None,
                ..Default::default()
            })
        } else {
            None
        },
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
    let comp: Vec<Vec<u8>> = pages
        .iter()
        .map(|p| {
            let l = compress_into_with_table(p, &mut out, &mut tab).unwrap();
            if l <= 3968 {
                out[..l].to_vec()
            } else {
                p.to_vec()
            }
        })
        .collect();
    let mut stamp = 0u64;
    let mut pg = [0u8; 4096];
    for round in 0..6 {
        for p in &mut pages {
            stamp += 1;
            p[2048..2056].copy_from_slice(&stamp.to_le_bytes());
        }
        let s = Instant::now();
        for p in &pages {
            compress_into_with_table(p, &mut out, &mut tab).unwrap();
        }
        let raw = s.elapsed().as_secs_f64() * 1e6 / n as f64;
        let s = Instant::now();
        for (i, p) in pages.iter().enumerate() {
            assert_eq!(
                pool.put(ObjectId([1; 3]), i as u32, p, &mut sc),
                PutResult::Stored
            );
        }
        let put = s.elapsed().as_secs_f64() * 1e6 / n as f64;
        let s = Instant::now();
        for c in &comp {
            if c.len() == 4096 {
                pg.copy_from_slice(c);
            } else {
                decompress_into(c, &mut pg).unwrap();
            }
        }
        let rawg = s.elapsed().as_secs_f64() * 1e6 / n as f64;
        let s = Instant::now();
        for i in 0..n {
            assert_eq!(
                pool.get(ObjectId([1; 3]), i as u32, &mut pg, &mut sc),
                GetResult::Found
            );
        }
        let get = s.elapsed().as_secs_f64() * 1e6 / n as f64;
        println!(
            "round {round}: raw {raw:.3} put {put:.3} ratio {:.3}; rawget {rawg:.3} get {get:.3} ratio {:.3} held {}",
            raw / put,
            rawg / get,
            store.stats().mem_used_total >> 20
        );
    }
    let st = store.stats();
    println!(
        "compr {} held {} ratio {:.4}",
        st.compr_data_size,
        st.mem_used_total,
        st.mem_used_total as f64 / st.compr_data_size as f64
    );
    let s = Instant::now();
    let e = store.compact();
    println!("compact {e} in {:?}", s.elapsed());
    let st = store.stats();
    println!(
        "compr {} held {} ratio {:.4}",
        st.compr_data_size,
        st.mem_used_total,
        st.mem_used_total as f64 / st.compr_data_size as f64
    );
}
