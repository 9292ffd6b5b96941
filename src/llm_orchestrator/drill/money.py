"""What was paid for again, in dollars, by the same table of prices as the engine's."""

from __future__ import annotations

from collections.abc import Mapping

from llm_orchestrator.model import Usage
from llm_orchestrator.providers.prices import PriceBook


def dollars(respent_by: Mapping[str, Mapping[str, int]]) -> float | None:
    """The price of tokens by PROVIDER/MODEL (judge.Verdict); None where one of them has none."""
    book, total = PriceBook(), 0.0
    for name, tokens in respent_by.items():
        provider, _, model = name.partition("/")
        priced = book.price(provider, model, used=Usage(tokens["input"], tokens["output"]))
        if not priced.is_priced:
            return None
        total += priced.usage.cost_usd
    return round(total, 6)
