// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! How many descriptors the process may have, and how many guests that is enough for.

use rustix::process::{Resource, getrlimit, setrlimit};

use crate::client::Offer;

/// What the daemon itself has open: standard streams, the arena, the control socket and its
/// connections, metrics, bells.
const OWN: u64 = 64;

/// Descriptors that a connected guest takes which uses so many queues: its socket and the bell of the
/// thread that listens there, the connection twice, its end, the channel back, the regions of its
/// memory; a pair for each worker, three for each queue.
pub fn of_a_guest(queues: u64, workers: u64) -> u64 {
    const BY_ITSELF: u64 = 6;
    const REGIONS: u64 = 8;
    BY_ITSELF + REGIONS + 2 * (1 + workers) + 3 * (1 + queues)
}

/// Raises the number of descriptors as far as it may be raised.
pub fn raise_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        log::warn!("cannot raise the number of open files: {error}");
    }
}

/// Says how many guests fit.
pub fn report(offer: &Offer, guests: usize) {
    let Some(most) = getrlimit(Resource::Nofile).current else {
        return;
    };
    let processors = crate::device::processors() as u64;
    let queues = processors.min(offer.request_queues.into());
    let workers = queues.min(offer.groups() as u64);
    let each = of_a_guest(queues, workers);
    let fit = most.saturating_sub(OWN) / each;
    log::info!(
        "{most} descriptors: room for {fit} guests of {queues} queues, which take up to {each} each"
    );
    if (guests as u64) > fit {
        log::warn!(
            "{guests} guests may need more; raise the limit on open files (LimitNOFILE= of the \
             service, or ulimit -n)"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_is_raised_to_what_is_allowed() {
        raise_descriptors();
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
    }
}
