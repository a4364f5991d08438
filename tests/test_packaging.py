"""The package installs what the repository holds, and its settings live in one file."""

import ast
import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import setuptools
from packaging.requirements import Requirement

import kvjax
from kvjax.extras import require

DATA = {".gin", ".json", ".typed"}
ROOT = pathlib.Path(__file__).resolve().parents[1]
INSTALLED_BY_USERS = ("models", "experiments", "tpu", "cuda", "docs", "peer")
PACKAGES = {"kvjax", "pallas_kernels", "models", "experiments", "configs"}


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    """Those of other distributions; an extra may contain another one of ours."""
    found = [Requirement(line) for line in text.split("\n") if line and not line.startswith("#")]
    return [requirement for requirement in found if requirement.name != "kvjax"]


def test_the_top_level_holds_what_the_design_prescribes():
    for name in PACKAGES | {"tests"}:
        assert (ROOT / name).is_dir(), name
    for name in ("setup.cfg", "pyproject.toml", "Makefile", "LICENSE", ".ci/run"):
        assert (ROOT / name).is_file(), name


def test_setup_cfg_holds_the_metadata(setup_cfg):
    assert setup_cfg["metadata"]["name"] == "kvjax"
    assert setup_cfg["metadata"]["version"] == kvjax.__version__
    assert setup_cfg["metadata"]["license"] == "Apache-2.0"
    assert setup_cfg["options"]["python_requires"] == ">=3.11"
    (call,) = [node for node in ast.walk(ast.parse((ROOT / "setup.py").read_text())) if _is_setup(node)]
    assert [keyword.arg for keyword in call.keywords] == ["ext_modules"] and not call.args


def _is_setup(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setup"


def test_pyproject_names_only_the_build_backend():
    with open(ROOT / "pyproject.toml", "rb") as file:
        assert set(tomllib.load(file)) == {"build-system"}


@pytest.mark.parametrize(
    "name", ["pytest.ini", ".pytest.ini", "tox.ini", ".flake8", "ruff.toml", ".ruff.toml", "mypy.ini", ".coveragerc"]
)
def test_no_tool_is_set_up_elsewhere(name):
    """Most tools read such a file instead of setup.cfg, and say nothing."""
    assert not (ROOT / name).exists()


def test_every_top_level_package_is_declared(setup_cfg):
    include = setup_cfg["options.packages.find"]["include"].split()
    installed = setuptools.find_packages(str(ROOT), include=include)
    assert {name.partition(".")[0] for name in installed} == PACKAGES
    found = setuptools.find_packages(str(ROOT), exclude=["tests", "tests.*", "build", "build.*"])
    assert sorted(found) == sorted(installed)


@pytest.mark.parametrize("package", ["kvjax", "models", "pallas_kernels"])
def test_type_checkers_read_the_annotations_of_the_library(package, setup_cfg):
    assert (ROOT / package / "py.typed").is_file()
    assert "py.typed" in setup_cfg["options.package_data"][package].split()


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_folder_of_modules_is_a_package(package):
    """setuptools leaves a folder without __init__.py out of the wheel, and an editable install hides it."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders, f"{package}/ holds no module, so this test would check nothing"
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_what_a_wheel_holds_runs_from_any_folder_with_the_files_that_programs_read(tmp_path):
    """An editable install finds them in the clone, so only what is built for a wheel shows whether they are in it."""
    clone, site = tmp_path / "clone", tmp_path / "site"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    build = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_py", "--build-lib", site]
    subprocess.run(build, cwd=clone, check=True, capture_output=True)
    data = {path.relative_to(ROOT) for name in PACKAGES for path in (ROOT / name).rglob("*.*") if path.suffix in DATA}
    assert len(data) > 60 and [str(path) for path in sorted(data) if not (site / path).is_file()] == []
    program = (
        "import sys; from experiments import methods, plan, cli, evaluate; cli.parse_flags(sys.argv);"
        "print(methods.__file__, *cli.gin_files(), *methods.method_names(), *plan.model_names())"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", program, "--gin_file=configs/runs/quickstart.gin"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    where, run, *names = ran.stdout.split()
    assert where == str(site / "experiments" / "methods.py") and run == str(site / "configs/runs/quickstart.gin")
    assert names == [path.stem for pattern in ("methods/*.gin", "models/*.json") for path in _sorted(pattern)]


def _sorted(pattern: str) -> list[pathlib.Path]:
    return sorted((ROOT / "configs").glob(pattern), key=lambda path: path.stem)


NODES = {"TPU": "/dev/accel0", "TPU, by vfio": "/dev/vfio/0", "NVIDIA GPU": "/dev/nvidia0", "none": "/dev/vfio/vfio"}


@pytest.mark.parametrize("device", NODES)
def test_make_leaves_the_platform_alone_where_there_is_an_accelerator(device, tmp_path):
    node = tmp_path / NODES[device].lstrip("/")
    node.parent.mkdir(parents=True)
    node.touch()
    text = (ROOT / "Makefile").read_text()
    assert text.count("/dev/accel") == 1
    text = text.replace("/dev/", f"{tmp_path}/dev/")
    asked = "".join(f"\n{name}_platform: ; @echo {name}=$${{JAX_PLATFORMS-own}}\n" for name in ("run", "test"))
    (tmp_path / "Makefile").write_text(text.replace("test: export", "test_platform: export") + asked)
    given = {name: x for name, x in os.environ.items() if name != "JAX_PLATFORMS"}
    make = lambda goal, **more: subprocess.run(
        ["make", "-s", goal], cwd=tmp_path, env=given | more, check=True, capture_output=True, text=True
    ).stdout.strip()
    assert make("run_platform") == ("run=cpu" if device == "none" else "run=own")
    assert make("test_platform") == "test=cpu"
    assert make("run_platform", JAX_PLATFORMS="cuda") == "run=cuda"
    assert make("test_platform", JAX_PLATFORMS="") == "test="


def test_every_requirement_has_both_bounds(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    texts = [setup_cfg["options"]["install_requires"], *(extras[name] for name in INSTALLED_BY_USERS)]
    for requirement in (requirement for text in texts for requirement in requirements(text)):
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


def test_jax_has_the_same_range_wherever_it_is_named(setup_cfg):
    texts = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    ranges = [r.specifier for text in texts for r in requirements(text) if r.name == "jax"]
    assert len(ranges) == 4 and len(set(ranges)) == 1


def test_a_missing_package_is_named_with_the_extra_that_brings_it():
    require("models", "models", "numpy")
    with pytest.raises(ImportError, match=r"^models needs no_such_module: pip install 'kvjax\[models\]'.$"):
        require("models", "models", "numpy", "no_such_module")


WITHOUT = """
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == {missing!r} else find(name, *more)
"""


def test_a_program_without_its_extra_ends_in_one_line(tmp_path):
    program = WITHOUT.format(missing="gguf") + "import models"
    of_import = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert of_import.stderr.splitlines()[-1] == "ImportError: models needs gguf: pip install 'kvjax[models]'."
    (tmp_path / "sitecustomize.py").write_text(WITHOUT.format(missing="matplotlib"))
    ran = subprocess.run(
        [sys.executable, "-m", "experiments.evaluate", "--help"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert ran.returncode == 1 and ran.stderr == "experiments needs matplotlib: pip install 'kvjax[experiments]'.\n"


@pytest.mark.slow
def test_the_wheel_and_the_wheel_of_the_sdist_hold_the_same_and_run_in_a_fresh_environment(tmp_path):
    """The environment has what `pip install kvjax` brings, without extras; packages come from pip's index."""
    clone = tmp_path / "clone"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone / name)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    run = lambda *words, **how: subprocess.run([python, *words], check=True, capture_output=True, text=True, **how)
    run("-m", "pip", "install", "--quiet", "build")
    run("-m", "build", "--outdir", tmp_path / "dist", clone)  # the sdist, and the wheel from it
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path / "direct", clone)
    (built,), (direct,) = (list((tmp_path / folder).glob("*.whl")) for folder in ("dist", "direct"))
    assert sorted(zipfile.ZipFile(built).namelist()) == sorted(zipfile.ZipFile(direct).namelist())
    assert any(name.endswith("snapkv.gin") for name in zipfile.ZipFile(built).namelist())
    run("-m", "pip", "install", "--quiet", built)
    program = "import kvjax; print(kvjax.__version__, kvjax.methods.snapkv(budget=0.5).schedule.name)"
    assert run("-c", program, cwd=tmp_path).stdout.split() == [kvjax.__version__, "evict"]
    failed = subprocess.run([python, "-m", "experiments.evaluate"], cwd=tmp_path, capture_output=True, text=True)
    assert failed.returncode == 1
    assert re.fullmatch(r"experiments needs .*matplotlib.*: pip install 'kvjax\[experiments\]'.\n", failed.stderr)
