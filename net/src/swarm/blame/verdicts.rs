//! What verified downloads have proved of others, as a plain value with expiry.
//!
//! Bytes are held against an address, signatures against a key. One bad piece puts a source out for its own download only;
//! two in different files, or three, put the address out, because a broken network card or a box on the path lies too and
//! the next file tells. Times are Unix seconds, since this outlives the process.

use poolfs_core::Digest;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::IpAddr;

/// How long an address is out the first time, in seconds; it doubles each time.
pub const OUT_S_FIRST: u64 = 24 * 3600;

/// The longest an address or a key is out, in seconds; also how long a bad piece is remembered.
pub const OUT_S_MAX: u64 = 30 * 24 * 3600;

/// Addresses remembered; past that the one whose record ends first is forgotten.
pub const ADDRESSES_MAX: usize = 20_000;

/// Keys remembered, likewise.
pub const KEYS_MAX: usize = 20_000;

/// Bad pieces that put an address out even if they are of one file.
const BAD_MAX: usize = 3;

/// One address's record.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct AddressRecord {
    /// Bad pieces not yet answered with being out: file and Unix seconds, at most two.
    pub bad: Vec<(Digest, u64)>,
    /// How often it has been out.
    pub outs: u32,
    /// Out until then, in Unix seconds; 0 if never.
    pub out_until: u64,
}

impl AddressRecord {
    /// When nothing of it matters any more, in Unix seconds.
    fn ends(&self) -> u64 {
        let last_bad = self.bad.iter().map(|(_, at)| at.saturating_add(OUT_S_MAX)).max().unwrap_or(0);
        // The count for doubling is kept as long again, so that coming back at once is not a fresh start.
        let doubling = if self.outs > 0 { self.out_until.saturating_add(OUT_S_MAX) } else { 0 };
        last_bad.max(doubling)
    }
}

/// Every record that has not expired.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Verdicts {
    addresses: BTreeMap<IpAddr, AddressRecord>,
    keys: BTreeMap<[u8; 32], u64>,
}

impl Verdicts {
    /// Nobody has a record.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a saved record back; an expired one is left out.
    pub fn restore_address(&mut self, address: IpAddr, record: AddressRecord, now_s: u64) {
        if record.ends() > now_s {
            self.addresses.insert(address, record);
            self.bound(now_s);
        }
    }

    /// Puts a saved key back, out until `until_s`.
    pub fn restore_key(&mut self, key: [u8; 32], until_s: u64, now_s: u64) {
        if until_s > now_s {
            self.keys.insert(key, until_s);
            self.bound(now_s);
        }
    }

    /// Notes `count` pieces of `file` from `address` that the verified file contradicts. Returns whether it is out now.
    pub fn bad(&mut self, address: IpAddr, file: Digest, count: u32, now_s: u64) -> bool {
        let record = self.addresses.entry(address).or_default();
        if record.ends() <= now_s {
            *record = AddressRecord::default();
        }
        record.bad.retain(|(_, at)| at.saturating_add(OUT_S_MAX) > now_s);
        for _ in 0..count.min(3) {
            record.bad.push((file, now_s));
        }
        let two_files = record.bad.iter().any(|(other, _)| *other != record.bad[0].0);
        if record.bad.len() >= BAD_MAX || two_files {
            let out_s = OUT_S_FIRST.saturating_mul(1u64.checked_shl(record.outs).unwrap_or(u64::MAX)).min(OUT_S_MAX);
            record.out_until = record.out_until.max(now_s.saturating_add(out_s));
            record.outs = record.outs.saturating_add(1);
            record.bad.clear();
        }
        let out = record.out_until > now_s;
        self.bound(now_s);
        out
    }

    /// Notes that `key` signed a piece list or a delta claim that a verified file contradicts.
    pub fn false_signature(&mut self, key: [u8; 32], now_s: u64) {
        self.keys.insert(key, now_s.saturating_add(OUT_S_MAX));
        self.bound(now_s);
    }

    /// Whether nothing may be asked of `address`.
    pub fn address_is_out(&self, address: IpAddr, now_s: u64) -> bool {
        self.addresses.get(&address).is_some_and(|record| record.out_until > now_s)
    }

    /// Whether nothing signed by `key` counts.
    pub fn key_is_out(&self, key: &[u8; 32], now_s: u64) -> bool {
        self.keys.get(key).is_some_and(|until| *until > now_s)
    }

    /// Every address with a record, for saving and for people.
    pub fn addresses(&self) -> impl Iterator<Item = (&IpAddr, &AddressRecord)> {
        self.addresses.iter()
    }

    /// Every key that is out and until when, for saving and for people.
    pub fn keys(&self) -> impl Iterator<Item = (&[u8; 32], &u64)> {
        self.keys.iter()
    }

    /// Drops what has expired.
    pub fn expire(&mut self, now_s: u64) {
        self.addresses.retain(|_, record| record.ends() > now_s);
        self.keys.retain(|_, until| *until > now_s);
    }

    fn bound(&mut self, now_s: u64) {
        if self.addresses.len() > ADDRESSES_MAX || self.keys.len() > KEYS_MAX {
            self.expire(now_s);
        }
        // Rare (a flood of liars), so a scan is cheaper than an index kept for it.
        while self.addresses.len() > ADDRESSES_MAX {
            let Some(first) = self.addresses.iter().min_by_key(|(_, record)| record.ends()).map(|(address, _)| *address) else { break };
            self.addresses.remove(&first);
        }
        while self.keys.len() > KEYS_MAX {
            let Some(first) = self.keys.iter().min_by_key(|(_, until)| **until).map(|(key, _)| *key) else { break };
            self.keys.remove(&first);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    const NOW_S: u64 = 1_800_000_000;
    const LIAR: IpAddr = IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1));

    fn file(n: u8) -> Digest {
        Digest([n; 32])
    }

    /// One bad piece is no ban: a broken cable would cut an honest machine off.
    #[test]
    fn one_bad_piece_is_out_of_nothing_but_its_download() {
        let mut verdicts = Verdicts::new();
        assert!(!verdicts.bad(LIAR, file(1), 1, NOW_S));
        assert!(!verdicts.bad(LIAR, file(1), 1, NOW_S + 1));
        assert!(!verdicts.address_is_out(LIAR, NOW_S + 1));
    }

    #[test]
    fn two_in_different_files_are_out_for_a_day() {
        let mut verdicts = Verdicts::new();
        verdicts.bad(LIAR, file(1), 1, NOW_S);
        assert!(verdicts.bad(LIAR, file(2), 1, NOW_S));
        assert!(verdicts.address_is_out(LIAR, NOW_S + OUT_S_FIRST - 1));
        assert!(!verdicts.address_is_out(LIAR, NOW_S + OUT_S_FIRST));
    }

    #[test]
    fn three_in_one_file_are_out() {
        let mut verdicts = Verdicts::new();
        assert!(verdicts.bad(LIAR, file(1), 3, NOW_S));
        assert!(verdicts.address_is_out(LIAR, NOW_S));
    }

    /// 1, 2, 4, 8, 16, then 30 days for ever; and it does not start over when the ban ends.
    #[test]
    fn being_out_doubles_to_thirty_days() {
        let mut verdicts = Verdicts::new();
        let mut now = NOW_S;
        for days in [1, 2, 4, 8, 16, 30, 30] {
            assert!(verdicts.bad(LIAR, file(1), 3, now));
            assert!(verdicts.address_is_out(LIAR, now + days * 86_400 - 1), "{days}");
            assert!(!verdicts.address_is_out(LIAR, now + days * 86_400), "{days}");
            now += days * 86_400;
        }
        now += OUT_S_MAX;
        verdicts.expire(now);
        assert_eq!(verdicts.addresses().count(), 0);
        assert!(!verdicts.bad(LIAR, file(1), 1, now));
    }

    /// A bad piece is forgotten after thirty days, so two cables in ten years are no ban.
    #[test]
    fn bad_pieces_expire() {
        let mut verdicts = Verdicts::new();
        verdicts.bad(LIAR, file(1), 1, NOW_S);
        assert!(!verdicts.bad(LIAR, file(2), 1, NOW_S + OUT_S_MAX));
    }

    #[test]
    fn a_false_signature_puts_the_key_out() {
        let mut verdicts = Verdicts::new();
        verdicts.false_signature([1; 32], NOW_S);
        assert!(verdicts.key_is_out(&[1; 32], NOW_S + OUT_S_MAX - 1));
        assert!(!verdicts.key_is_out(&[1; 32], NOW_S + OUT_S_MAX));
        assert!(!verdicts.key_is_out(&[2; 32], NOW_S));
    }

    /// What is saved and put back is the same; what has expired is not put back.
    #[test]
    fn survives_a_restart() {
        let mut verdicts = Verdicts::new();
        verdicts.bad(LIAR, file(1), 3, NOW_S);
        verdicts.false_signature([1; 32], NOW_S);
        let restore = |now_s| {
            let mut again = Verdicts::new();
            verdicts.addresses().for_each(|(address, record)| again.restore_address(*address, record.clone(), now_s));
            verdicts.keys().for_each(|(key, until)| again.restore_key(*key, *until, now_s));
            again
        };
        assert_eq!(restore(NOW_S + 1), verdicts);
        assert_eq!(restore(NOW_S + 3 * OUT_S_MAX), Verdicts::new());
    }

    /// A flood of liars does not grow memory, and the longest record stays.
    #[test]
    fn memory_is_bounded() {
        let mut verdicts = Verdicts::new();
        verdicts.bad(LIAR, file(1), 3, NOW_S);
        for n in 0..u32::try_from(ADDRESSES_MAX + 10).unwrap_or(0) {
            verdicts.restore_address(
                IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + n)),
                AddressRecord { bad: vec![(file(1), NOW_S)], outs: 0, out_until: 0 },
                NOW_S,
            );
        }
        assert_eq!(verdicts.addresses().count(), ADDRESSES_MAX);
        assert!(verdicts.address_is_out(LIAR, NOW_S));
    }
}
