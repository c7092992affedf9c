#![allow(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::reputation::proof::tests::{NOW_S, file, key, list, public, statement};

const HERE: Listener = Listener { own: [0; 32], is_member: false, has_copy: true };

fn said(kind: Kind, subject: u8, speaker: u8, proof: &[u8], time_s: u64) -> [u8; STATEMENT_BYTES] {
    Statement { time_s, ..statement(kind, &file(), subject, speaker, proof) }.sign(&key(speaker))
}

/// Who may lower whom, by kind, speaker and what is here.
#[test]
fn weight() {
    let proof = list(&file(), 7, true);
    let id = Digest::of(&proof);
    let check = |kind, listener: Listener, want, standing| {
        let mut ledger = Ledger::default();
        assert_eq!(ledger.hear(&said(kind, 7, 1, &proof, NOW_S), listener, NOW_S), want, "{kind:?} {listener:?}");
        assert_eq!(ledger.entries().map(|entry| entry.standing).collect::<Vec<_>>(), Vec::from_iter(standing), "{kind:?} {listener:?}");
    };
    let absent = Listener { has_copy: false, ..HERE };
    let member = Listener { is_member: true, ..absent };
    for kind in [Kind::FalseList, Kind::FalseDelta] {
        check(kind, HERE, Next::Prove(id), Some(Standing::Unavailable));
        check(kind, absent, Next::Nothing, Some(Standing::NoCopy));
        check(kind, member, Next::Lower, Some(Standing::Fleet));
    }
    check(Kind::FalseBytes, HERE, Next::Nothing, Some(Standing::Unproved));
    check(Kind::FalseBytes, member, Next::Lower, Some(Standing::Fleet));
    check(Kind::FalseList, Listener { own: public(1), ..HERE }, Next::Nothing, None);
    check(Kind::FalseList, Listener { own: public(7), ..HERE }, Next::Nothing, None);
}

/// A proof counts once: not again from the same speaker with another time, nor from others; and what was decided for want of a copy or of the
/// proof is decided anew.
#[test]
fn a_word_counts_once() {
    let proof = list(&file(), 7, true);
    let first = said(Kind::FalseList, 7, 1, &proof, NOW_S);
    let mut ledger = Ledger::default();
    let absent = Listener { has_copy: false, ..HERE };
    assert_eq!(ledger.hear(&first, absent, NOW_S), Next::Nothing);
    let prove = Next::Prove(Digest::of(&proof));
    assert_eq!(ledger.hear(&first, HERE, NOW_S), prove, "the file has come");
    assert!(!ledger.proved(&first, None));
    assert_eq!(ledger.hear(&first, HERE, NOW_S), prove, "nobody gave it then");
    assert!(ledger.proved(&first, Some(Checked::Right)));
    for again in [first, said(Kind::FalseList, 7, 1, &proof, NOW_S + 60), said(Kind::FalseList, 7, 2, &proof, NOW_S)] {
        assert_eq!(ledger.hear(&again, HERE, NOW_S + 60), Next::Nothing);
    }
    let member = Listener { is_member: true, ..HERE };
    let word = said(Kind::FalseBytes, 7, 3, b"", NOW_S);
    assert_eq!(ledger.hear(&word, member, NOW_S), Next::Lower);
    assert_eq!(ledger.hear(&word, member, NOW_S), Next::Nothing);
    assert_eq!(ledger.hear(&said(Kind::FalseBytes, 7, 3, b"", NOW_S + 60), member, NOW_S + 60), Next::Nothing);
}

/// Who says the same proof of another file finds it to prove nothing: that must not be held against who says it of the right one.
#[test]
fn a_proof_cannot_be_spoilt() {
    let proof = list(&file(), 7, true);
    let mut ledger = Ledger::default();
    let spoilt = Statement { digest: [9; 32], ..statement(Kind::FalseList, &file(), 7, 2, &proof) }.sign(&key(2));
    assert_eq!(ledger.hear(&spoilt, HERE, NOW_S), Next::Prove(Digest::of(&proof)));
    assert!(!ledger.proved(&spoilt, Some(Checked::Wrong)));
    let right = said(Kind::FalseList, 7, 1, &proof, NOW_S);
    assert_eq!(ledger.hear(&right, HERE, NOW_S), Next::Prove(Digest::of(&proof)));
    assert!(ledger.proved(&right, Some(Checked::Right)));
}

/// Out of date, from the future, forged, or good: void. What expires is forgotten.
#[test]
fn void_ones() {
    let proof = list(&file(), 7, true);
    let mut ledger = Ledger::default();
    let good = said(Kind::FalseList, 7, 1, &proof, NOW_S);
    for (bytes, at) in [(good, NOW_S + STATEMENT_AGE_MAX_S + 1), (good, NOW_S - 601)] {
        assert_eq!(ledger.hear(&bytes, HERE, at), Next::Nothing);
    }
    for at in [1, 50, 140, 200] {
        let mut forged = good;
        // Byte 1 is the kind: a fourth one, a good word, does not exist.
        forged[at] ^= 0x05;
        assert_eq!(ledger.hear(&forged, HERE, NOW_S), Next::Nothing, "byte {at}");
    }
    assert_eq!(ledger.hear(&good[1..], HERE, NOW_S), Next::Nothing);
    assert_eq!(ledger.entries().count(), 0);
    ledger.hear(&good, HERE, NOW_S);
    ledger.expire(NOW_S + STATEMENT_AGE_MAX_S);
    assert_eq!(ledger.entries().count(), 1);
    ledger.expire(NOW_S + STATEMENT_AGE_MAX_S + 1);
    assert_eq!(ledger.entries().count(), 0);
}

/// 500 Sybils say what nobody can check, or name proofs that do not exist: nothing is lowered, little is kept, and a true word among them
/// still counts.
#[test]
fn a_flood_changes_nothing() {
    let proof = list(&file(), 7, true);
    let mut ledger = Ledger::default();
    for n in 0..500u32 {
        let signer = ed25519_dalek::SigningKey::from_bytes(&[&n.to_be_bytes()[..], &[9; 28]].concat().try_into().unwrap());
        let kind = if n % 2 == 0 { Kind::FalseBytes } else { Kind::FalseList };
        let statement = Statement { proof: [u8::try_from(n % 256).unwrap(); 32], ..statement(kind, &file(), 7, 1, b"") };
        let next = ledger.hear(&statement.sign(&signer), HERE, NOW_S);
        assert_ne!(next, Next::Lower);
    }
    assert_eq!(ledger.entries().count(), PER_SUBJECT_MAX);
    let truth = said(Kind::FalseList, 7, 1, &proof, NOW_S);
    assert_eq!(ledger.hear(&truth, HERE, NOW_S), Next::Prove(Digest::of(&proof)));
    assert!(ledger.proved(&truth, Some(Checked::Right)));
    assert_eq!(ledger.entries().last().unwrap().standing, Standing::Proved);
    assert_eq!(ledger.hear(&truth, HERE, NOW_S), Next::Nothing);
}

/// What this machine says is said once, and bounded; a flood of others does not push it out.
#[test]
fn own_words() {
    let mut ledger = Ledger::default();
    let say = |ledger: &mut Ledger, subject: u8, proof: &[u8]| {
        let statement = statement(Kind::FalseList, &file(), subject, 1, proof);
        let bytes = statement.clone().sign(&key(1));
        ledger.say(statement, bytes)
    };
    assert!(say(&mut ledger, 7, b"a"));
    assert!(!say(&mut ledger, 7, b"a"));
    let member = Listener { is_member: true, ..HERE };
    for n in 0..u32::try_from(ENTRIES_MAX).unwrap() + 10 {
        let proof = n.to_be_bytes();
        ledger.hear(&said(Kind::FalseList, u8::try_from(20 + n % 200).unwrap(), 2, &proof, NOW_S), member, NOW_S);
    }
    assert_eq!(ledger.entries().count(), ENTRIES_MAX);
    assert_eq!(ledger.entries().filter(|entry| entry.standing == Standing::Own).count(), 1);
    for n in 0..u8::try_from(OWN_MAX).unwrap() + 5 {
        assert!(say(&mut ledger, 100 + n, b"b"));
    }
    assert_eq!(ledger.entries().filter(|entry| entry.standing == Standing::Own).count(), OWN_MAX);
}

/// A restart forgets nothing that is not void.
#[test]
fn survives_a_restart() {
    let proof = list(&file(), 7, true);
    let mut ledger = Ledger::default();
    let bytes = said(Kind::FalseList, 7, 1, &proof, NOW_S);
    ledger.hear(&bytes, HERE, NOW_S);
    ledger.proved(&bytes, Some(Checked::Right));
    let restored = |now_s| {
        let mut again = Ledger::default();
        ledger.entries().for_each(|entry| again.restore(&entry.bytes, entry.standing, now_s));
        again
    };
    assert_eq!(restored(NOW_S), ledger);
    assert_eq!(restored(NOW_S + STATEMENT_AGE_MAX_S + 1), Ledger::default());
    assert_eq!(restored(NOW_S).hear(&bytes, HERE, NOW_S), Next::Nothing);
}

/// Ten an hour, by the clock that is handed in.
#[test]
fn an_hour_holds_ten() {
    let mut hourly = Hourly::new(10);
    assert!((0..10).all(|n| hourly.take(NOW_S + n)));
    assert!(!hourly.take(NOW_S + 3599));
    assert_eq!(hourly.next_at(NOW_S + 3599), NOW_S + 3600);
    assert!(hourly.take(NOW_S + 3600));
    assert!(!hourly.take(NOW_S + 3600));
}
