"""What is known of OpenAI-compatible providers by their names: addresses and dialects. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from llm_orchestrator.errors import ConfigError
from llm_orchestrator.providers.base import Resume
from llm_orchestrator.providers.openai import LLAMA_CPP, OFFICIAL, Dialect, Prefill

OFFICIAL_URL = "https://api.openai.com/v1"
_CONTINUES = (Resume.PREFILL, Resume.RESTART)
_PRESETS: Mapping[str, tuple[str, Dialect]] = {
    "openai": (OFFICIAL_URL, OFFICIAL),
    "azure": ("", Dialect(limit_field="max_completion_tokens")),
    "deepseek": ("https://api.deepseek.com/beta", Dialect(_CONTINUES, Prefill.PREFIX)),
    "groq": ("https://api.groq.com/openai/v1", Dialect()),
    "llama_cpp": ("http://127.0.0.1:8080/v1", LLAMA_CPP),
    "mistral": ("https://api.mistral.ai/v1", Dialect(_CONTINUES, Prefill.PREFIX)),
    "ollama": ("http://127.0.0.1:11434/v1", Dialect()),
    "openrouter": ("https://openrouter.ai/api/v1", Dialect()),
    "vllm": ("http://127.0.0.1:8000/v1", Dialect(_CONTINUES, Prefill.FINAL_MESSAGE)),
}


def preset(name: str, *, has_address: bool) -> tuple[str, Dialect]:
    """What is known of a provider by its name: its address (or nothing) and its dialect.

    Whatever stands at another address under OpenAI's name is not OpenAI: it needs no key and gets
    the plain dialect.
    """
    if name == "openai" and has_address:
        return "", Dialect()
    return _PRESETS.get(name, ("", Dialect()))


def adapt(
    dialect: Dialect, *, resume: tuple[Resume, ...], prefill: str, api_version: str
) -> Dialect:
    """Change what the settings say of a dialect; what they do not say stays."""
    try:
        marked = Prefill(prefill) if prefill else dialect.prefill
    except ValueError:
        known = ", ".join(Prefill)
        raise ConfigError(f"unknown way to mark a prefill: {prefill!r} (known: {known})") from None
    return replace(
        dialect, resume=resume or dialect.resume, prefill=marked, api_version=api_version
    )
