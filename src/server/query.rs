//! A request's query: the parameters that a route knows, everything else refused by name with the one that was meant.

use axum::extract::Query;
use axum::http::Uri;

use super::status::{ApiError, Code, cut};

/// Likeness from which on an unknown name is taken for a misspelt one.
const LIKE: f64 = 0.5;

/// The parameters of a query, each known and there once.
#[derive(Debug)]
pub(super) struct Parameters(Vec<(String, String)>);

impl Parameters {
    /// Those of an address, which may be no others than `known`.
    pub(super) fn read(uri: &Uri, known: &[&str]) -> Result<Self, ApiError> {
        let Query(pairs) = Query::<Vec<(String, String)>>::try_from_uri(uri).map_err(|e| invalid(e.body_text()))?;
        for (i, (name, _)) in pairs.iter().enumerate() {
            if !known.contains(&name.as_str()) {
                return Err(invalid(unknown("query parameter", name, known)));
            }
            if pairs[..i].iter().any(|(other, _)| other == name) {
                return Err(invalid(format!("the query parameter `{name}` is there twice; send it once")));
            }
        }
        Ok(Self(pairs))
    }

    /// A parameter's text.
    pub(super) fn text(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(other, _)| other == name).map(|(_, value)| value.as_str())
    }

    /// A parameter that is a number.
    pub(super) fn number(&self, name: &str) -> Result<Option<f64>, ApiError> {
        self.text(name).map(|text| number(name, text)).transpose()
    }

    /// A parameter that is `true` or `false`.
    pub(super) fn flag(&self, name: &str) -> Result<Option<bool>, ApiError> {
        let flag = |text: &str| match text {
            "true" => Ok(true),
            "false" => Ok(false),
            other => Err(invalid(format!("`{name}` is `{}`; there is true and false", cut(other).escape_debug()))),
        };
        self.text(name).map(flag).transpose()
    }

    /// A parameter that is a whole number.
    pub(super) fn whole<T: std::str::FromStr>(&self, name: &str) -> Result<Option<T>, ApiError> {
        self.text(name).map(|text| whole(name, text)).transpose()
    }
}

/// A number that a client wrote for `name`.
fn number(name: &str, text: &str) -> Result<f64, ApiError> {
    let wrong = || invalid(format!("`{name}` is `{}`, which is no number", cut(text).escape_debug()));
    text.trim().parse().ok().filter(|number: &f64| number.is_finite()).ok_or_else(wrong)
}

/// A whole number that a client wrote for `name`.
pub(super) fn whole<T: std::str::FromStr>(name: &str, text: &str) -> Result<T, ApiError> {
    text.trim().parse().map_err(|_| invalid(no_number(name, text)))
}

/// What is wrong with what a client wrote for `name`.
pub(super) fn no_number(name: &str, text: &str) -> String {
    format!("`{name}` is `{}`, which is no whole number; send one such as {name}=5", cut(text).escape_debug())
}

/// That there is no `name` among the `known` ones, and which of these may be meant.
pub(super) fn unknown(what: &str, name: &str, known: &[&str]) -> String {
    let shown = cut(name).escape_debug().to_string();
    let likeness = |other: &str| strsim::normalized_damerau_levenshtein(&cut(name).to_ascii_lowercase(), other);
    let nearest = known.iter().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
    match nearest.filter(|nearest| likeness(nearest) > LIKE) {
        Some(nearest) => format!("there is no {what} `{shown}`; `{nearest}` is meant?"),
        None if known.is_empty() => format!("there is no {what} `{shown}`; none is taken here"),
        None => format!("there is no {what} `{shown}`; there is `{}`", known.join("`, `")),
    }
}

fn invalid(text: String) -> ApiError {
    ApiError::new(Code::InvalidRequest, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_known_is_named_with_what_is_meant() {
        let read =
            |query: &str| Parameters::read(&format!("/v1/classify{query}").parse().expect("URI"), &["model", "top_k"]);
        let good = read("?top_k=3&model=a%20b+c").expect("known");
        assert_eq!((good.text("model"), good.whole::<usize>("top_k").ok().flatten()), (Some("a b c"), Some(3)));
        assert!(read("").expect("none").text("model").is_none() && read("?").is_ok());
        for (query, due) in [
            ("?topk=3", "there is no query parameter `topk`; `top_k` is meant?"),
            ("?Model=a", "there is no query parameter `Model`; `model` is meant?"),
            ("?zzz", "there is no query parameter `zzz`; there is `model`, `top_k`"),
            ("?model=a&model=b", "the query parameter `model` is there twice; send it once"),
        ] {
            assert_eq!(read(query).expect_err("refused").message, due);
        }
        let bad = read("?top_k=many").expect("known").whole::<usize>("top_k").expect_err("refused");
        assert_eq!(bad.message, "`top_k` is `many`, which is no whole number; send one such as top_k=5");
        let long = format!("?{}=1", "a".repeat(8000));
        assert!(read(&long).expect_err("refused").message.len() < 400);
    }
}
