//! Last use of tags, and their pages.

use super::*;
use crate::store::access_times::ContentId;

/// A stored manifest that a tag points to.
fn tagged(store: &Store, tag: &str) -> Digest {
    let bytes = manifest(1);
    put_manifest(store, &bytes, "library/demo").unwrap();
    let digest = digest(&bytes);
    store.put_tag(&key(tag), variant(1, &bytes, 1)).unwrap();
    digest
}

fn last_use(store: &Store, tag: &str) -> Option<SystemTime> {
    let record = store.tag(&key(tag)).unwrap().unwrap();
    store.view().last_use(&record)
}

#[tokio::test]
async fn kept_last_use_survives_restart() {
    let folder = tempfile::tempdir().unwrap();
    let fs = || Arc::new(DirectoryFs::open(folder.path()).unwrap());
    let store = Arc::new(Store::open(&Settings::default(), fs(), at(1_000_000)).unwrap());
    let digest = tagged(&store, "1");
    let stored_at = store.last_access(ContentId::Manifest(digest)).unwrap();
    assert!(stored_at >= at(1_000_000));
    let handle = AsyncStore::new(Arc::clone(&store));
    handle.keep_last_use(digest, Some(stored_at), at(5_000)).await;
    assert_eq!(last_use(&store, "1"), Some(at(5_000)));
    store.close();
    drop((handle, store));
    let store = Store::open(&Settings::default(), fs(), at(1_000_100)).unwrap();
    assert_eq!(last_use(&store, "1"), Some(at(5_000)));
}

#[tokio::test]
async fn use_since_storage_is_not_put_back() {
    let store = Arc::new(Store::open(&Settings::default(), Arc::new(MemoryFs::new()), at(100)).unwrap());
    let digest = tagged(&store, "1");
    store.touch(ContentId::Manifest(digest), at(200));
    let handle = AsyncStore::new(Arc::clone(&store));
    handle.keep_last_use(digest, Some(at(100)), at(5)).await;
    assert_eq!(last_use(&store, "1"), Some(at(200)));
    // Of two uses, the later counts.
    handle.keep_last_use(digest, Some(at(100)), at(300)).await;
    assert_eq!(last_use(&store, "1"), Some(at(300)));
    handle.keep_last_use(digest, None, at(400)).await;
    assert_eq!(last_use(&store, "1"), Some(at(400)));
    handle.keep_last_use(digest, None, at(5)).await;
    assert_eq!(last_use(&store, "1"), Some(at(400)));
}

#[test]
fn pages_of_indexed_tags_are_complete_and_in_order() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        // The index is complete once its thread has read every file.
        while store.view().indexed_tags(None, 1).is_none() {
            std::thread::yield_now();
        }
        for tag in ["a", "b", "c", "d", "e"] {
            store.put_tag(&key(tag), variant(1, b"image", 1)).unwrap();
        }
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = store.view().indexed_tags(after.as_ref(), 2).unwrap();
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            found.extend(page.into_iter().map(|(key, _)| key));
        }
        assert_eq!(found, ["a", "b", "c", "d", "e"].map(key));
    });
}

#[test]
fn damaged_index_entry_ends_no_page() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        while store.view().indexed_tags(None, 1).is_none() {
            std::thread::yield_now();
        }
        let tags: Vec<_> = (0..300).map(|tag| format!("{tag:03}")).collect();
        for tag in &tags {
            store.put_tag(&key(tag), variant(1, b"image", 1)).unwrap();
        }
        // One value is unreadable, and one key.
        store.index.put(key("100").to_index(), b"damaged".to_vec());
        let damaged = [&key("100").to_index(), b"\0\xff".as_slice()].concat();
        store.index.put(damaged, b"damaged".to_vec());
        store.index.flush();
        let (mut found, mut after) = (Vec::new(), None);
        loop {
            let page = store.view().indexed_tags(after.as_ref(), 256).unwrap();
            after = page.last().map(|(last, _)| last.clone());
            let is_last = page.len() < 256;
            found.extend(page.into_iter().map(|(key, _)| key.tag.to_string()));
            if is_last {
                break;
            }
        }
        assert_eq!(found, tags);
    });
}
