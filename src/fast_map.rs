//! Hash maps of the request path. foldhash takes a quarter of the instructions of the standard library's. It is seeded
//! at random too, and all of these maps are bounded.

use std::collections::{HashMap, HashSet};

use foldhash::fast::RandomState;

/// A hash map with a fast hash.
pub type FastMap<K, V> = HashMap<K, V, RandomState>;

/// A hash set with a fast hash.
pub type FastSet<K> = HashSet<K, RandomState>;
