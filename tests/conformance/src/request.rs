// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Requests as bytes.

use cram_abi::wire::{
    Header, LIMITS_SIZE, NewPool, PAGE_SHIFT, PAGE_SIZE, RESPONSE_SIZE, Range, Report, op,
};
use zerocopy::IntoBytes;

use crate::run::Part;

/// A page that is told from others by its number, and compresses by half.
#[must_use]
pub fn page(number: u64) -> [u8; PAGE_SIZE] {
    let mut page = [0; PAGE_SIZE];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in page.as_chunks_mut::<8>().0.iter_mut().take(256) {
        // xorshift64: what it gives does not compress.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *word = state.to_le_bytes();
    }
    page
}

/// The readable part of a request, and how much room it needs for its answer.
#[derive(Clone, Debug)]
pub struct Request {
    /// The readable part.
    pub readable: Vec<u8>,
    /// Bytes of the writable part.
    pub writable: usize,
}

impl Request {
    /// A request of any header and body, with room for a response.
    #[must_use]
    pub fn new(header: Header, body: &[u8]) -> Self {
        let mut readable = header.as_bytes().to_vec();
        readable.extend_from_slice(body);
        Self {
            readable,
            writable: RESPONSE_SIZE,
        }
    }

    /// The descriptors that a plain driver would give it.
    #[must_use]
    pub fn parts(&self) -> Vec<Part> {
        vec![
            Part::Read(self.readable.clone()),
            Part::Write(self.writable),
        ]
    }

    /// A header.
    #[must_use]
    pub fn header(op: u16, pool: u32, object: u64, count: usize) -> Header {
        Header {
            op: op.into(),
            pool: pool.into(),
            object: [object.into(), 0.into(), 0.into()],
            count: u32::try_from(count).unwrap_or(u32::MAX).into(),
            ..Header::default()
        }
    }

    /// query.
    #[must_use]
    pub fn query() -> Self {
        let mut request = Self::new(Self::header(op::QUERY, 0, 0, 0), &[]);
        request.writable += LIMITS_SIZE;
        request
    }

    /// new_pool.
    #[must_use]
    pub fn new_pool(pool: u32, flags: u32, uuid: [u8; 16]) -> Self {
        let body = NewPool {
            flags: flags.into(),
            page_shift: PAGE_SHIFT,
            uuid,
            ..NewPool::default()
        };
        Self::new(Self::header(op::NEW_POOL, pool, 0, 0), body.as_bytes())
    }

    /// destroy_pool.
    #[must_use]
    pub fn destroy_pool(pool: u32) -> Self {
        Self::new(Self::header(op::DESTROY_POOL, pool, 0, 0), &[])
    }

    /// put.
    #[must_use]
    pub fn put(pool: u32, object: u64, pages: &[(u32, [u8; PAGE_SIZE])]) -> Self {
        let mut body: Vec<u8> = pages.iter().flat_map(|(k, _)| k.to_le_bytes()).collect();
        for (_, page) in pages {
            body.extend_from_slice(page);
        }
        Self::new(Self::header(op::PUT, pool, object, pages.len()), &body)
    }

    /// get.
    #[must_use]
    pub fn get(pool: u32, object: u64, indexes: &[u32]) -> Self {
        let body: Vec<u8> = indexes.iter().flat_map(|k| k.to_le_bytes()).collect();
        let mut request = Self::new(Self::header(op::GET, pool, object, indexes.len()), &body);
        request.writable += indexes.len() * PAGE_SIZE;
        request
    }

    /// flush_page.
    #[must_use]
    pub fn flush_page(pool: u32, object: u64, ranges: &[(u32, u32)]) -> Self {
        let mut body = Vec::new();
        for &(first, count) in ranges {
            let range = Range {
                first: first.into(),
                count: count.into(),
            };
            body.extend_from_slice(range.as_bytes());
        }
        Self::new(
            Self::header(op::FLUSH_PAGE, pool, object, ranges.len()),
            &body,
        )
    }

    /// report.
    #[must_use]
    pub fn report(report: &Report) -> Self {
        Self::new(Self::header(op::REPORT, 0, 0, 0), report.as_bytes())
    }

    /// flush_object.
    #[must_use]
    pub fn flush_object(pool: u32, object: u64) -> Self {
        Self::new(Self::header(op::FLUSH_OBJECT, pool, object, 0), &[])
    }
}
