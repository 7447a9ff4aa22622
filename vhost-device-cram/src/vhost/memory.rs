// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's memory, as one connection has it mapped.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use vm_memory::mmap::MmapRegion;
use vm_memory::{
    FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryBackend, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap,
};

use crate::backend::AddressSpace;
use crate::first_touch::Allowance;
use crate::sigbus::{self, Fate, Loss, Watch};
use crate::vhost::message::Region as Described;

/// Most regions of a guest. (QEMU has as many memory slots at the most.)
pub const REGIONS_MAX: usize = 509;

/// Why a region is not taken.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// It lies outside of what addresses can name, or has no bytes.
    #[error("a region of memory has impossible addresses")]
    Addresses,
    /// It lies where another one does.
    #[error("two regions of memory overlap")]
    Overlap,
    /// There are too many.
    #[error("a guest may have {REGIONS_MAX} regions of memory")]
    TooMany,
    /// There is none like this.
    #[error("there is no such region of memory")]
    Unknown,
    /// The file is too short, or cannot be mapped.
    #[error("a region of memory cannot be mapped: {0}")]
    Map(String),
    /// The system refused.
    #[error("a region of memory cannot be watched: {0}")]
    System(#[from] io::Error),
}

#[derive(Debug)]
struct Region {
    /// Before the mapping, so that it is given up first.
    _watch: Watch,
    mapping: Arc<GuestRegionMmap<()>>,
    described: Described,
}

/// The regions, and whether any of it was found missing. It does not change: a front-end that says
/// otherwise makes a new one.
#[derive(Debug, Default)]
pub struct Memory {
    /// Before the regions, whose mappings it has, too.
    map: Arc<GuestMemoryMmap<()>>,
    regions: Vec<Arc<Region>>,
    fate: Arc<Fate>,
}

impl Deref for Memory {
    type Target = GuestMemoryMmap<()>;

    fn deref(&self) -> &Self::Target {
        &self.map
    }
}

/// Memory that is nobody else's, and so cannot be lost.
impl From<GuestMemoryMmap<()>> for Memory {
    fn from(map: GuestMemoryMmap<()>) -> Self {
        Self {
            map: Arc::new(map),
            ..Self::default()
        }
    }
}

impl Memory {
    /// Whether everything that was read here up to now was the guest's. Once it is false it stays so.
    pub fn is_intact(&self) -> bool {
        // What was read before this line was read before the mark is looked at.
        fence(Ordering::Acquire);
        !self.fate.is_lost()
    }

    /// No memory yet; of what comes to it, the daemon touches so much first.
    pub fn with_allowance(allowance: Arc<Allowance>) -> Self {
        Self {
            fate: Arc::new(Fate::with_allowance(allowance)),
            ..Self::default()
        }
    }

    /// Why it is not intact.
    pub fn loss(&self) -> Option<Loss> {
        self.fate.loss()
    }

    /// No memory, that shares this one's fate.
    pub fn emptied(&self) -> Self {
        Self {
            fate: Arc::clone(&self.fate),
            ..Self::default()
        }
    }

    /// This memory with one more region.
    ///
    /// # Errors
    /// When it cannot be had.
    pub fn with(&self, described: Described, file: File) -> Result<Self, MemoryError> {
        if self.regions.len() >= REGIONS_MAX {
            return Err(MemoryError::TooMany);
        }
        let user_end = described.user.checked_add(described.bytes);
        let (Some(user_end), Ok(bytes)) = (user_end, usize::try_from(described.bytes)) else {
            return Err(MemoryError::Addresses);
        };
        if bytes == 0 || described.guest.checked_add(described.bytes).is_none() {
            return Err(MemoryError::Addresses);
        }
        let overlaps = |other: &Arc<Region>| {
            let other = &other.described;
            described.user < other.user.saturating_add(other.bytes) && other.user < user_end
        };
        if self.regions.iter().any(overlaps) {
            return Err(MemoryError::Overlap);
        }
        let place = FileOffset::new(file, described.offset);
        let mapped = MmapRegion::from_file(place, bytes);
        let mapped = mapped.map_err(|error| MemoryError::Map(error.to_string()))?;
        let begin = mapped.as_ptr() as usize;
        let mapping = GuestRegionMmap::new(mapped, GuestAddress(described.guest));
        let mapping = Arc::new(mapping.ok_or(MemoryError::Addresses)?);
        let watch = sigbus::watch(begin..begin + bytes, &self.fate)?;
        let mut regions = self.regions.clone();
        regions.push(Arc::new(Region {
            _watch: watch,
            mapping,
            described,
        }));
        self.of(regions)
    }

    /// This memory without one of its regions.
    ///
    /// # Errors
    /// When it has none like that.
    pub fn without(&self, described: Described) -> Result<Self, MemoryError> {
        let is_it = |region: &Arc<Region>| {
            let other = &region.described;
            (other.guest, other.bytes, other.user)
                == (described.guest, described.bytes, described.user)
        };
        let at = self.regions.iter().position(is_it);
        let mut regions = self.regions.clone();
        regions.remove(at.ok_or(MemoryError::Unknown)?);
        self.of(regions)
    }

    fn of(&self, regions: Vec<Arc<Region>>) -> Result<Self, MemoryError> {
        let mut mappings: Vec<_> = regions.iter().map(|r| Arc::clone(&r.mapping)).collect();
        mappings.sort_by_key(|mapping| mapping.start_addr());
        let map = if mappings.is_empty() {
            GuestMemoryMmap::new()
        } else {
            GuestMemoryMmap::from_arc_regions(mappings).map_err(|_| MemoryError::Overlap)?
        };
        Ok(Self {
            map: Arc::new(map),
            regions,
            fate: Arc::clone(&self.fate),
        })
    }

    /// The guest's address of what the front-end calls `user`.
    pub fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let described = &region.described;
            let offset = user.checked_sub(described.user)?;
            (offset < described.bytes).then_some(described.guest + offset)
        })
    }

    /// The same memory, as a back-end is told of it: without what keeps watch over it.
    pub fn address_space(&self) -> AddressSpace {
        Arc::clone(&self.map).into()
    }

    /// Whether `space` is this memory, with nothing added and nothing left out.
    pub fn is_in(&self, space: &AddressSpace) -> bool {
        std::ptr::eq(&raw const *space.memory(), Arc::as_ptr(&self.map))
    }

    /// How many regions there are.
    pub fn regions(&self) -> usize {
        self.map.num_regions()
    }
}
