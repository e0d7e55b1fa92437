//! Deserializer of one value. A section is read value by value, so that all errors are found, and errors are in the words
//! of the documentation.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, Deserialize, Deserializer, Expected, IntoDeserializer, Unexpected, Visitor};
use serde::forward_to_deserialize_any;
use toml::de::DeValue;

/// Renamed choices: old name, new name.
const RENAMED_CHOICES: &[(&str, &str)] = &[
    ("serve", "serve-stale"),
    ("proven", "per-client"),
    ("nobody", "off"),
];

/// Why a value is not the expected one.
#[derive(Debug)]
pub(super) struct ValueError {
    pub(super) message: String,
    /// Suggested fix; may be empty.
    pub(super) help: String,
}

impl ValueError {
    pub(super) fn new(message: impl Into<String>, help: impl Into<String>) -> Self {
        let (message, help) = (message.into(), help.into());
        Self { message, help }
    }

    /// The text is none of the choices; names the nearest one.
    pub(super) fn no_choice(text: &str, choices: &[&str]) -> Self {
        let renamed = RENAMED_CHOICES.iter().find(|(old, _)| *old == text);
        if let Some((_, new)) = renamed.filter(|(_, new)| choices.contains(new)) {
            return Self::new(format!("`{text}` is now `{new}`"), format!("write \"{new}\""));
        }
        let all = format!("\"{}\"", choices.join("\", \""));
        let help = match nearest(&text.replace('_', "-"), choices.iter().copied()) {
            Some(name) => format!("did you mean \"{name}\"?"),
            None => format!("the choices are {all}"),
        };
        Self::new(format!("`{text}` is none of {all}"), help)
    }
}

/// Builds an error from a message and a hint.
pub(super) fn invalid<T>(message: impl Into<String>, help: impl Into<String>) -> Result<T, ValueError> {
    Err(ValueError::new(message, help))
}

/// The separator by which [`de::Error::custom`] finds the hint again.
const HELP: &str = "\nhelp: ";

impl fmt::Display for ValueError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{HELP}{}", self.message, self.help)
    }
}

impl std::error::Error for ValueError {}

impl de::Error for ValueError {
    fn custom<T: fmt::Display>(error: T) -> Self {
        let text = error.to_string();
        let (message, help) = text.rsplit_once(HELP).unwrap_or((&text, ""));
        Self::new(message, help)
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(
            format!("expected {expected}, found {found}"),
            format!("{expected:#}"),
        )
    }

    fn unknown_variant(text: &str, choices: &'static [&'static str]) -> Self {
        Self::no_choice(text, choices)
    }
}

/// Nearest candidate by edit distance; `None` if none is close.
pub(super) fn nearest<'a>(text: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let text = text.to_lowercase();
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(&text, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= candidate.chars().count().max(3) / 3)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

/// Kind of a value, with its article.
pub(super) fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) if integer(value).is_none() => "a number that is too large",
        DeValue::Integer(_) => "a number",
        DeValue::Float(_) => "a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

fn integer(value: &DeValue<'_>) -> Option<i64> {
    let number = value.as_integer()?;
    i64::from_str_radix(number.as_str(), number.radix()).ok()
}

/// Deserializes a value; `None` is one that is not set.
pub(super) fn deserialize<'a, T: Deserialize<'a>>(value: Option<&'a DeValue<'_>>) -> Result<T, ValueError> {
    T::deserialize(ValueDeserializer(value))
}

struct ValueDeserializer<'a, 't>(Option<&'a DeValue<'t>>);

impl ValueDeserializer<'_, '_> {
    fn kind(&self) -> &'static str {
        self.0.map_or("nothing", kind)
    }

    fn unexpected(&self, expected: &dyn fmt::Display, help: impl Into<String>) -> ValueError {
        ValueError::new(format!("expected {expected}, found {}", self.kind()), help)
    }
}

impl<'de> Deserializer<'de> for ValueDeserializer<'_, '_> {
    type Error = ValueError;

    /// All values except those below are written as strings.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0.and_then(DeValue::as_str) {
            Some(text) => visitor.visit_str(text),
            None => Err(de::Error::invalid_type(Unexpected::Other(self.kind()), &visitor)),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0 {
            Some(_) => visitor.visit_some(self),
            None => visitor.visit_none(),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0.and_then(DeValue::as_bool) {
            Some(on) => visitor.visit_bool(on),
            None => Err(self.unexpected(&"true or false", "write true or false, without quotes")),
        }
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, ValueError> {
        match self.0.and_then(integer) {
            Some(number) => visitor.visit_i64(number),
            None => Err(self.unexpected(&"a whole number", "")),
        }
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        choices: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, ValueError> {
        let Some(text) = self.0.and_then(DeValue::as_str) else {
            let example = choices.first().copied().unwrap_or_default();
            let help = format!("write it in quotes, as in \"{example}\"");
            return Err(self.unexpected(&(&visitor as &dyn Expected), help));
        };
        let text: StrDeserializer<'_, ValueError> = text.into_deserializer();
        visitor.visit_enum(text)
    }

    forward_to_deserialize_any! {
        i8 i16 i32 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct seq
        tuple tuple_struct map struct identifier ignored_any
    }
}

/// A type that is written as a string, as in the example.
pub(super) trait Written {
    const EXAMPLE: &'static str;
}

/// How a value is written as a string, for [`text`].
pub(super) struct Text<T> {
    /// Kind of value, with its article.
    pub(super) kind: &'static str,
    /// Example, as written in the file.
    pub(super) example: &'static str,
    pub(super) parse: fn(&str) -> Result<T, ValueError>,
}

impl<T> Visitor<'_> for Text<T> {
    type Value = T;

    /// The kind of value or, in the alternate form, the hint.
    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if f.alternate() {
            write!(f, "write it in quotes, as in {}", self.example)
        } else {
            f.write_str(self.kind)
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        (self.parse)(text).map_err(E::custom)
    }
}

/// Implements `Deserialize` for a type that is written as a string: its kind, an example and its parser. With `struct`,
/// it declares the type, around the parsed one.
macro_rules! text {
    ($(#[$doc:meta])* struct $name:ident($inner:ty), $kind:literal, $example:literal, $parse:expr) => {
        $(#[$doc])*
        #[derive(Clone, Debug)]
        pub(super) struct $name(pub(super) $inner);

        impl From<$name> for $inner {
            fn from(value: $name) -> Self {
                value.0
            }
        }

        text!($name, $kind, $example, |text| {
            let parse: fn(&str) -> Result<$inner, ValueError> = $parse;
            parse(text).map($name)
        });
    };
    ($type:ty, $kind:literal, $example:literal, $parse:expr) => {
        impl Written for $type {
            const EXAMPLE: &'static str = $example;
        }

        impl<'de> Deserialize<'de> for $type {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                deserializer.deserialize_str(Text {
                    kind: $kind,
                    example: Self::EXAMPLE,
                    parse: $parse,
                })
            }
        }
    };
}
pub(super) use text;
