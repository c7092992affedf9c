//! Indexes: a machine updates after another one of its fleet.

use super::outcome::{Contender, Figure, Line, Outcome};
use super::scenario::{Packages, Update};
use super::{contender, line_of, plain_line, ratio};
use crate::harness::crowd::{Crowd, Terms, await_fleet_told, await_status};
use crate::harness::process::Finished;
use crate::harness::{assert_holds, listed};
use std::time::{Duration, Instant};

pub(crate) fn play(update: Update) -> Outcome {
    match update {
        Update::Own => own(),
        Update::Debian => debian(),
    }
}

fn timed(run: impl FnOnce() -> Finished) -> (Finished, Duration) {
    let began = Instant::now();
    (run(), began.elapsed())
}

/// The first machine updates from the mirror, then the second one.
fn own() -> Outcome {
    let packages = Packages { plan_mb: Some(10), ..Packages::default() }.build();
    let crowd = Crowd::new(2, packages, &Terms { fleet: true, ..Terms::default() });
    crowd.start(true);
    crowd.machines[0].update();
    let wanted_bytes = crowd.machines[0].status().bytes.mirror;
    crowd.mirror.forget_log();
    let ended = timed(|| crowd.machines[1].update());
    // InRelease is asked of the mirror in each case.
    let counts = |path: &str| !path.ends_with("/InRelease");
    let line = line_of(&crowd, 1, &ended, counts);
    Outcome { wanted_bytes, contenders: vec![contender(&crowd, "poolfs", wanted_bytes, vec![line], counts)], ..Outcome::default() }
}

/// What apt-file adds to apt's configuration; not asked of `-updates`, whose Contents real mirrors often have not.
const CONTENTS: &str = r#"
Acquire::IndexTargets::deb::Contents-deb {
    MetaKey "$(COMPONENT)/Contents-$(ARCHITECTURE)";
    ShortDescription "Contents-$(ARCHITECTURE)";
    Description "$(RELEASE)/$(COMPONENT) $(ARCHITECTURE) Contents (deb)";
    flatMetaKey "Contents-$(ARCHITECTURE)";
    flatDescription "$(RELEASE) Contents (deb)";
    PDiffs "true";
    KeepCompressed "true";
    DefaultEnabled "false";
};
"#;

/// The real archive's indexes: machine 0 has them, machine 1 is without poolfs, machine 2 has machine 0 beside it.
fn debian() -> Outcome {
    let terms = Terms { fleet: true, mirror_mbit: Some(20), apt_conf: CONTENTS.to_owned(), ..Terms::default() };
    let crowd = Crowd::debian(3, &[], &terms);
    for machine in [0, 2] {
        crowd.machines[machine].up();
    }
    for machine in [0, 2] {
        await_status(&crowd.machines[machine], "knows the other", |status| status.fleet_members == 2);
    }
    crowd.machines[0].update_plainly();
    await_fleet_told(&crowd.machines[0], 2);
    crowd.mirror.forget_log();
    let plain = plain_line(&crowd, 1, &timed(|| crowd.machines[1].update_plainly()), |_| true);
    let ours = line_of(&crowd, 2, &timed(|| crowd.machines[2].update_plainly()), |_| true);
    let lists = |machine: usize| {
        let mut files: Vec<_> = listed(&crowd.machines[machine].lists()).into_iter().filter(|name| name.contains("_dists_")).collect();
        files.sort();
        files
    };
    assert_eq!(lists(1), lists(2), "the lists are those of plain apt");
    for name in lists(1) {
        assert_holds(&crowd.machines[2].lists().join(&name), &std::fs::read(crowd.machines[1].lists().join(&name)).unwrap());
    }
    let wanted_bytes = plain.mirror_bytes;
    let figures = vec![
        Figure::new("bytes from the mirror beside plain apt", ratio(ours.mirror_bytes, wanted_bytes), "x"),
        Figure::new("time beside plain apt", ours.seconds / plain.seconds, "x"),
    ];
    let one = |name: &str, line: Line| Contender {
        name: name.to_owned(),
        mirror_bytes: line.mirror_bytes,
        copies: ratio(line.mirror_bytes, wanted_bytes),
        lines: vec![line],
    };
    let contenders = vec![one("poolfs", ours), one("plain apt", plain)];
    Outcome { wanted_bytes, verified: lists(1).len(), contenders, figures, ..Outcome::default() }
}
