//! Edits of JSON and TOML: everything else in the file keeps its bytes.

use proptest::collection::vec;
use proptest::prelude::*;
use toml::Value;

use super::*;
use crate::setup::edit::Text;
use crate::setup::edit::json::Object;
use crate::setup::edit::toml::{self as edit_toml, Place};

fn text_of(body: &str) -> Text {
    Text::read("/f", &MemoryFs::with("/f", body)).unwrap()
}

fn bytes(text: Text) -> String {
    String::from_utf8(text.into_bytes()).unwrap()
}

#[test]
fn what_is_not_changed_comes_back_as_it_was() {
    for body in ["", "\u{feff}{}", "a\r\nb", "\n\n", "x", "a\r\nb\nc\r\n"] {
        let text = text_of(body);
        assert_eq!(bytes(text.with(text.body.clone())), body);
        assert_eq!(bytes(text), body);
    }
}

#[test]
fn each_line_keeps_its_line_end() {
    for (before, body, after) in [
        ("a\r\nb\r\n", "a\nb\nc\n", "a\r\nb\r\nc\r\n"),
        ("a\nb\n", "a\nb\n\nc\n", "a\nb\n\nc\n"),
        ("", "c\n", "c\n"),
        (
            "\u{feff}a\r\nb\nd\r\n",
            "a\nc\nb\nd\n",
            "\u{feff}a\r\nc\r\nb\nd\r\n",
        ),
        ("a\nb\r\n", "c\nb\n", "c\nb\r\n"),
    ] {
        assert_eq!(bytes(text_of(before).with(body.to_owned())), after, "{before:?}");
    }
}

proptest! {
    #[test]
    fn inserted_line_leaves_all_other_bytes(
        lines in vec("[ab\r]{0,2}\r?\n", 0..12),
        position in 0..12_usize,
        has_bom: bool,
    ) {
        let bom = if has_bom { "\u{feff}" } else { "" };
        let before = format!("{bom}{}", lines.concat());
        let text = text_of(&before);
        let mut body: Vec<&str> = text.body.split_inclusive('\n').collect();
        body.insert(position.min(lines.len()), "new\n");
        let edited = bytes(text.with(body.concat()));
        let end = if edited.contains("new\r\n") { "new\r\n" } else { "new\n" };
        prop_assert_eq!(edited.replace(end, ""), before);
    }
}

#[test]
fn what_is_not_text_is_refused_with_its_line() {
    let mut held = MemoryFs::default();
    held.files.insert(PathBuf::from("/f"), b"a\nb\xff".to_vec());
    let refused = Text::read("/f", &held).unwrap_err();
    assert!(
        matches!(refused, SetupError::Unreadable { line: 2, .. }),
        "{refused}"
    );
}

fn with_mirror(body: &str) -> Result<String, SetupError> {
    let text = text_of(body);
    Ok(bytes(Object::read(&text)?.with_first("m", "u")?))
}

#[test]
fn json_keeps_all_other_bytes() {
    for (before, after) in [
        ("", "{\n  \"m\": [\"u\"]\n}\n"),
        (" \n", "{\n  \"m\": [\"u\"]\n}\n"),
        ("{}", "{\n  \"m\": [\"u\"]\n}"),
        ("{ }\n", "{\n  \"m\": [\"u\"]\n}\n"),
        (r#"{"b":1,"a":2}"#, r#"{"m": ["u"], "b":1,"a":2}"#),
        (
            "{\n\t\"z\": 1e300,\n\t\"a\": 12345678901234567890123\n}",
            "{\n\t\"m\": [\"u\"],\n\t\"z\": 1e300,\n\t\"a\": 12345678901234567890123\n}",
        ),
        (
            "{\r\n  \"b\": 1\r\n}\r\n",
            "{\r\n  \"m\": [\"u\"],\r\n  \"b\": 1\r\n}\r\n",
        ),
        ("\u{feff}{\"b\":1}", "\u{feff}{\"m\": [\"u\"], \"b\":1}"),
        (
            "{\"m\": [ ] , \"b\" : {\"m\":1}}",
            "{\"m\": [\"u\"] , \"b\" : {\"m\":1}}",
        ),
        ("{\"m\": [\n  \"v\"\n]}", "{\"m\": [\n  \"u\",\n  \"v\"\n]}"),
    ] {
        assert_eq!(with_mirror(before).unwrap(), after);
    }
}

#[test]
fn json_comments_survive() {
    for (before, after) in [
        (
            "// ours\n{\n  // \"m\": [],\n  \"b\": 1 /* one */\n}\n// end",
            "// ours\n{\n  \"m\": [\"u\"],\n  // \"m\": [],\n  \"b\": 1 /* one */\n}\n// end",
        ),
        ("{ // none\n}", "{\n  \"m\": [\"u\"]\n// none\n}"),
        ("{/* { */\"b\": 1}", "{\"m\": [\"u\"], /* { */\"b\": 1}"),
        (
            "{\r\n  \"m\": [ // first\r\n    \"v\" // \u{e9}\r\n  ]\r\n}",
            "{\r\n  \"m\": [ \"u\", // first\r\n    \"v\" // \u{e9}\r\n  ]\r\n}",
        ),
        (
            "{\"b\": \"// no comment\"}",
            "{\"m\": [\"u\"], \"b\": \"// no comment\"}",
        ),
    ] {
        assert_eq!(with_mirror(before).unwrap(), after);
    }
    let text = text_of("{\n\"b\": 1 // one\n/* two */}");
    assert_eq!(Object::read(&text).unwrap().comment, Some(2));
}

#[test]
fn invalid_json_is_rejected_with_its_line() {
    for (body, line) in [
        ("{\n  \"a\": 1,\n}", 3),
        ("{\r\n// two\r\n  \"a\": [1,],\r\n}", 3),
        ("{\n// hello", 1),
        ("// only", 1),
        ("{\n\n/* open\n", 3),
        ("[]", 1),
        ("{\"a\":1} x", 1),
        ("{\"a\":1,\n\"a\":2}", 2),
        ("{\"a\":1,\n\"\\u0061\":2}", 2),
        ("{", 1),
        ("{'a': 1}", 1),
        ("{a: 1}", 1),
        ("{\"a\": 1\n\"b\": 2}", 2),
        ("{\"a\": \"\t\"}", 1),
        ("{\"a\": 0x1}", 1),
        ("{\"a\": 1e400}", 1),
    ] {
        match with_mirror(body) {
            Err(SetupError::Unreadable { line: reported, .. }) => assert_eq!(reported, line, "{body}"),
            other => panic!("{body}: {other:?}"),
        }
    }
}

fn set(body: &str, section: &[&str], key: &str, value: impl Into<Value>) -> Option<String> {
    edit_toml::try_set(&text_of(body), section, &edit_toml::one(key, value), Place::Last).map(bytes)
}

#[test]
fn toml_key_goes_where_its_section_is() {
    for (before, after) in [
        ("", "[a.\"b.c\"]\nk = \"v\"\n"),
        ("x = 1", "x = 1\n\n[a.\"b.c\"]\nk = \"v\"\n"),
        (
            "[a]\n  [a.'b.c'] # mine\n    y = 1 # two\n[z]\n",
            "[a]\n  [a.'b.c'] # mine\n    y = 1 # two\n    k = \"v\"\n[z]\n",
        ),
        (
            "[a]\r\nx = 1\r\n",
            "[a]\r\nx = 1\r\n\r\n[a.\"b.c\"]\r\nk = \"v\"\r\n",
        ),
        (
            "s = '''\n[a.\"b.c\"]\n'''\n[a.\"b.c\"]\n",
            "s = '''\n[a.\"b.c\"]\n'''\n[a.\"b.c\"]\nk = \"v\"\n",
        ),
        (
            "[a]\nx = 1\n# y = 2\n\n# end",
            "[a]\nx = 1\n# y = 2\n\n# end\n\n[a.\"b.c\"]\nk = \"v\"\n",
        ),
        (
            "a.\"b.c\".y = 1 # dotted\nz = 2\n",
            "a.\"b.c\".y = 1 # dotted\na.\"b.c\".k = \"v\"\nz = 2\n",
        ),
        (
            "\u{feff}# top\r\n[[l]]\r\nx = { y = 1 } # inline\n[[l]]\r\n",
            "\u{feff}# top\r\n[[l]]\r\nx = { y = 1 } # inline\n[[l]]\r\n\r\n[a.\"b.c\"]\r\nk = \"v\"\r\n",
        ),
    ] {
        let edited = set(before, &["a", "b.c"], "k", "v");
        assert_eq!(edited.as_deref(), Some(after), "{before:?}");
    }
}

#[test]
fn toml_that_cannot_be_edited_safely_is_unchanged() {
    for before in [
        "a = 1\n",
        "a = { x = 1 }\n",
        "a = { \"b.c\" = { x = 1 } }\n",
        "a.\"b.c\" = 1\n",
        "[[a]]\n",
        "[a\n",
        "[a]\nx = 1\nx = 2\n",
    ] {
        assert_eq!(set(before, &["a", "b.c"], "k", "v"), None, "{before:?}");
    }
}

#[test]
fn toml_value_is_replaced_where_it_stands() {
    let before = "[a.'b.c'] # mine\n  k = '' # none\n  l = [1,\n 2]\n";
    let section = ["a", "b.c"];
    assert_eq!(
        set(before, &section, "k", "v").unwrap(),
        "[a.'b.c'] # mine\n  k = \"v\" # none\n  l = [1,\n 2]\n"
    );
    assert_eq!(
        set(before, &section, "l", vec!["v"]).unwrap(),
        "[a.'b.c'] # mine\n  k = '' # none\n  l = [\"v\"]\n"
    );
    assert_eq!(
        set(before, &section, "l", vec![1, 2, 3]).unwrap(),
        "[a.'b.c'] # mine\n  k = '' # none\n  l = [1,\n 2, 3]\n"
    );
    assert_eq!(set(before, &section, "k", "").unwrap(), before, "no change");
    assert_eq!(set("[a.b.c]\n", &["a"], "b", "v"), None, "a section");
}

#[test]
fn toml_section_goes_before_its_like() {
    let first = |body: &str, name: &str| {
        let edited = edit_toml::try_set(
            &text_of(body),
            &["host", name],
            &edit_toml::one("k", "v"),
            Place::First,
        );
        edited.map(bytes).unwrap()
    };
    let before = "# top\nserver = \"s\"\n\n# theirs\n[host.\"a\"]\nx = 1\n# end\n";
    assert_eq!(
        first(before, "b:1"),
        "# top\nserver = \"s\"\n\n[host.\"b:1\"]\nk = \"v\"\n\n# theirs\n[host.\"a\"]\nx = 1\n# end\n"
    );
    assert_eq!(
        first("# only words", "b"),
        "# only words\n\n[host.b]\nk = \"v\"\n"
    );
    assert_eq!(
        first("[z]\n[host]\n[host.a]\nx = 1\n[host.a.header]\n", "b"),
        "[z]\n[host]\n\n[host.b]\nk = \"v\"\n[host.a]\nx = 1\n[host.a.header]\n"
    );
}

#[test]
fn invalid_toml_is_rejected_with_its_line() {
    for (body, line) in [
        ("a = 1\r\n[x\r\n", 2),
        ("a = 1\nb = 2\na = 3\n", 3),
        ("[a]\n[b]\n[a]\n", 3),
        ("a.b = 1\n[a]\n", 2),
    ] {
        let refused = edit_toml::read(&text_of(body)).unwrap_err();
        assert!(
            matches!(refused, SetupError::Unreadable { line: reported, .. } if reported == line),
            "{body}: {refused}"
        );
    }
}
