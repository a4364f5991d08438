"""What the README and the pages of docs show is what happens, and their links lead somewhere."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

import kvjax
import models
from models.decoder import layer_rope
from tests.kvjax import tiny_model

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
COMPILED = (  # what `models.keep_compiled` sets
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
)


def _python(path: str) -> str:
    """The one Python example of a page."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / path).read_text(encoding="utf-8"), flags=re.DOTALL)
    return code


EXAMPLES = ("README.md", "docs/composing.md", "docs/meshes.md")
FIRST_ANSWER, ONE_CHIP, MANY_CHIPS = map(_python, EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert not [link for link in links if not (page.parent / link).exists() and not _is_generated(page, link)]


def _is_generated(page: pathlib.Path, link: str) -> bool:
    """Pages of the API reference that docs/site_pages.py makes."""
    return (page.parent / link).resolve().relative_to(ROOT).as_posix() in {
        f"docs/api/{name}.md" for name in ("kvjax", "models", "methods")
    }


def test_the_site_has_every_page():
    nav = re.search(r"^nav:\n(.*?)^\S", (ROOT / "mkdocs.yml").read_text(), flags=re.DOTALL | re.MULTILINE)[1]
    names = re.findall(r": (\S+\.md)$", nav, flags=re.MULTILINE)
    docs = ROOT / "docs"
    assert {path.relative_to(docs).as_posix() for path in PAGES if path.is_relative_to(docs)} <= set(names)


def test_every_python_example_is_run_by_a_test():
    """A page that is not here has examples that nobody runs."""
    here = ("generating", "long_prompts", "retrieval", "reuse")
    extending = ("write_a_codec", "write_a_method", "write_a_kernel", "add_a_family")
    run = {*EXAMPLES, *(f"docs/{name}.md" for name in (*here, *extending))}
    pages = {path.relative_to(ROOT).as_posix() for path in PAGES if "```python" in path.read_text(encoding="utf-8")}
    assert pages == run


def test_the_readme_is_one_page_and_lists_every_config():
    assert len(README.splitlines()) <= 150
    configs = {path.stem for path in (ROOT / "configs" / "methods").glob("*.gin")}
    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    assert configs <= set(re.findall(r"`(\w+)`", table))
    assert f"{len(configs)} configs" in README


@pytest.mark.slow
def test_the_first_answer_is_found_in_the_text(capsys):
    settings = {name: getattr(jax.config, name) for name in COMPILED}
    try:
        exec(compile(FIRST_ANSWER, "README.md", "exec"), {})
    finally:
        for name, value in settings.items():
            jax.config.update(name, value)
    shown = README.split(FIRST_ANSWER)[1].split("```")[2].strip().splitlines()
    printed = capsys.readouterr().out.strip().splitlines()
    assert printed[0] == shown[0] and "IBM 1401" in printed[1] and "Fortran" in printed[2]


def test_python_example_runs_and_promises_the_bytes_it_takes(smollm2, capsys, monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda name: {"smollm2": smollm2}[name])  # the weights are there once
    exec(compile(ONE_CHIP, "README.md", "exec"), {})
    promised, measured = re.findall(r"bytes.*?: (\d+)", capsys.readouterr().out)
    assert promised == measured and 0 < int(measured) < 10_000_000


def test_mesh_example_runs_and_leaves_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokens, lengths = tiny_model.prompt(2, 24), jnp.int32([24, 13])

    def read(params, tokens, lengths):
        return kvjax.prefill(
            tiny_model.bind(params), kvjax.identity(), tokens, lengths, tiny_model.empty(2), room=8
        )

    names = dict(jax=jax, kvjax=kvjax, read=read, tokens=tokens, lengths=lengths)
    names |= dict(config=tiny_model.CONFIG, params=tiny_model.params())
    exec(compile(MANY_CHIPS, "README.md", "exec"), names)
    assert len(names["run"].cache.layers[0].segments[-1].k.devices()) == 8
    assert (tmp_path / "out" / "run" / "kvjax_run.json").is_file()


def _examples(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["long_prompts.md", "retrieval.md"])
def test_methods_of_a_page_compose(page):
    (code,) = _examples(page)
    names = {"kvjax": kvjax}
    exec(compile(code, page, "exec"), names)
    assert "quantize" in names["method"].schedule.name


def test_drafts_write_what_is_written_without_them_and_the_store_keeps_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drafting, storing = _examples("generating.md")
    tokens, lengths = tiny_model.prompt(2, 24), jnp.int32([24, 13])
    lm = kvjax.bind(tiny_model.bind(tiny_model.params()), kvjax.identity(), empty_cache=tiny_model.empty)
    names = dict(jax=jax, kvjax=kvjax, lm=lm, tokens=tokens, lengths=lengths, ids=[1, 2, 3])
    exec(compile(drafting.replace("200", "20"), "generating.md", "exec"), names)
    plain = lm.generate(lm.prefill(tokens, lengths, room=20), 20)
    assert names["out"].tokens.tolist() == plain.tokens.tolist()
    reads = []
    names["read"] = lambda tokens, lengths: reads.append(1) or lm.prefill(tokens, lengths, room=4)
    for _ in range(2):
        exec(compile(storing, "generating.md", "exec"), names)
    assert len(reads) == 2  # once for the shapes, which jax remembers, and once for what is stored


def test_caches_are_used_again():
    (code,) = _examples("reuse.md")
    step = tiny_model.bind(tiny_model.params())
    lm = kvjax.bind(step, kvjax.identity(), empty_cache=tiny_model.empty)
    prompt, lengths = tiny_model.prompt(1, 24), jnp.int32([24])
    first, second = (lm.prefill(tiny_model.prompt(1, 60, seed=i), jnp.int32([60]), room=0).cache for i in (1, 2))
    run = lm.prefill(tiny_model.prompt(2, 24), jnp.int32([24, 20]), room=8)
    names = dict(kvjax=kvjax, lm=lm, step=step, prompt=prompt, lengths=lengths, first=first, second=second, run=run)
    names |= dict(tokens=tiny_model.prompt(2, 24)[:, 3:6], positions=jnp.int32([[3, 4, 5]] * 2))
    names["ropes"] = [layer_rope(tiny_model.CONFIG, i) for i in range(tiny_model.CONFIG.num_layers)]
    exec(compile(code, "reuse.md", "exec"), names)
    held = kvjax.inspection.held_positions(names["cache"])[0][0]
    assert held.tolist() == [*range(40), *range(200, 260)]
    assert names["forks"].cache.length.tolist() == [24, 24, 20]
