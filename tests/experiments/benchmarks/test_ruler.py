"""RULER's tasks: what is hidden, what is asked, how long a prompt is, and how an answer is scored."""

import collections
import json
import math
import re

import pytest

from experiments.benchmarks import ruler, ruler_qa

ESSAYS = [
    " ".join(f"{word}{chr(97 + i)} of a text ends here." for word in ("alpha", "bravo", "delta") for i in range(20)),
    "Another essay has words, too. " * 20,
]


class Tokenizer:
    """One token a word or a sign; `tail` of a chat is what follows the user's text."""

    def __init__(self, chat=False):
        self.words, self.opening, self.chat_template = {}, (), "chat" if chat else None

    def encode(self, text):
        found = re.findall(r"[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", text)
        return [self.words.setdefault(word, len(self.words)) for word in found]

    def decode(self, ids):
        names = list(self.words)
        return "".join(names[i] for i in ids)

    def chat(self, messages, add_generation_prompt):
        return f"<user>{messages[0]['content']}</user><assistant>"


def made(task, length=600, count=3, seed=0, chat=False):
    """(context, question with the answer's prefix, answer, references) of each example."""
    tokenizer = Tokenizer(chat)
    examples = ruler.examples(task, tokenizer, ESSAYS, length=length, count=count, seed=seed)
    for example in examples:
        total = len(example.context_ids) + len(example.question_ids) + example.new_tokens
        assert example.length == length and total <= length
        assert tokenizer.decode(example.answer_ids) and example.score(tokenizer.decode(example.answer_ids)) == 1.0
    texts = [[tokenizer.decode(ids) for ids in (e.context_ids, e.question_ids, e.answer_ids)] for e in examples]
    return [(*text, example.references) for text, example in zip(texts, examples)]


NEEDLE = re.compile(r"One of the special magic (numbers|uuids) for (\S+) is: (\S+)\.")


@pytest.mark.parametrize("task", ruler.NEEDLE_TASKS)
def test_needles_asked_for_are_in_the_haystack_and_nothing_else_has_their_keys(task):
    what = ruler.NEEDLE_TASKS[task]
    for context, question, _, references in made(task):
        found = collections.defaultdict(list)
        for kind, key, value in NEEDLE.findall(context):
            assert kind == what.values
            found[key].append(value)
        asked = re.search(r" for (.*?) mentioned", question)[1]
        keys = re.split(r", and |, ", asked)
        assert len(keys) == what.num_asked
        for i, key in enumerate(keys):
            assert sorted(found[key]) == sorted(references[i * what.num_values : (i + 1) * what.num_values])
        assert len(found) == what.num_keys if what.haystack != "needle" else len(found) >= 3
        uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}"
        pattern = r"\d{7}" if what.values == "numbers" else uuid
        assert all(re.fullmatch(pattern, value) for value in references)
        one = len(references) == 1
        assert context.startswith("A special" if one else "Some special")
        assert question.startswith("What is the special" if one else "What are all the special")
        assert question.endswith("mentioned in the provided text is" if one else "mentioned in the provided text are")


def test_a_haystack_is_as_large_as_fits():
    unit = len(Tokenizer().encode(f"{ruler._NOISE}\n"))
    tokenizer = Tokenizer()
    for length in (500, 777):
        (example,) = ruler.examples("niah_single_1", tokenizer, ESSAYS, length=length, count=1, seed=0)
        total = len(example.context_ids) + len(example.question_ids) + example.new_tokens
        assert length - unit < total <= length


def test_a_chain_of_variables_is_in_order_behind_a_solved_example():
    for context, question, answer, references in made("vt", 1200):
        solved, task = context.split("\n\nMemorize and track")
        assert len(references) == 5 and answer == " ".join(references)
        number = re.search(r"assigned the value (\d{5}) in", question)[1]
        chain = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", task)
        assert chain == list(zip(references, [number, *references]))
        shown = re.findall(r"VAR ([A-Z]+) = (?:VAR )?(\w+)", solved)
        assert len(shown) == 5 and solved.endswith("they are: " + " ".join(name for name, _ in shown))
        assert question.endswith(f"5 variables are assigned the value {number}, they are: ")


@pytest.mark.parametrize("length, often, seldom", [(1500, 6, 1), (4096, 30, 3)])
def test_common_words_come_as_often_as_published(length, often, seldom):
    for context, _, answer, references in made("cwe", length, count=1):
        solved, task = context.split("\nBelow is")
        counts = collections.Counter(re.findall(r"\d+\. (\S+)", task))
        assert len(references) == 10 and {counts[word] for word in references} == {often}
        assert {count for word, count in counts.items() if word not in references} == {seldom}
        assert answer.split()[::2] == [f"{i}." for i in range(1, 11)]
        listed, shown = solved.split("\nQuestion")
        first = collections.Counter(re.findall(r"\d+\. (\S+)", listed))
        assert sorted(first[word] for word in re.findall(r"\d+\. (\S+)", shown)) == 10 * [10 if seldom == 3 else 3]


def test_frequent_words_follow_the_zeta_distribution():
    for context, _, _, references in made("fwe", 2050):
        text = context.split("coded words. ")[1].split()
        counts = collections.Counter(text)
        ranked = counts.most_common()
        assert ranked[0][0] == "..." and {word for word, _ in ranked[1:4]} == set(references)
        size = ranked[0][1] * math.pi**2 / 6
        for rank, word in enumerate(["...", *references], start=1):
            assert abs(counts[word] - size / rank**2 / (math.pi**2 / 6)) < 1.5
        assert len(counts) <= (2050 - 50) // 50


def test_partly_right_answers_count_as_much_as_they_name():
    example = ruler.examples("niah_multivalue", Tokenizer(), ESSAYS, length=600, count=1, seed=0)[0]
    assert example.metric == "match_all" and example.score(f"It is {example.references[2]}.") == 0.25


def test_more_examples_change_none_and_another_seed_changes_all():
    assert made("vt", 1200, count=2) == made("vt", 1200, count=3)[:2]
    assert not set(made("vt", 1200, seed=0)[0][3]) & set(made("vt", 1200, seed=1)[0][3])


def test_the_answer_begins_behind_the_opening_of_the_assistants_turn():
    context, question, *_ = made("niah_single_2", chat=True)[0]
    assert context.startswith("<user>A special") and "</user><assistant> The special magic number for" in question


def test_a_length_that_is_too_small_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"--context: got 100, expected at least \d+ for an example of the task cwe"):
        ruler.examples("cwe", Tokenizer(), ESSAYS, length=100, count=1, seed=0)


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Paragraph {article} {part} says so.",
                    "qas": [
                        {"question": f"What of {article} {part}?", "answers": [{"text": f"So {part}"}, {"text": "so"}]},
                        {"question": "What else?", "answers": [], "is_impossible": True},
                    ],
                }
                for part in range(2)
            ]
        }
        for article in ("one", "two", "three")
    ]
}
HOTPOT = [
    {"question": f"Q{i}?", "answer": "yes", "context": [[f"T{i}", ["First.", " Second."]], [f"U{i}", ["Third."]]]}
    for i in range(4)
]
LINES = [{"question": f"Q{i}?", "answers": ["a"], "documents": [f"Document number {i}."]} for i in range(4)]


@pytest.mark.parametrize("form", ["squad", "hotpotqa", "lines"])
def test_questions_lie_among_other_documents_of_the_users_data(form, tmp_path):
    path = tmp_path / ("data.jsonl" if form == "lines" else "data.json")
    data = {"squad": SQUAD, "hotpotqa": HOTPOT}.get(form)
    path.write_text(json.dumps(data) if data else "".join(json.dumps(line) + "\n" for line in LINES))
    tokenizer = Tokenizer()
    questions, documents = ruler_qa.read(path)
    assert [len(questions), len(documents)] == {"squad": [6, 6], "hotpotqa": [4, 8], "lines": [4, 4]}[form]
    examples = ruler_qa.examples("qa_1", path, tokenizer, length=200, count=3, seed=0)
    for question, example in zip(questions, examples, strict=False):
        context = tokenizer.decode(example.context_ids)
        own = [documents[i] for i in question.documents]
        assert all(document in context for document in own)
        listed = re.findall(r"Document (\d+):\n", context)
        assert listed == [str(i) for i in range(1, len(listed) + 1)] and len(listed) > len(own)
        assert f"Question: {question.text} Answer:" in tokenizer.decode(example.question_ids)
        assert example.references == question.answers and example.metric == "match_part"
        assert example.score(f"I think {question.answers[-1].upper()}!") == 1.0 and example.score("") == 0.0
        assert len(example.context_ids) + len(example.question_ids) + 32 <= 200


def test_paragraphs_of_the_same_article_come_first(tmp_path):
    (tmp_path / "squad.json").write_text(json.dumps(SQUAD))
    questions, documents = ruler_qa.read(tmp_path / "squad.json")
    assert [documents[i] for i in questions[0].related] == ["Paragraph one 1 says so."]


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{", "data.json: not JSON"),
        ("[]", "data.json: got no questions"),
        ("[3]", r"data.json: got \[3\], expected SQuAD, HotpotQA, or a line with"),
        ('{"question": "q", "answers": "a", "documents": ["d"]}', "data.json: got .*, expected SQuAD"),
        ('{"question": "q", "answers": ["a"], "documents": []}', "data.json: got .*, expected SQuAD"),
    ],
)
def test_data_of_another_form_are_refused(text, wanted, tmp_path):
    (tmp_path / "data.json").write_text(text)
    with pytest.raises(ValueError, match=wanted):
        ruler_qa.read(tmp_path / "data.json")


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps(LINES[0]) + "\n{}\n")
    with pytest.raises(ValueError, match="data.jsonl, line 2: got {}, expected SQuAD"):
        ruler_qa.read(tmp_path / "data.jsonl")
