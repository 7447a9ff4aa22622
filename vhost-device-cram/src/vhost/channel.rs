// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front-end's socket: messages and descriptors come in, answers go out.
//!
//! Whoever waits here waits for the connection's end, too; and a front-end that does not take its
//! answers is hung up on.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};

use super::message::{BODY_MAX, FDS_MAX, HEADER_BYTES, Header, Malformed, Message};

/// How long an answer may wait for room in the socket.
const ANSWER_MAX: Duration = Duration::from_secs(5);

/// Why there are no more messages.
#[derive(Debug, thiserror::Error)]
pub enum End {
    /// The front-end closed the connection, between two messages.
    #[error("the front-end disconnected")]
    FrontEnd,
    /// This side wants no more.
    #[error("it is over")]
    Over,
    /// What came is no message.
    #[error("{0}")]
    Malformed(#[from] Malformed),
    /// There were more descriptors with a message than any message has.
    #[error("too many descriptors came with a message")]
    TooManyFds,
    /// The front-end does not read.
    #[error("the front-end takes no answers")]
    Stuck,
    /// The connection broke, or ended within a message.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
}

/// A message that came.
#[derive(Debug)]
pub struct Received {
    /// What came first.
    pub header: Header,
    /// The message.
    pub message: Message,
    /// What came with it.
    pub fds: Vec<OwnedFd>,
}

/// A front-end's socket.
pub struct Channel<'a> {
    stream: &'a UnixStream,
    /// Becomes readable when it is over.
    over: BorrowedFd<'a>,
}

impl<'a> Channel<'a> {
    /// A channel that ends when `over` is readable.
    pub fn new(stream: &'a UnixStream, over: BorrowedFd<'a>) -> Self {
        Channel { stream, over }
    }

    /// Waits for a message, and reads it.
    ///
    /// # Errors
    /// When there will be none.
    pub fn receive(&self) -> Result<Received, End> {
        let mut header = [0; HEADER_BYTES];
        let mut fds = Vec::new();
        if self.read(&mut header, &mut fds)? == 0 {
            return Err(End::FrontEnd);
        }
        let header = Header::read(&header)?;
        let mut body = [0; BODY_MAX];
        let body = body.get_mut(..header.body).unwrap_or_default();
        if !body.is_empty() && self.read(body, &mut fds)? == 0 {
            return Err(End::Broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let message = Message::read(header.code, body)?;
        Ok(Received {
            header,
            message,
            fds,
        })
    }

    /// Fills `into`; 0 when the front-end has gone before the first byte.
    fn read(&self, into: &mut [u8], fds: &mut Vec<OwnedFd>) -> Result<usize, End> {
        let mut filled = 0;
        while filled < into.len() {
            self.wait(PollFlags::IN, None)?;
            let rest = into.get_mut(filled..).unwrap_or_default();
            match receive(self.stream, rest, fds) {
                Ok(0) if filled == 0 => return Ok(0),
                Ok(0) => return Err(End::Broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => filled += n,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(Errno::TOOBIG) => return Err(End::TooManyFds),
                Err(error) => return Err(End::Broken(error.into())),
            }
        }
        Ok(filled)
    }

    /// Sends an answer.
    ///
    /// # Errors
    /// When the front-end does not take it in time.
    pub fn answer(&self, bytes: &[u8]) -> Result<(), End> {
        let until = Instant::now() + ANSWER_MAX;
        let mut left = bytes;
        while !left.is_empty() {
            match send(self.stream, left, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(n) => left = left.get(n..).unwrap_or_default(),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT, Some(until))?,
                Err(error) => return Err(End::Broken(error.into())),
            }
        }
        Ok(())
    }

    /// Waits until something can be done with the socket.
    fn wait(&self, what: PollFlags, until: Option<Instant>) -> Result<(), End> {
        loop {
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Err(End::Stuck);
            }
            let left = left.and_then(|left| Timespec::try_from(left).ok());
            let mut fds = [
                PollFd::new(self.stream, what),
                PollFd::from_borrowed_fd(self.over, PollFlags::IN),
            ];
            match poll(&mut fds, left.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(End::Broken(error.into())),
            }
            let [is_ready, is_over] = fds.map(|fd| !fd.revents().is_empty());
            if is_over {
                return Err(End::Over);
            }
            if is_ready {
                return Ok(());
            }
        }
    }
}

/// Receives what is there, and the descriptors that came with it.
fn receive(
    stream: impl AsFd,
    into: &mut [u8],
    fds: &mut Vec<OwnedFd>,
) -> rustix::io::Result<usize> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut iov = [IoSliceMut::new(into)];
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let received = recvmsg(stream, &mut iov, &mut control, flags)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.flags.contains(ReturnFlags::CTRUNC) || fds.len() > FDS_MAX {
        return Err(Errno::TOOBIG);
    }
    Ok(received.bytes)
}
