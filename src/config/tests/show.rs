//! Output of `config show`.

use std::path::{Path, PathBuf};

use crate::config::{Config, Flag, Section, Sources, show};

const TEXT: &str = "data = \"d\"\n[store]\nsize = \"9 GiB\"\n[connect]\ntunnel = [\"a.example\"]\n\
                    [upstream.\"ghcr.io\"]\nurl = \"https://mirror.example\"\n[[rule]]\nimages = [\"ghcr.io/a/*\"]\nmax_age = \"1m\"\n";

fn sources() -> Sources<'static> {
    let variable = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    Sources {
        data: PathBuf::from("/var/cache/ifnewer"),
        working_dir_certs: None,
        text: TEXT,
        origin: Path::new("i.toml"),
        variables: vec![
            variable("IFNEWER_TLS_NAMES", "one.example, two.example"),
            variable("IFNEWER_LIMITS_TUNNELS_MAX", "7"),
        ],
        flags: vec![Flag {
            name: "--log",
            key: "log.level",
            value: "debug".to_owned(),
        }],
    }
}

#[test]
fn each_setting_shows_its_origin() {
    let text = show(&sources(), true).unwrap();
    let lines: Vec<_> = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    for line in [
        "data = \"d\" # i.toml:1",
        "size = \"9 GiB\" # i.toml:3",
        "free = \"5 GiB\" # default",
        "tunnel = [\"a.example\"] # i.toml:5",
        "names = [\"one.example\", \"two.example\"] # IFNEWER_TLS_NAMES",
        "tunnels_max = 7 # IFNEWER_LIMITS_TUNNELS_MAX",
        "level = \"debug\" # --log",
        "#htpasswd = # not set",
        "[upstream.\"ghcr.io\"]",
        "url = \"https://mirror.example\" # i.toml:7",
        "max_age = \"1m\" # i.toml:10",
    ] {
        assert!(lines.iter().any(|shown| shown == line), "{line}: {text}");
    }
    for key in Section::ALL
        .iter()
        .filter(|section| section.is_fixed())
        .flat_map(|section| section.keys())
    {
        assert!(
            text.contains(&format!("{} =", key.name)),
            "{}: {text}",
            key.path()
        );
    }
}

#[test]
fn shown_settings_parse_to_the_same_configuration() {
    let text = show(&sources(), false).unwrap();
    let again = Sources {
        text: &text,
        variables: Vec::new(),
        flags: Vec::new(),
        ..sources()
    };
    assert_eq!(show(&again, false).unwrap(), text);
    let (one, other) = (
        Config::gather(&sources()).unwrap(),
        Config::gather(&again).unwrap(),
    );
    assert_eq!(one.summary().to_string(), other.summary().to_string());
}

#[test]
fn invalid_configuration_shows_no_settings() {
    let error = Sources {
        text: "polcy = 1",
        ..sources()
    };
    assert!(show(&error, false).is_err());
}
