//! Compact binary encoding of tag records for the index. sled keeps many more of its pages in memory than its cache
//! limit allows: with the JSON text in each record, a large store took twice the memory.
//!
//! Variants follow each other, the newest first. A variant is: the key of the `Accept` set (8 bytes), digest and media
//! type, time of the last and of the first confirmation (8 bytes each), a byte of flags, and the previous image if
//! there is one. Digest and media type begin with a type byte. Numbers are big-endian.

use super::record::{Previous, TagRecord, VARIANTS_MAX, Variant};
use crate::oci::{Digest, MediaType};
use crate::store::checksummed_json::{from_millis, to_millis};

/// Media types with a code of their own; the order is part of the format. Code 0 is any other type.
const KNOWN_TYPES: [&str; 4] = [
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];

const HAS_PREVIOUS: u8 = 1;
const ACCEPTS_INDEXES: u8 = 2;
const IS_BY_RECORD: u8 = 4;

impl TagRecord {
    /// Encodes as many variants, the newest first, as fit into `bytes_max`.
    pub(in crate::store) fn to_index(&self, bytes_max: usize) -> Vec<u8> {
        let mut packed = Vec::new();
        for variant in &self.variants {
            let before = packed.len();
            pack(variant, &mut packed);
            if packed.len() > bytes_max {
                packed.truncate(before);
                break;
            }
        }
        packed
    }

    pub(super) fn from_index(mut packed: &[u8]) -> Option<Self> {
        let mut variants = Vec::new();
        while !packed.is_empty() {
            variants.push(unpack(&mut packed)?);
        }
        variants.truncate(VARIANTS_MAX);
        variants.shrink_to_fit();
        Some(Self { variants })
    }
}

fn pack(variant: &Variant, packed: &mut Vec<u8>) {
    packed.extend_from_slice(&variant.accept.to_be_bytes());
    pack_name(&variant.digest, &variant.media_type, packed);
    packed.extend_from_slice(&to_millis(variant.confirmed_at).to_be_bytes());
    packed.extend_from_slice(&to_millis(variant.first_seen_at).to_be_bytes());
    let has_previous = u8::from(variant.previous.is_some()) * HAS_PREVIOUS;
    let accepts_indexes = u8::from(variant.accepts_indexes) * ACCEPTS_INDEXES;
    packed.push(has_previous | accepts_indexes | (u8::from(variant.is_by_record) * IS_BY_RECORD));
    if let Some(previous) = &variant.previous {
        pack_name(&previous.digest, &previous.media_type, packed);
        packed.extend_from_slice(&to_millis(previous.confirmed_at).to_be_bytes());
    }
}

fn pack_name(digest: &Digest, media_type: &MediaType, packed: &mut Vec<u8>) {
    packed.push(match digest {
        Digest::Sha256(_) => 2,
        Digest::Sha512(_) => 5,
    });
    packed.extend_from_slice(digest.as_bytes());
    let text = media_type.as_str();
    if let Some(known) = (1..)
        .zip(KNOWN_TYPES)
        .find_map(|(number, known)| (known == text).then_some(number))
    {
        packed.push(known);
        return;
    }
    packed.push(0);
    // A parsed media type is never longer.
    packed.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
    packed.extend_from_slice(text.as_bytes());
}

fn unpack(packed: &mut &[u8]) -> Option<Variant> {
    let accept = number(packed)?;
    let (digest, media_type) = unpack_name(packed)?;
    let (confirmed_at, first_seen_at) = (from_millis(number(packed)?), from_millis(number(packed)?));
    let [flags] = *take(packed)?;
    let previous = if flags & HAS_PREVIOUS != 0 {
        let (digest, media_type) = unpack_name(packed)?;
        Some(Previous {
            digest,
            media_type,
            confirmed_at: from_millis(number(packed)?),
        })
    } else {
        None
    };
    Some(Variant {
        accept,
        digest,
        media_type,
        accepts_indexes: flags & ACCEPTS_INDEXES != 0,
        confirmed_at,
        first_seen_at,
        previous,
        is_by_record: flags & IS_BY_RECORD != 0,
        // Only in the file.
        history: Vec::new(),
    })
}

fn unpack_name(packed: &mut &[u8]) -> Option<(Digest, MediaType)> {
    let digest = match take::<1>(packed)? {
        [2] => Digest::Sha256(*take(packed)?),
        [5] => Digest::Sha512(*take(packed)?),
        _ => return None,
    };
    let media_type = match take::<1>(packed)? {
        [0] => {
            let [length] = *take(packed)?;
            let (text, rest) = packed.split_at_checked(usize::from(length))?;
            *packed = rest;
            std::str::from_utf8(text).ok()?
        }
        [known] => KNOWN_TYPES.get(usize::from(*known) - 1)?,
    };
    Some((digest, media_type.parse().ok()?))
}

fn number(packed: &mut &[u8]) -> Option<u64> {
    take(packed).map(|bytes| u64::from_be_bytes(*bytes))
}

fn take<'a, const N: usize>(packed: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (first, rest) = packed.split_first_chunk()?;
    *packed = rest;
    Some(first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Algorithm;
    use std::time::{Duration, SystemTime};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn record() -> TagRecord {
        let variant = |accept: u64, algorithm, media_type: &str| Variant {
            accept,
            digest: Digest::of(algorithm, &accept.to_be_bytes()),
            media_type: media_type.parse().unwrap(),
            accepts_indexes: accept == 1,
            confirmed_at: at(2_000_000_000),
            first_seen_at: at(1),
            previous: None,
            is_by_record: accept == 1,
            history: Vec::new(),
        };
        let mut variants = vec![
            variant(1, Algorithm::Sha256, KNOWN_TYPES[1]),
            variant(u64::MAX >> 1, Algorithm::Sha512, "application/x.of-our-own+json"),
        ];
        variants[0].previous = Some(Previous {
            digest: Digest::of(Algorithm::Sha512, b"before"),
            media_type: KNOWN_TYPES[3].parse().unwrap(),
            confirmed_at: at(7),
        });
        TagRecord { variants }
    }

    #[test]
    fn tag_record_encoding_round_trips() {
        let record = record();
        assert_eq!(TagRecord::from_index(&record.to_index(4000)), Some(record));
    }

    #[test]
    fn encoding_drops_oldest_variants_beyond_limit() {
        let mut record = record();
        let packed = record.to_index(4000);
        record.variants.truncate(1);
        assert_eq!(
            TagRecord::from_index(&record.to_index(packed.len() - 1)),
            Some(record)
        );
    }

    #[test]
    fn truncated_tag_encoding_is_rejected() {
        let record = record();
        let packed = record.to_index(4000);
        let full_length = record.to_index(4000).len();
        let first = TagRecord {
            variants: record.variants[..1].to_vec(),
        }
        .to_index(4000)
        .len();
        for length in (1..full_length).filter(|length| *length != first) {
            assert_eq!(TagRecord::from_index(&packed[..length]), None, "{length}");
        }
    }

    #[test]
    fn record_in_memory_has_no_spare_capacity() {
        let mut record = record();
        record.variants.truncate(1);
        let indexed = TagRecord::from_index(&record.to_index(4000)).unwrap();
        let merged = TagRecord::from_variants(record.variants);
        for variants in [indexed.variants, merged.variants] {
            assert_eq!(variants.capacity(), 1);
        }
    }

    #[test]
    fn typical_tag_encoding_is_below_80_bytes() {
        let mut record = record();
        record.variants.truncate(1);
        record.variants[0].previous = None;
        assert!(record.to_index(4000).len() < 80);
    }
}
