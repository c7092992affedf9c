//! Lookups: walks of both families towards one key, what they find on the way, and storing at their end.

pub(super) use super::LookupId;
use super::address::{self, Family, Network};
use super::announce::SeedNode;
use super::query::{Budget, NotSent, Purpose};
use super::table::K;
use super::walk::{State, Walk};
use super::{CommandError, Event, FoundContact, Node, Outcome};
use crate::krpc::{Announce, ITEM_BYTES_MAX, Id, NodeInfo, Pv, Reply, Statement, Verb, Want, item_target, scan};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// Lookups under way at once, those of the node itself not counted.
pub const LOOKUPS_MAX: usize = 256;

/// Contacts that one lookup tells of.
pub const FOUND_MAX: usize = 1_000;

/// Statements that one lookup tells of.
pub const STATEMENTS_MAX: usize = 64;

/// Queries of one lookup: far more than any honest network needs.
pub const QUERIES_MAX: u32 = 200;

/// Nodes of one family that are asked a second time for `pvs`: one after the other, while contacts without `pv` are left.
pub const DETAILS_MAX: usize = 2;

/// Lookups whose duration the status is computed from.
pub(super) const RECENT_MAX: usize = 256;

/// What a lookup is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Kind {
    FindNode,
    GetPeers,
    GetStatements,
    GetItem,
    Put(Vec<u8>),
    Speak(Vec<u8>),
    /// Upkeep of a table; nobody waits for it.
    Refresh,
    /// Where a key is to be announced; see `announce`.
    Announce,
}

/// A lookup under way.
#[derive(Debug)]
pub(super) struct Lookup {
    kind: Kind,
    target: Id,
    walks: [Option<Walk>; 2],
    ended: [bool; 2],
    started: Instant,
    queries: u32,
    answers: u32,
    first_after: Option<Duration>,
    found: BTreeMap<SocketAddr, bool>,
    statements: Vec<Vec<u8>>,
    details_asked: [usize; 2],
    /// Nodes that have contacts, with their tokens.
    holders: [Vec<(NodeInfo, Vec<u8>)>; 2],
    second_half: Vec<SocketAddr>,
    in_second_half: bool,
    stored: u32,
}

impl Lookup {
    pub(super) fn is_command(&self) -> bool {
        !matches!(self.kind, Kind::Refresh | Kind::Announce)
    }

    fn budget(&self) -> Budget {
        if self.is_command() { Budget::Lookup } else { Budget::Upkeep }
    }

    fn verb(&self) -> Verb {
        let want = Want::default();
        match self.kind {
            Kind::FindNode | Kind::Refresh => Verb::FindNode { target: self.target, want },
            Kind::GetPeers | Kind::GetStatements | Kind::Speak(_) | Kind::Announce => {
                Verb::GetPeers { key: self.target, want, pv: false, statements: false, token: None }
            }
            Kind::GetItem | Kind::Put(_) => Verb::Get { target: self.target, want },
        }
    }
}

impl Node {
    /// Finds the nodes closest to `target`.
    ///
    /// # Errors
    /// [`CommandError::Busy`].
    pub fn find_node(&mut self, target: Id, now: Instant) -> Result<LookupId, CommandError> {
        self.command(Kind::FindNode, target, now)
    }

    /// Finds contacts of `key`, with what they say of themselves where poolfs nodes keep it.
    ///
    /// # Errors
    /// [`CommandError::Busy`].
    pub fn get_peers(&mut self, key: Id, now: Instant) -> Result<LookupId, CommandError> {
        let lookup = self.begin_command(Kind::GetPeers, key, now)?;
        let mut own: Vec<FoundContact> = Vec::new();
        for family in Family::ALL {
            let kept = self.store.sample(&key, family, FOUND_MAX, self.now, &mut self.rng);
            own.extend(kept.into_iter().map(|c| FoundContact { addr: c.addr, pv: c.pv.as_deref().and_then(|pv| Pv::parse(pv).ok()) }));
        }
        self.tell_found(lookup, own);
        self.pump(lookup);
        Ok(lookup)
    }

    /// Finds statements about the node `subject`.
    ///
    /// # Errors
    /// [`CommandError::Busy`].
    pub fn get_statements(&mut self, subject: Id, now: Instant) -> Result<LookupId, CommandError> {
        let place = subject.not();
        let lookup = self.begin_command(Kind::GetStatements, place, now)?;
        // What this node keeps itself nobody else may have.
        let now_s = self.unix_now();
        let own = self.store.statements(&place, STATEMENTS_MAX, now_s, &mut self.rng);
        self.tell_statements(lookup, own);
        self.pump(lookup);
        Ok(lookup)
    }

    /// Finds the BEP 44 item whose SHA-1 is `target`.
    ///
    /// # Errors
    /// [`CommandError::Busy`].
    pub fn get_item(&mut self, target: Id, now: Instant) -> Result<LookupId, CommandError> {
        self.command(Kind::GetItem, target, now)
    }

    /// Keeps a bencoded value of at most 1,000 bytes at the nodes closest to its hash, [`item_target`].
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn put_item(&mut self, value: Vec<u8>, now: Instant) -> Result<LookupId, CommandError> {
        if value.len() > ITEM_BYTES_MAX || !scan::scan(&value).is_ok_and(|s| s.canonical) {
            return Err(CommandError::NotAnItem);
        }
        let target = item_target(&value);
        self.command(Kind::Put(value), target, now)
    }

    /// Keeps a statement at the nodes closest to the NOT of `subject`, the id of the node that it is about.
    ///
    /// # Errors
    /// [`CommandError`].
    pub fn speak(&mut self, subject: Id, statement: Vec<u8>, now: Instant) -> Result<LookupId, CommandError> {
        self.advance(now);
        let place = subject.not();
        if !Statement::check(&statement, self.unix_now()).is_ok_and(|s| s.belongs_at(&place)) {
            return Err(CommandError::NotAStatement);
        }
        self.command(Kind::Speak(statement), place, now)
    }

    /// Ends a lookup without an [`Event::Done`]. Queries under way still teach the tables.
    pub fn cancel(&mut self, lookup: LookupId) {
        self.lookups.remove(&lookup);
    }

    fn command(&mut self, kind: Kind, target: Id, now: Instant) -> Result<LookupId, CommandError> {
        let lookup = self.begin_command(kind, target, now)?;
        self.pump(lookup);
        Ok(lookup)
    }

    /// As [`Self::command`], but asks nobody yet: a lookup that nobody can be asked for ends with its first [`Self::pump`], and what this
    /// node knows itself has to be told before.
    fn begin_command(&mut self, kind: Kind, target: Id, now: Instant) -> Result<LookupId, CommandError> {
        self.advance(now);
        if self.lookups.values().filter(|l| l.is_command()).count() >= LOOKUPS_MAX {
            return Err(CommandError::Busy);
        }
        Ok(self.begin_lookup(kind, target, self.config.families, &[], &[]))
    }

    /// Begins to walk in `families`, from the tables and `seeds`, and passes `silent` nodes over.
    pub(super) fn start_lookup(
        &mut self,
        kind: Kind,
        target: Id,
        families: [bool; 2],
        seeds: &[SeedNode],
        silent: &[NodeInfo],
    ) -> LookupId {
        let id = self.begin_lookup(kind, target, families, seeds, silent);
        self.pump(id);
        id
    }

    fn begin_lookup(&mut self, kind: Kind, target: Id, families: [bool; 2], seeds: &[SeedNode], silent: &[NodeInfo]) -> LookupId {
        let id = LookupId(self.number());
        let mut walks = [None, None];
        for family in Family::ALL {
            let f = family as usize;
            if !families[f] {
                continue;
            }
            let mut walk = Walk::new(target, self.ids[f], self.config.network, self.config.concurrency);
            for seed in seeds.iter().filter(|s| Family::of(s.info.addr) == family) {
                let state = if seed.has_answered_for(&target) { State::Answered } else { State::Fresh };
                walk.add(seed.info, 0, state, seed.poolfs);
            }
            for node in silent.iter().filter(|node| Family::of(node.addr) == family) {
                walk.add(*node, 0, State::Failed, false);
            }
            for entry in self.tables[f].closest(&target, 2 * K) {
                walk.add(entry.info, 0, State::Fresh, entry.poolfs);
            }
            walks[f] = Some(walk);
        }
        let lookup = Lookup {
            kind,
            target,
            ended: [walks[0].is_none(), walks[1].is_none()],
            walks,
            started: self.now,
            queries: 0,
            answers: 0,
            first_after: None,
            found: BTreeMap::new(),
            statements: Vec::new(),
            details_asked: [0; 2],
            holders: [Vec::new(), Vec::new()],
            second_half: Vec::new(),
            in_second_half: false,
            stored: 0,
        };
        self.lookups.insert(id, lookup);
        id
    }

    /// Asks whom the lookup may ask now, and ends what is at its end.
    fn pump(&mut self, id: LookupId) {
        for family in [0, 1] {
            loop {
                let Some(lookup) = self.lookups.get_mut(&id) else { return };
                if lookup.ended[family] || lookup.queries >= QUERIES_MAX {
                    break;
                }
                let Some(walk) = lookup.walks[family].as_mut() else { break };
                let Some((info, _)) = walk.next_to_ask() else { break };
                let (verb, budget) = (lookup.verb(), lookup.budget());
                let sent = self.query(info.addr, Some(info.id), verb, Purpose::Walk(id), budget);
                let lookup = self.lookups.get_mut(&id).expect("sending a query ends no lookup");
                let walk = lookup.walks[family].as_mut().expect("it was there before the query");
                match sent {
                    Ok(()) => lookup.queries += 1,
                    Err(NotSent::Until(at)) => {
                        walk.postponed(&info);
                        self.pump_at = Some(self.pump_at.map_or(at, |now| now.min(at)));
                        break;
                    }
                    Err(NotSent::AddressUntil(_) | NotSent::Never) => walk.failed(&info),
                }
            }
            let Some(lookup) = self.lookups.get_mut(&id) else { return };
            let spent = lookup.queries >= QUERIES_MAX;
            if let Some(walk) = lookup.walks[family].as_ref().filter(|_| !lookup.ended[family]) {
                lookup.ended[family] = spent || walk.is_finished(false);
            }
        }
        self.conclude(id);
    }

    /// All lookups that a rate held up.
    pub(super) fn pump_all(&mut self) {
        let ids: Vec<LookupId> = self.lookups.keys().copied().collect();
        ids.into_iter().for_each(|id| self.pump(id));
    }

    pub(super) fn pump_all_if_due(&mut self) {
        if self.pump_at.is_some_and(|at| at <= self.now) {
            self.pump_at = None;
            self.pump_all();
        }
    }

    fn walk_mut(&mut self, id: LookupId, addr: SocketAddr) -> Option<&mut Walk> {
        self.lookups.get_mut(&id)?.walks[Family::of(addr) as usize].as_mut()
    }

    pub(super) fn walk_silent(&mut self, id: LookupId, info: NodeInfo) {
        if let Some(walk) = self.walk_mut(id, info.addr) {
            walk.silent(&info);
            self.pump(id);
        }
    }

    pub(super) fn walk_failed(&mut self, id: LookupId, info: NodeInfo) {
        if let Some(walk) = self.walk_mut(id, info.addr) {
            walk.failed(&info);
            self.pump(id);
        }
    }

    /// Ends walks that have an answer and wait only for nodes whose repetitions are all out.
    pub(super) fn walk_patience(&mut self, id: LookupId) {
        let early = self.pending.values().any(|p| p.purpose == Purpose::Walk(id) && p.may_be_repeated());
        let Some(lookup) = self.lookups.get_mut(&id).filter(|_| !early) else { return };
        for family in [0, 1] {
            if lookup.walks[family].as_ref().is_some_and(|w| w.waits_for_silent_only() && w.has_answer()) {
                lookup.ended[family] = true;
            }
        }
        self.conclude(id);
    }

    pub(super) fn walk_answered(&mut self, id: LookupId, expected: Option<Id>, node: NodeInfo, poolfs: bool, reply: Reply) {
        let family = Family::of(node.addr);
        let network = self.config.network;
        if !self.lookups.contains_key(&id) {
            self.heard_late(node.addr);
            return;
        }
        if let Some(other) = expected.filter(|id| *id != node.id) {
            let asked = NodeInfo { id: other, addr: node.addr };
            // A node takes another id when it learns its address (BEP 42), and others tell of the old one for hours. On a
            // public network an id that its address does not allow may have been made for this very key.
            let fits = network == Network::Private || node.id.fits_address(node.addr.ip());
            if !fits || !self.walk_mut(id, node.addr).is_some_and(|walk| walk.renamed(&asked, node)) {
                self.walk_failed(id, asked);
                return;
            }
        }
        let told = if family == Family::V4 { &reply.nodes } else { &reply.nodes6 };
        let nodes: Vec<NodeInfo> =
            told.iter().filter(|n| Family::of(n.addr) == family && address::is_usable(n.addr, network)).copied().collect();
        let Some(walk) = self.walk_mut(id, node.addr) else { return };
        if walk.answered(&node, &nodes, reply.token.clone(), poolfs).is_none() {
            return;
        }
        let lookup = self.lookups.get_mut(&id).expect("its walk was there a line before");
        lookup.answers += 1;
        let holds = lookup.kind == Kind::GetPeers && poolfs && !reply.values.is_empty();
        if let Some(token) = reply.token.clone().filter(|_| holds)
            && lookup.holders[family as usize].len() < K
        {
            lookup.holders[family as usize].push((node, token));
        }
        self.take_results(id, &reply);
        self.ask_holders(id, family);
        self.pump(id);
    }

    /// Asks a holder for what the contacts say of themselves, unless one is asked already or all is known.
    fn ask_holders(&mut self, id: LookupId, family: Family) {
        let f = family as usize;
        let Some(lookup) = self.lookups.get_mut(&id) else { return };
        let asking = lookup.second_half.iter().any(|addr| Family::of(*addr) == family);
        let bare = lookup.found.iter().any(|(addr, detailed)| !detailed && Family::of(*addr) == family);
        if asking || !bare || lookup.details_asked[f] >= DETAILS_MAX || lookup.holders[f].is_empty() {
            return;
        }
        let (node, token) = lookup.holders[f].remove(0);
        lookup.details_asked[f] += 1;
        self.ask_again(id, node, token);
    }

    /// The second query of a lookup to one node, which proves this node's address.
    fn ask_again(&mut self, id: LookupId, node: NodeInfo, token: Vec<u8>) {
        let Some(lookup) = self.lookups.get(&id) else { return };
        let statements = lookup.kind == Kind::GetStatements;
        let verb = Verb::GetPeers { key: lookup.target, want: Want::default(), pv: !statements, statements, token: Some(token) };
        if self.query(node.addr, Some(node.id), verb, Purpose::Details(id), Budget::Lookup).is_ok()
            && let Some(lookup) = self.lookups.get_mut(&id)
        {
            lookup.queries += 1;
            lookup.second_half.push(node.addr);
        }
    }

    /// Contacts, items and statements of an answer.
    pub(super) fn take_results(&mut self, id: LookupId, reply: &Reply) {
        let network = self.config.network;
        let now_s = self.unix_now();
        let Some(lookup) = self.lookups.get_mut(&id) else { return };
        let since = self.now.saturating_duration_since(lookup.started);
        match lookup.kind {
            Kind::GetPeers => {
                let contacts = reply.values.iter().enumerate().filter(|(_, addr)| address::is_usable(**addr, network));
                let contacts =
                    contacts.map(|(place, addr)| FoundContact { addr: *addr, pv: reply.pvs.get(place).and_then(|pv| Pv::parse(pv).ok()) });
                let contacts = contacts.collect();
                self.tell_found(id, contacts);
            }
            Kind::GetItem => {
                let right = reply.item.as_ref().filter(|item| item_target(item) == lookup.target && lookup.first_after.is_none());
                if let Some(value) = right.cloned() {
                    lookup.first_after = Some(since);
                    lookup.ended = [true, true];
                    self.event(Event::Item { lookup: id, value });
                }
            }
            Kind::GetStatements => {
                let target = lookup.target;
                let good = |bytes: &&Vec<u8>| Statement::check(bytes, now_s).is_ok_and(|s| s.belongs_at(&target));
                self.tell_statements(id, reply.statements.iter().filter(good).cloned().collect());
            }
            _ => {}
        }
    }

    fn tell_statements(&mut self, id: LookupId, statements: Vec<Vec<u8>>) {
        let Some(lookup) = self.lookups.get_mut(&id) else { return };
        let since = self.now.saturating_duration_since(lookup.started);
        let mut new = Vec::new();
        for bytes in statements {
            if !lookup.statements.contains(&bytes) && lookup.statements.len() < STATEMENTS_MAX {
                lookup.statements.push(bytes.clone());
                new.push(bytes);
            }
        }
        if !new.is_empty() {
            lookup.first_after.get_or_insert(since);
            self.event(Event::Statements { lookup: id, statements: new });
        }
    }

    fn tell_found(&mut self, id: LookupId, contacts: Vec<FoundContact>) {
        let mut new = Vec::new();
        let own = Family::ALL.map(|family| self.own_contact(family));
        let Some(lookup) = self.lookups.get_mut(&id) else { return };
        for contact in contacts.into_iter().filter(|contact| !own.contains(&Some(contact.addr))) {
            let detailed = contact.pv.is_some();
            let full = lookup.found.len() >= FOUND_MAX;
            match lookup.found.get_mut(&contact.addr) {
                Some(known) if *known || !detailed => continue,
                Some(known) => *known = true,
                None if full => continue,
                None => drop(lookup.found.insert(contact.addr, detailed)),
            }
            new.push(contact);
        }
        if !new.is_empty() {
            lookup.first_after.get_or_insert(self.now.saturating_duration_since(lookup.started));
            self.event(Event::Found { lookup: id, contacts: new });
        }
    }

    /// A query of the second half was answered, failed, or is not waited for any more.
    pub(super) fn second_half_over(&mut self, id: LookupId, from: SocketAddr, ok: bool) {
        let Some(lookup) = self.lookups.get_mut(&id) else { return };
        lookup.second_half.retain(|addr| *addr != from);
        if ok && lookup.in_second_half {
            lookup.stored += 1;
        }
        self.ask_holders(id, Family::of(from));
        self.conclude(id);
    }

    /// Goes on to the second half, or ends, if it is time.
    fn conclude(&mut self, id: LookupId) {
        let Some(lookup) = self.lookups.get_mut(&id) else { return };
        if lookup.ended != [true, true] {
            return;
        }
        if !lookup.in_second_half && matches!(lookup.kind, Kind::Put(_) | Kind::Speak(_) | Kind::GetStatements) {
            lookup.in_second_half = true;
            self.second_half(id);
        }
        let item_found = self.lookups.get(&id).is_some_and(|l| l.kind == Kind::GetItem && l.first_after.is_some());
        let over = self.lookups.get(&id).is_some_and(|l| l.second_half.is_empty());
        if over || item_found {
            let lookup = self.lookups.remove(&id).expect("it was there a line before");
            self.ended(id, lookup);
        }
    }

    /// The closest are known: stores at them, or asks them for what they give only to who has a token.
    fn second_half(&mut self, id: LookupId) {
        let Some(lookup) = self.lookups.get(&id) else { return };
        let closest: Vec<_> = lookup.walks.iter().flatten().flat_map(Walk::closest).collect();
        let (kind, target) = (lookup.kind.clone(), lookup.target);
        let port = self.config.port;
        for candidate in closest {
            // The one that it is about would not keep it.
            if matches!(kind, Kind::Speak(_)) && candidate.info.id.same_key(&target.not()) {
                continue;
            }
            let Some(token) = candidate.token else { continue };
            let verb = match &kind {
                Kind::Put(value) => Verb::Put { value: value.clone(), token, mutable: false },
                Kind::Speak(statement) => {
                    let statement = Some(statement.clone());
                    let announce = Announce { key: target, port, implied_port: false, token, pv: None, more: Vec::new(), statement };
                    Verb::Announce(Box::new(announce))
                }
                Kind::GetStatements if candidate.poolfs => {
                    self.ask_again(id, candidate.info, token);
                    continue;
                }
                _ => continue,
            };
            // A node that must not be sent to now is passed over: eight of them are for that.
            if self.query(candidate.info.addr, Some(candidate.info.id), verb, Purpose::Store(id), Budget::Lookup).is_ok()
                && let Some(lookup) = self.lookups.get_mut(&id)
            {
                lookup.queries += 1;
                lookup.second_half.push(candidate.info.addr);
            }
        }
    }

    fn ended(&mut self, id: LookupId, lookup: Lookup) {
        let took = self.now.saturating_duration_since(lookup.started);
        let closest: Vec<_> = lookup.walks.iter().flatten().flat_map(Walk::closest).collect();
        if lookup.kind == Kind::Announce {
            self.announce_walk_ended(id, lookup.target, &lookup.walks);
            return;
        }
        if !lookup.is_command() {
            return;
        }
        if self.recent.len() == RECENT_MAX {
            self.recent.pop_front();
        }
        self.recent.push_back(lookup.first_after.unwrap_or(took));
        let outcome = Outcome {
            hops: closest.iter().map(|c| c.hop).max().unwrap_or(0),
            closest: closest.into_iter().map(|c| c.info).collect(),
            queries: lookup.queries,
            answers: lookup.answers,
            took,
            first_after: lookup.first_after,
            stored: if lookup.kind == Kind::GetStatements { 0 } else { lookup.stored },
        };
        self.event(Event::Done { lookup: id, outcome });
    }
}
