"""Pages of the site that are made from the repository: the README, the API reference, and sources as they are.

The reference lists what a package exports where it is defined, under the headings that its `__all__` has as comments:
`kvjax.transforms.evict` is a module and, for Python, the function in it, and mkdocstrings reads sources only.
"""

from __future__ import annotations

import ast
import pathlib
import posixpath
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
API = {"api/kvjax.md": "kvjax", "api/models.md": "models"}
_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_files(files, config):
    """Adds the pages and the sources that pages link to."""
    for path, name in PAGES.items():
        files.append(File.generated(config, name, content=_moved(ROOT / path, name)))
    for name, package in API.items():
        files.append(File.generated(config, name, content=_reference(package)))
    files.append(File.generated(config, "api/methods.md", content=_methods()))
    linked = {target for page in pathlib.Path(config.docs_dir).rglob("*.md") for target in _outside(page)}
    for target in sorted(linked | set().union(*(_outside(ROOT / path) for path in PAGES))):
        files.append(File.generated(config, _place(target), abs_src_path=str(ROOT / target)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links out of docs/ into links to the copies."""
    if page.file.src_uri in PAGES.values():
        return markdown
    return _relinked(markdown, pathlib.Path(config.docs_dir) / page.file.src_uri, page.file.src_uri)


def _moved(source: pathlib.Path, name: str) -> str:
    return _relinked(source.read_text(encoding="utf-8"), source, name)


def _relinked(markdown: str, source: pathlib.Path, name: str) -> str:
    """The text with each link that leads to a file of the repository leading to where the site has it."""

    def place(match):
        target = _target(source, match[1])
        if target is None:
            return match[0]  # MkDocs says that it is dead
        return "](" + posixpath.relpath(_place(target), posixpath.dirname(name) or ".")

    return _LINK.sub(place, markdown)


def _outside(page: pathlib.Path) -> set[str]:
    """The files beside docs/ and the pages of the site that a page links to."""
    targets = {_target(page, link) for link in _LINK.findall(page.read_text(encoding="utf-8"))} - {None}
    return {target for target in targets if not target.startswith("docs/") and target not in PAGES}


def _target(page: pathlib.Path, link: str) -> str | None:
    """The path in the repository of the file that a link leads to, if there is one."""
    path = (page.parent / link).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_file() and path.is_relative_to(ROOT) else None


def _place(target: str) -> str:
    """Where the site has a file of the repository: sources as text, which browsers show."""
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return PAGES.get(target, f"source/{target}.txt")


def _reference(package: str) -> str:
    """A page of what a package exports; modules among it have pages of their own."""
    source = (ROOT / package / "__init__.py").read_text(encoding="utf-8")
    (exported,) = re.findall(r"^__all__ = \[\n(.*?)^\]", source, flags=re.DOTALL | re.MULTILINE)
    lines = [f"# {package}", ast.get_docstring(ast.parse(source))]
    for line in exported.splitlines():
        if line.strip().startswith("#"):
            lines.append(f"## {line.strip(' #.')}")
            continue
        name = line.strip(' ",')
        defined = _defined(package, name)
        if defined is not None:
            lines.append(f"::: {defined}\n    options: {{heading_level: 3}}")
        else:
            page = ROOT / "docs" / "api" / f"{name}.md"
            exists = page.exists() or name == "methods"
            lines.append(f"[`{package}.{name}`]({name}.md)" if exists else f"::: {package}.{name}")
    return "\n\n".join(lines) + "\n"


def _methods() -> str:
    """A page of the methods, file by file, so that each stands under its paper."""
    lines = ["# kvjax.methods", "Each is a `kvjax.CacheTransform`; [Methods](../methods.md) lists configs and papers."]
    for path in sorted((ROOT / "kvjax" / "methods").glob("[!_]*.py")):
        lines.append(f"::: kvjax.methods.{path.stem}")
    return "\n\n".join(lines) + "\n"


def _defined(module: str, name: str) -> str | None:
    """Returns where a name of a module is defined, with its module's, or None for a module."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return None if node.module == module else _defined(node.module, name)
    return f"{module}.{name}"
