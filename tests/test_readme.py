"""What the README shows is what happens."""

import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_example_runs_and_promises_the_bytes_it_takes(smollm2, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    exec(compile(example, "README.md", "exec"), {})
    promised, measured = re.findall(r"bytes.*?: (\d+)", capsys.readouterr().out)
    assert promised == measured and 0 < int(measured) < 10_000_000


def test_every_method_config_is_listed():
    listed = set(re.findall(r"`(\w+)`", README.split("## Methods")[1].split("## ")[0]))
    assert {path.stem for path in (ROOT / "configs" / "methods").glob("*.gin")} <= listed


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target
