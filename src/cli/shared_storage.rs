//! `ifnewer shared`: checks the configured bucket, and prints the rights and the lifecycle rule that it needs.

use std::io::{self, Write};
use std::sync::Arc;

use bytes::Bytes;
use serde_json::json;

use crate::bucket::{self, BucketError, Encryption, ObjectKey, ObjectStorage};
use crate::config::SharedConfig;
use crate::shared::probe;
use crate::trace_context::TraceContext;
use crate::upstream::Transport;

/// Size of the object that the check writes, and the offset from which it is read again.
const OBJECT_BYTES: usize = 2048;
const OFFSET: usize = 1000;

/// The IAM policy of the credential and, for a cache that writes, the lifecycle rule of the bucket. `read_only`: as for a
/// cache that does not write.
pub fn policy(shared: &SharedConfig, read_only: bool) -> String {
    let read_only = read_only || !shared.write;
    let (bucket, prefix) = (&shared.bucket.bucket, &shared.bucket.prefix);
    let objects = match prefix.as_str() {
        "" => format!("arn:aws:s3:::{bucket}/v1/*"),
        prefix => format!("arn:aws:s3:::{bucket}/{prefix}/v1/*"),
    };
    let actions: &[&str] = if read_only {
        &["s3:GetObject"]
    } else {
        &[
            "s3:GetObject",
            "s3:PutObject",
            "s3:DeleteObject",
            "s3:AbortMultipartUpload",
        ]
    };
    let mut statements = vec![
        json!({ "Effect": "Allow", "Action": actions, "Resource": objects }),
        json!({ "Effect": "Allow", "Action": "s3:ListBucket", "Resource": format!("arn:aws:s3:::{bucket}") }),
    ];
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
    if read_only {
        return format!("IAM policy:\n{rights:#}\n");
    }
    let days = shared.keep.as_secs() / (24 * 60 * 60);
    let filter = match prefix.as_str() {
        "" => "v1/".to_owned(),
        prefix => format!("{prefix}/v1/"),
    };
    let rule = json!({
        "Rules": [
            {
                "ID": "ifnewer",
                "Status": "Enabled",
                "Filter": { "Prefix": filter },
                "Expiration": { "Days": days },
                "AbortIncompleteMultipartUpload": { "DaysAfterInitiation": 1 },
            },
            // What a cache leaves behind that is killed while it downloads.
            {
                "ID": "ifnewer-parts",
                "Status": "Enabled",
                "Filter": { "Prefix": format!("{filter}parts/") },
                "Expiration": { "Days": 1 },
            },
        ],
    });
    format!("IAM policy:\n{rights:#}\n\nLifecycle rule:\n{rule:#}\n")
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

    fn configured(text: &str) -> SharedConfig {
        let variables = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let config = crate::config::Config::gather(&crate::config::Sources {
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
    fn documentation_has_the_policy_that_is_printed() {
        let shared = configured("[shared]\nbucket = \"s3://acme-images/team-a\"\nregion = \"eu-central-1\"");
        let documentation = include_str!("../../docs/shared.md");
        for document in policy(&shared, false).split("\n\n") {
            let (title, json) = document.split_once('\n').unwrap();
            let block = format!("```json\n{}\n```", json.trim_end());
            assert!(documentation.contains(&block), "{title}\n{block}");
        }
    }

    #[test]
    fn policy_names_the_prefix_and_the_age() {
        let shared = configured("[shared]\nbucket = \"s3://images/team-a\"\nregion = \"x\"\nkeep = \"30d\"");
        let text = policy(&shared, false);
        assert!(
            text.contains("arn:aws:s3:::images/team-a/v1/*") && text.contains("\"Days\": 30"),
            "{text}"
        );
        let read_only = policy(&shared, true);
        assert!(
            !read_only.contains("PutObject") && !read_only.contains("Days"),
            "{read_only}"
        );
        let reader = configured("[shared]\nbucket = \"s3://images/team-a\"\nregion = \"x\"\nwrite = false");
        assert_eq!(policy(&reader, false), policy(&reader, true));
    }

    #[test]
    fn policy_allows_the_key_of_the_encryption() {
        let key = "arn:aws:kms:eu-central-1:111122223333:key/1234";
        let shared = configured(&format!(
            "[shared]\nbucket = \"s3://images\"\nregion = \"x\"\nencryption = \"sse-kms\"\nkms_key = \"{key}\""
        ));
        for (read_only, writes) in [(false, true), (true, false)] {
            let text = policy(&shared, read_only);
            assert!(text.contains("kms:Decrypt") && text.contains(key), "{text}");
            assert_eq!(text.contains("kms:GenerateDataKey"), writes, "{text}");
        }
    }
}
