//! Scheduling order of the admission queue. Pure, without a clock.
//!
//! A *ticket* waits for one permit in a *group* (an upstream). It has one *entry* for each request that waits
//! for the same work. The first entry whose turn comes takes the permit, and the others leave. The order:
//!
//! 1. The highest [`Class`] that may have a permit. A class that was passed over [`PASSED_OVER_MAX`] times is
//!    next.
//! 2. Within a class round robin over clients, then over a client's groups, then over its flows in a group.
//!    Within a flow first come, first served.
//!
//! A share of all permits, and of each group's, is reserved for the higher classes (see [`share`]), so that
//! large blobs or invented digests never hold all of them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::round_robin::RoundRobin;
use super::{Class, Demand, Peer};

/// A waiting class is served after this many grants to higher classes.
const PASSED_OVER_MAX: u32 = 4;

const CLASSES: usize = Class::ALL.len();

/// An upstream: a group of permits with a limit of its own.
pub(super) type Group = Arc<str>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Ticket(u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Entry(u64);

/// A permit in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct PermitId(u64);

/// Limits of waiting requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) waiting_max: usize,
    pub(super) waiting_per_peer_max: usize,
}

/// The limit that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum LimitHit {
    Client,
    Total,
}

type Flow = BTreeMap<Entry, Ticket>;
type ClassQueue = RoundRobin<Peer, RoundRobin<Group, RoundRobin<u64, Flow>>>;

pub(super) struct Scheduler {
    limits: Limits,
    /// Permits of all groups.
    total: Usage,
    /// Whether several groups share the permits, so that one may not hold them all.
    is_shared: bool,
    groups: BTreeMap<Group, Usage>,
    class_queues: [ClassQueue; CLASSES],
    passed_over: [u32; CLASSES],
    tickets: HashMap<Ticket, (Group, BTreeSet<Entry>)>,
    entries: HashMap<Entry, (Ticket, Demand)>,
    by_peer: BTreeMap<Peer, BTreeSet<Entry>>,
    permit: HashMap<PermitId, (Group, Class)>,
    last: u64,
}

/// Number of permits, how many each class holds, and how many of its entries wait.
#[derive(Clone, Default)]
struct Usage {
    max: Option<usize>,
    in_use: [usize; CLASSES],
    waiting: [usize; CLASSES],
}

impl Usage {
    fn in_use(&self) -> usize {
        self.in_use.iter().sum()
    }

    /// Whether one more permit for `class` leaves each higher class its share.
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

    /// As if so many permits of `class` were returned.
    fn without(&self, class: Class, returned: usize) -> Self {
        let mut usage = self.clone();
        if let Some(in_use) = usage.in_use.get_mut(class as usize) {
            *in_use = in_use.saturating_sub(returned);
        }
        usage
    }

    fn waits(&self, class: Class) -> bool {
        self.waiting
            .get(class as usize)
            .is_some_and(|waiting| *waiting > 0)
    }
}

/// How many of `max` permits this class and the lower ones may hold together.
fn share(class: Class, max: usize) -> usize {
    match class {
        Class::Revalidation => max,
        Class::Interactive => max - max / 8,
        Class::Bulk => max - max / 4,
        Class::Background => (max / 2).max(1).min(max),
    }
}

/// Like [`share`], for one group's permits. Background work gets less of them.
fn share_of_group(class: Class, max: usize) -> usize {
    match class {
        Class::Background => (max / 8).max(1).min(max),
        _ => share(class, max),
    }
}

/// The entry whose turn it is.
struct Candidate {
    peer: Peer,
    group: Group,
    flow: u64,
    ticket: Ticket,
}

/// A granted permit. Its ticket no longer waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Grant {
    pub(super) ticket: Ticket,
    pub(super) permit: PermitId,
}

impl Scheduler {
    pub(super) fn new(max: usize, is_shared: bool, limits: Limits) -> Self {
        Self {
            limits,
            total: Usage {
                max: Some(max),
                ..Usage::default()
            },
            is_shared,
            groups: BTreeMap::new(),
            class_queues: Default::default(),
            passed_over: [0; CLASSES],
            tickets: HashMap::new(),
            entries: HashMap::new(),
            by_peer: BTreeMap::new(),
            permit: HashMap::new(),
            last: 0,
        }
    }

    fn id(&mut self) -> u64 {
        self.last += 1;
        self.last
    }

    /// Sets the number of permits. Those in use count towards it.
    pub(super) fn resize(&mut self, max: usize) {
        self.total.max = Some(max);
    }

    /// Sets the number of permits of one group.
    pub(super) fn resize_group(&mut self, group: &Group, max: usize) {
        self.groups.entry(Arc::clone(group)).or_default().max = Some(max);
    }

    /// Adds a ticket with an entry for each of these requests.
    pub(super) fn enter(&mut self, group: &Group, demands: impl IntoIterator<Item = Demand>) -> Ticket {
        let ticket = Ticket(self.id());
        self.tickets.insert(ticket, (Arc::clone(group), BTreeSet::new()));
        for demand in demands {
            self.join(ticket, demand);
        }
        ticket
    }

    /// Adds an entry to a ticket. `None` if the ticket no longer waits.
    pub(super) fn join(&mut self, ticket: Ticket, demand: Demand) -> Option<Entry> {
        let entry = Entry(self.id());
        let (group, entries) = self.tickets.get_mut(&ticket)?;
        entries.insert(entry);
        let Demand { peer, flow, class } = demand;
        if let Some(class_queue) = self.class_queues.get_mut(class as usize) {
            class_queue
                .get_or_default(peer)
                .get_or_default(Arc::clone(group))
                .get_or_default(flow)
                .insert(entry, ticket);
        }
        let usage = self.groups.entry(Arc::clone(group)).or_default();
        if let Some(waiting) = usage.waiting.get_mut(class as usize) {
            *waiting += 1;
        }
        self.entries.insert(entry, (ticket, demand));
        self.by_peer.entry(peer).or_default().insert(entry);
        Some(entry)
    }

    /// Removes an entry. Returns its ticket if that was its last entry and the ticket was removed as well.
    pub(super) fn leave(&mut self, entry: Entry) -> Option<Ticket> {
        let (ticket, demand) = self.entries.remove(&entry)?;
        let (group, entries) = self.tickets.get_mut(&ticket)?;
        entries.remove(&entry);
        let is_last = entries.is_empty();
        let Demand { peer, flow, class } = demand;
        if let Some(class_queue) = self.class_queues.get_mut(class as usize) {
            class_queue.update(&peer, |groups| {
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
        if let Some(usage) = self.groups.get_mut(group)
            && let Some(waiting) = usage.waiting.get_mut(class as usize)
        {
            *waiting = waiting.saturating_sub(1);
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

    /// Removes a ticket and its entries.
    pub(super) fn withdraw(&mut self, ticket: Ticket) {
        let entries = self.tickets.get(&ticket).map(|(_, entries)| entries.clone());
        for entry in entries.into_iter().flatten() {
            self.leave(entry);
        }
        self.tickets.remove(&ticket);
    }

    /// Grants the next permit, if one is free and an entry may have it.
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
        if let Some(class_queue) = self.class_queues.get_mut(class as usize)
            && let Some(groups) = class_queue.serve(&next.peer)
            && let Some(flows) = groups.serve(&next.group)
        {
            flows.serve(&next.flow);
        }
        self.withdraw(next.ticket);
        self.total.count(class);
        self.groups
            .entry(Arc::clone(&next.group))
            .or_default()
            .count(class);
        let permit = PermitId(self.id());
        self.permit.insert(permit, (next.group, class));
        Some(Grant {
            ticket: next.ticket,
            permit,
        })
    }

    fn passed_over(&self, class: Class) -> u32 {
        self.passed_over.get(class as usize).copied().unwrap_or_default()
    }

    /// The next entry of a class, among those for which a permit is free.
    fn find(&self, class: Class) -> Option<Candidate> {
        let max = self.total.max.unwrap_or_default();
        if !self.total.fits(class, max, share) {
            return None;
        }
        let class_queue = self.class_queues.get(class as usize)?;
        class_queue.find(|peer, groups| {
            groups.find(|group, flows| {
                if !self.group_fits(group, class) {
                    return None;
                }
                flows.find(|flow, entries| {
                    entries.first_key_value().map(|(_, ticket)| Candidate {
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
        let usage = self.groups.get(group);
        usage.is_none_or(|usage| self.usage_fits(usage, class))
    }

    /// Whether a group with this usage may have one more permit for `class`.
    fn usage_fits(&self, usage: &Usage, class: Class) -> bool {
        let all = self.total.max.unwrap_or_default();
        let most = if self.is_shared { all - all / 4 } else { all };
        let max = usage.max.map_or(most, |max| max.min(most));
        usage.fits(class, max, share_of_group)
    }

    /// Whether an entry waits for permits like this one: it could have one if this permit's group returned those of
    /// its class. After a limit was lowered, one alone may not suffice.
    pub(super) fn is_awaited(&self, permit: PermitId) -> bool {
        let Some((group, held)) = self.permit.get(&permit) else {
            return false;
        };
        let usage = self.groups.get(group);
        let returned = usage.and_then(|usage| usage.in_use.get(*held as usize));
        let returned = returned.copied().unwrap_or_default();
        let total = self.total.without(*held, returned);
        let max = self.permits_max();
        let could_start = |of: &Group, usage: &Usage, class: Class| {
            usage.waits(class)
                && if of == group {
                    self.usage_fits(&usage.without(*held, returned), class)
                } else {
                    self.usage_fits(usage, class)
                }
        };
        Class::ALL
            .into_iter()
            .filter(|class| total.fits(*class, max, share))
            .any(|class| {
                let mut groups = self.groups.iter();
                groups.any(|(of, usage)| could_start(of, usage, class))
            })
    }

    /// Releases a permit.
    pub(super) fn release(&mut self, permit: PermitId) {
        if let Some((group, class)) = self.permit.remove(&permit) {
            self.total.uncount(class);
            if let Some(usage) = self.groups.get_mut(&group) {
                usage.uncount(class);
            }
        }
    }

    /// Counts a permit in use as one of this class, if that is a higher one.
    pub(super) fn raise(&mut self, permit: PermitId, class: Class) {
        let Some((group, old)) = self.permit.get_mut(&permit) else {
            return;
        };
        if class >= *old {
            return;
        }
        for usage in [Some(&mut self.total), self.groups.get_mut(group)]
            .into_iter()
            .flatten()
        {
            usage.uncount(*old);
            usage.count(class);
        }
        *old = class;
    }

    /// Whether this client exceeds its limit of waiting requests.
    pub(super) fn is_over_client_limit(&self, peer: Peer) -> bool {
        self.waiting_of(peer) > self.limits.waiting_per_peer_max
    }

    /// If the total limit is exceeded: the newest entry of the client with the most entries.
    pub(super) fn entry_over_limit(&self) -> Option<Entry> {
        if self.entries.len() <= self.limits.waiting_max {
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

    /// Number of waiting requests.
    pub(super) fn waiting(&self) -> usize {
        self.entries.len()
    }

    /// Number of waiting requests of a class.
    pub(super) fn waiting_in(&self, class: Class) -> usize {
        let of_class = |(_, demand): &&(Ticket, Demand)| demand.class == class;
        self.entries.values().filter(of_class).count()
    }

    pub(super) fn permits_max(&self) -> usize {
        self.total.max.unwrap_or_default()
    }

    pub(super) fn in_use(&self) -> usize {
        self.total.in_use()
    }

    pub(super) fn in_use_of(&self, group: &str) -> usize {
        self.groups.get(group).map_or(0, Usage::in_use)
    }

    pub(super) fn waiting_of_group(&self, group: &str) -> usize {
        self.tickets.values().filter(|(of, _)| &**of == group).count()
    }
}

#[cfg(test)]
mod tests;
