// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The table. Sections are those of `docs/protocol.md`; before each case there is pool 0, persistent
//! and empty, and no other of the pools 1 to 3.

use cram_abi::wire::{
    HEADER_SIZE, MAX_BATCH, MAX_READABLE, MAX_WRITABLE, PAGE_SIZE, RESPONSE_SIZE, Report, op,
    pool_flag, result, status,
};

use crate::request::{Request, page};
use crate::run::Part;

/// What a chain has to be answered.
#[derive(Clone, Debug)]
pub enum Expect {
    /// Used length 0, and nothing written.
    Unanswered,
    /// This status, which is not OK.
    Status(u8),
    /// OK, for what has no results page by page.
    Done {
        /// The request's count.
        count: usize,
        /// Pages removed or found.
        pages: u64,
    },
    /// OK, with these results.
    Put(Vec<u8>),
    /// OK, with for each page the number of the [`page`] that it is, or the result that is not OK.
    Get(Vec<Result<u64, u8>>),
    /// OK, with limits that say so.
    Limits {
        /// Pages that the client has stored.
        stored_pages: u64,
    },
}

/// A chain and its answer.
#[derive(Clone, Debug)]
pub struct Step {
    /// The chain.
    pub parts: Vec<Part>,
    /// The answer.
    pub expect: Expect,
}

/// A sentence of the protocol, put to the test.
#[derive(Clone, Debug)]
pub struct Case {
    /// Of `docs/protocol.md`.
    pub section: &'static str,
    /// What it is about.
    pub name: &'static str,
    /// One after the other, on one queue.
    pub steps: Vec<Step>,
}

fn case(section: &'static str, name: &'static str, steps: Vec<Step>) -> Case {
    Case {
        section,
        name,
        steps,
    }
}

fn step(request: &Request, expect: Expect) -> Step {
    Step {
        parts: request.parts(),
        expect,
    }
}

/// Puts test pages under these indexes; all are stored.
fn put(pool: u32, object: u64, pages: &[(u32, u64)]) -> Step {
    let results = vec![result::OK; pages.len()];
    step(&put_of(pool, object, pages), Expect::Put(results))
}

fn put_of(pool: u32, object: u64, pages: &[(u32, u64)]) -> Request {
    let pages: Vec<_> = pages
        .iter()
        .map(|(at, number)| (*at, page(*number)))
        .collect();
    Request::put(pool, object, &pages)
}

fn get(pool: u32, object: u64, indexes: &[u32], pages: &[Result<u64, u8>]) -> Step {
    let request = Request::get(pool, object, indexes);
    step(&request, Expect::Get(pages.to_vec()))
}

fn done(request: &Request, count: usize, pages: u64) -> Step {
    step(request, Expect::Done { count, pages })
}

fn refused(request: &Request, status: u8) -> Step {
    step(request, Expect::Status(status))
}

fn new_pool(pool: u32, flags: u32) -> Request {
    Request::new_pool(pool, flags, [0; 16])
}

/// The request with one byte changed.
fn spoiled(mut request: Request, at: usize, byte: u8) -> Request {
    if let Some(place) = request.readable.get_mut(at) {
        *place = byte;
    }
    request
}

/// The request with a readable part of this length.
fn resized(mut request: Request, len: usize) -> Request {
    request.readable.resize(len, 0);
    request
}

fn with_room(mut request: Request, writable: usize) -> Request {
    request.writable = writable;
    request
}

const MISSING: Result<u64, u8> = Err(result::MISSING);
const BAD_PAGE: Result<u64, u8> = Err(result::BAD_PAGE);
const BAD: u8 = status::BAD_REQUEST;
const UNSUPPORTED: u8 = status::UNSUPPORTED;

/// All of them.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut all = chains();
    all.extend(headers());
    all.extend(lengths());
    all.extend(pools());
    all.extend(puts_and_gets());
    all.extend(ephemeral());
    all.extend(flushes());
    all.extend(repeated());
    all
}

/// How a request may be cut up, and what is no request.
fn chains() -> Vec<Case> {
    const SECTION: &str = "6.1.1";
    let request = put_of(0, 0, &[(1, 11)]);
    let bytes = &request.readable;
    let (head, body) = bytes.split_at(HEADER_SIZE);
    let read = |bytes: &[u8]| Part::Read(bytes.to_vec());
    let chain = |name, parts: Vec<Part>, expect| case(SECTION, name, vec![Step { parts, expect }]);
    let stored = || Expect::Put(vec![result::OK]);
    let crumbs = bytes
        .chunks(bytes.len().div_ceil(130))
        .map(read)
        .chain([Part::Write(RESPONSE_SIZE)])
        .collect();
    vec![
        chain(
            "a request in pieces of any size",
            vec![
                read(&head[..1]),
                read(&head[1..]),
                read(&[]),
                read(&body[..3]),
                read(&body[3..]),
                Part::Write(7),
                Part::Write(0),
                Part::Write(RESPONSE_SIZE - 7),
            ],
            stored(),
        ),
        chain("a request in very many pieces", crumbs, stored()),
        chain(
            "more room than is needed",
            vec![read(bytes), Part::Write(RESPONSE_SIZE + 5000)],
            stored(),
        ),
        chain("no room at all", vec![read(bytes)], Expect::Unanswered),
        chain(
            "room for a response but for one byte",
            vec![read(bytes), Part::Write(RESPONSE_SIZE - 1)],
            Expect::Unanswered,
        ),
        chain(
            "a response that would be nowhere",
            vec![read(bytes), Part::Nowhere(true, RESPONSE_SIZE)],
            Expect::Unanswered,
        ),
        chain(
            "nothing to read",
            vec![Part::Write(RESPONSE_SIZE)],
            Expect::Status(BAD),
        ),
        chain(
            "what is read behind what is written",
            vec![read(head), Part::Write(RESPONSE_SIZE), read(body)],
            Expect::Status(BAD),
        ),
        chain(
            "a header that is nowhere",
            vec![
                Part::Nowhere(false, HEADER_SIZE),
                read(body),
                Part::Write(RESPONSE_SIZE),
            ],
            Expect::Status(BAD),
        ),
        chain(
            "page numbers that are nowhere",
            vec![
                read(head),
                Part::Nowhere(false, 4),
                read(&body[4..]),
                Part::Write(RESPONSE_SIZE),
            ],
            Expect::Status(BAD),
        ),
        chain(
            "more to read than any request has",
            vec![read(&vec![0; MAX_READABLE + 1]), Part::Write(RESPONSE_SIZE)],
            Expect::Status(BAD),
        ),
        chain(
            "more room than any answer needs",
            vec![read(bytes), Part::Write(MAX_WRITABLE + 1)],
            Expect::Status(BAD),
        ),
        case(
            SECTION,
            "a wrong request hurts nobody",
            vec![
                put(0, 0, &[(1, 11)]),
                refused(&spoiled(put_of(0, 0, &[(1, 12)]), 36, 1), BAD),
                get(0, 0, &[1], &[Ok(11)]),
            ],
        ),
    ]
}

fn headers() -> Vec<Case> {
    const SECTION: &str = "6.1.1, 4 and 5";
    let header = |op, count| Request::new(Request::header(op, 0, 0, count), &[]);
    let good = || put_of(0, 0, &[(1, 11)]);
    let wrong =
        |name, request: Request, status| case(SECTION, name, vec![refused(&request, status)]);
    let report = || Request::report(&Report::default());
    let too_many = vec![(0, 0); MAX_BATCH + 1];
    vec![
        wrong("operation 8", header(8, 0), UNSUPPORTED),
        wrong("operation 65535", header(u16::MAX, 0), UNSUPPORTED),
        wrong("a flag", spoiled(good(), 2, 1), UNSUPPORTED),
        wrong("the last flag", spoiled(good(), 3, 0x80), UNSUPPORTED),
        wrong(
            "a flag, before reserved bytes",
            spoiled(spoiled(good(), 2, 1), 36, 1),
            UNSUPPORTED,
        ),
        wrong("the first reserved byte", spoiled(good(), 36, 1), BAD),
        wrong("the last reserved byte", spoiled(good(), 39, 1), BAD),
        wrong("put of nothing", put_of(0, 0, &[]), BAD),
        wrong("get of nothing", Request::get(0, 0, &[]), BAD),
        wrong("flush of no ranges", Request::flush_page(0, 0, &[]), BAD),
        wrong("get of 65 pages", Request::get(0, 0, &[0; 65]), BAD),
        wrong("put of 65 pages", put_of(0, 0, &too_many), BAD),
        wrong("get of 2^32 - 1 pages", header(op::GET, usize::MAX), BAD),
        wrong("query of one", spoiled(Request::query(), 32, 1), BAD),
        wrong("destroy_pool of one", header(op::DESTROY_POOL, 1), BAD),
        wrong("flush_object of one", header(op::FLUSH_OBJECT, 1), BAD),
        wrong("report of one", spoiled(report(), 32, 1), BAD),
        wrong("report without a body", header(op::REPORT, 0), BAD),
        wrong(
            "a reserved byte of a report",
            spoiled(report(), HEADER_SIZE + 20, 1),
            BAD,
        ),
        case(
            "6.2",
            "a report of anything is heard",
            vec![
                step(&report(), Expect::Done { count: 0, pages: 0 }),
                step(
                    &spoiled(spoiled(report(), HEADER_SIZE, 0xff), HEADER_SIZE + 2, 0xff),
                    Expect::Done { count: 0, pages: 0 },
                ),
            ],
        ),
    ]
}

fn lengths() -> Vec<Case> {
    const SECTION: &str = "6.1.1, 5";
    let put = || put_of(0, 0, &[(1, 11)]);
    let get = || Request::get(0, 0, &[1, 2]);
    let whole = HEADER_SIZE + 4 + PAGE_SIZE;
    let answer = RESPONSE_SIZE + 2 * PAGE_SIZE;
    let wrong = |name, request: Request| case(SECTION, name, vec![refused(&request, BAD)]);
    vec![
        wrong("a byte", resized(put(), 1)),
        wrong("half a header", resized(put(), HEADER_SIZE - 1)),
        wrong("put without anything", resized(put(), HEADER_SIZE)),
        wrong("put without page", resized(put(), HEADER_SIZE + 4)),
        wrong("put, a byte short", resized(put(), whole - 1)),
        wrong("put, a byte long", resized(put(), whole + 1)),
        wrong("get with more", resized(get(), HEADER_SIZE + 9)),
        wrong("get with less", resized(get(), HEADER_SIZE + 7)),
        wrong(
            "query with more",
            resized(Request::query(), HEADER_SIZE + 1),
        ),
        wrong(
            "new_pool without body",
            resized(new_pool(1, 1), HEADER_SIZE),
        ),
        wrong(
            "new_pool with more",
            resized(new_pool(1, 1), HEADER_SIZE + 25),
        ),
        wrong("get without room", with_room(get(), RESPONSE_SIZE)),
        wrong("get, a byte of room short", with_room(get(), answer - 1)),
        wrong(
            "query without room",
            with_room(Request::query(), RESPONSE_SIZE + 63),
        ),
        case(SECTION, "a whole batch, put and got", {
            let pages: Vec<_> = (0..64).map(|k| (k * 3, u64::from(k))).collect();
            let indexes: Vec<_> = pages.iter().map(|(at, _)| *at).collect();
            let got: Vec<_> = pages.iter().map(|(_, number)| Ok(*number)).collect();
            vec![self::put(0, 5, &pages), self::get(0, 5, &indexes, &got)]
        }),
    ]
}

fn pools() -> Vec<Case> {
    const SECTION: &str = "6.2, pools";
    const UUID: [u8; 16] = [9; 16];
    let (persistent, shared, picky) = (
        pool_flag::PERSISTENT,
        pool_flag::SHARED,
        pool_flag::REFUSE_INCOMPRESSIBLE,
    );
    let wrong =
        |name, request: &Request, status| case(SECTION, name, vec![refused(request, status)]);
    let make = |flags, uuid| Request::new_pool(1, flags, uuid);
    vec![
        wrong("an unknown flag", &new_pool(1, persistent | 8), UNSUPPORTED),
        wrong(
            "pages of 8 KiB",
            &spoiled(new_pool(1, persistent), HEADER_SIZE + 4, 13),
            UNSUPPORTED,
        ),
        wrong(
            "a reserved byte",
            &spoiled(new_pool(1, persistent), HEADER_SIZE + 7, 1),
            BAD,
        ),
        wrong("shared without uuid", &make(shared, [0; 16]), BAD),
        wrong("private with uuid", &make(persistent, UUID), BAD),
        wrong(
            "shared and persistent",
            &make(shared | persistent, UUID),
            status::DENIED,
        ),
        wrong(
            "not authorised for a shared pool",
            &make(shared, UUID),
            status::DENIED,
        ),
        wrong(
            "an id that is too high",
            &new_pool(u32::MAX, persistent),
            status::DENIED,
        ),
        wrong(
            "a pool that is not there cannot go",
            &Request::destroy_pool(3),
            status::NO_POOL,
        ),
        case(
            SECTION,
            "the same again is OK, another kind is not",
            vec![
                put(0, 0, &[(1, 1), (2, 2)]),
                done(&new_pool(0, persistent), 0, 2),
                refused(&new_pool(0, 0), status::POOL_EXISTS),
                refused(&new_pool(0, persistent | picky), status::POOL_EXISTS),
                get(0, 0, &[1, 2], &[Ok(1), Ok(2)]),
            ],
        ),
        case(
            SECTION,
            "a pool that went takes its pages along, and leaves its id",
            vec![
                put(0, 0, &[(1, 1), (2, 2), (900, 3)]),
                done(&Request::destroy_pool(0), 0, 3),
                refused(&Request::get(0, 0, &[1]), status::NO_POOL),
                refused(&put_of(0, 0, &[(1, 1)]), status::NO_POOL),
                refused(&Request::flush_page(0, 0, &[(1, 1)]), status::NO_POOL),
                refused(&Request::flush_object(0, 0), status::NO_POOL),
                done(&new_pool(0, 0), 0, 0),
                get(0, 0, &[1], &[MISSING]),
            ],
        ),
        case(
            SECTION,
            "a pool that wants no pages that do not compress",
            {
                let noise: [u8; PAGE_SIZE] =
                    std::array::from_fn(|at| page(at as u64).get(at % 2048).copied().unwrap_or(0));
                let request = Request::put(1, 0, &[(1, noise), (2, page(2))]);
                vec![
                    done(&new_pool(1, persistent | picky), 0, 0),
                    put(1, 0, &[(1, 1)]),
                    step(
                        &request,
                        Expect::Put(vec![result::INCOMPRESSIBLE, result::OK]),
                    ),
                    get(1, 0, &[1, 2], &[MISSING, Ok(2)]),
                ]
            },
        ),
        case(
            "6.2, query",
            "what is stored is told",
            vec![
                put(0, 0, &[(1, 1), (2, 2), (3, 3)]),
                step(&Request::query(), Expect::Limits { stored_pages: 3 }),
            ],
        ),
    ]
}

fn puts_and_gets() -> Vec<Case> {
    const SECTION: &str = "6.2, put and get";
    let twice = put_of(0, 0, &[(1, 10), (1, 11)]);
    let nowhere_put = vec![
        Part::Read(
            put_of(0, 0, &[(1, 12), (2, 13)])
                .readable
                .into_iter()
                .take(HEADER_SIZE + 8)
                .collect(),
        ),
        Part::Nowhere(false, PAGE_SIZE),
        Part::Read(page(13).to_vec()),
        Part::Write(RESPONSE_SIZE),
    ];
    let nowhere_get = |pool| {
        vec![
            Part::Read(Request::get(pool, 0, &[1, 2]).readable),
            Part::Write(RESPONSE_SIZE),
            Part::Nowhere(true, PAGE_SIZE),
            Part::Write(PAGE_SIZE),
        ]
    };
    let get_of_nowhere = |pool| Step {
        parts: nowhere_get(pool),
        expect: Expect::Get(vec![BAD_PAGE, Ok(2)]),
    };
    vec![
        case(
            SECTION,
            "a page is got as often as one likes",
            vec![
                put(0, 0, &[(7, 70)]),
                get(0, 0, &[7, 7, 7], &[Ok(70), Ok(70), Ok(70)]),
                get(0, 0, &[7], &[Ok(70)]),
            ],
        ),
        case(
            SECTION,
            "what was never put is missing, and its buffer untouched",
            vec![
                put(0, 0, &[(1, 1)]),
                get(0, 0, &[0, 1, 2], &[MISSING, Ok(1), MISSING]),
            ],
        ),
        case(
            SECTION,
            "the last put decides",
            vec![
                put(0, 0, &[(1, 9)]),
                step(&twice, Expect::Put(vec![result::OK; 2])),
                get(0, 0, &[1], &[Ok(11)]),
            ],
        ),
        case(
            SECTION,
            "names differ by pool, by object, by index",
            vec![
                done(&new_pool(1, pool_flag::PERSISTENT), 0, 0),
                put(0, 0, &[(1, 1), (u32::MAX, 2)]),
                put(0, u64::MAX, &[(1, 3)]),
                put(1, 0, &[(1, 4)]),
                get(0, 0, &[u32::MAX, 1], &[Ok(2), Ok(1)]),
                get(0, u64::MAX, &[1, u32::MAX], &[Ok(3), MISSING]),
                get(1, 0, &[1], &[Ok(4)]),
            ],
        ),
        case(SECTION, "pages of one word", {
            let filled = |word: u64| {
                let mut page = [0; PAGE_SIZE];
                page.as_chunks_mut::<8>().0.fill(word.to_le_bytes());
                page
            };
            let request = Request::put(0, 0, &[(1, filled(0)), (2, filled(0x0102_0304))]);
            vec![
                step(&request, Expect::Put(vec![result::OK; 2])),
                step(&Request::query(), Expect::Limits { stored_pages: 2 }),
                done(&Request::flush_object(0, 0), 0, 2),
            ]
        }),
        case(
            SECTION,
            "a page that is nowhere is not stored, and no older one stays",
            vec![
                put(0, 0, &[(1, 1), (2, 2)]),
                Step {
                    parts: nowhere_put,
                    expect: Expect::Put(vec![result::BAD_PAGE, result::OK]),
                },
                get(0, 0, &[1, 2], &[MISSING, Ok(13)]),
            ],
        ),
        case(
            SECTION,
            "a page that would come nowhere stays",
            vec![
                put(0, 0, &[(1, 1), (2, 2)]),
                get_of_nowhere(0),
                get(0, 0, &[1, 2], &[Ok(1), Ok(2)]),
            ],
        ),
        case(
            SECTION,
            "it stays in an ephemeral pool, too",
            vec![
                done(&new_pool(1, 0), 0, 0),
                put(1, 0, &[(1, 1), (2, 2)]),
                get_of_nowhere(1),
                get(1, 0, &[1, 2], &[Ok(1), MISSING]),
            ],
        ),
    ]
}

fn ephemeral() -> Vec<Case> {
    vec![case(
        "6.2, get",
        "a private ephemeral page is got once",
        vec![
            done(&new_pool(2, 0), 0, 0),
            put(2, 3, &[(1, 1), (2, 2)]),
            get(2, 3, &[1, 1], &[Ok(1), MISSING]),
            get(2, 3, &[1, 2], &[MISSING, Ok(2)]),
            put(2, 3, &[(1, 5)]),
            done(&Request::flush_page(2, 3, &[(0, 10)]), 1, 1),
            get(2, 3, &[1], &[MISSING]),
        ],
    )]
}

fn flushes() -> Vec<Case> {
    const SECTION: &str = "6.2, flush";
    let flush = |ranges: &[(u32, u32)]| Request::flush_page(0, 0, ranges);
    let some = || put(0, 0, &[(0, 1), (63, 2), (64, 3), (1000, 4), (u32::MAX, 5)]);
    let all = [0, 63, 64, 1000, u32::MAX];
    vec![
        case(
            SECTION,
            "ranges, and what is not there",
            vec![
                some(),
                done(&flush(&[(63, 2), (5, 1), (63, 1)]), 3, 2),
                get(0, 0, &all, &[Ok(1), MISSING, MISSING, Ok(4), Ok(5)]),
            ],
        ),
        case(
            SECTION,
            "the whole of an object by a range",
            vec![
                some(),
                put(0, 1, &[(1, 6)]),
                done(&flush(&[(0, u32::MAX)]), 1, 4),
                done(&flush(&[(u32::MAX, 1)]), 1, 1),
                get(0, 0, &all, &[MISSING; 5]),
                get(0, 1, &[1], &[Ok(6)]),
            ],
        ),
        case(
            SECTION,
            "an object, and no other",
            vec![
                some(),
                put(0, 1, &[(63, 6)]),
                done(&Request::flush_object(0, 0), 0, 5),
                done(&Request::flush_object(0, 0), 0, 0),
                get(0, 1, &[63], &[Ok(6)]),
            ],
        ),
        case(
            SECTION,
            "of ranges of which one is wrong none is flushed",
            vec![
                some(),
                refused(&flush(&[(0, 1), (1, 0)]), BAD),
                refused(&flush(&[(0, 1), (2, u32::MAX)]), BAD),
                refused(&flush(&[(u32::MAX, 2)]), BAD),
                get(0, 0, &all, &[Ok(1), Ok(2), Ok(3), Ok(4), Ok(5)]),
            ],
        ),
        case(
            SECTION,
            "a wrong range comes before a pool that is not there",
            vec![refused(&Request::flush_page(3, 0, &[(1, 0)]), BAD)],
        ),
    ]
}

/// What a back-end that was started again does: everything once more.
fn repeated() -> Vec<Case> {
    let flush = Request::flush_page(0, 0, &[(2, 1)]);
    vec![case(
        "7.2",
        "requests that are executed twice",
        vec![
            put(0, 0, &[(1, 1), (2, 2)]),
            put(0, 0, &[(1, 1), (2, 2)]),
            get(0, 0, &[1], &[Ok(1)]),
            get(0, 0, &[1], &[Ok(1)]),
            done(&flush, 1, 1),
            done(&flush, 1, 0),
            get(0, 0, &[1, 2], &[Ok(1), MISSING]),
            done(&Request::destroy_pool(0), 0, 1),
            refused(&Request::destroy_pool(0), status::NO_POOL),
        ],
    )]
}
