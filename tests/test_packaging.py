"""The package installs what the repository holds, and its settings live in one file."""

import configparser
import pathlib
import tomllib

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGES = {"kvjax", "pallas_kernels", "models", "experiments"}


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(text: str) -> list[Requirement]:
    return [Requirement(line) for line in text.split("\n") if line and not line.startswith("#")]


def test_the_top_level_holds_what_the_design_prescribes():
    for name in PACKAGES | {"configs", "tests"}:
        assert (ROOT / name).is_dir(), name
    for name in ("setup.cfg", "pyproject.toml", "Makefile", "LICENSE", ".ci/run"):
        assert (ROOT / name).is_file(), name


def test_setup_cfg_holds_the_metadata(setup_cfg):
    assert setup_cfg["metadata"]["name"] == "kvjax"
    assert setup_cfg["metadata"]["version"]
    assert setup_cfg["metadata"]["license"] == "Apache-2.0"
    assert setup_cfg["options"]["python_requires"] == ">=3.11"
    assert not (ROOT / "setup.py").exists()


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


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_every_folder_of_modules_is_a_package(package):
    """setuptools leaves a folder without __init__.py out of the wheel, and an editable install hides it."""
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert folders, f"{package}/ holds no module, so this test would check nothing"
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_every_requirement_has_both_bounds(setup_cfg):
    text = setup_cfg["options"]["install_requires"] + setup_cfg["options.extras_require"]["peer"]
    for requirement in requirements(text):
        assert {spec.operator for spec in requirement.specifier} == {">=", "<"}, requirement


def test_jax_has_the_same_range_wherever_it_is_named(setup_cfg):
    texts = [setup_cfg["options"]["install_requires"], *setup_cfg["options.extras_require"].values()]
    ranges = [r.specifier for text in texts for r in requirements(text) if r.name == "jax"]
    assert len(ranges) == 2
    assert ranges[0] == ranges[1]
