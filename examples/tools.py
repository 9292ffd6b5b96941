"""The tools of agent.yaml: what a model may call, and how the answer goes back to it.

The engine finds this module by PYTHONPATH. Nothing here waits or retries: that is the engine's
work.
"""

import ast
import json
import operator
from typing import Any

OPERATORS: dict[type[ast.AST], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.USub: operator.neg,
}


def calculate(expression: str) -> float:
    """The value of an arithmetic expression; nothing else is evaluated."""
    return _value(ast.parse(expression, mode="eval").body)


def _value(node: ast.AST) -> float:
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    if isinstance(node, ast.UnaryOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)](_value(node.operand))
    raise ValueError(f"not arithmetic: {ast.dump(node)}")


TOOLS = {"calculate": calculate}


def call(
    messages: list[dict[str, Any]], answer: str, tool_calls: list[dict[str, Any]]
) -> dict[str, Any]:
    """The conversation, with the model's calls and what they returned at its end."""
    said = {
        "role": "assistant",
        "content": answer or None,
        "tool_calls": [_as_sent(one) for one in tool_calls],
    }
    results = [
        {"role": "tool", "tool_call_id": one["id"], "content": _perform(one)} for one in tool_calls
    ]
    return {"messages": [*messages, said, *results]}


def _as_sent(one: dict[str, Any]) -> dict[str, Any]:
    """A step's `tool_calls` are {id, name, arguments}; a message has OpenAI's shape."""
    function = {"name": one["name"], "arguments": json.dumps(one["arguments"])}
    return {"id": one["id"], "type": "function", "function": function}


def _perform(one: dict[str, Any]) -> str:
    """A tool's result as text. A mistake of the model is an answer, not a failed step."""
    try:
        return json.dumps(TOOLS[one["name"]](**one["arguments"]))
    except (KeyError, TypeError, ValueError, SyntaxError, ZeroDivisionError) as error:
        return f"error: {error}"
