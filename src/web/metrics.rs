//! The metrics, in Prometheus's text format: one table of names, and where in [`Facts`] each has its values.
//!
//! Labels have a few fixed values each: their number does not grow with peers, files or time.

use crate::control::{MountStatus, Status};
use crate::facts::Facts;
use anyhow::{Context as _, Result};
use poolfs_net::node::{FamilySnapshot, Snapshot};
use prometheus::core::{Collector, Desc};
use prometheus::proto::{Counter, Gauge, LabelPair, Metric as Sample, MetricFamily, MetricType};
use prometheus::{Registry, TextEncoder};
use std::collections::HashMap;

/// One metric.
pub struct Metric {
    /// With its unit; a counter ends in `_total`.
    pub name: &'static str,
    /// What it counts or measures.
    pub help: &'static str,
    /// Label names, with their values in the order of [`Self::read`].
    pub labels: &'static [&'static str],
    read: fn(&Facts, &mut Samples),
}

/// The values of one metric, each with the values of its labels.
#[derive(Default)]
struct Samples(Vec<(Vec<String>, f64)>);

impl Samples {
    fn put(&mut self, labels: &[&str], value: f64) {
        self.0.push((labels.iter().map(|&label| label.to_owned()).collect(), value));
    }
}

#[allow(clippy::cast_precision_loss, reason = "Prometheus knows doubles only")]
const fn number(value: u64) -> f64 {
    value as f64
}

#[allow(clippy::cast_precision_loss, reason = "as above")]
const fn size(value: usize) -> f64 {
    value as f64
}

fn each_mount(facts: &Facts, out: &mut Samples, value: impl Fn(&MountStatus) -> f64) {
    for mount in &facts.status.mounts {
        out.put(&[mount.role.as_str()], value(mount));
    }
}

fn node(facts: &Facts, out: &mut Samples, value: impl Fn(&Snapshot) -> f64) {
    out.put(&[], facts.status.node.as_ref().map_or(0.0, value));
}

fn families(facts: &Facts) -> impl Iterator<Item = (&'static str, Option<&FamilySnapshot>)> {
    let node = facts.status.node.as_ref();
    [("ipv4", node.and_then(|node| node.v4.as_ref())), ("ipv6", node.and_then(|node| node.v6.as_ref()))].into_iter()
}

/// `[("in", a), ("out", b)]` as samples.
fn put_all<const N: usize>(out: &mut Samples, values: [(&str, f64); N]) {
    for (label, value) in values {
        out.put(&[label], value);
    }
}

fn seconds_ms(ms: u64) -> f64 {
    number(ms) / 1e3
}

fn seconds_us(us: Option<u64>) -> f64 {
    us.map_or(f64::NAN, |us| number(us) / 1e6)
}

const fn of(name: &'static str, help: &'static str, labels: &'static [&'static str], read: fn(&Facts, &mut Samples)) -> Metric {
    Metric { name, help, labels, read }
}

/// Every metric there is.
pub const METRICS: &[Metric] = &[
    of("poolfs_build_info", "Always 1; the version is the label.", &["version"], |facts, out| out.put(&[&facts.status.version], 1.0)),
    of("poolfs_uptime_seconds", "Since the serving process started.", &[], |facts, out| out.put(&[], number(facts.status.uptime_s))),
    of("poolfs_healthy", "1 while every mount answers, as /health says.", &[], |facts, out| {
        out.put(&[], f64::from(u8::from(facts.ailments().is_empty())));
    }),
    of("poolfs_ready", "1 while something is mounted, answers, and was judged by apt's lists, as /ready says.", &[], |facts, out| {
        out.put(&[], f64::from(u8::from(facts.unready().is_empty())));
    }),
    of("poolfs_problems", "Problems that `poolfs status` names.", &[], |facts, out| out.put(&[], size(facts.status.problems.len()))),
    of("poolfs_mount_answer_age_seconds", "Since the mount last answered.", &["mount"], |facts, out| {
        answers(facts, out, |answered| seconds_ms(answered.age_ms));
    }),
    of("poolfs_mount_answer_seconds", "What the mount's last answer took.", &["mount"], |facts, out| {
        answers(facts, out, |answered| number(answered.took_us) / 1e6);
    }),
    of("poolfs_files", "Files on disk by who may have them; damaged ones failed a checksum.", &["mount", "state"], |facts, out| {
        for mount in &facts.status.mounts {
            for (state, count) in [
                ("announced", mount.announced),
                ("available", mount.available),
                ("local_only", mount.local_only),
                ("withheld", mount.withheld),
                ("damaged", mount.damaged),
            ] {
                out.put(&[mount.role.as_str(), state], number(count));
            }
        }
    }),
    of("poolfs_files_bytes", "Bytes of all files on disk.", &["mount"], |facts, out| each_mount(facts, out, |mount| number(mount.bytes))),
    of("poolfs_ghosts_opened_total", "Files that arrived because somebody opened them.", &["mount"], |facts, out| {
        each_mount(facts, out, |mount| number(mount.ghosts_opened));
    }),
    of("poolfs_blocks_checked_total", "Blocks that matched their checksum when they were read.", &["mount"], |facts, out| {
        each_mount(facts, out, |mount| number(mount.blocks_checked));
    }),
    of("poolfs_blocks_bad_total", "Blocks that did not.", &["mount"], |facts, out| {
        each_mount(facts, out, |mount| number(mount.blocks_bad));
    }),
    of("poolfs_blocks_mended_total", "Of these, blocks that were fetched again.", &["mount"], |facts, out| {
        each_mount(facts, out, |mount| number(mount.blocks_mended));
    }),
    of("poolfs_files_hashed_total", "Files hashed from first to last byte.", &[], |facts, out| out.put(&[], number(facts.status.hashed))),
    of("poolfs_catalog_files", "Files that apt's lists name.", &[], |facts, out| out.put(&[], number(facts.status.catalog_entries))),
    of("poolfs_objects_bytes", "Bytes of packages kept after apt removed them.", &[], |facts, out| {
        out.put(&[], number(facts.status.objects_bytes));
    }),
    of("poolfs_objects_quota_bytes", "Bytes that they may take.", &[], |facts, out| out.put(&[], number(facts.status.objects_quota_bytes))),
    of("poolfs_received_bytes_total", "Bytes that arrived, by source.", &["source"], |facts, out| {
        let bytes = facts.status.bytes;
        put_all(out, [("mirror", number(bytes.mirror)), ("peer", number(bytes.peer)), ("delta", number(bytes.delta))]);
    }),
    of("poolfs_delta_saved_bytes_total", "Bytes that did not have to arrive, because of deltas.", &[], |facts, out| {
        out.put(&[], number(facts.status.delta_saved_bytes));
    }),
    of("poolfs_deltas_offered", "Deltas that are offered to others.", &[], |facts, out| out.put(&[], size(facts.status.deltas_offered))),
    of("poolfs_deltas_to_make", "Deltas that this machine is to make when it is idle.", &[], |facts, out| {
        out.put(&[], size(facts.status.deltas_to_make));
    }),
    of("poolfs_downloads", "Downloads in progress.", &[], |facts, out| out.put(&[], size(facts.status.downloads.len()))),
    of("poolfs_download_bytes_per_second", "Rate of all downloads in progress together.", &[], |facts, out| {
        out.put(&[], facts.status.downloads.iter().map(|download| number(download.rate_bytes_s)).sum());
    }),
    of("poolfs_last_run_timestamp_seconds", "When apt's last update or install began; 0: none since the start.", &["run"], |facts, out| {
        let Status { last_update, last_install, .. } = &facts.status;
        let update = last_update.as_ref().map_or(0, |update| update.started);
        put_all(out, [("update", number(update)), ("install", number(last_install.as_ref().map_or(0, |install| install.started)))]);
    }),
    of("poolfs_last_run_seconds", "What it took.", &["run"], |facts, out| {
        let Status { last_update, last_install, .. } = &facts.status;
        let update = last_update.as_ref().map_or(0, |update| update.took_ms);
        put_all(out, [("update", seconds_ms(update)), ("install", seconds_ms(last_install.as_ref().map_or(0, |install| install.took_ms)))]);
    }),
    of(
        "poolfs_last_run_bytes",
        "Its bytes by source; kept: here from before, apt: fetched by apt itself.",
        &["run", "source"],
        |facts, out| {
            let Status { last_update, last_install, .. } = &facts.status;
            let update = last_update.as_ref().map(|run| (run.bytes, run.kept_bytes, run.apt_bytes));
            let install = last_install.as_ref().map(|run| (run.bytes, run.kept_bytes, run.apt_bytes));
            for (run, (bytes, kept, apt)) in [("update", update.unwrap_or_default()), ("install", install.unwrap_or_default())] {
                for (source, bytes) in
                    [("mirror", bytes.mirror), ("peer", bytes.peer), ("delta", bytes.delta), ("kept", kept), ("apt", apt)]
                {
                    out.put(&[run, source], number(bytes));
                }
            }
        },
    ),
    of("poolfs_uploaded_bytes_total", "Bytes given to peers, by where they are.", &["scope"], |facts, out| {
        let given = &facts.status.uploaded;
        let inside = given.bytes.saturating_sub(given.bytes_outside);
        put_all(out, [("inside", number(inside)), ("outside", number(given.bytes_outside))]);
    }),
    of("poolfs_upload_requests_total", "Requests of peers, by how they ended.", &["result"], |facts, out| {
        let given = &facts.status.uploaded;
        put_all(
            out,
            [
                ("answered", number(given.answered)),
                ("not_found", number(given.not_found)),
                ("refused", number(given.refused)),
                ("damaged", number(given.damaged)),
            ],
        );
    }),
    of("poolfs_upload_connections", "Connections of peers.", &[], |facts, out| out.put(&[], number(facts.status.uploaded.connections))),
    of("poolfs_peers", "Peers that gave something, by how they stand.", &["standing"], |facts, out| {
        let standing = facts.standing;
        put_all(out, [("credited", number(standing.credited)), ("unknown", number(standing.unknown)), ("out", number(standing.out))]);
    }),
    of("poolfs_fleet_members", "Live members of the fleet with this machine; 0 where it is of none.", &[], |facts, out| {
        out.put(&[], size(facts.status.fleet_members));
    }),
    of("poolfs_fleet_told", "Files here of which all members of the fleet that coordinate them were told.", &[], |facts, out| {
        out.put(&[], size(facts.status.fleet_told));
    }),
    of("poolfs_dht_up", "1 while the DHT's node runs.", &[], |facts, out| node(facts, out, |_| 1.0)),
    of("poolfs_dht_reachable", "1 once another node has reached this one.", &[], |facts, out| {
        node(facts, out, |node| f64::from(u8::from(node.reachable)));
    }),
    of(
        "poolfs_dht_nodes",
        "Nodes in the routing table; good: heard of lately, poolfs: of this program.",
        &["family", "kind"],
        |facts, out| {
            for (family, found) in families(facts) {
                let counts = found.map_or([0; 3], |found| [found.nodes, found.good, found.poolfs]);
                for (kind, count) in ["known", "good", "poolfs"].into_iter().zip(counts) {
                    out.put(&[family, kind], size(count));
                }
            }
        },
    ),
    of("poolfs_dht_round_trip_seconds", "Smoothed round trip to other nodes; NaN before the first.", &["family"], |facts, out| {
        for (family, found) in families(facts) {
            out.put(&[family], seconds_us(found.and_then(|found| found.rtt_us)));
        }
    }),
    of("poolfs_dht_lookups", "Lookups under way.", &[], |facts, out| node(facts, out, |node| size(node.lookups))),
    of("poolfs_dht_lookup_seconds", "Last lookups to their first contact; NaN before the first.", &["percentile"], |facts, out| {
        let node = facts.status.node.as_ref();
        let times = [("50", node.and_then(|node| node.lookup_p50_us)), ("95", node.and_then(|node| node.lookup_p95_us))];
        put_all(out, times.map(|(percentile, us)| (percentile, seconds_us(us))));
    }),
    of("poolfs_dht_announced_keys", "Keys that this node announces.", &[], |facts, out| node(facts, out, |node| size(node.announced_keys))),
    of("poolfs_dht_stored", "What the node keeps for others.", &["kind"], |facts, out| {
        let node = facts.status.node.as_ref();
        let counts = node.map_or([0; 4], |node| [node.stored_keys, node.stored_contacts, node.stored_items, node.stored_statements]);
        for (kind, count) in ["keys", "contacts", "items", "statements"].into_iter().zip(counts) {
            out.put(&[kind], size(count));
        }
    }),
    of("poolfs_dht_datagrams_total", "Datagrams of the node.", &["direction"], |facts, out| {
        let counts = facts.status.node.as_ref().map_or((0, 0), |node| (node.datagrams_in, node.datagrams_out));
        put_all(out, [("in", number(counts.0)), ("out", number(counts.1))]);
    }),
    of("poolfs_dht_bytes_total", "Their bytes, without headers.", &["direction"], |facts, out| {
        let counts = facts.status.node.as_ref().map_or((0, 0), |node| (node.bytes_in, node.bytes_out));
        put_all(out, [("in", number(counts.0)), ("out", number(counts.1))]);
    }),
    of("poolfs_dht_queries_total", "Queries sent, without repetitions.", &[], |facts, out| {
        node(facts, out, |node| number(node.queries_out))
    }),
    of("poolfs_dht_repeated_total", "Repetitions of queries.", &[], |facts, out| node(facts, out, |node| number(node.repeated))),
    of("poolfs_dht_unreachable_total", "Queries that nobody answered in 14 s.", &[], |facts, out| {
        node(facts, out, |node| number(node.unreachable));
    }),
    of("poolfs_dht_dropped_total", "What the node did not take or could not send, by reason.", &["reason"], |facts, out| {
        let node = facts.status.node.as_ref();
        let counts = node.map_or([0; 4], |node| [node.malformed, node.limited, node.refused, node.unsent]);
        for (reason, count) in ["malformed", "limited", "refused", "unsent"].into_iter().zip(counts) {
            out.put(&[reason], number(count));
        }
    }),
];

/// For each mount with an answer, by its role.
fn answers(facts: &Facts, out: &mut Samples, value: impl Fn(&crate::facts::Answered) -> f64) {
    for mount in &facts.status.mounts {
        if let Some(answered) = facts.answers.iter().find(|answered| answered.path == mount.path) {
            out.put(&[mount.role.as_str()], value(answered));
        }
    }
}

/// One moment's facts, as a registry collects them.
struct Moment {
    families: Vec<MetricFamily>,
    descriptions: Vec<Desc>,
}

impl Collector for Moment {
    fn desc(&self) -> Vec<&Desc> {
        self.descriptions.iter().collect()
    }

    fn collect(&self) -> Vec<MetricFamily> {
        self.families.clone()
    }
}

fn family(metric: &Metric, facts: &Facts) -> Option<MetricFamily> {
    let mut samples = Samples::default();
    (metric.read)(facts, &mut samples);
    let is_counter = metric.name.ends_with("_total");
    let samples = samples.0.into_iter().map(|(values, value)| {
        let pair = |(name, value): (&&str, String)| {
            let mut pair = LabelPair::default();
            pair.set_name((*name).to_owned());
            pair.set_value(value);
            pair
        };
        let mut sample = Sample::from_label(metric.labels.iter().zip(values).map(pair).collect());
        if is_counter {
            let mut counter = Counter::default();
            counter.set_value(value);
            sample.set_counter(counter);
        } else {
            let mut gauge = Gauge::default();
            gauge.set_value(value);
            sample.set_gauge(gauge);
        }
        sample
    });
    let samples: Vec<_> = samples.collect();
    // Without a mount there is nothing to say of mounts.
    (!samples.is_empty()).then(|| {
        let mut family = MetricFamily::default();
        family.set_name(metric.name.to_owned());
        family.set_help(metric.help.to_owned());
        family.set_field_type(if is_counter { MetricType::COUNTER } else { MetricType::GAUGE });
        family.set_metric(samples);
        family
    })
}

/// All metrics of one moment.
pub fn text(facts: &Facts) -> Result<String> {
    let describe = |metric: &Metric| {
        let labels = metric.labels.iter().map(|&label| label.to_owned()).collect();
        Desc::new(metric.name.to_owned(), metric.help.to_owned(), labels, HashMap::new())
    };
    let moment = Moment {
        families: METRICS.iter().filter_map(|metric| family(metric, facts)).collect(),
        descriptions: METRICS.iter().map(describe).collect::<prometheus::Result<_>>().context("describe the metrics")?,
    };
    let registry = Registry::new();
    registry.register(Box::new(moment)).context("register the metrics")?;
    TextEncoder::new().encode_to_string(&registry.gather()).context("write the metrics")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;
    use std::collections::BTreeSet;

    fn facts() -> Facts {
        let mount = |role: &str, path: &str| -> MountStatus {
            let numbers = ["files", "bytes", "available", "local_only", "withheld", "ghosts_opened", "blocks_bad", "blocks_mended"];
            let mut all: serde_json::Map<_, _> = numbers.iter().map(|name| ((*name).to_owned(), 0.into())).collect();
            all.extend(
                [("role", role.into()), ("path", path.into()), ("announced", 3.into()), ("damaged", 1.into())]
                    .map(|(k, v)| (k.to_owned(), v)),
            );
            serde_json::from_value(all.into()).unwrap()
        };
        let mut facts = Facts { judged: true, ..Facts::default() };
        facts.status.version = "9.9 \"x\"".into();
        facts.status.mounts = vec![mount("archives", "/a"), mount("lists", "/b")];
        facts.status.bytes.peer = 1 << 60;
        facts.answers = ["/a", "/b"].map(|path| crate::facts::Answered { path: path.into(), age_ms: 1500, took_us: 250 }).into();
        facts
    }

    /// A metric that the table has and nobody gets, one that nobody documented, or a value under the wrong label.
    #[test]
    fn every_metric_is_exported_and_documented() {
        let text = text(&facts()).unwrap();
        let exported: BTreeSet<_> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let table: BTreeSet<_> = METRICS.iter().map(|metric| metric.name).collect();
        assert_eq!((exported.len(), &exported), (METRICS.len(), &table));
        let readme = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md")).unwrap();
        let documented: Vec<_> = readme.lines().filter(|line| line.starts_with("| `poolfs_")).collect();
        let row = |metric: &Metric| match metric.labels {
            [] => format!("| `{}` | {} |", metric.name, metric.help.trim_end_matches('.')),
            labels => format!("| `{}{{{}}}` | {} |", metric.name, labels.join(","), metric.help.trim_end_matches('.')),
        };
        assert_eq!(documented, METRICS.iter().map(row).collect::<Vec<_>>());
        for wanted in [
            "poolfs_build_info{version=\"9.9 \\\"x\\\"\"} 1",
            "poolfs_files{mount=\"archives\",state=\"announced\"} 3",
            "poolfs_files{mount=\"lists\",state=\"damaged\"} 1",
            "poolfs_received_bytes_total{source=\"peer\"} 1152921504606847000",
            "poolfs_mount_answer_age_seconds{mount=\"lists\"} 1.5",
            "poolfs_dht_lookup_seconds{percentile=\"95\"} NaN",
            "poolfs_dht_up 0",
            "poolfs_ready 1",
        ] {
            assert!(text.lines().any(|line| line == wanted), "{wanted}\n{text}");
        }
    }

    /// With nothing mounted a scrape still has an answer.
    #[test]
    fn nothing_mounted_is_no_error() {
        let text = text(&Facts::default()).unwrap();
        assert!(text.contains("poolfs_ready 0") && !text.contains("poolfs_files{"), "{text}");
    }

    /// The dashboard and the alerts know no metric that is not there.
    #[test]
    fn the_dashboard_and_the_alerts_name_metrics_that_are_there() {
        for file in ["grafana.json", "alerts.yml"] {
            let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/monitoring").join(file);
            let text = std::fs::read_to_string(&path).unwrap();
            let words: BTreeSet<_> = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_').collect();
            let named: Vec<_> = words.iter().filter(|word| word.starts_with("poolfs_")).collect();
            assert!(named.len() >= 5, "{file}: {named:?}");
            for name in named {
                assert!(METRICS.iter().any(|metric| *metric.name == **name), "{file} names {name}");
            }
        }
        let dashboard: serde_json::Value =
            serde_json::from_str(include_str!("../../scripts/monitoring/grafana.json")).expect("the dashboard is JSON");
        assert!(dashboard["panels"].as_array().unwrap().len() >= 8);
    }
}
