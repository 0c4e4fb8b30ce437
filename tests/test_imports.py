"""The arrows between the packages point one way, and importing the facade imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import ray_shm

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPING: dict[str, str] = PROJECT["tool"]["setuptools"]["package-dir"]
PACKAGES: list[str] = PROJECT["tool"]["setuptools"]["packages"]
IMPORTERS = ["importlib.import_module", "__import__"]
FACADE = ["ray_shm/__init__.py", "ray_shm/serve.py"]
SOURCES = sorted(str(path.relative_to(ROOT)) for folder in MAPPING.values() for path in (ROOT / folder).rglob("*.py"))


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, full dotted name) of every import in `source`, at any depth; relative ones start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (f"{node.module}." if node.module else "")
            yield from ((node.lineno, f"{start}{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def why_refused(path: str, name: str) -> str | None:
    """The rule that an import of `name` in the file `path` breaks, or None."""
    if name.startswith("."):
        return "relative import; write the full name"
    if within(name, "actors", "placement"):
        return f"a user's own module may have this name; write ray_shm.{name}"
    folder = path.split("/")[0]
    above = ("ray", "ray_shm.actors", "ray_shm.placement", "ray_shm.serve")
    if folder == "ray_shm" and path not in FACADE and within(name, *above):
        return "the transport knows nothing of Ray, actors or placement"
    allowed = ("ray_shm.errors", "ray_shm.deadline", "ray_shm.placement")
    if folder == "placement" and within(name, "ray_shm") and not within(name, *allowed):
        return f"placement knows Ray and nothing of queues; of ours it imports only {', '.join(allowed)}"
    return None


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_one_way(path: str) -> None:
    wrong = [
        f"{path}:{line}: imports {name}: {why}"
        for line, name in imports((ROOT / path).read_text())
        if (why := why_refused(path, name))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("path", "statement", "refused"),
    [
        ("actors/group.py", "from .rpc import Scatter", True),
        ("actors/group.py", "import actors", True),
        ("actors/group.py", "def f():\n    from placement import bundles", True),
        ("actors/group.py", "import ray\nfrom ray_shm.placement.bundles import reserve", False),
        ("ray_shm/ring.py", "from ray_shm import actors", True),
        ("ray_shm/ring.py", "import ray.util", True),
        ("ray_shm/ring.py", "importlib.import_module('ray')", True),
        ("ray_shm/ring.py", "from ray_shm.errors import StartError", False),
        ("ray_shm/serve.py", "from ray import serve", False),
        ("ray_shm/serve.py", "import placement", True),
        ("placement/ports.py", "from ray_shm.message_queue import MessageQueue", True),
        ("placement/ports.py", "import ray_shm.ring", True),
        ("placement/ports.py", "from ray_shm import MessageQueue", True),
        ("placement/ports.py", "import ray\nfrom ray_shm import errors", False),
    ],
)
def test_the_import_rules_themselves(path: str, statement: str, refused: bool) -> None:
    assert any(why_refused(path, name) for _, name in imports(statement)) is refused


def test_importing_the_facade_imports_nothing_heavy() -> None:
    code = "import sys, ray_shm; print(*sorted({'torch', 'ray', 'zmq', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("name", ray_shm.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(ray_shm, name) is not None


def test_dir_lists_the_public_names() -> None:
    assert set(ray_shm.__all__) <= set(dir(ray_shm))
    assert len(set(ray_shm.__all__)) == len(ray_shm.__all__)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'lunch'.*launch"):
        _ = ray_shm.lunch  # type: ignore[attr-defined]


def test_every_folder_with_code_is_a_listed_package() -> None:
    folders = {Path(path).parent for path in SOURCES}
    for folder in folders:
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder}/ has no __init__.py"
    assert {package_of(folder) for folder in folders} == set(PACKAGES)
    assert set(MAPPING) <= set(PACKAGES)


def package_of(folder: Path) -> str:
    by_folder = {mapped: package for package, mapped in MAPPING.items()}
    return ".".join([by_folder[folder.parts[0]], *folder.parts[1:]])
