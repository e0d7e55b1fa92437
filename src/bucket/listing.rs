//! Listing of a bucket: its objects with their sizes and ages, page by page.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime};

use super::{BucketError, ObjectKey};

/// An object in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub key: ObjectKey,
    /// Size in bytes.
    pub size: u64,
    /// Time since it was last written, by the clock of the storage alone. `None`: the storage does not say.
    pub age: Option<Duration>,
    /// `Date` of the page.
    pub date: Option<SystemTime>,
}

/// A pending read of the next object.
pub type ListingNext<'a> = Pin<Box<dyn Future<Output = Option<Result<Listed, BucketError>>> + Send + 'a>>;

/// A listing. It has one page in memory.
pub trait Listing: Send {
    /// The next object, or `None` at the end. Nothing follows an error.
    fn next(&mut self) -> ListingNext<'_>;
}

/// The listing of storage that has none.
pub(super) struct Unlisted;

impl Listing for Unlisted {
    fn next(&mut self) -> ListingNext<'_> {
        Box::pin(async { Some(Err(BucketError::Malformed)) })
    }
}
