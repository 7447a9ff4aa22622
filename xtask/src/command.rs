// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! Running other programs: never with our standard input, always with their
//! output where a person can find it.

use std::io::{BufRead, BufReader, Read};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::cache::Cache;
use crate::progress::Step;

/// Runs a program, its output going to the step's log.
pub fn run(step: &mut Step, command: &mut Command) -> Result<()> {
    run_watched(step, command, |_, _| Keep::Logged)
}

/// What becomes of a line that was looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// It goes to the log.
    Logged,
    /// It was a progress report, and only clutters the log.
    Dropped,
}

/// Runs a program and shows each line of its output to `watch`, which says what becomes of it.
pub fn run_watched(
    step: &mut Step,
    command: &mut Command,
    mut watch: impl FnMut(&mut Step, &str) -> Keep,
) -> Result<()> {
    let program = program_name(command);
    step.log(&format!("$ {command:?}"));
    let (reader, writer) = std::io::pipe().context("cannot make a pipe")?;
    let errors = writer.try_clone().context("cannot make a pipe")?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(errors)
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    // The command still holds the pipe's writing ends, and the reader must see its end.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    for_each_line(reader, |line| {
        if watch(step, line) == Keep::Logged {
            step.log(line);
        }
    })?;
    let status = child
        .wait()
        .with_context(|| format!("cannot wait for {program}"))?;
    if !status.success() {
        bail!("{program} failed ({status})");
    }
    Ok(())
}

/// Runs a program whose length is known from the last time: `counts` says
/// which lines of output are a unit of work.
pub fn run_counted(
    cache: &Cache,
    step: &mut Step,
    command: &mut Command,
    mut counts: impl FnMut(&str) -> bool,
) -> Result<()> {
    let name = step.name().to_owned();
    let total = cache.usual_size(&name);
    let mut done = 0;
    run_watched(step, command, |step, line| {
        if counts(line) {
            done += 1;
            step.advance(done, total);
        }
        Keep::Logged
    })?;
    cache.remember_size(&name, done);
    Ok(())
}

/// Runs a program and returns what it printed; its errors are part of ours.
pub fn output_of(command: &mut Command) -> Result<String> {
    let program = program_name(command);
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!(
            "{program} failed ({}): {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program is in the search path.
pub fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).is_file()))
}

/// The last part of the program's path, for messages.
pub fn program_name(command: &Command) -> String {
    std::path::Path::new(command.get_program())
        .file_name()
        .map_or_else(String::new, |name| name.to_string_lossy().into_owned())
}

/// Calls `each` for every line; carriage returns end a line too, as progress displays use them.
pub fn for_each_line(reader: impl Read, mut each: impl FnMut(&str)) -> Result<()> {
    let mut reader = BufReader::new(reader);
    let mut bytes = Vec::new();
    loop {
        bytes.clear();
        let read = reader
            .read_until(b'\n', &mut bytes)
            .context("cannot read a program's output")?;
        if read == 0 {
            return Ok(());
        }
        let text = String::from_utf8_lossy(&bytes);
        for line in text.trim_end_matches(['\n', '\r']).split('\r') {
            each(line);
        }
    }
}
