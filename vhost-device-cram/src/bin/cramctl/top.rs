// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause

//! `cramctl top`: what the pool holds and does, as graphs, and a row for each guest.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Cell, Paragraph, Row, Sparkline, Table};
use serde_json::{Value, json};
use vhost_device_cram::control::client::Caller;
use vhost_device_cram::size;

use crate::Failure;

/// More readings than any terminal has columns.
const HISTORY: usize = 512;

/// One figure over time.
#[derive(Default)]
struct Series(VecDeque<u64>);

impl Series {
    fn push(&mut self, value: u64) {
        if self.0.len() == HISTORY {
            self.0.pop_front();
        }
        self.0.push_back(value);
    }

    /// The newest ones, as many as fit; on the right when there are fewer.
    fn last(&self, width: usize) -> Vec<u64> {
        let skipped = self.0.len().saturating_sub(width);
        let missing = width.saturating_sub(self.0.len());
        let shown = self.0.iter().skip(skipped).copied();
        std::iter::repeat_n(0, missing).chain(shown).collect()
    }
}

/// What rows can be sorted by.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    Name,
    Held,
    Puts,
    Gets,
    Refused,
}

impl Order {
    const ALL: [Order; 5] = [
        Order::Name,
        Order::Held,
        Order::Puts,
        Order::Gets,
        Order::Refused,
    ];

    fn name(self) -> &'static str {
        match self {
            Order::Name => "name",
            Order::Held => "held",
            Order::Puts => "puts",
            Order::Gets => "gets",
            Order::Refused => "refused",
        }
    }

    fn next(self) -> Self {
        let at = Self::ALL.iter().position(|order| *order == self);
        let next = at.map_or(0, |at| at + 1) % Self::ALL.len();
        Self::ALL.get(next).copied().unwrap_or(Order::Name)
    }
}

/// A guest, as of the last reading.
struct Guest {
    name: String,
    state: &'static str,
    pages: u64,
    held: u64,
    quota: u64,
    ratio: String,
    pressure: u64,
    puts: u64,
    gets: u64,
    refused: u64,
    put_ns: Option<u64>,
    get_ns: Option<u64>,
}

struct Top {
    before: Option<(Instant, Value)>,
    held: Series,
    ratio: Series,
    puts: Series,
    gets: Series,
    latency: Series,
    guests: Vec<Guest>,
    order: Order,
    /// The first row that is shown.
    first: usize,
    header: String,
}

fn number(value: &Value, name: &str) -> u64 {
    value.get(name).and_then(Value::as_u64).unwrap_or_default()
}

fn list<'a>(value: &'a Value, name: &str) -> &'a [Value] {
    value
        .get(name)
        .and_then(Value::as_array)
        .map(Vec::as_slice)
        .unwrap_or_default()
}

fn named<'a>(values: &'a [Value], name: &str) -> Option<&'a Value> {
    let is_it = |value: &&Value| value.get("name").and_then(Value::as_str) == Some(name);
    values.iter().find(is_it)
}

/// Original bytes for each held one, in hundredths.
fn ratio_of(figures: &Value) -> u64 {
    let original = number(figures, "orig_data_size").saturating_mul(100);
    original
        .checked_div(number(figures, "mem_used_total"))
        .unwrap_or_default()
}

fn show_ratio(hundredths: u64) -> String {
    match hundredths {
        0 => "-".to_owned(),
        _ => format!("{}.{:02}", hundredths / 100, hundredths % 100),
    }
}

fn show_time(ns: Option<u64>) -> String {
    match ns {
        None => "-".to_owned(),
        Some(ns) if ns < 10_000 => format!("{ns} ns"),
        Some(ns) if ns < 10_000_000 => format!("{} us", ns / 1000),
        Some(ns) => format!("{} ms", ns / 1_000_000),
    }
}

/// A count with a unit, so that it is five letters at the most.
fn show_count(count: u64) -> String {
    match count {
        0..100_000 => count.to_string(),
        100_000..10_000_000 => format!("{}k", count / 1000),
        _ => format!("{}M", count / 1_000_000),
    }
}

/// Runs until somebody presses q.
pub(crate) fn run(caller: &mut Caller, interval: Duration) -> Result<(), Failure> {
    let mut top = Top {
        before: None,
        held: Series::default(),
        ratio: Series::default(),
        puts: Series::default(),
        gets: Series::default(),
        latency: Series::default(),
        guests: Vec::new(),
        order: Order::Held,
        first: 0,
        header: String::new(),
    };
    // Before the terminal is taken, so that an error is read.
    top.read(caller)?;
    let mut terminal = ratatui::try_init()?;
    let outcome = top.live(caller, &mut terminal, interval);
    ratatui::restore();
    outcome
}

impl Top {
    fn live(
        &mut self,
        caller: &mut Caller,
        terminal: &mut ratatui::DefaultTerminal,
        interval: Duration,
    ) -> Result<(), Failure> {
        let mut next = Instant::now() + interval;
        loop {
            terminal.draw(|frame| self.draw(frame))?;
            let left = next.saturating_duration_since(Instant::now());
            if event::poll(left)? {
                if self.takes(&event::read()?) {
                    return Ok(());
                }
                continue;
            }
            self.read(caller)?;
            next = Instant::now() + interval;
        }
    }

    /// Whether it is to end.
    fn takes(&mut self, event: &Event) -> bool {
        let Event::Key(key) = event else {
            return false;
        };
        if key.kind == KeyEventKind::Release {
            return false;
        }
        let is_control = key.modifiers.contains(KeyModifiers::CONTROL);
        let last = self.guests.len().saturating_sub(1);
        match key.code {
            KeyCode::Char('c') if is_control => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char('s') => {
                self.order = self.order.next();
                self.sort();
            }
            KeyCode::Down => self.first = (self.first + 1).min(last),
            KeyCode::Up => self.first = self.first.saturating_sub(1),
            KeyCode::PageDown => self.first = (self.first + 10).min(last),
            KeyCode::PageUp => self.first = self.first.saturating_sub(10),
            KeyCode::Home => self.first = 0,
            _ => {}
        }
        false
    }

    /// Asks the daemon.
    fn read(&mut self, caller: &mut Caller) -> Result<(), Failure> {
        let now = Instant::now();
        let stats = caller.call("stats", &json!({}))?;
        let times = caller.call("stats.histogram", &json!({}))?;
        let none = Value::Null;
        let store = stats.get("store").unwrap_or(&none);
        let past = self.before.as_ref();
        let rate = |now_figures: &Value, before: Option<&Value>, name: &str| {
            let (Some((at, _)), Some(before)) = (past, before) else {
                return 0;
            };
            let events = number(now_figures, name).saturating_sub(number(before, name));
            let micros = (now - *at).as_micros().max(1);
            u64::try_from(u128::from(events) * 1_000_000 / micros).unwrap_or(u64::MAX)
        };
        let store_before = past.and_then(|(_, stats)| stats.get("store"));
        let (held, ratio) = (number(store, "mem_used_total"), ratio_of(store));
        let puts = rate(store, store_before, "puts");
        let gets = rate(store, store_before, "gets");
        let clients = list(&stats, "clients");
        let p99 = |name: &str, kind: &str| {
            let client = named(list(&times, "clients"), name)?;
            client.get(kind)?.get("p99_ns")?.as_u64()
        };
        let row = |client: &Value| {
            let name = client.get("name").and_then(Value::as_str).unwrap_or("?");
            let before = past.and_then(|(_, stats)| named(list(stats, "clients"), name));
            let flag = |name| client.get(name).and_then(Value::as_bool) == Some(true);
            Guest {
                name: name.to_owned(),
                state: match (flag("connected"), flag("frozen")) {
                    (_, true) => "frozen",
                    (true, _) => "here",
                    (false, _) => "away",
                },
                pages: number(client, "pages_stored"),
                held: number(client, "mem_used_total"),
                quota: number(client, "quota_bytes"),
                ratio: show_ratio(ratio_of(client)),
                pressure: number(client, "pressure"),
                puts: rate(client, before, "puts"),
                gets: rate(client, before, "gets"),
                refused: rate(client, before, "puts_refused"),
                put_ns: p99(name, "put"),
                get_ns: p99(name, "get"),
            }
        };
        let guests: Vec<_> = clients.iter().map(row).collect();
        self.header = format!(
            "{} of {} held, ratio {}, {} pages, pressure {}, {} guests",
            size::show(held),
            size::show(number(store, "capacity_bytes")),
            show_ratio(ratio),
            number(store, "pages_stored"),
            number(store, "pressure"),
            guests.len(),
        );
        let slowest = guests.iter().filter_map(|guest| guest.get_ns).max();
        self.held.push(held);
        self.ratio.push(ratio);
        self.puts.push(puts);
        self.gets.push(gets);
        self.latency.push(slowest.unwrap_or_default());
        self.guests = guests;
        self.sort();
        self.before = Some((now, stats));
        Ok(())
    }

    fn sort(&mut self) {
        let key = |guest: &Guest| match self.order {
            Order::Name => 0,
            Order::Held => guest.held,
            Order::Puts => guest.puts,
            Order::Gets => guest.gets,
            Order::Refused => guest.refused,
        };
        self.guests
            .sort_by(|a, b| key(b).cmp(&key(a)).then_with(|| a.name.cmp(&b.name)));
    }

    fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        // A third for the graphs, within what is readable.
        let graphs = (area.height / 3).clamp(5, 16);
        let [header, above, table, footer] = Layout::vertical([
            Constraint::Length(1),
            Constraint::Length(graphs),
            Constraint::Min(3),
            Constraint::Length(1),
        ])
        .areas(area);
        frame.render_widget(Paragraph::new(self.header.as_str()).bold(), header);
        let newest = |series: &Series| series.0.back().copied().unwrap_or_default();
        let shown = [
            (&self.held, "held", size::show(newest(&self.held))),
            (&self.ratio, "ratio", show_ratio(newest(&self.ratio))),
            (&self.puts, "puts/s", show_count(newest(&self.puts))),
            (&self.gets, "gets/s", show_count(newest(&self.gets))),
            (
                &self.latency,
                "get p99",
                show_time(Some(newest(&self.latency)).filter(|ns| *ns > 0)),
            ),
        ];
        let places = Layout::horizontal([Constraint::Fill(1); 5]).split(above);
        for ((series, name, value), place) in shown.into_iter().zip(places.iter()) {
            graph(frame, *place, series, &format!("{name} {value}"));
        }
        self.draw_guests(frame, table);
        let help = format!("q end · s sort (by {}) · up, down", self.order.name());
        frame.render_widget(Paragraph::new(help).dim(), footer);
    }

    fn draw_guests(&self, frame: &mut Frame<'_>, area: Rect) {
        let is_wide = area.width >= 110;
        let mut names = vec![
            "guest", "state", "held", "quota", "ratio", "press", "puts/s", "gets/s", "ref/s",
        ];
        let mut widths = vec![
            Constraint::Min(8),
            Constraint::Length(6),
            Constraint::Length(9),
            Constraint::Length(9),
            Constraint::Length(6),
            Constraint::Length(5),
            Constraint::Length(6),
            Constraint::Length(6),
            Constraint::Length(6),
        ];
        if is_wide {
            names.extend(["pages", "put p99", "get p99"]);
            widths.extend([Constraint::Length(10); 3]);
        }
        let right = |text: String| Cell::from(Line::from(text).right_aligned());
        let row = |guest: &Guest| {
            let mut cells = vec![
                Cell::from(guest.name.clone()),
                Cell::from(guest.state),
                right(size::show(guest.held)),
                right(size::show(guest.quota)),
                right(guest.ratio.clone()),
                right(guest.pressure.to_string()),
                right(show_count(guest.puts)),
                right(show_count(guest.gets)),
                right(show_count(guest.refused)),
            ];
            if is_wide {
                cells.push(right(guest.pages.to_string()));
                cells.push(right(show_time(guest.put_ns)));
                cells.push(right(show_time(guest.get_ns)));
            }
            let row = Row::new(cells);
            match guest.pressure {
                1000 => row.red(),
                500.. => row.yellow(),
                _ => row,
            }
        };
        let rows = self.guests.iter().skip(self.first).map(row);
        let titles = names.into_iter().enumerate().map(|(k, name)| match k {
            0 | 1 => Cell::from(name),
            _ => right(name.to_owned()),
        });
        let table = Table::new(rows, widths)
            .header(Row::new(titles).style(Style::new().reversed()))
            .column_spacing(1);
        frame.render_widget(table, area);
    }
}

fn graph(frame: &mut Frame<'_>, area: Rect, series: &Series, title: &str) {
    let block = Block::new().borders(Borders::TOP).title(title);
    let inner = block.inner(area);
    let data = series.last(inner.width.into());
    frame.render_widget(block, area);
    frame.render_widget(Sparkline::default().data(data), inner);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_readings_are_on_the_right() {
        let mut series = Series::default();
        (1..=3).for_each(|value| series.push(value));
        assert_eq!(series.last(5), [0, 0, 1, 2, 3]);
        assert_eq!(series.last(2), [2, 3]);
        (0..2 * HISTORY as u64).for_each(|value| series.push(value));
        assert_eq!(series.0.len(), HISTORY);
    }

    #[test]
    fn figures_are_short() {
        assert_eq!(
            [0, 99_999, 100_000, 12_345_678].map(show_count),
            ["0", "99999", "100k", "12M"]
        );
        assert_eq!(show_time(Some(1500)), "1500 ns");
        assert_eq!(show_time(Some(15_000)), "15 us");
        assert_eq!(show_time(None), "-");
    }

    #[test]
    fn every_order_comes_round() {
        let mut order = Order::Name;
        for _ in Order::ALL {
            order = order.next();
        }
        assert!(order == Order::Name);
    }
}
