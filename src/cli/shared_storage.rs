//! `ifnewer shared`: checks the configured bucket, prints the rights and the lifecycle rule that it needs, and maintains its
//! objects.
//!
//! * `maintenance`: inventory and garbage collection. `image`: the objects of one image.

mod image;
mod maintenance;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use bytesize::ByteSize;
use clap::{Args, Subcommand};
use serde_json::json;

use super::commands::{CommandError, Output};
use crate::bucket::{self, BucketError, Encryption, ObjectKey, ObjectStorage};
use crate::config::{Config, SharedConfig};
use crate::shared::probe;
use crate::trace_context::TraceContext;
use crate::upstream::Transport;

/// Size of the object that the check writes, and the offset from which it is read again.
const OBJECT_BYTES: usize = 2048;
const OFFSET: usize = 1000;

/// A command for the objects of the bucket.
#[derive(Clone, Debug, PartialEq, Eq, Subcommand)]
pub enum ObjectCommand {
    /// Count the objects in the bucket by kind, or show what the bucket has of an image
    Ls(Ls),
    /// Delete images or digests from the bucket; a versioned bucket keeps their versions
    Rm(Rm),
    /// Delete objects by age or beyond a total size, the oldest first; a versioned bucket keeps their versions
    Gc(Gc),
}

/// `ifnewer shared ls`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Ls {
    /// The image, as in docker.io/library/alpine:3.20 or alpine: list its objects and records; or a digest: list its objects. A
    /// tag needs `key_file`
    #[arg(value_name = "IMAGE|DIGEST")]
    pub image: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer shared rm`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Rm {
    /// The images, of which the manifests are deleted, or digests, of which every object is. A tag needs `key_file`
    #[arg(required = true, value_name = "IMAGE|DIGEST")]
    pub images: Vec<String>,
    /// Also delete the configs and layers of the images, which other images may have too
    #[arg(long)]
    pub blobs: bool,
    /// Apply the deletion; without it, only report what would be deleted
    #[arg(short, long)]
    pub yes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `ifnewer shared gc`.
#[derive(Args, Clone, Debug, PartialEq, Eq)]
pub struct Gc {
    /// Delete blobs and manifests of a greater age, and records if they are older than `keep` too [default: `keep`, unless
    /// --size is given]
    #[arg(long, value_name = "TIME", value_parser = humantime::parse_duration)]
    pub older: Option<Duration>,
    /// Delete the oldest blobs and manifests until all objects have this size together
    #[arg(long, value_name = "SIZE", value_parser = size)]
    pub size: Option<u64>,
    /// Apply the deletion; without it, only report what would be deleted
    #[arg(short, long)]
    pub yes: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// A number without a unit would be bytes, and delete everything.
fn size(text: &str) -> Result<u64, String> {
    let has_unit = text.ends_with(|last: char| last.is_ascii_alphabetic());
    let size = text.parse::<ByteSize>().ok().filter(|_| has_unit);
    size.map(|size| size.as_u64())
        .ok_or_else(|| "write a number and its unit, as in 500GiB or 2TiB".to_owned())
}

/// Runs a command for the objects of the bucket. `interrupt` ends a deletion early.
pub async fn run(
    config: &Config,
    shared: &SharedConfig,
    command: &ObjectCommand,
    output: &mut Output<'_>,
    interrupt: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    let bucket = bucket::open(&shared.bucket, &Transport::system())?;
    match command {
        ObjectCommand::Ls(args) => match &args.image {
            Some(text) => image::ls((config, shared), &bucket, (text, args), output).await,
            None => maintenance::ls((&shared.bucket.name(), &bucket), args, output).await,
        },
        ObjectCommand::Rm(args) => image::rm((config, shared), &bucket, args, output, interrupt).await,
        ObjectCommand::Gc(args) => maintenance::gc((shared, &bucket), args, output, interrupt).await,
    }
}

/// Refuses a deletion if the configuration says that this host writes nothing.
fn refuse_read_only(shared: &SharedConfig, is_deletion: bool) -> Result<(), CommandError> {
    if is_deletion && !shared.write {
        return Err(CommandError::ReadOnly);
    }
    Ok(())
}

/// The user of a credential.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyFor {
    /// A cache, by its setting `write`.
    Cache,
    /// A cache that does not write.
    ReadOnlyCache,
    /// An operator who lists and deletes objects.
    Maintenance,
}

/// The IAM policy of a credential and, for a cache that writes, the lifecycle rule of the bucket.
pub fn policy(shared: &SharedConfig, user: PolicyFor) -> String {
    let is_cache = user != PolicyFor::Maintenance;
    let read_only = is_cache && (user == PolicyFor::ReadOnlyCache || !shared.write);
    let (bucket, prefix) = (&shared.bucket.bucket, &shared.bucket.prefix);
    let folder = match prefix.as_str() {
        "" => "v1/".to_owned(),
        prefix => format!("{prefix}/v1/"),
    };
    let objects = format!("arn:aws:s3:::{bucket}/{folder}");
    let actions: &[&str] = match user {
        PolicyFor::Maintenance => &["s3:GetObject", "s3:DeleteObject"],
        _ if read_only => &["s3:GetObject"],
        _ => &[
            "s3:GetObject",
            "s3:PutObject",
            "s3:DeleteObject",
            "s3:AbortMultipartUpload",
        ],
    };
    let mut list =
        json!({ "Effect": "Allow", "Action": "s3:ListBucket", "Resource": format!("arn:aws:s3:::{bucket}") });
    let mut statements =
        vec![json!({ "Effect": "Allow", "Action": actions, "Resource": format!("{objects}*") })];
    if !is_cache {
        // Tag records are replaced and not deleted. A probe checks the time of the storage.
        let written = [format!("{objects}records/tag/*"), format!("{objects}probe/*")];
        statements.push(json!({ "Effect": "Allow", "Action": "s3:PutObject", "Resource": written }));
        if let Some(fields) = list.as_object_mut() {
            // Without `IfExists`, the right would not cover reads, and AWS would respond 403 for absent objects.
            let folder = json!({ "StringLikeIfExists": { "s3:prefix": format!("{folder}*") } });
            fields.insert("Condition".to_owned(), folder);
        }
    }
    statements.push(list);
    if let Encryption::Kms(key) = &shared.bucket.encryption
        && key.starts_with("arn:")
    {
        let actions: &[&str] = if read_only {
            &["kms:Decrypt"]
        } else {
            // `Decrypt` for uploads in parts too.
            &["kms:Decrypt", "kms:GenerateDataKey"]
        };
        statements.push(json!({ "Effect": "Allow", "Action": actions, "Resource": key }));
    }
    let rights = json!({ "Version": "2012-10-17", "Statement": statements });
    if read_only || !is_cache {
        return format!("IAM policy:\n{rights:#}\n");
    }
    let days = shared.keep.as_secs() / (24 * 60 * 60);
    let rule = lifecycle_rule(&folder, days);
    format!("IAM policy:\n{rights:#}\n\nLifecycle rule:\n{rule:#}\n")
}

/// The lifecycle rule that deletes the objects of this folder after so many days.
fn lifecycle_rule(folder: &str, days: u64) -> serde_json::Value {
    json!({
        "Rules": [
            {
                "ID": "ifnewer",
                "Status": "Enabled",
                "Filter": { "Prefix": folder },
                "Expiration": { "Days": days },
                "AbortIncompleteMultipartUpload": { "DaysAfterInitiation": 1 },
            },
            // What a cache leaves behind that is killed while it downloads.
            {
                "ID": "ifnewer-parts",
                "Status": "Enabled",
                "Filter": { "Prefix": format!("{folder}parts/") },
                "Expiration": { "Days": 1 },
            },
        ],
    })
}

/// Checks the bucket and prints a line for each step. Returns whether a cache can use it.
pub async fn check(shared: &SharedConfig, out: &mut dyn Write) -> io::Result<bool> {
    let settings = &shared.bucket;
    writeln!(
        out,
        "{} at {}, by {}",
        settings.name(),
        settings.endpoint,
        settings.credential.source()
    )?;
    match bucket::open(settings, &Transport::system()) {
        Ok(bucket) => check_bucket(&bucket, shared.write, out).await,
        Err(error) => {
            writeln!(out, "failed  open: {error}")?;
            Ok(false)
        }
    }
}

async fn check_bucket(bucket: &Arc<dyn ObjectStorage>, write: bool, out: &mut dyn Write) -> io::Result<bool> {
    let key = ObjectKey::probe(&TraceContext::new_root().id().to_bytes());
    let read = match bucket.get(&key, 0).await {
        Ok(_) | Err(BucketError::Absent) => Ok("absent objects are reported as absent".to_owned()),
        Err(error) => Err(error),
    };
    if !step(out, "read", &read)? {
        return Ok(false);
    }
    if !write {
        writeln!(out, "ok      write: not checked, write = false")?;
        return Ok(true);
    }
    let bytes = Bytes::from(vec![1; OBJECT_BYTES]);
    let written = bucket.create(&key, bytes, None).await;
    let written = written.map(|_| "an object was created".to_owned());
    if !step(out, "write", &written)? {
        return Ok(false);
    }
    let ranges = step(out, "range", &read_range(bucket, &key).await)?;
    let parts = step(out, "parts", &upload_parts(bucket).await)?;
    match probe(bucket).await {
        Ok(found) if found.are_kept() => {
            writeln!(out, "ok      conditions: one of 16 simultaneous writers wins")?;
        }
        Ok(found) => writeln!(
            out,
            "note    conditions: {} of 16 creates and {} of 16 updates won, one each would be right. The cache works, but \
             objects may be uploaded twice, and each cache fetches what it lacks for itself",
            found.creates_won, found.updates_won
        )?,
        Err(error) => writeln!(out, "note    conditions: not known, {error}")?,
    }
    match bucket.delete(&key).await {
        Ok(()) => writeln!(out, "ok      delete")?,
        Err(error) => writeln!(
            out,
            "note    delete: {error}. Only objects below v1/probe, v1/claims and v1/parts are deleted. Without this right \
             they stay until the lifecycle rule deletes them, and no blob is claimed"
        )?,
    }
    Ok(ranges && parts)
}

async fn read_range(bucket: &Arc<dyn ObjectStorage>, key: &ObjectKey) -> Result<String, BucketError> {
    let mut object = bucket.get(key, OFFSET as u64).await?;
    let mut count = 0;
    while let Some(chunk) = object.body.chunk().await {
        count += chunk?.len();
    }
    if count == OBJECT_BYTES - OFFSET {
        Ok("an object can be read from any byte".to_owned())
    } else {
        Err(BucketError::Malformed)
    }
}

async fn upload_parts(bucket: &Arc<dyn ObjectStorage>) -> Result<String, BucketError> {
    let key = ObjectKey::probe(&TraceContext::new_root().id().to_bytes());
    let mut upload = bucket.upload(&key).await?;
    let sent = upload.part(Bytes::from_static(b"part")).await;
    let aborted = upload.abort().await;
    sent.and(aborted)
        .map(|()| "large objects can be uploaded in parts".to_owned())
}

fn step(out: &mut dyn Write, name: &str, result: &Result<String, BucketError>) -> io::Result<bool> {
    match result {
        Ok(found) => writeln!(out, "ok      {name}: {found}")?,
        Err(error) => writeln!(out, "failed  {name}: {error}")?,
    }
    Ok(result.is_ok())
}

#[cfg(all(test, feature = "shared"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[tokio::test]
    async fn check_of_a_bucket_prints_each_step() {
        for (write, steps) in [(true, 6), (false, 2)] {
            let mut out = Vec::new();
            let bucket = bucket::in_memory();
            assert!(check_bucket(&bucket, write, &mut out).await.unwrap());
            let text = String::from_utf8(out).unwrap();
            assert!(text.lines().all(|line| line.starts_with("ok ")), "{text}");
            assert_eq!(text.lines().count(), steps, "{text}");
        }
    }

    pub(super) fn configured(text: &str) -> SharedConfig {
        let variables = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let config = Config::gather(&crate::config::Sources {
            data: "/tmp".into(),
            working_dir_certs: None,
            text,
            origin: std::path::Path::new(""),
            variables: variables.to_vec(),
            flags: Vec::new(),
        });
        config.unwrap().shared.unwrap()
    }

    #[test]
    fn configuration_that_does_not_write_deletes_nothing() {
        let keys = "[shared]\nbucket = \"s3://images\"\nregion = \"x\"\n";
        let writer = configured(keys);
        let reader = configured(&format!("{keys}write = false"));
        assert!(refuse_read_only(&writer, true).is_ok() && refuse_read_only(&reader, false).is_ok());
        let refused = refuse_read_only(&reader, true).unwrap_err().to_string();
        assert!(refused.contains("`write = false`"), "{refused}");
    }

    #[test]
    fn documentation_has_the_policy_that_is_printed() {
        let shared = configured("[shared]\nbucket = \"s3://acme-images/team-a\"\nregion = \"eu-central-1\"");
        let documentation = include_str!("../../docs/shared.md");
        let printed = [PolicyFor::Cache, PolicyFor::Maintenance].map(|user| policy(&shared, user));
        for document in printed.iter().flat_map(|text| text.split("\n\n")) {
            let (title, json) = document.split_once('\n').unwrap();
            let block = format!("```json\n{}\n```", json.trim_end());
            assert!(documentation.contains(&block), "{title}\n{block}");
        }
    }

    #[test]
    fn policy_names_the_prefix_and_the_age() {
        let shared = configured("[shared]\nbucket = \"s3://images/team-a\"\nregion = \"x\"\nkeep = \"30d\"");
        let text = policy(&shared, PolicyFor::Cache);
        assert!(
            text.contains("arn:aws:s3:::images/team-a/v1/*") && text.contains("\"Days\": 30"),
            "{text}"
        );
        let read_only = policy(&shared, PolicyFor::ReadOnlyCache);
        assert!(
            !read_only.contains("PutObject") && !read_only.contains("Days"),
            "{read_only}"
        );
        let reader = configured("[shared]\nbucket = \"s3://images/team-a\"\nregion = \"x\"\nwrite = false");
        assert_eq!(
            policy(&reader, PolicyFor::Cache),
            policy(&reader, PolicyFor::ReadOnlyCache)
        );
    }

    #[test]
    fn policy_allows_the_key_of_the_encryption() {
        let key = "arn:aws:kms:eu-central-1:111122223333:key/1234";
        let shared = configured(&format!(
            "[shared]\nbucket = \"s3://images\"\nregion = \"x\"\nencryption = \"sse-kms\"\nkms_key = \"{key}\""
        ));
        for (user, writes) in [(PolicyFor::Cache, true), (PolicyFor::ReadOnlyCache, false)] {
            let text = policy(&shared, user);
            assert!(text.contains("kms:Decrypt") && text.contains(key), "{text}");
            assert_eq!(text.contains("kms:GenerateDataKey"), writes, "{text}");
        }
    }
}
