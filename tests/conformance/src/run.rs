// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Running the table over a channel.

use anyhow::{Context, Result, bail, ensure};
use cram_abi::wire::{
    LIMITS_SIZE, Limits, PAGE_SIZE, RESPONSE_SIZE, Response, pool_flag, result, status,
};
use zerocopy::FromBytes;

use crate::cases::{Case, Expect, cases};
use crate::request::{Request, page};

/// What the driver leaves where the device may write.
pub(crate) const UNTOUCHED: u8 = 0xa5;
/// Pools that cases use; they are gone before each.
const POOLS: u32 = 4;

/// One descriptor of a chain.
#[derive(Clone, Debug)]
pub enum Part {
    /// Bytes that the device may read.
    Read(Vec<u8>),
    /// So many bytes that it may write.
    Write(usize),
    /// So many bytes where the guest has no memory, to be read (false) or written.
    Nowhere(bool, usize),
}

/// What came of a chain.
#[derive(Clone, Debug)]
pub struct Reply {
    /// The used length.
    pub used: u32,
    /// All bytes that the device might have written, in order; they were 0xa5 before. (Without those
    /// that are nowhere.)
    pub written: Vec<u8>,
}

/// A way to the device. Its client has at least four pools, and room for a thousand pages.
pub trait Channel {
    /// Sends a chain and waits for its completion. A part may be longer than a page of the guest;
    /// the channel cuts it where it has to.
    ///
    /// # Errors
    /// When it is not completed.
    fn exchange(&mut self, parts: &[Part]) -> Result<Reply>;
}

/// Runs the whole table; how many cases there were.
///
/// # Errors
/// With the first case that is answered otherwise than it has to be.
pub fn run(channel: &mut dyn Channel) -> Result<usize> {
    let cases = cases();
    for case in &cases {
        prepare(channel)
            .and_then(|()| run_case(channel, case))
            .with_context(|| format!("section {}: {}", case.section, case.name))?;
    }
    Ok(cases.len())
}

/// One persistent pool, 0, and nothing in it.
fn prepare(channel: &mut dyn Channel) -> Result<()> {
    for pool in 0..POOLS {
        send(channel, &Request::destroy_pool(pool))?;
    }
    let made = send(
        channel,
        &Request::new_pool(0, pool_flag::PERSISTENT, [0; 16]),
    )?;
    ensure!(
        response(&made)?.status == status::OK,
        "there is no pool to begin with"
    );
    Ok(())
}

fn send(channel: &mut dyn Channel, request: &Request) -> Result<Reply> {
    channel.exchange(&request.parts())
}

fn run_case(channel: &mut dyn Channel, case: &Case) -> Result<()> {
    for (number, step) in (1..).zip(&case.steps) {
        let reply = channel.exchange(&step.parts)?;
        check(&reply, &step.expect).with_context(|| format!("step {number}"))?;
    }
    Ok(())
}

fn response(reply: &Reply) -> Result<Response> {
    let bytes = reply.written.get(..RESPONSE_SIZE);
    bytes
        .and_then(|bytes| Response::read_from_bytes(bytes).ok())
        .context("there is no room for a response")
}

fn check(reply: &Reply, expect: &Expect) -> Result<()> {
    let used = usize::try_from(reply.used)?;
    if let Expect::Unanswered = expect {
        ensure!(used == 0, "used length {used} instead of 0");
        return untouched(reply, 0);
    }
    let response = response(reply)?;
    ensure!(response.reserved == [0; 3], "reserved bytes are not 0");
    let (wanted, results, behind) = match expect {
        Expect::Unanswered => return Ok(()),
        Expect::Status(wanted) => (*wanted, Vec::new(), 0),
        Expect::Done { .. } => (status::OK, Vec::new(), 0),
        Expect::Limits { .. } => (status::OK, Vec::new(), LIMITS_SIZE),
        Expect::Put(results) => (status::OK, results.clone(), 0),
        Expect::Get(pages) => {
            let results = pages.iter().map(|page| match page {
                Ok(_) => result::OK,
                Err(result) => *result,
            });
            let behind = pages.len() * PAGE_SIZE;
            (status::OK, results.collect(), behind)
        }
    };
    ensure!(
        response.status == wanted,
        "status {} instead of {wanted}",
        response.status
    );
    let length = RESPONSE_SIZE + behind;
    ensure!(used == length, "used length {used} instead of {length}");
    untouched(reply, used)?;

    let (count, pages) = match expect {
        Expect::Done { count, pages } => (*count, *pages),
        _ => (results.len(), 0),
    };
    ensure!(
        response.count.get() as usize == count && response.pages.get() == pages,
        "count {} and pages {} instead of {count} and {pages}",
        response.count.get(),
        response.pages.get()
    );
    let (told, rest) = response.result.split_at(results.len());
    ensure!(told == results, "results {told:?} instead of {results:?}");
    ensure!(
        rest.iter().all(|one| *one == result::NOT_DONE),
        "results beyond the count"
    );
    match expect {
        Expect::Get(pages) => check_pages(reply, pages),
        Expect::Limits { stored_pages } => check_limits(reply, *stored_pages),
        _ => Ok(()),
    }
}

/// What is beyond the used length is as it was.
fn untouched(reply: &Reply, used: usize) -> Result<()> {
    let rest = reply.written.get(used..).unwrap_or_default();
    ensure!(
        rest.iter().all(|byte| *byte == UNTOUCHED),
        "bytes beyond the used length were written"
    );
    Ok(())
}

fn check_pages(reply: &Reply, pages: &[Result<u64, u8>]) -> Result<()> {
    let bodies = reply.written.get(RESPONSE_SIZE..).unwrap_or_default();
    let mut bodies = bodies.chunks_exact(PAGE_SIZE);
    for (k, expected) in pages.iter().enumerate() {
        // A page that is nowhere has no bytes here.
        if *expected == Err(result::BAD_PAGE) {
            continue;
        }
        let Some(body) = bodies.next() else {
            bail!("page {k} has no bytes");
        };
        let is_right = match expected {
            Ok(number) => body == page(*number),
            Err(_) => body.iter().all(|byte| *byte == UNTOUCHED),
        };
        ensure!(is_right, "page {k} has other bytes than it should");
    }
    Ok(())
}

fn check_limits(reply: &Reply, stored_pages: u64) -> Result<()> {
    let bytes = reply
        .written
        .get(RESPONSE_SIZE..RESPONSE_SIZE + LIMITS_SIZE);
    let limits = bytes
        .and_then(|bytes| Limits::read_from_bytes(bytes).ok())
        .context("there are no limits")?;
    ensure!(
        limits.stored_pages.get() == stored_pages,
        "{} pages are stored instead of {stored_pages}",
        limits.stored_pages.get()
    );
    let (held, quota) = (limits.held_bytes.get(), limits.quota_bytes.get());
    ensure!(
        held <= quota && quota <= limits.capacity_bytes.get(),
        "{held} bytes are held, of {quota}"
    );
    ensure!(
        limits.pressure.get() <= 1000 && limits.generation.get() != 0 && limits.reserved == [0; 2],
        "absurd limits"
    );
    Ok(())
}
