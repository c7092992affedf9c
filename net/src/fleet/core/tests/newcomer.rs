//! A machine that has just joined, beside neighbours that have everything: nothing comes from the mirror, and no answer is held.

use super::*;

const FILES: usize = 200;
/// What a mount fetches at once.
const AT_ONCE: usize = 8;
const NEWCOMER: usize = 4;
const VISITOR: usize = 5;

fn files() -> Vec<FileShape> {
    (0..FILES).map(|nth| file(1_000 + nth, 1)).collect()
}

/// Four neighbours that have all files and have told each other; the fifth and the sixth machine are not there yet.
fn neighbours() -> Net {
    let mut net = Net::new(6, None);
    (1..4).for_each(|at| net.hint(at, contact(0)));
    net.machines[NEWCOMER].alive = false;
    net.machines[VISITOR].alive = false;
    net.run_until(Duration::from_secs(60), |net| net.all_know(4));
    for at in 0..4 {
        net.machines[at].has.extend(files().iter().map(|file| (file.digest, 0)));
        let now = net.now;
        net.machines[at].core.arrived(&files(), now);
        net.drain(at);
    }
    // Longer than what counts as new, for the neighbours.
    net.run(Duration::from_secs(90));
    net
}

fn join(net: &mut Net, at: usize, members: usize) {
    net.machines[at].alive = true;
    net.hint(at, contact(1));
    net.run_until(Duration::from_secs(15), |net| net.machines[at].core.view().len() == members);
}

/// A machine wants everything, a few files at once, as a mount does.
fn fetch_all(net: &mut Net, at: usize) -> Duration {
    let began = net.now;
    let mut waiting = files();
    while !waiting.is_empty() || net.machines[at].wants > 0 {
        while net.machines[at].wants < AT_ONCE
            && let Some(next) = waiting.pop()
        {
            net.want_at(at, next);
        }
        assert!(net.now < began + Duration::from_secs(60), "{} files wait", waiting.len());
        net.step(net.now + Duration::from_secs(1));
    }
    net.now - began
}

/// Each file takes a plan's delay, a query or two, and the fetch; eight go on at once.
fn undisturbed() -> Duration {
    (Duration::from_millis(10 + 4 * 2) + FETCH_TAKES) * u32::try_from(FILES / AT_ONCE).unwrap() * 3 / 2
}

/// Also where it asks at once: nobody has told it yet what is here, and a fifth of the files are its own to coordinate.
#[test]
fn a_newcomer_asks_the_mirror_for_nothing() {
    for settles in [0, 100, 500, 2_000, 100_000] {
        let mut net = neighbours();
        join(&mut net, NEWCOMER, 5);
        net.run(Duration::from_millis(settles));
        let took = fetch_all(&mut net, NEWCOMER);
        assert_eq!(net.mirror, HashMap::new(), "joined {settles} ms before");
        assert!(took <= undisturbed(), "joined {settles} ms before: {took:?}");
    }
}

/// Machines that come up together have nobody who knows more: one copy, and none of them waits for the others' word.
#[test]
fn newcomers_among_themselves_lose_nothing() {
    let mut net = Net::joined(6);
    let (began, shape) = (net.age(), file(1, 40));
    net.want(shape);
    net.run_until(Duration::from_secs(20), Net::is_done);
    assert_eq!(net.mirror.values().sum::<u32>(), 40, "one copy: {:?}", net.mirror);
    assert!(net.slowest() - began < Duration::from_millis(2_500), "{:?}", net.slowest() - began);
}

/// A visitor took everything and ended without a word, a while ago or just now: it coordinates some files in the eyes of all,
/// is named as a holder of all, and costs one second in all, not one for each few files.
#[test]
fn a_dead_visitor_costs_a_newcomer_a_second() {
    for (dead_for, settles) in [(1, 0), (15, 500), (30, 5_000), (45, 500), (70, 500)] {
        let mut net = neighbours();
        join(&mut net, VISITOR, 5);
        fetch_all(&mut net, VISITOR);
        net.kill(VISITOR);
        net.run(Duration::from_secs(dead_for));
        net.machines[NEWCOMER].alive = true;
        net.hint(NEWCOMER, contact(1));
        net.run_until(Duration::from_secs(15), |net| net.machines[NEWCOMER].core.view().len() >= 5);
        net.run(Duration::from_millis(settles));
        let took = fetch_all(&mut net, NEWCOMER);
        assert_eq!(net.mirror, HashMap::new(), "dead for {dead_for} s");
        assert!(took <= Duration::from_millis(1_200) + undisturbed(), "dead for {dead_for} s: {took:?}");
    }
}

/// A visitor that took everything says farewell: it is out at once, nobody waits for it as a coordinator or is sent to it as a holder,
/// and what is said to it then is not answered.
#[test]
fn a_visitor_says_farewell() {
    let mut net = neighbours();
    join(&mut net, VISITOR, 5);
    fetch_all(&mut net, VISITOR);
    let now = net.now;
    net.machines[VISITOR].core.leave(now);
    net.drain(VISITOR);
    net.run(Duration::from_millis(500));
    assert!((0..4).all(|at| net.machines[at].core.view().len() == 4));
    net.run(Duration::from_secs(40));
    assert!((0..4).all(|at| net.machines[at].core.view().len() == 4), "nothing brings it back while it ends");
    net.kill(VISITOR);
    join(&mut net, NEWCOMER, 5);
    let took = fetch_all(&mut net, NEWCOMER);
    assert_eq!(net.mirror, HashMap::new());
    assert!(took <= undisturbed(), "{took:?}");
}

/// Whoever asks a newcomer that coordinates by right, but has not been told yet, is not sent to the mirror for what others have.
#[test]
fn a_newcomer_that_is_asked_waits_to_be_told() {
    let mut net = neighbours();
    join(&mut net, VISITOR, 5);
    net.run(Duration::from_secs(90));
    net.machines[NEWCOMER].alive = true;
    net.hint(NEWCOMER, contact(1));
    net.run_until(Duration::from_secs(15), |net| net.machines[VISITOR].core.view().len() == 6);
    for shape in files() {
        net.want_at(VISITOR, shape);
    }
    net.run_until(Duration::from_secs(20), |net| net.machines[VISITOR].wants == 0);
    assert_eq!(net.mirror, HashMap::new());
}
