// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Parameters that several methods have.

use std::sync::Arc;

use cram_abi::wire::PAGE_SIZE;
use schemars::JsonSchema;
use serde::Deserialize;

use crate::client::Guest;
use crate::control::rpc::{Error, INTERNAL_ERROR, INVALID_PARAMS, NOT_FOUND};
use crate::roster::RosterError;
use crate::shared::Shared;
use crate::size;

/// No parameters.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// The client in question.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct OnlyClient {
    /// Its name.
    pub(super) client: String,
}

/// A number of bytes, or a size such as "512M".
#[derive(Deserialize, JsonSchema)]
#[serde(
    untagged,
    expecting = "write a whole number of bytes, or a size such as \"512M\""
)]
pub(super) enum Bytes {
    Number(u64),
    Text(String),
}

impl Bytes {
    pub(super) fn read(self) -> Result<u64, Error> {
        match self {
            Bytes::Number(bytes) => Ok(bytes),
            Bytes::Text(text) => {
                size::parse(&text).map_err(|error| Error::new(INVALID_PARAMS, error))
            }
        }
    }
}

/// A client, and so much of its memory: either bytes or pages.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Amount {
    /// Its name.
    pub(super) client: String,
    /// How much, rounded down to pages.
    bytes: Option<Bytes>,
    /// How many pages of 4,096 bytes.
    pages: Option<u32>,
}

impl Amount {
    /// In pages, rounded down.
    pub(super) fn pages(&mut self) -> Result<u32, Error> {
        match (self.bytes.take(), self.pages) {
            (Some(bytes), None) => {
                let pages = bytes.read()? / PAGE_SIZE as u64;
                Ok(u32::try_from(pages).unwrap_or(u32::MAX))
            }
            (None, Some(pages)) => Ok(pages),
            _ => Err(Error::new(INVALID_PARAMS, "give either bytes or pages")),
        }
    }
}

/// The guest of that name.
pub(super) fn guest(shared: &Shared, name: &str) -> Result<Arc<Guest>, Error> {
    Ok(shared.guests.find(name)?)
}

impl From<RosterError> for Error {
    fn from(error: RosterError) -> Self {
        let code = match error {
            RosterError::Unknown { .. } => NOT_FOUND,
            RosterError::Unended(_)
            | RosterError::Ending
            | RosterError::Store(_)
            | RosterError::System(_) => INTERNAL_ERROR,
            _ => INVALID_PARAMS,
        };
        Error::new(code, error.to_string())
    }
}

/// A string: JSON's numbers do not hold 64 bits everywhere.
pub(super) fn write_generation(generation: u64) -> String {
    format!("{generation:016x}")
}

pub(super) fn write_uuid(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (k, byte) in uuid.iter().enumerate() {
        if matches!(k, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

/// Reads a uuid with or without hyphens. The one that is all zeros names no pool.
pub(super) fn read_uuid(text: &str) -> Option<[u8; 16]> {
    let hyphens = [8, 13, 18, 23];
    let is_plain = text.len() == 32;
    let is_hyphened = text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(k, byte)| (byte == b'-') == hyphens.contains(&k));
    if !is_plain && !is_hyphened {
        return None;
    }
    let mut uuid = [0u8; 16];
    let mut digits = text.chars().filter(|&c| c != '-' || is_plain);
    for byte in &mut uuid {
        let (high, low) = (digits.next()?.to_digit(16)?, digits.next()?.to_digit(16)?);
        *byte = u8::try_from(high * 16 + low).ok()?;
    }
    (uuid != [0; 16]).then_some(uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uuids_are_read_and_written() {
        let text = "6ba7b810-9dad-11d1-80b4-00c04fd430c8";
        let uuid = read_uuid(text).unwrap();
        assert_eq!(write_uuid(&uuid), text);
        assert_eq!(read_uuid(&text.replace('-', "")), Some(uuid));
        for wrong in [
            "",
            "6ba7b810",
            "6ba7b8109-dad-11d1-80b4-00c04fd430c8",
            &"0".repeat(32),
            &"-".repeat(32),
            &"é".repeat(16),
        ] {
            assert_eq!(read_uuid(wrong), None, "{wrong}");
        }
    }
}
