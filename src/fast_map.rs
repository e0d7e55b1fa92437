//! Hash map of the request path, for keys from the configuration and other keys of small number. Its hash takes a quarter of
//! the instructions of the standard library's, and does not withstand clients that choose the keys.

use std::collections::HashMap;

use foldhash::fast::RandomState;

/// A hash map with a fast hash.
pub type FastMap<K, V> = HashMap<K, V, RandomState>;
