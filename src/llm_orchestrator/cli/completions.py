"""`llmo completions`: a script that completes verbs, options, files and run ids in a shell.

The script is made from the commands themselves, so it cannot name an option that is not there. Run
ids are asked of the store while one types; everything else is fixed text.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from llm_orchestrator.cli.main import VERBS, command_of
from llm_orchestrator.cli.options import make_app
from llm_orchestrator.cli.output import emit

app = make_app("Print the completion script of a shell.")
EVERYWHERE = ("--store", "--data", "--debug", "--quiet", "--help")
_RUN_IDS = "llmo runs list -o ids --quiet 2>/dev/null"


class Shell(StrEnum):
    """The shells that we know."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


@app.command()
def completions(shell: Annotated[Shell, typer.Argument(help="Which shell.")]) -> None:
    """Print a completion script: eval "$(llmo completions bash)"."""
    words = words_of_all()
    if shell is Shell.FISH:
        emit(fish(words))
    elif shell is Shell.ZSH:
        emit("autoload -U +X bashcompinit && bashcompinit\n" + bash(words))
    else:
        emit(bash(words))


def words_of_all() -> dict[str, tuple[list[str], bool]]:
    """For each verb (and `verb verb`): what may follow it, and whether run ids may."""
    table: dict[str, tuple[list[str], bool]] = {"": (list(VERBS), False)}
    for verb in VERBS:
        command = command_of(verb)
        children: dict[str, Any] = getattr(command, "commands", {})
        shown = [name for name, child in children.items() if not child.hidden]
        table[verb] = (shown or _options(command), False)
        for name in shown:
            child = children[name]
            table[f"{verb} {name}"] = (_options(child), _takes_run(child))
    return table


def _options(command: Any) -> list[str]:
    return [word for item in command.params for word in item.opts if word.startswith("--")]


def _takes_run(command: Any) -> bool:
    return any(
        item.param_type_name == "argument" and str(item.metavar).startswith(("RUN", "[RUN"))
        for item in command.params
    )


def bash(words: dict[str, tuple[list[str], bool]]) -> str:
    """For bash, and for zsh through bashcompinit."""
    cases = []
    for path, (following, has_ids) in words.items():
        body = f'words="{" ".join(following)}"'
        if has_ids:
            body += f'; [[ $current == -* ]] || words="$({_RUN_IDS})"'
        cases.append(f'    "{path}") {body} ;;')
    text = "\n".join(cases)
    return f"""\
_llmo() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" path="" words="" word
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$word" in -*) ;; *) [[ "$path" == *" "* ]] || path="${{path:+$path }}$word" ;; esac
  done
  case "$path" in
    {" | ".join(f'"{verb} "*' for verb in _plain(words))}) path="${{path%% *}}" ;;
  esac
  case "$path" in
{text}
  esac
  [[ $current == -* ]] && words="$words {" ".join(EVERYWHERE)}"
  COMPREPLY=($(compgen -W "$words" -- "$current"))
  [[ ${{#COMPREPLY[@]}} -gt 0 ]] || COMPREPLY=($(compgen -f -- "$current"))
}}
complete -o filenames -F _llmo llmo llm-orchestrator"""


def _plain(words: dict[str, tuple[list[str], bool]]) -> list[str]:
    """Verbs without verbs of their own: what follows them is not part of the path."""
    groups = {path.partition(" ")[0] for path in words if " " in path}
    return [path for path in words if path and " " not in path and path not in groups]


def fish(words: dict[str, tuple[list[str], bool]]) -> str:
    """For fish."""
    lines = []
    for program in ("llmo", "llm-orchestrator"):
        head = f"complete -c {program}"
        for verb, (_, text) in VERBS.items():
            lines.append(f"{head} -n __fish_use_subcommand -f -a {verb} -d '{_quote(text)}'")
        lines.extend(f"{head} -l {option[2:]}" for option in EVERYWHERE)
        for path, (following, has_ids) in words.items():
            if not path:
                continue
            verb, _, name = path.partition(" ")
            seen = f"__fish_seen_subcommand_from {verb}"
            if name:
                seen += f"; and __fish_seen_subcommand_from {name}"
            for word in following:
                what = f"-l {word[2:]}" if word.startswith("--") else f"-f -a {word}"
                lines.append(f"{head} -n '{seen}' {what}")
            if has_ids:
                lines.append(f"{head} -n '{seen}' -f -a '({_RUN_IDS})'")
    return "\n".join(lines)


def _quote(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")
