//! Bytes by source over time, as a picture: what arrived stands on the line, what was given hangs below it.

use crate::facts::Totals;
use indicatif::HumanBytes;
use maud::{Markup, html};

/// The picture's own measures; it is scaled to the page.
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 190.0;

/// Room for the words beside and below.
const LEFT: f64 = 76.0;
const BOTTOM: f64 = 24.0;
const TOP: f64 = 12.0;

/// Between two bars, as a part of a bar's place.
const GAP: f64 = 0.22;

/// Lines across.
const LINES: u64 = 3;

/// One bar's part: from where to where, and whose.
#[derive(Debug, PartialEq)]
struct Block {
    class: &'static str,
    from: u64,
    to: u64,
}

/// The parts of what arrived, from the line up.
fn stack(totals: &Totals) -> Vec<Block> {
    let mut from = 0;
    let mut blocks = Vec::new();
    for (class, bytes) in [("peer", totals.peer), ("delta", totals.delta), ("mirror", totals.mirror)] {
        if bytes > 0 {
            blocks.push(Block { class, from, to: from + bytes });
        }
        from += bytes;
    }
    blocks
}

/// The smallest of 1, 2, 4, ... 512 of a unit (bytes, KiB, MiB, ...), times [`LINES`], that reaches `bytes`.
fn ceiling(bytes: u64) -> u64 {
    let mut step = 1_u64;
    while step.saturating_mul(LINES) < bytes && step < 1 << 60 {
        step *= 2;
    }
    step * LINES
}

#[allow(clippy::cast_precision_loss, reason = "points of a picture")]
fn points(bytes: u64, top: u64, height: f64) -> f64 {
    bytes as f64 / top as f64 * height
}

fn at(value: f64) -> String {
    format!("{value:.1}")
}

/// The picture. `ago` names the time of a part, counted from the newest; `ticks` are the words below, from the left.
pub fn chart(parts: &[Totals], label: &str, ticks: &[&str], ago: impl Fn(usize) -> String) -> Markup {
    let received = ceiling(parts.iter().map(Totals::received).max().unwrap_or(0).max(1024));
    let most_given = parts.iter().map(|part| part.given).max().unwrap_or(0);
    // What was given has the same measure, and no more room than it needs.
    let room = HEIGHT - TOP - BOTTOM;
    let given_top = if most_given == 0 { 0 } else { ceiling(most_given.max(1024)) };
    let up = room * points(received, received + given_top, 1.0);
    let line = TOP + up;
    #[allow(clippy::cast_precision_loss, reason = "a few dozen")]
    let place = |index: usize| LEFT + (WIDTH - LEFT) * index as f64 / parts.len().max(1) as f64;
    let wide = (place(1) - place(0)) * (1.0 - GAP);
    html! {
        svg .chart viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img" aria-label=(label) {
            @for step in 0..=LINES {
                @let y = line - points(received / LINES * step, received, up);
                line .base[step == 0] .grid[step > 0] x1=(LEFT) x2=(WIDTH) y1=(at(y)) y2=(at(y)) {}
                text .scale x=(LEFT - 8.0) y=(at(y + 4.0)) text-anchor="end" { (if step == 0 { "0".to_owned() } else { short(received / LINES * step) }) }
            }
            @if given_top > 0 {
                @let y = line + points(given_top, received, up);
                line .grid x1=(LEFT) x2=(WIDTH) y1=(at(y)) y2=(at(y)) {}
                text .scale x=(LEFT - 8.0) y=(at(y + 4.0)) text-anchor="end" { (short(given_top)) }
            }
            @for (index, part) in parts.iter().enumerate() {
                @if part.received() + part.given > 0 {
                    g {
                        title { (ago(parts.len() - 1 - index)) ": " (words(part)) }
                        @for block in stack(part) {
                            rect .(block.class) x=(at(place(index))) width=(at(wide))
                                y=(at(line - points(block.to, received, up))) height=(format!("{:.2}", points(block.to - block.from, received, up))) {}
                        }
                        @if part.given > 0 {
                            rect .given x=(at(place(index))) width=(at(wide))
                                y=(at(line + 1.0)) height=(format!("{:.2}", points(part.given, received, up))) {}
                        }
                    }
                }
            }
            @for (index, tick) in ticks.iter().enumerate() {
                @let share = place(parts.len() * index / (ticks.len() - 1).max(1));
                @let anchor = if index == 0 { "start" } else if index + 1 == ticks.len() { "end" } else { "middle" };
                text .scale x=(at(share)) y=(HEIGHT - 6.0) text-anchor=(anchor) { (tick) }
            }
        }
    }
}

/// Bytes with the shortest unit.
fn short(bytes: u64) -> String {
    let text = HumanBytes(bytes).to_string();
    text.replace(".00 ", " ")
}

/// A part for who points at it or cannot see it.
pub fn words(part: &Totals) -> String {
    let named = [("from peers", part.peer), ("from deltas", part.delta), ("from mirrors", part.mirror), ("given", part.given)];
    let named: Vec<_> = named.iter().filter(|(_, bytes)| *bytes > 0).map(|(name, bytes)| format!("{} {name}", short(*bytes))).collect();
    if named.is_empty() { "nothing".to_owned() } else { named.join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bars that overlap, or a scale that a bar sticks out of.
    #[test]
    fn bars_stand_on_each_other() {
        let part = Totals { mirror: 30, peer: 10, delta: 0, given: 7 };
        let want = [Block { class: "peer", from: 0, to: 10 }, Block { class: "mirror", from: 10, to: 40 }];
        assert_eq!(stack(&part), want);
        assert_eq!((ceiling(0), ceiling(3), ceiling(4), ceiling(1 << 20), ceiling(u64::MAX)), (3, 3, 6, 3 << 19, 3 << 60));
        let drawn = chart(&[Totals::default(), part], "a label", &["before", "now"], |ago| format!("{ago} ago")).into_string();
        assert_eq!(drawn.matches("<rect").count(), 3, "{drawn}");
        assert!(drawn.contains("<title>0 ago: 10 B from peers, 30 B from mirrors, 7 B given</title>"), "{drawn}");
        assert!(!drawn.contains("NaN") && !drawn.contains("inf") && !drawn.contains("style="), "{drawn}");
        let empty = chart(&[Totals::default(); 60], "a label", &["before", "now"], |_| String::new()).into_string();
        assert!(!empty.contains("<rect") && !empty.contains("NaN"), "{empty}");
    }
}
