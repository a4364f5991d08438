"""Writes text behind prompts, from a cache that a method keeps small, and says what that took.

    python -m experiments.generate --prompt="Why is the sky blue?" --methods=snapkv --keep=0.25 --stream
    python -m experiments.generate --prompts=FILE --methods=int4 --draft=ngram --compare
    python -m experiments.generate --prompts=FILE --model=PATH --draft=smollm2 --temperature=0.8

Every method writes behind every prompt. With --draft several tokens are guessed at a time and read in one call, and the
text stays what it would be without; --compare writes without drafts, too. docs/generating.md has the flags.
"""

from __future__ import annotations

from experiments import interrupts

if __name__ == "__main__":
    interrupts.quit_in_one_line()  # the imports below take seconds

import dataclasses
import functools
from collections.abc import Callable, Sequence

from absl import flags

import kvjax
from experiments import cli
from experiments.calibrations import Calibrations
from experiments.generation import PIECE, How, Writer, Written, batches, read_prompts
from experiments.loading import on_mesh
from experiments.methods import READ, Method, check_method_names, load_method
from experiments.report import human_bytes
from models import Model

for _name in ("gin_file", "gin_bindings", "model", "methods", "keep", "budget", "read", "dtype", "batch", "mesh"):
    flags.declare_key_flag(_name)
_PROMPT = flags.DEFINE_string("prompt", None, "What the text follows.")
_PROMPTS = flags.DEFINE_string("prompts", None, "A file of prompts: one a line, or .jsonl with a field `prompt`.")
_RAW = flags.DEFINE_bool("raw", False, "Go on with the prompt as it is, without the model's chat template.")
_NEW = flags.DEFINE_integer("max_new_tokens", 128, "The most tokens of a text.")
_STREAM = flags.DEFINE_bool("stream", False, "Print the text as it comes.")
_TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 takes the most likely token.")
_SEED = flags.DEFINE_integer("draw_seed", 0, "Of the draws, with a temperature.")
_DRAFT = flags.DEFINE_string("draft", None, "Who guesses tokens: ngram, jacobi, or a model as --model takes it.")
_DRAFT_TOKENS = flags.DEFINE_integer("draft_tokens", None, "Guesses at a time; 7, or 4 of a model.")
_COMPARE = flags.DEFINE_bool("compare", False, "Write without drafts, too.")

_KEEP = 0.25
_DRAFTERS = {"ngram": kvjax.NGram, "jacobi": kvjax.Jacobi}


@dataclasses.dataclass(frozen=True)
class _Line:
    """One line of the table."""

    method: str
    draft: str
    written: list[Written]

    def total(self, name: str) -> float:
        return sum(getattr(each, name) for each in self.written)

    @property
    def speed(self) -> float:
        return self.total("tokens") / self.total("decode_seconds")


def run() -> None:
    """The program."""
    texts = _texts()
    batch = cli.BATCH.value or 1
    for name, value in (("max_new_tokens", _NEW.value), ("batch", batch), ("draft_tokens", _DRAFT_TOKENS.value or 1)):
        if value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}.")
    if _TEMPERATURE.value < 0:
        raise ValueError(f"--temperature must be at least 0, got {_TEMPERATURE.value}.")
    if _STREAM.value and batch > 1:
        raise ValueError(f"--stream shows one text at a time, got --batch={batch}.")
    if _DRAFT.value is None and (_COMPARE.value or _DRAFT_TOKENS.value):
        raise ValueError("--compare and --draft_tokens are about --draft, which is not given.")
    if cli.KEEP.value is not None and cli.BUDGET.value is not None:
        raise ValueError("--keep and --budget say the same thing in two ways; pass one of them.")
    names = list(dict.fromkeys(cli.METHODS.value or ["full"]))
    check_method_names(names, paths=True)
    with on_mesh(cli.MESH.value) as load:
        _write(texts, batch, names, functools.partial(load, dtype=cli.DTYPE.value or "float32"))


def _texts() -> list[str]:
    if (_PROMPT.value is None) == (_PROMPTS.value is None):
        raise ValueError("one of --prompt=TEXT and --prompts=FILE says what to write behind.")
    if _PROMPTS.value is not None:
        return read_prompts(_PROMPTS.value)
    if not _PROMPT.value.strip():
        raise ValueError("--prompt must have some text.")
    return [_PROMPT.value]


def _write(texts: Sequence[str], batch: int, names: Sequence[str], load: Callable[..., Model]) -> None:
    model = load(cli.MODEL.value or "smollm2")
    methods = _methods(model, names)
    cli.check_reached(method.config for method in methods)
    prompts = [_ids(model, text) for text in texts]
    drafter = _drafter(model, load, prompts)
    sampler = kvjax.Sample(temperature=_TEMPERATURE.value) if _TEMPERATURE.value else kvjax.Greedy()
    how = How(_NEW.value, sampler, _SEED.value, PIECE if _STREAM.value else None)
    drafters = {"" if drafter is None else _DRAFT.value: drafter}
    if _COMPARE.value:
        drafters = {"": None} | drafters
    lines = []
    for method in methods:
        for name, of in drafters.items():
            lines.append(_Line(method.setting, name, []))
            writer = Writer(model, method, how, of)
            for index, group in enumerate(batches(prompts, batch)):
                shown = _Shown(model) if _STREAM.value else None
                if shown is not None:
                    _print_title(lines[-1], index, len(prompts))
                written = writer.write(group, shown)
                if shown is not None:
                    shown(written.ids[0], whole=True)
                lines[-1].written.append(written)
                for row, ids in enumerate(written.ids):
                    if shown is None:
                        _print_title(lines[-1], index * batch + row, len(prompts))
                        print(model.tokenizer.decode(ids), end="")
                    print("\n", flush=True)
    print(table(lines))
    if _COMPARE.value:
        print(_same(lines))


def _methods(model: Model, names: Sequence[str]) -> list[Method]:
    budget = cli.only(cli.BUDGET, None) or cli.only(cli.KEEP, _KEEP)
    how = dict(**cli.configs(), calibrate=Calibrations(model), tokenizer=model.tokenizer)
    return [load_method(name, budget=budget, read=cli.only(cli.READ, READ), **how) for name in names]


def _ids(model: Model, text: str) -> list[int]:
    tokenizer = model.tokenizer
    if tokenizer.chat_template is None or _RAW.value:
        return [*tokenizer.opening, *tokenizer.encode(text)]
    return tokenizer.encode(tokenizer.chat([{"role": "user", "content": text}], add_generation_prompt=True))


def _drafter(model: Model, load, prompts: Sequence[Sequence[int]]) -> kvjax.Drafter | None:
    if _DRAFT.value is None:
        return None
    tokens = {} if _DRAFT_TOKENS.value is None else {"tokens": _DRAFT_TOKENS.value}
    if _DRAFT.value in _DRAFTERS:
        return _DRAFTERS[_DRAFT.value](**tokens)
    try:
        other = load(_DRAFT.value)
    except ValueError as error:
        raise ValueError(f"--draft is neither {' nor '.join(_DRAFTERS)}, and as a model: {error}") from None
    same = [other.tokenizer.decode(ids) == model.tokenizer.decode(ids) for ids in prompts]
    if other.config.vocab_size != model.config.vocab_size or not all(same):
        raise ValueError(f"--draft: {_DRAFT.value} has other tokens than {model.config.name}.")
    return kvjax.DraftModel(kvjax.bind(other.step, kvjax.methods.full()), **tokens)


def _same(lines: Sequence[_Line]) -> str:
    """Says where drafts changed the text."""
    texts = lambda line: [ids for each in line.written for ids in each.ids]
    plain = {line.method: texts(line) for line in lines if not line.draft}
    differ = {line.method: sum(a != b for a, b in zip(texts(line), plain[line.method])) for line in lines if line.draft}
    others = [f"{count} of {len(plain[method])} with {method}" for method, count in differ.items() if count]
    if not others:
        return "Texts with drafts are the same."
    return f"Texts with drafts are others: {', '.join(others)} (a method that acts while text comes acts once a call)."


class _Shown:
    """Prints what is new of a text; characters whose bytes have not all come yet wait."""

    def __init__(self, model: Model):
        self._model, self._printed = model, ""

    def __call__(self, ids: list[int], whole: bool = False) -> None:
        text = self._model.tokenizer.decode(ids)
        text = text if whole else text.rstrip("\ufffd")
        if text.startswith(self._printed):
            print(text[len(self._printed) :], end="", flush=True)
            self._printed = text


def _print_title(line: _Line, index: int, count: int) -> None:
    draft = f", drafts of {line.draft}" if line.draft else ""
    print(f"--- {line.method}{draft}{f', prompt {index + 1}' if count > 1 else ''}", flush=True)


def table(lines: Sequence[_Line]) -> str:
    """One line a method: what its cache took, how fast it wrote, and what became of its drafts."""
    width = max(len(line.method) for line in lines)
    drafts = any(line.draft for line in lines)
    head = f"{'':<{width}}  {'cache':>9}{'of 16 bits':>11}{'smaller':>9}{'prefill':>10}{'tokens':>8}{'decode':>13}"
    rows = [head + (f"  {'draft':<8}{'accepted':>9}{'a call':>8}{'speed':>8}" if drafts else "")]
    plain = {line.method: line.speed for line in lines if not line.draft}
    for line in lines:
        size, full = (max(getattr(each, name) for each in line.written) for name in ("cache_bytes", "full_bytes"))
        row = f"{line.method:<{width}}  {human_bytes(size):>9}{human_bytes(full):>11}{full / size:>8.1f}x"
        row += f"{line.total('prefill_seconds'):>8.2f} s{line.total('tokens'):>8.0f}{line.speed:>7.1f} tok/s"
        if line.draft:
            calls, drafted, accepted = (line.total(name) for name in ("calls", "drafted", "accepted"))
            share = f"{accepted / drafted:.0%}" if drafted else "-"
            row += f"  {line.draft[-7:]:<8}{share:>9}{line.total('tokens') / calls:>8.2f}"
            row += f"{line.speed / plain[line.method]:>7.2f}x" if line.method in plain else ""
        rows.append(row.rstrip())
    return "\n".join(rows)


if __name__ == "__main__":
    cli.start(run)
