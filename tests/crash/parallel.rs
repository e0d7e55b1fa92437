//! Campaign of parallel downloads: clients request a large layer completely and by ranges, so that the cache fetches it
//! over several connections. The registry breaks, denies or changes parts, and the process or its disk ends in the
//! middle.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::disk::Disk;
use crate::full::fill;
use crate::proxy::{Proxy, Setup};
use crate::registry::{Image, Upstream, noise};
use crate::world::{Chance, REPOSITORY, asks, pull, tag, until_stored};

const LAYER_BYTES: usize = 20 * 1024 * 1024;

/// Of each connection to the registry. One alone takes 2.5 s.
const BYTES_PER_SECOND: u64 = 8_000_000;

const DISK_BYTES: u64 = 1024 * 1024 * 1024;
const IMAGES_PER_DISK: u32 = 25;

/// What the registry does to a layer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    Breaks,
    DeniesRanges,
    IgnoresRanges,
    WrongByte,
}

const FAULTS: [Fault; 5] = [
    Fault::None,
    Fault::Breaks,
    Fault::DeniesRanges,
    Fault::IgnoresRanges,
    Fault::WrongByte,
];

/// What happens in the middle of the download.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Kill,
    PowerCut,
    FullDisk,
    None,
}

const EVENTS: [Event; 4] = [Event::Kill, Event::PowerCut, Event::FullDisk, Event::None];

pub async fn campaign(images: u32) -> Result<String, String> {
    let (mut chance, mut number, mut parts) = (Chance::new(11), 0, 0);
    while number < u64::from(images) {
        let until = u64::from(images).min(number + u64::from(IMAGES_PER_DISK));
        parts += on_one_disk(&mut chance, number..until).await?;
        number = until;
    }
    assert!(parts > images as usize, "{parts} parts of {images} images");
    Ok(format!(
        "{images} large images in {parts} parts, with kills, power cuts, full disks, and broken, denied or wrong parts: \
         0 lost, 0 wrong"
    ))
}

/// Returns the number of parts that were requested from the registry.
async fn on_one_disk(chance: &mut Chance, numbers: Range<u64>) -> Result<usize, String> {
    let upstream = Upstream::start().await;
    let setup = Setup::over(&upstream).tail("[store]\nfree = \"0 B\"\n[limits]\nparallel_min = \"16 MiB\"");
    let image = setup.folder().join("disk");
    let disk = Disk::in_file("ext4", image, &setup.data(), DISK_BYTES)?;
    for number in numbers {
        let image = Image::with_layers(&[noise(number, LAYER_BYTES)]);
        let image = upstream.push(REPOSITORY, &tag(number), image);
        let which = usize::try_from(number).unwrap();
        let (event, fault) = (EVENTS[which % EVENTS.len()], FAULTS[which % FAULTS.len()]);
        interrupted(
            (&upstream, &setup, &disk),
            chance,
            (number, &image),
            (event, fault),
        )
        .await;
        upstream.recovers();
        let proxy = setup.clone().start().await;
        assert!(
            pull(asks(&proxy, number, &image), &image).await,
            "image {number} is incomplete although the registry and the disk are healthy"
        );
        until_stored(&proxy).await;
        upstream.resets();
        assert!(
            pull(asks(&proxy, number, &image), &image).await,
            "image {number} was acknowledged and is lost"
        );
        upstream.recovers();
    }
    let parts = upstream.requests().into_iter();
    Ok(parts.filter(|request| request.header("range").is_some()).count())
}

/// Clients pull while the event and the fault happen.
async fn interrupted(
    (upstream, setup, disk): (&Upstream, &Setup, &Disk),
    chance: &mut Chance,
    (number, image): (u64, &Image),
    (event, fault): (Event, Fault),
) {
    let mut proxy = setup.clone().start().await;
    let manifest = proxy.manifest(REPOSITORY, &tag(number)).await;
    manifest.is_image(image);
    upstream.drips(BYTES_PER_SECOND);
    let at = chance.below(LAYER_BYTES);
    match fault {
        Fault::None => {}
        Fault::Breaks => upstream.truncates_blobs_at(at / 4, 3),
        Fault::DeniesRanges => upstream.fails_ranges(429, 2),
        Fault::IgnoresRanges => upstream.ignores_range(),
        Fault::WrongByte => upstream.corrupts_blob_at(at),
    }
    let clients = clients(&proxy, image, fault);
    chance.pause(Duration::from_millis(1500)).await;
    match event {
        Event::None => finish(clients, fault == Fault::None).await,
        Event::FullDisk => {
            let filler = disk.at().join("filler");
            fill(&filler);
            // The rest comes from the registry. A client of a range that the registry breaks is not continued.
            finish(clients, fault == Fault::None).await;
            std::fs::remove_file(filler).unwrap();
        }
        Event::Kill => {
            proxy.kill();
            finish(clients, false).await;
        }
        Event::PowerCut => {
            disk.cut().unwrap();
            chance.pause(Duration::from_millis(30)).await;
            proxy.kill();
            finish(clients, false).await;
            drop(proxy);
            disk.unmount().unwrap();
            disk.mount().unwrap();
        }
    }
}

/// Requests for the whole layer, for eighths of it, and for its end. Each results in whether all its bytes arrived. Wrong
/// bytes panic, but in a range of a registry that sends wrong ones: a range cannot be verified by itself.
fn clients(proxy: &Proxy, image: &Image, fault: Fault) -> JoinSet<bool> {
    let layer = Arc::new(image.layer(0).clone());
    let eighth = LAYER_BYTES / 8;
    let closed = (0..8).map(|part| (part * eighth, Some((part + 1) * eighth)));
    let open = [5 * eighth, 7 * eighth].map(|start| (start, None));
    let mut clients = JoinSet::new();
    for (start, end) in [(0, None), (0, None)].into_iter().chain(closed).chain(open) {
        let (mut ask, layer) = (proxy.blob(REPOSITORY, &layer.digest), Arc::clone(&layer));
        let status = if start == 0 && end.is_none() { 200 } else { 206 };
        let range = start..end.unwrap_or(LAYER_BYTES);
        if status == 206 {
            let last = end.map_or_else(String::new, |end: usize| (end - 1).to_string());
            ask = ask.header("Range", &format!("bytes={start}-{last}"));
        }
        clients.spawn(async move {
            let Some(reply) = ask.tried().await else {
                return false;
            };
            let is_complete = reply.status == status && reply.whole;
            if is_complete && !(status == 206 && fault == Fault::WrongByte) {
                assert!(
                    reply.body == layer.bytes[range.clone()],
                    "wrong bytes in {range:?}"
                );
            }
            is_complete
        });
    }
    clients
}

async fn finish(mut clients: JoinSet<bool>, must_be_complete: bool) {
    while let Some(is_complete) = clients.join_next().await {
        let is_complete = is_complete.unwrap();
        assert!(
            is_complete || !must_be_complete,
            "a client failed although the registry is healthy"
        );
    }
}
