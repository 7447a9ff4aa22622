// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Command line of the workload's modes: `--name value` pairs and bare flags.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail};

/// Options as given, each name at most once.
#[derive(Debug)]
pub(crate) struct Arguments {
    values: BTreeMap<String, String>,
}

impl Arguments {
    /// Reads `words`; an option named in `flags` takes no value, any other name
    /// must be in `options` and takes one.
    pub(crate) fn parse(words: &[String], options: &[&str], flags: &[&str]) -> Result<Self> {
        let mut values = BTreeMap::new();
        let mut rest = words.iter();
        while let Some(word) = rest.next() {
            let Some(name) = word.strip_prefix("--") else {
                bail!("{word:?} is not an option");
            };
            let value = if flags.contains(&name) {
                String::new()
            } else if options.contains(&name) {
                rest.next()
                    .with_context(|| format!("--{name} needs a value"))?
                    .clone()
            } else {
                bail!("--{name} is not known");
            };
            if values.insert(name.to_owned(), value).is_some() {
                bail!("--{name} is given twice");
            }
        }
        Ok(Self { values })
    }

    /// Whether a flag was given.
    pub(crate) fn flag(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    /// The text of an option that must be there.
    pub(crate) fn required(&self, name: &str) -> Result<&str> {
        self.values
            .get(name)
            .map(String::as_str)
            .with_context(|| format!("--{name} is missing"))
    }

    /// The value of an option that must be there.
    pub(crate) fn required_number(&self, name: &str) -> Result<u64> {
        number(name, self.required(name)?)
    }

    /// The value of an option, or what it is without.
    pub(crate) fn number_or(&self, name: &str, default: u64) -> Result<u64> {
        match self.values.get(name) {
            Some(text) => number(name, text),
            None => Ok(default),
        }
    }

    /// The text of an option, or what it is without.
    pub(crate) fn text_or<'a>(&'a self, name: &str, default: &'a str) -> &'a str {
        self.values.get(name).map_or(default, String::as_str)
    }
}

fn number(name: &str, text: &str) -> Result<u64> {
    u64::from_str(text).with_context(|| format!("--{name} {text:?} is not a number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_flags_and_defaults() {
        let given =
            Arguments::parse(&words("--mib 7 --pageout"), &["mib", "seed"], &["pageout"]).unwrap();
        assert_eq!(given.required_number("mib").unwrap(), 7);
        assert_eq!(given.number_or("seed", 3).unwrap(), 3);
        assert!(given.flag("pageout"));
        assert!(given.required("seed").is_err());
    }

    #[test]
    fn wrong_lines_are_refused() {
        for line in ["mib", "--mib", "--mib 1 --mib 2", "--other 1"] {
            assert!(
                Arguments::parse(&words(line), &["mib"], &[]).is_err(),
                "{line}"
            );
        }
        let given = Arguments::parse(&words("--mib x"), &["mib"], &[]).unwrap();
        assert!(given.required_number("mib").is_err());
    }
}
