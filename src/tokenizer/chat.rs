//! Chat templates: the Jinja that checkpoints carry, rendered as transformers does, within limits.

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind, Value, context};
use serde_json::Value as Json;

use crate::error::{Error, Result, invalid};

/// Steps that a template may take: real ones need some hundred for each message.
const FUEL: u64 = 2_000_000;
const MAX_SOURCE_BYTES: usize = 1 << 20;
const MAX_OUTPUT_BYTES: usize = 64 << 20;

/// A compiled chat template.
pub struct ChatTemplate {
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// # Errors
    /// `InvalidArgument` with the template engine's message.
    pub fn new(source: &str) -> Result<ChatTemplate> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(invalid!("the chat template has {} bytes, expected at most {MAX_SOURCE_BYTES}", source.len()));
        }
        let mut environment = Environment::new();
        environment.set_fuel(Some(FUEL));
        // As transformers sets Jinja up.
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.map_err(|e| Error::Internal(e.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function(
            "raise_exception",
            |message: String| -> std::result::Result<Value, minijinja::Error> {
                Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
            },
        );
        environment
            .add_template_owned("chat", source.to_owned())
            .map_err(|e| invalid!("the chat template does not compile: {e}"))?;
        Ok(ChatTemplate { environment })
    }

    /// Renders a conversation: `messages` is a list of objects with `role` and `content`.
    pub fn render(
        &self,
        messages: &Json,
        tools: Option<&Json>,
        add_generation_prompt: bool,
        bos: &str,
        eos: &str,
    ) -> Result<String> {
        let template = self.environment.get_template("chat").map_err(|e| Error::Internal(e.to_string()))?;
        let tools = tools.map(|t| Value::from(Serde(t))).unwrap_or(Value::from(()));
        let values = context! {
            messages => Value::from(Serde(messages)), tools, add_generation_prompt, bos_token => bos, eos_token => eos,
        };
        let mut out = Limited { bytes: Vec::new() };
        template.render_captured_to(values, &mut out).map_err(|e| invalid!("the chat template fails: {e}"))?;
        String::from_utf8(out.bytes).map_err(|_| Error::Internal("a template made text that is not UTF-8".to_owned()))
    }
}

/// Output up to a limit: fuel bounds steps, not what one step writes.
struct Limited {
    bytes: Vec<u8>,
}

impl std::io::Write for Limited {
    fn write(&mut self, more: &[u8]) -> std::io::Result<usize> {
        if self.bytes.len() + more.len() > MAX_OUTPUT_BYTES {
            return Err(std::io::Error::other("more output than a conversation can have"));
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

    #[test]
    fn renders_a_conversation() {
        let messages = json!([{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Yes?"}]);
        let text = ChatTemplate::new(CHATML).unwrap().render(&messages, None, true, "", "").unwrap();
        assert_eq!(
            text,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n"
        );
    }

    #[test]
    fn hostile_templates_end_in_an_error() {
        let endless = "{% for i in range(100000) %}{% for j in range(100000) %}x{% endfor %}{% endfor %}";
        for source in
            [endless, "{{ raise_exception('no') }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 1 + }}"]
        {
            let result = ChatTemplate::new(source).and_then(|t| t.render(&json!([]), None, false, "", ""));
            assert!(result.is_err(), "{source}");
        }
    }
}
