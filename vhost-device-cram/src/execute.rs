// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! From a checked request to the store, and from the store's answer to a response.
//!
//! This room knows the vocabulary of both sides and nothing of rings. A refused page is a
//! result, not an error; what the store cannot do for reasons of its own is DEVICE_ERROR.

use std::sync::Arc;

use cram_abi::wire::{
    self, LIMITS_SIZE, Limits, PAGE_SIZE, RESPONSE_SIZE, Response, feature, result, status,
};
use cram_store::{
    Client, GetResult, ObjectId, PAGE_SIZE as STORE_PAGE_SIZE, Page, Pool, PoolError, PoolId,
    PoolKind, PoolSpec, PutResult, Refusal, Scratch, Store,
};

use crate::balance::Balance;
use crate::figures::Kind;
use crate::request::{Chain, Parsed, Request};
use crate::vhost::memory::Memory;

// A page is the same thing on the wire and in the store.
const _: () = assert!(STORE_PAGE_SIZE == PAGE_SIZE);

/// What one request did, for the counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Effect {
    /// Used length to complete the chain with.
    pub used: u32,
    /// Pages put or got (or tried).
    pub pages: u32,
    /// The request was malformed.
    pub malformed: bool,
    /// The store may hold another amount than before.
    pub changed: bool,
    /// As what its time counts, if it is timed.
    pub timed: Option<Kind>,
}

/// Memory that a worker executes requests in. Made once, so that a request allocates nothing.
pub struct Workspace {
    chain: Chain,
    page: Box<Page>,
    scratch: Scratch,
}

impl Default for Workspace {
    fn default() -> Self {
        Workspace::new()
    }
}

impl Workspace {
    /// Fresh memory for one worker.
    pub fn new() -> Self {
        Workspace {
            chain: Chain::new(),
            page: Box::new([0; PAGE_SIZE]),
            scratch: Scratch::new(),
        }
    }

    /// The chain to parse into.
    pub fn chain(&mut self) -> &mut Chain {
        &mut self.chain
    }
}

/// Everything that a request is executed against.
#[derive(Clone, Copy)]
pub struct Target<'a> {
    /// The store.
    pub store: &'a Store,
    /// The guest's account in it.
    pub client: &'a Client,
    /// What the host wants of the guest.
    pub balance: &'a Balance,
    /// Device features that the driver accepted.
    pub features: u64,
    /// As in the configuration space.
    pub max_pools: u32,
}

impl Target<'_> {
    /// The pool of that id, or the status that says why there is none for this driver.
    fn pool(&self, id: PoolId) -> Result<Arc<Pool>, u8> {
        let pool = self.client.pool(id).ok_or(status::NO_POOL)?;
        if needed_features(&pool.spec()) & !self.features == 0 {
            Ok(pool)
        } else {
            // An earlier driver made it, who accepted more.
            Err(status::UNSUPPORTED)
        }
    }
}

/// Without which a pool cannot be used.
fn needed_features(spec: &PoolSpec) -> u64 {
    let kind = match spec.kind {
        PoolKind::Persistent => 0,
        PoolKind::PrivateEphemeral => feature::EPHEMERAL,
        PoolKind::SharedEphemeral { .. } => feature::EPHEMERAL | feature::SHARED,
    };
    let refusing = if spec.refuse_incompressible {
        feature::REFUSE_INCOMPRESSIBLE
    } else {
        0
    };
    kind | refusing
}

/// Executes what was parsed into `workspace.chain()`, and writes the answer.
pub fn execute(
    target: Target<'_>,
    memory: &Memory,
    workspace: &mut Workspace,
    parsed: Parsed,
) -> Effect {
    let mut response = Response::default();
    let mut effect = Effect::default();
    let mut behind = 0;
    match parsed {
        Parsed::Unanswerable => {
            effect.malformed = true;
            return effect;
        }
        Parsed::Rejected(why) => {
            effect.malformed = why == status::BAD_REQUEST;
            response.status = why;
        }
        Parsed::Accepted(request) => match request {
            Request::Query => behind = query(target, memory, workspace, &mut response),
            Request::NewPool(id, spec) => {
                effect.changed = true;
                new_pool(target, id, spec, &mut response);
            }
            Request::DestroyPool(id) => {
                effect.changed = true;
                match target.client.destroy_pool(id) {
                    Ok(pages) => done(&mut response, 0, pages),
                    Err(_) => response.status = status::NO_POOL,
                }
            }
            Request::Put(pool, object, count) => {
                effect.changed = true;
                effect.timed = Some(Kind::Put);
                effect.pages = put(
                    target,
                    memory,
                    workspace,
                    pool,
                    object,
                    count,
                    &mut response,
                );
            }
            Request::Get(pool, object, count) => {
                effect.changed = true;
                effect.timed = Some(Kind::Get);
                effect.pages = get(
                    target,
                    memory,
                    workspace,
                    pool,
                    object,
                    count,
                    &mut response,
                );
                behind = effect.pages as usize * PAGE_SIZE;
            }
            Request::FlushPage(pool, object, count) => {
                effect.changed = true;
                match target.pool(pool) {
                    Ok(pool) => {
                        let ranges = workspace.chain.ranges().iter();
                        let removed = ranges
                            .map(|&(first, n)| pool.flush_page(object, first, n))
                            .sum();
                        done(&mut response, count, removed);
                    }
                    Err(why) => response.status = why,
                }
            }
            Request::Report(report) => {
                target.balance.report(&report);
                done(&mut response, 0, 0);
            }
            Request::FlushObject(pool, object) => {
                effect.changed = true;
                match target.pool(pool) {
                    Ok(pool) => done(&mut response, 0, pool.flush_object(object)),
                    Err(why) => response.status = why,
                }
            }
        },
    }
    if workspace.chain.write_response(memory, &response) {
        effect.used = u32::try_from(RESPONSE_SIZE + behind).unwrap_or_default();
    }
    effect
}

fn done(response: &mut Response, count: usize, pages: u64) {
    response.status = status::OK;
    response.count = u32::try_from(count).unwrap_or_default().into();
    response.pages = pages.into();
}

fn query(
    target: Target<'_>,
    memory: &Memory,
    workspace: &mut Workspace,
    response: &mut Response,
) -> usize {
    let usage = target.client.stats();
    let capacity = target.store.capacity_bytes();
    let quota = target.client.quota_bytes().unwrap_or(capacity);
    let limits = Limits {
        quota_bytes: quota.into(),
        held_bytes: usage.mem_used_total.into(),
        stored_pages: usage.pages_stored.into(),
        capacity_bytes: capacity.into(),
        pressure: target.client.pressure().min(wire::PRESSURE_MAX).into(),
        max_pools: target.max_pools.into(),
        generation: target.client.generation().into(),
        ..Limits::default()
    };
    if !workspace.chain.write_limits(memory, &limits) {
        return 0;
    }
    done(response, 0, 0);
    LIMITS_SIZE
}

fn new_pool(target: Target<'_>, id: PoolId, spec: PoolSpec, response: &mut Response) {
    // One that was made when there might be more is still found.
    if id.0 >= target.max_pools && target.client.pool(id).is_none() {
        response.status = status::DENIED;
        return;
    }
    match target.client.new_pool(id, spec) {
        Ok(pages) => done(response, 0, pages),
        Err(PoolError::Exists) => response.status = status::POOL_EXISTS,
        Err(_) => response.status = status::DENIED,
    }
}

fn put(
    target: Target<'_>,
    memory: &Memory,
    workspace: &mut Workspace,
    pool: PoolId,
    object: ObjectId,
    count: usize,
    response: &mut Response,
) -> u32 {
    let pool = match target.pool(pool) {
        Ok(pool) => pool,
        Err(why) => {
            response.status = why;
            return 0;
        }
    };
    let Workspace {
        chain,
        page,
        scratch,
    } = workspace;
    for k in 0..count {
        let (Some(&index), Some(slot)) = (chain.indexes().get(k), response.result.get_mut(k))
        else {
            break;
        };
        if !chain.read_page(memory, k, page) {
            if !memory.is_intact() {
                // Nobody is going to be answered: the request is executed again, from memory that is there.
                break;
            }
            // A put is absolute: whatever was there before must not be found any more.
            pool.flush_page(object, index, 1);
            *slot = result::BAD_PAGE;
            continue;
        }
        *slot = match pool.put(object, index, page, scratch) {
            PutResult::Stored => result::OK,
            PutResult::Refused(Refusal::NoSpace) => result::NO_SPACE,
            PutResult::Refused(Refusal::OverQuota) => result::OVER_QUOTA,
            PutResult::Refused(Refusal::Frozen) => result::FROZEN,
            PutResult::Refused(Refusal::Incompressible) => result::INCOMPRESSIBLE,
        };
    }
    done(response, count, 0);
    u32::try_from(count).unwrap_or_default()
}

fn get(
    target: Target<'_>,
    memory: &Memory,
    workspace: &mut Workspace,
    pool: PoolId,
    object: ObjectId,
    count: usize,
    response: &mut Response,
) -> u32 {
    let pool = match target.pool(pool) {
        Ok(pool) => pool,
        Err(why) => {
            response.status = why;
            return 0;
        }
    };
    let Workspace {
        chain,
        page,
        scratch,
    } = workspace;
    for k in 0..count {
        let (Some(&index), Some(slot)) = (chain.indexes().get(k), response.result.get_mut(k))
        else {
            break;
        };
        // Looked at first: a page that cannot be delivered must not be taken out of its pool.
        if !chain.is_page_writable(memory, k) {
            *slot = result::BAD_PAGE;
            continue;
        }
        *slot = match pool.get(object, index, page, scratch) {
            GetResult::Found if chain.write_page(memory, k, page) => result::OK,
            GetResult::Found => result::BAD_PAGE,
            GetResult::Missing => result::MISSING,
            GetResult::Corrupt => result::CORRUPT,
        };
    }
    done(response, count, 0);
    u32::try_from(count).unwrap_or_default()
}
