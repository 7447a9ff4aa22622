// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Unix sockets: made so that what is wrong can be said in one line, and removed afterwards.

use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
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
    /// A socket is there, and a confined process, which connects to nothing, cannot ask whose it is.
    #[error(
        "socket {0}: there is one already, and a running daemon does not ask whose it is; remove it if \
         nobody listens on it, or choose another path"
    )]
    Unknown(PathBuf),
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
    /// It cannot be given to these.
    #[error(
        "socket {path}: cannot set its mode and group: {error}; a user can give a socket to groups \
         that he is in"
    )]
    Permissions {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
    /// Anything else.
    #[error("socket {path}: {error}")]
    Other {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        error: io::Error,
    },
}

/// Who may connect to a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// The bits of its mode.
    pub mode: u32,
    /// Its group, by number; that of the process when not given.
    pub group: Option<u32>,
}

impl Permissions {
    /// Nobody but this user (and root).
    pub const PRIVATE: Self = Permissions {
        mode: 0o600,
        group: None,
    };
}

/// The number of a group: a name of /etc/group, or a number.
///
/// # Errors
/// When there is none.
pub fn group(text: &str) -> Result<u32, String> {
    const GROUPS: &str = "/etc/group";
    if let Ok(number) = text.parse() {
        return Ok(number);
    }
    let groups = fs::read_to_string(GROUPS).unwrap_or_default();
    let mut numbers = groups.lines().filter_map(|line| {
        let mut words = line.split(':');
        let is_it = words.next() == Some(text);
        is_it.then(|| words.nth(1)?.parse().ok())?
    });
    numbers
        .next()
        .ok_or_else(|| format!("there is no group \"{text}\" in {GROUPS}; write its number"))
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
    /// Listens on `path`. The socket file of a process that is gone is replaced. With permissions,
    /// nobody else can connect, from the first moment on; without, the umask says who can.
    ///
    /// # Errors
    /// What is in the way; nothing is left behind then.
    pub fn listen(path: &Path, permissions: Option<&Permissions>) -> Result<Self, SocketError> {
        check_length(path)?;
        remove_stale(path)?;
        Self::bind(path, permissions)
    }

    /// As [`Self::listen`], where nothing has that name yet: all that a confined process can do.
    ///
    /// # Errors
    /// As there; also when there is a socket already.
    pub fn listen_anew(path: &Path) -> Result<Self, SocketError> {
        check_length(path)?;
        match fs::symlink_metadata(path) {
            Ok(data) if data.file_type().is_socket() => Err(SocketError::Unknown(path.to_owned())),
            Ok(_) => Err(SocketError::NotASocket(path.to_owned())),
            Err(_) => Self::bind(path, None),
        }
    }

    fn bind(path: &Path, permissions: Option<&Permissions>) -> Result<Self, SocketError> {
        let is_private = permissions.is_some();
        let listener = bind(path, is_private).map_err(|error| explain(path, error))?;
        let identity = fs::symlink_metadata(path)
            .ok()
            .map(|data| (data.dev(), data.ino()));
        let socket = BoundSocket {
            listener,
            path: path.to_owned(),
            identity,
        };
        if let Some(permissions) = permissions {
            permit(path, permissions).map_err(|error| SocketError::Permissions {
                path: path.to_owned(),
                error,
            })?;
        }
        Ok(socket)
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

fn check_length(path: &Path) -> Result<(), SocketError> {
    if path.as_os_str().len() > PATH_MAX {
        return Err(SocketError::TooLong(path.to_owned()));
    }
    Ok(())
}

/// Removes the sockets in a folder on which nobody listens any more.
///
/// # Errors
/// When the folder cannot be read.
pub fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let is_socket =
            |path| fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_socket());
        if is_socket(&path)
            && let Err(error) = remove_stale(&path)
            && !matches!(error, SocketError::Busy(_))
        {
            log::warn!("{error}");
        }
    }
    Ok(())
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

/// The group first: nobody else is let in meanwhile.
fn permit(path: &Path, permissions: &Permissions) -> io::Result<()> {
    if let Some(group) = permissions.group {
        std::os::unix::fs::chown(path, None, Some(group))?;
    }
    if *permissions != Permissions::PRIVATE {
        fs::set_permissions(path, fs::Permissions::from_mode(permissions.mode))?;
    }
    Ok(())
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
