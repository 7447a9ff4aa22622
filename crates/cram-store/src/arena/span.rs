// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The life of a span, in one atomic word.
//!
//! ```text
//!   Free ──open──► Open ──seal──► Sealed ──(no live granule, no pin)──► Free
//! ```
//!
//! A span is filled from its beginning to its end while it is open, and never
//! again once it is sealed. Records in it die one by one; when the last one is
//! dead and nobody reads any, the span is free and may be filled anew. Who
//! reads a record without holding a lock *pins* its span meanwhile. All of this
//! is in one word, so that exactly one thread sees a span become free, and
//! none is freed under a reader.

#[cfg(loom)]
use loom::sync::atomic::{AtomicU64, Ordering};

#[cfg(not(loom))]
use crate::machine::sync::atomic::{AtomicU64, Ordering};

/// Live granules: the lowest 24 bits.
const LIVE_MASK: u64 = (1 << 24) - 1;
/// Pins: the next 32 bits. More threads than that there are not.
const PIN: u64 = 1 << 24;
const PIN_MASK: u64 = u32::MAX as u64 * PIN;
/// The state: the highest bits.
const STATE_UNIT: u64 = 1 << 56;
const STATE_MASK: u64 = 0xff * STATE_UNIT;
const OPEN: u64 = STATE_UNIT;
const SEALED: u64 = 2 * STATE_UNIT;

/// The word. Invariant: pins and live granules are never taken off more often than put on; only
/// who opened a span seals it.
pub(crate) struct Life(AtomicU64);

/// The span has just become free, and it is the caller who has to take care of it.
#[must_use]
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Freed(pub(crate) bool);

impl Life {
    /// Of a span that is free.
    pub(crate) fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    pub(crate) fn live_granules(&self) -> u32 {
        // Masked to 24 bits.
        u32::try_from(self.0.load(Ordering::Acquire) & LIVE_MASK).unwrap_or(0)
    }

    pub(crate) fn is_sealed(&self) -> bool {
        self.0.load(Ordering::Acquire) & STATE_MASK == SEALED
    }

    pub(crate) fn is_free(&self) -> bool {
        self.0.load(Ordering::Acquire) & STATE_MASK == 0
    }

    /// To be called by who took it from the list of free spans. (Pins may be there: see
    /// [`Self::pin`].)
    pub(crate) fn open(&self) {
        self.0.fetch_add(OPEN, Ordering::AcqRel);
    }

    /// Nothing is added to it any more.
    pub(crate) fn seal(&self) -> Freed {
        let before = self.0.fetch_add(SEALED - OPEN, Ordering::AcqRel);
        debug_assert_eq!(before & STATE_MASK, OPEN);
        self.free_if_idle(before + SEALED - OPEN)
    }

    /// A record came. Only while it is open.
    pub(crate) fn add_live(&self, granules: u32) {
        self.0.fetch_add(u64::from(granules), Ordering::AcqRel);
    }

    /// A record died.
    pub(crate) fn sub_live(&self, granules: u32) -> Freed {
        let before = self.0.fetch_sub(u64::from(granules), Ordering::AcqRel);
        debug_assert!(before & LIVE_MASK >= u64::from(granules));
        self.free_if_idle(before - u64::from(granules))
    }

    /// Keeps a sealed span from being freed until [`Self::unpin`].
    ///
    /// Safe means: pinned while a lock is held that keeps one of its records alive. Or pinned at a
    /// guess, if only afterwards it is seen that such a record had not been killed yet.
    pub(crate) fn pin(&self) {
        self.0.fetch_add(PIN, Ordering::AcqRel);
    }

    pub(crate) fn unpin(&self) -> Freed {
        let before = self.0.fetch_sub(PIN, Ordering::AcqRel);
        debug_assert_ne!(before & PIN_MASK, 0);
        self.free_if_idle(before - PIN)
    }

    /// Frees it if it is sealed and neither lives nor is pinned, unless another thread does.
    fn free_if_idle(&self, mut now: u64) -> Freed {
        while now == SEALED {
            match self
                .0
                .compare_exchange_weak(now, 0, Ordering::AcqRel, Ordering::Acquire)
            {
                Ok(_) => return Freed(true),
                Err(changed) => now = changed,
            }
        }
        Freed(false)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_span_is_freed_once_by_whoever_leaves_last() {
        for last in ["death", "unpin", "seal"] {
            let life = Life::new();
            life.open();
            life.add_live(5);
            life.pin();
            let mut freed = Vec::new();
            if last != "seal" {
                freed.push(life.seal());
            }
            if last != "death" {
                freed.push(life.sub_live(5));
            }
            if last != "unpin" {
                freed.push(life.unpin());
            }
            assert_eq!(freed, [Freed(false), Freed(false)]);
            assert_eq!((life.is_free(), life.is_sealed()), (false, last != "seal"));
            let freed = match last {
                "death" => life.sub_live(5),
                "unpin" => life.unpin(),
                _ => life.seal(),
            };
            assert_eq!(freed, Freed(true));
            assert!(life.is_free());
        }
    }
}

/// Run by `cargo xtask test`, and with
/// `RUSTFLAGS="--cfg loom" cargo test -p cram-store --lib --release loom`: all schedules, and all
/// orders of memory that the language allows.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicBool;
    use loom::sync::{Arc, Mutex};
    use loom::thread;

    /// A span with one record, an index that leads to it, and memory that is written anew when the
    /// span was freed. loom fails the test when memory is read while it is written.
    struct Model {
        life: Life,
        /// As [`super::super::spans`] has it: the record has been written.
        is_filled: AtomicBool,
        index: Mutex<bool>,
        memory: UnsafeCell<u32>,
    }

    // SAFETY: what the test is to prove; loom watches every access.
    #[allow(unsafe_code)]
    unsafe impl Sync for Model {}

    impl Model {
        fn new() -> Arc<Self> {
            let model = Self {
                life: Life::new(),
                is_filled: AtomicBool::new(true),
                index: Mutex::new(true),
                memory: UnsafeCell::new(7),
            };
            model.life.open();
            model.life.add_live(1);
            Arc::new(model)
        }

        #[allow(unsafe_code)]
        fn read(&self) -> u32 {
            // SAFETY: as above.
            self.memory.with(|memory| unsafe { *memory })
        }

        /// What `Spans::take` and `Arena::append` do with a span that is free, in their order.
        #[allow(unsafe_code)]
        fn reuse(&self, Freed(is_mine): Freed) {
            if is_mine {
                self.is_filled.store(false, Ordering::Release);
                self.life.open();
                // SAFETY: as above.
                self.memory.with_mut(|memory| unsafe { *memory = 8 });
                self.is_filled.store(true, Ordering::Release);
            }
        }

        fn kill(&self) {
            let mut index = self.index.lock().unwrap();
            *index = false;
            let freed = self.life.sub_live(1);
            drop(index);
            self.reuse(freed);
        }
    }

    fn run(reader: fn(&Model)) {
        loom::model(move || {
            let model = Model::new();
            let threads = [reader, Model::kill].map(|act| {
                let model = model.clone();
                thread::spawn(move || act(&model))
            });
            let freed = model.life.seal();
            model.reuse(freed);
            threads
                .into_iter()
                .for_each(|thread| thread.join().unwrap());
            assert_eq!(model.read(), 8, "the span was freed once in any case");
        });
    }

    /// The way of a get: the index says where, and the span is pinned before the index is let go.
    #[test]
    fn loom_what_the_index_led_to_stays_as_long_as_the_pin() {
        run(|model| {
            let index = model.index.lock().unwrap();
            if !*index {
                return;
            }
            model.life.pin();
            drop(index);
            assert_eq!(model.read(), 7);
            let freed = model.life.unpin();
            model.reuse(freed);
        });
    }

    /// The way of the table of twins: pinned at a guess. What is there may be of any life of the
    /// span, but it is written, and stays so.
    #[test]
    fn loom_what_is_written_stays_as_long_as_the_pin() {
        run(|model| {
            model.life.pin();
            if !model.life.is_free() && model.is_filled.load(Ordering::Acquire) {
                let before = model.read();
                assert_eq!(model.read(), before);
            }
            let freed = model.life.unpin();
            model.reuse(freed);
        });
    }
}
