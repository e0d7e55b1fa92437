//! Stored tags and lists.

use super::*;
use crate::store::listings::{ListingKey, StoredListResponse, StoredListing, StoredNotFound};
use crate::store::tags::{TagRecord, VARIANTS_MAX};

#[test]
fn tag_keeps_its_last_digest_after_restart() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        assert!(store.tag(&key("3")).unwrap().is_none());
        store.put_tag(&key("3"), variant(1, b"old", 1)).unwrap();
        store.put_tag(&key("3"), variant(1, b"new", 2)).unwrap();
        let expected = Variant {
            history: vec![past(b"old", 1)],
            ..variant(1, b"new", 2)
        };
        assert_eq!(only_variant(&store, "3"), expected);
        drop(store);
        let store = fixture.open();
        assert_eq!(only_variant(&store, "3"), expected);
        assert!(store.tag(&key("4")).unwrap().is_none());
    });
}

#[test]
fn confirmation_updates_tag_time_without_file_write() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        store.put_tag(&key("3"), variant(1, b"old", 1)).unwrap();
        let file = fixture.files("refs").remove(0);
        let before = fixture.fs.read_file(&file, 10_000).unwrap();
        store.put_tag(&key("3"), variant(1, b"old", 60)).unwrap();
        assert_eq!(fixture.fs.read_file(&file, 10_000).unwrap(), before);
        let expected = Variant {
            first_seen_at: at(1),
            ..variant(1, b"old", 60)
        };
        assert_eq!(only_variant(&store, "3"), expected);
    });
}

#[test]
fn tag_keeps_only_the_newest_variants() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let kept = VARIANTS_MAX as u64 + 3;
        for accept in 0..kept {
            store
                .put_tag(&key("3"), variant(accept, b"image", accept))
                .unwrap();
        }
        drop(store);
        let record = fixture.open().tag(&key("3")).unwrap().unwrap();
        let accepts: Vec<u64> = record.variants.iter().map(|variant| variant.accept).collect();
        assert_eq!(accepts, (3..kept).rev().collect::<Vec<u64>>());
    });
}

#[test]
fn damaged_tag_file_is_quarantined_index_copy_is_used() {
    on_every_fs(|fixture| {
        fixture
            .open()
            .put_tag(&key("3"), variant(1, b"image", 1))
            .unwrap();
        let file = fixture.files("refs").remove(0);
        let mut bytes = fixture.fs.read_file(&file, 10_000).unwrap();
        bytes[30] ^= 1;
        fixture.overwrite(&file, &bytes);
        let store = fixture.open();
        let found = store.tag(&key("3")).unwrap();
        assert_eq!(
            found.is_some(),
            fixture.folder.is_some(),
            "only a folder has a persistent index"
        );
        assert_eq!(fixture.files("quarantine").len(), 1);
        assert_eq!(
            fixture.files("refs").len(),
            usize::from(found.is_some()),
            "written again from the index"
        );
        store.put_tag(&key("3"), variant(1, b"newer", 2)).unwrap();
        drop(store);
        assert_eq!(only_variant(&fixture.open(), "3").digest, digest(b"newer"));
    });
}

#[test]
fn tag_file_of_another_tag_is_rejected() {
    on_every_fs(|fixture| {
        fixture
            .open()
            .put_tag(&key("3"), variant(1, b"image", 1))
            .unwrap();
        let from = fixture.files("refs").remove(0);
        let to = key("4").path();
        fixture.fs.rename(&from, &to).unwrap();
        assert!(fixture.open().tag(&key("4")).unwrap().is_none());
    });
}

#[test]
fn tags_are_listed_in_order_by_page() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        for tag in ["b", "a", "d", "c"] {
            store.put_tag(&key(tag), variant(1, tag.as_bytes(), 1)).unwrap();
        }
        for store in [Some(store), None] {
            let store = store.unwrap_or_else(|| fixture.open());
            let names = |page: &[(TagKey, TagRecord)]| -> Vec<String> {
                page.iter().map(|(key, _)| key.tag.as_str().to_owned()).collect()
            };
            let first = store.tags(None, 3);
            assert_eq!(names(&first), ["a", "b", "c"]);
            assert_eq!(first[1].1.variants, [variant(1, b"b", 1)]);
            assert_eq!(names(&store.tags(Some(&first[2].0), 3)), ["d"]);
            drop(store);
        }
    });
}

#[test]
fn tags_of_one_repository_are_listed_alone() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        let of = |upstream: &str, repository: &str, tag: &str| TagKey {
            upstream: upstream.into(),
            repository: repository.parse().unwrap(),
            tag: tag.parse().unwrap(),
        };
        for repository in ["a/b", "a/b-c", "a/b/c", "a/b2"] {
            for tag in ["1", "2", "3"] {
                store
                    .put_tag(&of("x", repository, tag), variant(1, b"image", 1))
                    .unwrap();
            }
        }
        store
            .put_tag(&of("y", "a/b", "4"), variant(1, b"image", 1))
            .unwrap();
        let repository = "a/b".parse().unwrap();
        let list = |after: Option<&str>, limit: usize| -> Vec<TagKey> {
            let after = after.map(|after| after.parse().unwrap());
            let page = store.tags_of(("x", &repository), after.as_ref(), limit);
            page.into_iter().map(|(key, _)| key).collect()
        };
        assert_eq!(list(None, 2), [of("x", "a/b", "1"), of("x", "a/b", "2")]);
        assert_eq!(list(Some("2"), 9), [of("x", "a/b", "3")]);
        assert_eq!(list(Some("3"), 9), []);
    });
}

#[test]
fn removed_tag_stays_removed() {
    on_every_fs(|fixture| {
        let store = fixture.open();
        store.put_tag(&key("3"), variant(1, b"image", 1)).unwrap();
        assert!(store.remove_tag(&key("3")).unwrap());
        assert!(!store.remove_tag(&key("3")).unwrap());
        assert!(store.tag(&key("3")).unwrap().is_none());
        drop(store);
        assert!(fixture.open().tag(&key("3")).unwrap().is_none());
    });
}

#[test]
fn list_not_found_is_stored_like_a_list() {
    on_every_fs(|fixture| {
        let key = ListingKey {
            upstream: UPSTREAM.into(),
            path: format!("/v2/library/alpine/referrers/sha256:{}", "0".repeat(64)),
        };
        let list = StoredListing::new(Bytes::from_static(b"{}"), image(), None, None, at(1));
        for code in [None, Some("NAME_UNKNOWN".to_owned())] {
            let store = fixture.open();
            store.put_listing(&key, list.clone()).unwrap();
            let absence = StoredNotFound {
                code,
                received_at: at(2),
            };
            store.put_listing_not_found(&key, absence.clone()).unwrap();
            drop(store);
            let store = fixture.open();
            assert_eq!(store.listing(&key), Ok(None));
            let found = store.listing_response(&key).unwrap();
            assert!(
                matches!(&found, Some(StoredListResponse::NotFound(found)) if *found == absence),
                "{found:?}"
            );
            drop(store);
        }
        let store = fixture.open();
        store.put_listing(&key, list.clone()).unwrap();
        drop(store);
        assert_eq!(*fixture.open().listing(&key).unwrap().unwrap(), list);
    });
}

#[test]
fn list_is_stored_until_replaced() {
    on_every_fs(|fixture| {
        let key = |path: &str| ListingKey {
            upstream: UPSTREAM.into(),
            path: path.to_owned(),
        };
        let list = |text: &'static str, seconds| {
            let next = Some("/v2/library/alpine/tags/list?last=3".to_owned());
            StoredListing::new(
                Bytes::from_static(text.as_bytes()),
                image(),
                next,
                None,
                at(seconds),
            )
        };
        let store = fixture.open();
        assert_eq!(store.listing(&key("/v2/library/alpine/tags/list")), Ok(None));
        store
            .put_listing(&key("/v2/library/alpine/tags/list"), list("{\"tags\":[]}", 1))
            .unwrap();
        store
            .put_listing(&key("/v2/library/alpine/tags/list"), list("{\"tags\":[\n]}", 2))
            .unwrap();
        drop(store);
        let store = fixture.open();
        let found = store
            .listing(&key("/v2/library/alpine/tags/list"))
            .unwrap()
            .unwrap();
        assert_eq!(*found, list("{\"tags\":[\n]}", 2));
        assert_eq!(store.listing(&key("/v2/library/alpine/tags/list?n=1")), Ok(None));
        drop(store);
        let file = fixture.files("listings").remove(0);
        let mut bytes = fixture.fs.read_file(&file, 10_000).unwrap();
        *bytes.last_mut().unwrap() ^= 1;
        fixture.overwrite(&file, &bytes);
        assert_eq!(
            fixture.open().listing(&key("/v2/library/alpine/tags/list")),
            Ok(None),
            "damaged"
        );
    });
}
