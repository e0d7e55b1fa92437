//! `ifnewer shared ls IMAGE` and `rm`: one image in the bucket.

#[cfg(all(test, feature = "shared"))]
mod tests;

use std::pin::Pin;
use std::sync::Arc;

use futures_util::FutureExt as _;
use serde_json::{Value, json};

use super::{Ls, Rm};
use crate::admin::format::{bytes, duration};
use crate::bucket::{Listed, ObjectStorage};
use crate::cli::commands::table::Table;
use crate::cli::commands::{CommandError, Output, Style};
use crate::config::{Config, ConfiguredImage, SharedConfig};
use crate::oci::{Algorithm, AnyDigest, Digest, Reference, Tag};
use crate::shared::RecordPlace;
use crate::shared::maintenance::{
    BucketImages, ContentFound, ImageObject, ImageObjects, ObjectState, TagFound, TagRecordError, delete,
};

/// Meaning of an argument.
#[derive(Debug)]
enum Target {
    Digest(Digest),
    Image(ConfiguredImage),
}

impl Target {
    /// Sends no request. `sha256:…` is never the tag of a repository `sha256`.
    fn parse(config: &Config, bucket: &BucketImages, text: &str) -> Result<Self, CommandError> {
        let algorithm = text.split_once(':').map(|(first, _)| first.parse::<Algorithm>());
        if let Some(Ok(_)) = algorithm {
            let digest = text.parse::<Digest>().map(Self::Digest);
            return digest.map_err(|error| CommandError::Digest {
                text: text.to_owned(),
                error,
            });
        }
        let image = config.image(text)?;
        if matches!(image.reference, Reference::Tag(_)) && !bucket.has_key() {
            return Err(TagRecordError::NoKey.into());
        }
        Ok(Self::Image(image))
    }
}

/// An image with its objects.
struct Found {
    image: ConfiguredImage,
    place: RecordPlace,
    /// The tag with its record.
    tag: Option<(Tag, Option<TagFound>)>,
    objects: ImageObjects,
}

impl Found {
    async fn read(bucket: &BucketImages, image: ConfiguredImage) -> Result<Self, CommandError> {
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
            "notes": notes(&self.objects),
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
    let found = match Target::parse(config, &bucket, text)? {
        Target::Digest(digest) => {
            let objects = bucket.objects_of(&digest).await?;
            return print_objects(&digest, &objects, args, output);
        }
        Target::Image(image) => Found::read(&bucket, image).await?,
    };
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
    print_notes(&notes(&found.objects), output)
}

/// `ifnewer shared ls DIGEST`.
fn print_objects(
    digest: &Digest,
    objects: &[Listed],
    args: &Ls,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    if args.json {
        let objects: Vec<_> = objects.iter().map(json_of_listed).collect();
        return output.json(&json!({ "image": digest.to_string(), "objects": objects }));
    }
    let mut table = Table::new(&["object", ">size", ">age"]);
    for listed in objects {
        table.row(vec![
            listed.key.to_string(),
            bytes(listed.size),
            listed.age.map_or_else(|| "-".to_owned(), duration),
        ]);
    }
    for line in table.lines() {
        output.line(&line)?;
    }
    output.line(&format!("{digest}: {} objects are in the bucket", objects.len()))
}

fn json_of_listed(listed: &Listed) -> Value {
    let age = listed.age.map(|age| age.as_secs());
    json!({ "object": listed.key.to_string(), "size": listed.size, "age_seconds": age })
}

/// Gaps in the knowledge of an image, for the operator.
fn notes(objects: &ImageObjects) -> Vec<String> {
    let counted = [
        (objects.unread_manifests(), "manifests are missing or damaged"),
        (objects.unparsed_manifests, "manifests cannot be parsed"),
        (objects.deep_indexes, "indexes are nested too deep"),
        (
            objects.unsupported_manifests,
            "manifests have digests of an unsupported algorithm",
        ),
    ];
    let counted = counted.into_iter().filter(|(count, _)| *count > 0);
    let unknown = counted.map(|(count, what)| format!("{count} {what}: what they list is not known"));
    let truncated = objects.is_truncated;
    let truncated = truncated.then(|| "the image has more objects, which are not listed".to_owned());
    unknown.chain(truncated).collect()
}

fn print_notes(notes: &[String], output: &mut Output<'_>) -> Result<(), CommandError> {
    for note in notes {
        output.line(&output.paint(Style::Warning, &format!("note: {note}")))?;
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
    // A wrong argument ends the command before the first deletion.
    let targets = args
        .images
        .iter()
        .map(|text| Target::parse(config, &bucket, text));
    let targets: Vec<_> = targets.collect::<Result<_, _>>()?;
    let mut interrupt = std::pin::pin!(interrupt);
    let (mut printed, mut is_found, mut is_known) = (Ok(()), false, true);
    for target in targets {
        let doomed = tokio::select! {
            biased;
            () = interrupt.as_mut() => return Err(interrupted()),
            doomed = Doomed::read(&bucket, target, args.blobs) => doomed?,
        };
        is_found |= doomed.tag.is_some() || doomed.steps.iter().any(|step| !step.is_empty());
        is_known &= !doomed.has_unknown_objects;
        let (mut removal, mut result) = (Removal::default(), Ok(()));
        if args.yes {
            let deleting = removal.delete((storage, &bucket), &doomed, interrupt.as_mut());
            result = deleting.await;
        } else {
            removal = Removal::trial(&doomed);
        }
        let output_result = removal.print(&doomed, args, output);
        // An output that was closed neither hides a failure nor spares the next image.
        result?;
        if removal.is_interrupted {
            return Err(interrupted());
        }
        printed = printed.and(output_result);
    }
    if !is_found {
        return Err(CommandError::Incomplete(
            "the bucket has no object of these images, and no tag record to replace".to_owned(),
        ));
    }
    printed?;
    if !args.yes && !args.json {
        output.line(&output.paint(Style::Dim, "nothing was deleted; add --yes to do it"))?;
    }
    if !is_known {
        return Err(CommandError::Incomplete(
            "the bucket may have more objects of these images, as the notes say; `ifnewer shared gc --older` deletes them by age"
                .to_owned(),
        ));
    }
    Ok(())
}

fn interrupted() -> CommandError {
    CommandError::Incomplete("interrupted".to_owned())
}

/// What `rm` deletes of one image or digest.
struct Doomed {
    name: String,
    /// The objects, by steps one after the other.
    steps: Vec<Vec<Listed>>,
    /// The tag whose record names a digest.
    tag: Option<(RecordPlace, Tag)>,
    notes: Vec<String>,
    /// The image may have other objects, which remain.
    has_unknown_objects: bool,
}

impl Doomed {
    async fn read(bucket: &BucketImages, target: Target, has_blobs: bool) -> Result<Self, CommandError> {
        let image = match target {
            Target::Digest(digest) => {
                return Ok(Self {
                    name: digest.to_string(),
                    steps: vec![bucket.objects_of(&digest).await?],
                    tag: None,
                    notes: Vec::new(),
                    has_unknown_objects: false,
                });
            }
            Target::Image(image) => image,
        };
        let found = Found::read(bucket, image).await?;
        let is_naming = |record: &TagFound| !record.digests.is_empty();
        let named = found
            .tag
            .filter(|(_, record)| record.as_ref().is_some_and(is_naming));
        Ok(Self {
            name: found.image.to_string(),
            // Other images may have the same blobs, and nothing in the bucket says which.
            steps: found.objects.deletion_steps(has_blobs),
            tag: named.map(|(tag, _)| (found.place, tag)),
            notes: notes(&found.objects),
            has_unknown_objects: found.objects.has_unknown_objects(),
        })
    }
}

/// The deletion of one image or digest, or its trial.
#[derive(Default)]
struct Removal {
    /// The tag record was replaced.
    is_tag_replaced: bool,
    is_interrupted: bool,
    objects: Vec<Listed>,
}

impl Removal {
    /// What would be deleted.
    fn trial(doomed: &Doomed) -> Self {
        Self {
            is_tag_replaced: doomed.tag.is_some(),
            is_interrupted: false,
            objects: doomed.steps.concat(),
        }
    }

    /// Deletes the objects. The tag record is last: until then, the command finds the same objects again.
    async fn delete(
        &mut self,
        (storage, bucket): (&Arc<dyn ObjectStorage>, &BucketImages),
        doomed: &Doomed,
        mut interrupt: Pin<&mut impl Future<Output = ()>>,
    ) -> Result<(), CommandError> {
        for step in &doomed.steps {
            let count = |listed: &Listed| self.objects.push(listed.clone());
            if delete(storage, step, count, interrupt.as_mut()).await? {
                self.is_interrupted = true;
                return Ok(());
            }
        }
        let Some((place, tag)) = &doomed.tag else {
            return Ok(());
        };
        if interrupt.as_mut().now_or_never().is_some() {
            self.is_interrupted = true;
            return Ok(());
        }
        self.is_tag_replaced = bucket.unname(place, tag).await?;
        Ok(())
    }

    fn print(&self, doomed: &Doomed, args: &Rm, output: &mut Output<'_>) -> Result<(), CommandError> {
        let total: u64 = self.objects.iter().map(|listed| listed.size).sum();
        if args.json {
            let objects: Vec<_> = self.objects.iter().map(json_of_listed).collect();
            return output.json(&json!({
                "image": doomed.name,
                "dry_run": !args.yes,
                "interrupted": self.is_interrupted,
                "tag_record": self.is_tag_replaced,
                "objects": objects,
                "bytes": total,
                "notes": doomed.notes,
            }));
        }
        let verb = if args.yes { "deleted" } else { "would delete" };
        for listed in &self.objects {
            let age = listed.age.map_or_else(|| "-".to_owned(), duration);
            let (key, size) = (&listed.key, bytes(listed.size));
            output.line(&format!("{verb} {key}, {size}, written {age} ago"))?;
        }
        if self.is_tag_replaced {
            let verb = if args.yes { "replaced" } else { "would replace" };
            output.line(&format!("{verb} the tag record: the tag names nothing"))?;
        }
        print_notes(&doomed.notes, output)?;
        let size = output.paint(Style::Bold, &bytes(total));
        let count = self.objects.len();
        output.line(&format!("{}: {size} in {count} objects", doomed.name))
    }
}
