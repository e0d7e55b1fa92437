//! The scheduler: who gets the next place. Pure; it is told nothing of time.
//!
//! A *ticket* waits for one place in a *group* (an upstream), by one *entry* for each request that waits for the same
//! work. The first of its entries whose turn comes takes the place, and the others leave. The order:
//!
//! 1. The highest [`Class`] that may have a place. A class that may, and is passed over [`PASSED_OVER_MAX`] times, is next.
//! 2. Within a class round robin over clients, then over a client's groups, then over its flows in a group; within a flow
//!    first come, first served.
//!
//! Of the places, and of each group's, a share is kept for the higher classes (see [`share`]), so that what is large or
//! made up never holds all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::ring::Ring;
use super::{Class, Demand, Peer};

/// After so many grants to higher classes a class that waits is served.
const PASSED_OVER_MAX: u32 = 4;

const CLASSES: usize = Class::ALL.len();

/// A share of the places that can run short by itself: an upstream.
pub(super) type Group = Arc<str>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Entry(u64);

/// A place in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Taken(u64);

/// How many may wait.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    pub(super) waiting_max: usize,
    pub(super) waiting_per_peer_max: usize,
}

/// Which bound was met.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Met {
    Peer,
    All,
}

type Flow = BTreeMap<Entry, Ticket>;
type Line = Ring<Peer, Ring<Group, Ring<u64, Flow>>>;

pub(super) struct Core {
    bounds: Bounds,
    /// Of all groups.
    whole: Room,
    /// Whether the places are for several groups, so that one may not hold them all.
    is_shared: bool,
    groups: BTreeMap<Group, Room>,
    lines: [Line; CLASSES],
    passed_over: [u32; CLASSES],
    tickets: HashMap<Ticket, (Group, BTreeSet<Entry>)>,
    entries: HashMap<Entry, (Ticket, Demand)>,
    by_peer: BTreeMap<Peer, BTreeSet<Entry>>,
    taken: HashMap<Taken, (Group, Class)>,
    last: u64,
}

/// Places, and how many of them each class holds.
#[derive(Default)]
struct Room {
    max: Option<usize>,
    in_use: [usize; CLASSES],
}

impl Room {
    fn in_use(&self) -> usize {
        self.in_use.iter().sum()
    }

    /// Whether one more of `class` leaves each class above it its share.
    fn fits(&self, class: Class, max: usize, share: fn(Class, usize) -> usize) -> bool {
        Class::ALL
            .into_iter()
            .filter(|other| *other <= class)
            .all(|other| {
                let with_lower: usize = self.in_use.iter().skip(other as usize).sum();
                with_lower < share(other, max)
            })
    }

    fn count(&mut self, class: Class) {
        if let Some(in_use) = self.in_use.get_mut(class as usize) {
            *in_use += 1;
        }
    }

    fn uncount(&mut self, class: Class) {
        if let Some(in_use) = self.in_use.get_mut(class as usize) {
            *in_use = in_use.saturating_sub(1);
        }
    }
}

/// How many of `max` places this class and the lower ones may hold together.
fn share(class: Class, max: usize) -> usize {
    match class {
        Class::Held => max,
        Class::Interactive => max - max / 8,
        Class::Bulk => max - max / 4,
        Class::Background => (max / 2).max(1).min(max),
    }
}

/// The same of one group's.
fn share_of_group(class: Class, max: usize) -> usize {
    match class {
        Class::Background => (max / 8).max(1).min(max),
        _ => share(class, max),
    }
}

/// Who is next.
struct Next {
    peer: Peer,
    group: Group,
    flow: u64,
    ticket: Ticket,
}

/// A place given to a ticket, which no longer waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) ticket: Ticket,
    pub(super) taken: Taken,
}

impl Core {
    pub(super) fn new(max: usize, is_shared: bool, bounds: Bounds) -> Self {
        Self {
            bounds,
            whole: Room {
                max: Some(max),
                in_use: [0; CLASSES],
            },
            is_shared,
            groups: BTreeMap::new(),
            lines: Default::default(),
            passed_over: [0; CLASSES],
            tickets: HashMap::new(),
            entries: HashMap::new(),
            by_peer: BTreeMap::new(),
            taken: HashMap::new(),
            last: 0,
        }
    }

    fn id(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// From now on so many places. Those in use count.
    pub(super) fn resize(&mut self, max: usize) {
        self.whole.max = Some(max);
    }

    /// The same for one group.
    pub(super) fn resize_group(&mut self, group: &Group, max: usize) {
        self.groups.entry(Arc::clone(group)).or_default().max = Some(max);
    }

    /// A new ticket, by the entries of these requests.
    pub(super) fn enter(&mut self, group: &Group, demands: impl IntoIterator<Item = Demand>) -> Ticket {
        let ticket = Ticket(self.id());
        self.tickets.insert(ticket, (Arc::clone(group), BTreeSet::new()));
        for demand in demands {
            self.join(ticket, demand);
        }
        ticket
    }

    /// One more request waits for the same place; `None` if the ticket no longer waits.
    pub(super) fn join(&mut self, ticket: Ticket, demand: Demand) -> Option<Entry> {
        let entry = Entry(self.id());
        let (group, entries) = self.tickets.get_mut(&ticket)?;
        entries.insert(entry);
        let Demand { peer, flow, class } = demand;
        if let Some(line) = self.lines.get_mut(class as usize) {
            line.get_or_default(peer)
                .get_or_default(Arc::clone(group))
                .get_or_default(flow)
                .insert(entry, ticket);
        }
        self.entries.insert(entry, (ticket, demand));
        self.by_peer.entry(peer).or_default().insert(entry);
        Some(entry)
    }

    /// A request waits no longer. Returns its ticket if that was the last of its entries: it has left as well.
    pub(super) fn leave(&mut self, entry: Entry) -> Option<Ticket> {
        let (ticket, demand) = self.entries.remove(&entry)?;
        let (group, entries) = self.tickets.get_mut(&ticket)?;
        entries.remove(&entry);
        let is_last = entries.is_empty();
        let Demand { peer, flow, class } = demand;
        if let Some(line) = self.lines.get_mut(class as usize) {
            line.update(&peer, |groups| {
                groups.update(group, |flows| {
                    flows.update(&flow, |flow| {
                        flow.remove(&entry);
                        flow.is_empty()
                    });
                    flows.is_empty()
                });
                groups.is_empty()
            });
        }
        if let Some(entries) = self.by_peer.get_mut(&peer) {
            entries.remove(&entry);
            if entries.is_empty() {
                self.by_peer.remove(&peer);
            }
        }
        if is_last {
            self.tickets.remove(&ticket);
        }
        is_last.then_some(ticket)
    }

    /// A ticket waits no longer, nor do its entries.
    pub(super) fn withdraw(&mut self, ticket: Ticket) {
        let entries = self.tickets.get(&ticket).map(|(_, entries)| entries.clone());
        for entry in entries.into_iter().flatten() {
            self.leave(entry);
        }
        self.tickets.remove(&ticket);
    }

    /// Gives the next place away, if there is one for somebody.
    pub(super) fn next(&mut self) -> Option<Grant> {
        let candidates = Class::ALL.map(|class| self.find(class));
        let waits = |class: &Class| candidates.get(*class as usize).is_some_and(Option::is_some);
        let overdue = Class::ALL
            .into_iter()
            .filter(|class| waits(class) && self.passed_over(*class) >= PASSED_OVER_MAX)
            .max_by_key(|class| (self.passed_over(*class), std::cmp::Reverse(*class)));
        let class = overdue.or_else(|| Class::ALL.into_iter().find(|class| waits(class)))?;
        for other in Class::ALL {
            if let Some(passed_over) = self.passed_over.get_mut(other as usize) {
                *passed_over = if other > class && waits(&other) {
                    *passed_over + 1
                } else if other == class || !waits(&other) {
                    0
                } else {
                    *passed_over
                };
            }
        }
        let next = candidates.into_iter().nth(class as usize)??;
        if let Some(line) = self.lines.get_mut(class as usize)
            && let Some(groups) = line.serve(&next.peer)
            && let Some(flows) = groups.serve(&next.group)
        {
            flows.serve(&next.flow);
        }
        self.withdraw(next.ticket);
        self.whole.count(class);
        self.groups
            .entry(Arc::clone(&next.group))
            .or_default()
            .count(class);
        let taken = Taken(self.id());
        self.taken.insert(taken, (next.group, class));
        Some(Grant {
            ticket: next.ticket,
            taken,
        })
    }

    fn passed_over(&self, class: Class) -> u32 {
        self.passed_over.get(class as usize).copied().unwrap_or_default()
    }

    /// Whose turn it is in a class, among those for whom there is a place.
    fn find(&self, class: Class) -> Option<Next> {
        let max = self.whole.max.unwrap_or_default();
        if !self.whole.fits(class, max, share) {
            return None;
        }
        let line = self.lines.get(class as usize)?;
        line.find(|peer, groups| {
            groups.find(|group, flows| {
                if !self.group_fits(group, class) {
                    return None;
                }
                flows.find(|flow, entries| {
                    entries.first_key_value().map(|(_, ticket)| Next {
                        peer: *peer,
                        group: Arc::clone(group),
                        flow: *flow,
                        ticket: *ticket,
                    })
                })
            })
        })
    }

    fn group_fits(&self, group: &Group, class: Class) -> bool {
        let all = self.whole.max.unwrap_or_default();
        let most = if self.is_shared { all - all / 4 } else { all };
        let Some(room) = self.groups.get(group) else {
            return true;
        };
        let max = room.max.map_or(most, |max| max.min(most));
        room.fits(class, max, share_of_group)
    }

    /// A place is given back.
    pub(super) fn release(&mut self, taken: Taken) {
        if let Some((group, class)) = self.taken.remove(&taken) {
            self.whole.uncount(class);
            if let Some(room) = self.groups.get_mut(&group) {
                room.uncount(class);
            }
        }
    }

    /// A place in use counts as one of this class from now on, if that is a higher one.
    pub(super) fn raise(&mut self, taken: Taken, class: Class) {
        let Some((group, old)) = self.taken.get_mut(&taken) else {
            return;
        };
        if class >= *old {
            return;
        }
        for room in [Some(&mut self.whole), self.groups.get_mut(group)]
            .into_iter()
            .flatten()
        {
            room.uncount(*old);
            room.count(class);
        }
        *old = class;
    }

    /// Whether this client has too many waiting.
    pub(super) fn is_crowded_by(&self, peer: Peer) -> bool {
        self.waiting_of(peer) > self.bounds.waiting_per_peer_max
    }

    /// If too many wait in all: the newest entry of the client that has the most of them.
    pub(super) fn surplus(&self) -> Option<Entry> {
        if self.entries.len() <= self.bounds.waiting_max {
            return None;
        }
        let most = self.by_peer.values().max_by_key(|entries| entries.len());
        most.and_then(|entries| entries.last().copied())
    }

    fn waiting_of(&self, peer: Peer) -> usize {
        self.by_peer.get(&peer).map_or(0, BTreeSet::len)
    }

    pub(super) fn is_waiting(&self, ticket: Ticket) -> bool {
        self.tickets.contains_key(&ticket)
    }

    /// How many requests wait.
    pub(super) fn waiting(&self) -> usize {
        self.entries.len()
    }

    /// How many requests of a class wait.
    pub(super) fn waiting_in(&self, class: Class) -> usize {
        let of_class = |(_, demand): &&(Ticket, Demand)| demand.class == class;
        self.entries.values().filter(of_class).count()
    }

    pub(super) fn places_max(&self) -> usize {
        self.whole.max.unwrap_or_default()
    }

    pub(super) fn in_use(&self) -> usize {
        self.whole.in_use()
    }

    pub(super) fn in_use_of(&self, group: &str) -> usize {
        self.groups.get(group).map_or(0, Room::in_use)
    }

    pub(super) fn waiting_of_group(&self, group: &str) -> usize {
        self.tickets.values().filter(|(of, _)| &**of == group).count()
    }
}

#[cfg(test)]
mod tests;
