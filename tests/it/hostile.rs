//! Which test asserts what this machine does against which hostile or faulty behaviour.
//!
//! The tests lie beside the parts that they are about, most of them under a virtual clock; here is the table of them, and a test
//! that each of them is there. What is asserted is what the victim does: right bytes, who is blamed, what it costs. Two of them at
//! once are in `net/src/swarm/driver/tests/pairs.rs`, worlds with any number of liars in `net/src/swarm/blame/tests/property.rs`.

use std::collections::BTreeSet;
use std::path::Path;

/// A behaviour, and the tests of it as `FILE NAME...`.
struct Behaviour {
    number: u32,
    what: &'static str,
    tests: &'static [(&'static str, &'static [&'static str])],
}

const fn behaviour(number: u32, what: &'static str, tests: &'static [(&'static str, &'static [&'static str])]) -> Behaviour {
    Behaviour { number, what, tests }
}

const CASES: &str = "net/src/swarm/blame/tests/cases.rs";
const TABLE: &str = "net/src/swarm/blame/tests/table.rs";
const BOUNDS: &str = "net/src/swarm/blame/tests/bounds.rs";
const PROPERTY: &str = "net/src/swarm/blame/tests/property.rs";
const LISTS: &str = "net/src/swarm/blame/tests/lists.rs";
const ORIGINAL: &str = "net/src/swarm/blame/tests/original.rs";
const SCHEDULE: &str = "net/src/swarm/schedule/tests.rs";
const DRIVER: &str = "net/src/swarm/driver/tests.rs";
const DRIVER_HOSTILE: &str = "net/src/swarm/driver/tests/hostile.rs";
const PAIRS: &str = "net/src/swarm/driver/tests/pairs.rs";
const FLEET: &str = "net/src/swarm/fleet/tests/hostile.rs";
const FLEET_RULES: &str = "net/src/swarm/fleet/tests/rules.rs";
const NUMBERS: &str = "net/src/swarm/fleet/tests/numbers.rs";
const CORE: &str = "net/src/fleet/core/tests/hostile.rs";
const SOCKETS: &str = "net/src/fleet/shell/tests/hostile.rs";
const CROWDS: &str = "net/src/swarm/driver/tests/crowds.rs";
const CLIENT: &str = "net/src/peer/client/tests.rs";
const SERVER: &str = "net/src/peer/server/tests.rs";
const MIRROR: &str = "net/src/mirror/tests.rs";
const DHT: &str = "net/src/dht/tests.rs";
const STORAGE: &str = "net/src/dht/storage.rs";
const NODE: &str = "net/src/node/tests.rs";
const SIM: &str = "net/src/sim/tests.rs";
const INTEROP: &str = "tests/it/dht/interop.rs";

const BEHAVIOURS: &[Behaviour] = &[
    behaviour(
        1,
        "one always lies, in the middle piece, among honest ones",
        &[(CASES, &["one_liar_in_the_middle_piece"]), (BOUNDS, &["a_liar_in_the_middle_costs_little"]), (DRIVER, &["one_liar"])],
    ),
    behaviour(
        2,
        "a liar gives only the first piece, with and without a third source",
        &[
            (CASES, &["one_liar_in_the_first_piece"]),
            (ORIGINAL, &["third_peer_gives_the_first_piece"]),
            (TABLE, &["no_third_source_in_the_first_piece_suspects_nobody"]),
            (DRIVER, &["one_liar_and_one_honest_peer"]),
        ],
    ),
    behaviour(
        3,
        "a liar gives only the last piece, which the second round asks of the first's giver",
        &[(CASES, &["one_liar_in_the_last_piece"]), (ORIGINAL, &["second_round_is_shifted_by_one"])],
    ),
    behaviour(4, "turns that could leave a piece with its giver", &[(PROPERTY, &["second_giver_is_never_the_first"])]),
    behaviour(
        5,
        "lies now and then, over many seeds",
        &[
            (PROPERTY, &["no_honest_source_is_ever_convicted"]),
            (CASES, &["one_liar_in_half_the_pieces", "one_liar_in_three_pieces_of_ten"]),
        ],
    ),
    behaviour(
        6,
        "two that lie alike, with the mirror and without",
        &[
            (
                CASES,
                &[
                    "two_colluders_and_five_honest",
                    "two_colluders_and_one_honest",
                    "two_colluders_alone",
                    "three_colluders_and_eight_honest",
                ],
            ),
            (DRIVER, &["two_colluders"]),
        ],
    ),
    behaviour(
        7,
        "other bytes for the same piece at a second request",
        &[(TABLE, &["same_source_other_bytes_is_proved_at_once"]), (DRIVER_HOSTILE, &["who_changes_his_bytes"])],
    ),
    behaviour(
        8,
        "a false signed piece list, with an accomplice",
        &[
            (DRIVER, &["a_false_list"]),
            (LISTS, &["a_false_list_is_dropped_when_the_digest_is_wrong", "one_honest_source_outlives_a_false_list"]),
            (DHT, &["statements"]),
        ],
    ),
    behaviour(
        9,
        "one byte short, a byte a second, twice the length, everything to a Range",
        &[
            (CLIENT, &["faulty_answers", "bytes_past_the_piece_are_not_taken", "slowness_ends"]),
            (SCHEDULE, &["faulty_peers_delay_little_and_are_not_blamed", "a_faulty_peer_delays_by_one_deadline"]),
            (BOUNDS, &["failures_are_never_guilt"]),
            (DRIVER, &["faulty_peers", "silent_peers_are_hedged"]),
        ],
    ),
    behaviour(
        10,
        "a victim that is asked for pieces meanwhile",
        &[
            (DRIVER_HOSTILE, &["a_victim_is_asked_meanwhile"]),
            (SERVER, &["files_on_their_way"]),
            (DRIVER, &["who_passes_lies_on_is_not_convicted"]),
        ],
    ),
    behaviour(
        11,
        "a mirror that replaces the file between two ranges, sends a page, or ignores Range",
        &[
            (MIRROR, &["replaced_between_two_ranges", "without_ranges", "a_faulty_mirror_alone"]),
            (BOUNDS, &["a_wrong_mirror_blames_nobody"]),
            (DRIVER, &["a_mirror_that_changes"]),
        ],
    ),
    behaviour(
        12,
        "fifty fresh keys and addresses, in one network and in fifty",
        &[
            (SCHEDULE, &["an_hour_of_fresh_liars_is_bounded", "unknown_peers_have_one_piece_in_flight"]),
            (BOUNDS, &["an_hour_of_fresh_liars_is_bounded"]),
            (DRIVER, &["fifty_liars"]),
            (CROWDS, &["fifty_liars_in_one_network", "fifty_liars_in_fifty_networks"]),
        ],
    ),
    behaviour(
        13,
        "a thousand machines and twelve small packages in one second, also with a slow mirror",
        &[(NUMBERS, &["a_thousand_machines_small_packages", "a_thousand_machines_small_packages_slow_mirror"])],
    ),
    behaviour(
        14,
        "the coordinator dies after its first lease, the holder of the lease in the middle of a piece",
        &[
            (FLEET, &["the_coordinator_dies", "the_lease_holder_dies_silently"]),
            (CORE, &["the_coordinator_dies", "the_lease_holder_dies"]),
            (FLEET_RULES, &["a_second_lease_needs_a_broken_or_a_slow_first"]),
        ],
    ),
    behaviour(
        15,
        "half of the members do not see the other half for ten seconds",
        &[
            (FLEET, &["the_fleet_parts_for_ten_seconds", "see_is_followed_upwards_only"]),
            (CORE, &["the_fleet_parts_for_ten_seconds"]),
            (SOCKETS, &["a_fleet_parts_and_meets_again"]),
        ],
    ),
    behaviour(
        16,
        "a coordinator that says `wait` for ever, names the dead, strangers and services",
        &[
            (
                FLEET,
                &["a_coordinator_that_says_wait_for_ever", "a_coordinator_that_names_strangers", "a_coordinator_that_names_false_holders"],
            ),
            (CORE, &["a_lying_coordinator"]),
            (
                SOCKETS,
                &["a_coordinator_that_waits_for_ever", "a_coordinator_that_names_strangers", "a_coordinator_that_names_false_holders"],
            ),
        ],
    ),
    behaviour(
        17,
        "a fleet's datagram without its tag, old, replayed, of another key; a stranger's request for what is private",
        &[(CORE, &["silence"]), (SERVER, &["members_of_the_fleet", "the_same_answer_for_all_that_may_not_be_had"])],
    ),
    behaviour(
        18,
        "a new machine without multicast, seeds dead",
        &[
            ("net/src/fleet/core/tests/membership.rs", &["one_seed_is_dead_and_one_alive"]),
            ("net/src/fleet/shell/tests.rs", &["one_seed_alive_is_enough"]),
            (CROWDS, &["a_fleet_whose_seeds_are_dead"]),
            (NODE, &["a_dead_seed_does_not_keep_a_node_out"]),
        ],
    ),
    behaviour(
        19,
        "other implementations, with their ids, families and verbs",
        &[
            (INTEROP, &["everybody_finds_what_everybody_announced", "foreign_datagrams_are_answered", "items_travel_between_all"]),
            (DHT, &["at_home_among_others"]),
        ],
    ),
    behaviour(20, "forged queries, and tokens of elsewhere and of long ago", &[(DHT, &["spoofed_queries_gain_nothing"])]),
    behaviour(
        21,
        "floods of keys, contacts and `pv` of every wrong form",
        &[(DHT, &["store_flood", "bad_pv_is_left_out", "every_list_is_bounded"]), (STORAGE, &["quotas_hold", "pv_budget"])],
    ),
    behaviour(
        22,
        "loss, doubles, other orders, answers 13.9 s late and from another port",
        &[
            (
                DHT,
                &[
                    "repeats_at_2_and_6_and_gives_up_at_14",
                    "late_foreign_and_second_answers",
                    "a_lookup_moves_on_after_d",
                    "any_one_of_three_is_enough",
                ],
            ),
            (SIM, &["loss_and_duplicates"]),
            (NODE, &["repeated_and_reordered_datagrams_change_nothing", "a_third_of_all_datagrams_lost"]),
        ],
    ),
    behaviour(
        23,
        "statements about a node, without proof, by many, old and replayed",
        &[(SIM, &["items_and_statements", "a_flood_of_statements_is_bounded"]), (DHT, &["statements"]), (STORAGE, &["statements"])],
    ),
    behaviour(
        24,
        "a machine three months behind, and somebody who records all it says",
        &[(
            "tests/it/discretion.rs",
            &["a_watcher_learns_nothing_of_what_is_not_patched", "old_lists_silence_everything_until_they_are_looked_up"],
        )],
    ),
    behaviour(
        25,
        "a delta that is a bomb, of an unknown recipe, cut off or for another file; a machine cloned with its key",
        &[
            ("src/core/src/delta/tests.rs", &["hostile_deltas", "hostile_commands", "a_bomb_as_the_old_file"]),
            ("tests/it/deltas.rs", &["hostile_deltas_are_refused", "a_bomb_costs_its_signer_his_key"]),
            (DHT, &["tells_of_clones"]),
            (NODE, &["a_clone_takes_a_key_of_its_own"]),
        ],
    ),
];

/// Two at once.
const TOGETHER: &[(&str, &[&str])] = &[(PAIRS, &["every_pair_of_peers", "every_peer_beside_every_mirror"])];

/// A row whose test was renamed or removed would go on claiming what nothing asserts.
#[test]
fn every_behaviour_has_its_tests() {
    let numbers: BTreeSet<u32> = BEHAVIOURS.iter().map(|behaviour| behaviour.number).collect();
    assert_eq!(numbers.into_iter().collect::<Vec<_>>(), (1..=25).collect::<Vec<_>>());
    for (file, names) in BEHAVIOURS.iter().flat_map(|behaviour| behaviour.tests).chain(TOGETHER) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file);
        let text = std::fs::read_to_string(&path).unwrap_or_else(|err| panic!("read {file}: {err}"));
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        for name in *names {
            // A method may have the name of its test.
            let named: Vec<usize> = (0..lines.len()).filter(|at| lines[*at].contains(&format!("fn {name}("))).collect();
            assert!(!named.is_empty(), "{file} has no {name}");
            let is_mark = |line: &&str| line.starts_with("#[test]") || line.starts_with("#[tokio::test");
            let marked = named.iter().any(|at| lines[at.saturating_sub(3)..*at].iter().any(is_mark));
            assert!(marked, "{file}: {name} is not a test");
        }
    }
    assert!(BEHAVIOURS.iter().all(|behaviour| !behaviour.what.is_empty()));
}
