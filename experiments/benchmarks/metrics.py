"""How a generated text is compared with what was expected: the metrics of the field's benchmarks, from 0 to 1.

Each is written from its published definition and tested on values computed by hand; none needs a library. Where there
are several references the best one counts, but for `match_all`, which wants all of them.
"""

from __future__ import annotations

import collections
import re
import string
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_COMMENT = re.compile(r"`|#|//")


def match_all(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns the share of the references that the prediction contains, whatever their case.

    Source: Hsieh et al., RULER (2024), arXiv:2404.06654, where it is called string match (all).
    """
    return sum(reference.lower() in prediction.lower() for reference in references) / len(references)


def match_part(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns 1 if the prediction contains one of the references, whatever its case, else 0.

    Source: RULER, string match (part).
    """
    return float(any(reference.lower() in prediction.lower() for reference in references))


def exact(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns 1 if the prediction is one of the references, white space at the ends aside, else 0."""
    return float(prediction.strip() in {reference.strip() for reference in references})


def f1(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns the harmonic mean of precision and recall of words, without case, punctuation and English articles.

    Source: Rajpurkar et al., SQuAD (2016), arXiv:1606.05250; LongBench's metric for questions in English.
    """
    return max(_f1(_words(prediction), _words(reference)) for reference in references)


def rouge_l(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns the F1 of the longest common subsequence of words in lower case: `2 L / (words + words)`.

    Words are what white space separates, of the text as one sentence, without stemming; the `rouge` package that
    LongBench uses takes unions over sentences, which gives other values where a text has several.

    Source: Lin, ROUGE (2004), section 3.1, with beta 1; LongBench's metric for summaries.
    """
    words = prediction.lower().split()
    return max(_overlap(words, reference.lower().split()) for reference in references)


def edit(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns `1 - d / (characters + characters)`, d the insertions and deletions between two lines of code.

    Of the prediction the first line counts that is not blank and holds neither a backtick, a hash nor two slashes.

    Source: Bai et al., LongBench (2023), arXiv:2308.14508, its metric for code.
    """
    lines = [line for line in prediction.lstrip("\n").split("\n") if not _COMMENT.search(line)]
    return max(_overlap(lines[0] if lines else "", reference) for reference in references)


def classification(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns `1 / n` if the class is among the n that the prediction names, else 0.

    A named class that is only a part of the right one's name does not count against it.

    Source: LongBench, its metric for classes.
    """

    def one(reference: str) -> float:
        named = {name for name in classes if name in prediction}
        named = {name for name in named if name == reference or name not in reference}
        return 1 / len(named) if reference in named else 0.0

    return max(map(one, references))


def numbers(prediction: str, references: Sequence[str], classes: Sequence[str] = ()) -> float:
    """Returns the share of the numbers in the prediction that are the reference's first number; 0 without any.

    Source: LongBench, its metrics for counted and for retrieved passages.
    """

    def one(reference: str) -> float:
        wanted, found = re.findall(r"\d+", reference), re.findall(r"\d+", prediction)
        return found.count(wanted[0]) / len(found) if wanted and found else 0.0

    return max(map(one, references))


METRICS: dict[str, Callable[..., float]] = {
    metric.__name__: metric for metric in (match_all, match_part, exact, f1, rouge_l, edit, classification, numbers)
}
"""Metrics by the names that tasks give them, all `(prediction, references, classes) -> float`."""


def _words(text: str) -> list[str]:
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", text).split()


def _f1(words: Sequence[str], reference: Sequence[str]) -> float:
    same = sum((collections.Counter(words) & collections.Counter(reference)).values())
    return 2 * same / (len(words) + len(reference)) if same else 0.0


def _overlap(a: Sequence[str], b: Sequence[str]) -> float:
    """Twice the longest common subsequence over both lengths; two empty sequences are the same."""
    return 2 * _common(a, b) / (len(a) + len(b)) if len(a) + len(b) else 1.0


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    lengths = [0] * (len(b) + 1)
    for x in a:
        before = 0  # of the row above, one to the left
        for j, y in enumerate(b, start=1):
            before, lengths[j] = lengths[j], before + 1 if x == y else max(lengths[j], lengths[j - 1])
    return lengths[-1]
