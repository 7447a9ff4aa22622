// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! docs/protocol.md, sentence by sentence, against the real daemon over real sockets and rings.

mod arena;
mod conformance;
mod connection;
mod ends;
mod events;
mod first_touch;
mod flow;
mod hostile;
mod instance;
mod malformed;
mod operations;
mod pools;
