"""Tools and agents on the bundled policy, through clients that know nothing of Tandem."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from servers import Server

from tandem.benchmarks.clients import langchain_agents

CALCULATOR: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "calculator",
        "description": "Evaluates an arithmetic expression.",
        "parameters": {
            "type": "object",
            "properties": {"expression": {"type": "string"}},
            "required": ["expression"],
        },
    },
}
QUESTION: dict[str, Any] = {"role": "user", "content": "What is 417 * 23?"}
ASKED: dict[str, Any] = {"model": "tandem-demo", "temperature": 0, "tools": [CALCULATOR]}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The policy does not think by itself; that thinking is looked for must not matter to calls."""
    with Server(tmp_path_factory.mktemp("log"), "--reasoning-parser", "qwen3") as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def chat(server: Server) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{server.base_url}/v1", api_key="none", model="tandem-demo", temperature=0)  # type: ignore[arg-type]


def test_a_tool_is_called_and_its_result_read(client: openai.OpenAI) -> None:
    first = client.chat.completions.create(messages=[QUESTION], logprobs=True, **ASKED)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    (call,) = choice.message.tool_calls or []
    assert (call.type, call.function.name) == ("function", "calculator")
    assert json.loads(call.function.arguments) == {"expression": "417 * 23"}
    assert first.usage is not None and choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == first.usage.completion_tokens
    result = {"role": "tool", "tool_call_id": call.id, "content": "9591"}
    messages = [QUESTION, choice.message.model_dump(exclude_none=True), result]
    second = client.chat.completions.create(messages=messages, **ASKED)
    assert second.choices[0].finish_reason == "stop" and "9591" in (second.choices[0].message.content or "")
    assert second.choices[0].message.tool_calls is None


def streamed_call(client: openai.OpenAI) -> tuple[list[Any], list[Any]]:
    """The chunks' choices, and what they say of calls."""
    chunks = [chunk.choices[0] for chunk in client.chat.completions.create(messages=[QUESTION], stream=True, **ASKED)]
    return chunks, [call for chunk in chunks for call in chunk.delta.tool_calls or []]


def test_a_streamed_call(client: openai.OpenAI) -> None:
    chunks, deltas = streamed_call(client)
    for _ in range(20):  # on a busy machine tokens that wait for their reader come as one
        if len(deltas) <= 3:
            chunks, deltas = streamed_call(client)
    assert deltas[0].id and deltas[0].type == "function" and deltas[0].function.name == "calculator"
    assert len(deltas) > 3 and all(delta.index == 0 for delta in deltas)
    assert all(delta.id is None and delta.function.name is None for delta in deltas[1:])
    assert json.loads("".join(delta.function.arguments for delta in deltas)) == {"expression": "417 * 23"}
    assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]
    assert "".join(chunk.delta.content or "" for chunk in chunks) == ""


def test_the_sdk_adds_a_stream_up(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(messages=[QUESTION], **ASKED) as stream:
        kinds = {event.type for event in stream}
        choice = stream.get_final_completion().choices[0]
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    (call,) = choice.message.tool_calls or []
    assert json.loads(call.function.arguments) == {"expression": "417 * 23"} and choice.finish_reason == "tool_calls"


def test_only_one_call(client: openai.OpenAI) -> None:
    """The answer ends where the arguments do: the closing tag is not waited for."""
    free = client.chat.completions.create(messages=[QUESTION], **ASKED)
    one = client.chat.completions.create(messages=[QUESTION], parallel_tool_calls=False, **ASKED)
    assert one.choices[0].finish_reason == "tool_calls"
    assert one.choices[0].message.tool_calls[0].function == free.choices[0].message.tool_calls[0].function
    assert one.usage.completion_tokens < free.usage.completion_tokens


def test_calls_that_are_not_wanted_stay_text(client: openai.OpenAI) -> None:
    """As RLHF trainers ask, which read the calls themselves: the tools are in the prompt all the same."""
    with_tools = client.chat.completions.create(messages=[QUESTION], tool_choice="none", **ASKED)
    message = with_tools.choices[0].message
    assert message.tool_calls is None and with_tools.choices[0].finish_reason == "stop"
    assert (message.content or "").startswith("<tool_call>")


def test_messages_of_every_role(client: openai.OpenAI) -> None:
    """A developer speaks, two calls at once are answered by parts and by text, and nothing is lost on the way."""
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "calculator", "arguments": '{"expression": "1 + 1"}'},
    }
    messages = [
        {"role": "developer", "content": "You are brief."},
        QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call, {**call, "id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "9591"}]},
        {"role": "tool", "tool_call_id": "call_2", "content": "9591"},
    ]
    answer = client.chat.completions.create(messages=messages, **ASKED)
    assert "9591" in (answer.choices[0].message.content or "")


@pytest.mark.parametrize("stream", [False, True])
def test_thinking_is_told_apart(client: openai.OpenAI, stream: bool) -> None:
    """What the policy goes on with is thinking where its turn so far has opened the tag, and an answer behind it."""

    def ask(begun: str) -> tuple[str | None, str | None]:
        turn: Any = {"role": "assistant", "content": begun}
        asked = {"messages": [{"role": "user", "content": "What is 17 + 25?"}, turn], "model": "tandem-demo"}
        asked |= {"temperature": 0, "max_tokens": 40, "extra_body": {"continue_final_message": True}}
        if not stream:
            message = client.chat.completions.create(**asked).choices[0].message
            return getattr(message, "reasoning_content", None), message.content
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**asked, stream=True)]
        thought = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        return thought or None, "".join(delta.content or "" for delta in deltas) or None

    thought, answer = ask("<think>\n17 + 25")
    assert thought and "42" in thought and answer is None
    thought, answer = ask("<think>\nA sum.\n</think>\n\n17 + 25")
    assert thought is None and answer and "42" in answer


def test_langchain_binds_tools(chat: ChatOpenAI) -> None:
    @tool
    def calculator(expression: str) -> str:
        """Evaluates an arithmetic expression."""
        return langchain_agents.calculate(expression)

    bound = chat.bind_tools([calculator])
    question = HumanMessage("What is 417 * 23?")
    asked = bound.invoke([question])
    (call,) = asked.tool_calls
    assert (call["name"], call["args"]) == ("calculator", {"expression": "417 * 23"}) and not asked.invalid_tool_calls
    pieces = list(bound.stream([question]))
    streamed = pieces[0]
    for piece in pieces[1:]:
        streamed += piece
    assert [(c["name"], c["args"]) for c in streamed.tool_calls] == [(call["name"], call["args"])]
    result = ToolMessage(calculator.invoke(call["args"]), tool_call_id=call["id"])
    assert "9591" in str(bound.invoke([question, asked, result]).content)


class Verdict(BaseModel):
    """Whether something is good."""

    good: bool
    score: int = Field(ge=0, le=10)


def test_forced_calls_of_clients_that_want_objects(client: openai.OpenAI, chat: ChatOpenAI) -> None:
    tools = [openai.pydantic_function_tool(Verdict)]
    asked = {"model": "tandem-demo", "messages": [QUESTION], "tools": tools, "tool_choice": "required"}
    (call,) = client.chat.completions.parse(**asked, parallel_tool_calls=False).choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Verdict)
    assert isinstance(chat.with_structured_output(Verdict, method="function_calling").invoke("Is it?"), Verdict)
    chosen = chat.bind_tools([Verdict], tool_choice="any", parallel_tool_calls=False).invoke("Is it?")
    assert [Verdict(**call["args"]) for call in chosen.tool_calls]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
@pytest.mark.parametrize("kind", langchain_agents.AGENTS)
def test_langchains_agents_answer_a_held_out_question(chat: ChatOpenAI, kind: str) -> None:
    data = langchain_agents.generated()
    (question,) = langchain_agents.questions(data, kind, 1, seed=0)
    answer = langchain_agents.AGENTS[kind](chat, data).invoke({"input": question.text})["output"]
    assert langchain_agents.is_right(answer, question.expression), f"{question.text} -> {answer}"
