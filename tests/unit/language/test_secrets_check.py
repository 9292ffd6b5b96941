"""A file says where a secret is, never what it is, and sends none where it would be recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_orchestrator.language.load import load_file
from llm_orchestrator.language.secrets_check import names_a_secret
from tests.unit.language.support import LLM, load, messages, problems, workflow

EXAMPLES = Path(__file__).parents[3] / "examples"
VALUE = "hunter-2-hunter"
HTTP = "id: a, type: action, action: http"
URL = "url: 'https://e.org'"
NOTIFY = "id: a, type: action, action: notify"
TOP = """\
secrets: {key: "env:KEY"}
inputs: {key: {type: string}}
"""
LOGIN = f"{{id: login, type: action, action: http, {URL}, method: POST}}"
HEADERS = (
    *("Authorization", "authorization", "Proxy-Authorization", "X-API-Key", "api-key"),
    *("x-apikey", "Cookie", "X-Auth-Token", "Private-Token", "X-Client-Secret"),
)


def warnings(*steps: str, top: str = TOP) -> list[str]:
    """What is odd about a file that loads."""
    return [each.message for each in load(workflow(*steps, top=top)).warnings]


@pytest.mark.parametrize(
    ("step", "name"),
    [
        *((f"{HTTP}, {URL}, headers: {{{name}: {VALUE}}}", name) for name in HEADERS),
        (f"{HTTP}, {URL}, headers: {{X-Key-Id: a, X-Token: 12345678}}", "X-Token"),
        (f"{HTTP}, parameters: {{{URL}, headers: {{cookie: {VALUE}}}}}", "cookie"),
        (f"id: a, type: action, action: webhook, {URL}, secret: {VALUE}", "secret"),
        (f"id: a, type: action, action: webhook, {URL}, secret: 'env:KEY'", "secret"),
        (f"id: a, type: action, action: webhook, {URL}, secret: \"{{{{ '{VALUE}' }}}}\"", "secret"),
        (f"{NOTIFY}, token: {VALUE}", "token"),
        (f"{NOTIFY}, parameters: {{password: {VALUE}}}", "password"),
        (f"id: a, type: llm, {LLM}, api_key: {VALUE}", "api_key"),
        (f"id: a, type: llm, {LLM}, apiKey: {VALUE}", "apiKey"),
        (f"id: a, type: llm, {LLM}, fallback: [{{provider: echo, api_key: {VALUE}}}]", "api_key"),
        (f"{HTTP}, url: 'https://me:{VALUE}@e.org'", "password"),
        (f"{HTTP}, url: 'https://me:{VALUE}@{{{{ inputs.key }}}}/x'", "password"),
        (f"{HTTP}, url: 'https://e.org?a=b&access_token={VALUE}#x'", "access_token"),
        (
            f"id: a, type: wait, seconds: 1, probe: {{url: 'https://me:{VALUE}@e.org'}}",
            "password",
        ),
    ],
)
def test_a_literal_is_refused_and_the_way_to_write_it_is_said(step: str, name: str) -> None:
    [message] = messages(f"{{{step}}}", top=TOP)
    word = name.lower().replace("-", "_")
    assert message.startswith(f"`{name}` is a secret in clear; ")
    assert f"`secrets: {{{word}: env:NAME}}` (or file:PATH)" in message
    assert f"`{{{{ secrets.{word} }}}}`" in message
    assert VALUE not in message


def test_the_place_is_that_of_the_header() -> None:
    step = f"""
    id: a
    type: action
    action: http
    url: https://e.org
    headers:
      Accept: text/plain
      Authorization: Bearer {VALUE}
    """
    [problem] = problems(workflow(step))
    assert problem.startswith("9:5: `Authorization` is a secret in clear")


def test_a_step_that_is_broken_otherwise_is_looked_at_too() -> None:
    found = messages(f"{{id: a, type: llm, provider: echo, prompt: x, api_key: {VALUE}}}")
    assert any(each.startswith("missing key `model`") for each in found)
    assert any(each.startswith("`api_key` is a secret in clear") for each in found)


@pytest.mark.parametrize(
    "step",
    [
        f"{HTTP}, {URL}, headers: {{Authorization: 'Bearer {{{{ inputs.key }}}}'}}",
        f"{HTTP}, url: 'https://me:{{{{ inputs.key }}}}@e.org'",
        f"{HTTP}, url: 'https://e.org?api_key={{{{ inputs.key }}}}'",
        f"{NOTIFY}, token: '{{{{ inputs.key }}}}'",
    ],
)
def test_an_input_is_no_place_for_a_secret(step: str) -> None:
    [message] = messages(f"{{{step}}}", top=TOP)
    assert "comes from `inputs.key`, and the journal keeps every input in clear; write" in message


def test_a_token_that_a_step_has_fetched_is_a_warning() -> None:
    step = f"{{{HTTP}, {URL}, headers: {{Authorization: 'Bearer {{{{ steps.login.body.t }}}}'}}}}"
    [warning] = warnings(LOGIN, step)
    assert "comes from `steps.login.body.t`, which the journal keeps in clear" in warning


@pytest.mark.parametrize(
    "step",
    [
        f"{HTTP}, {URL}, headers: {{Authorization: 'Bearer {{{{ secrets.key }}}}'}}",
        f"{HTTP}, {URL}, headers: {{Cookie: '{{{{ inputs.key }}}}={{{{ secrets.key }}}}'}}",
        f"{HTTP}, {URL}, headers: {{Accept: text/plain, X-Page-Token: abc, X-Token: ''}}",
        f"{HTTP}, {URL}, headers: {{Idempotency-Key: abc, X-Token: '{{{{ run.id }}}}'}}",
        f"{HTTP}, url: 'https://me:{{{{ secrets.key }}}}@e.org?token={{{{ secrets.key }}}}'",
        f"{HTTP}, url: 'https://me@e.org:80/a:b@c?page_token=abc&token=#a'",
        f"id: a, type: action, action: webhook, {URL}, secret: '{{{{ secrets.key }}}}'",
        f"id: a, type: llm, {LLM}, max_tokens: 5, stop_token: x, api_key_env: NAME",
        "id: a, type: llm, provider: echo, model: m, prompt: 'my password: x, https://a:b@c'",
        f"id: a, type: llm, {LLM}, response_schema: {{properties: {{token: {{const: x}}}}}}",
        f"{HTTP}, {URL}, method: POST, json: {{token: '{{{{ inputs.key }}}}', password: null}}",
        "id: a, type: transform, function: format, template: x, token: the",
        "id: a, type: python, function: 'm:f', args: {key: '{{ secrets.key }}'}",
        "id: a, type: approval, message: x, form: {password: string}",
    ],
)
def test_references_and_harmless_names_pass(step: str) -> None:
    assert warnings(f"{{{step}}}") == []


@pytest.mark.parametrize(
    ("step", "top"),
    [
        (f"{HTTP}, {URL}, method: POST, json: {{user: [{{password: {VALUE}}}]}}", ""),
        (f"id: a, type: python, function: 'm:f', args: {{api_key: {VALUE}}}", ""),
        ("id: a, type: wait, seconds: 1", f"inputs: {{password: {{default: {VALUE}}}}}\n"),
        (
            "id: a, type: wait, seconds: 1",
            f"schedule: {{cron: '0 * * * *', inputs: {{api_key: {VALUE}}}}}\n",
        ),
    ],
)
def test_a_literal_inside_of_data_is_a_warning(step: str, top: str) -> None:
    [warning] = warnings(f"{{{step}}}", top=top)
    assert "may be a secret in clear" in warning
    assert VALUE not in warning


def test_a_secret_where_it_would_be_recorded_is_named() -> None:
    child = "{id: a, type: workflow, workflow: other, inputs: {k: ['{{ secrets.key }}']}}"
    [message] = messages(child, top=TOP)
    assert message.startswith("a run's input is recorded without secrets: `***` arrives instead")
    transform = "{id: a, type: transform, function: template, template: '{{ secrets.key }}'}"
    [warning] = warnings(transform)
    assert warning.startswith("what a transform gives is recorded without secrets")
    found = warnings(f"{{{NOTIFY}, x: '{{{{ secrets.key }}}}'}}")
    assert [each for each in found if each.startswith("what goes to the outbox is recorded")]
    top = TOP + "outputs: {k: '{{ secrets.key }}'}\n"
    [warning] = warnings("{id: a, type: wait, seconds: 1}", top=top)
    assert warning.startswith("a run's output is recorded without secrets")


@pytest.mark.parametrize(
    "path", sorted(EXAMPLES.rglob("*.yaml")), ids=lambda path: str(path.relative_to(EXAMPLES))
)
def test_no_example_is_complained_of(path: Path) -> None:
    names = frozenset({"openai", "anthropic", "local", "echo", "cohere"})
    loaded = load_file(path, known_providers=names)
    assert [each for each in loaded.warnings if "secret" in each.message] == []


@pytest.mark.parametrize(
    "name", ["tokens", "keyboard", "secretary", "cookies", "next_token", "key"]
)
def test_names_that_only_look_like_one(name: str) -> None:
    assert not names_a_secret(name)
