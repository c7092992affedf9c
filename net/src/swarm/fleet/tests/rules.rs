//! The coordinator's rules one by one, with one file of a group and a half, and the asker's order.

use super::*;

const PIECES: u64 = 24;

struct Table {
    view: Arc<View>,
    key: GroupKey,
    size: u64,
    coordinator: Coordinator,
    /// Members other than the coordinator.
    askers: Vec<Member>,
    now: Instant,
}

fn table(members: usize) -> Table {
    let view = view_of(0..members);
    let shape = file(1, PIECES * u64::from(poolfs_core::piece::PIECE_BYTES));
    let key = GroupKey { digest: shape.digest, group: 0 };
    let me = view.ranked(&key)[0];
    let askers = (0..members).map(member).filter(|member| member.id != me).collect();
    Table { view, key, size: shape.size, coordinator: Coordinator::new(me), askers, now: Instant::now() }
}

impl Table {
    fn ask(&mut self, asker: usize, have: u16) -> Answer {
        self.ask_with(asker, have, Vec::new())
    }

    fn ask_with(&mut self, asker: usize, have: u16, bad: Vec<SocketAddr>) -> Answer {
        let want = Want {
            key: self.key,
            size: self.size,
            have,
            bad,
            silent: Vec::new(),
            mirror_bad: false,
            mirror_pace: None,
            room: ROOM_MAX,
            newcomer: false,
        };
        self.coordinator.want(&self.view, &self.askers[asker], &want, &local(0), self.now)
    }

    fn later(&mut self, millis: u64) {
        self.now += Duration::from_millis(millis);
    }
}

fn taken(answer: &Answer) -> u16 {
    match answer {
        Answer::Now(reply) => reply.take.map_or(0, |(bits, _)| bits),
        Answer::Held | Answer::Ignored => 0,
    }
}

fn named(answer: &Answer) -> Vec<(SocketAddr, u16)> {
    match answer {
        Answer::Now(reply) => reply.from.clone(),
        Answer::Held | Answer::Ignored => Vec::new(),
    }
}

#[test]
fn groups_and_their_bits() {
    let shape = file(1, PIECES * u64::from(poolfs_core::piece::PIECE_BYTES));
    assert_eq!((groups(&shape), group_bits(&shape, 0), group_bits(&shape, 1), group_bits(&shape, 2)), (2, 0xffff, 0x00ff, 0));
    assert_eq!((groups(&file(1, 1)), group_bits(&file(1, 1), 0)), (1, 1));
    assert_eq!(groups(&file(1, 0)), 0);
}

/// Everybody finds the same coordinator, and each member is first for about as many groups.
#[test]
fn ranks_are_even_and_the_same_for_all() {
    let view = view_of(0..20);
    let mut firsts: HashMap<MemberId, u32> = HashMap::new();
    for group in 0..2_000 {
        let key = GroupKey { digest: Digest::of(b"x"), group };
        let ranked = view.ranked(&key);
        assert!(ranked.windows(2).all(|pair| weight(&pair[0], &key) >= weight(&pair[1], &key)));
        assert_eq!(view_of((0..20).rev()).ranked(&key), ranked);
        *firsts.entry(ranked[0]).or_default() += 1;
    }
    assert!(firsts.len() == 20 && firsts.values().all(|count| (60..=145).contains(count)), "{firsts:?}");
}

/// Alone one gets the whole group; while others ask, four pieces, and again what it holds when it repeats itself.
#[test]
fn leases_are_four_pieces_while_others_ask() {
    let mut table = table(5);
    assert_eq!(taken(&table.ask(0, 0)), 0xffff);
    let mut table = self::table(5);
    let first = taken(&table.ask(0, 0xfff0));
    assert_eq!(first, 0x000f);
    assert_eq!(table.ask(1, 0xfff0), Answer::Held, "all four are leased");
    assert_eq!(taken(&table.ask(0, 0xfff0)), 0x000f, "a repetition is answered the same way");
    let mut table = self::table(5);
    table.ask(0, 0x0fff);
    assert_eq!(taken(&table.ask(1, 0)), 0, "what another has is not leased");
    let mut table = self::table(5);
    assert_eq!(taken(&table.ask(0, 0xf000)), 0x0fff);
    table.later(6_000);
    table.ask(1, 0xfffe);
    assert_eq!(taken(&table.ask(2, 0xf000)).count_ones(), 0, "one of them is leased, the others are had");
}

/// The group is shared out among those who ask at the same time.
#[test]
fn leases_spread_over_who_asks() {
    let mut table = table(6);
    // The first one is alone and gets all; its five seconds pass without a word of it.
    table.ask(0, 0);
    table.later(4_900);
    (1..4).for_each(|asker| assert_eq!(table.ask(asker, 0), Answer::Held));
    table.later(200);
    let [a, b, c] = [1, 2, 3].map(|asker| taken(&table.ask(asker, 0)));
    assert_eq!((a.count_ones(), b.count_ones(), c.count_ones(), a & b, b & c, a & c), (4, 4, 4, 0, 0, 0));
}

/// Each holder is given to two askers at once; the third waits until one of them has it and is a holder itself.
#[test]
fn a_holder_serves_two_at_once() {
    let mut table = table(6);
    table.ask(0, 0xffff);
    let holder = table.askers[0].contact;
    assert_eq!(named(&table.ask(1, 0xfffe)), [(holder, 1)]);
    assert_eq!(named(&table.ask(2, 0xfffe)), [(holder, 1)]);
    assert_eq!(table.ask(3, 0xfffe), Answer::Held);
    assert!(table.coordinator.poll(table.now).is_empty());
    table.ask(1, 0xffff);
    let replies = table.coordinator.poll(table.now);
    assert_eq!(replies.len(), 1);
    assert_eq!((replies[0].0, replies[0].2.from.clone()), (table.askers[3].id, vec![(table.askers[1].contact, 1)]));
}

/// Many pieces from many holders: up to four, each its share.
#[test]
fn pieces_are_shared_among_holders() {
    let mut table = table(8);
    (0..5).for_each(|holder| drop(table.ask(holder, 0xffff)));
    let named = named(&table.ask(5, 0));
    assert_eq!(named.len(), FROM_MAX);
    assert_eq!(named.iter().fold(0, |all, (_, bits)| all | bits), 0xffff);
    assert!(named.iter().all(|(_, bits)| bits.count_ones() == 4));
}

/// Holders of one's own zone are named first.
#[test]
fn own_zone_first() {
    let mut table = table(6);
    let zones = ["a", "b", "b"];
    for (asker, zone) in zones.iter().enumerate() {
        table.askers[asker].zone = Arc::from(*zone);
    }
    table.ask(0, 0xffff);
    table.ask(1, 0xffff);
    assert_eq!(named(&table.ask(2, 0xfffe)), [(table.askers[1].contact, 1)]);
}

/// A lease that nobody renews is broken after five seconds; one that is renewed is given to a second when it is slow.
#[test]
fn a_second_lease_needs_a_broken_or_a_slow_first() {
    let mut table = table(5);
    table.ask(0, 0xfffe);
    table.later(4_000);
    table.ask(0, 0xfffe);
    assert_eq!(table.ask(1, 0xfffe), Answer::Held, "renewed and not slow yet");
    table.later(1_500);
    table.ask(0, 0xfffe);
    assert_eq!(taken(&table.ask(1, 0xfffe)), 1, "five seconds: slow");
    assert_eq!(table.ask(2, 0xfffe), Answer::Held, "two at once");
}

/// Three leases in ten minutes came to nothing: one asker in 250 ms is set free.
#[test]
fn after_three_leases_askers_are_set_free() {
    let mut table = table(6);
    for asker in 0..3 {
        assert_eq!(taken(&table.ask(asker, 0xfffe)), 1, "{asker}");
        table.later(5_000);
    }
    let free = Answer::Now(Reply { free: true, ..Reply::default() });
    assert_eq!(table.ask(3, 0xfffe), free);
    assert_eq!(table.ask(4, 0xfffe), Answer::Held);
    table.later(250);
    assert_eq!(table.ask(4, 0xfffe), free);
}

/// What fails one asker is not named to it again, and if nobody else has it, it gets a lease; others are still sent there.
#[test]
fn a_failed_holder_is_not_named_again() {
    let mut table = table(5);
    table.ask(0, 0xffff);
    let holder = table.askers[0].contact;
    assert_eq!(named(&table.ask(1, 0xfffe)), [(holder, 1)]);
    assert_eq!(taken(&table.ask_with(1, 0xfffe, vec![holder])), 1);
    assert_eq!(named(&table.ask(2, 0xfffe)), [(holder, 1)]);
}

/// Members that told of the whole file are holders before anybody asks.
#[test]
fn told_files_have_holders() {
    let mut table = table(5);
    let (holder, digest) = (table.askers[0].clone(), table.key.digest);
    table.coordinator.told(&table.view, holder.id, &[digest], table.now);
    assert_eq!(named(&table.ask(1, 0)), [(holder.contact, 0xffff)]);
}

/// Who hears of a whole file while others wait for its pieces names the holder to them at once.
#[test]
fn told_files_help_who_waits() {
    let mut table = table(5);
    assert_eq!(taken(&table.ask(0, 0xfffe)), 1);
    assert_eq!(table.ask(1, 0xfffe), Answer::Held);
    let (holder, digest) = (table.askers[2].clone(), table.key.digest);
    table.coordinator.told(&table.view, holder.id, &[digest], table.now);
    let replies = table.coordinator.poll(table.now);
    assert_eq!(replies.len(), 1);
    assert_eq!((replies[0].0, replies[0].2.from.clone()), (table.askers[1].id, vec![(holder.contact, 1)]));
}

/// Who is not first says who is, and only somebody of greater weight.
#[test]
fn who_is_not_first_names_who_is() {
    let mut table = table(5);
    let ranked = table.view.ranked(&table.key);
    table.coordinator = Coordinator::new(ranked[2]);
    let contact = |nth: usize| table.view.member(ranked[nth]).unwrap().contact;
    let (first, second) = (contact(0), contact(1));
    let see = |contact| Answer::Now(Reply { see: Some(contact), ..Reply::default() });
    let asker = table.askers.iter().position(|member| member.id == ranked[3]).unwrap();
    assert_eq!(table.ask(asker, 0), see(first));
    assert_eq!(table.ask_with(asker, 0, vec![first]), see(second));
    // Neither can be reached by the asker: after a while it is served here.
    assert_eq!(table.ask_with(asker, 0, vec![first, second]), Answer::Held);
    table.later(3_000);
    assert_eq!(taken(&table.ask_with(asker, 0, vec![first, second])), 0xffff);
    assert_eq!(table.coordinator.groups(), 1);
}

/// What this machine has itself is named to others.
#[test]
fn the_coordinator_is_a_holder_too() {
    let mut table = table(3);
    let me = table.view.ranked(&table.key)[0];
    let want = Want {
        key: table.key,
        size: table.size,
        have: 0xfffe,
        bad: Vec::new(),
        silent: Vec::new(),
        mirror_bad: false,
        mirror_pace: None,
        room: ROOM_MAX,
        newcomer: false,
    };
    let answer = table.coordinator.want(&table.view, &table.askers[0], &want, &local(0xffff), table.now);
    assert_eq!(named(&answer), [(table.view.member(me).unwrap().contact, 1)]);
}

/// Past ten thousand groups the oldest are forgotten; nonsense makes none.
#[test]
fn memory_is_bounded() {
    let view = view_of(0..2);
    let mut coordinator = Coordinator::new(member_id(0));
    let now = Instant::now();
    let mut most = 0;
    for nth in 0..30_000usize {
        let shape = file(nth, 1_000);
        let want = Want {
            key: GroupKey { digest: shape.digest, group: 0 },
            size: 1_000,
            have: 0,
            bad: Vec::new(),
            silent: Vec::new(),
            mirror_bad: false,
            mirror_pace: None,
            room: ROOM_MAX,
            newcomer: false,
        };
        coordinator.want(&view, &member(1), &want, &local(0), now + Duration::from_millis(nth as u64));
        most = most.max(coordinator.groups());
    }
    assert!((9_000..=GROUPS_MAX).contains(&most), "{most}");
    let nonsense = Want {
        key: GroupKey { digest: Digest::of(b""), group: 7 },
        size: 10,
        have: 0xffff,
        bad: Vec::new(),
        silent: Vec::new(),
        mirror_bad: false,
        mirror_pace: None,
        room: ROOM_MAX,
        newcomer: false,
    };
    assert_eq!(coordinator.want(&view, &member(1), &nonsense, &local(0), now), Answer::Ignored);
    for nth in 0..500_000u32 {
        coordinator.told(&view, member_id(1), &[Digest::of(&nth.to_be_bytes())], now);
    }
    assert_eq!(coordinator.told_count, 200_000);
}

/// Eight groups at once, each machine in an order of its own.
#[test]
fn askers_go_through_groups_in_their_own_order() {
    let view = view_of(0..4);
    let order = |at: usize| -> Vec<Digest> {
        let mut asker = Asker::new(member_id(at), 1);
        (0..40).for_each(|nth| assert!(asker.want(file(nth, 1_000), |_| false)));
        asker.tick(&view, Instant::now());
        let wants = std::iter::from_fn(|| asker.poll()).map(|todo| match todo {
            AskDo::Want { want, .. } => want.key.digest,
            other => panic!("{other:?}"),
        });
        wants.collect()
    };
    assert_eq!(order(0).len(), GROUPS_AT_ONCE);
    assert_ne!(order(0), order(1));
}

/// Pieces that came some other way are not asked for when their group's turn comes.
#[test]
fn what_came_by_itself_is_not_asked_for() {
    let view = view_of(0..4);
    let now = Instant::now();
    let shape = file(0, 16 * 262_144 * 12);
    let mut asker = Asker::new(member_id(0), 1);
    assert!(asker.want(shape, |_| false));
    for piece in 0..shape.pieces() - 1 {
        asker.fetched(&view, shape.digest, piece, now);
        asker.fetched(&view, shape.digest, piece, now);
    }
    asker.tick(&view, now);
    let wants: Vec<(u32, u16)> = std::iter::from_fn(|| asker.poll())
        .map(|todo| match todo {
            AskDo::Want { want, .. } => (want.key.group, want.have),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(wants, [(11, 0x7fff)]);
    asker.fetched(&view, shape.digest, shape.pieces() - 1, now);
    assert!(std::iter::from_fn(|| asker.poll()).any(|todo| todo == AskDo::Done(shape.digest)));
    assert!(asker.is_idle());
}

/// Something happens between the time at which an answer is overdue and the tick: the time is not lost, and acting on it
/// moves it on, so that the caller does not spin.
#[test]
fn an_event_does_not_hide_what_is_overdue() {
    let view = view_of(0..4);
    let mut now = Instant::now();
    let mut asker = Asker::new(member_id(0), 1);
    (0..2).for_each(|nth| assert!(asker.want(file(nth, 1_000), |_| false)));
    asker.tick(&view, now);
    let due = asker.next_timeout().unwrap();
    now = due + Duration::from_millis(1);
    asker.fetched(&view, file(0, 1_000).digest, 0, now);
    assert_eq!(asker.next_timeout(), Some(due));
    for _ in 0..1_000 {
        asker.tick(&view, now);
        std::iter::from_fn(|| asker.poll()).for_each(drop);
        let next = asker.next_timeout().unwrap();
        assert!(next > now);
        now = next;
    }
}
