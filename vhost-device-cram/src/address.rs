// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Where metrics are to be had, as the operator writes it.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

/// Where metrics are to be had.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A unix socket.
    Unix(PathBuf),
    /// A port of an address that no other host reaches.
    Loopback(SocketAddr),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return match path {
                "" => Err("write a path behind unix:".to_owned()),
                _ => Ok(Address::Unix(PathBuf::from(path))),
            };
        }
        let address: SocketAddr = text
            .parse()
            .map_err(|_| "write unix:PATH, or 127.0.0.1:PORT".to_owned())?;
        let is_loopback = match address.ip() {
            IpAddr::V4(ip) => ip.is_loopback(),
            IpAddr::V6(ip) => ip.is_loopback(),
        };
        if !is_loopback {
            return Err(format!(
                "{} can be reached from other hosts; write 127.0.0.1:PORT or [::1]:PORT, and let a \
                 proxy with passwords and encryption serve others",
                address.ip()
            ));
        }
        Ok(Address::Loopback(address))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Unix(path) => write!(f, "unix:{}", path.display()),
            Address::Loopback(address) => address.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_no_other_host_reaches_is_an_address() {
        let unix = Address::Unix("/run/m".into());
        assert_eq!("unix:/run/m".parse(), Ok(unix));
        for text in ["127.0.0.1:9", "[::1]:9", "127.1.2.3:0"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for text in ["0.0.0.0:9", "[::]:9", "10.0.0.1:9"] {
            let error = text.parse::<Address>().unwrap_err();
            assert!(error.contains("can be reached from other hosts"), "{error}");
        }
        for text in ["", "unix:", "9100", "localhost:9100", "127.0.0.1"] {
            assert!(text.parse::<Address>().unwrap_err().starts_with("write "));
        }
    }
}
