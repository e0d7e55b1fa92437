//! Identity of an index: detects an index that belongs to another store or is older than its store.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Index, IndexError, disk};
use crate::store::checksummed_json::{RECORD_BYTES_MAX, decode, encode, hex};
use crate::store::fs::FileSystem;
use crate::store::secret::random;

const STORE_ID: &str = "store-id";
const IDENTITY_KEY: &[u8] = b"m\0store-id";

/// Store ID and generation, stored both in the index and in a file beside it.
#[derive(Clone, Serialize, Deserialize)]
struct Identity {
    id: String,
    generation: u64,
}

/// Compares the identity in the index with the one in the file and advances both to the next generation. The index
/// is written first, so an interruption in between is not taken for a loss.
pub(super) fn identify(fs: &dyn FileSystem, index: &mut dyn Index) -> Result<(), IndexError> {
    let path = Path::new(STORE_ID);
    let beside: Option<Identity> = fs
        .read_file(path, RECORD_BYTES_MAX)
        .ok()
        .and_then(|record| decode(&record));
    let inside: Option<Identity> = index.get(IDENTITY_KEY)?.and_then(|record| decode(&record));
    match (&beside, &inside) {
        (Some(beside), Some(inside)) if beside.id != inside.id => {
            return Err(IndexError::Foreign("belongs to another store"));
        }
        (Some(beside), Some(inside)) if beside.generation > inside.generation => {
            return Err(IndexError::Foreign("is older than its store"));
        }
        _ => {}
    }
    let generation = beside
        .iter()
        .chain(&inside)
        .map(|identity| identity.generation)
        .max()
        .unwrap_or(0)
        + 1;
    let id = match beside.or(inside) {
        Some(identity) => identity.id,
        None => hex(&random::<16>().map_err(disk)?),
    };
    let record = encode(&Identity { id, generation });
    index.put(IDENTITY_KEY, &record)?;
    index.sync()?;
    if let Err(error) = fs.write_durable(path, &record) {
        tracing::warn!(%error, "failed to write {STORE_ID}, a later loss of the index may go undetected");
    }
    Ok(())
}

/// Changes the store ID in the file, so that the index on disk is rejected when it is next opened.
pub(super) fn invalidate(fs: &dyn FileSystem) -> Result<(), IndexError> {
    let id = hex(&random::<16>().map_err(disk)?);
    let record = encode(&Identity { id, generation: 0 });
    fs.write_durable(Path::new(STORE_ID), &record).map_err(disk)
}
