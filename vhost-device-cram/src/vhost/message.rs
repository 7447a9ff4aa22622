// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Messages of a front-end: bytes become checked values.
//!
//! Everything about one message that can be said without knowing the ones before it is checked here;
//! [`session`](super::session) has the rest. Nothing here panics, whatever the bytes are.
//!
//! Names and numbers are the `vhost` crate's.

use vhost::vhost_user::message::{
    FrontendReq as Code, MAX_ATTACHED_FD_ENTRIES, MAX_MSG_SIZE, VhostUserHeaderFlag as Flag,
};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 12;
/// Longest body of any message that is understood.
pub const BODY_MAX: usize = MAX_MSG_SIZE;
/// Most descriptors that come with a message: one for each region of a table.
pub const FDS_MAX: usize = MAX_ATTACHED_FD_ENTRIES;
/// What comes before the payload of GET_CONFIG and SET_CONFIG.
const CONFIG_HEAD: usize = 12;
/// Largest configuration space that vhost-user knows.
const CONFIG_MAX: usize = 256;

const VERSION: u32 = 1;
/// In the number of SET_VRING_KICK, SET_VRING_CALL and SET_VRING_ERR: there is no descriptor.
const NO_FD: u64 = 1 << 8;

/// Why a message is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Another version, a reply, or flags that mean nothing.
    #[error("message {0} has flags that no front-end sends")]
    Flags(u32),
    /// It would be longer than any message is.
    #[error("message {code} announces {bytes} bytes")]
    TooLong {
        /// The message's code.
        code: u32,
        /// What it announces.
        bytes: u32,
    },
    /// A code that is not understood, or belongs to what was not offered.
    #[error("message {0} is not understood")]
    Unknown(u32),
    /// The body has another length than this message has.
    #[error("message {0} has a body of a wrong length")]
    Length(u32),
    /// A value that makes no sense.
    #[error("message {0} has an impossible value")]
    Value(u32),
}

/// What comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which message it is.
    pub code: u32,
    /// The front-end waits for an answer, if that was negotiated.
    pub needs_reply: bool,
    /// Bytes that follow.
    pub body: usize,
}

impl Header {
    /// Reads one.
    ///
    /// # Errors
    /// When no front-end sends it.
    pub fn read(bytes: &[u8; HEADER_BYTES]) -> Result<Self, Malformed> {
        let [code, flags, length] = words(bytes);
        if flags & !Flag::NEED_REPLY.bits() != VERSION {
            return Err(Malformed::Flags(code));
        }
        let body = usize::try_from(length).ok().filter(|n| *n <= BODY_MAX);
        let bytes = length;
        Ok(Header {
            code,
            needs_reply: flags & Flag::NEED_REPLY.bits() != 0,
            body: body.ok_or(Malformed::TooLong { code, bytes })?,
        })
    }
}

/// A region of memory, as the front-end describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Its address in the guest.
    pub guest: u64,
    /// Its length.
    pub bytes: u64,
    /// Its address in the front-end, by which rings are described.
    pub user: u64,
    /// Where it begins in its file.
    pub offset: u64,
}

/// Where a ring's parts lie, in the front-end's addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// The descriptors.
    pub descriptors: u64,
    /// The used ring.
    pub used: u64,
    /// The available ring.
    pub available: u64,
}

/// A message that can be understood by itself. What names a ring has its number first.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "they are vhost-user's names")]
pub enum Message {
    GetFeatures,
    SetFeatures(u64),
    SetOwner,
    ResetOwner,
    SetMemTable(Vec<Region>),
    SetVringNum(u32, u32),
    SetVringAddr(u32, Addresses),
    SetVringBase(u32, u32),
    GetVringBase(u32),
    /// With a descriptor, or expressly without.
    SetVringKick(u32, bool),
    SetVringCall(u32, bool),
    SetVringErr(u32, bool),
    GetProtocolFeatures,
    SetProtocolFeatures(u64),
    GetQueueNum,
    SetVringEnable(u32, bool),
    SetBackendReqFd,
    /// Offset and length.
    GetConfig(u32, u32),
    /// Offset and bytes.
    SetConfig(u32, Vec<u8>),
    ResetDevice,
    GetMaxMemSlots,
    AddMemReg(Region),
    RemMemReg(Region),
}

impl Message {
    /// Reads the body of a message.
    ///
    /// # Errors
    /// When it is none.
    pub fn read(code: u32, body: &[u8]) -> Result<Self, Malformed> {
        let read = Reader { code, body };
        Ok(
            match Code::try_from(code).map_err(|()| Malformed::Unknown(code))? {
                Code::GET_FEATURES => read.nothing(Message::GetFeatures)?,
                Code::SET_FEATURES => Message::SetFeatures(read.number()?),
                Code::SET_OWNER => read.nothing(Message::SetOwner)?,
                Code::RESET_OWNER => read.nothing(Message::ResetOwner)?,
                Code::SET_MEM_TABLE => Message::SetMemTable(read.table()?),
                Code::SET_VRING_NUM => read.state(Message::SetVringNum)?,
                Code::SET_VRING_ADDR => read.addresses()?,
                Code::SET_VRING_BASE => read.state(Message::SetVringBase)?,
                Code::GET_VRING_BASE => read.state(|ring, _| Message::GetVringBase(ring))?,
                Code::SET_VRING_KICK => read.descriptor(Message::SetVringKick)?,
                Code::SET_VRING_CALL => read.descriptor(Message::SetVringCall)?,
                Code::SET_VRING_ERR => read.descriptor(Message::SetVringErr)?,
                Code::GET_PROTOCOL_FEATURES => read.nothing(Message::GetProtocolFeatures)?,
                Code::SET_PROTOCOL_FEATURES => Message::SetProtocolFeatures(read.number()?),
                Code::GET_QUEUE_NUM => read.nothing(Message::GetQueueNum)?,
                Code::SET_VRING_ENABLE => match read.state(|ring, on| (ring, on))? {
                    (ring, on @ 0..=1) => Message::SetVringEnable(ring, on == 1),
                    _ => return Err(Malformed::Value(code)),
                },
                Code::SET_BACKEND_REQ_FD => read.nothing(Message::SetBackendReqFd)?,
                Code::GET_CONFIG => {
                    let (offset, bytes) = read.config()?;
                    let length = u32::try_from(bytes.len()).unwrap_or_default();
                    Message::GetConfig(offset, length)
                }
                Code::SET_CONFIG => {
                    let (offset, bytes) = read.config()?;
                    Message::SetConfig(offset, bytes.to_vec())
                }
                Code::RESET_DEVICE => read.nothing(Message::ResetDevice)?,
                Code::GET_MAX_MEM_SLOTS => read.nothing(Message::GetMaxMemSlots)?,
                Code::ADD_MEM_REG => Message::AddMemReg(read.region()?),
                Code::REM_MEM_REG => Message::RemMemReg(read.region()?),
                _ => return Err(Malformed::Unknown(code)),
            },
        )
    }

    /// How many descriptors come with it, at the least and at the most.
    pub fn descriptors(&self) -> std::ops::RangeInclusive<usize> {
        match self {
            Message::SetMemTable(regions) => regions.len()..=regions.len(),
            Message::SetVringKick(_, true)
            | Message::SetVringCall(_, true)
            | Message::SetVringErr(_, true)
            | Message::SetBackendReqFd
            | Message::AddMemReg(_) => 1..=1,
            // QEMU sends the region's descriptor along, and vhost-user lets it.
            Message::RemMemReg(_) => 0..=1,
            _ => 0..=0,
        }
    }
}

struct Reader<'a> {
    code: u32,
    body: &'a [u8],
}

impl Reader<'_> {
    fn nothing<T>(&self, message: T) -> Result<T, Malformed> {
        if self.body.is_empty() {
            Ok(message)
        } else {
            Err(Malformed::Length(self.code))
        }
    }

    fn bytes<const N: usize>(&self) -> Result<&[u8; N], Malformed> {
        self.body
            .try_into()
            .map_err(|_| Malformed::Length(self.code))
    }

    fn number(&self) -> Result<u64, Malformed> {
        Ok(u64::from_le_bytes(*self.bytes()?))
    }

    fn state<T>(&self, make: impl FnOnce(u32, u32) -> T) -> Result<T, Malformed> {
        let [ring, number] = words(self.bytes::<8>()?);
        Ok(make(ring, number))
    }

    fn descriptor<T>(&self, make: impl FnOnce(u32, bool) -> T) -> Result<T, Malformed> {
        let number = self.number()?;
        if number & !(0xff | NO_FD) != 0 {
            return Err(Malformed::Value(self.code));
        }
        let ring = u32::try_from(number & 0xff).unwrap_or_default();
        Ok(make(ring, number & NO_FD == 0))
    }

    fn addresses(&self) -> Result<Message, Malformed> {
        let bytes = self.bytes::<40>()?;
        let [ring, flags, ..] = words::<40, 10>(bytes);
        let [_, descriptors, used, available, _] = longs(bytes);
        // The only flag asks for a log of what is written, which is not offered.
        if flags != 0 {
            return Err(Malformed::Value(self.code));
        }
        let addresses = Addresses {
            descriptors,
            used,
            available,
        };
        Ok(Message::SetVringAddr(ring, addresses))
    }

    fn table(&self) -> Result<Vec<Region>, Malformed> {
        let wrong = Malformed::Length(self.code);
        let (head, regions) = self.body.split_first_chunk::<8>().ok_or(wrong)?;
        let [count, padding] = words(head);
        let (regions, rest) = regions.as_chunks::<32>();
        let count = usize::try_from(count).map_err(|_| wrong)?;
        if !rest.is_empty() || regions.len() != count {
            return Err(wrong);
        }
        if padding != 0 || count == 0 || count > FDS_MAX {
            return Err(Malformed::Value(self.code));
        }
        Ok(regions.iter().map(region).collect())
    }

    fn region(&self) -> Result<Region, Malformed> {
        let bytes = self.bytes::<40>()?;
        let (padding, bytes) = bytes
            .split_first_chunk::<8>()
            .ok_or(Malformed::Length(self.code))?;
        let bytes = bytes.try_into().map_err(|_| Malformed::Length(self.code))?;
        if *padding != [0; 8] {
            return Err(Malformed::Value(self.code));
        }
        Ok(region(bytes))
    }

    /// The offset, and what it is about: as many bytes as were announced.
    fn config(&self) -> Result<(u32, &[u8]), Malformed> {
        let wrong = Malformed::Length(self.code);
        let (head, bytes) = self.body.split_first_chunk::<CONFIG_HEAD>().ok_or(wrong)?;
        let [offset, length, _flags] = words(head);
        if usize::try_from(length).ok() != Some(bytes.len()) || bytes.len() > CONFIG_MAX {
            return Err(wrong);
        }
        Ok((offset, bytes))
    }
}

fn region(bytes: &[u8; 32]) -> Region {
    let [guest, length, user, offset] = longs(bytes);
    Region {
        guest,
        bytes: length,
        user,
        offset,
    }
}

fn words<const BYTES: usize, const N: usize>(bytes: &[u8; BYTES]) -> [u32; N] {
    let chunks = bytes.as_chunks::<4>().0;
    std::array::from_fn(|k| chunks.get(k).map_or(0, |bytes| u32::from_le_bytes(*bytes)))
}

fn longs<const BYTES: usize, const N: usize>(bytes: &[u8; BYTES]) -> [u64; N] {
    let chunks = bytes.as_chunks::<8>().0;
    std::array::from_fn(|k| chunks.get(k).map_or(0, |bytes| u64::from_le_bytes(*bytes)))
}

/// What is answered to a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// A number, also whether a message was taken (0) or not.
    Number(u64),
    /// A ring's number, and where it stands.
    State(u32, u32),
    /// Part of the configuration space, or nothing where there is none.
    Config(u32, Vec<u8>),
}

impl Reply {
    /// The whole answer to message `code`.
    pub fn bytes(&self, code: u32) -> Vec<u8> {
        let body = match self {
            Reply::Number(number) => number.to_le_bytes().to_vec(),
            Reply::State(ring, number) => [ring.to_le_bytes(), number.to_le_bytes()].concat(),
            Reply::Config(offset, bytes) => {
                let length = u32::try_from(bytes.len()).unwrap_or_default();
                let head = [*offset, length, 0].map(u32::to_le_bytes).concat();
                [head.as_slice(), bytes].concat()
            }
        };
        let length = u32::try_from(body.len()).unwrap_or_default();
        let header = [code, VERSION | Flag::REPLY.bits(), length].map(u32::to_le_bytes);
        [header.concat(), body].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_that_no_front_end_sends_are_refused() {
        let read = |words: [u32; 3]| {
            Header::read(&words.map(u32::to_le_bytes).concat().try_into().unwrap())
        };
        assert!(read([1, 1, 0]).is_ok() && read([1, 9, 4096]).is_ok());
        for flags in [0, 2, 3, 5, 17] {
            assert_eq!(read([7, flags, 0]), Err(Malformed::Flags(7)));
        }
        assert!(read([1, 1, 4097]).is_err() && read([1, 1, u32::MAX]).is_err());
    }

    #[test]
    fn bodies_of_every_other_length_are_refused() {
        for (code, length) in [
            (Code::GET_FEATURES, 0),
            (Code::SET_FEATURES, 8),
            (Code::SET_VRING_NUM, 8),
            (Code::SET_VRING_ADDR, 40),
            (Code::SET_VRING_KICK, 8),
            (Code::ADD_MEM_REG, 40),
        ] {
            for bytes in 0..64 {
                let read = Message::read(code.into(), &vec![0; bytes]);
                assert_eq!(
                    read.is_ok(),
                    bytes == length,
                    "{code:?} with {bytes}: {read:?}"
                );
            }
        }
    }
}
