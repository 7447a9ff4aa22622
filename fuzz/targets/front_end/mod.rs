// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! What a hostile front-end says: messages that are right but for a word, with any descriptors.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use arbitrary::Arbitrary;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

pub const MESSAGES_MAX: usize = 24;
const MEMORY_BYTES: u64 = 64 << 10;

#[derive(Arbitrary, Debug)]
pub struct Input {
    pub messages: Vec<Message>,
    /// The last bytes are left out.
    pub cut: u8,
}

#[derive(Arbitrary, Debug)]
pub struct Message {
    code: u8,
    flags: u8,
    body: Body,
    /// Says another length than it has.
    length: Option<u16>,
    pub fds: Vec<Descriptor>,
}

#[derive(Arbitrary, Debug)]
pub enum Body {
    None,
    Number(u64),
    /// Index and number, as for most messages about a ring.
    Ring(u8, u16),
    Addresses {
        index: u8,
        flags: u8,
        places: [u16; 3],
    },
    /// Memory: how many regions are said to follow, and those that do.
    Regions(u8, Vec<Region>),
    Region(Region),
    Config {
        offset: u16,
        size: u16,
        payload: u8,
    },
    Any(Vec<u8>),
}

#[derive(Arbitrary, Debug)]
pub struct Region {
    guest: u16,
    bytes: u16,
    user: u16,
    offset: u16,
    wild: Option<u64>,
}

#[derive(Arbitrary, Debug, Clone, Copy)]
pub enum Descriptor {
    Memory,
    SmallMemory,
    Event,
    Null,
    Socket,
    ReadOnly,
}

impl Region {
    fn words(&self) -> [u64; 4] {
        let place = |at: u16| u64::from(at % 32) << 12;
        [
            self.wild.unwrap_or(place(self.guest)),
            place(self.bytes),
            place(self.user),
            place(self.offset),
        ]
    }
}

fn words(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|word| word.to_le_bytes()).collect()
}

impl Body {
    fn bytes(&self) -> Vec<u8> {
        match self {
            Self::None => Vec::new(),
            Self::Number(number) => words(&[*number]),
            Self::Ring(index, number) => words(&[u64::from(*index % 8) | u64::from(*number) << 32]),
            Self::Addresses {
                index,
                flags,
                places: [descriptors, used, available],
            } => {
                let at = |place: &u16| u64::from(*place) * 16;
                words(&[
                    u64::from(*index % 8) | u64::from(*flags) << 32,
                    at(descriptors),
                    at(used),
                    at(available),
                    0,
                ])
            }
            Self::Regions(count, regions) => {
                let mut bytes = words(&[u64::from(*count % 10)]);
                regions
                    .iter()
                    .for_each(|region| bytes.extend(words(&region.words())));
                bytes
            }
            Self::Region(region) => {
                let mut bytes = words(&[0]);
                bytes.extend(words(&region.words()));
                bytes
            }
            Self::Config {
                offset,
                size,
                payload,
            } => {
                let mut bytes = words(&[u64::from(*offset) | u64::from(*size) << 32]);
                bytes.extend(0_u32.to_le_bytes());
                bytes.extend(vec![0; (*payload).into()]);
                bytes
            }
            Self::Any(bytes) => bytes.clone(),
        }
    }
}

impl Message {
    /// Header and body.
    pub fn bytes(&self) -> Vec<u8> {
        let body = self.body.bytes();
        let len = self.length.map_or(body.len(), usize::from);
        let header = [
            u32::from(self.code % 48),
            // Version 1 mostly, and the flag that asks for a reply.
            u32::from(self.flags & 0xf) ^ 1,
            u32::try_from(len).unwrap(),
        ];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
        bytes.extend(body);
        bytes
    }
}

pub fn descriptor(kind: Descriptor) -> OwnedFd {
    let memory = |bytes| {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, bytes).unwrap();
        file
    };
    match kind {
        Descriptor::Memory => memory(MEMORY_BYTES),
        Descriptor::SmallMemory => memory(100),
        Descriptor::Event => eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
        Descriptor::Null => File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap()
            .into(),
        Descriptor::Socket => UnixStream::pair().unwrap().0.into(),
        Descriptor::ReadOnly => File::open("/dev/zero").unwrap().into(),
    }
}
