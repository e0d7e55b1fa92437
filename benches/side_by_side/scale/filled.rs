//! Store with many images, written in the program's own format: for each, a manifest, its metadata, a configuration,
//! and a tag record; for each hundred, a repository with its membership. All share one layer.
//!
//! `src/store.rs` describes the files. `tests/crash` writes such stores too, without memberships, because it reads
//! them by tag only.

use crate::Outcome;
use crate::content::{MANIFEST_TYPE, digest_of};
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

const UPSTREAM: &str = "docker.io";
const IMAGES_PER_REPOSITORY: u64 = 100;
const LAYER: &[u8] = &[0x5a; 4096];
/// Images whose paths are kept, spread over all.
const SAMPLE: u64 = 10_000;

/// Path and digest of responses.
#[derive(Default)]
pub(super) struct Sample {
    pub(super) by_digest: Vec<(String, String)>,
    pub(super) by_tag: Vec<(String, String)>,
    pub(super) configs: Vec<(String, String)>,
}

struct Writer<'a> {
    data: &'a Path,
    /// The key of the clients' `Accept` header.
    accept: &'a str,
    millis: u128,
}

/// Writes the images to the data folder of a program that is stopped and has served a tag to the client. The index is
/// removed, so the program creates it again.
pub(super) fn fill(data: &Path, images: u64) -> Outcome<Sample> {
    let record = std::fs::read_to_string(only_file(&data.join("refs"))?)?;
    let accept = record
        .split_once(r#""accept":""#)
        .and_then(|(_, after)| after.split('"').next())
        .ok_or("a tag record of another form")?;
    let writer = Writer {
        data,
        accept,
        millis: SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis(),
    };
    writer.place("blobs/sha256", &digest_of(LAYER), "", LAYER)?;
    let mut sample = Sample::default();
    for repository in 0..images.div_ceil(IMAGES_PER_REPOSITORY) {
        let first = repository * IMAGES_PER_REPOSITORY;
        let numbers = first..images.min(first + IMAGES_PER_REPOSITORY);
        let name = format!("library/repository-{repository}");
        let mut members = vec![
            format!("repository {UPSTREAM} {name}"),
            format!("public {}", writer.millis / 1000),
            digest_of(LAYER),
        ];
        for number in numbers {
            let (manifest, config) = writer.image(&name, number)?;
            if number % images.div_ceil(SAMPLE) == 0 {
                let path = |kind: &str, reference: &str| format!("/v2/{name}/{kind}/{reference}");
                let tag = path("manifests", &format!("t{number}"));
                sample.by_tag.push((tag, manifest.clone()));
                sample
                    .by_digest
                    .push((path("manifests", &manifest), manifest.clone()));
                sample.configs.push((path("blobs", &config), config.clone()));
            }
            members.extend([manifest, config]);
        }
        writer.membership(&name, &members)?;
    }
    std::fs::remove_dir_all(data.join("index"))?;
    Ok(sample)
}

impl Writer<'_> {
    /// Returns the digests of the manifest and of the configuration.
    fn image(&self, repository: &str, number: u64) -> Outcome<(String, String)> {
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","config":{{"Labels":{{"number":"{number}"}}}},"rootfs":{{"type":"layers","diff_ids":[]}}}}"#
        );
        let config_digest = digest_of(config.as_bytes());
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{MANIFEST_TYPE}","config":{{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"{config_digest}","size":{}}},"layers":[{{"mediaType":"application/vnd.oci.image.layer.v1.tar","digest":"{}","size":{}}}]}}"#,
            config.len(),
            digest_of(LAYER),
            LAYER.len(),
        );
        let digest = digest_of(manifest.as_bytes());
        let metadata = format!(
            r#"{{"media_type":"{MANIFEST_TYPE}","seen_in":[{{"upstream":"{UPSTREAM}","repository":"{repository}"}}]"#
        );
        let (tag, accept, millis) = (format!("t{number}"), self.accept, self.millis);
        let record = format!(
            r#"{{"upstream":"{UPSTREAM}","repository":"{repository}","tag":"{tag}","variants":[{{"accept":"{accept}","digest":"{digest}","media_type":"{MANIFEST_TYPE}","confirmed_at_ms":{millis},"first_held_at_ms":{millis}}}]"#
        );
        self.place("blobs/sha256", &config_digest, "", config.as_bytes())?;
        self.place("manifests/sha256", &digest, "", manifest.as_bytes())?;
        self.place("manifests/sha256", &digest, ".meta", sealed(metadata).as_bytes())?;
        let name = digest_of([UPSTREAM, repository, &tag].join("\0").as_bytes());
        self.place("refs", &name, "", sealed(record).as_bytes())?;
        Ok((digest, config_digest))
    }

    fn membership(&self, repository: &str, lines: &[String]) -> Outcome<()> {
        let mut text = String::new();
        for line in lines {
            let sum = digest_of([UPSTREAM, repository, line].join("\0").as_bytes());
            let _ = write!(text, "\n{line} {}\n", sum.get(7..15).unwrap_or_default());
        }
        let name = digest_of([UPSTREAM, repository].join("\0").as_bytes());
        self.place("seen", &name, "", text.as_bytes())
    }

    /// Writes a file named by this digest below the folder `tree`.
    fn place(&self, tree: &str, digest: &str, suffix: &str, bytes: &[u8]) -> Outcome<()> {
        let hash = digest.strip_prefix("sha256:").ok_or("a digest of another form")?;
        let folder = self.data.join(tree).join(hash.get(..2).unwrap_or_default());
        let path = folder.join(format!("{hash}{suffix}"));
        match std::fs::write(&path, bytes) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                std::fs::create_dir_all(&folder)?;
                Ok(std::fs::write(&path, bytes)?)
            }
            written => Ok(written?),
        }
    }
}

/// A record without its last brace, with its checksum.
fn sealed(mut record: String) -> String {
    let sum = digest_of(record.as_bytes());
    let _ = writeln!(
        record,
        r#","checksum":"{}"}}"#,
        sum.get(7..23).unwrap_or_default()
    );
    record
}

/// The only file two levels below `folder`.
fn only_file(folder: &Path) -> Outcome<PathBuf> {
    let shard = std::fs::read_dir(folder)?.next().ok_or("no tag record")??;
    Ok(std::fs::read_dir(shard.path())?
        .next()
        .ok_or("no tag record")??
        .path())
}
