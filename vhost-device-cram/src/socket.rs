// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Unix sockets: made so that what is wrong can be said in one line, and removed afterwards.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// The longest path of a socket that Linux takes.
const PATH_MAX: usize = 107;

/// Why a socket cannot be listened on. The text says what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody listens there.
    #[error(
        "socket {0}: another process is listening on it; stop that one, or choose another path"
    )]
    Busy(PathBuf),
    /// Something else has that name.
    #[error(
        "socket {0}: a file that is not a socket has this name; remove it, or choose another path"
    )]
    NotASocket(PathBuf),
    /// The directory does not exist.
    #[error("socket {path}: there is no directory {directory}; create it first")]
    NoDirectory {
        /// The socket.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// The directory may not be written to.
    #[error(
        "socket {path}: no permission to create it in {directory}; choose a directory that you may write to"
    )]
    NoPermission {
        /// The socket.
        path: PathBuf,
        /// Its directory.
        directory: PathBuf,
    },
    /// The path does not fit into a socket address.
    #[error("socket {0}: the path is longer than {PATH_MAX} bytes; choose a shorter one")]
    TooLong(PathBuf),
    /// Anything else.
    #[error("socket {path}: {error}")]
    Other {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// A listening socket whose file goes when it goes, unless somebody put another one there.
#[derive(Debug)]
pub struct BoundSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode of the file.
    identity: Option<(u64, u64)>,
}

impl BoundSocket {
    /// Listens on `path`. The socket file of a process that is gone is replaced. With
    /// `private`, nobody but this user may connect, from the first moment on.
    pub fn listen(path: &Path, private: bool) -> Result<Self, SocketError> {
        if path.as_os_str().len() > PATH_MAX {
            return Err(SocketError::TooLong(path.to_owned()));
        }
        remove_stale(path)?;
        let listener = bind(path, private).map_err(|error| explain(path, error))?;
        let identity = fs::symlink_metadata(path)
            .ok()
            .map(|data| (data.dev(), data.ino()));
        Ok(BoundSocket {
            listener,
            path: path.to_owned(),
            identity,
        })
    }

    /// The listener.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for BoundSocket {
    fn drop(&mut self) {
        let now = fs::symlink_metadata(&self.path)
            .ok()
            .map(|data| (data.dev(), data.ino()));
        if now.is_some() && now == self.identity {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// The directory that a path's last part is in.
pub(crate) fn directory_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent.to_owned(),
        _ => PathBuf::from("."),
    }
}

fn explain(path: &Path, error: io::Error) -> SocketError {
    let path = path.to_owned();
    let directory = directory_of(&path);
    match error.kind() {
        io::ErrorKind::AddrInUse => SocketError::Busy(path),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory if !directory.is_dir() => {
            SocketError::NoDirectory { path, directory }
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            SocketError::NoPermission { path, directory }
        }
        _ => SocketError::Other { path, error },
    }
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let data = match fs::symlink_metadata(path) {
        Ok(data) => data,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(explain(path, error)),
    };
    if !data.file_type().is_socket() {
        return Err(SocketError::NotASocket(path.to_owned()));
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(SocketError::Busy(path.to_owned())),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            log::info!(
                "removing the socket {} of a process that is gone",
                path.display()
            );
            fs::remove_file(path).map_err(|error| explain(path, error))
        }
        Err(error) => Err(explain(path, error)),
    }
}

fn bind(path: &Path, private: bool) -> io::Result<UnixListener> {
    const BACKLOG: i32 = 16;
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    if private {
        // On Linux the mode of the socket is what its file gets: there is no moment at which
        // others could connect.
        rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(UnixListener::from(socket))
}
