// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! The configuration file: TOML, whose keys are the long options, and a table for each guest.
//!
//! Its keys become words of a command line, before those that were really given: values are checked
//! at one place, and what is given by hand counts. Guests of both are served.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::de::Error as _;
use serde::{Deserialize, Deserializer};

use crate::balance::Copies;
use crate::options::GuestOptions;
use crate::size;

/// Far more than any host's guests need.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// A configuration file that was read.
#[derive(Debug)]
pub struct Configuration {
    /// Options, as words of a command line.
    pub words: Vec<String>,
    /// Guests.
    pub guests: Vec<GuestOptions>,
    path: PathBuf,
    text: String,
}

/// The keys. Those that are lists or tables come last, as they do in a file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct Keys {
    forget_after: Option<Scalar>,
    control_socket: Option<Scalar>,
    control_mode: Option<Scalar>,
    control_group: Option<Scalar>,
    metrics: Option<Scalar>,
    capacity: Option<Scalar>,
    quota: Option<Scalar>,
    arena: Option<Scalar>,
    dedup: Option<Scalar>,
    cold_after: Option<Scalar>,
    background_cpu: Option<Scalar>,
    copies: Option<Scalar>,
    auto_squeeze: Option<Scalar>,
    num_queues: Option<Scalar>,
    queue_size: Option<Scalar>,
    max_pools: Option<Scalar>,
    poll_us: Option<Scalar>,
    workers: Option<Scalar>,
    pin: Option<Scalar>,
    sandbox: Option<Scalar>,
    log_level: Option<Scalar>,
    guest_folders: Vec<String>,
    guest: Vec<Guest>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Guest {
    name: String,
    socket: PathBuf,
    quota: Option<Size>,
    weight: Option<u32>,
    copies: Option<Copies>,
    auto_squeeze: Option<bool>,
    #[serde(default)]
    trust_socket: bool,
}

/// A value as an option has it.
#[derive(Debug, Deserialize)]
#[serde(untagged, expecting = "write a string, a whole number, true or false")]
enum Scalar {
    Flag(bool),
    Number(u64),
    Text(String),
}

#[derive(Debug)]
struct Size(u64);

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let bytes = match Scalar::deserialize(deserializer)? {
            Scalar::Number(bytes) => Ok(bytes),
            Scalar::Text(text) => size::parse(&text),
            Scalar::Flag(_) => Err("write a size such as \"512M\"".to_owned()),
        };
        bytes.map(Size).map_err(D::Error::custom)
    }
}

impl Configuration {
    /// Reads a file.
    ///
    /// # Errors
    /// One line that says what is wrong with it, and where.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = read_bounded(path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?;
        let keys: Keys = toml::from_str(&text).map_err(|error| {
            let line = error.span().map(|span| line_of(&text, span.start));
            let place = line.map_or(String::new(), |line| format!(", line {line}"));
            let message = error.message().replace('\n', " ");
            format!("{}{place}: {message}", path.display())
        })?;
        let words = keys.words();
        let guests = keys.guest.into_iter().map(Guest::options).collect();
        Ok(Configuration {
            words,
            guests,
            path: path.to_owned(),
            text,
        })
    }

    /// A complaint about the value of an option, with the line that has it, if one has.
    pub fn locate(&self, complaint: &str) -> String {
        let mut lines = self.text.lines().enumerate();
        let found = lines.find_map(|(number, line)| {
            let (key, _) = line.split_once('=')?;
            let is_it = complaint.contains(&format!("--{} ", key.trim()));
            is_it.then(|| format!(", line {}", number + 1))
        });
        let place = found.unwrap_or_default();
        format!("{}{place}: {complaint}", self.path.display())
    }
}

impl Keys {
    fn words(&self) -> Vec<String> {
        let scalars = [
            ("forget-after", &self.forget_after),
            ("control-socket", &self.control_socket),
            ("control-mode", &self.control_mode),
            ("control-group", &self.control_group),
            ("metrics", &self.metrics),
            ("capacity", &self.capacity),
            ("quota", &self.quota),
            ("arena", &self.arena),
            ("dedup", &self.dedup),
            ("cold-after", &self.cold_after),
            ("background-cpu", &self.background_cpu),
            ("copies", &self.copies),
            ("auto-squeeze", &self.auto_squeeze),
            ("num-queues", &self.num_queues),
            ("queue-size", &self.queue_size),
            ("max-pools", &self.max_pools),
            ("poll-us", &self.poll_us),
            ("workers", &self.workers),
            ("pin", &self.pin),
            ("sandbox", &self.sandbox),
            ("log-level", &self.log_level),
        ];
        let words = scalars.into_iter().filter_map(|(name, value)| match value {
            None | Some(Scalar::Flag(false)) => None,
            Some(Scalar::Flag(true)) => Some(format!("--{name}")),
            Some(Scalar::Number(number)) => Some(format!("--{name}={number}")),
            Some(Scalar::Text(text)) => Some(format!("--{name}={text}")),
        });
        let folders = self.guest_folders.iter();
        words
            .chain(folders.map(|folder| format!("--guest-folder={folder}")))
            .collect()
    }
}

impl Guest {
    fn options(self) -> GuestOptions {
        GuestOptions {
            name: self.name,
            socket: self.socket,
            trusts_socket: self.trust_socket,
            quota_bytes: self.quota.map(|Size(bytes)| bytes),
            weight: self.weight,
            copies: self.copies,
            auto_squeeze: self.auto_squeeze,
        }
    }
}

fn read_bounded(path: &Path) -> io::Result<String> {
    let mut text = String::new();
    let read = File::open(path)?
        .take(FILE_BYTES_MAX + 1)
        .read_to_string(&mut text)?;
    if read as u64 > FILE_BYTES_MAX {
        let message = format!("it is longer than {}", size::show(FILE_BYTES_MAX));
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(text)
}

/// The number of the line in which a byte is.
fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or_default();
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Configuration, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cram.toml");
        std::fs::write(&path, text).unwrap();
        let named = format!("{}", path.display());
        Configuration::read(&path).map_err(|error| error.replace(&named, "FILE"))
    }

    #[test]
    fn keys_are_options_and_guests_are_tables() {
        let text = "capacity = \"4G\"\ncold-after = 60\nauto-squeeze = true\n\
                    guest-folders = [\"/run/cram\"]\n\n[[guest]]\nname = \"a, b\"\nsocket = \"/run/a\"\n\
                    quota = \"1M\"\nweight = 50\ncopies = \"keep\"\n";
        let configuration = read(text).unwrap();
        let words = [
            "--capacity=4G",
            "--cold-after=60",
            "--auto-squeeze",
            "--guest-folder=/run/cram",
        ];
        assert_eq!(configuration.words, words);
        let mut guest = GuestOptions::new("a, b".into(), "/run/a".into());
        guest.quota_bytes = Some(1 << 20);
        guest.weight = Some(50);
        guest.copies = Some(Copies::Keep);
        assert_eq!(configuration.guests, [guest]);
    }

    #[test]
    fn what_is_wrong_is_said_with_its_line() {
        for (text, place, word) in [
            ("capacity = 1\ncolour = 2\n", "FILE, line 2: ", "`colour`"),
            ("capacity = \n", "FILE, line 1: ", ""),
            ("quota = [1]\n", "FILE, line 1: ", "write a string"),
            (
                "[[guest]]\nname = \"a\"\nsocket = \"b\"\nsize = 1\n",
                "FILE, line 4: ",
                "`size`",
            ),
            (
                "[[guest]]\nname = \"a\"\nsocket = \"b\"\nquota = \"12Q\"\n",
                "FILE, line 4: ",
                "is not a size",
            ),
            (
                "\n[[guest]]\nname = \"a\"\n",
                "FILE, line 2: ",
                "missing field `socket`",
            ),
            (
                "capacity = 1\ncapacity = 2\n",
                "FILE, line 2: ",
                "duplicate",
            ),
        ] {
            let said = read(text).unwrap_err();
            assert!(said.starts_with(place) && said.contains(word), "{said}");
            assert!(!said.contains('\n'), "{said}");
        }
        let said = Configuration::read(Path::new("/absent/file")).unwrap_err();
        assert!(said.starts_with("cannot read /absent/file: "), "{said}");
    }

    #[test]
    fn a_value_that_an_option_refuses_has_a_line() {
        let configuration = read("capacity = \"1G\"\n\nnum-queues = 99\n").unwrap();
        let said = configuration.locate("invalid value '99' for '--num-queues <N>': too many");
        assert!(said.contains(", line 3: invalid value '99'"), "{said}");
    }
}
