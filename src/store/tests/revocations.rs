//! Revocations that wait for the shared storage.

use super::power_cut::PowerCutFs;
use super::*;
use crate::store::revocations::Revocation;

fn revocation(principal: &str, repository: Option<&str>) -> Revocation {
    Revocation {
        upstream: "https://registry".into(),
        repository: repository.map(|name| name.parse().unwrap()),
        principal: principal.into(),
        is_known: repository.is_some(),
    }
}

#[test]
fn revocations_survive_a_restart_until_they_are_removed() {
    for fixture in [Fixture::memory(), Fixture::directory()] {
        let all = [
            revocation("key:1", Some("team/demo")),
            revocation("key:1", None),
            revocation("", Some("team/demo")),
        ];
        let store = fixture.open();
        for one in &all {
            store.put_revocation(one).unwrap();
            store.put_revocation(one).unwrap();
        }
        drop(store);
        let store = fixture.open();
        let (found, failure) = store.revocations();
        assert!(failure.is_none(), "{failure:?}");
        assert_eq!(found.len(), 3);
        assert!(all.iter().all(|one| found.contains(one)));
        store.remove_revocation(&all[1]).unwrap();
        store.remove_revocation(&all[1]).unwrap();
        drop(store);
        assert_eq!(fixture.open().revocations().0.len(), 2);
    }
}

#[test]
fn damaged_revocation_is_quarantined() {
    let fixture = Fixture::memory();
    let store = fixture.open();
    store.put_revocation(&revocation("key:1", None)).unwrap();
    let file = fixture.files("revocations").remove(0);
    fixture.fs.write_durable(&file, b"{}").unwrap();
    assert!(store.revocations().0.is_empty());
    assert_eq!(fixture.files("quarantine").len(), 1);
}

#[test]
fn unreadable_folder_of_revocations_is_an_error() {
    let fixture = Fixture::directory();
    let store = fixture.open();
    fixture
        .fs
        .write_durable(Path::new("revocations"), b"no folder")
        .unwrap();
    let (found, failure) = store.revocations();
    assert!(found.is_empty() && failure.is_some(), "{found:?}");
}

#[test]
fn power_cut_at_any_call_keeps_revocations() {
    for last in 0.. {
        let fs = Arc::new(PowerCutFs::new(last));
        let Ok(store) = Store::open(&Settings::default(), Arc::clone(&fs) as _, at(0)) else {
            continue;
        };
        let (kept, gone) = (revocation("key:1", None), revocation("key:2", None));
        let is_kept = store.put_revocation(&kept).is_ok();
        let is_second = store.put_revocation(&gone).is_ok();
        let is_removed = is_second && store.remove_revocation(&gone).is_ok();
        drop(store);
        for chance in 0..8 {
            let found = Store::open(&Settings::default(), Arc::new(fs.after_by_chance(chance)), at(9));
            let found = found.unwrap().revocations().0;
            assert!(!is_kept || found.contains(&kept), "{last}");
            assert!(!is_removed || !found.contains(&gone), "{last}");
        }
        if is_kept && is_removed {
            assert!(last > 4, "the scenario writes in {last} calls only");
            return;
        }
    }
}
