// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The daemon, in this process.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;
use vhost_device_cram::client::Offer;
use vhost_device_cram::control::client::Caller;
use vhost_device_cram::server::{Daemon, GuestOptions, Options, StoreOptions};
use vhost_device_cram::socket::Permissions;

use super::device::{self, Guest};

/// A daemon in a folder of its own. It ends, and the folder goes, when this is dropped.
pub struct TestDaemon {
    daemon: Daemon,
    options: Options,
    _folder: tempfile::TempDir,
}

impl TestDaemon {
    /// A daemon with `guests` sockets and room for `capacity_bytes`.
    ///
    /// # Errors
    ///
    /// When it cannot start.
    pub fn start(guests: usize, capacity_bytes: u64) -> Result<Self> {
        Self::start_with(guests, capacity_bytes, |_| {})
    }

    /// A daemon whose options are changed before it starts.
    ///
    /// # Errors
    ///
    /// When it cannot start.
    pub fn start_with(
        guests: usize,
        capacity_bytes: u64,
        change: impl FnOnce(&mut Options),
    ) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let mut options = Options {
            guests: (0..guests)
                .map(|k| folder.path().join(format!("guest{k}.sock")))
                .map(GuestOptions::of_socket)
                .collect(),
            keep: None,
            control_socket: Some(folder.path().join("control.sock")),
            control_permissions: Permissions::PRIVATE,
            metrics: None,
            guest_folders: Vec::new(),
            store: StoreOptions::with_capacity(capacity_bytes),
            quota_bytes: None,
            offer: Offer {
                request_queues: 2,
                queue_size: 256,
                max_pools: 16,
                poll: Duration::ZERO,
                workers: None,
                pin: Vec::new(),
                policy: vhost_device_cram::balance::Policy::default(),
                first_touch_bytes: 16 << 20,
            },
        };
        change(&mut options);
        Ok(Self {
            daemon: Daemon::start(&options)?,
            options,
            _folder: folder,
        })
    }

    /// The socket of guest `number`.
    #[must_use]
    pub fn socket(&self, number: usize) -> PathBuf {
        self.options.guests[number].socket.clone()
    }

    /// The control socket.
    #[must_use]
    pub fn control_socket(&self) -> PathBuf {
        self.options.control_socket.clone().unwrap_or_default()
    }

    /// The daemon.
    #[must_use]
    pub fn daemon(&self) -> &Daemon {
        &self.daemon
    }

    /// Connects as guest `number`, in the usual manner.
    ///
    /// # Errors
    ///
    /// When it cannot.
    pub fn connect(&self, number: usize) -> Result<Guest> {
        Guest::connect(&self.socket(number), &device::Options::default())
    }

    /// Calls a method on the control socket.
    ///
    /// # Errors
    ///
    /// When it is refused.
    pub fn call(&self, method: &str, params: Value) -> Result<Value> {
        Ok(Caller::connect(&self.control_socket())?.call(method, &params)?)
    }

    /// What `stats` says of guest `number`.
    ///
    /// # Errors
    ///
    /// When it is refused.
    pub fn client_stats(&self, number: usize) -> Result<Value> {
        Ok(self.call("stats", serde_json::json!({}))?["clients"][number].take())
    }

    /// Fails when the store contradicts itself.
    ///
    /// # Errors
    ///
    /// With the contradiction.
    pub fn check_store(&self) -> Result<()> {
        self.daemon
            .shared()
            .store
            .check()
            .map_err(anyhow::Error::msg)
    }
}
