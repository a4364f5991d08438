"""What each package may import, and that importing it does nothing else.

The layers are `pallas_kernels <- kvjax <- models <- experiments`; imports never point the other way.
"""

import ast
import configparser
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import textwrap

import pytest
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
LAYERS = ("pallas_kernels", "kvjax", "models", "experiments")  # each may import those before it
LIBRARY = LAYERS[:-1]
EXTRAS = {"models": ["models"], "experiments": ["models", "experiments", "peer"]}  # what each may import besides
PROGRAMS_ONLY = ("gin", "absl.app", "absl.flags")
CATCH_ALL_NAMES = {"common", "helper", "helpers", "misc", "util", "utils"}


def source_files(package: str) -> list[pathlib.Path]:
    return sorted((ROOT / package).rglob("*.py"))


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(source: str, package: str) -> dict[str, int]:
    """Maps every dotted name that `source` imports to its line, at any depth of the code.

    Args:
      source: text of a module.
      package: dotted package that relative imports in `source` start from.

    Returns:
      Names as `a.b`; `from a import b` gives both `a` and `a.b`, since `b` may be a module.
    """
    names = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            found = [base] + [f"{base}.{alias.name}" for alias in node.names]
        elif (
            isinstance(node, ast.Call)
            and re.search(r"\b(import_module|__import__)$", ast.unparse(node.func))
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found = [importlib.util.resolve_name(node.args[0].value, package)]
        else:
            continue
        for name in found:
            names.setdefault(name, node.lineno)
    return names


def imports_of(path: pathlib.Path) -> dict[str, int]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return imported_names(path.read_text(encoding="utf-8"), package)


def is_within(name: str, modules: tuple[str, ...]) -> bool:
    return any(name == module or name.startswith(module + ".") for module in modules)


def offending_imports(package: str, forbidden: tuple[str, ...]) -> list[str]:
    files = source_files(package)
    assert files, f"{package}/ holds no module, so this test would check nothing"
    return [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files
        for name, line in imports_of(path).items()
        if is_within(name, forbidden)
    ]


@pytest.mark.parametrize(
    "statement, expected",
    [
        ("import models", "models"),
        ("import models.config as c", "models.config"),
        ("from models import config", "models.config"),
        ("from models.config import Config", "models.config"),
        ("from . import cache", "kvjax.segments.cache"),
        ("from .. import cache", "kvjax.cache"),
        ("from ..cache import Cache", "kvjax.cache"),
        ("def f():\n  import models", "models"),
        ("if TYPE_CHECKING:\n  import models", "models"),
        ("try:\n  import gin\nexcept ImportError:\n  gin = None", "gin"),
        ("from absl import flags", "absl.flags"),
        ("importlib.import_module('models.config')", "models.config"),
        ("import_module('..cache', __package__)", "kvjax.cache"),
        ("__import__('models')", "models"),
    ],
)
def test_every_form_of_import_is_seen(statement, expected):
    assert expected in imported_names(statement, package="kvjax.segments")


def test_a_name_that_only_begins_alike_is_another_module():
    assert not is_within("models_of_the_world", ("models",))
    assert not is_within("absl.logging", PROGRAMS_ONLY)


@pytest.mark.parametrize("package", LAYERS)
def test_imports_never_point_upward(package):
    upper = LAYERS[LAYERS.index(package) + 1 :]
    assert offending_imports(package, upper + ("tests",)) == []


@pytest.mark.parametrize("package", LIBRARY)
def test_the_library_imports_neither_gin_nor_flags(package):
    assert offending_imports(package, PROGRAMS_ONLY) == []


@pytest.mark.parametrize("package", LAYERS)
def test_every_imported_distribution_is_declared(package):
    """Nothing works only because a dependency of a dependency, or what another package needs, happens to be there."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    texts = [setup["options"]["install_requires"], *(extras[name] for name in EXTRAS.get(package, ()))]
    declared = {_normalized(Requirement(line).name) for text in texts for line in text.split("\n") if line}
    distributions = importlib.metadata.packages_distributions()

    undeclared = []
    for path in source_files(package):
        for name, line in imports_of(path).items():
            top = name.partition(".")[0]
            if top in sys.stdlib_module_names or top in LAYERS:
                continue
            if declared.isdisjoint(map(_normalized, distributions.get(top, [top]))):
                undeclared.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert undeclared == []


def _normalized(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", distribution).lower()


@pytest.mark.parametrize("package", LAYERS + ("tests",))
def test_files_are_named_after_a_concept(package):
    files = source_files(package)
    assert files, f"{package}/ holds no module, so this test would check nothing"
    parts = {part for path in files for part in path.relative_to(ROOT).with_suffix("").parts}
    assert {part for part in parts if part.strip("_") in CATCH_ALL_NAMES} == set()


def _run_python(program: str, *arguments: str) -> object:
    """Runs `program` in a fresh interpreter at the root and returns the JSON on its last line of output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# JAX refuses another jax_num_cpu_devices once a backend exists, which is the public way to ask.
_BACKEND_EXISTS = """
def backend_exists():
    try:
        jax.config.update("jax_num_cpu_devices", jax.config.jax_num_cpu_devices + 2)
    except RuntimeError:
        return True
    return False
"""


def test_a_backend_that_was_started_is_noticed():
    program = _BACKEND_EXISTS + textwrap.dedent("""
        import json, jax
        jax.devices()
        print(json.dumps(backend_exists()))
    """)
    assert _run_python(program) is True


def test_importing_the_library_does_nothing_else():
    """No module of the library starts a backend, sets an option or a variable, opens a connection or runs a program.

    What dependencies do at import is theirs, so they are imported first.
    """
    modules = [module_name(path) for package in LIBRARY for path in source_files(package)]
    assert {name.partition(".")[0] for name in modules} == set(LIBRARY)
    dependencies = {
        name
        for package in LIBRARY
        for path in source_files(package)
        for name in imports_of(path)
        if not is_within(name, LAYERS)
    }
    program = _BACKEND_EXISTS + textwrap.dedent("""
        import importlib, json, os, sys
        import jax

        modules, dependencies = map(json.loads, sys.argv[1:])
        for name in dependencies:
            try:
                importlib.import_module(name)
            except ImportError:  # an optional dependency, or a name that is not a module
                pass

        reached_out = []
        watched = {"socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system"}
        sys.addaudithook(lambda event, args: reached_out.append(event) if event in watched else None)
        variables, options = dict(os.environ), dict(jax.config.values)
        for name in modules:
            importlib.import_module(name)
        print(json.dumps({
            "variables": sorted(set(variables.items()) ^ set(os.environ.items())),
            "options": sorted(k for k, v in jax.config.values.items() if options.get(k, v) != v),
            "reached_out": reached_out,
            "backend": backend_exists(),
        }))
    """)
    effects = _run_python(program, json.dumps(modules), json.dumps(sorted(dependencies)))
    assert effects == {"variables": [], "options": [], "reached_out": [], "backend": False}
