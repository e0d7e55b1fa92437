//! Sorted digest table. The position of a digest is its number in the graph, so no index by digest is needed.

use std::io;

use crate::oci::Digest;

/// Distinct digests in ascending order, SHA-256 first.
#[derive(Debug, Default)]
pub(in crate::store) struct Digests {
    sha256: Vec<[u8; 32]>,
    sha512: Vec<[u8; 64]>,
}

impl Digests {
    pub(super) fn with_capacity(sha256: usize) -> Self {
        Self {
            sha256: Vec::with_capacity(sha256),
            sha512: Vec::new(),
        }
    }

    /// Appends a digest. It must be greater than the last one.
    pub(super) fn push(&mut self, digest: &Digest) -> io::Result<()> {
        let is_greater = match digest {
            Digest::Sha256(bytes) => {
                self.sha512.is_empty() && self.sha256.last().is_none_or(|last| last < bytes)
            }
            Digest::Sha512(bytes) => self.sha512.last().is_none_or(|last| last < bytes),
        };
        if !is_greater {
            return Err(io::Error::other("files are not listed in order"));
        }
        match digest {
            Digest::Sha256(bytes) => self.sha256.push(*bytes),
            Digest::Sha512(bytes) => self.sha512.push(*bytes),
        }
        Ok(())
    }

    pub(super) fn len(&self) -> usize {
        self.sha256.len() + self.sha512.len()
    }

    pub(super) fn get(&self, at: usize) -> Option<Digest> {
        match at.checked_sub(self.sha256.len()) {
            None => self.sha256.get(at).copied().map(Digest::Sha256),
            Some(at) => self.sha512.get(at).copied().map(Digest::Sha512),
        }
    }

    pub(super) fn find(&self, digest: &Digest) -> Option<usize> {
        match digest {
            Digest::Sha256(bytes) => self.sha256.binary_search(bytes).ok(),
            Digest::Sha512(bytes) => {
                let at = self.sha512.binary_search(bytes).ok()?;
                Some(self.sha256.len() + at)
            }
        }
    }

    #[cfg(test)]
    pub(super) fn heap_bytes(&self) -> usize {
        32 * self.sha256.capacity() + 64 * self.sha512.capacity()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;
    use crate::oci::Algorithm;

    #[test]
    fn digest_table_finds_what_it_has_in_order() {
        let names = ["a", "b", "c", "d"];
        let algorithms = [Algorithm::Sha256, Algorithm::Sha512];
        let of = |name: &str, algorithm| Digest::of(algorithm, name.as_bytes());
        let all = algorithms.map(|algorithm| names.map(|name| of(name, algorithm)));
        let mut all = all.concat();
        all.sort_unstable();
        let mut table = Digests::default();
        for digest in &all {
            table.push(digest).unwrap();
            assert!(table.push(digest).is_err(), "twice");
        }
        assert!(table.push(all.first().unwrap()).is_err(), "out of order");
        for (at, digest) in all.iter().enumerate() {
            assert_eq!((table.find(digest), table.get(at)), (Some(at), Some(*digest)));
        }
        assert_eq!(table.find(&of("e", Algorithm::Sha256)), None);
        assert_eq!(table.find(&of("e", Algorithm::Sha512)), None);
        assert_eq!((table.get(8), table.len()), (None, 8));
    }
}
