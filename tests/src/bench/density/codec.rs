// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Ways to make images smaller, side by side: pages alone, neighbours together, with a dictionary.
//!
//! A dictionary is trained on one part of the pages and everything is measured on the rest, so that
//! no way has seen what it packs.

use std::hint::black_box;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lz4_flex::block::{
    CompressTable, compress_into_with_table, decompress_into, get_maximum_output_size,
};
use zstd::bulk::{Compressor, Decompressor};

use super::Extent;
use crate::bench::corpus::{self, PAGE_SIZE, Page, Pages};
use crate::bench::figures::{Figures, median};
use crate::bench::rivals;
use crate::bench::store::Random;

/// As in the store: a longer image is not worth unpacking.
const IMAGE_BYTES_MAX: usize = PAGE_SIZE - 128;
/// What the dictionary may take.
const DICTIONARY_BYTES: usize = 16 << 10;
/// Runs of neighbours that belong together to the trained or to the measured part: four times the
/// most that is packed together.
const RUN: usize = 64;
/// One run in so many is for training.
const TRAINING: usize = 4;

/// A way to make images.
#[derive(Clone, Copy)]
struct Way {
    name: &'static str,
    codec: Kind,
    /// Pages packed together.
    together: usize,
    dictionary: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Lz4,
    Zstd(i32),
}

const fn way(name: &'static str, codec: Kind, together: usize) -> Way {
    Way {
        name,
        codec,
        together,
        dictionary: false,
    }
}

const WAYS: [Way; 9] = [
    way("lz4", Kind::Lz4, 1),
    way("lz4_16k", Kind::Lz4, 4),
    way("lz4_64k", Kind::Lz4, 16),
    way("zstd1", Kind::Zstd(1), 1),
    way("zstd3", Kind::Zstd(3), 1),
    way("zstd1_16k", Kind::Zstd(1), 4),
    way("zstd3_16k", Kind::Zstd(3), 4),
    Way {
        dictionary: true,
        ..way("zstd1_dict", Kind::Zstd(1), 1)
    },
    Way {
        dictionary: true,
        ..way("zstd3_dict", Kind::Zstd(3), 1)
    },
];

/// Packs and unpacks as one way does.
enum Codec {
    Lz4(CompressTable),
    Zstd(Box<(Compressor<'static>, Decompressor<'static>)>),
}

impl Codec {
    fn new(way: &Way, dictionary: &[u8]) -> Result<Self> {
        Ok(match way.codec {
            // It becomes a larger one for what needs it.
            Kind::Lz4 => Self::Lz4(CompressTable::small()),
            Kind::Zstd(level) => {
                let dictionary = if way.dictionary { dictionary } else { &[] };
                let mut packer = Compressor::with_dictionary(level, dictionary)?;
                packer.include_contentsize(false)?;
                packer.include_checksum(false)?;
                packer.include_dictid(false)?;
                Self::Zstd(Box::new((
                    packer,
                    Decompressor::with_dictionary(dictionary)?,
                )))
            }
        })
    }

    /// Bytes of the image; the whole when that is not worth it.
    fn pack(&mut self, whole: &[u8], image: &mut [u8]) -> usize {
        let len = match self {
            Self::Lz4(table) => compress_into_with_table(whole, image, table).ok(),
            Self::Zstd(codec) => codec.0.compress_to_buffer(whole, image).ok(),
        };
        len.filter(|len| *len <= IMAGE_BYTES_MAX * (whole.len() / PAGE_SIZE))
            .unwrap_or(whole.len())
    }

    fn unpack(&mut self, image: &[u8], whole: &mut [u8]) -> bool {
        let len = match self {
            Self::Lz4(_) => decompress_into(image, whole).ok(),
            Self::Zstd(codec) => codec.1.decompress_to_buffer(image, whole).ok(),
        };
        len == Some(whole.len())
    }
}

/// What one way came to with pages of one kind.
#[derive(Default)]
struct Cost {
    /// Bytes of all images.
    bytes: usize,
    /// Size of each image, of each round the same.
    sizes: Vec<usize>,
    /// Seconds of each round, of the processor.
    pack_s: Vec<f64>,
    unpack_s: Vec<f64>,
}

/// The names of the ways, as in figures.
pub(super) fn ways() -> impl Iterator<Item = &'static str> {
    WAYS.iter().map(|way| way.name)
}

/// Runs the section.
///
/// # Errors
/// When the machine has no data, or a codec does not give back what it was given.
pub(super) fn run(extent: Extent) -> Result<Figures> {
    let corpus = corpus::gather(extent.codec_pages)?;
    let mut figures = Figures::default();
    let mut sums = vec![[0.0; 3]; WAYS.len()];
    let mut lz4_sizes = Vec::new();
    for of_kind in &corpus {
        eprint!("    codec: {}", of_kind.kind.name());
        let (training, measured) = parts(of_kind);
        let began = cpu_s();
        let dictionary = zstd::dict::from_samples(&training, DICTIONARY_BYTES)
            .context("a dictionary cannot be trained")?;
        let trained_s = cpu_s() - began;
        let costs = measure(&measured, &dictionary, extent.codec_rounds)?;
        for ((way, cost), sum) in WAYS.iter().zip(&costs).zip(&mut sums) {
            let values = per_page(cost, measured.len());
            for ((value, sum), what) in values.iter().zip(sum).zip(WHAT) {
                figures.set(
                    format!("codec_{}_{}_{what}", of_kind.kind.name(), way.name),
                    *value,
                );
                *sum += value / exact(corpus.len());
            }
        }
        if let Some(lz4) = costs.first() {
            lz4_sizes.extend_from_slice(&lz4.sizes);
        }
        figures.set(
            format!("codec_{}_training_s", of_kind.kind.name()),
            trained_s,
        );
        eprintln!(": {} pages, dictionary in {trained_s:.1} s", measured.len());
    }
    for (way, sum) in WAYS.iter().zip(&sums) {
        for (value, what) in sum.iter().zip(WHAT) {
            figures.set(format!("codec_{}_{what}", way.name), *value);
        }
    }
    // Of all kinds together, as one guest's pages are.
    let zram = usize::try_from(rivals::zsmalloc(&lz4_sizes).full_bytes)?;
    figures.set("codec_zram_bytes", exact(zram) / exact(lz4_sizes.len()));
    incompressible(extent, &mut figures)?;
    Ok(figures)
}

/// What is told of each way, in the order of [`per_page`].
const WHAT: [&str; 3] = ["bytes", "pack_us", "unpack_us"];

fn per_page(cost: &Cost, pages: usize) -> [f64; 3] {
    let pages = exact(pages);
    [
        exact(cost.bytes) / pages,
        median(cost.pack_s.clone()) / pages * 1e6,
        median(cost.unpack_s.clone()) / pages * 1e6,
    ]
}

/// Pages to train with and pages to measure with; the latter in whole runs of neighbours.
fn parts(of_kind: &Pages) -> (Vec<Page>, Vec<Page>) {
    let (mut training, mut measured) = (Vec::new(), Vec::new());
    for (number, run) in of_kind.pages.chunks_exact(RUN).enumerate() {
        let part = if number % TRAINING == 0 {
            &mut training
        } else {
            &mut measured
        };
        part.extend_from_slice(run);
    }
    (training, measured)
}

/// All ways in turn, as often as there are rounds.
fn measure(pages: &[Page], dictionary: &[u8], rounds: usize) -> Result<Vec<Cost>> {
    ensure!(!pages.is_empty(), "too few pages of a kind");
    let mut costs: Vec<Cost> = WAYS.iter().map(|_| Cost::default()).collect();
    let mut codecs = WAYS
        .iter()
        .map(|way| Codec::new(way, dictionary))
        .collect::<Result<Vec<_>>>()?;
    for round in 0..=rounds {
        for ((way, codec), cost) in WAYS.iter().zip(&mut codecs).zip(&mut costs) {
            let [pack_s, unpack_s] = one_round(way, codec, pages, cost, round == 0)?;
            if round > 0 {
                cost.pack_s.push(pack_s);
                cost.unpack_s.push(unpack_s);
            }
        }
    }
    Ok(costs)
}

/// Packs all pages, then unpacks all; the first round also compares them.
fn one_round(
    way: &Way,
    codec: &mut Codec,
    pages: &[Page],
    cost: &mut Cost,
    is_first: bool,
) -> Result<[f64; 2]> {
    let whole_bytes = way.together * PAGE_SIZE;
    let all = pages.as_flattened();
    let room = get_maximum_output_size(whole_bytes);
    let mut images = vec![0; all.len() / whole_bytes * room];
    let mut sizes = Vec::with_capacity(all.len() / whole_bytes);
    let began = cpu_s();
    for (whole, image) in all
        .chunks_exact(whole_bytes)
        .zip(images.chunks_exact_mut(room))
    {
        sizes.push(codec.pack(black_box(whole), image));
    }
    let pack_s = cpu_s() - began;
    let mut back = vec![0; whole_bytes];
    let began = cpu_s();
    for ((image, size), whole) in images
        .chunks_exact(room)
        .zip(&sizes)
        .zip(all.chunks_exact(whole_bytes))
    {
        // What did not pack was not kept as an image.
        if *size == whole_bytes {
            back.copy_from_slice(black_box(whole));
        } else {
            let image = image.get(..*size).context("an image beyond its room")?;
            ensure!(
                codec.unpack(black_box(image), &mut back),
                "{} cannot unpack what it packed",
                way.name
            );
        }
        if is_first {
            ensure!(back == whole, "{} gave other bytes back", way.name);
        }
    }
    let unpack_s = cpu_s() - began;
    if is_first {
        cost.bytes = sizes.iter().sum();
        cost.sizes = sizes;
    }
    Ok([pack_s, unpack_s])
}

/// What pages cost that do not pack: `lz4` finds out by trying, and so does `zstd`.
fn incompressible(extent: Extent, figures: &mut Figures) -> Result<()> {
    const PAGES: usize = 2_000;
    let mut random = Random(1);
    let mut pages = vec![[0; PAGE_SIZE]; PAGES];
    for place in pages.as_flattened_mut().as_chunks_mut::<8>().0 {
        *place = random.next().to_le_bytes();
    }
    for name in ["lz4", "zstd1", "zstd3"] {
        let way = WAYS.iter().find(|way| way.name == name);
        let way = way.context("a way of that name")?;
        let mut codec = Codec::new(way, &[])?;
        let mut cost = Cost::default();
        let mut times = Vec::new();
        for round in 0..=extent.codec_rounds {
            let [pack_s, _] = one_round(way, &mut codec, &pages, &mut cost, round == 0)?;
            if round > 0 {
                times.push(pack_s / exact(PAGES) * 1e6);
            }
        }
        ensure!(cost.bytes == PAGES * PAGE_SIZE, "random pages were packed");
        figures.set(format!("codec_{name}_incompressible_us"), median(times));
    }
    Ok(())
}

/// Processor time of this thread, so that what else the machine does is not counted.
fn cpu_s() -> f64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default().as_secs_f64()
}

#[allow(clippy::cast_precision_loss, reason = "figures for people")]
fn exact(count: usize) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Text of a few hundred words, as the pages of one kind have words in common.
    fn texts(count: usize) -> Vec<Page> {
        let mut random = Random(7);
        let words: Vec<[u8; 16]> = (0..300)
            .map(|_| {
                let word = random.next().to_le_bytes();
                std::array::from_fn(|at| word[at % 8].wrapping_add(word[at / 2 % 8]))
            })
            .collect();
        let mut pages = vec![[0; PAGE_SIZE]; count];
        for place in pages.as_flattened_mut().as_chunks_mut::<16>().0 {
            *place = words[random.below(words.len())];
        }
        pages
    }

    #[test]
    fn every_way_gives_pages_back_and_together_is_smaller() {
        let pages = texts(2 * RUN);
        let dictionary = zstd::dict::from_samples(&pages[..RUN], DICTIONARY_BYTES).unwrap();
        let costs = measure(&pages[RUN..], &dictionary, 1).unwrap();
        let bytes = |name: &str| {
            let found = WAYS.iter().zip(&costs).find(|(way, _)| way.name == name);
            found.unwrap().1.bytes
        };
        assert!(bytes("lz4_64k") < bytes("lz4_16k") && bytes("lz4_16k") < bytes("lz4"));
        assert!(bytes("zstd1_dict") < bytes("zstd1"));
    }

    #[test]
    fn training_and_measuring_have_no_page_in_common() {
        let pages = Pages {
            kind: corpus::Kind::Text,
            pages: texts(9 * RUN),
        };
        let (training, measured) = parts(&pages);
        assert_eq!((training.len(), measured.len()), (3 * RUN, 6 * RUN));
    }
}
