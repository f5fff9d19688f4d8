"""The package as pip installs it: a wheel, in an environment of its own, used from another folder."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
from scripts import PATIENCE, ROOT

try:
    version("pip")
    builder = version("setuptools")
except PackageNotFoundError as missing:
    pytest.skip(f"{missing.name} is not installed", allow_module_level=True)
if int(builder.split(".")[0]) < 77:
    pytest.skip(f"the wheel is built by setuptools >= 77, here is {builder}", allow_module_level=True)

# What a user does first; every module has to import, too.
SMOKE_TEST = """
import importlib, json, pkgutil
from importlib.metadata import metadata
import torch
import se3_transformer
from se3_transformer.model import Fiber, SE3Transformer
from se3_transformer.model.neighbors import fully_connected

for module in pkgutil.walk_packages(se3_transformer.__path__, "se3_transformer."):
    importlib.import_module(module.name)
model = SE3Transformer(1, Fiber({0: 2}), Fiber.create(2, 4), Fiber({1: 1}), num_heads=2, channels_div=2)
out = model(fully_connected(torch.randn(5, 3)), {"0": torch.randn(5, 2, 1)})
about = metadata("se3-transformer")
print(json.dumps({"file": se3_transformer.__file__, "shape": out["1"].shape, "license": about["License-Expression"]}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since a build leaves files beside its sources; without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "se3_transformer", source / "se3_transformer")
    run("-m", "pip", "wheel", source, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", target)
    (path,) = target.glob("*.whl")
    return path


def run(*command, python=sys.executable, cwd=None):
    done = subprocess.run([python, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return done.stdout


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    files = [path for path in (ROOT / "se3_transformer").rglob("*.*") if path.suffix != ".pyc"]
    assert {name for name in names if ".dist-info/" not in name} == {str(path.relative_to(ROOT)) for path in files}
    assert any(name.endswith("/LICENSE") for name in names)


def test_installed_package_works_in_another_folder(wheel, tmp_path):
    """Of this environment the new one sees the installed libraries, so that nothing is downloaded."""
    environment = tmp_path / "environment"
    run("-m", "venv", "--without-pip", environment)
    python = environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    packages = run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", python=python).strip()
    run("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (Path(packages) / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    result = json.loads(run("-I", "-c", SMOKE_TEST, python=python, cwd=tmp_path).splitlines()[-1])
    assert Path(result["file"]).is_relative_to(packages), "not the installed package was imported"
    assert result["shape"] == [5, 1, 3]
    assert result["license"] == "MIT"
