from __future__ import annotations

import pytest

from llm_orchestrator.errors import TemplateError
from llm_orchestrator.language import handlebars
from llm_orchestrator.language.compat import Names, Rewriter, read_retry, read_transform_inputs
from llm_orchestrator.language.graph import dependency_table
from llm_orchestrator.language.inputs import check_inputs
from llm_orchestrator.language.steps import ActionStep, BranchStep, TransformStep
from llm_orchestrator.language.templates import Templates
from tests.unit.language.support import LLM, load, messages, workflow

T = Templates()
R = Rewriter(T)
OPEN = Names({"greet": ("greeting",), "my-step": ("out", "a-b"), "a-b-c": ()}, None)
CLOSED = Names({"greet": ("greeting",)}, frozenset({"x", "user-name"}))


def show(text: str, **names: object) -> object:
    return T.render(handlebars.translate(text), names)


def test_each_has_index_this_and_fields() -> None:
    text = "{{#each docs}}{{@index}}:{{this.t}} {{t}} {{this}};{{/each}}"
    assert show(text, docs=[{"t": "a"}]) == '0:a a {"t": "a"};'


def test_each_has_first_last_key_else_and_the_parents_names() -> None:
    assert show("{{#each x}}{{#if @last}}z{{else}}y{{/if}}{{/each}}", x=[1, 2]) == "yz"
    assert show("{{#each x}}{{@key}}={{this}} {{/each}}", x={"a": 1, "b": 2}) == "a=1 b=2 "
    assert show("{{#each x}}{{this}}{{else}}none{{/each}}", x=[]) == "none"
    text = "{{#each x}}{{../n}}{{inputs.m}}{{@root.n}}{{/each}}"
    assert show(text, x=[1], n=2, inputs={"m": 3}) == "232"
    text = "{{#each x}}{{#each this.y}}{{this}}{{../n}}{{/each}}{{/each}}"
    assert show(text, x=[{"n": "N", "y": [1, 2]}]) == "1N2N"
    assert show("{{#each x as |it at|}}{{at}}{{it.v}}{{/each}}", x=[{"v": "a"}]) == "0a"


def test_if_and_unless_take_a_missing_name_for_no() -> None:
    text = "{{#if inputs.tone}}{{inputs.tone}}{{else}}plain{{/if}}"
    assert show(text, inputs={}) == "plain"
    assert show(text, inputs={"tone": "warm"}) == "warm"
    assert show("{{#unless inputs.x}}no{{/unless}}", inputs={}) == "no"
    assert show("{{#if a}}1{{else if b}}2{{else}}3{{/if}}", b=True) == "2"
    text = "{{#if (eq a 'x')}}1{{/if}}{{#if (and b (not c))}}2{{/if}}"
    assert show(text, a="x", b=1, c=0) == "12"


def test_a_block_alone_on_its_line_leaves_no_line() -> None:
    text = "A\n{{#each x}}\n  - {{this}}\n{{/each}}\nB {{#if y}}c{{/if}}\n"
    assert show(text, x=[1, 2], y=1) == "A\n  - 1\n  - 2\nB c\n"


def test_comments_vanish_and_triple_braces_show() -> None:
    assert show("a{{! no }}{{!-- {{ no }} --}}{{{x}}}b", x="<") == "a<b"


@pytest.mark.parametrize(
    "text",
    [
        "{{> part}}",
        "{{#each x}}",
        "{{/if}}",
        "{{#if x}}{{/each}}",
        "{{#foo x}}{{/foo}}",
        "{{this}}",
    ],
)
def test_what_has_no_counterpart_is_refused(text: str) -> None:
    with pytest.raises(TemplateError):
        handlebars.translate(text)


@pytest.mark.parametrize(
    "text", ["{{ x }}", "{% if x %}{{ y | join(', ') }}{% endif %}", "{# b #}"]
)
def test_text_without_handlebars_is_left_alone(text: str) -> None:
    assert handlebars.translate(text) == text


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{{name}} {{input.x}} {{ inputs.y }}", "{{inputs.name}} {{inputs.x}} {{ inputs.y }}"),
        ("{{ steps.my-step.out }}", '{{ steps["my-step"].out }}'),
        ("{{ steps.my-step.a-b }}", '{{ steps["my-step"]["a-b"] }}'),
        ("{{ outputs.a-b-c }}", '{{ outputs["a-b-c"] }}'),
        ("{{ steps.greet.greeting - 1 }}", "{{ steps.greet.greeting - 1 }}"),
        ("{{ steps.greet.n-1 }}", "{{ steps.greet.n-1 }}"),
        ("{% for d in docs %}{{ d.x }}{{ q }}{% endfor %}",
         "{% for d in inputs.docs %}{{ d.x }}{{ inputs.q }}{% endfor %}"),
        ("{{ 'name' }} {{ x | d('input.y') }}", "{{ 'name' }} {{ inputs.x | d('input.y') }}"),
        ("{{ range(3) }} {{ run.id }}", "{{ range(3) }} {{ run.id }}"),
    ],
)  # fmt: skip
def test_names_of_the_earlier_system_become_ours(written: str, read: str) -> None:
    assert R.template(written, OPEN) == read


def test_with_an_inputs_section_a_bare_name_is_no_input() -> None:
    read = R.template("{{ x }} {{ input.user-name }}", CLOSED)
    assert read == '{{ x }} {{ inputs["user-name"] }}'


def test_local_names_stay_local() -> None:
    inside = OPEN.within("item", "input")
    assert R.template("{{ item.x }} {{ input.y }}", inside) == "{{ item.x }} {{ input.y }}"


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("{{ outputs.greet }} == 'safe'", "outputs.greet == 'safe'"),
        ('{{ outputs.greet }} != "safe"', 'outputs.greet != "safe"'),
        ("inputs.enable == true", "inputs.enable == true"),
        ("{{ inputs.enable }} == true", "inputs.enable|string|lower == 'true'"),
        ("{{ outputs.greet }} == safe", "outputs.greet|string == 'safe'"),
        ("{{ inputs.n }} == 5", "inputs.n|string == '5'"),
        ("'{{ inputs.n }}' == 'a'", "(inputs.n)|string == 'a'"),
        ("{{ a }} == {{ b }}", "inputs.a == inputs.b"),
        ("{{ x }}", "inputs.x"),
        ("{{ x|length }} > 3 and {{ input.q }}", "(inputs.x|length) > 3 and inputs.q"),
        ("sentiment == 'x'", "inputs.sentiment == 'x'"),
    ],
)
def test_a_condition_becomes_an_expression(written: str, read: str) -> None:
    assert R.expression(written, OPEN) == read


@pytest.mark.parametrize("value", ["' or 1 == 1 or '", "{{ 1 }}", "x' == 'x", "safe", ""])
def test_a_value_never_enters_an_expression(value: str) -> None:
    text = R.expression("{{ outputs.greet }} == 'safe'", OPEN)
    assert T.is_true(text, {"outputs": {"greet": value}}) is (value == "safe")


def test_retry_keys_of_the_earlier_readme() -> None:
    data, written = read_retry(
        {"strategy": "linear", "initial_delay": "1s", "max_delay": 30000, "backoff_multiplier": 2,
         "jitter": True}
    )  # fmt: skip
    assert data == {
        "backoff": "linear", "initial_delay_ms": 1000, "max_delay_ms": 30000, "multiplier": 2,
        "jitter": 0.25,
    }  # fmt: skip
    assert written["initial_delay_ms"] == "initial_delay"
    for text, ms in (("100ms", 100), ("1.5s", 1500), ("2m", 120_000), (1000, 1000)):
        assert read_retry({"initial_delay": text})[0]["initial_delay_ms"] == ms


def test_a_bare_name_in_transform_inputs_is_an_earlier_output_or_an_input() -> None:
    def read(*items: object, names: Names = OPEN) -> object:
        return read_transform_inputs(list(items), "t", names)

    assert read("text", "greeting") == {
        "text": "{{ inputs.text }}",
        "greeting": "{{ steps.greet.greeting }}",
    }
    assert read("out") == {"out": '{{ steps["my-step"].out }}'}
    assert read("x", names=CLOSED) == {"x": "{{ inputs.x }}"}
    assert read("user-name", names=CLOSED) == {"user-name": '{{ inputs["user-name"] }}'}
    assert read("greeting", "greeting") == ["{{ steps.greet.greeting }}"] * 2
    assert read("steps.greet.greeting", "{{ inputs.q }}") == {
        "greeting": "{{ steps.greet.greeting }}",
        "q": "{{ inputs.q }}",
    }
    assert read(1, "x") == [1, "{{ inputs.x }}"]


def test_of_two_steps_that_bind_a_name_the_one_before_counts() -> None:
    names = Names({"a": ("r",), "t": (), "b": ("r",)}, None)
    assert read_transform_inputs(["r"], "t", names) == {"r": "{{ steps.a.r }}"}


# The shapes of the earlier system's five example files, in words of our own.

CHAIN = """
name: two-steps
version: "1.0"
steps:
  - id: first
    type: llm
    provider: openai
    model: gpt-4
    prompt: "Greet {{inputs.who}}"
    output: [hello]
  - id: second
    type: llm
    depends_on: [first]
    provider: openai
    model: gpt-4
    prompt: "Judge: {{steps.first.hello}}"
    output: [verdict]
"""

TRANSFORMS = """
name: transforms
steps:
  - {id: join_up, type: transform, function: merge, inputs: [left, right], output: [joined]}
  - id: pick
    type: transform
    depends_on: [join_up]
    function: filter
    inputs: [joined]
    key: state
    value: open
    output: [picked]
"""

SENTIMENT = """
name: mood
steps:
  - {id: mood, type: llm, provider: openai, model: m, prompt: "Mood of {{ input.text }}?",
     max_tokens: 10, output: [word]}
  - {id: reply, type: llm, provider: anthropic, model: m, depends_on: [mood],
     prompt: "It is {{ outputs.mood }}: answer {{ input.text }}", output: [reply]}
  - {id: note, type: action, depends_on: [reply], action: log,
     message: "{{ outputs.mood }} / {{ outputs.reply }}"}
"""

MODERATION = """
name: gate
steps:
  - {id: judge, type: llm, provider: openai, model: m, prompt: "{{ input.content }}",
     output: [word]}
  - {id: pass, type: action, depends_on: [judge], condition: "{{ outputs.judge }} == 'safe'",
     action: publish, content: "{{ input.content }}"}
  - {id: hold, type: action, depends_on: [judge], condition: "{{ outputs.judge }} == 'review'",
     action: queue_review, content: "{{ input.content }}", priority: medium}
  - {id: explain, type: llm, depends_on: [judge], condition: "{{ outputs.judge }} == 'block'",
     provider: anthropic, model: m, prompt: "Explain {{ input.content }}", output: [reason]}
  - {id: tell, type: action, depends_on: [explain], condition: "{{ outputs.judge }} == 'block'",
     action: send_notification, message: "{{ outputs.explain }}"}
"""

RAG = """
name: rag
steps:
  - {id: embed, type: embed, provider: openai, model: m, input: "{{ inputs.question }}",
     dimensions: 8, output: [vector, about]}
  - {id: search, type: vector_search, depends_on: [embed], database: pinecone, index: kb,
     query: "{{ steps.embed.vector }}", top_k: 5, include_metadata: true, output: [hits, meta]}
  - id: answer
    type: llm
    depends_on: [search]
    provider: anthropic
    model: m
    system: Use the context only.
    prompt: |
      Context:
      {{#each steps.search.hits}}
      {{@index}}: {{this.metadata.text}} ({{this.score}})
      {{/each}}
      Question: {{ inputs.question }}
    output: [answer, model, tokens]
"""


@pytest.mark.parametrize("text", [CHAIN, TRANSFORMS, SENTIMENT, MODERATION, RAG])
def test_files_of_the_earlier_system_load_unmodified(text: str) -> None:
    definition = load(text)
    assert definition.inputs is None
    assert check_inputs(definition, {"anything": [1]}) == {"anything": [1]}
    table = dependency_table(definition.steps, T)
    for step in definition.steps:
        assert set(step.depends_on) <= set(table[step.id])


def test_an_earlier_chain_renders_as_it_did() -> None:
    first, second = load(CHAIN).steps
    outputs = first.bind({"text": "Hi Ann", "model": "m"})
    assert outputs == {"hello": "Hi Ann", "text": "Hi Ann", "model": "m"}
    assert T.render(first.__dict__["prompt"], {"inputs": {"who": "Ann"}}) == "Greet Ann"
    names = {"steps": {"first": outputs}}
    assert T.render(second.__dict__["prompt"], names) == "Judge: Hi Ann"


def test_earlier_transforms_find_their_inputs() -> None:
    merge, pick = load(TRANSFORMS).steps
    assert isinstance(merge, TransformStep)
    assert isinstance(pick, TransformStep)
    assert merge.inputs == {"left": "{{ inputs.left }}", "right": "{{ inputs.right }}"}
    assert pick.inputs == {"joined": "{{ steps.join_up.joined }}"}


def test_an_unknown_action_of_the_earlier_system_is_a_warning() -> None:
    definition = load(MODERATION)
    warned = [warning.message for warning in definition.warnings]
    assert len(warned) == 3
    assert any("queue_review" in message for message in warned)
    hold = definition.step("hold")
    assert isinstance(hold, ActionStep)
    assert not hold.is_known
    assert hold.free == {"content": "{{ inputs.content }}", "priority": "medium"}


def test_the_rag_prompt_shows_each_hit() -> None:
    answer = load(RAG).step("answer")
    hits = [{"score": 1 / n, "metadata": {"text": f"doc {n}"}} for n in (2, 4)]
    names = {"inputs": {"question": "Q?"}, "steps": {"search": {"hits": hits}}}
    assert T.render(answer.__dict__["prompt"], names) == (
        "Context:\n0: doc 2 (0.5)\n1: doc 4 (0.25)\nQuestion: Q?\n"
    )


def test_a_branch_of_the_earlier_form_parses() -> None:
    definition = load(
        """
        name: w
        steps:
          - {id: judge, type: llm, provider: echo, model: m, prompt: x, output: [word]}
          - id: route
            type: branch
            when: inputs.enabled
            condition: "{{ steps.judge.word }}"
            branches:
              yes: [{id: a, type: action, action: log, message: y}]
              1: [{id: b, type: action, action: log, message: n}]
            default: [{id: c, type: action, action: log, message: d}]
        """
    )
    route = definition.step("route")
    assert isinstance(route, BranchStep)
    assert route.switch == "steps.judge.word"
    assert route.condition == "inputs.enabled"
    assert list(route.branches) == ["yes", "1"]


def test_small_forms_are_accepted() -> None:
    step = load(
        workflow(
            f"{{id: a, type: llm, {LLM}, fallback: [echo/m2, {{provider: local}}], output: text}}",
            f"{{id: b, type: llm, {LLM}, depends_on: a, on_error: fallback c, when_skipped: run}}",
            f"{{id: c, type: llm, {LLM}, run_if_skipped: true, when: false}}",
        )
    ).steps
    assert [(f.provider, f.model) for f in step[0].__dict__["fallback"]] == [
        ("echo", "m2"),
        ("local", None),
    ]
    assert step[0].output == ("text",)
    assert step[1].depends_on == ("a",)
    assert step[1].fallback_id == "c"
    assert (step[1].on_skipped, step[2].on_skipped) == ("run", "run")
    assert step[2].condition == "false"


def test_an_alias_beside_its_key_is_refused() -> None:
    assert messages("{id: a, type: wait, seconds: 1, when: x, condition: y}") == [
        "`when` is another word for `condition`: keep one of them"
    ]
