//! The subset of JSON Schema that the `OpenAPI` document uses. Other keywords are reported.

use serde_json::{Map, Value};

/// Checks `value` against `schema`. `at` is the path for messages.
pub fn check(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = schema
        .as_object()
        .unwrap_or_else(|| panic!("{at}: {schema} is no schema"));
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        let target = document.pointer(target.trim_start_matches('#'));
        return check(
            document,
            target.unwrap_or_else(|| panic!("{at}: {schema:?} leads nowhere")),
            value,
            at,
        );
    }
    for (keyword, wanted) in schema {
        match keyword.as_str() {
            "type" => {
                let one = std::slice::from_ref(wanted);
                let types = wanted.as_array().map_or(one, Vec::as_slice);
                assert!(
                    types.iter().any(|name| is(name.as_str().unwrap(), value)),
                    "{at} is {value}, not {wanted}"
                );
            }
            "enum" => assert!(
                wanted.as_array().unwrap().contains(value),
                "{at} is {value}, none of {wanted}"
            ),
            "minimum" => assert!(
                value.is_null() || value.as_f64() >= wanted.as_f64(),
                "{at} is {value}"
            ),
            "items" => {
                for (place, item) in value.as_array().into_iter().flatten().enumerate() {
                    check(document, wanted, item, &format!("{at}[{place}]"));
                }
            }
            "properties" => properties(document, schema, value, at),
            "anyOf" => any_of(document, wanted, value, at),
            "format" => {
                let text = value.as_str();
                let is_time = text.is_none_or(|text| humantime::parse_rfc3339(text).is_ok());
                assert!(
                    wanted == "date-time" && is_time,
                    "{at} is {value}, not a {wanted}"
                );
            }
            "pattern" => {
                let hex = |text: &str| text.len() == 32 && text.bytes().all(|c| c.is_ascii_hexdigit());
                assert!(
                    wanted == "^[0-9a-f]{32}$" && value.as_str().is_some_and(hex),
                    "{at} is {value}"
                );
            }
            "required" | "additionalProperties" | "description" => {}
            other => panic!("{at}: the keyword `{other}` is not checked by this test"),
        }
    }
}

fn is(name: &str, value: &Value) -> bool {
    match name {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "integer" => value.is_u64() || value.is_i64(),
        "number" => value.is_number(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        other => panic!("`{other}` is no type"),
    }
}

fn properties(document: &Value, schema: &Map<String, Value>, value: &Value, at: &str) {
    let Some(found) = value.as_object() else { return };
    let known = schema["properties"].as_object().unwrap();
    for name in schema
        .get("required")
        .and_then(Value::as_array)
        .into_iter()
        .flatten()
    {
        assert!(
            found.contains_key(name.as_str().unwrap()),
            "{at} has no {name}: {value}"
        );
    }
    for (name, value) in found {
        let schema = known
            .get(name)
            .unwrap_or_else(|| panic!("{at}.{name} is not documented"));
        check(document, schema, value, &format!("{at}.{name}"));
    }
}

/// All `anyOf` of the document are "this or null".
fn any_of(document: &Value, schemas: &Value, value: &Value, at: &str) {
    if value.is_null() {
        let has_null = schemas
            .as_array()
            .unwrap()
            .iter()
            .any(|schema| schema["type"] == "null");
        assert!(has_null, "{at} is null");
        return;
    }
    let schema = schemas
        .as_array()
        .unwrap()
        .iter()
        .find(|schema| schema["type"] != "null");
    check(document, schema.unwrap(), value, at);
}
