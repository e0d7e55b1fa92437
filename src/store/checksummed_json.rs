//! Checksummed JSON records.
//!
//! The last member of the object is a checksum of every byte before it. So a record stays plain JSON that a person can
//! read, and is verified without re-encoding it.

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::oci::{Algorithm, Digest};

/// Size limit of a record: eight variants of a tag, or the source repositories of a manifest.
pub(super) const RECORD_BYTES_MAX: u64 = 256 * 1024;

const MEMBER: &str = ",\"checksum\":\"";
const END: &str = "\"}\n";
const CHECKSUM_HEX: usize = 16;

/// The first eight bytes of the SHA-256 of `bytes`: detects decay, not forgery.
pub(super) fn checksum(bytes: &[u8]) -> [u8; 8] {
    let mut first = [0; 8];
    for (to, from) in first
        .iter_mut()
        .zip(Digest::of(Algorithm::Sha256, bytes).as_bytes())
    {
        *to = *from;
    }
    first
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write;
    bytes
        .iter()
        .fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
            // Writing to a `String` cannot fail.
            let _ = write!(text, "{byte:02x}");
            text
        })
}

/// Encodes `value`, which must serialise as a non-empty object, and appends its checksum.
pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    // Structs of strings and numbers always serialise; an empty record would be detected as damaged.
    let mut text = serde_json::to_string(value).unwrap_or_default();
    text.pop();
    let sum = hex(&checksum(text.as_bytes()));
    text.push_str(MEMBER);
    text.push_str(&sum);
    text.push_str(END);
    text.into_bytes()
}

/// Decodes a record. `None` if its checksum is wrong or a member is missing.
pub(super) fn decode<T: DeserializeOwned>(record: &[u8]) -> Option<T> {
    let text = record.strip_suffix(END.as_bytes())?;
    let (text, sum) = text.split_at_checked(text.len().checked_sub(CHECKSUM_HEX)?)?;
    let text = text.strip_suffix(MEMBER.as_bytes())?;
    if hex(&checksum(text)).as_bytes() != sum {
        return None;
    }
    serde_json::from_slice(record).ok()
}

/// Milliseconds since 1970; earlier times count as 1970.
pub(super) fn to_millis(time: std::time::SystemTime) -> u64 {
    let since = time.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// The inverse of [`to_millis`]; an unrepresentable time counts as 1970.
pub(super) fn from_millis(millis: u64) -> std::time::SystemTime {
    let since = std::time::Duration::from_millis(millis);
    std::time::UNIX_EPOCH
        .checked_add(since)
        .unwrap_or(std::time::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    #![allow(
        clippy::unwrap_used,
        clippy::indexing_slicing,
        reason = "tests may fail loudly"
    )]
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn encoded_record_decodes_to_same_value(map in proptest::collection::btree_map(".{0,8}", ".{0,40}", 1..6)) {
            let map: BTreeMap<String, String> = map.into_iter().filter(|(key, _)| key != "checksum").collect();
            prop_assume!(!map.is_empty());
            let record = encode(&map);
            let mut found: BTreeMap<String, String> = decode(&record).unwrap();
            found.remove("checksum");
            prop_assert_eq!(found, map);
        }

        #[test]
        fn changed_byte_is_detected(position in 0_usize..64, change in 1_u8..) {
            let mut record = encode(&BTreeMap::from([("name", "value of some length that is enough")]));
            let position = position % record.len();
            record[position] ^= change;
            prop_assert_eq!(decode::<BTreeMap<String, String>>(&record), None);
        }

        #[test]
        fn garbage_does_not_decode(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(decode::<BTreeMap<String, String>>(&bytes), None);
        }
    }

    #[test]
    fn truncated_record_is_detected() {
        let record = encode(&BTreeMap::from([("name", "value")]));
        for length in 0..record.len() {
            assert_eq!(
                decode::<BTreeMap<String, String>>(&record[..length]),
                None,
                "{length}"
            );
        }
    }
}
