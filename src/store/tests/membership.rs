//! Membership and grants apply to one repository only.

use super::*;

#[test]
fn membership_applies_to_one_repository_only() {
    on_every_fs(|fixture| {
        let (alpine, other, of) = (
            repository("library/alpine"),
            repository("acme/alpine"),
            digest(b"layer"),
        );
        let store = fixture.open();
        assert!(!store.is_member(UPSTREAM, &alpine, &of));
        store.add_member(UPSTREAM, &alpine, &of).unwrap();
        store.add_member(UPSTREAM, &alpine, &of).unwrap();
        assert!(store.is_member(UPSTREAM, &alpine, &of));
        drop(store);
        let store = fixture.open();
        assert!(store.is_member(UPSTREAM, &alpine, &of));
        assert!(!store.is_member(UPSTREAM, &alpine, &digest(b"other")));
        assert!(!store.is_member(UPSTREAM, &other, &of));
        assert!(!store.is_member("ghcr.io", &alpine, &of));
        let file = fixture.fs.read_file(&fixture.files("seen")[0], 10_000).unwrap();
        assert_eq!(
            String::from_utf8(file).unwrap().matches(&of.to_string()).count(),
            1,
            "written once"
        );
    });
}

#[test]
fn torn_or_invalid_membership_line_is_ignored() {
    on_every_fs(|fixture| {
        let alpine = repository("library/alpine");
        let store = fixture.open();
        store.add_member(UPSTREAM, &alpine, &digest(b"1")).unwrap();
        drop(store);
        let file = fixture.files("seen").remove(0);
        let line = format!("{} 00000000\n", digest(b"2"));
        fixture.fs.append(&file, line.as_bytes()).unwrap();
        fixture
            .fs
            .append(&file, b"\xff\xfe nonsense\npublic 17 deadbeef\n")
            .unwrap();
        fixture
            .fs
            .append(&file, format!("{}", digest(b"3")).as_bytes())
            .unwrap();
        let store = fixture.open();
        store.add_member(UPSTREAM, &alpine, &digest(b"4")).unwrap();
        drop(store);
        let store = fixture.open();
        let seen = [b"1", b"2", b"3", b"4"].map(|bytes| store.is_member(UPSTREAM, &alpine, &digest(bytes)));
        assert_eq!(seen, [true, false, false, true]);
        assert_eq!(store.public_since(UPSTREAM, &alpine), None);
    });
}

#[test]
fn membership_line_of_other_repository_is_ignored() {
    on_every_fs(|fixture| {
        let (theirs, mine) = (repository("acme/secret"), repository("acme/open"));
        let store = fixture.open();
        store.add_member(UPSTREAM, &theirs, &digest(b"secret")).unwrap();
        let file = fixture.files("seen").remove(0);
        store.add_member(UPSTREAM, &mine, &digest(b"open")).unwrap();
        drop(store);
        let lines = fixture.fs.read_file(&file, 10_000).unwrap();
        let target = fixture
            .files("seen")
            .into_iter()
            .find(|path| *path != file)
            .unwrap();
        fixture.fs.append(&target, &lines).unwrap();
        let store = fixture.open();
        assert!(store.is_member(UPSTREAM, &mine, &digest(b"open")));
        assert!(!store.is_member(UPSTREAM, &mine, &digest(b"secret")));
    });
}

#[test]
fn repository_is_public_until_set_private() {
    on_every_fs(|fixture| {
        let alpine = repository("library/alpine");
        let store = fixture.open();
        assert_eq!(store.public_since(UPSTREAM, &alpine), None);
        for seconds in [0, 10, 20] {
            store.set_public(UPSTREAM, &alpine, Some(at(seconds))).unwrap();
            assert_eq!(store.public_since(UPSTREAM, &alpine), Some(at(seconds)));
        }
        drop(store);
        let store = fixture.open();
        assert_eq!(
            store.public_since(UPSTREAM, &alpine),
            Some(at(0)),
            "not written again within the hour"
        );
        store.set_public(UPSTREAM, &alpine, Some(at(4000))).unwrap();
        drop(store);
        let store = fixture.open();
        assert_eq!(store.public_since(UPSTREAM, &alpine), Some(at(4000)));
        store.set_public(UPSTREAM, &alpine, None).unwrap();
        assert_eq!(store.public_since(UPSTREAM, &alpine), None);
        drop(store);
        assert_eq!(fixture.open().public_since(UPSTREAM, &alpine), None);
    });
}

#[test]
fn membership_file_with_surplus_lines_is_rewritten() {
    on_every_fs(|fixture| {
        let alpine = repository("library/alpine");
        let store = fixture.open();
        store.add_member(UPSTREAM, &alpine, &digest(b"layer")).unwrap();
        store.set_public(UPSTREAM, &alpine, Some(at(0))).unwrap();
        drop(store);
        let file = fixture.files("seen").remove(0);
        fixture
            .fs
            .append(&file, "useless\n".repeat(2000).as_bytes())
            .unwrap();
        for _ in 0..2 {
            let store = fixture.open();
            assert!(store.is_member(UPSTREAM, &alpine, &digest(b"layer")));
            assert_eq!(store.public_since(UPSTREAM, &alpine), Some(at(0)));
            assert!(fixture.fs.read_file(&file, 1000).is_ok(), "rewritten and short");
            drop(store);
        }
    });
}

#[test]
fn grant_applies_to_one_principal_and_repository() {
    on_every_fs(|fixture| {
        let (alpine, other) = (repository("library/alpine"), repository("acme/alpine"));
        let store = fixture.open();
        assert_eq!(store.grant(UPSTREAM, &alpine, &[1; 32]), None);
        store.put_grant(UPSTREAM, &alpine, &[1; 32], at(5));
        assert_eq!(store.grant(UPSTREAM, &alpine, &[1; 32]), Some(at(5)));
        assert_eq!(store.grant(UPSTREAM, &alpine, &[2; 32]), None);
        assert_eq!(store.grant(UPSTREAM, &other, &[1; 32]), None);
        assert_eq!(store.grant("ghcr.io", &alpine, &[1; 32]), None);
        store.revoke_grant(UPSTREAM, &alpine, &[1; 32]);
        assert_eq!(store.grant(UPSTREAM, &alpine, &[1; 32]), None);
    });
}

#[test]
fn r06_served_urls_survive_a_restart() {
    on_every_fs(|fixture| {
        let (app, older) = (repository("team/app"), repository("team/older"));
        let (mirror, origin) = ("http://mirror", "http://origin");
        let store = fixture.open();
        assert!(!store.has_served(UPSTREAM, origin, &app), "unknown repository");
        store.record_served(UPSTREAM, origin, &app).unwrap();
        store.record_served(UPSTREAM, origin, &app).unwrap();
        store.add_member(UPSTREAM, &app, &digest(b"layer")).unwrap();
        store.add_member(UPSTREAM, &older, &digest(b"layer")).unwrap();
        drop(store);
        let store = fixture.open();
        let served = |url, repository| store.has_served(UPSTREAM, url, repository);
        assert!(served(origin, &app));
        assert!(!served(mirror, &app));
        assert!(!store.has_served("ghcr.io", origin, &app));
        assert!(served(mirror, &older), "served before URLs were recorded");
    });
}
