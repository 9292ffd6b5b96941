"""OpenAI's shapes: chat completions, responses, models, errors. Pure: from facts to dictionaries.

Source: the OpenAPI document of OpenAI's API, as the official client (`openai`) reads it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llm_orchestrator.engine.replay import Fold
from llm_orchestrator.errors import Denied, NotFound, OrchestratorError, Unauthenticated
from llm_orchestrator.model import MICROSECONDS, Json, RunState, Usage, Workflow
from llm_orchestrator.server.model_inputs import answer_text
from llm_orchestrator.server.problems import status_of

CHAT, RESPONSE, MESSAGE = "chatcmpl-", "resp_", "msg_"
OWNER = "llm-orchestrator"
_FINISH = frozenset({"stop", "length", "content_filter"})
_STATUS = {
    RunState.PENDING: "queued",
    RunState.COMPLETED: "completed",
    RunState.FAILED: "failed",
    RunState.CANCELLED: "cancelled",
}


class Run(NamedTuple):
    """What all shapes say of a run."""

    run_id: str
    model: str
    created_s: int


def run_of(state: Fold) -> Run:
    """From a run's journal. The model is what runs: name and version."""
    model = f"{state.accepted['workflow']}@{state.accepted['version']}"
    return Run(state.run_id, model, state.created_at // MICROSECONDS)


def finish_reason(state: Fold, step: str | None) -> str:
    """Why the model stopped, as the step that spoke recorded it."""
    done = state.finished.get(step) if step else None
    metadata = done.result.get("metadata") if done and isinstance(done.result, dict) else None
    reason = metadata.get("finish_reason") if isinstance(metadata, dict) else None
    return reason if reason in _FINISH else "stop"


# -- chat -----------------------------------------------------------------------------------------


def chat_usage(usage: Usage) -> dict[str, Json]:
    """Tokens of all of the run's own steps."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def chat(state: Fold, step: str | None) -> dict[str, Json]:
    """A completed run as a chat completion."""
    message = {"role": "assistant", "content": answer_text(state.output), "refusal": None}
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": finish_reason(state, step),
        "logprobs": None,
    }
    return {**_chat_head(run_of(state), "chat.completion"), "choices": [choice]} | {
        "usage": chat_usage(state.usage)
    }


def chat_chunk(
    run: Run, delta: Mapping[str, Json], *, finish: str | None = None, has_usage: bool = False
) -> dict[str, Json]:
    """A piece of a streamed one."""
    choice = {"index": 0, "delta": dict(delta), "finish_reason": finish, "logprobs": None}
    made = {**_chat_head(run, "chat.completion.chunk"), "choices": [choice]}
    return made | {"usage": None} if has_usage else made


def chat_last(run: Run, usage: Usage) -> dict[str, Json]:
    """The chunk that has no choice, only the usage."""
    head = _chat_head(run, "chat.completion.chunk")
    return {**head, "choices": [], "usage": chat_usage(usage)}


def _chat_head(run: Run, kind: str) -> dict[str, Json]:
    return {
        "id": CHAT + run.run_id,
        "object": kind,
        "created": run.created_s,
        "model": run.model,
        "system_fingerprint": None,
        "service_tier": None,
    }


# -- responses ------------------------------------------------------------------------------------


def response(state: Fold) -> dict[str, Json]:
    """A run as a response. One that waits, or is paused, is in progress."""
    run, facts = run_of(state), origin_of(state)
    status = _STATUS.get(state.state, "in_progress")
    is_done = state.state is RunState.COMPLETED
    output = [message(run, answer_text(state.output), "completed")] if is_done else []
    return {
        "id": RESPONSE + run.run_id,
        "object": "response",
        "created_at": run.created_s,
        "model": run.model,
        "status": status,
        "background": is_background(state),
        "error": _response_error(state),
        "incomplete_details": None,
        "instructions": facts.get("instructions"),
        "metadata": facts.get("metadata") or {},
        "output": output,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": _response_usage(state.usage) if state.state.is_final else None,
    }


def origin_of(state: Fold) -> Mapping[str, Json]:
    """What the request said that is no input; empty for a run that was started otherwise."""
    facts = state.accepted.get("origin", {}).get("response")
    return facts if isinstance(facts, dict) else {}


def is_background(state: Fold) -> bool:
    """Whether the response was asked for with `background`."""
    return bool(origin_of(state).get("background"))


def message(run: Run, text: str, status: str) -> dict[str, Json]:
    """The answer as an item of `output`."""
    content = [text_part(text)] if status == "completed" else []
    return {
        "id": MESSAGE + run.run_id,
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": content,
    }


def text_part(text: str) -> dict[str, Json]:
    """The answer as a part of its message."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _response_usage(usage: Usage) -> dict[str, Json]:
    return {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {"cached_tokens": usage.cached_tokens},
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }


def _response_error(state: Fold) -> dict[str, Json] | None:
    if state.state is not RunState.FAILED:
        return None
    return {"code": "server_error", "message": error_message(state)}


def error_message(state: Fold) -> str:
    """Why a run failed, was cancelled or is paused."""
    facts = state.error if isinstance(state.error, dict) else {}
    what = facts.get("message") or state.reason or "no reason was recorded"
    return f"run {state.run_id} is {state.state}: {what}"


# -- models and errors ----------------------------------------------------------------------------


def models(stored: Sequence[Workflow]) -> list[dict[str, Json]]:
    """Every workflow by its name (the newest), then every version of it."""
    newest = {each.name: each for each in stored}
    named = [_model(name, each) for name, each in sorted(newest.items())]
    versions = {f"{each.name}@{each.version}": each for each in stored}
    return named + [_model(name, each) for name, each in sorted(versions.items())]


def _model(name: str, stored: Workflow) -> dict[str, Json]:
    created = stored.created_at // MICROSECONDS
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def error_body(
    message: str, code: str, *, kind: str = "invalid_request_error", param: str | None = None
) -> dict[str, Json]:
    """An error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_of(error: OrchestratorError) -> dict[str, Json]:
    """One of our errors in OpenAI's shape."""
    text = f"{error.message} ({error.hint})" if error.hint else error.message
    if isinstance(error, Unauthenticated):
        return error_body(text, "invalid_api_key")
    if isinstance(error, NotFound):
        return error_body(text, "not_found")
    if isinstance(error, Denied):
        return error_body(text, "denied", kind="permission_error")
    kind = "invalid_request_error" if status_of(error) < 500 else "server_error"
    return error_body(text, error.kind, kind=kind)
