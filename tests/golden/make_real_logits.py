"""Writes what transformers and torch compute for a real model on prose.txt, in float32.

It runs outside the project's environment, in one of its own:

  python -m venv golden-env
  golden-env/bin/pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 safetensors accelerate
  golden-env/bin/python tests/golden/make_real_logits.py SmolLM2-135M-Instruct.Q4_1.gguf
  golden-env/bin/python tests/golden/make_real_logits.py gemma-3-270m-q4_k_m.gguf --output=gemma3_logits.npz \
      --repeats=2 --sample=96

where the files are those that `models.assets.fetch` returns for `SMOLLM2` and `GEMMA3`; the text twice is longer than
Gemma's window. It takes half a minute and two minutes on two CPU cores. The arrays, for T tokens:

  ids              i32[T]        prose.txt, no special tokens
  argmax           i32[T]        the likeliest next token at every position
  lse              f32[T]        log-sum-exp of the logits at every position
  target_logit     f32[T - 1]    logit of ids[t + 1] at position t
  positions        i32[P]        every 16th position, and
  vocab_ids        i32[n]        a fixed sample of the vocabulary, where
  logits           f32[P, n]     are the logits themselves
  versions         the libraries that computed them
"""

from __future__ import annotations

import argparse
import pathlib
import platform
from importlib import metadata

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
STRIDE = 16


def main() -> None:
    parser = argparse.ArgumentParser(description="Computes golden logits of a real model.")
    parser.add_argument("gguf", type=pathlib.Path, help="the model")
    parser.add_argument("--output", default="smollm2_logits.npz", help="name of the file")
    parser.add_argument("--repeats", type=int, default=1, help="of the text, one behind the other")
    parser.add_argument("--sample", type=int, default=512, help="tokens of the vocabulary")
    args = parser.parse_args()
    path = args.gguf

    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    text = (HERE / "prose.txt").read_text(encoding="utf-8") * args.repeats
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert logits.dtype == torch.float32

    positions = np.arange(0, ids.shape[1], STRIDE, dtype=np.int32)
    vocab_ids = np.sort(np.random.default_rng(0).choice(logits.shape[1], args.sample, replace=False)).astype(np.int32)
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gguf": metadata.version("gguf"),
    }
    np.savez_compressed(
        HERE / args.output,
        ids=ids[0].numpy().astype(np.int32),
        argmax=logits.argmax(-1).numpy().astype(np.int32),
        lse=logits.logsumexp(-1).numpy(),
        target_logit=logits[:-1].gather(1, ids[0, 1:, None])[:, 0].numpy(),
        positions=positions,
        vocab_ids=vocab_ids,
        logits=logits.numpy()[positions][:, vocab_ids],
        versions=np.array([f"{name} {version}" for name, version in versions.items()]),
    )


if __name__ == "__main__":
    main()
