#!/usr/bin/env python3
"""Records what transformers makes of the templates (*.jinja) and of the snippets (snippets.json) beside this file.

For each template and each conversation of cases.json, expected/NAME.json holds the text, or {"error": ...} where
transformers raises; snippets.json is completed in place. Needs transformers and jinja2, no torch:
    python3 -m venv venv && venv/bin/pip install transformers==5.24.0 jinja2==3.1.6 && venv/bin/python record.py
"""
import datetime
import json
import pathlib
import sys

import tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = pathlib.Path(__file__).parent
NOW = datetime.datetime(2026, 3, 7, 9, 5, 3)


class Frozen(datetime.datetime):
    """strftime_now asks for the time of day; the tests pass the same one."""

    @classmethod
    def now(cls, tz=None):
        return NOW


chat_template_utils.datetime = Frozen


def render(source, case):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.BPE()), bos_token="<s>", eos_token="</s>"
    )
    try:
        return tokenizer.apply_chat_template(
            case["messages"],
            tools=case.get("tools"),
            documents=case.get("documents"),
            chat_template=source,
            add_generation_prompt=case.get("add_generation_prompt", False),
            tokenize=False,
            **case.get("variables", {}),
        )
    except Exception as e:  # whatever it raises, a caller gets no text
        return {"error": f"{type(e).__name__}: {e}"}


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def main():
    cases = json.loads((HERE / "cases.json").read_text(encoding="utf-8"))
    # Other templates than the ones here, for a look around: record.py FOLDER OUT
    folder, out = (pathlib.Path(a) for a in sys.argv[1:3]) if len(sys.argv) == 3 else (HERE, HERE / "expected")
    out.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.jinja")):
        source = path.read_text(encoding="utf-8")
        write(out / f"{path.stem}.json", {case["name"]: render(source, case) for case in cases})
    if folder == HERE:
        snippets = json.loads((HERE / "snippets.json").read_text(encoding="utf-8"))
        for snippet in snippets:
            message = {"role": "user", "content": "Hi"}
            case = {"messages": [message], **{k: v for k, v in snippet.items() if k not in ("source", "expected")}}
            snippet["expected"] = render(snippet["source"], case)
        write(HERE / "snippets.json", snippets)


main()
