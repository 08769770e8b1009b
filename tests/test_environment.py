"""The cache folder and the versions that results record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import baft_intervention
from baft_intervention.environment import cache_folder, library_versions
from baft_intervention.evaluation.baseline_outputs import default_cache_folder


def test_the_cache_folder_honours_both_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BAFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == Path.home() / ".cache" / "baft_intervention"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/baft_intervention")
    assert default_cache_folder().parent == cache_folder()
    monkeypatch.setenv("BAFT_CACHE", "~/mine")
    assert cache_folder() == Path.home() / "mine"
    assert default_cache_folder().parent == cache_folder()


def test_versions_name_what_is_absent() -> None:
    versions = library_versions("no-such-package")
    assert versions["torch"] == torch.__version__
    assert versions["baft_intervention"] == baft_intervention.__version__
    assert versions["no-such-package"] == "absent"
