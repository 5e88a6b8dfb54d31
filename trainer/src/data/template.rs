//! The checkpoint's chat template, rendered as transformers renders it, with bounds on work and output.
//!
//! A template comes from whoever made the checkpoint, so it is not trusted: it has no files, no includes, no host
//! objects; instructions and bytes are paid from a fixed budget, recursion and output are capped.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value, from_args};
use minijinja::{AutoEscape, Environment, ErrorKind, State, escape_formatter};
use serde_json::{Map, Value as Json};

use super::error::{DataError, TemplateError};
use super::python;

/// Instructions a render may run; the engine also charges one for every 64 bytes that it makes or reads.
/// Four million end an endless loop well within a second, and leave room for tens of thousands of messages.
const FUEL: u64 = 4_000_000;
/// Bytes a render may write.
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// Nested macro calls, loops and conditions.
const MAX_RECURSION: usize = 200;

const NAME: &str = "chat_template";

/// A chat template, compiled once.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    /// The special tokens by name, which every render sees.
    special_tokens: Map<String, Json>,
}

/// What a template is rendered with.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct RenderInput<'a> {
    pub(crate) messages: &'a [Json],
    pub(crate) tools: Option<&'a Json>,
    pub(crate) documents: Option<&'a Json>,
    pub(crate) kwargs: Option<&'a Map<String, Json>>,
    pub(crate) add_generation_prompt: bool,
}

impl ChatTemplate {
    /// Compiles `source`, which stands in `file`; `special_tokens` (such as `eos_token`) become variables.
    ///
    /// # Errors
    /// [`DataError::Template`] when it does not parse.
    pub fn new(
        source: &str,
        special_tokens: Map<String, Json>,
        file: &Path,
    ) -> Result<Self, DataError> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder()
            .trim_blocks(true)
            .lstrip_blocks(true)
            .build()
            .map_err(|error| template_error(file, &error))?;
        environment.set_syntax(syntax);
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment.set_fuel(Some(FUEL));
        environment.set_recursion_limit(MAX_RECURSION);
        environment.set_unknown_method_callback(python_method);
        environment.set_formatter(|out, state, value| match python::as_float(value) {
            Some(number) => escape_formatter(out, state, &Value::from(python::float(number))),
            None => escape_formatter(out, state, value),
        });
        environment.add_filter("tojson", tojson);
        environment.add_filter("string", string);
        environment.add_filter("trim", trim);
        environment.add_function("raise_exception", raise_exception);
        environment.add_function("strftime_now", strftime_now);
        environment
            .add_template_owned(NAME, without_generation_tags(source))
            .map_err(|error| template_error(file, &error))?;
        Ok(Self {
            environment,
            special_tokens,
        })
    }

    /// The template of a checkpoint directory: `chat_template.jinja`, else `chat_template.json`, else
    /// `chat_template` in tokenizer_config.json (a string, or a list with one named `default`).
    ///
    /// # Errors
    /// When a file cannot be read or the template does not parse. A directory without a template is `Ok(None)`.
    pub fn from_dir(
        dir: &Path,
        tokenizer_config: &Map<String, Json>,
    ) -> Result<Option<Self>, DataError> {
        let Some((file, source)) = find_source(dir, tokenizer_config)? else {
            return Ok(None);
        };
        let special_tokens = tokenizer_config
            .iter()
            .filter(|(name, _)| name.ends_with("_token"))
            .filter_map(|(name, value)| {
                let text = value.as_str().or_else(|| value.get("content")?.as_str())?;
                Some((name.clone(), Json::from(text)))
            })
            .collect();
        Self::new(&source, special_tokens, &file).map(Some)
    }

    /// Renders `messages` as they are: nothing is renamed, dropped or parsed first.
    ///
    /// # Errors
    /// [`TemplateError::Refused`] with the template's own words, or what failed and at which line.
    pub fn render(
        &self,
        messages: &[Json],
        tools: Option<&Json>,
        kwargs: &Map<String, Json>,
        add_generation_prompt: bool,
    ) -> Result<String, TemplateError> {
        self.render_input(RenderInput {
            messages,
            tools,
            documents: None,
            kwargs: Some(kwargs),
            add_generation_prompt,
        })
    }

    pub(crate) fn render_input(&self, input: RenderInput<'_>) -> Result<String, TemplateError> {
        let mut context = self.special_tokens.clone();
        context.insert("tools".into(), input.tools.cloned().unwrap_or(Json::Null));
        context.insert(
            "documents".into(),
            input.documents.cloned().unwrap_or(Json::Null),
        );
        context.insert(
            "add_generation_prompt".into(),
            input.add_generation_prompt.into(),
        );
        for (name, value) in input.kwargs.into_iter().flatten() {
            context.insert(name.clone(), value.clone());
        }
        context.insert("messages".into(), Json::from(input.messages.to_vec()));
        let template = self
            .environment
            .get_template(NAME)
            .map_err(|error| failure(&error, false))?;
        let mut output = Capped {
            bytes: Vec::new(),
            full: false,
        };
        let rendered = template
            .render_captured_to(python::value(&Json::Object(context)), &mut output)
            .map(drop);
        match rendered {
            Ok(()) => String::from_utf8(output.bytes).map_err(|error| TemplateError::Failed {
                line: 0,
                detail: error.to_string(),
            }),
            Err(error) => Err(failure(&error, output.full)),
        }
    }
}

fn find_source(
    dir: &Path,
    tokenizer_config: &Map<String, Json>,
) -> Result<Option<(PathBuf, String)>, DataError> {
    let jinja = dir.join("chat_template.jinja");
    match fs_err::read_to_string(&jinja) {
        Ok(source) => return Ok(Some((jinja, source))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => {
            return Err(DataError::Read {
                file: jinja,
                source,
            });
        }
    }
    let old = dir.join("chat_template.json");
    match fs_err::read(&old) {
        Ok(bytes) => {
            let value: Json = serde_json::from_slice(&bytes).map_err(|source| DataError::Json {
                file: old.clone(),
                source,
            })?;
            if let Some(source) = value.get("chat_template").and_then(Json::as_str) {
                return Ok(Some((old, source.to_owned())));
            }
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(DataError::Read { file: old, source }),
    }
    let source = match tokenizer_config.get("chat_template") {
        Some(Json::String(source)) => Some(source.as_str()),
        Some(Json::Array(named)) => named
            .iter()
            .find(|entry| entry["name"] == "default")
            .and_then(|entry| entry["template"].as_str()),
        _ => None,
    };
    Ok(source.map(|source| (dir.join("tokenizer_config.json"), source.to_owned())))
}

/// Output that stops the render when it grows past the cap.
struct Capped {
    bytes: Vec<u8>,
    full: bool,
}

impl io::Write for Capped {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + buffer.len() > MAX_OUTPUT_BYTES {
            self.full = true;
            return Err(io::Error::other("the output is too large"));
        }
        self.bytes.extend_from_slice(buffer);
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What `raise_exception` was called with, carried through the engine's own error.
#[derive(Debug)]
struct Refusal(String);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refusal {}

fn failure(error: &minijinja::Error, output_full: bool) -> TemplateError {
    let line = error.line().unwrap_or(0);
    let mut detail = error.to_string();
    let mut out_of_fuel = error.kind() == ErrorKind::OutOfFuel;
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        if let Some(refusal) = inner.downcast_ref::<Refusal>() {
            return TemplateError::Refused {
                message: refusal.0.clone(),
            };
        }
        if let Some(inner) = inner.downcast_ref::<minijinja::Error>() {
            out_of_fuel |= inner.kind() == ErrorKind::OutOfFuel;
        }
        detail = format!("{detail}: {inner}");
        cause = inner.source();
    }
    if output_full {
        return TemplateError::Limit {
            line,
            limit: format!("{MAX_OUTPUT_BYTES} bytes of output"),
        };
    }
    if out_of_fuel {
        return TemplateError::Limit {
            line,
            limit: format!("{FUEL} steps"),
        };
    }
    TemplateError::Failed { line, detail }
}

fn template_error(file: &Path, error: &minijinja::Error) -> DataError {
    DataError::Template {
        file: file.to_owned(),
        source: failure(error, false),
    }
}

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    Err(
        minijinja::Error::new(ErrorKind::InvalidOperation, "the template refuses this row")
            .with_source(Refusal(message)),
    )
}

fn strftime_now(format: &str) -> Result<String, minijinja::Error> {
    jiff::fmt::strtime::format(format, &jiff::ZonedDateTime::now())
        .map_err(|error| minijinja::Error::new(ErrorKind::InvalidOperation, error.to_string()))
}

fn tojson(state: &State, value: &Value, kwargs: Kwargs) -> Result<Value, minijinja::Error> {
    let text = python::json(value, &python::JsonStyle::from_kwargs(&kwargs)?)?;
    state.consume_fuel((text.len() / 64) as u64)?;
    Ok(Value::from(text))
}

fn string(value: &Value) -> Result<Value, minijinja::Error> {
    if value.as_str().is_some() {
        return Ok(value.clone());
    }
    python::string(value).map(Value::from)
}

fn trim(value: &Value, chars: Option<String>) -> Result<String, minijinja::Error> {
    let text = python::string(value)?;
    Ok(match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => text.trim_matches(is_python_space).to_owned(),
    })
}

/// `str.isspace`: Unicode white space and the four separators U+001C to U+001F.
fn is_python_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

/// Python's string, list and mapping methods.
fn python_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, minijinja::Error> {
    if let (Some(text), "strip" | "lstrip" | "rstrip", true) =
        (value.as_str(), method, args.iter().all(Value::is_none))
    {
        let (_chars,): (Option<Value>,) = from_args(args)?;
        return Ok(Value::from(match method {
            "strip" => text.trim_matches(is_python_space),
            "lstrip" => text.trim_start_matches(is_python_space),
            _ => text.trim_end_matches(is_python_space),
        }));
    }
    minijinja_contrib::pycompat::unknown_method_callback(state, value, method, args)
}

/// transformers lets a template mark what a model wrote with `{% generation %}` blocks, which the engine does not
/// know. They write nothing, so they become blocks that are always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start);
        out.push_str(before);
        let Some(length) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let body = &tag[2..length];
        let word = body.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        let replacement = match word {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        match replacement {
            Some(new) => {
                out.push_str("{%");
                out.push_str(&body.replace(word, new));
                out.push_str("%}");
                rest = &tag[length + 2..];
            }
            None => {
                out.push_str("{%");
                rest = &tag[2..];
            }
        }
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn render(source: &str) -> Result<String, TemplateError> {
        ChatTemplate::new(source, Map::new(), Path::new("t.jinja"))
            .unwrap()
            .render(
                &[json!({"role": "user", "content": "x", "n": 2.0, "small": 1e-7})],
                None,
                &Map::new(),
                false,
            )
    }

    #[test]
    fn endless_work_ends_with_an_error_that_names_the_limit() {
        for source in [
            "{% for i in range(10000) %}{% for j in range(10000) %}{% for k in range(10000) %}{% endfor %}{% endfor %}{% endfor %}",
            "{{ 'x' * 1000000000000 }}",
            "{% set ns = namespace(s='x') %}{% for i in range(10000) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        ] {
            let error = render(source).unwrap_err();
            assert!(
                matches!(
                    error,
                    TemplateError::Limit { .. } | TemplateError::Failed { .. }
                ),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_range_of_a_trillion_is_refused() {
        assert!(render("{% for i in range(1000000000000) %}x{% endfor %}").is_err());
    }

    #[test]
    fn a_macro_that_calls_itself_is_stopped() {
        let error = render("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}").unwrap_err();
        assert!(error.to_string().contains("recursion"), "{error}");
    }

    #[test]
    fn output_is_capped() {
        let error = render("{% for i in range(2000) %}{{ 'x' * 60000 }}{% endfor %}").unwrap_err();
        assert!(matches!(error, TemplateError::Limit { .. }), "{error:?}");
    }

    #[test]
    fn internals_files_and_includes_are_out_of_reach() {
        for source in [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{% include '/etc/passwd' %}",
            "{% import 'os' as os %}",
            "{{ messages.__init__.__globals__ }}",
            "{{ cycler.__init__() }}",
        ] {
            assert!(render(source).is_err(), "{source}");
        }
    }

    #[test]
    fn a_refusal_keeps_the_templates_words_through_macros() {
        let error = render(
            "{% macro m() %}{{ raise_exception('no ' ~ 'way') }}{% endmacro %}{% set x = m() %}",
        );
        assert_eq!(error.unwrap_err().to_string(), "no way");
    }

    #[test]
    fn python_habits_hold() {
        let source = "{{ messages[0].n }}|{{ messages[0].small|string }}|{{ '\u{3000}x\u{1c}'|trim }}|{{ none }}|{{ true }}|{{ ' y '.strip() }}|{% generation %}g{% endgeneration %}";
        assert_eq!(render(source).unwrap(), "2.0|1e-07|x|None|True|y|g");
    }

    #[test]
    fn generation_tags_keep_their_white_space_control() {
        assert_eq!(
            without_generation_tags("a {%- generation -%} b {% endgeneration %}{% if x %}"),
            "a {%- if true -%} b {% endif %}{% if x %}"
        );
    }
}
