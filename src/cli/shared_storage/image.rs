//! `ifnewer shared ls IMAGE` and `rm`: one image in the bucket.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::{Ls, Rm};
use crate::admin::format::{bytes, duration};
use crate::bucket::{Listed, ObjectStorage};
use crate::cli::commands::table::Table;
use crate::cli::commands::{CommandError, Output, Style};
use crate::config::{Config, ConfiguredImage, SharedConfig};
use crate::oci::{AnyDigest, Digest, Reference, Tag};
use crate::shared::RecordPlace;
use crate::shared::maintenance::{
    BucketImages, ContentFound, ImageObject, ImageObjects, ObjectRole, ObjectState, TagFound, delete,
};

/// An image with its objects.
struct Found {
    image: ConfiguredImage,
    place: RecordPlace,
    /// The tag with its record.
    tag: Option<(Tag, Option<TagFound>)>,
    objects: ImageObjects,
}

impl Found {
    async fn read(config: &Config, bucket: &BucketImages, text: &str) -> Result<Self, CommandError> {
        let image = config.image(text)?;
        let place = RecordPlace {
            upstream: image.identity.as_str().into(),
            repository: image.repository.clone(),
        };
        let (tag, digests) = match &image.reference {
            Reference::Digest(AnyDigest::Supported(digest)) => (None, vec![*digest]),
            Reference::Digest(AnyDigest::Unsupported(_)) => (None, Vec::new()),
            Reference::Tag(tag) => {
                let record = bucket.tag(&place, tag).await?;
                let named = record.iter().flat_map(|record| &record.digests);
                let digests = named.map(|(digest, _)| *digest).collect();
                (Some((tag.clone(), record)), digests)
            }
        };
        let objects = bucket.objects(&place, &digests).await?;
        Ok(Self {
            image,
            place,
            tag,
            objects,
        })
    }

    /// What the tag record says, in lines.
    fn tag_lines(&self) -> Vec<String> {
        let Some((_, record)) = &self.tag else {
            return Vec::new();
        };
        let Some(record) = record else {
            return vec!["tag record: none".to_owned()];
        };
        let named = record.digests.iter().map(|(digest, age)| {
            let age = duration(*age);
            format!("tag record: {digest}, named {age} ago")
        });
        let unnamed = record.unnamed.map(|age| {
            let age = duration(age);
            format!("tag record: names nothing that was seen before {age} ago")
        });
        named.chain(unnamed).collect()
    }

    fn json(&self) -> Value {
        let tag = self.tag.as_ref().map(|(_, record)| {
            record.as_ref().map(|record| {
                let digests = record.digests.iter().map(
                    |(digest, age)| json!({ "digest": digest.to_string(), "named_seconds": age.as_secs() }),
                );
                json!({
                    "digests": digests.collect::<Vec<_>>(),
                    "unnamed_seconds": record.unnamed.map(|age| age.as_secs()),
                })
            })
        });
        json!({
            "image": self.image.to_string(),
            "tag_record": tag.flatten(),
            "objects": self.objects.objects.iter().map(json_of).collect::<Vec<_>>(),
            "truncated": self.objects.is_truncated,
        })
    }
}

fn json_of(object: &ImageObject) -> Value {
    let (size, age) = match object.state {
        ObjectState::Present { size, age } => (Some(size), age),
        _ => (None, None),
    };
    let content = object.content.map(|content| match content {
        ContentFound::Absent => json!({ "state": "absent" }),
        ContentFound::Unread => json!({ "state": "unread" }),
        ContentFound::Deleted => json!({ "state": "deleted" }),
        ContentFound::Present { children, confirmed } => json!({
            "state": "present",
            "children": children,
            "confirmed_seconds": confirmed.map(|age| age.as_secs()),
        }),
    });
    json!({
        "digest": object.digest.to_string(),
        "role": object.role.name(),
        "platform": object.platform,
        "state": state_name(&object.state),
        "size": size,
        "age_seconds": age.map(|age| age.as_secs()),
        "content_record": content,
    })
}

fn state_name(state: &ObjectState) -> &'static str {
    match state {
        ObjectState::Present { .. } => "present",
        ObjectState::Missing => "missing",
        ObjectState::Damaged => "damaged",
    }
}

/// `ifnewer shared ls IMAGE`.
pub(super) async fn ls(
    (config, shared): (&Config, &SharedConfig),
    storage: &Arc<dyn ObjectStorage>,
    (text, args): (&str, &Ls),
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let bucket = BucketImages::new(shared.settings(Arc::clone(storage)));
    let found = Found::read(config, &bucket, text).await?;
    if args.json {
        return output.json(&found.json());
    }
    output.line(&found.image.to_string())?;
    for line in found.tag_lines() {
        output.line(&line)?;
    }
    let mut table = Table::new(&["role", "digest", "bucket", ">size", ">age", "content record"]);
    for object in &found.objects.objects {
        let (size, age) = match object.state {
            ObjectState::Present { size, age } => (bytes(size), age.map(duration)),
            _ => ("-".to_owned(), None),
        };
        let role = match &object.platform {
            Some(platform) => format!("{} {platform}", object.role.name()),
            None => object.role.name().to_owned(),
        };
        table.row(vec![
            role,
            object.digest.to_string(),
            state_name(&object.state).to_owned(),
            size,
            age.unwrap_or_else(|| "-".to_owned()),
            object.content.map(content_text).unwrap_or_default(),
        ]);
    }
    for line in table.lines() {
        output.line(&line)?;
    }
    let missing = found
        .objects
        .objects
        .iter()
        .filter(|object| object.listed().is_none());
    let (missing, all) = (missing.count(), found.objects.objects.len());
    output.line(&format!("{} of {all} objects are in the bucket", all - missing))?;
    if found.objects.is_truncated {
        output.line(&output.paint(Style::Warning, "the image has more objects, which are not listed"))?;
    }
    Ok(())
}

fn content_text(content: ContentFound) -> String {
    match content {
        ContentFound::Absent => "none".to_owned(),
        ContentFound::Unread => "cannot be read".to_owned(),
        ContentFound::Deleted => "deleted".to_owned(),
        ContentFound::Present { children, confirmed } => {
            let confirmed = match confirmed {
                Some(age) => format!("confirmed {} ago", duration(age)),
                None => "not confirmed".to_owned(),
            };
            format!("{children} children seen, {confirmed}")
        }
    }
}

/// `ifnewer shared rm`.
pub(super) async fn rm(
    (config, shared): (&Config, &SharedConfig),
    storage: &Arc<dyn ObjectStorage>,
    args: &Rm,
    output: &mut Output<'_>,
    interrupt: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    super::refuse_read_only(shared, args.yes)?;
    let bucket = BucketImages::new(shared.settings(Arc::clone(storage)));
    let mut interrupt = std::pin::pin!(interrupt);
    for text in &args.images {
        let Doomed { name, objects, tag } = Doomed::read((config, &bucket), text, args.blobs).await?;
        if args.yes
            && let Some((place, tag)) = &tag
        {
            bucket.unname(place, tag).await?;
        }
        let mut removal = Removal::new(name, tag.is_some());
        let result = if args.yes {
            let count = |listed: &Listed| removal.add(listed);
            delete(storage, &objects, count, interrupt.as_mut()).await
        } else {
            for listed in &objects {
                removal.add(listed);
            }
            Ok(false)
        };
        removal.print(args, output)?;
        if result? {
            return Err(CommandError::Incomplete("interrupted".to_owned()));
        }
    }
    if !args.yes && !args.json {
        output.line(&output.paint(Style::Dim, "nothing was deleted; add --yes to do it"))?;
    }
    Ok(())
}

/// What `rm` deletes of one image or digest.
struct Doomed {
    name: String,
    objects: Vec<Listed>,
    /// The tag whose record names a digest.
    tag: Option<(RecordPlace, Tag)>,
}

impl Doomed {
    async fn read(
        (config, bucket): (&Config, &BucketImages),
        text: &str,
        has_blobs: bool,
    ) -> Result<Self, CommandError> {
        if let Ok(digest) = text.parse::<Digest>() {
            return Ok(Self {
                name: digest.to_string(),
                objects: bucket.objects_of(&digest).await?,
                tag: None,
            });
        }
        let found = Found::read(config, bucket, text).await?;
        // Other images may have the same blobs, and nothing in the bucket says which.
        let objects = found.objects.objects.iter();
        let doomed = objects.filter(|object| has_blobs || object.role == ObjectRole::Manifest);
        let is_naming = |record: &TagFound| !record.digests.is_empty();
        let named = found
            .tag
            .filter(|(_, record)| record.as_ref().is_some_and(is_naming));
        Ok(Self {
            name: found.image.to_string(),
            objects: doomed.filter_map(ImageObject::listed).collect(),
            tag: named.map(|(tag, _)| (found.place, tag)),
        })
    }
}

/// What was deleted of one image or digest, or would be.
struct Removal {
    name: String,
    has_tag_record: bool,
    objects: Vec<(String, u64, Option<Duration>)>,
}

impl Removal {
    fn new(name: String, has_tag_record: bool) -> Self {
        Self {
            name,
            has_tag_record,
            objects: Vec::new(),
        }
    }

    fn add(&mut self, listed: &Listed) {
        self.objects
            .push((listed.key.to_string(), listed.size, listed.age));
    }

    fn print(&self, args: &Rm, output: &mut Output<'_>) -> Result<(), CommandError> {
        let total: u64 = self.objects.iter().map(|(_, size, _)| size).sum();
        if args.json {
            let objects = self.objects.iter().map(|(key, size, age)| {
                json!({ "object": key, "size": size, "age_seconds": age.map(|age| age.as_secs()) })
            });
            return output.json(&json!({
                "image": self.name,
                "dry_run": !args.yes,
                "tag_record": self.has_tag_record,
                "objects": objects.collect::<Vec<_>>(),
                "bytes": total,
            }));
        }
        let verb = if args.yes { "deleted" } else { "would delete" };
        if self.has_tag_record {
            let verb = if args.yes { "replaced" } else { "would replace" };
            output.line(&format!("{verb} the tag record: the tag names nothing"))?;
        }
        for (key, size, age) in &self.objects {
            let age = age.map_or_else(|| "-".to_owned(), duration);
            output.line(&format!("{verb} {key}, {}, written {age} ago", bytes(*size)))?;
        }
        let size = output.paint(Style::Bold, &bytes(total));
        output.line(&format!(
            "{}: {size} in {} objects",
            self.name,
            self.objects.len()
        ))
    }
}
