//! The section `[shared]`.

use super::{gather, read};

const KEY: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "AKIA"), ("AWS_SECRET_ACCESS_KEY", "s3cret")];

#[test]
fn no_section_means_no_shared_storage() {
    assert!(read("").shared.is_none());
    assert!(read("[shared]").shared.is_none());
}

#[cfg(not(feature = "shared"))]
#[test]
fn build_without_the_feature_says_so_at_the_key() {
    let faults = gather("[shared]\nbucket = \"s3://images\"", &KEY, &[])
        .unwrap_err()
        .to_string();
    assert!(
        faults.contains("2:10") && faults.contains("without the feature `shared`"),
        "{faults}"
    );
}

#[cfg(feature = "shared")]
mod with_feature {
    use std::time::Duration;

    use super::*;
    use crate::bucket::{BucketCredential, Encryption};
    use crate::config::SharedConfig;
    use crate::shared::RedirectMode;

    fn shared(keys: &str, variables: &[(&str, &str)]) -> SharedConfig {
        let text = format!("[shared]\nbucket = \"s3://images/team-a/\"\n{keys}");
        let config = gather(&text, variables, &[]).unwrap_or_else(|faults| panic!("{faults}"));
        config.shared.unwrap()
    }

    fn told(keys: &str, variables: &[(&str, &str)]) -> String {
        let text = format!("[shared]\n{keys}");
        gather(&text, variables, &[]).unwrap_err().to_string()
    }

    #[test]
    fn bucket_alone_has_the_documented_defaults() {
        let config = shared("", &[&KEY[..], &[("AWS_REGION", "eu-central-1")]].concat());
        assert_eq!(
            (config.bucket.bucket.as_str(), config.bucket.prefix.as_str()),
            ("images", "team-a")
        );
        let endpoint = config.bucket.endpoint.to_string();
        assert_eq!(endpoint, "https://s3.eu-central-1.amazonaws.com");
        assert_eq!(config.bucket.timeout, Duration::from_secs(1));
        assert_eq!((config.write, config.uploads_max), (true, 3));
        assert_eq!(config.bucket.encryption, Encryption::Bucket);
        assert!(!format!("{config:?}").contains("s3cret"));
    }

    #[test]
    fn credential_is_chosen_as_by_the_sdks() {
        let region = "region = \"eu-central-1\"";
        let web = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "arn:r")];
        let container = [("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2/c")];
        let pod = [
            (
                "AWS_CONTAINER_CREDENTIALS_FULL_URI",
                "http://169.254.170.23/v1/credentials",
            ),
            ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/t"),
        ];
        for (variables, source) in [
            ([&KEY[..], &web[..]].concat(), "access key"),
            ([&web[..], &container[..]].concat(), "web identity"),
            ([&container[..], &pod[..]].concat(), "container credentials"),
            (pod.to_vec(), "pod identity"),
        ] {
            assert_eq!(shared(region, &variables).bucket.credential.source(), source);
        }
        let missing = shared(region, &[]).bucket.credential;
        assert_eq!(missing, BucketCredential::Missing, "only `serve` needs it");
        let instance = shared(&format!("{region}\ncredentials = \"instance\""), &KEY);
        assert_eq!(
            instance.bucket.credential,
            BucketCredential::Instance,
            "only if it is named"
        );
        let BucketCredential::WebIdentity { sts, .. } = shared(region, &web).bucket.credential else {
            panic!("not by web identity")
        };
        assert_eq!(sts.to_string(), "https://sts.eu-central-1.amazonaws.com");
    }

    #[test]
    fn token_is_sent_to_no_host_in_clear_text() {
        let keys = "bucket = \"s3://images\"\nregion = \"eu-central-1\"";
        let web = |sts| {
            [
                ("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"),
                ("AWS_ROLE_ARN", "arn:r"),
                ("AWS_ENDPOINT_URL_STS", sts),
            ]
        };
        let pod = |url| {
            [
                ("AWS_CONTAINER_CREDENTIALS_FULL_URI", url),
                ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/t"),
            ]
        };
        for url in ["http://sts.example.org", "http://127.0.0.1"] {
            let message = told(keys, &web(url));
            assert!(
                message.contains("AWS_ENDPOINT_URL_STS is not an https URL"),
                "{message}"
            );
        }
        for url in [
            "http://any.host/",
            "http://169.254.169.254/c",
            "http://localhost.example.org",
        ] {
            let message = told(keys, &pod(url));
            let names_it = message.contains("AWS_CONTAINER_CREDENTIALS_FULL_URI is plain HTTP");
            assert!(names_it, "{url}: {message}");
        }
        shared("region = \"x\"", &web("https://sts.example.org"));
        for url in [
            "https://any.host/",
            "http://localhost:80/c",
            "http://127.0.0.1:1/",
            "http://[::1]/",
            "http://169.254.170.2/c",
            "http://169.254.170.23/v1/credentials",
            "http://[fd00:ec2::23]/v1/credentials",
        ] {
            let credential = shared("region = \"x\"", &pod(url)).bucket.credential;
            assert_eq!(credential.source(), "pod identity", "{url}");
        }
    }

    #[test]
    fn contradictory_keys_are_rejected_at_their_place() {
        let bucket = "bucket = \"s3://images\"\nregion = \"eu-central-1\"\n";
        let whole = |keys: &str| format!("{bucket}{keys}");
        for (keys, variables, place, message) in [
            (
                "write = false".to_owned(),
                &KEY[..],
                "2:",
                "`[shared]` without `bucket`",
            ),
            (
                "grants = true".to_owned(),
                &KEY,
                "2:",
                "`[shared]` without `bucket`",
            ),
            (
                whole("grants = true"),
                &KEY,
                "4:10",
                "`grants` without `key_file`",
            ),
            (
                "bucket = \"images\"".to_owned(),
                &KEY,
                "2:10",
                "a bucket begins with s3://",
            ),
            (
                "bucket = \"s3://im/..\"".to_owned(),
                &KEY,
                "2:10",
                "not the name of a bucket",
            ),
            (
                "bucket = \"s3://images/a/../b\"".to_owned(),
                &KEY,
                "2:10",
                "not a prefix",
            ),
            (
                "bucket = \"s3://images--x-s3\"".to_owned(),
                &KEY,
                "2:10",
                "S3 Express One Zone",
            ),
            (
                "bucket = \"s3://images\"".to_owned(),
                &KEY,
                "2:10",
                "neither `region` nor `endpoint`",
            ),
            (whole(""), &KEY[..1], "2:10", "without AWS_SECRET_ACCESS_KEY"),
            (whole("keep = \"1d\""), &KEY, "4:8", "too short"),
            (
                whole("first_byte_timeout = \"0s\""),
                &KEY,
                "4:22",
                "a timeout of zero",
            ),
            (
                whole("endpoint = \"http://s3.example.org\""),
                &KEY,
                "4:12",
                "plain HTTP",
            ),
            (
                whole("endpoint = \"https://u:p@s3.example.org\""),
                &KEY,
                "4:12",
                "user or password",
            ),
            (
                whole("insecure = true"),
                &KEY,
                "4:12",
                "`insecure` with an endpoint",
            ),
            (
                whole("encryption = \"sse-kms\""),
                &KEY,
                "4:14",
                "without `kms_key`",
            ),
            (whole("kms_key = \"k\""), &KEY, "4:11", "`kms_key` without"),
            (
                whole("credentials = \"instance\"\ncredentials_file = \"k\""),
                &KEY,
                "4:15",
                "two sources of one credential",
            ),
        ] {
            let faults = told(&keys, variables);
            assert!(
                faults.contains(message) && faults.contains(place),
                "{keys}\n{faults}"
            );
        }
    }

    #[test]
    fn plain_http_is_for_the_private_network() {
        for endpoint in [
            "http://seaweedfs:8333",
            "http://10.1.2.3:8333",
            "http://127.0.0.1:1",
            "http://s3.internal",
        ] {
            shared(&format!("endpoint = \"{endpoint}\""), &KEY);
        }
        shared("endpoint = \"http://s3.example.org\"\ninsecure = true", &KEY);
    }

    #[test]
    fn impossible_redirects_are_rejected_at_their_key() {
        let whole = |keys: &str| format!("bucket = \"s3://images\"\nregion = \"x\"\n{keys}");
        for (keys, place, message) in [
            (
                whole("redirect = \"always\"\nredirect_ttl = \"2h\""),
                "5:16",
                "too long",
            ),
            ("redirect = \"always\"".to_owned(), "2:12", "without `bucket`"),
            ("redirect_ttl = \"30s\"".to_owned(), "2:16", "without `bucket`"),
            (
                whole("redirect_endpoint = \"https://s3.example.org\""),
                "4:21",
                "without `redirect`",
            ),
            (
                whole("redirect = \"always\"\nredirect_endpoint = \"http://s3.example.org\""),
                "5:21",
                "plain HTTP",
            ),
            (
                whole("redirect = \"always\"\nredirect_endpoint = \"https://s3.quay.io\""),
                "4:12",
                "would send their credential to s3.quay.io too",
            ),
        ] {
            let faults = told(&keys, &KEY);
            assert!(
                faults.contains(message) && faults.contains(place),
                "{keys}\n{faults}"
            );
        }
    }

    #[test]
    fn redirects_are_off_and_have_an_endpoint_of_their_own() {
        let config = shared("region = \"x\"", &KEY);
        assert_eq!(config.redirect.mode, RedirectMode::Never);
        let keys = "region = \"x\"\nredirect = \"uncached\"\nredirect_ttl = \"5m\"\n\
                    redirect_endpoint = \"https://s3.example.org\"";
        let config = shared(keys, &KEY);
        assert_eq!(config.redirect.mode, RedirectMode::Uncached);
        assert_eq!(config.redirect.valid, Duration::from_secs(300));
        let endpoint = config.bucket.client_endpoint.unwrap().to_string();
        assert_eq!(endpoint, "https://s3.example.org");
    }

    /// Clients in Go send `Authorization` on to the same host at any port, and to its subdomains.
    #[test]
    fn storage_below_a_name_of_the_cache_is_rejected() {
        let tls = |name: &str| {
            let text = format!(
                "[tls]\nnames = [\"{name}\"]\n[shared]\nbucket = \"s3://images\"\nregion = \"x\"\n\
                 redirect = \"always\"\nredirect_endpoint = \"https://storage.example.org:8333\""
            );
            gather(&text, &KEY, &[]).is_ok()
        };
        assert!(!tls("storage.example.org") && !tls("example.org"));
        assert!(tls("age.example.org") && tls("a.storage.example.org") && tls("example.com"));
    }

    #[test]
    fn credentials_file_has_two_lines() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let keys = format!("region = \"x\"\ncredentials_file = \"{}\"", file.path().display());
        std::fs::write(file.path(), "AKIA\ns3cret\n").unwrap();
        assert_eq!(shared(&keys, &[]).bucket.credential.source(), "access key");
        for text in ["", "AKIA\n", "AKIA\ns3cret\nmore\n"] {
            std::fs::write(file.path(), text).unwrap();
            let faults = told(&format!("bucket = \"s3://images\"\n{keys}"), &[]);
            assert!(
                faults.contains("two lines") && !faults.contains("s3cret"),
                "{faults}"
            );
        }
        std::fs::write(file.path(), "AKIA\ns3\u{e9}cret\n").unwrap();
        let faults = told(&format!("bucket = \"s3://images\"\n{keys}"), &[]);
        assert!(faults.contains("no access key has"), "{faults}");
    }

    #[test]
    fn key_file_is_private_and_has_keys() {
        use std::os::unix::fs::PermissionsExt;
        let file = tempfile::NamedTempFile::new().unwrap();
        let keys = format!("region = \"x\"\nkey_file = \"{}\"", file.path().display());
        let whole = format!("bucket = \"s3://images\"\n{keys}");
        let mode = |mode| std::fs::set_permissions(file.path(), PermissionsExt::from_mode(mode)).unwrap();
        let key = "5e".repeat(32);
        std::fs::write(file.path(), &key).unwrap();
        for allowed in [0o600, 0o400] {
            mode(allowed);
            let config = shared(&keys, &KEY);
            assert!(config.record_keys.is_some() && !format!("{config:?}").contains("5e5e"));
        }
        for readable in [0o644, 0o640, 0o606] {
            mode(readable);
            let faults = told(&whole, &KEY);
            assert!(
                faults.contains("4:12")
                    && faults.contains("other users may access")
                    && faults.contains("chmod 600"),
                "{faults}"
            );
        }
        mode(0o600);
        for (text, message) in [
            ("", "has no key"),
            ("5e5e", "line 1 is not 64"),
            ("\u{ff}", "line 1 is not 64"),
        ] {
            std::fs::write(file.path(), text).unwrap();
            let faults = told(&whole, &KEY);
            assert!(
                faults.contains("4:12") && faults.contains(message) && !faults.contains("5e5e"),
                "{faults}"
            );
        }
        let faults = told(&keys, &KEY);
        assert!(faults.contains("`[shared]` without `bucket`"), "{faults}");
    }
}
