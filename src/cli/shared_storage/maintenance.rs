//! `ifnewer shared ls` and `gc`: inventory and garbage collection of the bucket.

use std::sync::Arc;
use std::time::Duration;

use indicatif::ProgressBar;
use serde_json::{Value, json};

use super::{Gc, Ls};
use crate::admin::format::{bytes, duration};
use crate::bucket::ObjectStorage;
use crate::cli::commands::table::Table;
use crate::cli::commands::{CommandError, Output, Style};
use crate::config::SharedConfig;
use crate::shared::maintenance::{GarbageCollection, GcRules, Inventory, take_inventory};

/// Objects between two updates of the progress: a page.
const PROGRESS_OBJECTS: u64 = 1000;

/// `ifnewer shared ls` without an image.
pub(super) async fn ls(
    (name, bucket): (&str, &Arc<dyn ObjectStorage>),
    args: &Ls,
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let progress = Progress::new(output, args.json);
    let inventory = take_inventory(bucket, |so_far| progress.listed("listed", so_far)).await;
    progress.end();
    let inventory = inventory?;
    if args.json {
        let mut answer = json_of(&inventory);
        if let Some(fields) = answer.as_object_mut() {
            fields.insert("bucket".to_owned(), json!(name));
        }
        return output.json(&answer);
    }
    let mut table = Table::new(&["kind", ">objects", ">size", ">oldest", ">newest"]);
    for (kind, count) in inventory.kinds() {
        let age = |age: Option<Duration>| age.map_or_else(|| "-".to_owned(), duration);
        table.row(vec![
            kind.name(),
            count.objects.to_string(),
            bytes(count.bytes),
            age(count.ages.map(|(oldest, _)| oldest)),
            age(count.ages.map(|(_, newest)| newest)),
        ]);
    }
    for line in table.lines() {
        output.line(&line)?;
    }
    let size = output.paint(Style::Bold, &bytes(inventory.bytes()));
    output.line(&format!("{size} in {} objects of {name}", inventory.objects()))?;
    note_undated(&inventory, output)
}

/// `ifnewer shared gc`.
pub(super) async fn gc(
    (shared, bucket): (&SharedConfig, &Arc<dyn ObjectStorage>),
    args: &Gc,
    output: &mut Output<'_>,
    interrupt: impl Future<Output = ()>,
) -> Result<(), CommandError> {
    super::refuse_read_only(shared, args.yes)?;
    let rules = GcRules {
        older: args.older.or(args.size.is_none().then_some(shared.keep)),
        size_max: args.size,
        keep: shared.keep,
    };
    let mut printed = Ok(());
    if let Some(older) = args.older
        && older <= shared.keep / 2
        && !args.json
    {
        let half = duration(shared.keep / 2);
        let note = format!(
            "note: objects in use are written again at an age of {half}, half of `keep`, so this deletes objects in use too"
        );
        printed = output.line(&output.paint(Style::Warning, &note));
    }
    let verb = if args.yes { "deleted" } else { "would delete" };
    let progress = Progress::new(output, args.json);
    let mut collection = GarbageCollection::default();
    let show = |so_far: &GarbageCollection| {
        let size = bytes(so_far.deleted.bytes());
        progress.listed(&format!("{verb} {size}, listed"), &so_far.listed);
    };
    let result = collection.run(bucket, &rules, !args.yes, show, interrupt).await;
    progress.end();
    let result_printed = if args.json {
        output.json(&json!({
            "dry_run": !args.yes,
            "interrupted": collection.is_interrupted,
            "listed": json_of(&collection.listed),
            "deleted": json_of(&collection.deleted),
            "rewritten": collection.rewritten,
            "bytes_beyond_size": collection.excess(),
        }))
    } else {
        print_collection(&collection, (verb, !args.yes && result.is_ok()), output)
    };
    // An output that was closed hides no failure.
    result?;
    if collection.is_interrupted {
        let what = "interrupted: the bucket was not listed to its end".to_owned();
        return Err(CommandError::Incomplete(what));
    }
    printed.and(result_printed)
}

fn print_collection(
    collection: &GarbageCollection,
    (verb, is_trial): (&str, bool),
    output: &mut Output<'_>,
) -> Result<(), CommandError> {
    let (listed, deleted) = (&collection.listed, &collection.deleted);
    let kinds: Vec<_> = deleted
        .kinds()
        .map(|(kind, count)| format!("{} {}", count.objects, kind.name()))
        .collect();
    let kinds = if kinds.is_empty() {
        "0 objects".to_owned()
    } else {
        kinds.join(", ")
    };
    output.line(&format!(
        "{verb} {} in {kinds}; of {} in {} objects",
        output.paint(Style::Bold, &bytes(deleted.bytes())),
        bytes(listed.bytes()),
        listed.objects(),
    ))?;
    if collection.rewritten > 0 {
        output.line(&format!(
            "{} objects are kept, which were written after they were listed",
            collection.rewritten
        ))?;
    }
    if collection.excess() > 0 && !collection.is_interrupted {
        let excess = bytes(collection.excess());
        output.line(&format!(
            "{excess} beyond --size remain: records, objects of unknown age, or objects that were written meanwhile"
        ))?;
    }
    note_undated(listed, output)?;
    if is_trial {
        output.line(&output.paint(Style::Dim, "nothing was deleted; add --yes to do it"))?;
    }
    Ok(())
}

fn note_undated(inventory: &Inventory, output: &mut Output<'_>) -> Result<(), CommandError> {
    match inventory.undated() {
        0 => Ok(()),
        undated => output.line(&format!(
            "note: the storage states no age of {undated} objects; `ifnewer shared gc` keeps them"
        )),
    }
}

fn json_of(inventory: &Inventory) -> Value {
    let kinds: Vec<_> = inventory
        .kinds()
        .map(|(kind, count)| {
            let age = |age: Option<Duration>| age.map(|age| age.as_secs());
            json!({
                "kind": kind.name(),
                "objects": count.objects,
                "bytes": count.bytes,
                "oldest_seconds": age(count.ages.map(|(oldest, _)| oldest)),
                "newest_seconds": age(count.ages.map(|(_, newest)| newest)),
                "undated": count.undated,
            })
        })
        .collect();
    json!({ "objects": inventory.objects(), "bytes": inventory.bytes(), "kinds": kinds })
}

/// A line on a terminal that counts objects. Their total is not known before the end.
struct Progress(Option<ProgressBar>);

impl Progress {
    fn new(output: &Output<'_>, is_json: bool) -> Self {
        Self((output.progress && !is_json).then(ProgressBar::new_spinner))
    }

    fn listed(&self, what: &str, so_far: &Inventory) {
        let objects = so_far.objects();
        if let (Some(bar), true) = (&self.0, objects.is_multiple_of(PROGRESS_OBJECTS)) {
            bar.set_message(format!("{what} {objects} objects, {}", bytes(so_far.bytes())));
            bar.tick();
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

#[cfg(all(test, feature = "shared"))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::bucket::{ObjectKey, in_memory};
    use crate::oci::{Algorithm, Digest};

    async fn printed(json: bool) -> String {
        let bucket = in_memory();
        let key = ObjectKey::blob(&Digest::of(Algorithm::Sha256, b"x"));
        bucket
            .put(&key, b"content".as_slice().into(), None)
            .await
            .unwrap();
        let mut out = Vec::new();
        let mut output = Output {
            out: &mut out,
            colour: false,
            progress: false,
        };
        let args = Ls { image: None, json };
        ls(("s3://images", &bucket), &args, &mut output).await.unwrap();
        String::from_utf8(out).unwrap()
    }

    /// Standard output of which the reader has ended.
    struct Closed;

    impl std::io::Write for Closed {
        fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
            Err(std::io::ErrorKind::BrokenPipe.into())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn closed_output_hides_no_failure() {
        let mut output = Output {
            out: &mut Closed,
            colour: false,
            progress: false,
        };
        let shared = super::super::tests::configured("[shared]\nbucket = \"s3://images\"\nregion = \"x\"");
        let args = Gc {
            older: Some(Duration::from_secs(1)),
            size: None,
            yes: true,
            json: false,
        };
        let interrupt = std::future::ready(());
        let result = gc((&shared, &in_memory()), &args, &mut output, interrupt).await;
        assert!(matches!(result, Err(CommandError::Incomplete(_))));
    }

    /// Storage in memory states no `Date`.
    #[tokio::test]
    async fn inventory_says_that_ages_are_not_known() {
        let text = printed(false).await;
        let lines: Vec<_> = text.lines().collect();
        let row: Vec<_> = lines.get(1).unwrap().split_whitespace().collect();
        assert_eq!(row, ["blobs", "1", "7", "B", "-", "-"]);
        assert!(text.contains("7 B in 1 objects of s3://images"), "{text}");
        assert!(text.contains("states no age of 1 objects"), "{text}");
        let answer: Value = serde_json::from_str(&printed(true).await).unwrap();
        assert_eq!(answer.pointer("/kinds/0/undated"), Some(&json!(1)));
        assert_eq!(answer.pointer("/kinds/0/oldest_seconds"), Some(&Value::Null));
    }
}
