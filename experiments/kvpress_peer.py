"""kvpress on the weights of one of our models: the peer that quality and bytes are compared with."""

from __future__ import annotations

import contextlib
import importlib.metadata
import logging
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.transformers_peer import llama
from kvjax.extras import require
from models import Model

Press = Callable[[Any, float], Any]
"""`(the kvpress package, fraction to drop) -> press`."""


class Answer(NamedTuple):
    """Holds what was predicted from a cache, and the bytes of the cache."""

    log_probs: np.ndarray  # f64[n, V], of every token that follows a fed one
    cache_bytes: int  # of keys and values, masked ones included
    kept: float  # tokens per KV head that attention reads, averaged over heads and layers


class KvpressPeer:
    """Compresses a context with a press and feeds what follows, token by token, in float32.

    Raises:
      ImportError: names the extra that is missing.
      ValueError: the model is not a plain Llama.
    """

    def __init__(self, model: Model, threads: int):
        require("kvpress_peer", "peer", "torch", "transformers", "kvpress")
        import kvpress
        import torch
        import transformers

        logging.getLogger("kvpress").setLevel(logging.ERROR)  # KVzip says that it reads twice, a tokenizer its class
        transformers.logging.set_verbosity_error()
        self.version = importlib.metadata.version("kvpress")
        self._torch, self._kvpress, self._new_cache = torch, kvpress, transformers.DynamicCache
        self._tokenizer, self._transformers = model.tokenizer, transformers
        torch.set_num_threads(threads)
        self._model = llama(model)

    def __call__(
        self, press: Press | None, dropped: float, context: Sequence[int], following: Sequence[int], attentions=False
    ) -> Answer:
        """Reads the context, compresses it, and feeds what follows at its own positions.

        Args:
          press: makes what compresses; None: nothing does.
          dropped: fraction of the context.
          context: token ids.
          following: token ids.
          attentions: whether the press reads the matrix of attention, which one implementation keeps.
        """
        torch, model = self._torch, self._model
        model.set_attn_implementation("eager" if attentions else "sdpa")
        cache = self._new_cache()
        compressed = contextlib.nullcontext() if press is None else press(self._kvpress, dropped)(model)
        with torch.inference_mode(), self._named_tokenizer():
            with compressed:
                model.model(input_ids=torch.tensor([list(context)]), past_key_values=cache)
            layers = [layer.self_attn for layer in model.model.layers]
            masked = [getattr(layer, "masked_key_indices", None) for layer in layers]
            stored = [(layer.keys, layer.values) for layer in cache.layers]
            size = sum(x.numel() * x.element_size() for pair in stored for x in pair)
            heads = model.config.num_key_value_heads
            kept = [k.shape[2] - (0 if m is None else len(m[0]) / heads) for (k, _), m in zip(stored, masked)]
            log_probs = []
            for position, token in enumerate(following, len(context)):
                out = model(
                    input_ids=torch.tensor([[token]]), past_key_values=cache, position_ids=torch.tensor([[position]])
                )
                log_probs.append(torch.log_softmax(out.logits[0, -1].double(), dim=-1).numpy())
            for layer in layers:
                layer.masked_key_indices = None
        return Answer(np.stack(log_probs), size, float(np.mean(kept)))

    @contextlib.contextmanager
    def _named_tokenizer(self) -> Iterator[None]:
        """Lets KVzip find the model's tokenizer, which it reads from the folder that the config names."""
        with tempfile.TemporaryDirectory() as folder:
            fast = self._transformers.PreTrainedTokenizerFast(tokenizer_object=self._tokenizer.backend)
            fast.save_pretrained(folder)
            (pathlib.Path(folder) / "config.json").write_text(self._model.config.to_json_string(), encoding="utf-8")
            self._model.config.name_or_path = folder
            yield
