"""RULER's tasks, made to any length without a download: needles, variable tracking, common and frequent words.

The wording of prompts, the numbers of needles, hops and repetitions, the lengths of answers and the metric are the
published ones. As there, `length` is what a prompt and its answer have together, and a haystack is as large as fits;
the model's chat template counts, and the answer begins as the published prefix says, behind the opening of the
assistant's turn. What precedes the last question is the context, which a method compresses.

Deviations: every example is drawn from its own seed, so more of them change none; keys are pairs of words of our own
lists, and the words to count are those of the essays, where the original has lists of its own; the likelihood, which
the original does not measure, is of one fixed wording of the answers. Questions about documents are in `ruler_qa`.

Source: Hsieh et al., RULER: What's the Real Context Size of Your Long-Context Language Models? (2024),
arXiv:2404.06654, and its repository, NVIDIA/RULER.
"""

from __future__ import annotations

import dataclasses
import math
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence
from typing import NamedTuple

from experiments.benchmarks.words import ADJECTIVES, NOUNS
from experiments.synthetic import chat_frame
from experiments.tasks import Example, Tokenizer


class Prompt(NamedTuple):
    """A prompt in words.

    Attributes:
      context: what is compressed.
      question: what follows, up to the end of the user's turn.
      prefix: how the answer begins.
      answer: a wording of the answer behind that.
      references: what a prediction must contain.
    """

    context: str
    question: str
    prefix: str
    answer: str
    references: tuple[str, ...]


Make = Callable[[int, random.Random], Prompt]
"""`(size, rng) -> prompt`: with a larger size a longer one."""


@dataclasses.dataclass(frozen=True)
class Needles:
    """Describes a needle task: the haystack, the kinds of keys and values, and how many of each.

    Attributes:
      haystack: noise, essay or needle (others of the same form).
      keys: words or uuids.
      values: numbers or uuids.
      num_keys: that have values in the text.
      num_values: of each key.
      num_asked: keys that are asked for.
    """

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1


NEEDLE_TASKS = {
    "niah_single_1": Needles("noise"),
    "niah_single_2": Needles("essay"),
    "niah_single_3": Needles("essay", values="uuids"),
    "niah_multikey_1": Needles("essay", num_keys=4),
    "niah_multikey_2": Needles("needle"),
    "niah_multikey_3": Needles("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Needles("essay", num_values=4),
    "niah_multiquery": Needles("essay", num_keys=4, num_asked=4),
}
TASKS = (*NEEDLE_TASKS, "vt", "cwe", "fwe")
"""Tasks that need no documents of the user's."""
SHORT = 4096
"""Below this length lists of words have fewer repetitions."""

_NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50} | dict.fromkeys(NEEDLE_TASKS, 128)
_NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
_DEPTHS = tuple(round(100 * i / 39) for i in range(40))  # percent
_HOPS = 4
_COMMON = 10
_CODED_LETTERS = 6


def examples(
    task: str, tokenizer: Tokenizer, essays: Sequence[str], *, length: int, count: int, seed: int
) -> list[Example]:
    """Makes examples of a task.

    Args:
      task: of `TASKS`.
      tokenizer: of the model that will answer.
      essays: the haystack of some tasks, and the words that others count.
      length: tokens of a prompt with its answer.
      count: of examples.
      seed: of all random choices, with the task and the number of the example.

    Raises:
      ValueError: the length is too small for the task.
    """
    make = _maker(task, essays, length, tokenizer)
    each = (random.Random(f"{seed}/{task}/{length}/{index}") for index in range(count))
    return [
        fitted(task, tokenizer, make, rng, length=length, new_tokens=_NEW_TOKENS[task], metric="match_all")
        for rng in each
    ]


def fitted(
    task: str,
    tokenizer: Tokenizer,
    make: Make,
    rng: random.Random,
    *,
    length: int,
    new_tokens: int,
    metric: str,
    least: int = 1,
) -> Example:
    """Makes the longest example that fits, by bisection over the size of its haystack.

    Args:
      task: its name.
      tokenizer: of the model that will answer.
      make: a prompt of any size.
      rng: of which every size gets a copy in the same state.
      length: tokens of the prompt with its answer.
      new_tokens: of the answer.
      metric: that scores it.
      least: the smallest size.

    Raises:
      ValueError: not even the smallest one fits.
    """
    state = rng.getstate()

    def example(size: int) -> Example:
        rng.setstate(state)
        return _example(task, tokenizer, make(size, rng), length, new_tokens, metric)

    total = lambda made: len(made.context_ids) + len(made.question_ids) + new_tokens
    best = example(least)
    if total(best) > length:
        raise ValueError(f"--context: got {length}, expected at least {total(best)} for an example of the task {task}")
    fits, above = least, max(2 * least, 16)
    while total(larger := example(above)) <= length:
        fits, above, best = above, 2 * above, larger
    while above - fits > 1:
        middle = (fits + above) // 2
        made = example(middle)
        if total(made) <= length:
            fits, best = middle, made
        else:
            above = middle
    return best


def _example(
    task: str, tokenizer: Tokenizer, prompt: Prompt, length: int, new_tokens: int, metric: str
) -> Example:
    head, tail = chat_frame(tokenizer, "", prompt.question)
    opening = () if tokenizer.chat_template else tokenizer.opening
    return Example(
        task,
        (*opening, *tokenizer.encode(head + prompt.context)),
        tuple(tokenizer.encode(tail + prompt.prefix)),
        tuple(tokenizer.encode(prompt.answer)),
        references=prompt.references,
        metric=metric,
        new_tokens=new_tokens,
        length=length,
    )


def _maker(task: str, essays: Sequence[str], length: int, tokenizer: Tokenizer) -> Make:
    if task in NEEDLE_TASKS:
        needles = NEEDLE_TASKS[task]
        words = " ".join(" ".join(essay.split()) for essay in essays).split(" ")
        return lambda size, rng: _needles(needles, words, size, rng)
    if task == "vt":
        return lambda size, rng: _variable_tracking(size, rng, tokenizer)
    if task == "cwe":
        words = sorted(set(re.findall(r"(?<![\w'-])[a-z]{4,12}(?![\w'-])", " ".join(essays))))
        return lambda size, rng: _common_words(words, length, size, rng)
    return lambda size, rng: _frequent_words(length - _NEW_TOKENS["fwe"], size, rng)


def _needles(needles: Needles, words: Sequence[str], size: int, rng: random.Random) -> Prompt:
    """Size: words of an essay, lines of noise, or needles that are not asked for."""
    draw = {"words": _pair, "numbers": _number, "uuids": _uuid}
    key, value = draw[needles.keys], draw[needles.values]
    keys: list[str] = []
    while len(keys) < needles.num_keys:
        keys += [new for new in [key(rng)] if new not in keys]
    values = {name: [value(rng) for _ in range(needles.num_values)] for name in keys}
    fact = lambda name, of: f"One of the special magic {needles.values} for {name} is: {of}."
    facts = [fact(name, of) for name in keys for of in values[name]]
    rng.shuffle(facts)
    if needles.haystack == "essay":
        repeated = words * -(-size // len(words))
        context = _in_essay(" ".join(repeated[:size]), facts, rng)
    else:
        lines = [_NOISE] * size
        if needles.haystack == "needle":
            others = (name for name in iter(lambda: key(rng), None) if name not in values)
            lines = [fact(next(others), value(rng)) for _ in range(size)]
        for at, line in zip(sorted(rng.sample(range(max(size, len(facts))), len(facts)), reverse=True), facts):
            lines.insert(at, line)
        context = "\n".join(lines)
    asked = rng.sample(keys, needles.num_asked)
    answers = tuple(of for name in asked for of in values[name])
    several, kind = len(answers) > 1, needles.values if len(answers) > 1 else needles.values[:-1]
    which = _listed(asked)
    intro = (
        f"Some special magic {kind} are hidden within the following text."
        if several
        else f"A special magic {kind} is hidden within the following text."
    )
    verb = "are all" if several else "is"
    return Prompt(
        f"{intro} Make sure to memorize it. I will quiz you about the {kind} afterwards.\n{context}\n",
        f"What {verb} the special magic {kind} for {which} mentioned in the provided text?",
        f" The special magic {kind} for {which} mentioned in the provided text {'are' if several else 'is'}",
        f" {_listed(answers)}",
        answers,
    )


def _in_essay(text: str, facts: Sequence[str], rng: random.Random) -> str:
    """Facts between sentences, at depths of a grid of 40, in their order."""
    sentences = re.split(r"(?<=[.!?]) ", text)
    ends = sorted(int(len(sentences) * depth / 100) for depth in rng.sample(_DEPTHS, len(facts)))
    parts, start = [], 0
    for end, fact in zip(ends, facts):
        parts += [" ".join(sentences[start:end]), fact]
        start = end
    return " ".join(part for part in [*parts, " ".join(sentences[start:])] if part)


def _variable_tracking(size: int, rng: random.Random, tokenizer: Tokenizer) -> Prompt:
    """Size: lines of noise. A solved example, of at most 500 tokens, precedes the task, as published."""
    solved = _chain(5, 3, rng)
    state, lines = rng.getstate(), 5
    while True:
        rng.setstate(state)
        more = _chain_prompt(*solved, lines, rng)
        text = more.context + more.question + more.prefix
        if lines > 5 and len(tokenizer.encode(text)) > 500:
            break
        shown, lines = text, lines + 1
    task = _chain_prompt(*_chain(5, 5, rng), size, rng)
    return task._replace(context=f"{shown}{' '.join(solved[1])}\n\n{task.context}")


def _chain(names: int, letters: int, rng: random.Random) -> tuple[str, list[str]]:
    """A number, and the names of variables that are assigned it, one from the other."""
    found: list[str] = []
    while len(found) < names:
        found += [new for new in ["".join(rng.choices(string.ascii_uppercase, k=letters))] if new not in found]
    return str(rng.randrange(10000, 99999)), found


def _chain_prompt(number: str, names: Sequence[str], lines: int, rng: random.Random) -> Prompt:
    assignments = [f"VAR {names[0]} = {number}"]
    assignments += [f"VAR {new} = VAR {old} " for old, new in zip(names, names[1:])]
    text = [_NOISE] * lines
    places = sorted(rng.sample(range(max(lines, len(names))), len(names)))
    for shift, (place, assignment) in enumerate(zip(places, assignments)):
        text.insert(place + shift, assignment)
    context = "\n".join(text)
    return Prompt(
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n" f"{context}\n",
        f"Question: Find all variables that are assigned the value {number} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(names)} variables are "
        f"assigned the value {number}, they are: ",
        " ".join(names),
        tuple(names),
    )


def _common_words(words: Sequence[str], length: int, size: int, rng: random.Random) -> Prompt:
    """Size: words beside the ten common ones. A solved example precedes the task, as published."""
    short = length < SHORT
    shown, solved = _word_list(words, *((20, 3, 1) if short else (40, 10, 3)), rng)
    listed, common = _word_list(words, _COMMON + size, *((6, 1) if short else (30, 3)), rng)
    intro = (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often."
    )
    question = f"Question: What are the {_COMMON} most common words in the above list?"
    prefix = f" Answer: The top {_COMMON} words that appear most often in the list are:"
    example = f"{intro}\n{shown}\n{question}{prefix} {_numbered(solved)}"
    return Prompt(
        f"{example}\n{intro}\n{listed}\n", question, prefix, f" {_numbered(common)}", tuple(common)
    )


def _word_list(
    words: Sequence[str], count: int, often: int, seldom: int, rng: random.Random
) -> tuple[str, list[str]]:
    """A numbered list of so many words, and the ten of them that come `often`, not `seldom`."""
    if count > len(words):
        words = [*words, *(f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS)]
    chosen = rng.sample(words, count)
    listed = chosen[:_COMMON] * often + chosen[_COMMON:] * seldom
    rng.shuffle(listed)
    return _numbered(listed), chosen[:_COMMON]


def _frequent_words(prompt_tokens: int, size: int, rng: random.Random) -> Prompt:
    """Size: words; the k-th most frequent of them has `size * k^-2 / zeta(2)`, and the first one is dots."""
    coded: dict[str, None] = {}
    while len(coded) < max(prompt_tokens // 50, 4):
        coded["".join(rng.choices(string.ascii_lowercase, k=_CODED_LETTERS))] = None
    vocabulary = ["...", *list(coded)[1:]]
    counts = [int(size / (k * k) / (math.pi**2 / 6)) for k in range(1, len(vocabulary) + 1)]
    text = [word for word, count in zip(vocabulary, counts) for _ in range(count)]
    rng.shuffle(text)
    return Prompt(
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        f"appeared coded words. {' '.join(text)}\n",
        "Question: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
        "appeared words in the above coded text?",
        " Answer: According to the coded text above, the three most frequently appeared words are:",
        f" {', '.join(vocabulary[1:4])}",
        tuple(vocabulary[1:4]),
    )


def _pair(rng: random.Random) -> str:
    return f"{rng.choice(ADJECTIVES)}-{rng.choice(NOUNS)}"


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, start=1))


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
