//! File system with a blocked call.

use std::io;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use ifnewer::store::fs::{Entry, FileSystem, FsFile, MemoryFs};
use tokio::sync::Notify;

use super::cache::{Cache, ClientRequest, Got, PROVEN};
use super::random_walk::{basic, rules};
use super::registry::Registry;

/// More cold requests than the store has permits for reads.
const COLD: usize = 100;

/// File system whose calls block while it is closed.
#[derive(Default)]
pub struct Gated {
    disk: MemoryFs,
    is_closed: Mutex<bool>,
    opened: Condvar,
    reached: Notify,
}

impl Gated {
    pub fn close(&self) {
        *self.is_closed.lock().unwrap() = true;
    }

    pub fn reopen(&self) {
        *self.is_closed.lock().unwrap() = false;
        self.opened.notify_all();
    }

    fn pass(&self) -> &MemoryFs {
        let closed = self.is_closed.lock().unwrap();
        if *closed {
            self.reached.notify_one();
        }
        drop(self.opened.wait_while(closed, |closed| *closed).unwrap());
        &self.disk
    }
}

impl FileSystem for Gated {
    fn folder(&self) -> Option<&Path> {
        self.disk.folder()
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.pass().create(path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn FsFile>> {
        self.pass().open(path)
    }

    fn modified(&self, path: &Path) -> io::Result<Option<SystemTime>> {
        self.pass().modified(path)
    }

    fn append(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        self.pass().append(path, bytes)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.pass().rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.pass().remove(path)
    }

    fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.pass().remove_dir_all(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.pass().sync_dir(path)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.pass().list(path)
    }

    fn mode(&self, path: &Path) -> io::Result<Option<u32>> {
        self.pass().mode(path)
    }

    fn free_bytes(&self) -> io::Result<u64> {
        self.pass().free_bytes()
    }
}

fn client_request(user: &str, path: String) -> ClientRequest {
    ClientRequest {
        site: PROVEN,
        path,
        head: false,
        shows: basic(user, &format!("{user}-secret")),
    }
}

async fn got(cache: &Cache, client_request: &ClientRequest) -> Got {
    let got = tokio::time::timeout(Duration::from_secs(30), cache.get(client_request)).await;
    got.unwrap_or_else(|_| panic!("{client_request:?} blocked on the disk"))
}

/// One worker thread: a blocking call on it would stop the test.
#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn t06_blocked_disk_call_does_not_block_warm_requests() {
    let registry = Registry::new();
    registry.user("alice", "alice-secret");
    for repository in ["acme/app", "acme/cold"] {
        registry.lets("alice", repository);
        registry.push(repository, "1", "one", &[40, 50]);
    }
    let disk = Arc::new(Gated::default());
    let cache = Arc::new(Cache::over(&registry, rules(false), &disk));
    let blobs: Vec<_> = registry.state().shelves["acme/app"]
        .blobs
        .keys()
        .copied()
        .collect();
    let paths = blobs.iter().map(|blob| format!("/v2/acme/app/blobs/{blob}"));
    let warm: Vec<_> = ["/v2/acme/app/manifests/1".to_owned()]
        .into_iter()
        .chain(paths)
        .map(|path| client_request("alice", path))
        .collect();
    // The first request fetches, the second reads into memory.
    for _ in 0..3 {
        for client_request in &warm {
            assert!(matches!(got(&cache, client_request).await, Got::Content(..)));
            cache.proxy.downloads().idle().await;
        }
    }

    disk.close();
    let cold = (0..COLD).map(|number| {
        let cache = Arc::clone(&cache);
        tokio::spawn(async move {
            let path = format!("/v2/acme/cold/manifests/{}", number + 1);
            cache.get(&client_request("alice", path)).await
        })
    });
    let cold: Vec<_> = cold.collect();
    disk.reached.notified().await;
    for client_request in &warm {
        assert!(
            matches!(got(&cache, client_request).await, Got::Content(..)),
            "{client_request:?}"
        );
    }

    disk.reopen();
    for (number, cold) in cold.into_iter().enumerate() {
        let got = cold.await.unwrap();
        assert_eq!(matches!(got, Got::Content(..)), number == 0, "{number}: {got:?}");
    }
}
