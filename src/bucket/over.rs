//! Storage over another one: fakes of tests, which change single requests.

use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::{
    BucketFuture, Listing, Object, ObjectInfo, ObjectKey, ObjectStorage, StorageClock, Upload, in_memory,
};

/// Storage that passes each request on, except those that its own methods change.
pub(crate) trait Over: Send + Sync {
    /// The storage that gets the requests.
    fn inner(&self) -> &dyn ObjectStorage;

    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        self.inner().get(key, from)
    }

    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        self.inner().head(key)
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        self.inner().create(key, bytes, media_type)
    }

    fn update<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        etag: &'a str,
    ) -> BucketFuture<'a, Option<String>> {
        self.inner().update(key, bytes, etag)
    }

    fn put<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, ()> {
        self.inner().put(key, bytes, media_type)
    }

    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()> {
        self.inner().delete(key)
    }

    fn list(&self, folder: &str, after: Option<&ObjectKey>) -> Box<dyn Listing> {
        self.inner().list(folder, after)
    }

    fn clock(&self) -> Option<&StorageClock> {
        self.inner().clock()
    }

    fn presign<'a>(&'a self, key: &'a ObjectKey, valid: Duration) -> BucketFuture<'a, String> {
        self.inner().presign(key, valid)
    }
}

impl<T: Over> ObjectStorage for T {
    fn get<'a>(&'a self, key: &'a ObjectKey, from: u64) -> BucketFuture<'a, Object> {
        Over::get(self, key, from)
    }

    fn head<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ObjectInfo> {
        Over::head(self, key)
    }

    fn create<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, Option<String>> {
        Over::create(self, key, bytes, media_type)
    }

    fn update<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        etag: &'a str,
    ) -> BucketFuture<'a, Option<String>> {
        Over::update(self, key, bytes, etag)
    }

    fn put<'a>(
        &'a self,
        key: &'a ObjectKey,
        bytes: Bytes,
        media_type: Option<&'a str>,
    ) -> BucketFuture<'a, ()> {
        Over::put(self, key, bytes, media_type)
    }

    fn upload<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, Box<dyn Upload>> {
        self.inner().upload(key)
    }

    fn delete<'a>(&'a self, key: &'a ObjectKey) -> BucketFuture<'a, ()> {
        Over::delete(self, key)
    }

    fn list(&self, folder: &str, after: Option<&ObjectKey>) -> Box<dyn Listing> {
        Over::list(self, folder, after)
    }

    fn clock(&self) -> Option<&StorageClock> {
        Over::clock(self)
    }

    fn presign<'a>(&'a self, key: &'a ObjectKey, valid: Duration) -> BucketFuture<'a, String> {
        Over::presign(self, key, valid)
    }
}

/// Storage in memory, for a fake that needs none in particular.
pub(crate) struct Memory(Arc<dyn ObjectStorage>);

impl Default for Memory {
    fn default() -> Self {
        Self(in_memory())
    }
}

impl Deref for Memory {
    type Target = dyn ObjectStorage;

    fn deref(&self) -> &Self::Target {
        &*self.0
    }
}
