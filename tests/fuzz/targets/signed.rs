//! What peers say of a file. Half of what is tried is signed anew after the damage: a stranger has a key of his own.

use crate::driver::{Target, behaviour, kind_of, some};
use ed25519_dalek::{Signer as _, SigningKey};
use poolfs_core::Digest;
use poolfs_net::krpc::{Delta, Pv, Statement, statement};
use poolfs_net::peer::{ABOUT_BYTES_MAX, About, DeltaClaim};
use poolfs_net::swarm::FileShape;
use poolfs_net::swarm::bits::Bits;
use poolfs_net::swarm::piece_list::PieceList;

/// Every target of this file.
pub(super) const ALL: &[Target] = &[
    Target {
        name: "piece-list",
        about: "signed lists of a file's pieces",
        start: |_| Box::new(|input: &[u8]| piece_list(input)),
        seeds: lists,
        tokens: &[],
        input_bytes_max: 1_000,
        memory: (64 * 1024, 64),
    },
    Target {
        name: "have",
        about: "bit fields of pieces: 4 bytes how many, then the field",
        start: |_| Box::new(|input: &[u8]| have(input)),
        seeds: || vec![vec![0, 0, 0, 12, 0xff, 0xf0], vec![0, 0, 0, 0], vec![0, 0, 0, 8, 0x81], vec![0, 1, 0, 0, 0]],
        tokens: &[],
        input_bytes_max: 600,
        memory: (64 * 1024, 64),
    },
    Target {
        name: "about",
        about: "what a peer says of a file: `pv` and signed delta claims",
        start: |_| Box::new(|input: &[u8]| about(input)),
        seeds: abouts,
        tokens: &["d1:cl", "200:", "e2:pv", "46:", "e", "d1:f", "1:k32:", "i0e", "i3e", "i-1e", "99:", "512:"],
        input_bytes_max: 2_500,
        memory: (64 * 1024, 64),
    },
    Target {
        name: "signed",
        about: "statements that are signed anew after the damage",
        start: |_| Box::new(|input: &[u8]| signed(input)),
        seeds: || vec![vec![1; 172]],
        tokens: &[],
        input_bytes_max: 240,
        memory: (64 * 1024, 64),
    },
];

const NOW_S: u64 = 1_800_000_000;

fn key() -> SigningKey {
    SigningKey::from_bytes(&[7; 32])
}

fn shape() -> FileShape {
    FileShape { digest: Digest::of(b"ten bytes!"), size: 10, piece_bytes: 4 }
}

fn piece_list(input: &[u8]) -> u64 {
    let shape = shape();
    let mut seen = 0;
    let mut again = input.to_vec();
    // 44 bytes of head, the pieces, key, time and signature: 32, 8 and 64 bytes.
    let signed = input.len().checked_sub(104).filter(|head| *head >= 44);
    if let Some(pieces_end) = signed {
        let mut message = b"poolfs-1 list\0".to_vec();
        message.extend_from_slice(&input[..44]);
        message.extend_from_slice(&Digest::of(&input[44..pieces_end]).0);
        message.extend_from_slice(&input[pieces_end + 32..pieces_end + 40]);
        again[pieces_end..pieces_end + 32].copy_from_slice(&key().verifying_key().to_bytes());
        again[pieces_end + 40..].copy_from_slice(&key().sign(&message).to_bytes());
    }
    for bytes in [input, &again] {
        let decoded = PieceList::decode(bytes, &shape, NOW_S);
        if let Ok(list) = &decoded {
            assert_eq!(list.pieces.len(), 3, "another number of pieces than the file has");
            assert_eq!(list.encode(&shape), bytes, "written otherwise than read");
            assert_eq!(bytes.len(), PieceList::encoded_bytes(&shape));
        }
        seen = behaviour((seen, decoded.map(|_| ()).map_err(kind_of)));
    }
    seen
}

fn lists() -> Vec<Vec<u8>> {
    let list = PieceList::sign(&shape(), b"ten bytes!".chunks(4).map(Digest::of).collect(), &key(), NOW_S);
    vec![list.encode(&shape())]
}

fn have(input: &[u8]) -> u64 {
    let Some((count, field)) = input.split_first_chunk::<4>() else { return 0 };
    let count = u32::from_be_bytes(*count);
    let Ok(bits) = Bits::from_bytes(field, count) else { return 1 };
    // Counted one by one, by another arithmetic than its own.
    let oracle: Vec<u32> = (0..count).filter(|at| field[(at / 8) as usize] >> (7 - at % 8) & 1 == 1).collect();
    assert_eq!(bits.iter().collect::<Vec<_>>(), oracle, "other pieces than the field has");
    assert_eq!((bits.count() as usize, bits.len(), bits.as_bytes()), (oracle.len(), count, field));
    assert_eq!(bits.is_full(), oracle.len() == count as usize);
    assert!(!bits.has(count) && !bits.has(u32::MAX), "a piece past the end");
    behaviour((some(oracle.len()), bits.is_full(), some(field.len())))
}

fn about(input: &[u8]) -> u64 {
    let new = Digest::of(b"new");
    let mut again = input.to_vec();
    // Each claim is old, new, delta, key (32 bytes each), time (8) and signature (64).
    let mut at = 5;
    while again.len() >= at + 204 && again[at..].starts_with(b"200:") {
        let claim = &mut again[at + 4..at + 204];
        claim[96..128].copy_from_slice(&key().verifying_key().to_bytes());
        let message = [&b"poolfs-1 delta\0"[..], &claim[..96], &claim[128..136]].concat();
        claim[136..].copy_from_slice(&key().sign(&message).to_bytes());
        at += 204;
    }
    let mut seen = 0;
    for bytes in [input, &again] {
        let decoded = About::decode(bytes, &new, NOW_S);
        if let Ok(about) = &decoded {
            assert!(bytes.len() <= ABOUT_BYTES_MAX && about.claims.iter().all(|claim| claim.new == new));
            assert_eq!(About::decode(&about.encode(), &new, NOW_S).as_ref(), Ok(about), "written otherwise than read");
        }
        seen = behaviour((seen, decoded.map(|about| (about.claims.len(), about.pv.deltas.len())).map_err(kind_of)));
    }
    seen
}

fn abouts() -> Vec<Vec<u8>> {
    let claim = |n: u8| DeltaClaim::sign(Digest([n; 32]), Digest::of(b"new"), Digest::of(b"delta"), &key(), NOW_S);
    let delta = Delta { old: [1; 32], bytes: 900, delta: Digest::of(b"delta").0, target: None };
    let pv = |deltas| Pv { key: key().verifying_key().to_bytes(), flags: 2, deltas };
    vec![
        About { pv: pv(Vec::new()), claims: Vec::new() }.encode(),
        About { pv: pv(vec![delta]), claims: vec![claim(1)] }.encode(),
        About { pv: pv(Vec::new()), claims: (1..5).map(claim).collect() }.encode(),
    ]
}

fn signed(input: &[u8]) -> u64 {
    let Some(head) = input.get(..172) else { return 0 };
    let mut bytes = [0; statement::STATEMENT_BYTES];
    bytes[..172].copy_from_slice(head);
    // Form and time are let through, so that what lies behind them is reached.
    bytes[0] = 1;
    bytes[1] = 1 + bytes[1] % 4;
    bytes[2..6].fill(0);
    bytes[164..168].fill(0);
    let age_s = u64::from(bytes[171]);
    bytes[164..172].copy_from_slice(&(NOW_S - age_s).to_be_bytes());
    bytes[68..100].copy_from_slice(&key().verifying_key().to_bytes());
    let signature = key().sign(&[&b"poolfs-1 statement\0"[..], &bytes[..172]].concat());
    bytes[172..].copy_from_slice(&signature.to_bytes());
    match Statement::check(&bytes, NOW_S) {
        Ok(statement) => {
            assert_ne!(statement.speaker, statement.subject, "speaks about itself");
            let again = statement.clone().sign(&key());
            assert_eq!(Statement::check(&again, NOW_S), Ok(statement.clone()), "written otherwise than read");
            behaviour((format!("{:?}", statement.kind), statement.proof_at.is_ipv4(), statement.size.leading_zeros()))
        }
        Err(err) => behaviour(kind_of(err)),
    }
}
