#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests may fail loudly"
)]

use proptest::prelude::*;

use super::*;

/// Digest of the empty string.
const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

#[test]
fn digest_text_round_trips() {
    let digest: Digest = EMPTY.parse().unwrap();
    assert_eq!(digest, Digest::of(Algorithm::Sha256, b""));
    assert_eq!(digest.to_string(), EMPTY);
    assert_eq!(format!("{digest:?}"), EMPTY);
    assert_eq!(digest.hex(), EMPTY[7..]);
}

#[test]
fn invalid_digest_is_rejected_with_its_reason() {
    let hex = &EMPTY[7..];
    let length = |found| DigestError::Length {
        algorithm: Algorithm::Sha256,
        expected: 64,
        found,
    };
    for (text, error) in [
        (String::new(), DigestError::Grammar),
        ("latest".into(), DigestError::Grammar),
        (hex.into(), DigestError::Grammar),
        (format!(":{hex}"), DigestError::Grammar),
        (format!("sha-256.:{hex}"), DigestError::Grammar),
        (format!("SHA256:{hex}"), DigestError::Grammar),
        ("blake3:".into(), DigestError::Grammar),
        ("blake3:a/b".into(), DigestError::Grammar),
        ("sha256:".into(), length(0)),
        ("sha256:short".into(), length(5)),
        (format!("sha256:{hex}0"), length(65)),
        (
            format!("sha256:{}", hex.to_uppercase()),
            DigestError::Hex {
                algorithm: Algorithm::Sha256,
            },
        ),
        (
            format!("sha256:{}", hex.replace('0', "g")),
            DigestError::Hex {
                algorithm: Algorithm::Sha256,
            },
        ),
        (
            format!("sha256:{}", "é".repeat(32)),
            DigestError::Hex {
                algorithm: Algorithm::Sha256,
            },
        ),
        (
            format!("sha512:{hex}"),
            DigestError::Length {
                algorithm: Algorithm::Sha512,
                expected: 128,
                found: 64,
            },
        ),
        (
            format!("x:{}", "a".repeat(254)),
            DigestError::TooLong { found: 256 },
        ),
    ] {
        assert_eq!(text.parse::<AnyDigest>(), Err(error), "{text}");
        assert_eq!(text.parse::<Digest>(), Err(error), "{text}");
    }
}

#[test]
fn digest_of_an_unknown_algorithm_is_unsupported() {
    for text in [
        "blake3:0123",
        "sha384:ABC",
        "multihash+base58:QmRZ=_-",
        "a.b_c-d:x",
    ] {
        let any: AnyDigest = text.parse().unwrap();
        assert_eq!(any.to_string(), text);
        assert!(any.supported().is_none());
        assert_eq!(text.parse::<Digest>(), Err(DigestError::Unsupported));
    }
}

#[test]
fn hmac_sha256_matches_rfc_4231() {
    // RFC 4231, test cases 1, 2 and 6 (a key longer than a block).
    for (key, message, mac) in [
        (
            &[0x0b; 20][..],
            &b"Hi There"[..],
            "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7",
        ),
        (
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
        (
            &[0xaa; 131],
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        ),
    ] {
        assert_eq!(Digest::Sha256(hmac_sha256(key, message)).hex(), mac);
    }
}

proptest! {
    #[test]
    fn any_digest_bytes_round_trip(short: [u8; 32], long in proptest::collection::vec(any::<u8>(), 64)) {
        let long: [u8; 64] = long.try_into().unwrap();
        for digest in [Digest::Sha256(short), Digest::Sha512(long)] {
            prop_assert_eq!(digest.to_string().parse(), Ok(digest));
            prop_assert_eq!(Digest::from_hex(digest.algorithm(), &digest.hex()), Ok(digest));
        }
    }

    #[test]
    fn incremental_hash_equals_hash_at_once(parts: Vec<Vec<u8>>) {
        for algorithm in [Algorithm::Sha256, Algorithm::Sha512] {
            let mut hasher = Hasher::new(algorithm);
            for part in &parts {
                hasher.update(part);
            }
            prop_assert_eq!(hasher.clone().finish(), Digest::of(algorithm, &parts.concat()));
        }
    }

    #[test]
    fn no_text_panics_and_parsed_text_round_trips(text in "\\PC{0,80}|[a-z0-9+._-]{1,8}:[a-zA-Z0-9=_-]{0,130}") {
        if let Ok(digest) = text.parse::<AnyDigest>() {
            prop_assert_eq!(digest.to_string(), text);
        }
    }
}
