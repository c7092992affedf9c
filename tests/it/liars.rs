//! Machines that lie: what they give is found out, it costs little, and apt never sees it.

use crate::harness::crowd::{Crowd, Terms, await_status};
use crate::harness::{LIMIT, Liar, Machine, Package, assert_holds, listed, report};
use poolfs_core::Digest;
use serde_json::Value;
use std::collections::BTreeMap;
use std::time::Instant;

const A: usize = 0;
const B: usize = 1;
const C: usize = 2;

/// Every package in that machine's archives, with its bytes.
fn debs(crowd: &Crowd, machine: usize) -> BTreeMap<String, Vec<u8>> {
    let archives = crowd.machines[machine].archives();
    let names = listed(&archives).into_iter().filter(|name| name.ends_with(".deb"));
    names.map(|name| (name.clone(), std::fs::read(archives.join(&name)).unwrap())).collect()
}

/// B and C run, C has everything, and A is to lie about it.
fn with_a_holder(crowd: &Crowd, fleet: bool) -> BTreeMap<String, Vec<u8>> {
    for machine in [B, C] {
        crowd.machines[machine].up();
    }
    for machine in [B, C] {
        await_status(&crowd.machines[machine], "knows the other", |status| match fleet {
            true => status.fleet_members == 2,
            false => status.node.as_ref().and_then(|node| node.v4.as_ref()).is_some_and(|v4| v4.nodes > 0),
        });
    }
    crowd.machines[C].update();
    crowd.start_download(C).wait().ok();
    debs(crowd, C)
}

/// The first statement that the machine shows.
pub(crate) fn await_statement(machine: &Machine) -> Value {
    let begun = Instant::now();
    loop {
        let rows: Vec<Value> = serde_json::from_str(&machine.poolfs(&["peers", "--statements", "--json"]).ok().out).unwrap();
        if let Some(row) = rows.into_iter().next() {
            return row;
        }
        assert!(begun.elapsed() < LIMIT, "nothing is said: {}", machine.poolfs(&["peers", "--json"]).ok().out);
    }
}

fn dht_status(machine: &Machine) -> Value {
    serde_json::from_str(&machine.poolfs(&["dht", "status", "--json"]).ok().out).unwrap()
}

fn claims(debs: &BTreeMap<String, Vec<u8>>) -> Vec<(Digest, u64)> {
    debs.values().map(|bytes| (Digest::of(bytes), bytes.len() as u64)).collect()
}

/// Real packages on a machine whose fleet has a liar with the fleet's own key, who says that he has all of them: apt installs what
/// Debian signed, the liar is convicted, and nobody else.
#[test]
fn a_fleet_with_a_liar_installs_real_mirror_packages() {
    let names = ["hello", "figlet", "fortune-mod", "fortunes", "manpages-dev"];
    let crowd = Crowd::debian(3, &names, &Terms { fleet: true, ..Terms::default() });
    let truth = with_a_holder(&crowd, true);
    assert!(truth.len() >= names.len(), "{:?}", truth.keys());
    let liar = Liar::start(&crowd.hosts[A], &claims(&truth), Some(crowd.fleet_key()));
    await_status(&crowd.machines[B], "knows the liar", |status| status.fleet_members == 3);
    crowd.machines[B].update();
    crowd.mirror.forget_log();
    let arguments: Vec<&str> = ["install", "-y", "-o", "APT::Keep-Downloaded-Packages=1"].into_iter().chain(names).collect();
    let finished = crowd.machines[B].apt_get(&arguments).ok();
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "apt asked the mirror itself: {finished}");
    for (name, bytes) in &truth {
        assert_holds(&crowd.machines[B].archives().join(name), bytes);
    }
    let root = crowd.machines[B].root();
    assert!(root.join("usr/bin/hello").exists() || root.join("bin/hello").exists());
    assert!(liar.asked() > 0, "nobody believed him for a moment: nothing was tried");
    assert_eq!(crowd.convicted_by(B), [A], "{:#?}", crowd.peers(B));
    let given = crowd.given_to(B);
    assert!(given[C] > 0, "{given:?}");
    report(
        "liars::fleet",
        &format!(
            "{} real packages beside a liar asked {} times: apt exit 0, {given:?} bytes from A (false), B, C, {} from the mirror",
            truth.len(),
            liar.asked(),
            crowd.mirror_bytes(B)
        ),
    );
}

/// The same among strangers who find each other through the DHT, for packages that are looked for there.
#[test]
fn strangers_with_a_liar() {
    let packages = vec![Package::new("large", "1.0", 3_000_000), Package::new("larger", "1.0", 5_000_000)];
    let crowd = Crowd::new(3, packages, &Terms::default());
    let truth = with_a_holder(&crowd, false);
    await_status(&crowd.machines[C], "announces both", |status| status.node.as_ref().is_some_and(|node| node.announced_keys == 2));
    let liar = Liar::start(&crowd.hosts[A], &claims(&truth), None);
    crowd.machines[B].update();
    crowd.mirror.forget_log();
    // Slow enough that he is worth asking while they are at it.
    crowd.shape_mirror(8);
    crowd.hosts[C].shape(16);
    let finished = crowd.download(B);
    assert_eq!(finished.deb_gets(), Vec::<&str>::new(), "apt asked the mirror itself: {finished}");
    assert!(liar.asked() > 0, "nobody asked him");
    assert_eq!(crowd.convicted_by(B), [A], "{:#?}", crowd.peers(B));
    // His lists of pieces are signed: B says that they are false, C keeps it for others, and the liar does not.
    let said = await_statement(&crowd.machines[B]);
    assert_eq!((&said["kind"], &said["standing"]), (&"false list".into(), &"own".into()), "{said}");
    assert!(truth.values().any(|bytes| said["digest"] == Digest::of(bytes).to_string().as_str()), "{said}");
    let begun = Instant::now();
    while dht_status(&crowd.machines[C])["stored_statements"] == 0 {
        assert!(begun.elapsed() < LIMIT, "nobody keeps it: {}", dht_status(&crowd.machines[C]));
    }
    report("liars::strangers", &format!("a liar found through the DHT: apt exit 0, {:?} bytes from A (false), B, C", crowd.given_to(B)));
}
