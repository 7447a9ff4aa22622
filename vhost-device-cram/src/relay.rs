// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Between a front-end and vhost-user-backend: passes messages on, and learns one thing.
//!
//! The front-end hands over a channel on which the back-end may send requests of its own. The
//! `vhost` crate takes that channel and has no call for the request that we need, the change
//! of the configuration space. So every message passes here first, whole and bounded, and a
//! copy of that channel is kept. Rings and pages do not come this way. When the crate learns
//! to send the message, this file can go.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

const HEADER_SIZE: usize = 12;
/// Longest body that vhost-user knows.
const BODY_MAX: usize = 4096;
/// Most descriptors that come with a message.
const FDS_MAX: usize = 32;
const SET_BACKEND_REQ_FD: u32 = 21;

/// Why a relay ended.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The front-end closed the connection, between two messages.
    #[error("the front-end disconnected")]
    FrontEnd,
    /// The back-end closed its end: it rejected a message.
    #[error("a message was rejected")]
    BackEnd,
    /// A message is longer than any that vhost-user knows.
    #[error("message {request} announces {size} bytes")]
    TooLong {
        /// The message's code.
        request: u32,
        /// What it announces.
        size: u32,
    },
    /// The connection broke, or ended within a message.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
}

/// Passes messages between the two ends until one of them closes.
pub fn run(
    front: &UnixStream,
    back: &UnixStream,
    mut on_backend_channel: impl FnMut(OwnedFd),
) -> End {
    let mut buffer = [0u8; HEADER_SIZE + BODY_MAX];
    loop {
        let mut fds = [
            PollFd::new(front, PollFlags::IN),
            PollFd::new(back, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return End::Broken(error.into()),
        }
        let [from_front, from_back] = fds.map(|fd| !fd.revents().is_empty());
        let step = if from_back {
            // First, so that a reply reaches a front-end that is about to leave.
            pass_reply(back, front, &mut buffer)
        } else if from_front {
            pass_message(front, back, &mut buffer, &mut on_backend_channel)
        } else {
            Ok(())
        };
        if let Err(end) = step {
            return end;
        }
    }
}

fn pass_reply(back: &UnixStream, front: &UnixStream, buffer: &mut [u8]) -> Result<(), End> {
    // No feature is offered whose replies carry descriptors.
    let (mut back, mut front) = (back, front);
    let n = back.read(buffer)?;
    if n == 0 {
        return Err(End::BackEnd);
    }
    front.write_all(buffer.get(..n).unwrap_or_default())?;
    Ok(())
}

fn pass_message(
    front: &UnixStream,
    back: &UnixStream,
    buffer: &mut [u8; HEADER_SIZE + BODY_MAX],
    on_backend_channel: &mut impl FnMut(OwnedFd),
) -> Result<(), End> {
    let (header, body) = buffer.split_at_mut(HEADER_SIZE);
    let (n, fds) = receive(front, header)?;
    if n == 0 {
        return Err(End::FrontEnd);
    }
    let mut reader = front;
    reader.read_exact(header.get_mut(n..).unwrap_or_default())?;
    let word = |k: usize| {
        header
            .as_chunks::<4>()
            .0
            .get(k)
            .map_or(0, |bytes| u32::from_le_bytes(*bytes))
    };
    let (request, size) = (word(0), word(2));
    let body = usize::try_from(size)
        .ok()
        .and_then(|size| body.get_mut(..size));
    let Some(body) = body else {
        return Err(End::TooLong { request, size });
    };
    reader.read_exact(body)?;

    if request == SET_BACKEND_REQ_FD
        && let [channel] = fds.as_slice()
    {
        on_backend_channel(channel.try_clone()?);
    }
    send(back, header, body, &fds)?;
    Ok(())
}

/// Receives what fits into `into`, and the descriptors that came with it.
fn receive(stream: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(into)];
    let received = loop {
        match recvmsg(stream, &mut iov, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    Ok((received.bytes, fds))
}

fn send(stream: &UnixStream, header: &[u8], body: &[u8], fds: &[OwnedFd]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let borrowed: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many descriptors in a message"));
    }
    let iov = [IoSlice::new(header), IoSlice::new(body)];
    let sent = loop {
        match sendmsg(stream, &iov, &mut control, SendFlags::NOSIGNAL) {
            Err(rustix::io::Errno::INTR) => {}
            other => break other?,
        }
    };
    // A blocking stream takes all of so little, or is broken.
    if sent == header.len() + body.len() {
        Ok(())
    } else {
        Err(io::ErrorKind::WriteZero.into())
    }
}
