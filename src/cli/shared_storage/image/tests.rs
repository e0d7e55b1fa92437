//! Tests of `ifnewer shared rm`, over a bucket in memory. Time is paused.
#![allow(clippy::unwrap_used, reason = "tests may fail loudly")]

use std::future::{pending, poll_fn, ready};
use std::io::{Error, ErrorKind, Write};
use std::path::Path;
use std::task::Poll;

use bytes::Bytes;

use super::*;
use crate::bucket::{ObjectKey, in_memory};
use crate::config::Sources;

/// Standard output of which the reader has ended.
struct Closed;

impl Write for Closed {
    fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
        Err(Error::from(ErrorKind::BrokenPipe))
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn config() -> Config {
    let variables = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
    let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let config = Config::gather(&Sources {
        data: "/tmp".into(),
        working_dir_certs: None,
        text: "[shared]\nbucket = \"s3://images\"\nregion = \"x\"",
        origin: Path::new(""),
        variables: variables.to_vec(),
        flags: Vec::new(),
    });
    config.unwrap()
}

fn digest(content: &str) -> Digest {
    Digest::of(Algorithm::Sha256, content.as_bytes())
}

async fn put(bucket: &Arc<dyn ObjectStorage>, key: ObjectKey, content: &str) {
    let bytes = Bytes::from(content.to_owned());
    bucket.put(&key, bytes, None).await.unwrap();
}

/// An index with one manifest, a config and a layer. Their objects, each before the manifest that lists it.
async fn image(bucket: &Arc<dyn ObjectStorage>, name: &str) -> (Digest, Vec<ObjectKey>) {
    let (config, layer) = (format!("config {name}"), format!("layer {name}"));
    let descriptor = |digest: Digest| format!(r#"{{"digest": "{digest}", "size": 5}}"#);
    let manifest = format!(
        r#"{{"schemaVersion": 2, "config": {}, "layers": [{}]}}"#,
        descriptor(digest(&config)),
        descriptor(digest(&layer))
    );
    let index = format!(
        r#"{{"schemaVersion": 2, "manifests": [{}]}}"#,
        descriptor(digest(&manifest))
    );
    let keys = vec![
        ObjectKey::blob(&digest(&config)),
        ObjectKey::blob(&digest(&layer)),
        ObjectKey::manifest(&digest(&manifest)),
        ObjectKey::manifest(&digest(&index)),
    ];
    for (key, content) in keys.iter().zip([&config, &layer, &manifest, &index]) {
        put(bucket, key.clone(), content).await;
    }
    (digest(&index), keys)
}

async fn present(bucket: &Arc<dyn ObjectStorage>, keys: &[ObjectKey]) -> Vec<bool> {
    let mut all = Vec::new();
    for key in keys {
        all.push(bucket.head(key).await.is_ok());
    }
    all
}

async fn remove(
    bucket: &Arc<dyn ObjectStorage>,
    images: &[&str],
    out: &mut dyn Write,
    interrupt: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    let config = config();
    let args = Rm {
        images: images.iter().map(|&image| image.to_owned()).collect(),
        blobs: true,
        yes: true,
        json: false,
    };
    let mut output = Output {
        out,
        colour: false,
        progress: false,
    };
    let shared = config.shared.as_ref().unwrap();
    rm((&config, shared), bucket, &args, &mut output, interrupt).await
}

#[tokio::test(start_paused = true)]
async fn interrupted_removal_can_be_repeated() {
    let mut partial = 0;
    for polls in 1..200 {
        let bucket = in_memory();
        let (digest, keys) = image(&bucket, "one").await;
        let name = format!("alpine@{digest}");
        let mut left = polls;
        let interrupt = poll_fn(|_| {
            left -= 1;
            if left == 0 { Poll::Ready(()) } else { Poll::Pending }
        });
        let result = remove(&bucket, &[&name], &mut Vec::new(), interrupt).await;
        let objects = present(&bucket, &keys).await;
        match objects.as_slice() {
            [false, false, false, false] => assert!(result.is_ok() || polls > 1),
            [_, _, true, true] | [false, false, false, true] => {
                assert!(result.is_err(), "{objects:?}");
                partial += u32::from(objects.contains(&false));
                let again = remove(&bucket, &[&name], &mut Vec::new(), pending()).await;
                again.unwrap();
                assert!(!present(&bucket, &keys).await.contains(&true), "{objects:?}");
            }
            lost => panic!("{polls}: {lost:?}"),
        }
        if result.is_ok() {
            break;
        }
    }
    assert!(partial >= 2, "{partial}");
}

#[tokio::test(start_paused = true)]
async fn interrupt_spares_the_next_image() {
    let bucket = in_memory();
    let (digest, keys) = image(&bucket, "one").await;
    let name = format!("alpine@{digest}");
    let result = remove(&bucket, &[&name, &name], &mut Vec::new(), ready(())).await;
    assert!(matches!(result, Err(CommandError::Incomplete(_))), "{result:?}");
    assert_eq!(present(&bucket, &keys).await, [true; 4]);
}

#[tokio::test(start_paused = true)]
async fn wrong_argument_deletes_nothing() {
    let bucket = in_memory();
    let (digest, keys) = image(&bucket, "one").await;
    let name = format!("alpine@{digest}");
    let short = digest.to_string().split_at(70).0.to_owned();
    let upper = digest.to_string().to_uppercase().replace("SHA256", "sha256");
    for wrong in [&short, &upper, "sha256:", "sha512:latest"] {
        let result = remove(&bucket, &[&name, wrong], &mut Vec::new(), pending()).await;
        assert!(
            matches!(result, Err(CommandError::Digest { .. })),
            "{wrong}: {result:?}"
        );
    }
    // There is no key.
    let result = remove(&bucket, &[&name, "alpine:3"], &mut Vec::new(), pending()).await;
    let is_no_key = matches!(result, Err(CommandError::TagRecord(TagRecordError::NoKey)));
    assert!(is_no_key, "{result:?}");
    assert_eq!(present(&bucket, &keys).await, [true; 4]);
}

#[tokio::test(start_paused = true)]
async fn closed_output_spares_no_image() {
    let bucket = in_memory();
    let (one, mut keys) = image(&bucket, "one").await;
    let (two, more) = image(&bucket, "two").await;
    keys.extend(more);
    let names = [format!("alpine@{one}"), format!("alpine@{two}")];
    let names = names.each_ref().map(String::as_str);
    let result = remove(&bucket, &names, &mut Closed, pending()).await;
    assert!(matches!(result, Err(CommandError::Output(_))), "{result:?}");
    assert!(!present(&bucket, &keys).await.contains(&true));
}

#[tokio::test(start_paused = true)]
async fn image_that_the_bucket_does_not_have_is_reported() {
    let bucket = in_memory();
    let (mut out, absent) = (Vec::new(), digest("absent"));
    let result = remove(&bucket, &[&format!("alpine@{absent}")], &mut out, pending()).await;
    assert!(matches!(result, Err(CommandError::Incomplete(_))), "{result:?}");
    let text = String::from_utf8(out).unwrap();
    assert!(
        text.contains("note: 1 manifests are missing or damaged"),
        "{text}"
    );
    let name = absent.to_string();
    for out in [&mut Vec::new() as &mut dyn Write, &mut Closed] {
        let result = remove(&bucket, &[&name], out, pending()).await;
        assert!(matches!(result, Err(CommandError::Incomplete(_))), "{result:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn removal_of_an_image_known_in_part_is_incomplete() {
    let bucket = in_memory();
    let (one, mut keys) = image(&bucket, "one").await;
    let broken = "no manifest";
    put(&bucket, ObjectKey::manifest(&digest(broken)), broken).await;
    keys.push(ObjectKey::manifest(&digest(broken)));
    let names = [digest(broken), one].map(|digest| format!("alpine@{digest}"));
    let (mut out, names) = (Vec::new(), names.each_ref().map(String::as_str));
    let result = remove(&bucket, &names, &mut out, pending()).await;
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains("note: 1 manifests cannot be parsed"), "{text}");
    assert!(matches!(result, Err(CommandError::Incomplete(_))), "{result:?}");
    let left = present(&bucket, &keys).await;
    assert!(!left.contains(&true), "what is known is deleted: {left:?}");
}

#[tokio::test]
async fn objects_of_a_digest_are_listed() {
    let bucket = in_memory();
    let (digest, keys) = image(&bucket, "one").await;
    let (config, mut out) = (config(), Vec::new());
    let mut output = Output {
        out: &mut out,
        colour: false,
        progress: false,
    };
    let text = digest.to_string();
    let args = Ls {
        image: None,
        json: false,
    };
    let shared = config.shared.as_ref().unwrap();
    ls((&config, shared), &bucket, (&text, &args), &mut output)
        .await
        .unwrap();
    let out = String::from_utf8(out).unwrap();
    let index = keys.last().unwrap().as_str();
    assert!(
        out.contains(index) && out.contains("1 objects are in the bucket"),
        "{out}"
    );
}
