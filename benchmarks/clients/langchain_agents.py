"""Whether LangChain's agents, unchanged, reach the right answer on the bundled policy.

Asks held-out questions of `examples/rlhf/data.py` (sums, differences, products and quotients of up to five digits; half
in English, half in Chinese) once through a ReAct agent, which writes Thought, Action and Action Input and is stopped at
"Observation:", and once through an agent of native tool calls. Both have a calculator. An answer is right if its last
number is the result. Greedy, so the figures are the same every time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import operator
import re
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

from langchain_classic.agents import AgentExecutor, create_react_agent, create_tool_calling_agent
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder, PromptTemplate
from langchain_core.tools import BaseTool, StructuredTool
from langchain_openai import ChatOpenAI

from ..bench.served import tandem

DATA = Path(__file__).resolve().parents[2] / "examples" / "rlhf" / "data.py"
LANGUAGES = ("en", "zh")
MAX_STEPS = 4  # of an agent; two are enough
OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = MappingProxyType(
    {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
)


class Question(NamedTuple):
    text: str
    expression: str


def evaluate(expression: str) -> float | int:
    """The value of sums, differences, products and quotients of numbers. Raises ValueError."""

    def value(node: ast.expr) -> Any:
        match node:
            case ast.BinOp(left, kind, right) if type(kind) in OPERATORS:
                return OPERATORS[type(kind)](value(left), value(right))
            case ast.UnaryOp(ast.USub(), inner):
                return -value(inner)
            case ast.Constant(number) if type(number) in (int, float):
                return number
            case _:
                raise ValueError(f"not arithmetic: {expression!r}")

    try:
        result = value(ast.parse(expression.strip(), mode="eval").body)
    except (SyntaxError, ZeroDivisionError) as error:
        raise ValueError(f"{expression!r}: {error}") from None
    return int(result) if result == int(result) else result


def calculate(expression: str) -> str:
    """Evaluates an arithmetic expression."""
    try:
        return str(evaluate(expression))
    except ValueError as error:
        return f"error: {error}"  # for the model to read, as tools do


def calculator() -> BaseTool:
    return StructuredTool.from_function(calculate, name="calculator", description="Evaluates an arithmetic expression.")


def generated() -> ModuleType:
    """The demo's data, which is a script beside others and no package."""
    spec = importlib.util.spec_from_file_location("rlhf_data", DATA)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def questions(data: ModuleType, kind: str, count: int, seed: int) -> list[Question]:
    """The first `count` held-out ones of a kind that want a calculator, in turns of the languages."""
    found: dict[str, list[Question]] = {language: [] for language in LANGUAGES}
    for language, own in found.items():
        for exercise in data.exercises(seed, "held_out", kind, language, 20 + 8 * count):  # about one in five does
            if exercise.form == "action":
                text = re.findall(r"^Question: (.*)$", exercise.messages[-1]["content"], re.MULTILINE)[-1]
                argument = exercise.expect[1]
            elif exercise.form == "call":
                text = exercise.messages[-1]["content"]
                (argument, *more) = exercise.expect["arguments"].values()
                if more or not isinstance(argument, str):
                    continue
            else:
                continue
            if re.fullmatch(r"\d+ [-+*/] \d+", argument):
                own.append(Question(text, argument))
    assert min(map(len, found.values())) * 2 >= count, "too few of them were drawn"
    return [question for pair in zip(*found.values(), strict=False) for question in pair][:count]


def react_agent(llm: ChatOpenAI, data: ModuleType) -> AgentExecutor:
    """LangChain's own ReAct prompt; its agent stops the model at "Observation:"."""
    tools = [calculator()]
    agent = create_react_agent(llm, tools, PromptTemplate.from_template(data.react_template()))
    return AgentExecutor(agent=agent, tools=tools, max_iterations=MAX_STEPS, handle_parsing_errors=True)  # pyright: ignore[reportArgumentType]  # as LangChain's guide has it


def tool_agent(llm: ChatOpenAI, data: ModuleType) -> AgentExecutor:
    """Calls come streamed: AgentExecutor streams its plans."""
    tools = [calculator()]
    prompt = ChatPromptTemplate.from_messages([("human", "{input}"), MessagesPlaceholder("agent_scratchpad")])
    agent = create_tool_calling_agent(llm, tools, prompt)
    return AgentExecutor(agent=agent, tools=tools, max_iterations=MAX_STEPS)  # pyright: ignore[reportArgumentType]  # as LangChain's guide has it


AGENTS: Mapping[str, Callable[[ChatOpenAI, ModuleType], AgentExecutor]] = MappingProxyType(
    {"react": react_agent, "tool_calls": tool_agent}
)


def is_right(answer: str, expression: str) -> bool:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", answer)
    return bool(numbers) and float(numbers[-1]) == float(evaluate(expression))


def run(base_url: str, count: int, seed: int) -> dict[str, Any]:
    """How many of `count` questions of each kind were answered rightly by the kind's agent; prints each."""
    data = generated()
    llm = ChatOpenAI(base_url=f"{base_url}/v1", api_key="none", model="tandem-demo", temperature=0)  # pyright: ignore[reportArgumentType]  # a string does
    report: dict[str, Any] = {"count": count, "seed": seed}
    for kind, make in AGENTS.items():
        agent, right = make(llm, data), 0
        for question in questions(data, kind, count, seed):
            answer = str(agent.invoke({"input": question.text})["output"])
            good = is_right(answer, question.expression)
            right += good
            print(f"{kind:10} {'right' if good else 'WRONG'}  {question.text} -> {answer}", flush=True)
        report[kind] = right
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10, help="questions of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a server of the bundled models; none: one is started")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # LangChain's, of its own imports
    if options.url:
        report = run(options.url, options.count, options.seed)
    else:
        with tandem() as server:
            report = run(server.url, options.count, options.seed)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
