//! Names of tables, as SQL writes them.

use std::fmt;
use std::str::FromStr;

/// A table's full name.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize)]
pub struct TableName {
    /// The database, or its OID where its name is not known.
    pub database: String,
    /// The schema, or its OID where its name is not known.
    pub schema: String,
    /// The table.
    pub table: String,
}

impl fmt::Display for TableName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", Quoted(&self.database), Quoted(&self.schema), Quoted(&self.table))
    }
}

/// Prints an identifier, in double quotes where SQL would read it as another one without them.
struct Quoted<'a>(&'a str);

impl fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut bytes = self.0.bytes();
        let starts = bytes.next().is_some_and(|b| b.is_ascii_lowercase() || b == b'_');
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_';
        if starts && bytes.all(plain) {
            return f.write_str(self.0);
        }
        write!(f, "\"{}\"", self.0.replace('"', "\"\""))
    }
}

/// A table as an operator names it: `table`, `schema.table` or `database.schema.table`.
///
/// What is in double quotes means exactly that. What is not means its lower-case form, as in SQL, and also itself: a
/// shell takes quotes away.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TablePattern {
    text: String,
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Part {
    text: String,
    quoted: bool,
}

impl Part {
    fn matches(&self, name: &str) -> bool {
        name == self.text || (!self.quoted && name == self.text.to_lowercase())
    }
}

impl TablePattern {
    /// Whether the table has this name, as far as it is said.
    pub fn matches(&self, name: &TableName) -> bool {
        let names = [&name.table, &name.schema, &name.database];
        self.parts.iter().rev().zip(names).all(|(part, name)| part.matches(name))
    }

    /// Whether only the table's own name is said.
    pub const fn is_bare(&self) -> bool {
        self.parts.len() == 1
    }

    /// How many parts are said: one to three.
    pub const fn parts(&self) -> usize {
        self.parts.len()
    }

    /// The table's own name, as typed.
    pub fn table(&self) -> &str {
        self.parts.last().map_or("", |part| &part.text)
    }
}

impl fmt::Display for TablePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl serde::Serialize for TablePattern {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(&self.text)
    }
}

/// A text that names no table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TablePatternError(String);

impl fmt::Display for TablePatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} names no table: write table, schema.table or database.schema.table", self.0)?;
        write!(f, ", each as in SQL, in double quotes where it has dots or quotes of its own")
    }
}

impl std::error::Error for TablePatternError {}

impl FromStr for TablePattern {
    type Err = TablePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refuse = || TablePatternError(text.chars().take(200).collect());
        let mut parts = Vec::new();
        let mut rest = text;
        loop {
            let (part, after) = take_part(rest).ok_or_else(refuse)?;
            parts.push(part);
            match after.strip_prefix('.') {
                Some(after) => rest = after,
                None if after.is_empty() => break,
                None => return Err(refuse()),
            }
        }
        if parts.len() > 3 {
            return Err(refuse());
        }
        Ok(Self { text: text.to_owned(), parts })
    }
}

/// The first part of a name, and what follows it.
fn take_part(text: &str) -> Option<(Part, &str)> {
    let Some(inner) = text.strip_prefix('"') else {
        let end = text.find(['.', '"']).unwrap_or(text.len());
        let (part, after) = text.split_at(end);
        return (!part.is_empty()).then(|| (Part { text: part.to_owned(), quoted: false }, after));
    };
    let mut found = String::new();
    let mut chars = inner.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        if c != '"' {
            found.push(c);
        } else if chars.next_if(|(_, next)| *next == '"').is_some() {
            found.push('"');
        } else {
            let after = inner.get(at.saturating_add(1)..)?;
            return (!found.is_empty()).then_some((Part { text: found, quoted: true }, after));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn name(database: &str, schema: &str, table: &str) -> TableName {
        TableName { database: database.into(), schema: schema.into(), table: table.into() }
    }

    #[test]
    fn what_is_quoted_means_itself_and_what_is_not_its_lower_case_form_too() {
        let matches = |text: &str, name: &TableName| text.parse::<TablePattern>().unwrap().matches(name);
        let orders = name("shop", "public", "orders");
        for text in [
            "orders",
            "ORDERS",
            "public.orders",
            "shop.Public.orders",
            "\"orders\"",
            "shop.public.\"orders\"",
        ] {
            assert!(matches(text, &orders), "{text}");
        }
        for text in ["\"Orders\"", "order", "sales.orders", "crm.public.orders", "public.orders2"] {
            assert!(!matches(text, &orders), "{text}");
        }
        let mixed = name("shop", "My.Schema", "Ord\"ers");
        assert!(matches("\"My.Schema\".\"Ord\"\"ers\"", &mixed));
        assert_eq!(mixed.to_string(), "shop.\"My.Schema\".\"Ord\"\"ers\"");
        let upper = name("shop", "public", "Orders");
        assert!(matches("Orders", &upper) && matches("\"Orders\"", &upper) && !matches("orders", &upper));
    }

    #[test]
    fn what_names_no_table_is_refused() {
        for bad in ["", ".", "a.", ".a", "a..b", "a.b.c.d", "\"a", "\"\"", "a\"b\"", "\"a\"b"] {
            assert!(bad.parse::<TablePattern>().is_err(), "{bad}");
        }
        let err = "a.".parse::<TablePattern>().unwrap_err().to_string();
        assert!(
            err.starts_with("\"a.\" names no table: write table, schema.table or database.schema.table"),
            "{err}"
        );
    }

    proptest! {
        #[test]
        fn every_name_is_found_by_what_it_prints(d in ".{1,8}", s in "[a-zA-Z.\"]{1,8}", t in ".{1,8}") {
            let name = name(&d, &s, &t);
            let pattern = name.to_string().parse::<TablePattern>().unwrap();
            prop_assert!(pattern.matches(&name) && !pattern.is_bare());
        }
    }
}
