// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What else could hold the same compressed pages: a plain hash map, measured; and models of two of
//! the kernel's allocators, computed from the sizes alone.

/// What a model holds for images of these sizes, in bytes.
pub struct Model {
    /// For people and figures.
    pub name: &'static str,
    /// Bytes held when all are stored.
    pub full_bytes: u64,
    /// Bytes held after every other one was freed and nothing was moved.
    pub half_bytes: u64,
}

const PAGE: u64 = 4096;

/// zbud: two images to a page at the most (mm/zbud.c, up to Linux 6.14), in chunks of 64 bytes; the
/// second one is the first that fits into a page that has one.
#[must_use]
pub fn zbud(sizes: &[usize]) -> Model {
    const CHUNK: usize = 64;
    const CHUNKS: usize = 4096 / CHUNK - 1;
    // Pages with one image, by the chunks that are left in them; each is the number of a page.
    let mut unbuddied: Vec<Vec<usize>> = vec![Vec::new(); CHUNKS + 1];
    let mut pages: Vec<[bool; 2]> = Vec::new();
    let mut homes = Vec::with_capacity(sizes.len());
    for size in sizes {
        let chunks = size.div_ceil(CHUNK).max(1);
        if chunks > CHUNKS {
            pages.push([true, false]);
            homes.push((pages.len() - 1, 0));
            continue;
        }
        let partner = (chunks..=CHUNKS)
            .find(|left| unbuddied.get(*left).is_some_and(|pages| !pages.is_empty()));
        let found = partner.and_then(|left| unbuddied.get_mut(left)?.pop());
        match found {
            Some(page) => {
                if let Some(slots) = pages.get_mut(page) {
                    slots[1] = true;
                }
                homes.push((page, 1));
            }
            None => {
                pages.push([true, false]);
                if let Some(list) = unbuddied.get_mut(CHUNKS - chunks) {
                    list.push(pages.len() - 1);
                }
                homes.push((pages.len() - 1, 0));
            }
        }
    }
    let full_bytes = pages.len() as u64 * PAGE;
    for (page, slot) in homes.iter().step_by(2) {
        if let Some(slots) = pages.get_mut(*page) {
            slots[*slot] = false;
        }
    }
    let left = pages.iter().filter(|slots| slots[0] || slots[1]).count();
    Model {
        name: "zbud",
        full_bytes,
        half_bytes: left as u64 * PAGE,
    }
}

/// zsmalloc: a class for every 16 bytes, in zspages of up to 8 pages that waste least
/// (mm/zsmalloc.c, CONFIG_ZSMALLOC_CHAIN_SIZE=8, which is usual), and 8 bytes of handle for each.
#[must_use]
pub fn zsmalloc(sizes: &[usize]) -> Model {
    const STEP: usize = 16;
    const CHAIN_MAX: usize = 8;
    const HANDLE: usize = 8;
    let classes = 4096 / STEP + 1;
    let mut counts = vec![Vec::<bool>::new(); classes];
    for (at, size) in sizes.iter().enumerate() {
        // From 3264 bytes on (without the handle) an image has a page of its own.
        let whole = size + HANDLE;
        let class = if whole > 3264 {
            classes - 1
        } else {
            whole.div_ceil(STEP)
        };
        if let Some(list) = counts.get_mut(class) {
            list.push(at % 2 == 0);
        }
    }
    let (mut full, mut half) = (0, 0);
    for (class, list) in counts
        .iter()
        .enumerate()
        .filter(|(_, list)| !list.is_empty())
    {
        let size = class * STEP;
        let chain = (1..=CHAIN_MAX)
            .min_by_key(|pages| (pages * 4096 % size) * 1000 / (pages * 4096))
            .unwrap_or(1);
        let per_zspage = chain * 4096 / size;
        let bytes = (chain * 4096) as u64;
        full += list.len().div_ceil(per_zspage) as u64 * bytes;
        let used = list
            .chunks(per_zspage)
            .filter(|zspage| zspage.iter().any(|is_freed| !is_freed));
        half += used.count() as u64 * bytes;
    }
    let handles = (sizes.len() * HANDLE) as u64;
    Model {
        name: "zsmalloc",
        full_bytes: full + handles,
        half_bytes: half + handles / 2,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_models_hold_what_they_are_known_for() {
        // Two of these fit into a page of zbud beside its header; two of those do not.
        assert_eq!(zbud(&[31 * 64; 100]).full_bytes, 50 * PAGE);
        assert_eq!(zbud(&[31 * 64 + 1; 100]).full_bytes, 100 * PAGE);
        assert_eq!(zbud(&[4096; 10]).full_bytes, 10 * PAGE);
        // 8 pages have room for 16 images of 2048 less their handles.
        let model = zsmalloc(&[2040; 1600]);
        assert_eq!(model.full_bytes, 800 * PAGE + 1600 * 8);
        // Every other one is freed, and every zspage still has one.
        assert_eq!(model.half_bytes, 800 * PAGE + 800 * 8);
    }
}
