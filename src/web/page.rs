//! The status page: plain HTML that needs no script to be read. The script only asks for it again, and puts in the sections that
//! have changed; each has an id for that.

use super::chart;
use crate::control::{Download, InstallStatus, MountStatus, SourceBytes, UpdateStatus};
use crate::facts::{Facts, Totals};
use indicatif::{HumanBytes, HumanCount};
use maud::{DOCTYPE, Markup, PreEscaped, html};
use poolfs_core::discretion::Rule;
use poolfs_net::node::{FamilySnapshot, Snapshot};
use poolfs_net::swarm::driver::PeerRow;

/// Downloads shown; the rest is counted.
const DOWNLOADS_MAX: usize = 50;

/// What the chart shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Span {
    /// The last hour, by minute.
    Hour,
    /// The last day, by half hour.
    Day,
}

impl Span {
    /// As the query says; the hour where it says nothing.
    pub fn of(query: Option<&str>) -> Self {
        if query == Some("day") { Self::Day } else { Self::Hour }
    }
}

/// The whole page.
pub fn page(facts: &Facts, span: Span) -> Markup {
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta name="color-scheme" content="light dark";
                title { "poolfs on " (facts.host) }
                link rel="icon" href="/icon.svg" type="image/svg+xml";
                link rel="stylesheet" href="/style.css";
                script src="/live.js" defer {}
                noscript { meta http-equiv="refresh" content="10"; }
            }
            body {
                (header(facts))
                main {
                    (problems(facts))
                    (summary(facts))
                    (downloads(&facts.status.downloads))
                    (traffic(facts, span))
                    (mounts(facts))
                    (runs(facts))
                    (peers(facts))
                    (network(facts))
                    (withheld(facts))
                }
                footer {
                    p {
                        a href="/metrics" { "metrics for Prometheus" } " · " a href="/facts.json" { "everything here as JSON" } " · "
                        a href="/health" { "health" } " · " a href="/ready" { "readiness" }
                    }
                    p { "Counted since the daemon started. " code { "poolfs why FILE" } " tells where one file came from." }
                }
            }
        }
    }
}

fn header(facts: &Facts) -> Markup {
    let status = &facts.status;
    let (class, word) = match (facts.ailments().is_empty(), facts.unready().is_empty(), status.problems.is_empty()) {
        (false, ..) => ("bad", "does not answer"),
        (_, false, _) => ("wait", "starting"),
        (_, _, false) => ("wait", "needs a look"),
        _ => ("good", "all is well"),
    };
    html! {
        header #head data-live {
            div .name { (PreEscaped(super::ICON)) div { h1 { "poolfs" } p { (facts.host) } } }
            div .state {
                p .pill .(class) { (word) }
                p .muted { "version " (status.version) ", up " (duration(status.uptime_s)) span .lost { " · not answering now" } }
            }
        }
    }
}

fn problems(facts: &Facts) -> Markup {
    let mut lines = facts.unready();
    lines.extend(facts.status.problems.iter().cloned());
    html! {
        section #problems data-live {
            @if !lines.is_empty() {
                div .notice {
                    h2 { "To look at" }
                    ul { @for line in &lines { li { (line) } } }
                    p .muted { code { "poolfs doctor" } " names the command that mends what is wrong." }
                }
            }
        }
    }
}

fn summary(facts: &Facts) -> Markup {
    let status = &facts.status;
    let SourceBytes { mirror, peer, delta } = status.bytes;
    let received = mirror + peer + delta;
    let spared = peer + delta;
    let files: u64 = status.mounts.iter().map(|mount| mount.files).sum();
    let bytes: u64 = status.mounts.iter().map(|mount| mount.bytes).sum();
    html! {
        section #summary data-live .tiles {
            div .tile .wide {
                h2 { "Received" }
                p .figure { (amount(received)) }
                (share(&[("peer", peer), ("delta", delta), ("mirror", mirror)]))
                dl .key {
                    div { dt .peer { "peers" } dd #bytes-peer { (amount(peer)) } }
                    div { dt .delta { "deltas" } dd #bytes-delta { (amount(delta)) } }
                    div { dt .mirror { "mirrors" } dd #bytes-mirror { (amount(mirror)) } }
                }
            }
            div .tile {
                h2 { "Not asked of mirrors" }
                p .figure { (percent(spared, received)) }
                p .muted { "of what arrived" }
            }
            div .tile {
                h2 { "Given to peers" }
                p .figure #bytes-given { (amount(status.uploaded.bytes)) }
                p .muted { (amount(status.uploaded.bytes_outside)) " of it outside" }
            }
            div .tile {
                h2 { "Files here" }
                p .figure { (count(files)) }
                p .muted { (amount(bytes)) ", every block checked when read" }
            }
        }
    }
}

/// A bar of parts, which are in the order of their names' classes.
fn share(parts: &[(&'static str, u64)]) -> Markup {
    let all: u64 = parts.iter().map(|(_, bytes)| bytes).sum();
    let mut from = 0.0;
    #[allow(clippy::cast_precision_loss, reason = "points of a picture")]
    let placed: Vec<_> = parts
        .iter()
        .filter(|(_, bytes)| *bytes > 0)
        .map(|(class, bytes)| {
            let wide = *bytes as f64 / all as f64 * 100.0;
            from += wide;
            (class, from - wide, wide)
        })
        .collect();
    html! {
        svg .share viewBox="0 0 100 4" preserveAspectRatio="none" aria-hidden="true" {
            rect .none x="0" y="0" width="100" height="4" {}
            @for (class, from, wide) in placed { rect .(class) x=(format!("{from:.2}")) y="0" width=(format!("{wide:.2}")) height="4" {} }
        }
    }
}

fn downloads(downloads: &[Download]) -> Markup {
    html! {
        section #downloads data-live .card {
            h2 { "Downloads in progress " span .count { (downloads.len()) } }
            @if downloads.is_empty() {
                p .empty { "Nothing is arriving. Files come when apt, or anybody, opens them." }
            } @else {
                div .scroll { table {
                    thead { tr { th scope="col" { "File" } th scope="col" .bar { "Progress" } th scope="col" .n { "Here" } th scope="col" .n .extra { "Size" }
                        th scope="col" .n { "Rate" } th scope="col" .extra { "From" } } }
                    tbody { @for download in downloads.iter().take(DOWNLOADS_MAX) {
                        tr data-digest=(download.digest) {
                            th scope="row" .file { (download.name) }
                            td .bar { progress value=(download.done_bytes) max=(download.size.max(1)) { (percent(download.done_bytes, download.size)) } }
                            td .n .done { (amount(download.done_bytes)) }
                            td .n .extra .size { (amount(download.size)) }
                            td .n { (amount(download.rate_bytes_s)) "/s" }
                            td .extra { @if download.givers.is_empty() { span .muted { "nobody yet" } } @else { (givers(&download.givers)) } }
                        }
                    } }
                } }
                @if downloads.len() > DOWNLOADS_MAX { p .muted { "and " (downloads.len() - DOWNLOADS_MAX) " more" } }
            }
        }
    }
}

fn givers(givers: &[String]) -> String {
    match givers {
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
        [] => String::new(),
    }
}

fn traffic(facts: &Facts, span: Span) -> Markup {
    let (parts, label, ticks): (_, _, &[_]) = match span {
        Span::Hour => (&facts.hour, "Bytes of the last hour by source", &["60 min ago", "40", "20", "now"]),
        Span::Day => (&facts.day, "Bytes of the last day by source", &["24 h ago", "18", "12", "6", "now"]),
    };
    let ago = |ago: usize| match (span, ago) {
        (Span::Hour, 0) => "this minute".to_owned(),
        (Span::Hour, ago) => format!("{ago} min ago"),
        (Span::Day, 0) => "the last half hour".to_owned(),
        (Span::Day, ago) => format!("{} min ago", ago * 30),
    };
    let mut sum = Totals::default();
    for part in parts {
        sum = Totals {
            mirror: sum.mirror + part.mirror,
            peer: sum.peer + part.peer,
            delta: sum.delta + part.delta,
            given: sum.given + part.given,
        };
    }
    let tab = |one: Span, href: &str, word: &str| html! { a href=(href) aria-current=[(one == span).then_some("true")] { (word) } };
    html! {
        section #traffic data-live .card {
            div .head {
                h2 { "Bytes by source" }
                nav aria-label="Time shown" { (tab(Span::Hour, "/", "hour")) (tab(Span::Day, "/?day", "day")) }
            }
            (chart::chart(parts, label, ticks, ago))
            p .legend {
                span .peer { "from peers" } span .delta { "from deltas" } span .mirror { "from mirrors" } span .given { "given, below the line" }
            }
            p .muted #traffic-sum data-mirror=(sum.mirror) data-peer=(sum.peer) data-delta=(sum.delta) data-given=(sum.given) { "In all: " (chart::words(&sum)) "." }
        }
    }
}

fn mounts(facts: &Facts) -> Markup {
    let status = &facts.status;
    html! {
        section #mounts data-live .card {
            h2 { "Mounts, and their files by who may have them" }
            @if status.mounts.is_empty() {
                p .empty { "Nothing is mounted." }
            } @else {
                div .scroll { table .cards {
                    thead { tr { th scope="col" { "Directory" } th scope="col" .n { "Files" } th scope="col" .n .extra { "Bytes" } th scope="col" .n { "Announced" }
                        th scope="col" .n { "Available" } th scope="col" .n { "Local only" } th scope="col" .n { "Withheld" } th scope="col" .n { "Damaged" }
                        th scope="col" .n .extra { "Answers in" } } }
                    tbody { @for mount in &status.mounts { (mount_row(facts, mount)) } }
                } }
                p .muted {
                    "Opened before they were here: " (count(status.mounts.iter().map(|mount| mount.ghosts_opened).sum())) ". Blocks checked: "
                    (count(status.mounts.iter().map(|mount| mount.blocks_checked).sum())) ", of which bad "
                    (count(status.mounts.iter().map(|mount| mount.blocks_bad).sum())) ", mended "
                    (count(status.mounts.iter().map(|mount| mount.blocks_mended).sum())) ". Kept after apt removed them: " (amount(status.objects_bytes)) " of "
                    (amount(status.objects_quota_bytes)) ". apt's lists name " (count(status.catalog_entries)) " files."
                }
            }
        }
    }
}

fn mount_row(facts: &Facts, mount: &MountStatus) -> Markup {
    let answered = facts.answers.iter().find(|answered| answered.path == mount.path);
    html! {
        tr data-role=(mount.role) {
            th scope="row" { span .path { (mount.path.display()) } }
            td .n .files data-label="files" { (count(mount.files)) }
            td .n .extra { (amount(mount.bytes)) }
            td .n .announced data-label="announced" { (count(mount.announced)) }
            td .n .available data-label="available" { (count(mount.available)) }
            td .n .local data-label="local only" { (count(mount.local_only)) }
            td .n .withheld data-label="withheld" { (count(mount.withheld)) }
            td .n .damaged .alarm[mount.damaged > 0] data-label="damaged" { (count(mount.damaged)) }
            td .n .extra { @match answered {
                Some(answered) if answered.age_ms > crate::facts::ANSWER_AGE_MAX_MS => { span .alarm { "not for " (duration(answered.age_ms / 1000)) } }
                Some(answered) if answered.took_us > 0 => { (format!("{:.1} ms", f64::from(u32::try_from(answered.took_us).unwrap_or(u32::MAX)) / 1e3)) }
                _ => { "–" }
            } }
        }
    }
}

fn runs(facts: &Facts) -> Markup {
    html! {
        section #runs data-live .pair {
            div .card #update {
                h2 { "Last update" }
                @match &facts.status.last_update {
                    Some(UpdateStatus { started, took_ms, running, bytes, kept_bytes, apt_bytes, indexes, patches }) => {
                        p { (when(*started, facts.at)) ", " @if *running { "running for " } (seconds(*took_ms)) ": " (many(*indexes, "index", "indexes")) ", "
                            (many(*patches, "patch", "patches")) }
                        (sources(bytes, *kept_bytes, *apt_bytes))
                    }
                    None => { p .empty { "None since the daemon started." } }
                }
            }
            div .card #install {
                h2 { "Last install" }
                @match &facts.status.last_install {
                    Some(InstallStatus { started, took_ms, running, packages, bytes, kept_bytes, apt_bytes }) => {
                        p { (when(*started, facts.at)) ", " @if *running { "running for " } (seconds(*took_ms)) ": " (many(*packages, "package", "packages")) }
                        (sources(bytes, *kept_bytes, *apt_bytes))
                    }
                    None => { p .empty { "None since the daemon started." } }
                }
            }
        }
    }
}

/// Where the bytes of a run came from.
fn sources(bytes: &SourceBytes, kept: u64, apt: u64) -> Markup {
    let parts = [
        ("peer", "peers", bytes.peer),
        ("delta", "deltas", bytes.delta),
        ("kept", "kept here", kept),
        ("mirror", "mirrors", bytes.mirror),
        ("apt", "apt itself", apt),
    ];
    html! {
        (share(&parts.map(|(class, _, bytes)| (class, bytes))))
        dl .key { @for (class, word, bytes) in parts { @if bytes > 0 { div { dt .(class) { (word) } dd { (amount(bytes)) } } } } }
    }
}

fn peers(facts: &Facts) -> Markup {
    let known = facts.standing.credited + facts.standing.unknown + facts.standing.out;
    html! {
        section #peers data-live .card {
            h2 { "Peers that gave something " span .count { (known) } }
            @if facts.peers.is_empty() {
                p .empty { "None yet. Machines on the same network find each other by themselves." }
            } @else {
                div .scroll { table {
                    thead { tr { th scope="col" { "Peer" } th scope="col" { "Standing" } th scope="col" .n { "Gave" } th scope="col" .n .extra { "Pieces" }
                        th scope="col" .n .extra { "Rate" } th scope="col" .n .extra { "First byte" } th scope="col" .n .extra { "Failures" } } }
                    tbody { @for peer in &facts.peers { (peer_row(peer, facts.at)) } }
                } }
                @if known > facts.peers.len() as u64 { p .muted { "and " (known - facts.peers.len() as u64) " more: " code { "poolfs peers" } } }
            }
        }
    }
}

fn peer_row(peer: &PeerRow, now: u64) -> Markup {
    let (class, standing) = match peer {
        PeerRow { out_until, .. } if *out_until > now => ("bad", format!("out for {}: gave wrong bytes", duration(out_until - now))),
        PeerRow { bad, .. } if *bad > 0 => ("wait", format!("{bad} wrong pieces")),
        PeerRow { false_lists, .. } if *false_lists > 0 => ("wait", format!("{false_lists} false lists")),
        PeerRow { credited: true, .. } => ("good", "credited".to_owned()),
        _ => ("plain", "unknown".to_owned()),
    };
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shown to people")]
    let rate = peer.rate_bytes_s as u64;
    html! {
        tr data-peer=(peer.address) {
            th scope="row" { span .path { (peer.address) } }
            td { span .pill .small .(class) { (standing) } }
            td .n .gave { (amount(peer.bytes)) }
            td .n .extra { (count(peer.pieces)) }
            td .n .extra { (amount(rate)) "/s" }
            td .n .extra { (format!("{:.0} ms", peer.latency_s * 1e3)) }
            td .n .extra { (format!("{:.1}", peer.failures)) }
        }
    }
}

fn network(facts: &Facts) -> Markup {
    html! {
        section #network data-live .card {
            h2 { "Network" }
            @match &facts.status.node {
                None => p .empty { "The DHT's node does not run: files come from mirrors." },
                Some(node) => (node_table(node, facts)),
            }
        }
    }
}

fn node_table(node: &Snapshot, facts: &Facts) -> Markup {
    let families: Vec<(&str, &FamilySnapshot)> =
        [("IPv4", &node.v4), ("IPv6", &node.v6)].into_iter().filter_map(|(name, family)| Some((name, family.as_ref()?))).collect();
    let time =
        |us: Option<u64>| us.map_or_else(|| "–".to_owned(), |us| if us < 1000 { "< 1 ms".to_owned() } else { format!("{} ms", us / 1000) });
    html! {
        div .scroll { table {
            thead { tr { th scope="col" { "Family" } th scope="col" .extra { "Listens at" } th scope="col" .n { "Nodes" } th scope="col" .n { "Good" } th scope="col" .n { "poolfs" }
                th scope="col" .n { "Round trip" } th scope="col" .extra { "Seen as" } } }
            tbody { @for (name, family) in families { tr {
                th scope="row" { (name) }
                td .extra { span .path { (family.listen) } }
                td .n .nodes { (count(family.nodes as u64)) }
                td .n { (count(family.good as u64)) }
                td .n { (count(family.poolfs as u64)) }
                td .n { (time(family.rtt_us)) }
                td .extra { @match family.seen_as { Some(ip) => { span .path { (ip) } }, None => { "–" } } }
            } } }
        } }
        dl .facts {
            div { dt { "Reached by another node" } dd { (if node.reachable { "yes" } else { "not yet" }) } }
            div { dt { "Files announced" } dd #announced-keys { (count(node.announced_keys as u64)) } }
            div { dt { "Lookups, median" } dd { (time(node.lookup_p50_us)) } }
            div { dt { "95 of 100 within" } dd { (time(node.lookup_p95_us)) } }
            div { dt { "Kept for others" } dd { (count((node.stored_contacts + node.stored_items + node.stored_statements) as u64)) } }
            div { dt { "Traffic, a second" } dd { (rate(node.rates.bytes_in)) " in, " (rate(node.rates.bytes_out)) " out" } }
            div { dt { "Members of the fleet" } dd { @if facts.status.fleet_members == 0 { "of none" } @else { (count(facts.status.fleet_members as u64)) } } }
            div { dt { "Connections of peers" } dd { (count(facts.status.uploaded.connections)) } }
        }
    }
}

fn withheld(facts: &Facts) -> Markup {
    let all: u64 = facts.status.mounts.iter().map(|mount| mount.withheld).sum();
    html! {
        section #withheld data-live .card {
            h2 { "Withheld from strangers " span .count { (all) } }
            @if facts.withheld.is_empty() {
                p .empty { "Nothing. What is superseded or vulnerable, or named by lists that are too old, would stand here." }
            } @else {
                div .scroll { table {
                    thead { tr { th scope="col" { "File" } th scope="col" .n .extra { "Size" } th scope="col" { "Rule" } th scope="col" .extra { "Why" } } }
                    tbody { @for row in &facts.withheld { tr {
                        th scope="row" .file { (row.name) }
                        td .n .extra { (amount(row.bytes)) }
                        td { (row.rule) }
                        td .extra { (why(row.rule)) }
                    } } }
                } }
                @if all > facts.withheld.len() as u64 { p .muted { "and " (all - facts.withheld.len() as u64) " more: " code { "poolfs ls" } } }
            }
            @for line in &facts.status.advisories { p .muted { "Advisories: " (line) } }
        }
    }
}

fn why(rule: Rule) -> &'static str {
    match rule {
        Rule::Private => "its repository needs credentials, or it is named as private",
        Rule::Unlisted => "no list names it",
        Rule::Security => "a security suite has a newer version",
        Rule::Advisory => "an advisory names its version",
        Rule::Superseded => "a list names a newer version",
        Rule::Expired => "its list is past its Valid-Until",
        Rule::OldList => "its list was not looked up for 7 days",
        Rule::OldSecurity => "the security suite was not looked up for 3 days",
        Rule::Arriving => "apt is fetching it",
        Rule::Current => "it is the newest",
    }
}

/// Bytes for people, with the exact number for programs.
fn amount(bytes: u64) -> Markup {
    html! { data value=(bytes) { (HumanBytes(bytes)) } }
}

fn count(number: u64) -> Markup {
    html! { data value=(number) { (HumanCount(number)) } }
}

fn many(number: u64, one: &str, more: &str) -> Markup {
    html! { (count(number)) " " (if number == 1 { one } else { more }) }
}

fn percent(part: u64, whole: u64) -> String {
    if whole == 0 { "–".to_owned() } else { format!("{} %", u128::from(part) * 100 / u128::from(whole)) }
}

fn rate(bytes_s: f64) -> String {
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "shown to people")]
    let bytes = bytes_s as u64;
    HumanBytes(bytes).to_string()
}

fn seconds(ms: u64) -> String {
    if ms < 60_000 { format!("{}.{} s", ms / 1000, ms % 1000 / 100) } else { duration(ms / 1000) }
}

/// The two largest units.
fn duration(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} d {} h", seconds / 86_400, seconds % 86_400 / 3600),
    }
}

/// A time as its distance from now.
fn when(at: u64, now: u64) -> Markup {
    let stamp = jiff::Timestamp::from_second(at.cast_signed()).map(|at| at.to_string()).unwrap_or_default();
    html! { time datetime=(stamp) title=(stamp) { @if now <= at + 1 { "just now" } @else { (duration(now - at)) " ago" } } }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A package's name comes from a list, a peer's words from a stranger: on the page they are text.
    #[test]
    fn what_others_wrote_is_text() {
        let mut facts = Facts { host: "<b>".into(), judged: true, at: 100, ..Facts::default() };
        let evil = "<script>alert(1)</script>\"'&";
        facts.status.problems.push(evil.into());
        facts.status.downloads.push(Download {
            name: evil.into(),
            digest: "\"><img src=x>".into(),
            size: 0,
            done_bytes: 0,
            rate_bytes_s: 0,
            givers: vec![evil.into()],
        });
        facts.withheld.push(crate::facts::Withheld {
            role: poolfs_core::Role::Archives,
            name: evil.into(),
            bytes: 1,
            rule: Rule::Security,
        });
        let page = page(&facts, Span::Hour).into_string();
        assert!(!page.contains("<script>alert") && !page.contains("<img") && !page.contains("<b>"), "{page}");
        assert_eq!(page.matches("<script").count(), 1, "the page's own");
        assert!(!page.contains(" style=") && !page.contains(" onload="), "the policy forbids these");
    }

    /// Everything that changes has a name by which the script puts it in, each once.
    #[test]
    fn live_sections_have_names() {
        let page = page(&Facts::default(), Span::Day).into_string();
        let ids: Vec<_> = page.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        let unique: std::collections::BTreeSet<_> = ids.iter().collect();
        assert_eq!(ids.len(), unique.len(), "{ids:?}");
        assert_eq!(page.matches("data-live").count(), 10);
        assert!(page.contains("aria-current=\"true\">day</a>"), "{page}");
    }

    #[test]
    fn times_for_people() {
        assert_eq!([0, 59, 60, 3599, 3660, 90_000].map(duration), ["0 s", "59 s", "1 min", "59 min", "1 h 1 min", "1 d 1 h"]);
        assert_eq!([999, 59_900, 60_000].map(seconds), ["0.9 s", "59.9 s", "1 min"]);
        assert_eq!((percent(1, 3), percent(0, 0)), ("33 %".to_owned(), "–".to_owned()));
        assert_eq!(when(0, 60).into_string(), "<time datetime=\"1970-01-01T00:00:00Z\" title=\"1970-01-01T00:00:00Z\">1 min ago</time>");
    }
}
