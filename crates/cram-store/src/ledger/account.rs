// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Accounts: who is billed for what, and what they may hold.
//!
//! A client has one. So has a shared pool, whose own structures no single
//! client should pay for, and a sharing group, for the images that its clients
//! have in common. An account has a number, under which the arena knows it.

use std::sync::Arc;

use crate::ledger::stats::Tally;
use crate::log::queue::{Queue, SharedCursor};
use crate::machine::budget::{Budget, Shortage, add_within};
use crate::machine::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use crate::machine::sync::{Mutex, RwLock};
use crate::spec::settings::{ClientSettings, DEFAULT_WEIGHT};

/// Stands for "no quota" where a quota is kept as a number.
pub(crate) const NO_QUOTA: u64 = u64::MAX;

/// What an account is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Holder {
    Client = 1,
    SharedPool = 2,
    SharingGroup = 3,
    /// A client that was removed while pages of it were in shared pools.
    Gone = 4,
}

/// See the module's text.
///
/// Invariant: `used_bytes <= quota_bytes`, except after the quota was lowered beneath what
/// persistent pages take.
pub(crate) struct Account {
    pub(crate) number: u16,
    pub(crate) holder: Holder,
    pub(crate) name: String,
    quota_bytes: AtomicU64,
    used_bytes: AtomicU64,
    used_bytes_max: AtomicU64,
    /// What its ephemeral pages are billed, in bytes; part of `used_bytes`.
    pub(crate) evictable_bytes: AtomicU64,
    /// What the images of its domain are billed, in bytes; part of `used_bytes`.
    pub(crate) image_bytes: AtomicU64,
    weight: AtomicU32,
    is_frozen: AtomicBool,
    /// No client has it any more. It is forgotten when its last page is gone.
    pub(crate) is_closed: AtomicBool,
    /// Events in shared pools, images, and all that happened in pools that are gone.
    pub(crate) tally: Tally,
    /// Its ephemeral pages, the oldest first.
    pub(crate) queue: Queue,
    pub(crate) shared_cursor: Mutex<SharedCursor>,
}

impl Account {
    pub(crate) fn new(
        number: u16,
        holder: Holder,
        name: &str,
        quota_bytes: Option<u64>,
        stripes: usize,
    ) -> Self {
        Self {
            number,
            holder,
            name: name.to_owned(),
            quota_bytes: AtomicU64::new(quota_bytes.unwrap_or(NO_QUOTA)),
            used_bytes: AtomicU64::new(0),
            used_bytes_max: AtomicU64::new(0),
            evictable_bytes: AtomicU64::new(0),
            image_bytes: AtomicU64::new(0),
            weight: AtomicU32::new(DEFAULT_WEIGHT),
            is_frozen: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            tally: Tally::new(stripes),
            queue: Queue::new(number),
            shared_cursor: Mutex::default(),
        }
    }

    /// Bytes of the structure, and of all that a client may have beside it, to be charged to the
    /// store and billed to the account.
    pub(crate) fn fixed_bytes(name: &str, stripes: usize) -> u64 {
        (size_of::<Self>() + Tally::bytes(stripes) + 2 * name.len() + 2048) as u64
    }

    /// At recovery: what was set for it.
    pub(crate) fn restore(&self, settings: &ClientSettings) {
        self.set_quota(settings.quota_bytes);
        self.set_weight(settings.weight);
        self.set_frozen(settings.is_frozen);
    }

    pub(crate) fn quota_bytes(&self) -> u64 {
        self.quota_bytes.load(Relaxed)
    }

    pub(crate) fn set_quota(&self, quota_bytes: Option<u64>) {
        self.quota_bytes
            .store(quota_bytes.unwrap_or(NO_QUOTA), Relaxed);
    }

    pub(crate) fn weight(&self) -> u32 {
        self.weight.load(Relaxed)
    }

    pub(crate) fn set_weight(&self, weight: u32) {
        self.weight.store(weight, Relaxed);
    }

    pub(crate) fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Relaxed)
    }

    pub(crate) fn used_bytes_max(&self) -> u64 {
        self.used_bytes_max.load(Relaxed)
    }

    pub(crate) fn is_over_quota(&self) -> bool {
        self.used_bytes() > self.quota_bytes()
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.is_frozen.load(Relaxed)
    }

    pub(crate) fn set_frozen(&self, is_frozen: bool) {
        self.is_frozen.store(is_frozen, Relaxed);
    }

    /// What it uses and could not be made to give up by eviction, in bytes.
    pub(crate) fn committed_bytes(&self) -> u64 {
        self.used_bytes()
            .saturating_sub(self.evictable_bytes.load(Relaxed))
    }

    /// Bills bytes to the account, or says that its quota does not allow them.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), Shortage> {
        let used =
            add_within(&self.used_bytes, bytes, self.quota_bytes()).ok_or(Shortage::Quota)?;
        self.note_used(used);
        Ok(())
    }

    /// Bills bytes whatever the quota says: for what is there already.
    pub(crate) fn reserve_anyway(&self, bytes: u64) {
        let used = self.used_bytes.fetch_add(bytes, Relaxed) + bytes;
        self.note_used(used);
    }

    fn note_used(&self, used: u64) {
        // Most of the time a look is enough, and cheaper.
        if used > self.used_bytes_max.load(Relaxed) {
            self.used_bytes_max.fetch_max(used, Relaxed);
        }
    }

    /// Takes bytes off the bill.
    pub(crate) fn release(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Relaxed);
    }
}

/// Who pays for a space's tables: the store with bytes of its budget, an account with its quota. So
/// what an account is billed is what is there, and neither limit is passed even for a moment.
#[derive(Clone, Copy)]
pub(crate) struct Purse<'a> {
    pub(crate) budget: &'a Budget,
    pub(crate) payer: &'a Account,
}

impl Purse<'_> {
    /// Both, or neither.
    pub(crate) fn reserve(&self, bytes: u64) -> Result<(), Shortage> {
        self.reserve_beside(bytes, 0)
    }

    /// For something that will take the place of `old` bytes, which stay reserved until
    /// [`Self::release_replaced`]. The account is billed only what it will be larger.
    pub(crate) fn reserve_beside(&self, new: u64, old: u64) -> Result<(), Shortage> {
        let more = new.saturating_sub(old);
        self.payer.reserve(more)?;
        self.budget
            .reserve(new)
            .inspect_err(|_| self.payer.release(more))
    }

    /// Nothing came of [`Self::reserve_beside`].
    pub(crate) fn cancel(&self, new: u64, old: u64) {
        self.budget.release(new);
        self.payer.release(new.saturating_sub(old));
    }

    /// What was replaced is freed, and what is there instead takes `made` bytes of the `new` ones.
    pub(crate) fn release_replaced(&self, new: u64, old: u64, made: u64) {
        self.budget.release(new + old - made);
        let billed = old + new.saturating_sub(old);
        self.payer.release(billed - made);
    }

    pub(crate) fn release(&self, bytes: u64) {
        self.budget.release(bytes);
        self.payer.release(bytes);
    }
}

/// All accounts, by number.
pub(crate) struct Accounts {
    by_number: RwLock<Vec<Option<Arc<Account>>>>,
}

impl Accounts {
    pub(crate) fn new() -> Self {
        Self {
            by_number: RwLock::default(),
        }
    }

    pub(crate) fn get(&self, number: u16) -> Option<Arc<Account>> {
        self.by_number.read().get(usize::from(number))?.clone()
    }

    /// Calls `act` with an account, without counting a reference.
    pub(crate) fn with<T>(&self, number: u16, act: impl FnOnce(&Account) -> T) -> Option<T> {
        self.by_number
            .read()
            .get(usize::from(number))?
            .as_deref()
            .map(act)
    }

    /// The first thing that `look` finds at an account of this number or a greater one.
    pub(crate) fn find_from<T>(
        &self,
        number: u16,
        look: impl FnMut(&Account) -> Option<T>,
    ) -> Option<T> {
        let by_number = self.by_number.read();
        let rest = by_number.iter().skip(number.into()).flatten();
        rest.map(|account| &**account).find_map(look)
    }

    pub(crate) fn all(&self) -> Vec<Arc<Account>> {
        self.by_number.read().iter().flatten().cloned().collect()
    }

    /// The sum over all of them.
    pub(crate) fn sum(&self, of: impl Fn(&Account) -> u64) -> u64 {
        let by_number = self.by_number.read();
        by_number.iter().flatten().map(|account| of(account)).sum()
    }

    /// Makes an account under the lowest number that is free; `None` when there is none, or `make`
    /// makes none.
    pub(crate) fn add(
        &self,
        make: impl FnOnce(u16) -> Option<Arc<Account>>,
    ) -> Option<Arc<Account>> {
        let mut by_number = self.by_number.write();
        let at = by_number
            .iter()
            .position(Option::is_none)
            .unwrap_or(by_number.len());
        let account = make(u16::try_from(at).ok()?)?;
        match by_number.get_mut(at) {
            Some(entry) => *entry = Some(account.clone()),
            None => by_number.push(Some(account.clone())),
        }
        Some(account)
    }

    /// At recovery: enters an account under its number. False when the number is taken.
    pub(crate) fn adopt(&self, account: Arc<Account>) -> bool {
        let mut by_number = self.by_number.write();
        let at = usize::from(account.number);
        if by_number.len() <= at {
            by_number.resize(at + 1, None);
        }
        match by_number.get_mut(at) {
            Some(entry @ None) => {
                *entry = Some(account);
                true
            }
            _ => false,
        }
    }

    pub(crate) fn remove(&self, number: u16) {
        let mut by_number = self.by_number.write();
        if let Some(entry) = by_number.get_mut(usize::from(number)) {
            *entry = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_quota_is_exact_and_numbers_are_used_again() {
        let accounts = Accounts::new();
        let add = |name: &str| {
            accounts.add(|number| {
                let account = Account::new(number, Holder::Client, name, Some(1000), 1);
                Some(Arc::new(account))
            })
        };
        let (first, second) = (add("a").unwrap(), add("b").unwrap());
        assert_eq!((first.number, second.number), (0, 1));
        assert_eq!(first.reserve(1001), Err(Shortage::Quota));
        assert_eq!(first.reserve(1000), Ok(()));
        assert_eq!(first.reserve(1), Err(Shortage::Quota));
        first.reserve_anyway(5);
        assert!(first.is_over_quota());
        first.release(1005);
        assert_eq!((first.used_bytes(), first.used_bytes_max()), (0, 1005));
        accounts.remove(0);
        assert_eq!(add("c").unwrap().number, 0);
        assert!(!accounts.adopt(second));
        assert_eq!(
            accounts.with(1, |account| account.name.clone()),
            Some("b".into())
        );
    }
}
