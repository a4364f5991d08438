"""The evaluation's own questions: facts planted at known depths of noise or essays.

Every context has exactly the asked number of tokens, so that one compilation serves them all.

* `needle_noise`, `needle_essay`: one needle in repeated noise or in essay text (needle in a haystack, Kamradt, 2023;
  RULER, Hsieh et al., 2024);
* `needles`: several needles with different keys, one asked for (RULER's multi-key task);
* `key_value`: lines of `key: value` spread over noise, one asked for (after Liu et al., Lost in the Middle, 2023);
* `passkey`: a number to remember, hidden in noise (Mohtashami and Jaggi, Landmark Attention, 2023);
* `text`: held-back essay text, whose continuation is scored but not generated.

A prediction ends with its line or sentence and is right if it contains the number (RULER's string match).

All but `text` are rendered through the model's chat template. The context ends before the question, which ends with
the first words of the assistant's reply, so that the answer comes next.
"""

import itertools
import random
import re
from collections.abc import Iterator, Sequence

from experiments.suggestions import there_are
from experiments.tasks import Example, Tokenizer

SYNTHETIC_TASKS = ("needle_noise", "needle_essay", "needles", "key_value", "text")
EVERY_TASK = (*SYNTHETIC_TASKS, "passkey")
TEXT_ANSWER_TOKENS = 64
NEEDLES = 3
KEY_VALUE_PAIRS = 6

_NOISE = (" The grass is green.", " The sky is blue.", " The sun is yellow.", " Here we go.", " There and back again.")
KEYS = (
    "amber", "anchor", "apple", "arrow", "autumn", "badger", "bamboo", "banner", "basket", "beacon", "birch", "bottle",
    "bridge", "bronze", "butter", "cactus", "candle", "canyon", "carpet", "castle", "cedar", "cherry", "clover",
    "cobalt", "comet", "copper", "coral", "cotton", "crystal", "dolphin", "dragon", "eagle", "ember", "falcon",
    "feather", "fern", "forest", "garden", "ginger", "glacier", "granite", "hammer", "harbor", "hazel", "honey",
    "island", "ivory", "jasmine", "jungle", "kettle", "lagoon", "lantern", "lemon", "linen", "magnet", "maple",
    "marble", "meadow", "mirror", "mosaic", "nectar", "needle", "oasis", "olive", "orchid", "otter", "paddle",
    "pearl", "pebble", "pepper", "pigeon", "planet", "prairie", "pumpkin", "quartz", "rabbit", "raven", "ribbon",
    "river", "saddle", "salmon", "silver", "spruce", "summit", "tiger", "timber", "tulip", "tunnel", "valley",
    "velvet", "violet", "walnut", "willow", "window", "winter", "zephyr",
)  # fmt: skip
_STOPS = ("\n", ".")
_MORE_TOKENS = 4  # than the answer has, of a prediction
_DOCUMENTS = "[[documents]]"  # marks, in a rendered chat, where the documents go


def synthetic_tasks(
    tokenizer: Tokenizer,
    essays: Sequence[str],
    *,
    length: int,
    count: int,
    seed: int,
    tasks: Sequence[str] = SYNTHETIC_TASKS,
) -> list[Example]:
    """Makes `count` examples of each task with contexts of exactly `length` tokens.

    An example depends on its task, its index and `seed` alone, so more tasks or examples leave the others as they
    were. The depths of a task halve the largest gap: 1/2, 0, 1, 1/4, 3/4, 1/8 ...; they are evenly spaced at 3, 5, 9
    or 17 examples. Facts go to the sentence or line boundary nearest to their depth. Every fourth essay is held back
    for `text`; the needles lie in the others.

    Args:
      tokenizer: of the model that will answer.
      essays: natural text, one string a document; at least two.
      length: tokens of every context.
      count: examples per task.
      seed: of all random choices.
      tasks: which of `EVERY_TASK` to make.

    Returns:
      The examples, task by task.

    Raises:
      ValueError: for an unknown task, a `count` or `length` that is too small, or too little held-back text.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    if len(essays) < 2:
        raise ValueError(f"essays: got {len(essays)} texts, expected at least 2, one of them to hold back")
    unknown = [task for task in tasks if task not in EVERY_TASK]
    if unknown:
        raise ValueError(f"tasks: unknown task {unknown[0]!r}; {there_are(unknown[0], EVERY_TASK)}")
    held_back, haystack = split_essays(essays)
    held_back_ids = tuple(tokenizer.encode("\n\n".join(held_back))) if "text" in tasks else ()
    examples = []
    for task, index in itertools.product(tasks, range(count)):
        rng = random.Random(f"{seed}/{task}/{index}")
        depth = _depth(index)
        if task == "text":
            examples.append(_text_example(tokenizer.opening, held_back_ids, length, rng))
        elif task == "key_value":
            examples.append(_key_value_example(tokenizer, length, depth, rng))
        elif task == "passkey":
            examples.append(_passkey_example(tokenizer, length, depth, rng))
        else:
            filler = sentences(haystack, rng) if task == "needle_essay" else itertools.cycle(_NOISE)
            needles = NEEDLES if task == "needles" else 1
            examples.append(_needle_example(task, tokenizer, filler, needles, length, depth, rng))
    return examples


def split_essays(essays: Sequence[str]) -> tuple[list[str], list[str]]:
    """One in four essays to be predicted, and the others to plant needles in or to calibrate on."""
    clean = [" ".join(essay.split()) for essay in essays]
    return clean[::4], [essay for i, essay in enumerate(clean) if i % 4]


def _depth(index: int) -> float:
    """Term `index` of 1/2, 0, 1, 1/4, 3/4, 1/8, 3/8, 5/8, 7/8, 1/16 ..."""
    if index < 3:
        return (0.5, 0.0, 1.0)[index]
    gaps = 1 << (index - 1).bit_length()
    return (2 * (index - 1) - gaps + 1) / gaps


def _text_example(opening: tuple[int, ...], ids: tuple[int, ...], asked: int, rng: random.Random) -> Example:
    length = asked - len(opening)
    size = length + TEXT_ANSWER_TOKENS
    if length < 1 or size > len(ids):
        raise ValueError(
            f"length: got {length}, expected 1 to {len(ids) - TEXT_ANSWER_TOKENS}: the held-back essays have"
            f" {len(ids)} tokens and the text task predicts {TEXT_ANSWER_TOKENS} more"
        )
    start = rng.randrange(len(ids) - size + 1)
    window = ids[start : start + size]
    return Example("text", (*opening, *window[:length]), (), window[length:], length=asked)


def _needle_example(
    task: str, tokenizer: Tokenizer, filler: Iterator[str], needles: int, length: int, depth: float, rng: random.Random
) -> Example:
    keys = rng.sample(KEYS, needles)
    numbers = [digits(rng, 7) for _ in keys]
    facts = [f" One of the special magic numbers for {key} is: {number}." for key, number in zip(keys, numbers)]
    depths = [depth, *(rng.random() for _ in facts[1:])]
    head, tail = _frame(
        tokenizer,
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about"
        " the number afterwards.",
        f"What is the special magic number for {keys[0]} mentioned in the provided text?",
    )
    tail += f"The special magic number for {keys[0]} mentioned in the provided text is:"
    return _planted(task, tokenizer, head, filler, list(zip(depths, facts)), tail, f" {numbers[0]}", length, depth)


def _key_value_example(tokenizer: Tokenizer, length: int, depth: float, rng: random.Random) -> Example:
    keys = rng.sample(KEYS, KEY_VALUE_PAIRS)
    values = [digits(rng, 5) for _ in keys]
    asked = round(depth * (len(keys) - 1))
    depths = [i / (len(keys) - 1) for i in range(len(keys))]
    facts = [f"\n{key}: {value}\n" for key, value in zip(keys, values)]
    head, tail = _frame(
        tokenizer,
        "The following text contains lines of the form key: value. I will ask you for the value of a key afterwards.",
        f"What is the value of the key {keys[asked]}?",
    )
    tail += f"{keys[asked]}:"
    filler = itertools.cycle(_NOISE)
    return _planted(
        "key_value", tokenizer, head, filler, list(zip(depths, facts)), tail, f" {values[asked]}", length, depth
    )


def _passkey_example(tokenizer: Tokenizer, length: int, depth: float, rng: random.Random) -> Example:
    key = digits(rng, 5)
    fact = f" The pass key is {key}. Remember it. {key} is the pass key."
    head, tail = _frame(
        tokenizer,
        "There is important information hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz"
        " you about it.",
        "What is the pass key?",
    )
    tail += "The pass key is"
    filler = itertools.cycle(_NOISE)
    return _planted("passkey", tokenizer, head, filler, [(depth, fact)], tail, f" {key}", length, depth)


def _planted(
    task: str,
    tokenizer: Tokenizer,
    head: str,
    filler: Iterator[str],
    facts: list[tuple[float, str]],
    tail: str,
    answer: str,
    length: int,
    depth: float,
) -> Example:
    """`facts` at their depths in as much filler as fills `length` tokens after `head`."""
    head_ids = [*(() if tokenizer.chat_template else tokenizer.opening), *tokenizer.encode(head)]
    planted = [(at, tokenizer.encode(fact)) for at, fact in facts]
    room = length - len(head_ids) - sum(len(ids) for _, ids in planted)
    if room < 0:
        raise ValueError(f"length: got {length}, expected at least {length - room} for the task {task}")
    pieces = _fill(tokenizer, filler, room)
    starts = list(itertools.accumulate((len(piece) for piece in pieces), initial=0))
    # The first piece may begin in mid-sentence, so nothing is put before it.
    boundaries = range(min(1, len(pieces)), len(pieces) + 1)
    at_boundary: list[list[int]] = [[] for _ in range(len(pieces) + 1)]
    for at, ids in sorted(planted, key=lambda fact: fact[0]):
        at_boundary[min(boundaries, key=lambda i: abs(starts[i] - at * room))] += ids
    answer_ids = tuple(tokenizer.encode(answer))
    documents = [*at_boundary[0]]
    for piece, following in zip(pieces, at_boundary[1:]):
        documents += piece + following
    return Example(
        task,
        (*head_ids, *documents),
        tuple(tokenizer.encode(tail)),
        answer_ids,
        references=(answer.strip(),),
        metric="match_all",
        new_tokens=len(answer_ids) + _MORE_TOKENS,
        stops=_STOPS,
        depth=depth,
        length=length,
    )


def _fill(tokenizer: Tokenizer, filler: Iterator[str], room: int) -> list[list[int]]:
    """Sentences of exactly `room` tokens together, the first cut at its front."""
    pieces: list[list[int]] = []
    surplus = -room
    while surplus < 0:
        pieces.append(tokenizer.encode(next(filler)))
        surplus += len(pieces[-1])
    while pieces and surplus >= len(pieces[0]):
        surplus -= len(pieces.pop(0))
    return [pieces[0][surplus:], *pieces[1:]] if pieces else []


def sentences(essays: Sequence[str], rng: random.Random) -> Iterator[str]:
    """The sentences of all essays over and over, from a random essay on, each with the space before it."""
    start = rng.randrange(len(essays))
    for essay in itertools.cycle([*essays[start:], *essays[:start]]):
        yield from re.split(r"(?<=[.!?])(?= )", f" {essay}")


def _frame(tokenizer: Tokenizer, instruction: str, question: str) -> tuple[str, str]:
    """The rendered chat before and after the documents, which empty lines separate from what is said of them."""
    head, tail = chat_frame(tokenizer, f"{instruction}\n\n", f"\n\n{question}")
    return head, tail if tokenizer.chat_template else f"{tail}\n"


def chat_frame(tokenizer: Tokenizer, before: str, after: str) -> tuple[str, str]:
    """Renders a user's turn with documents in it, and the opening of the assistant's.

    A model without a chat template gets the plain text.

    Args:
      tokenizer: whose template renders it.
      before: the user's text before the documents.
      after: the user's text after them.

    Returns:
      What comes before the documents, and what after them.

    Raises:
      ValueError: the template does not keep the user's text.
    """
    if tokenizer.chat_template is None:
        return before, after
    content = f"{before}{_DOCUMENTS}{after}"
    rendered = tokenizer.chat([{"role": "user", "content": content}], add_generation_prompt=True)
    head, mark, tail = rendered.partition(_DOCUMENTS)
    if not mark:
        raise ValueError(f"tokenizer.chat: got {rendered[:80]!r}, expected a template that keeps the user's text")
    return head, tail


def digits(rng: random.Random, count: int) -> str:
    """Draws a number of so many digits."""
    return str(rng.randrange(10 ** (count - 1), 10**count))
