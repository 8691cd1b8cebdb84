"""The wheel carries the five packages and nothing else, under names that nothing else has."""

from __future__ import annotations

import importlib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.conftest import ROOT

PACKAGES = ("runtime", "prefill", "decode", "kv_transfer", "kserve_adapter")


def test_wheel(tmp_path: Path) -> None:
    """Every module of the five packages, no tests, no benchmarks."""
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
    assert modules == {str(path.relative_to(ROOT)) for name in PACKAGES for path in (ROOT / name).rglob("*.py")}


@pytest.mark.parametrize("name", PACKAGES)
def test_names_are_ours(name: str) -> None:
    """An import path is a folder's path, and no installed distribution has a package of the same plain name."""
    module = importlib.import_module(name)
    assert module.__file__ == str(ROOT / name / "__init__.py")
    assert set(packages_distributions().get(name, ["baton-serve"])) == {"baton-serve"}
