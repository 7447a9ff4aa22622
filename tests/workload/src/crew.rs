// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `load` and `hold`: several workers, each with its part of the data, doing
//! the same thing at the same time.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};

use crate::arguments::Arguments;
use crate::order::Order;
use crate::region::{PAGE, lock_process};
use crate::worker::{Ask, Outcome};

/// Children that read a worker's pages at the same time in a `forked` pass.
const FORKS: u32 = 3;

/// One worker process.
struct Member {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
    /// The signal that ended it, or 0 when it simply left.
    ended: Option<i32>,
}

/// All workers.
struct Crew {
    members: Vec<Member>,
}

/// What a command came to, over all workers.
#[derive(Serialize, Default, Debug)]
struct Answer {
    #[serde(flatten)]
    total: Outcome,
    /// Sum of each worker's part, in order, after a load.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    sums: Vec<String>,
    /// Workers that are gone: number and signal.
    died: Vec<(usize, i32)>,
}

/// A line of `hold`'s input: for one worker, or for all.
#[derive(Deserialize)]
struct HoldLine {
    #[serde(default)]
    worker: Option<usize>,
    ask: Ask,
}

impl Crew {
    fn start(given: &Arguments) -> Result<Self> {
        let processes = given.number_or("processes", 2)?.max(1);
        let pages = given.required_number("mib")? * ((1 << 20) / PAGE as u64);
        let first = given.number_or("offset-mib", 0)? * ((1 << 20) / PAGE as u64);
        ensure!(pages >= processes, "fewer pages than processes");
        let mut members = Vec::new();
        for number in 0..processes {
            let begin = pages * number / processes;
            let end = pages * (number + 1) / processes;
            let mut command = Command::new("/proc/self/exe");
            command.args(["worker", "--source", given.required("source")?]);
            command.args(["--offset-page", &(first + begin).to_string()]);
            command.args(["--pages", &(end - begin).to_string()]);
            if given.flag("die-on-sigbus") {
                command.arg("--die-on-sigbus");
            }
            let mut child = command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .context("cannot start a worker")?;
            let (Some(input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
                bail!("a worker came without its pipes");
            };
            members.push(Member {
                child,
                input,
                output: BufReader::new(output),
                ended: None,
            });
        }
        Ok(Self { members })
    }

    /// Has one worker, or all of them at the same time, do `ask`.
    fn ask(&mut self, ask: &Ask, only: Option<usize>) -> Result<Answer> {
        let text = format!("{}\n", serde_json::to_string(ask)?);
        let chosen = |number: usize| only.is_none_or(|one| one == number);
        for (number, member) in self.members.iter_mut().enumerate() {
            if member.ended.is_none() && chosen(number) {
                // A worker that is gone shows when its answer is read.
                let _ = member.input.write_all(text.as_bytes());
            }
        }
        let mut answer = Answer::default();
        for (number, member) in self.members.iter_mut().enumerate() {
            if member.ended.is_none() && chosen(number) {
                let mut line = String::new();
                let read = member.output.read_line(&mut line).unwrap_or(0);
                if read > 0 {
                    let outcome: Outcome = serde_json::from_str(&line)?;
                    if !outcome.sum.is_empty() {
                        answer.sums.push(outcome.sum.clone());
                    }
                    answer.total.add(outcome);
                } else {
                    let status = member.child.wait()?;
                    member.ended = Some(status.signal().unwrap_or(0));
                }
            }
            if let Some(signal) = member.ended {
                answer.died.push((number, signal));
            }
        }
        Ok(answer)
    }

    /// Ends the workers by closing their input.
    fn finish(self) -> Result<()> {
        for member in self.members {
            let Member {
                mut child, input, ..
            } = member;
            drop(input);
            child.wait()?;
        }
        Ok(())
    }
}

fn print(value: &impl Serialize) -> Result<()> {
    let mut output = std::io::stdout().lock();
    serde_json::to_writer(&mut output, value)?;
    output.write_all(b"\n")?;
    output.flush()?;
    Ok(())
}

const COMMON: [&str; 4] = ["source", "offset-mib", "mib", "processes"];

/// Runs `hold`: loads, then does what each line of standard input asks.
pub(crate) fn run_hold(words: &[String]) -> Result<ExitCode> {
    let given = Arguments::parse(words, &COMMON, &["die-on-sigbus"])?;
    lock_process()?;
    let mut crew = Crew::start(&given)?;
    print(&crew.ask(&Ask::Load, None)?)?;
    for line in std::io::stdin().lock().lines() {
        let order: HoldLine = serde_json::from_str(&line?).context("a line of the input")?;
        print(&crew.ask(&order.ask, order.worker)?)?;
    }
    crew.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// A pass of `load`.
#[derive(Debug)]
struct Pass {
    name: String,
    order: Order,
    forks: u32,
}

fn passes(list: &str) -> Result<Vec<Pass>> {
    let parse = |name: &str| {
        let (order, forks) = match name {
            "sequential" => (Order::Sequential, 0),
            "reverse" => (Order::Reverse, 0),
            "random" => (Order::Random, 0),
            "stride" => (Order::Stride, 0),
            "forked" => (Order::Random, FORKS),
            _ => bail!("{name:?} is not an order"),
        };
        Ok(Pass {
            name: name.to_owned(),
            order,
            forks,
        })
    };
    list.split(',').map(parse).collect()
}

/// Runs `load`: the whole verification, with one line for each step and a report at the end.
pub(crate) fn run_load(words: &[String]) -> Result<ExitCode> {
    let mut options = COMMON.to_vec();
    options.extend(["passes", "seed", "rewrite"]);
    let given = Arguments::parse(words, &options, &["die-on-sigbus", "pageout"])?;
    let passes = passes(given.text_or("passes", "sequential,reverse,random,stride"))?;
    let seed = given.number_or("seed", 1)?;
    let rewrite = given.number_or("rewrite", 0)?;
    lock_process()?;
    let mut crew = Crew::start(&given)?;
    let mut report = Report {
        bytes: given.required_number("mib")? << 20,
        ..Report::default()
    };
    let loaded = crew.ask(&Ask::Load, None)?;
    report.sums.clone_from(&loaded.sums);
    report.note("load", loaded)?;
    for (number, pass) in passes.iter().enumerate() {
        if given.flag("pageout") {
            report.note("pageout", crew.ask(&Ask::Pageout, None)?)?;
        }
        let ask = Ask::Verify {
            order: pass.order,
            seed: seed.wrapping_add(number as u64),
            forks: pass.forks,
        };
        let answer = crew.ask(&ask, None)?;
        report.pages_verified += answer.total.pages;
        report.mismatches += answer.total.mismatches;
        report.lost += answer.total.lost;
        report.note(&pass.name, answer)?;
        if number == 0 && rewrite > 0 {
            let permille = rewrite.min(1000);
            report.note("rewrite", crew.ask(&Ask::Rewrite { seed, permille }, None)?)?;
        }
    }
    crew.finish()?;
    let good = report.mismatches == 0 && report.lost == 0 && report.died.is_empty();
    print(&serde_json::json!({ "report": report }))?;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::from(3)
    })
}

/// What `load` ends with.
#[derive(Serialize, Default, Debug)]
struct Report {
    bytes: u64,
    pages_verified: u64,
    mismatches: u64,
    lost: u64,
    sums: Vec<String>,
    steps: Vec<(String, f64)>,
    wrong: Vec<String>,
    died: Vec<(usize, i32)>,
}

impl Report {
    /// Prints a step and remembers it; a step that could not be done ends the load.
    fn note(&mut self, step: &str, answer: Answer) -> Result<()> {
        print(&serde_json::json!({ "step": step, "answer": answer }))?;
        if let Some(error) = answer.total.error {
            bail!("{step}: {error}");
        }
        self.steps.push((step.to_owned(), answer.total.seconds));
        self.wrong.extend(answer.total.wrong);
        self.died = answer.died;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_passes() {
        let list = passes("sequential,forked").unwrap();
        assert_eq!(list.len(), 2);
        assert_eq!(list[1].forks, FORKS);
        assert!(passes("sequential,").is_err());
    }

    #[test]
    fn a_line_for_one_worker() {
        let line = r#"{"worker":1,"ask":{"verify":{"order":"reverse","seed":7}}}"#;
        let order: HoldLine = serde_json::from_str(line).unwrap();
        assert_eq!(order.worker, Some(1));
        assert!(matches!(order.ask, Ask::Verify { forks: 0, .. }));
        let order: HoldLine = serde_json::from_str(r#"{"ask":"pageout"}"#).unwrap();
        assert!(order.worker.is_none());
    }
}
