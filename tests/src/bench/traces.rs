// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Traces of pages that real programs ask for: which pages of which files, in which order, as strace
//! sees it.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use super::policies::Name;

/// A program's requests for pages.
pub struct Trace {
    /// For people and figures.
    pub name: &'static str,
    /// The pages.
    pub pages: Vec<Name>,
}

impl Trace {
    /// How many different pages there are.
    #[must_use]
    pub fn distinct(&self) -> usize {
        self.pages
            .iter()
            .collect::<std::collections::HashSet<_>>()
            .len()
    }
}

/// A database in a file, looked up as people look things up: some things often, most things seldom,
/// and once in a while all of them.
const DATABASE: &str = r"
import random, sqlite3, sys
random.seed(7)
db = sqlite3.connect(sys.argv[1])
db.execute('pragma cache_size = 16')
db.execute('create table t (k integer primary key, v text)')
db.executemany('insert into t values (?, ?)', ((k, 'x' * random.randint(200, 1600)) for k in range(60000)))
db.commit()
db.close()
db = sqlite3.connect(sys.argv[1])
db.execute('pragma cache_size = 16')
for step in range(60000):
    k = int(random.paretovariate(0.7)) % 60000
    k = k * 7919 % 60000
    db.execute('select v from t where k = ?', (k,)).fetchone()
    if step % 15000 == 14999:
        db.execute('select sum(length(v)) from t').fetchone()
";

/// Records all traces.
///
/// # Errors
/// When strace or one of the programs is not there.
pub fn record(folder: &Path) -> Result<Vec<Trace>> {
    let database = folder.join("t.db");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());

    let mut look_up = Command::new("python3");
    look_up.args(["-c", DATABASE]).arg(&database);
    let mut compile = Command::new(cargo);
    compile
        .args(["check", "--offline", "--quiet", "--package", "cram-store"])
        .arg("--target-dir")
        .arg(folder.join("target"))
        .current_dir(&source);
    let mut search = Command::new("sh");
    // The same questions over the same files, as somebody does who is looking for something.
    search
        .args(["-c", "for word in memory copyright error the; do grep -rlsI $word /usr/share/doc /usr/include >/dev/null; grep -rlsI $word /usr/include >/dev/null; done; true"]);
    Ok(vec![
        trace("database", &mut look_up, folder)?,
        trace("compile", &mut compile, folder)?,
        trace("search", &mut search, folder)?,
    ])
}

fn trace(name: &'static str, program: &mut Command, folder: &Path) -> Result<Trace> {
    let log = folder.join("strace");
    let mut command = Command::new("strace");
    command
        .args(["-f", "-qq", "-y", "-s0", "-e", "signal=none"])
        .args(["-e", "trace=openat,read,pread64,lseek,mmap", "-o"])
        .arg(&log)
        .arg(program.get_program())
        .args(program.get_args())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    if let Some(folder) = program.get_current_dir() {
        command.current_dir(folder);
    }
    let status = command.status().context("cannot start strace")?;
    ensure!(status.success(), "the traced program {name} failed");
    let text = fs::read(&log).context("strace left no log")?;
    let mut reader = Reader::default();
    for line in String::from_utf8_lossy(&text).lines() {
        reader.line(line);
    }
    ensure!(!reader.pages.is_empty(), "{name} read nothing");
    Ok(Trace {
        name,
        pages: reader.pages,
    })
}

/// Makes page requests of strace's lines.
#[derive(Default)]
struct Reader {
    pages: Vec<Name>,
    files: HashMap<String, u64>,
    /// Where each descriptor of each process is in its file.
    offsets: HashMap<(String, String), u64>,
}

impl Reader {
    /// `PID  read(3</path>, ""..., 832) = 832`, and its like.
    fn line(&mut self, line: &str) -> Option<()> {
        let (process, rest) = line.split_once(' ')?;
        let (call, rest) = rest.trim_start().split_once('(')?;
        let (arguments, result) = rest.rsplit_once(" = ")?;
        if call == "openat" {
            let (descriptor, path) = descriptor(result)?;
            self.offsets
                .insert((process.to_owned(), format!("{descriptor}{path}")), 0);
            return Some(());
        }
        let arguments: Vec<&str> = arguments
            .trim_end()
            .trim_end_matches(')')
            .split(", ")
            .collect();
        if call == "mmap" {
            let (_, path) = descriptor(arguments.get(4)?)?;
            let (length, offset) = (number(arguments.get(1)?)?, number(arguments.get(5)?)?);
            self.ask(path, offset, length);
            return Some(());
        }
        let (descriptor, path) = descriptor(arguments.first()?)?;
        let done = number(result.split_whitespace().next()?)?;
        let key = (process.to_owned(), format!("{descriptor}{path}"));
        match call {
            "lseek" => _ = self.offsets.insert(key, done),
            "pread64" => self.ask(path, number(arguments.last()?)?, done),
            "read" => {
                let offset = self.offsets.entry(key).or_default();
                let from = *offset;
                *offset += done;
                self.ask(path, from, done);
            }
            _ => (),
        }
        Some(())
    }

    fn ask(&mut self, path: &str, offset: u64, length: u64) {
        /// More of one file at once is not believed.
        const PAGES_MAX: u64 = 1 << 14;
        if length == 0 || !path.starts_with('/') || path.starts_with("/proc") {
            return;
        }
        let next = self.files.len() as u64;
        let file = *self.files.entry(path.to_owned()).or_insert(next);
        let (first, last) = (offset / 4096, (offset + length - 1) / 4096);
        for page in (first..=last).take(usize::try_from(PAGES_MAX).unwrap_or(1)) {
            self.pages.push(file << 32 | page);
        }
    }
}

/// `3</path>`
fn descriptor(text: &str) -> Option<(&str, &str)> {
    let (number, rest) = text.split_once('<')?;
    Some((number, rest.strip_suffix('>').unwrap_or(rest)))
}

fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn straces_lines_are_understood() {
        let mut reader = Reader::default();
        for line in [
            "7  openat(AT_FDCWD</w>, \"a\", O_RDONLY|O_CLOEXEC) = 3</etc/a>",
            "7  read(3</etc/a>, \"\"..., 8192) = 5000",
            "7  read(3</etc/a>, \"\"..., 8192) = 0",
            "7  lseek(3</etc/a>, 0, SEEK_SET) = 0",
            "7  read(3</etc/a>, \"\"..., 10) = 10",
            "8  pread64(4</etc/b>, \"\"..., 4096, 8192) = 4096",
            "8  mmap(NULL, 8192, PROT_READ, MAP_PRIVATE, 4</etc/b>, 0x1000) = 0x7f00",
            "8  read(5<pipe:[1]>, \"\"..., 10) = 10",
            "8  read(9</etc/x>, 0x7, 10) = -1 EAGAIN (Resource temporarily unavailable)",
        ] {
            reader.line(line);
        }
        let b = 1 << 32;
        assert_eq!(reader.pages, [0, 1, 0, b + 2, b + 1, b + 2]);
    }
}
