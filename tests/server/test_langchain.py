"""LangChain's clients for OpenAI, unchanged, against a server with llama-server's interface."""

import asyncio
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field

QUESTION = "What is the capital city of Germany?"


@pytest.fixture(scope="module")
def chat(server):
    return ChatOpenAI(base_url=server.url + "/v1", api_key=server.key, model="smollm2", temperature=0, max_tokens=200, max_retries=0,
                      timeout=120)


@tool
def get_weather(city: str, unit: Literal["celsius", "fahrenheit"]) -> str:
    """The weather in a city."""
    return f"18 degrees {unit} in {city}"


def test_invoke(chat):
    answer = chat.invoke([SystemMessage("Answer briefly."), HumanMessage(QUESTION)])
    assert isinstance(answer, AIMessage)
    assert "Berlin" in answer.content
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata["output_tokens"] > 0


def test_stream(chat):
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert len(chunks) > 5
    whole = sum(chunks[1:], chunks[0])
    assert "Berlin" in whole.content
    assert whole.usage_metadata["output_tokens"] > 0


def test_chain(chat):
    chain = ChatPromptTemplate.from_messages([("system", "Answer briefly."), ("human", "{question}")]) | chat
    answers = chain.batch([{"question": QUESTION}, {"question": "How many days are in a week?"}, {"question": QUESTION}])
    for answer, word in zip(answers, ["Berlin", "7", "Berlin"]):
        assert word in answer.content


def test_async(chat):
    async def ask():
        whole = await chat.ainvoke(QUESTION)
        pieces = [chunk.content async for chunk in chat.astream(QUESTION)]
        return whole.content, "".join(pieces)

    whole, streamed = asyncio.run(ask())
    assert whole == streamed


@pytest.mark.parametrize("choice", ["required", "get_weather"])
def test_bind_tools(chat, choice):
    messages = [HumanMessage("How is the weather in Paris?")]
    answer = chat.bind_tools([get_weather], tool_choice=choice).invoke(messages)
    [call] = answer.tool_calls
    assert call["name"] == "get_weather"
    result = get_weather.invoke(call)  # checks the arguments
    assert isinstance(result, ToolMessage)
    final = chat.bind_tools([get_weather], tool_choice="none").invoke(messages + [answer, result])
    assert final.content and not final.tool_calls


def test_stream_tool_call(chat):
    chunks = list(chat.bind_tools([get_weather], tool_choice="required").stream("How is the weather in Paris?"))
    [call] = sum(chunks[1:], chunks[0]).tool_calls
    assert call["name"] == "get_weather" and call["args"]["unit"] in ("celsius", "fahrenheit")


class Person(BaseModel):
    """A person."""

    name: str = Field(max_length=20)
    age: int = Field(ge=0, le=150)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat, method):
    person = chat.with_structured_output(Person, method=method).invoke("Describe a person.")
    assert isinstance(person, Person)


def test_responses_api(server):
    chat = ChatOpenAI(base_url=server.url + "/v1", api_key=server.key, model="smollm2", temperature=0, max_tokens=60, max_retries=0,
                      use_responses_api=True)
    assert "Berlin" in chat.invoke(QUESTION).text


def test_embeddings(server):
    # Without check_embedding_ctx_length texts go to the server as they are; with it, tiktoken would download OpenAI's vocabulary.
    embeddings = OpenAIEmbeddings(base_url=server.url + "/v1", api_key=server.key, model="smollm2", check_embedding_ctx_length=False,
                                  max_retries=0)
    vectors = embeddings.embed_documents(["The cat sat on the mat.", "Revenue fell."])
    assert [len(vector) for vector in vectors] == [576, 576]
    assert embeddings.embed_query("The cat sat on the mat.") == pytest.approx(vectors[0], abs=1e-4)
