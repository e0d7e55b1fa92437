//! The subset of JSON Schema that the `OpenAPI` document uses. Other keywords are reported.

use serde_json::{Map, Value};

/// Checks `value` against `schema`. `at` is the path for messages.
pub fn check(document: &Value, schema: &Value, value: &Value, at: &str) {
    let schema = resolved(document, schema, at);
    if schema.contains_key("properties") || schema.contains_key("allOf") {
        check_members(document, schema, value, at);
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
            "additionalProperties" if wanted.is_object() => {
                for (name, member) in value.as_object().into_iter().flatten() {
                    check(document, wanted, member, &format!("{at}.{name}"));
                }
            }
            "oneOf" => one_of(document, wanted, value, at),
            "format" => check_format(wanted.as_str().unwrap(), value, at),
            "pattern" => {
                let hex = |text: &str| text.len() == 32 && text.bytes().all(|c| c.is_ascii_hexdigit());
                assert!(
                    wanted == "^[0-9a-f]{32}$" && value.as_str().is_some_and(hex),
                    "{at} is {value}"
                );
            }
            "allOf"
            | "properties"
            | "propertyNames"
            | "required"
            | "additionalProperties"
            | "description" => {}
            other => panic!("{at}: the keyword `{other}` is not checked by this test"),
        }
    }
}

/// The schema, or the one that it refers to.
fn resolved<'a>(document: &'a Value, schema: &'a Value, at: &str) -> &'a Map<String, Value> {
    let schema = schema
        .as_object()
        .unwrap_or_else(|| panic!("{at}: {schema} is no schema"));
    let Some(target) = schema.get("$ref").and_then(Value::as_str) else {
        return schema;
    };
    let target = document.pointer(target.trim_start_matches('#'));
    let target = target.unwrap_or_else(|| panic!("{at}: {schema:?} leads nowhere"));
    resolved(document, target, at)
}

fn check_format(format: &str, value: &Value, at: &str) {
    let is_valid = match format {
        "date-time" => value
            .as_str()
            .is_none_or(|text| humantime::parse_rfc3339(text).is_ok()),
        "int32" => value.as_i64().is_none_or(|number| i32::try_from(number).is_ok()),
        "int64" | "double" => value.is_null() || value.is_number(),
        other => panic!("{at}: the format `{other}` is not checked by this test"),
    };
    assert!(is_valid, "{at} is {value}, not a {format}");
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

/// Checks the members of an object against all parts of its schema together.
fn check_members(document: &Value, schema: &Map<String, Value>, value: &Value, at: &str) {
    let Some(found) = value.as_object() else { return };
    let (mut known, mut required) = (Map::new(), Vec::new());
    collect_members(document, schema, at, &mut known, &mut required);
    for name in required {
        assert!(found.contains_key(&name), "{at} has no {name}: {value}");
    }
    for (name, value) in found {
        let schema = known
            .get(name)
            .unwrap_or_else(|| panic!("{at}.{name} is not documented"));
        check(document, schema, value, &format!("{at}.{name}"));
    }
}

fn collect_members(
    document: &Value,
    schema: &Map<String, Value>,
    at: &str,
    known: &mut Map<String, Value>,
    required: &mut Vec<String>,
) {
    let parts = schema.get("allOf").and_then(Value::as_array);
    for part in parts.into_iter().flatten() {
        collect_members(document, resolved(document, part, at), at, known, required);
    }
    known.extend(
        schema
            .get("properties")
            .and_then(Value::as_object)
            .cloned()
            .into_iter()
            .flatten(),
    );
    let names = schema.get("required").and_then(Value::as_array);
    let names = names.into_iter().flatten().filter_map(Value::as_str);
    required.extend(names.map(str::to_owned));
}

/// All `oneOf` of the document are "null or this".
fn one_of(document: &Value, schemas: &Value, value: &Value, at: &str) {
    let schemas = schemas.as_array().unwrap();
    let (null, others): (Vec<_>, Vec<_>) = schemas.iter().partition(|schema| schema["type"] == "null");
    assert_eq!((null.len(), others.len()), (1, 1), "{at}: {schemas:?}");
    if !value.is_null() {
        check(document, others[0], value, at);
    }
}
