"""What a call costs, from `genai-prices`' offline table (no network, ever).

A price is computed once, when the call is made, and stored with the attempt; old runs are never
computed again. A model that the table does not know costs 0 and says so (`is_priced` is False).
Loading the table takes about a third of a second of CPU, so it waits for the first paid call.
"""

from __future__ import annotations

from dataclasses import dataclass

from llm_orchestrator.model import Usage

FREE = frozenset({"echo", "local"})
_NAMES = {"gemini": "google", "xai": "x-ai", "grok": "x-ai", "moonshot": "moonshotai"}


@dataclass(frozen=True, slots=True)
class Priced:
    """Usage with its price. `is_priced` is False when the model is not in the table."""

    usage: Usage
    is_priced: bool


class PriceBook:
    """Prices by provider and model. Remembers which ones it does not know."""

    def __init__(self) -> None:
        self._unknown: set[tuple[str, str]] = set()

    def price(
        self, provider: str, model: str, *, used: Usage, cache_write_tokens: int = 0
    ) -> Priced:
        """Add the price to `used`, whose input tokens include the cached and written ones."""
        if provider in FREE:
            return Priced(used, is_priced=True)
        if (provider, model) in self._unknown:
            return Priced(used, is_priced=False)
        cost = _cost(provider, model, used, cache_write_tokens=cache_write_tokens)
        if cost is None:
            self._unknown.add((provider, model))
            return Priced(used, is_priced=False)
        whole = Usage(used.input_tokens, used.output_tokens, used.cached_tokens, cost)
        return Priced(whole, is_priced=True)


def _cost(provider: str, model: str, used: Usage, *, cache_write_tokens: int) -> float | None:
    from genai_prices import Usage as Tokens  # noqa: PLC0415  loads 1.6 MB of prices
    from genai_prices import calc_price  # noqa: PLC0415

    tokens = Tokens(
        input_tokens=used.input_tokens,
        output_tokens=used.output_tokens,
        cache_read_tokens=min(used.cached_tokens, used.input_tokens),
        cache_write_tokens=cache_write_tokens,
    )
    try:
        found = calc_price(tokens, model_ref=model, provider_id=_NAMES.get(provider, provider))
    except (LookupError, ValueError):
        return None
    return float(found.total_price)
