// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! A front-end that says whatever it is told to, message by message.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::PATIENCE;

/// The flag that asks for an answer.
const NEED_REPLY: u32 = 1 << 3;
const VERSION: u32 = 1;
const GET_FEATURES: u32 = 1;
const SET_FEATURES: u32 = 2;
const GET_PROTOCOL_FEATURES: u32 = 15;
const SET_PROTOCOL_FEATURES: u32 = 16;

/// The front-end's end of a socket.
pub struct RawFrontend {
    stream: UnixStream,
}

impl RawFrontend {
    /// Connects, and says nothing.
    ///
    /// # Errors
    ///
    /// When nobody listens.
    pub fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// On a connection that somebody else made.
    ///
    /// # Errors
    ///
    /// When it is broken.
    pub fn on(stream: UnixStream) -> Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// Connects, and negotiates all protocol features, and these virtio features if there are any.
    ///
    /// # Errors
    ///
    /// When the daemon refuses.
    pub fn negotiate(socket: &Path, features: Option<u64>) -> Result<Self> {
        let mut raw = Self::connect(socket)?;
        raw.ask(GET_FEATURES, &[])?;
        let protocol = raw.ask(GET_PROTOCOL_FEATURES, &[])?;
        raw.send(SET_PROTOCOL_FEATURES, &protocol, &[])?;
        if let Some(features) = features {
            ensure!(raw.set(SET_FEATURES, &features.to_le_bytes(), &[])?);
        }
        Ok(raw)
    }

    /// The socket itself.
    #[must_use]
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    fn put(&self, code: u32, flags: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        let header = [code, flags, u32::try_from(body.len())?].map(u32::to_le_bytes);
        let bytes = [header.as_flattened(), body].concat();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        ensure!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(fds)));
        let iov = [IoSlice::new(&bytes)];
        let sent = sendmsg(&self.stream, &iov, &mut control, SendFlags::NOSIGNAL)?;
        ensure!(sent == bytes.len(), "the message was cut");
        Ok(())
    }

    /// Sends a message that wants no answer.
    ///
    /// # Errors
    ///
    /// When it cannot be sent.
    pub fn send(&mut self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<()> {
        self.put(code, VERSION, body, fds)
    }

    /// Sends a message that has an answer of its own; the answer's body.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn ask(&mut self, code: u32, body: &[u8]) -> Result<Vec<u8>> {
        self.send(code, body, &[])?;
        self.answer(code)
    }

    /// Sends a message and asks whether it was taken.
    ///
    /// # Errors
    ///
    /// When there is no answer.
    pub fn set(&mut self, code: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> Result<bool> {
        self.put(code, VERSION | NEED_REPLY, body, fds)?;
        Ok(self.answer(code)?.iter().all(|byte| *byte == 0))
    }

    fn answer(&mut self, code: u32) -> Result<Vec<u8>> {
        let mut header = [0; 12];
        self.stream.read_exact(&mut header)?;
        let words = header.as_chunks::<4>().0;
        let word = |k: usize| words.get(k).map(|bytes| u32::from_le_bytes(*bytes));
        ensure!(word(0) == Some(code), "another answer: {header:?}");
        let mut body = vec![0; usize::try_from(word(2).context("no length")?)?];
        self.stream.read_exact(&mut body)?;
        Ok(body)
    }

    /// Whether the daemon hangs up, whatever else it still sends.
    ///
    /// # Errors
    ///
    /// When it does not within the usual time.
    pub fn wait_hang_up(&mut self) -> Result<()> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => Ok(()),
            Err(error) => Err(error).context("the daemon does not hang up"),
        }
    }
}
