//! Disk health: a disk that rejects writes is reported, and used again once writes succeed.

use super::*;

#[test]
fn full_disk_is_reported_and_used_again_with_space() {
    let memory = Arc::new(MemoryFs::new());
    let store = Store::open(
        &Settings::default(),
        Arc::clone(&memory) as Arc<dyn FileSystem>,
        at(0),
    )
    .unwrap();
    put_blob(&store, b"before").unwrap();
    assert_eq!(store.health_issues(), []);
    memory.set_bytes_max(0);
    let fault = put_manifest(&store, &manifest(1), "library/alpine").unwrap_err();
    assert!(matches!(fault, StoreError::Full { .. }), "{fault}");
    assert!(put_blob(&store, b"meanwhile").is_err());
    let health_issues = store.health_issues();
    assert!(
        matches!(health_issues[0], HealthIssue::Disk(StoreError::Full { .. })),
        "{health_issues:?}"
    );
    assert_eq!(read_blob(&store, &digest(b"before")).unwrap(), b"before");
    store.tick(at(5));
    assert!(!store.health_issues().is_empty(), "it is still full");

    memory.set_bytes_max(u64::MAX);
    store.tick(at(10));
    assert_eq!(store.health_issues(), []);
    put_blob(&store, b"meanwhile").unwrap();
    put_manifest(&store, &manifest(1), "library/alpine").unwrap();
    assert_eq!(
        memory
            .list(Path::new(""))
            .unwrap()
            .iter()
            .filter(|entry| entry.name == "probe")
            .count(),
        0
    );
}

#[test]
fn e21_second_quarantine_of_one_name_keeps_the_first() {
    let memory = MemoryFs::new();
    let hex = "ab".repeat(32);
    for tree in ["blobs", "manifests", "blobs"] {
        let path = Path::new(tree).join("sha256/ab").join(&hex);
        memory.write_atomic(&path, b"damaged").unwrap();
        assert!(quarantine(&memory, &path, "it is damaged"));
    }
    let names = memory.list(Path::new("quarantine")).unwrap();
    let names: Vec<_> = names.into_iter().map(|entry| entry.name).collect();
    let expected = [
        format!("blobs-{hex}"),
        format!("blobs-{hex}-2"),
        format!("manifests-{hex}"),
    ];
    assert_eq!(names, expected);
}
