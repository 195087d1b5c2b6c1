"""The official openai client, unchanged, against a server with llama-server's interface."""

import json
import math
import time
import urllib.request

import jsonschema
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from conftest import SLOT_CONTEXT, SLOTS

MODEL = "smollm2"
QUESTION = [{"role": "user", "content": "What is the capital city of Germany?"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 20},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}
TIME = {
    "type": "function",
    "function": {
        "name": "get_time",
        "description": "The time in a zone.",
        "parameters": {"type": "object", "properties": {"zone": {"enum": ["UTC", "CET"]}}, "required": ["zone"],
                       "additionalProperties": False},
    },
}


@pytest.fixture(scope="module")
def client(server):
    with OpenAI(base_url=server.url + "/v1", api_key=server.key, max_retries=0, timeout=120) as client:
        yield client


def is_idle(server) -> bool:
    request = urllib.request.Request(server.url + "/slots", headers={"Authorization": f"Bearer {server.key}"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return not any(slot["is_processing"] for slot in json.load(response))


# ---- Chat ----------------------------------------------------------------------------------------------------------


def test_chat(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    assert answer.id.startswith("chatcmpl-")
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert "Berlin" in choice.message.content
    assert choice.finish_reason == "stop"
    usage = answer.usage
    assert usage.prompt_tokens > 10
    assert 0 < usage.completion_tokens <= 40
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_chat_with_parts_and_history(client):
    answer = client.chat.completions.create(model=MODEL, max_tokens=8, messages=[
        {"role": "system", "content": "You are brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say"}, {"type": "text", "text": "hello."}]},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Again, please."},
    ])
    assert answer.choices[0].message.content


def test_chat_stream(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40)
    with client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40, stream=True,
                                        stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5, "the text came in one piece"
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "stop" and set(reasons[:-1]) == {None}
    last = chunks[-1]
    assert last.choices == [] and last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_chat_stream_without_usage(client):
    with client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=4, stream=True) as stream:
        chunks = list(stream)
    assert chunks[-1].choices[0].finish_reason == "length"
    assert all(chunk.choices for chunk in chunks)


def test_stream_helper(client):
    """The client's own accumulation of a stream."""
    with client.chat.completions.stream(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert "Berlin" in final.choices[0].message.content


def test_seed(client):
    def answer(seed):
        return client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=1.5, seed=seed, max_tokens=24,
                                              top_p=1).choices[0].message.content

    assert answer(7) == answer(7)
    assert len({answer(seed) for seed in range(4)}) > 1


def test_n(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=1.5, seed=1, n=3, max_tokens=12)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in answer.choices}) > 1
    assert answer.usage.completion_tokens > 12


def test_n_stream(client):
    with client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=1.5, seed=1, n=2, max_tokens=12,
                                        stream=True) as stream:
        texts, ended = {0: "", 1: ""}, set()
        for chunk in stream:
            for choice in chunk.choices:
                assert choice.index not in ended
                texts[choice.index] += choice.delta.content or ""
                if choice.finish_reason:
                    ended.add(choice.index)
    assert ended == {0, 1}
    assert all(texts.values())


def test_stop(client):
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40).choices[0]
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=40, stop=["Germany", "Berlin"])
    [choice] = answer.choices
    assert choice.finish_reason == "stop"
    assert whole.message.content.startswith(choice.message.content)
    assert "Germany" not in choice.message.content and "Berlin" not in choice.message.content


def test_max_completion_tokens(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_logprobs(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, temperature=0, max_tokens=6, logprobs=True,
                                            top_logprobs=4)
    content = answer.choices[0].logprobs.content
    assert len(content) == 6
    for token in content:
        assert token.logprob <= 0
        assert bytes(token.bytes).decode() == token.token
        assert len(token.top_logprobs) == 4
        tops = [top.logprob for top in token.top_logprobs]
        assert tops == sorted(tops, reverse=True)
        assert math.fsum(map(math.exp, tops)) <= 1.0001
        # At temperature 0 the most probable token is taken.
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
    assert "".join(token.token for token in content) == answer.choices[0].message.content


def test_logit_bias(client):
    request = dict(model=MODEL, messages=QUESTION, temperature=0, max_tokens=6)
    plain = client.chat.completions.create(**request).choices[0].message.content
    first = tokens_of(client, plain)[0]
    biased = client.chat.completions.create(**request, logit_bias={str(first): -100}).choices[0].message.content
    assert tokens_of(client, biased)[0] != first


def tokens_of(client, text: str) -> list[int]:
    response = client.post("/../tokenize", body={"content": text}, cast_to=object)
    return response["tokens"]


# ---- Output that obeys --------------------------------------------------------------------------------------------


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 1, "maxItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_json_schema(client, temperature):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Describe a person."}], temperature=temperature, seed=3, max_tokens=300,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA, "strict": True}})
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), SCHEMA)


def test_json_schema_stream(client):
    with client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "Describe a person."}], temperature=0, max_tokens=300, stream=True,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": SCHEMA}}) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    jsonschema.validate(json.loads(text), SCHEMA)


def test_parse_to_class(client):
    class Verdict(BaseModel):
        good: bool
        score: int

    answer = client.chat.completions.parse(model=MODEL, messages=[{"role": "user", "content": "Is bread good?"}], temperature=0,
                                           max_tokens=60, response_format=Verdict)
    assert isinstance(answer.choices[0].message.parsed, Verdict)


# ---- Tools -----------------------------------------------------------------------------------------------------------


def check_call(call, function):
    assert call.type == "function"
    assert call.function.name == function["name"]
    assert call.id
    jsonschema.validate(json.loads(call.function.arguments), function["parameters"])


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"])
def test_tool_call(client, tool_choice):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "How is the weather in Paris?"}], tools=[WEATHER], tool_choice=tool_choice,
        temperature=0, max_tokens=300)
    [choice] = answer.choices
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    check_call(call, WEATHER["function"])


def test_named_tool_of_two(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "How is the weather in Paris?"}], tools=[WEATHER, TIME],
        tool_choice={"type": "function", "function": {"name": "get_time"}}, temperature=0, max_tokens=300)
    [call] = answer.choices[0].message.tool_calls
    check_call(call, TIME["function"])


def test_tool_call_stream(client):
    with client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "How is the weather in Paris?"}], tools=[WEATHER],
            tool_choice="required", temperature=0, max_tokens=300, stream=True) as stream:
        name, arguments, ids, reasons = "", "", set(), []
        for chunk in stream:
            for choice in chunk.choices:
                reasons.append(choice.finish_reason)
                for call in choice.delta.tool_calls or []:
                    assert call.index == 0
                    ids |= {call.id} - {None}
                    name += call.function.name or ""
                    arguments += call.function.arguments or ""
    assert len(ids) == 1
    assert name == "get_weather"
    jsonschema.validate(json.loads(arguments), WEATHER["function"]["parameters"])
    assert reasons[-1] == "tool_calls"


def test_tool_result(client):
    """The whole round: the call, its result, an answer in words."""
    messages = [{"role": "user", "content": "How is the weather in Paris?"}]
    request = dict(model=MODEL, tools=[WEATHER], temperature=0, max_tokens=300)
    call = client.chat.completions.create(messages=messages, tool_choice="required", **request).choices[0].message
    messages += [call.model_dump(exclude_none=True),
                 {"role": "tool", "tool_call_id": call.tool_calls[0].id, "content": "18 degrees, sunny"}]
    answer = client.chat.completions.create(messages=messages, tool_choice="none", **request).choices[0]
    assert answer.message.content
    assert not answer.message.tool_calls
    assert answer.finish_reason in ("stop", "length")


def test_no_tool(client):
    answer = client.chat.completions.create(model=MODEL, messages=QUESTION, tools=[WEATHER], tool_choice="none", temperature=0,
                                            max_tokens=20)
    assert answer.choices[0].message.content and not answer.choices[0].message.tool_calls


# ---- Completions -----------------------------------------------------------------------------------------------------


def test_completion(client):
    answer = client.completions.create(model=MODEL, prompt="The capital of France is", temperature=0, max_tokens=8)
    assert answer.object == "text_completion"
    assert "Paris" in answer.choices[0].text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 8


def test_completions_of_several_prompts(client):
    prompts = ["The capital of France is", "The capital of Germany is"]
    answer = client.completions.create(model=MODEL, prompt=prompts, temperature=0, max_tokens=6)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert "Paris" in answer.choices[0].text and "Berlin" in answer.choices[1].text


def test_completion_of_tokens(client):
    tokens = tokens_of(client, "The capital of France is")
    answer = client.completions.create(model=MODEL, prompt=tokens, temperature=0, max_tokens=8)
    assert "Paris" in answer.choices[0].text
    assert answer.usage.prompt_tokens == len(tokens)


def test_completion_stream(client):
    request = dict(model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=16)
    whole = client.completions.create(**request)
    with client.completions.create(**request, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == "length"


# ---- Embeddings, models ------------------------------------------------------------------------------------------------


def test_embeddings(client):
    texts = ["The cat sat on the mat.", "A cat is sitting on a mat.", "Quarterly revenue fell by 3 percent.", "The cat sat on the mat."]
    answer = client.embeddings.create(model=MODEL, input=texts)  # the client asks for base64 by itself
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    vectors = [item.embedding for item in answer.data]
    assert {len(vector) for vector in vectors} == {576}
    for vector in vectors:
        assert math.isclose(math.fsum(x * x for x in vector), 1, abs_tol=1e-4)

    def similarity(a, b):
        return math.fsum(x * y for x, y in zip(a, b))

    assert math.isclose(similarity(vectors[0], vectors[3]), 1, abs_tol=1e-4)
    assert similarity(vectors[0], vectors[1]) > similarity(vectors[0], vectors[2])
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 20
    floats = client.embeddings.create(model=MODEL, input=texts[0], encoding_format="float").data[0].embedding
    assert similarity(floats, vectors[0]) == pytest.approx(1, abs=1e-4)


def test_models(client):
    [model] = client.models.list().data
    assert model.id == MODEL and model.object == "model"


# ---- Responses -------------------------------------------------------------------------------------------------------


def test_response(client):
    answer = client.responses.create(model=MODEL, input="What is the capital city of Germany?", instructions="Answer briefly.", temperature=0,
                                     max_output_tokens=40)
    assert answer.id.startswith("resp_") and answer.object == "response"
    assert answer.status == "completed"
    assert "Berlin" in answer.output_text
    assert answer.output[0].type == "message" and answer.output[0].role == "assistant"
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


def test_response_to_conversation(client):
    answer = client.responses.create(model=MODEL, temperature=0, max_output_tokens=40, input=[
        {"role": "user", "content": [{"type": "input_text", "text": "What is the capital city of Germany?"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Berlin."}]},
        {"role": "user", "content": "And of France?"},
    ])
    assert answer.output_text


def test_response_stream(client):
    with client.responses.create(model=MODEL, input="What is the capital city of Germany?", temperature=0, max_output_tokens=40,
                                 stream=True) as stream:
        events = list(stream)
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    for kind in ["output_item.added", "content_part.added", "output_text.delta", "output_text.done", "content_part.done",
                 "output_item.done"]:
        assert "response." + kind in kinds
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert "Berlin" in text
    assert len({event.response.id for event in events if hasattr(event, "response")}) == 1


def test_response_stream_helper(client):
    with client.responses.stream(model=MODEL, input="What is the capital city of Germany?", temperature=0, max_output_tokens=40) as stream:
        for _ in stream:
            pass
        assert "Berlin" in stream.get_final_response().output_text


def test_response_with_tool(client):
    answer = client.responses.create(
        model=MODEL, input="How is the weather in Paris?", temperature=0, max_output_tokens=300, tool_choice="required",
        tools=[{"type": "function", "strict": True} | WEATHER["function"]])
    [call] = [item for item in answer.output if item.type == "function_call"]
    assert call.name == "get_weather" and call.call_id
    jsonschema.validate(json.loads(call.arguments), WEATHER["function"]["parameters"])


# ---- Errors ------------------------------------------------------------------------------------------------------------


def test_too_long_a_prompt(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "word " * 2 * SLOT_CONTEXT}])
    error = caught.value.body
    assert error["type"] == "exceed_context_size_error"
    assert error["n_prompt_tokens"] > 2 * SLOT_CONTEXT
    assert error["n_ctx"] == SLOT_CONTEXT


def test_too_long_a_prompt_for_a_stream(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model=MODEL, prompt="word " * 2 * SLOT_CONTEXT, stream=True)


def test_wrong_key(server):
    with OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0) as client, \
            pytest.raises(openai.AuthenticationError) as caught:
        client.chat.completions.create(model=MODEL, messages=QUESTION)
    assert caught.value.body["type"] == "authentication_error"


@pytest.mark.parametrize("request_", [
    {"messages": "hello"},
    {"messages": [{"role": "user", "content": 17}]},
    {"messages": QUESTION, "max_tokens": "many"},
    {"messages": QUESTION, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
    {"messages": QUESTION, "tools": [WEATHER], "tool_choice": "perhaps"},
], ids=["messages", "content", "max_tokens", "schema", "tool_choice"])
def test_bad_request(client, request_):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, **request_)
    assert caught.value.body["message"]
    assert caught.value.body["type"] == "invalid_request_error"


def test_unknown_route(server):
    with OpenAI(base_url=server.url + "/v1/nowhere", api_key=server.key, max_retries=0) as client, \
            pytest.raises(openai.NotFoundError):
        client.models.list()


def test_closed_stream_frees_its_slot(client, server):
    """All slots are taken by answers without an end; when their streams are closed, the server stops at once."""
    streams = [client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Count to ten thousand."}],
                                              max_tokens=900, stream=True, extra_body={"ignore_eos": True}) for _ in range(SLOTS)]
    for stream in streams:
        assert next(iter(stream)).choices
    assert not is_idle(server)
    for stream in streams:
        stream.close()
    deadline = time.monotonic() + 30
    while not is_idle(server):
        assert time.monotonic() < deadline, "the server goes on for nobody"
        time.sleep(0.01)
    assert client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=2).choices[0].message.content
