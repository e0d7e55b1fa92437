//! Repository name in a tag list below a `repository_prefix`: replaces the registry's name with the client's. Pure.

use bytes::Bytes;

use crate::oci::Repository;

const KEY: &[u8] = b"\"name\"";

/// The list with the client's name `here` in place of the first `"name"` that is one of the registry's names `there`.
/// All other bytes are unchanged.
pub(super) fn renamed(list: Bytes, there: &[Repository], here: &Repository) -> Bytes {
    let found = there.iter().find_map(|there| place_of(&list, there.as_str()));
    let Some((before, after)) = found else {
        return list;
    };
    [before, here.as_str().as_bytes(), after].concat().into()
}

/// Bytes before and after the name.
fn place_of<'a>(list: &'a [u8], name: &str) -> Option<(&'a [u8], &'a [u8])> {
    let mut rest = list;
    loop {
        let key = rest.windows(KEY.len()).position(|window| window == KEY)?;
        rest = rest.get(key + KEY.len()..)?;
        let value = rest.trim_ascii_start().strip_prefix(b":");
        let value = value.and_then(|value| value.trim_ascii_start().strip_prefix(b"\""));
        let after = value.and_then(|value| value.strip_prefix(name.as_bytes()));
        if let Some(after) = after.filter(|after| after.first() == Some(&b'"')) {
            let end = list.len() - after.len();
            return Some((list.get(..end - name.len())?, list.get(end..)?));
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests may fail loudly")]
    use super::*;

    #[test]
    fn r15_tag_list_has_the_clients_repository_name() {
        let name = |text: &str| text.parse::<Repository>().unwrap();
        let there = [name("hub/library/app"), name("library/app")];
        for (sent, shown) in [
            (
                r#"{"name":"hub/library/app","tags":["1"]}"#,
                r#"{"name":"library/app","tags":["1"]}"#,
            ),
            (
                "{ \"tags\": [\"name\"],\n \"name\" :\n \"hub/library/app\" }",
                "{ \"tags\": [\"name\"],\n \"name\" :\n \"library/app\" }",
            ),
            (
                r#"{"name":"hub/library/application"}"#,
                r#"{"name":"hub/library/application"}"#,
            ),
            (r#"{"name":"library/app"}"#, r#"{"name":"library/app"}"#),
            (r#"{"tags":null}"#, r#"{"tags":null}"#),
            (r#"{"name"#, r#"{"name"#),
            (r#"{"name":"#, r#"{"name":"#),
        ] {
            let list = Bytes::copy_from_slice(sent.as_bytes());
            assert_eq!(
                renamed(list, &there, &name("library/app")),
                shown.as_bytes(),
                "{sent}"
            );
        }
    }
}
