//! `poolfs peers` and `poolfs why`: who gave what.

use crate::config::Config;
use crate::control::{Call, Reply, Request, Why};
use crate::show;
use anyhow::{Context, Result, bail};
use indicatif::{HumanBytes, HumanDuration};
use poolfs_core::Digest;
use poolfs_net::reputation::StatementRow;
use poolfs_net::reputation::ledger::Standing;
use poolfs_net::swarm::driver::PeerRow;
use std::fmt::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Lists the peers.
pub fn peers(config: &Config, json: bool) -> Result<ExitCode> {
    let Some(Reply::Peers(rows)) = Call::start(&config.control.socket, &Request::Peers)?.next()? else {
        bail!("the daemon gave another answer than the peers: is it of another version?")
    };
    if json {
        show::json(&rows)?;
    } else if rows.is_empty() {
        show::line("no peer has given anything yet");
    } else {
        show::line("peer                          rate        latency  failures  pieces  bytes       standing");
        rows.iter().for_each(|row| show::line(&peer_line(row)));
    }
    Ok(ExitCode::SUCCESS)
}

/// Lists what is said of peers.
pub fn statements(config: &Config, json: bool) -> Result<ExitCode> {
    let Some(Reply::Statements(rows)) = Call::start(&config.control.socket, &Request::Statements)?.next()? else {
        bail!("the daemon gave another answer than the statements: is it of another version?")
    };
    if json {
        show::json(&rows)?;
    } else if rows.is_empty() {
        show::line("nothing was proved of a peer here, and nothing was heard of one that has given something");
    } else {
        show::line("of (key)          by                says         file              age         what it came to here");
        rows.iter().for_each(|row| show::line(&statement_line(row)));
    }
    Ok(ExitCode::SUCCESS)
}

fn statement_line(row: &StatementRow) -> String {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let standing = match row.standing {
        Standing::Own => "proved and said by this machine",
        Standing::Proved => "its proof was checked with a file here: the peer is unknown again",
        Standing::Fleet => "said by a member of the fleet: the peer is unknown again",
        Standing::NoCopy => "no weight: the file that would tell is not here",
        Standing::Wrong => "no weight: its proof proves nothing",
        Standing::Unavailable => "no weight: nobody gives its proof",
        Standing::Unproved => "no weight: of a stranger, and without a proof",
    };
    let short = |text: &str| text.chars().take(16).collect::<String>();
    let age = HumanDuration(Duration::from_secs(now_s.saturating_sub(row.time_s))).to_string();
    let by = if row.standing == Standing::Own { "this machine".to_owned() } else { short(&row.speaker) };
    let file = row.digest.as_deref().map_or_else(|| "-".to_owned(), short);
    format!("{:<16}  {by:<16}  {:<11}  {file:<16}  {age:<10}  {standing}", short(&row.subject), row.kind)
}

fn peer_line(row: &PeerRow) -> String {
    let now_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let standing = match row {
        PeerRow { out_until, .. } if *out_until > now_s => {
            format!("out for {} more: gave wrong bytes", HumanDuration(Duration::from_secs(out_until - now_s)))
        }
        PeerRow { bad, .. } if *bad > 0 => format!("{bad} wrong pieces"),
        PeerRow { false_lists, .. } if *false_lists > 0 => format!("{false_lists} false lists of pieces"),
        PeerRow { credited: true, .. } => "credited".to_owned(),
        _ => "unknown".to_owned(),
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shown to people")]
    let rate = HumanBytes(row.rate_bytes_s as u64).to_string();
    let bytes = HumanBytes(row.bytes).to_string();
    format!(
        "{:<28}  {:<10}  {:>4.0} ms  {:>8.1}  {:>6}  {:<10}  {standing}",
        row.address.to_string(),
        format!("{rate}/s"),
        row.latency_s * 1000.0,
        row.failures,
        row.pieces,
        bytes
    )
}

/// Says where one file came from.
pub fn why(config: &Config, file: &Path, json: bool) -> Result<ExitCode> {
    let is_digest = file.to_str().is_some_and(|text| text.parse::<Digest>().is_ok());
    let file = if is_digest { file.to_owned() } else { file.canonicalize().with_context(|| format!("find {}", file.display()))? };
    let Some(Reply::Why(why)) = Call::start(&config.control.socket, &Request::Why { file })?.next()? else {
        bail!("the daemon gave another answer than where the file came from: is it of another version?")
    };
    if json {
        show::json(&why)?;
    } else {
        show::line(why_text(&why).trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

fn why_text(why: &Why) -> String {
    let mut text = format!("{}\n", why.file.display());
    let mut line = |name: &str, value: &str| {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {name:<9} {value}");
    };
    let or = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
    line("digest", &or(&why.digest));
    if why.state.is_some() {
        line("state", &or(&why.state));
        line("sharing", &or(&why.sharing));
        line("rule", &or(&why.rule));
        line("source", &or(&why.source));
    }
    if let Some(delta) = &why.delta {
        line("delta", delta);
    }
    if why.verified_at > 0 {
        let ago = SystemTime::now().duration_since(UNIX_EPOCH + Duration::from_secs(why.verified_at.unsigned_abs())).unwrap_or_default();
        line("verified", &format!("{} ago", HumanDuration(ago)));
    }
    match &why.history {
        Some(history) => {
            line("pieces", &format!("of {}", HumanBytes(u64::from(history.piece_bytes))));
            for (giver, pieces) in &history.givers {
                line("", &format!("{giver}: {}", ranges(pieces)));
            }
        }
        None => line("pieces", "not remembered: it was not downloaded since the daemon started"),
    }
    text
}

/// Ascending numbers as `0-3, 5`.
fn ranges(pieces: &[u32]) -> String {
    let mut text = String::new();
    let mut rest = pieces;
    while let Some(first) = rest.first() {
        let run = rest.iter().zip(*first..).take_while(|(have, expected)| **have == *expected).count();
        if !text.is_empty() {
            text.push_str(", ");
        }
        match rest.get(run - 1) {
            Some(last) if last != first => text.push_str(&format!("{first}-{last}")),
            _ => text.push_str(&first.to_string()),
        }
        rest = &rest[run..];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Who gave which piece is read by people who look for a culprit: a range one off names another one.
    #[test]
    fn pieces_as_ranges() {
        for (pieces, want) in
            [(&[][..], ""), (&[7], "7"), (&[0, 1], "0-1"), (&[0, 2, 4], "0, 2, 4"), (&[1, 2, 3, 7, 9, 10], "1-3, 7, 9-10")]
        {
            assert_eq!(ranges(pieces), want);
        }
    }
}
