// SPDX-License-Identifier: GPL-2.0

//! The frontswap interface (include/linux/frontswap.h), wrapped.

use core::ptr::NonNull;
use kernel::{
    bindings,
    error::to_result,
    prelude::*,
    sync::Arc, //
};

/// Most pages in a batch.
pub(crate) const BATCH_PAGES: usize = bindings::FRONTSWAP_BATCH_PAGES as usize;
/// Most segments in a batch.
pub(crate) const BATCH_SEGMENTS: usize = bindings::SWAP_CLUSTER_MAX as usize;
/// log2 of the slots in a region. A batch never leaves its region.
pub(crate) const REGION_SHIFT: u32 = bindings::FRONTSWAP_REGION_SHIFT;
/// Swap types are below this.
pub(crate) const MAX_TYPES: usize = 32;

/// What a backend does for frontswap. See `struct frontswap_ops` for the rules.
pub(crate) trait Backend: Send + Sync + 'static {
    /// A swap device of `slots` slots appears.
    fn init(self: &Arc<Self>, swap_type: u32, slots: usize) -> Result;
    /// A swap device is gone, and every page stored for it.
    fn exit(self: &Arc<Self>, swap_type: u32);
    /// Takes the pages. `Err` gives the token back and refuses them all.
    fn store(self: &Arc<Self>, batch: &Batch<'_>, token: Token) -> Result<(), Token>;
    /// Brings the pages back. `Err` gives the token back and fails them all.
    fn load(self: &Arc<Self>, batch: &Batch<'_>, token: Token) -> Result<(), Token>;
    /// Forgets slots. Atomic context.
    fn invalidate(self: &Arc<Self>, swap_type: u32, offset: usize, nr: usize);
}

/// Pages to store or to load.
pub(crate) struct Batch<'a>(&'a bindings::frontswap_batch);

/// Neighbouring pages of a batch.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    /// The first page. The pages stay where they are until the batch's token is done.
    pub(crate) page: *mut bindings::page,
    /// The first slot.
    pub(crate) offset: u32,
    /// Number of pages.
    pub(crate) pages: usize,
}

impl Batch<'_> {
    /// The swap device.
    pub(crate) fn swap_type(&self) -> u32 {
        self.0.type_
    }

    /// Pages in all segments together, at most [`BATCH_PAGES`].
    pub(crate) fn pages(&self) -> usize {
        self.0.nr_pages as usize
    }

    /// Is nobody else held up when the batch waits before it gets under way?
    pub(crate) fn may_wait(&self) -> bool {
        self.0.may_wait
    }

    /// Writes to each page, so that it is this guest's virtual machine to which the host charges the
    /// memory, and not the device, whose part in it is limited (docs/protocol.md, section 6.1). To be
    /// called for batches that are loaded: what is in their pages is about to be replaced.
    pub(crate) fn touch(&self) {
        for segment in self.segments() {
            for nr in 0..segment.pages {
                // SAFETY: The pages of a segment are neighbours, and the batch's until its token is
                // done.
                let address = unsafe { bindings::kmap_local_page(segment.page.add(nr)) };
                // SAFETY: A mapped page is that long, and nobody reads it before it was loaded.
                unsafe { address.cast::<u64>().write_volatile(0) };
                // SAFETY: It was mapped above, and is the last that was.
                unsafe { bindings::kunmap_local(address) };
            }
        }
    }

    /// The segments, at most [`BATCH_SEGMENTS`].
    pub(crate) fn segments(&self) -> impl Iterator<Item = Segment> + '_ {
        let nr = self.0.nr_segments as usize;
        self.0.segment.iter().take(nr).map(|segment| Segment {
            page: segment.page,
            offset: segment.offset,
            pages: segment.nr as usize,
        })
    }
}

/// The duty to say how a batch ended. A token that is dropped says that all of it failed.
pub(crate) struct Token {
    sio: NonNull<bindings::swap_iocb>,
    first: u32,
    segments: u32,
}

// SAFETY: A batch may be finished from any context.
unsafe impl Send for Token {}

impl Token {
    /// Ends the batch. Bit n of `failed` is set when the n-th segment failed. Any context.
    pub(crate) fn done(self, failed: usize) {
        self.finish(failed);
        core::mem::forget(self);
    }

    /// Has a load handed over once more, with all the time that it may need. Any context.
    pub(crate) fn again(self) {
        // SAFETY: As for `finish`; this ends the batch, too.
        unsafe { bindings::frontswap_again(self.sio.as_ptr(), self.first, self.segments) };
        core::mem::forget(self);
    }

    /// Ends a load for those who wait for it, with an error. The batch goes on until it is done.
    ///
    /// Any context. Whoever ends the batch cannot do so meanwhile, since it takes the token.
    pub(crate) fn give_up(&self) {
        // SAFETY: As for `finish`; the batch has not ended.
        unsafe { bindings::frontswap_give_up(self.sio.as_ptr()) };
    }

    fn finish(&self, failed: usize) {
        // SAFETY: A token is made once for each batch that frontswap waits for, and ends once.
        unsafe { bindings::frontswap_done(self.sio.as_ptr(), self.first, failed) };
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        self.finish(usize::MAX >> (usize::BITS as usize - BATCH_SEGMENTS) >> self.first);
    }
}

/// A registered backend. Dropping it brings every page back to the swap devices first.
pub(crate) struct Registration<T: Backend> {
    ops: KBox<bindings::frontswap_ops>,
    _backend: KBox<Arc<T>>,
}

// SAFETY: The operations are constant while they are registered.
unsafe impl<T: Backend> Send for Registration<T> {}
// SAFETY: As above.
unsafe impl<T: Backend> Sync for Registration<T> {}

impl<T: Backend> Registration<T> {
    /// Registers `backend`. Fails with `EBUSY` when there is one already.
    pub(crate) fn new(backend: Arc<T>) -> Result<Self> {
        let backend = KBox::new(backend, GFP_KERNEL)?;
        let ops = KBox::new(
            bindings::frontswap_ops {
                private: core::ptr::from_ref::<Arc<T>>(&*backend).cast_mut().cast(),
                init: Some(Self::init),
                exit: Some(Self::exit),
                store: Some(Self::store),
                load: Some(Self::load),
                invalidate: Some(Self::invalidate),
            },
            GFP_KERNEL,
        )?;
        // SAFETY: `ops` and the backend live until `drop` has unregistered them.
        to_result(unsafe { bindings::frontswap_register(&*ops) })?;
        Ok(Self {
            ops,
            _backend: backend,
        })
    }

    /// # Safety
    ///
    /// `private` is what `new` put into the operations, and still registered.
    unsafe fn backend<'a>(private: *mut c_void) -> &'a Arc<T> {
        // SAFETY: `private` points to the box that the registration holds.
        unsafe { &*private.cast::<Arc<T>>() }
    }

    /// # Safety
    ///
    /// `batch` is what frontswap passed.
    unsafe fn token(batch: *const bindings::frontswap_batch) -> Token {
        // SAFETY: frontswap passes a valid batch.
        let batch = unsafe { &*batch };
        Token {
            // SAFETY: frontswap never passes a batch without an I/O.
            sio: unsafe { NonNull::new_unchecked(batch.sio) },
            first: batch.first,
            segments: batch.nr_segments,
        }
    }

    fn answer(result: Result<(), Token>) -> i32 {
        match result {
            Ok(()) => 0,
            Err(token) => {
                // frontswap ends the batch by itself when it is told so at once.
                core::mem::forget(token);
                EBUSY.to_errno()
            }
        }
    }

    extern "C" fn init(private: *mut c_void, swap_type: u32, slots: usize) -> i32 {
        // SAFETY: frontswap passes what was registered.
        match unsafe { Self::backend(private) }.init(swap_type, slots) {
            Ok(()) => 0,
            Err(error) => error.to_errno(),
        }
    }

    extern "C" fn exit(private: *mut c_void, swap_type: u32) {
        // SAFETY: frontswap passes what was registered.
        unsafe { Self::backend(private) }.exit(swap_type);
    }

    extern "C" fn store(private: *mut c_void, batch: *const bindings::frontswap_batch) -> i32 {
        // SAFETY: frontswap passes what was registered.
        let backend = unsafe { Self::backend(private) };
        // SAFETY: frontswap passes a batch that is valid during the call.
        let (view, token) = unsafe { (Batch(&*batch), Self::token(batch)) };
        Self::answer(backend.store(&view, token))
    }

    extern "C" fn load(private: *mut c_void, batch: *const bindings::frontswap_batch) -> i32 {
        // SAFETY: frontswap passes what was registered.
        let backend = unsafe { Self::backend(private) };
        // SAFETY: frontswap passes a batch that is valid during the call.
        let (view, token) = unsafe { (Batch(&*batch), Self::token(batch)) };
        Self::answer(backend.load(&view, token))
    }

    extern "C" fn invalidate(private: *mut c_void, swap_type: u32, offset: usize, nr: u32) {
        // SAFETY: frontswap passes what was registered.
        unsafe { Self::backend(private) }.invalidate(swap_type, offset, nr as usize);
    }
}

impl<T: Backend> Drop for Registration<T> {
    fn drop(&mut self) {
        // SAFETY: `new` registered these operations. Afterwards nobody calls them.
        unsafe { bindings::frontswap_unregister(&*self.ops) };
    }
}
