"""The built wheel, installed away from the sources, works beside a user's own actors.py and placement.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["pyproject.toml", "README.md", "LICENSE", "ray_shm", "actors", "placement"]

HOSTILE = 'raise ImportError(f"{__name__} of the user was imported in place of ray_shm.{__name__}")\n'

SCRIPT = """
import ray
import ray_shm

class W:
    def where(self):
        import ray_shm, ray_shm.actors, ray_shm.placement
        return [m.__file__ for m in (ray_shm, ray_shm.actors, ray_shm.placement)]

    def add(self, a, b):
        return ray_shm.get_context().rank, a + b

if __name__ == "__main__":
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with ray_shm.launch(W, num_workers=2) as actor:
        for files in [W().where(), *actor.collective_rpc("where")]:
            print("imported", *files)
        print("sums", actor.collective_rpc("add", args=(1, 2)))
    ray.shutdown()
"""


def run(*command: str | Path, cwd: Path, timeout: float = 150) -> str:
    """The command's standard output; its whole output is in the failure where it fails."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    if done.returncode != 0:
        pytest.fail(f"{command} exited with {done.returncode}:\n{done.stdout}\n{done.stderr}", pytrace=False)
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that neither an old build/ gets into it nor a new one into the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    options = ["--no-deps", "--no-index", "--no-build-isolation", "-w", "dist"]
    run(sys.executable, "-m", "pip", "wheel", *options, ".", cwd=source)
    (built,) = (source / "dist").glob("ray_shm-*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, which finds all else where this interpreter does.

    A plain path in a .pth file comes after the environment's own packages, and the .pth files of that folder,
    the editable install's among them, are not read.
    """
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    interpreter = folder / "bin" / "python"
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(run(interpreter, "-c", query, cwd=folder).strip())
    options = ["--no-deps", "--no-index", "--target", packages]
    run(sys.executable, "-m", "pip", "install", *options, wheel, cwd=folder)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return interpreter


def test_the_wheel_holds_every_source_file_the_types_and_the_licence(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {"ray_shm/py.typed"}
    for folder in ("ray_shm", "actors", "placement"):
        target = folder if folder == "ray_shm" else f"ray_shm/{folder}"
        expected |= {f"{target}/{path.name}" for path in (ROOT / folder).glob("*.py")}
    assert expected == {name for name in names if ".dist-info/" not in name}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_works_beside_hostile_module_names(python: Path, tmp_path: Path) -> None:
    (tmp_path / "actors.py").write_text(HOSTILE)
    (tmp_path / "placement.py").write_text(HOSTILE)
    (tmp_path / "train.py").write_text(SCRIPT)
    lines = run(python, "train.py", cwd=tmp_path).splitlines()
    packages = python.parents[1] / "lib"
    imported = [line.split()[1:] for line in lines if line.startswith("imported")]
    assert len(imported) == 3  # the driver and two workers
    for facade, actors, placement in imported:
        assert Path(facade).is_relative_to(packages)
        assert Path(facade).name == "__init__.py"
        assert Path(actors) == Path(facade).parent / "actors" / "__init__.py"
        assert Path(placement) == Path(facade).parent / "placement" / "__init__.py"
    assert "sums [(0, 3), (1, 3)]" in lines
