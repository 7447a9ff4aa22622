// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A guest's socket: one front-end after the other is served there, each with workers of its own.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::client::Guest;
use crate::device::Device;
use crate::socket::BoundSocket;
use crate::stop::Stop;
use crate::vhost::channel::{Channel, End};
use crate::vhost::session::{Refusal, Session};
use crate::worker::Workers;

/// Serves one front-end after the other, until it is time to stop.
pub(crate) fn serve_guest(
    guest: &Arc<Guest>,
    socket: &BoundSocket,
    stop: &Stop,
    line: &Mutex<Option<UnixStream>>,
) {
    while let Some(front) = stop.accept(socket.listener(), || {
        socket.listener().accept().map(|(stream, _)| stream)
    }) {
        log::info!("{}: a front-end connected", guest.name);
        match front.try_clone() {
            Ok(copy) => *line.lock() = Some(copy),
            Err(error) => {
                // Without a copy it could not be hung up on when the daemon stops.
                log::warn!("{}: the front-end is not served: {error}", guest.name);
                continue;
            }
        }
        // The bell may have rung before there was a line to hang up on.
        if !stop.is_stopping() {
            // A defect of ours that shows in one connection shall not cost the guest its socket.
            let served = catch_unwind(AssertUnwindSafe(|| serve_connection(guest, &front)));
            guest.detach();
            match served {
                Ok(Ok(())) => log::info!("{}: the front-end disconnected", guest.name),
                Ok(Err(error)) => log::warn!("{}: the connection ended: {error}", guest.name),
                Err(_) => {
                    log::error!("{}: the connection ended in a panic", guest.name);
                    let _ = front.shutdown(Shutdown::Both);
                }
            }
        }
        line.lock().take();
    }
}

/// Why a connection ended, other than by the front-end's wish.
#[derive(Debug, thiserror::Error)]
enum ConnectionError {
    #[error("{0}")]
    Channel(#[from] End),
    #[error("{0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Failed(&'static str),
    #[error("{0}")]
    System(#[from] io::Error),
}

fn serve_connection(guest: &Arc<Guest>, front: &UnixStream) -> Result<(), ConnectionError> {
    let device = Arc::new(Device::new(Arc::clone(guest))?);
    let mut workers = Workers::start(&device)?;
    guest.attach(&device);
    let end = converse(&device, front, &mut workers);
    // The workers end here. Only then may the front-end see that it is over: it takes the used
    // indexes for final, and would have the next back-end execute again what is completed now.
    drop(workers);
    let _ = front.shutdown(Shutdown::Both);
    match end {
        // Whatever the front-end did about it meanwhile.
        _ if device.failure().is_some() => Err(ConnectionError::Failed(
            device.failure().unwrap_or_default(),
        )),
        ConnectionError::Channel(End::FrontEnd) => Ok(()),
        error => Err(error),
    }
}

/// Does what the front-end says, for as long as it makes sense.
fn converse(device: &Device, front: &UnixStream, workers: &mut Workers) -> ConnectionError {
    let channel = Channel::new(front, device.over());
    let mut session = Session::new(device);
    loop {
        let received = match channel.receive() {
            Ok(received) => received,
            Err(end) => return end.into(),
        };
        let (answer, verdict) = session.handle(received);
        if let Err(error) = workers.start_needed() {
            return error.into();
        }
        let answered = answer.map_or(Ok(()), |answer| channel.answer(&answer));
        // A refusal says more than that nobody wanted to hear of it.
        if let Err(refusal) = verdict {
            return refusal.into();
        }
        if let Err(end) = answered {
            return end.into();
        }
    }
}
