//! Tag removal: a removed tag stays removed, whatever the index has lost.

use super::*;
use crate::store::index::handle::Location;
use crate::store::index::lossy::Flushed;
use crate::store::index::slow::slow_location;
use crate::store::invalidations::InvalidationKey;

fn opened(fs: &Arc<dyn FileSystem>, location: Location) -> Store {
    Store::open_with(&Settings::default(), Arc::clone(fs), at(0), |_| location).unwrap()
}

#[test]
fn t08_removed_tag_stays_removed_after_crash() {
    let fs: Arc<dyn FileSystem> = Arc::new(MemoryFs::new());
    let flushed = Flushed::default();
    let store = opened(&fs, flushed.location());
    let invalidation = InvalidationKey::from(&key("3"));
    store.put_tag(&key("3"), variant(1, b"image", 1)).unwrap();
    store.index.flush();
    store.invalidate(&invalidation, at(1)).unwrap();
    assert!(store.remove_tag(&key("3")).unwrap());
    let after_crash = flushed.now();
    assert_eq!(store.invalidated_since(&invalidation), None);
    drop(store);
    let store = opened(&fs, after_crash.location());
    assert!(store.tag(&key("3")).unwrap().is_none());
}

#[test]
fn t08_tag_with_unflushed_removal_is_invalidated() {
    let fs: Arc<dyn FileSystem> = Arc::new(MemoryFs::new());
    let (location, flushes) = slow_location();
    let store = opened(&fs, location);
    let invalidation = InvalidationKey::from(&key("3"));
    store.put_tag(&key("3"), variant(1, b"image", 1)).unwrap();
    flushes.begun();
    store.index.note_stuck();
    assert!(store.remove_tag(&key("3")).unwrap());
    assert!(store.tag(&key("3")).unwrap().is_none());
    assert!(store.invalidated_since(&invalidation).is_some());
    drop(flushes);
}
