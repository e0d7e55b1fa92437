//! Descriptor campaign: the process has too few file descriptors, first for its connections, then for any file.

use std::path::PathBuf;
use std::process::Command;

use crate::full::{all_complete, until_caching};
use crate::proxy::{Program, Session};
use crate::registry::within;
use crate::world::{REPOSITORY, World, tag};

/// Fewer than one per concurrent client.
const FEW: u64 = 96;
const AT_ONCE: usize = 128;

pub async fn campaign(count: u32) -> Result<String, String> {
    let mut world = World::new(10).await;
    let setup = world.setup().through(&["prlimit", &format!("--nofile={FEW}")]);
    let proxy = setup.start().await;
    all_complete(world.pull_new(&proxy, AT_ONCE)).await;

    // Over existing connections, because a new one would need a descriptor too.
    let mut session = Session::open(proxy.registry_address()).await;
    pull_over(&mut session, &mut world).await;
    limit(proxy.program(), lowest_free(proxy.program()))?;
    for _ in 0..count {
        pull_over(&mut session, &mut world).await;
    }
    within("the error log", proxy.program().says("Too many open files")).await;
    limit(proxy.program(), FEW)?;
    let took = until_caching(&mut world, &proxy).await;
    Ok(format!(
        "{AT_ONCE} pulls at once succeeded with {FEW} descriptors, and {count} without any for a file; kept again after \
         {took:?}"
    ))
}

async fn pull_over(session: &mut Session, world: &mut World) {
    let number = world.image();
    let image = world.of(number);
    let manifest = crate::proxy::manifest_path(REPOSITORY, &tag(number));
    session.ask("GET", &manifest).await.is_image(&image);
    for blob in &image.blobs {
        let path = crate::proxy::blob_path(REPOSITORY, &blob.digest);
        session.ask("GET", &path).await.is_blob(blob);
    }
}

/// The limit applies to descriptor numbers, and the kernel assigns the lowest free one.
fn lowest_free(program: &Program) -> u64 {
    let is_open = |number: &u64| {
        PathBuf::from(format!("/proc/{}/fd/{number}", program.id()))
            .symlink_metadata()
            .is_ok()
    };
    (0..).find(|number| !is_open(number)).unwrap()
}

fn limit(program: &Program, descriptors: u64) -> Result<(), String> {
    let done = Command::new("prlimit")
        .args([
            "--pid",
            &program.id().to_string(),
            &format!("--nofile={descriptors}:{FEW}"),
        ])
        .status();
    done.map_err(|error| format!("prlimit: {error}"))?
        .success()
        .then_some(())
        .ok_or("prlimit is not permitted".to_owned())
}
