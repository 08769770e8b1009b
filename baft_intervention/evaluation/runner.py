"""Run an editing method on a benchmark's records and write the results into a folder.

The folder gets records.jsonl (one line per record, the same bytes in each run), timings.jsonl, run.json (what was run) and
summary.json. A second call with the same arguments resumes an interrupted run. Several processes share the records and
write the same files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from ..data import load_requests
from ..data.registry import canonical_task
from ..environment import library_versions
from ..errors import ConfigError, EditError
from ..models.fingerprint import model_fingerprint
from ..models.loading import load_model
from ..runtime import distributed
from ..storage.locking import FolderLock
from .baseline_outputs import BaselineCache, default_cache_folder
from .methods import load_method, make_method
from .protocols import ProtocolSettings, run_protocol
from .records import dump_line, write_json
from .scoring import Scorer
from .summary import machine_facts, make_summary, peak_memory_mib

logger = logging.getLogger(__name__)

METHOD_FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "methods"  # only in a checkout, not in a wheel
_LOCK = "lock"
_FILES = ("records.jsonl", "timings.jsonl", "run.json", "summary.json")


def evaluate(
    data: str,
    method: str,
    out: str | Path,
    *,
    model: str = "smollm2-135m",
    task: str | None = None,
    settings: Mapping[str, Any] | None = None,
    protocol: ProtocolSettings | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    options: Mapping[str, Any] | None = None,
    unrelated: str | None = None,
    unrelated_per_record: int = 2,
    replies: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    cache: str | Path | Literal["none"] | None = None,
    fresh: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Score a method on a benchmark; return the summary, which is also in ``out/summary.json``.

    Args:
        data: a benchmark file, or a hub id.
        method: a method's name, or a YAML file with its settings.
        out: folder of the results.
        model: a built-in model, a folder or a hub id.
        task: benchmark or format; by default recognised by the data.
        settings: changes to the method's settings.
        protocol: the protocol, and the seed of the method, of the data's choices and of sampled texts.
        limit: only the first records.
        skip_bad: skip malformed records and count them.
        options: options of the data's format.
        unrelated: a file of unrelated questions, a further probe group.
        unrelated_per_record: number of these questions for each record.
        replies: ConvSent: number of replies to score on each side; 0 for all.
        device, dtype: see :func:`~baft_intervention.load_model`.
        cache: folder of the unedited model's outputs; ``"none"`` keeps none, None means the user's cache.
        fresh: delete the files of an earlier run in ``out``.
        progress: show a progress bar.

    Raises:
        ConfigError: the settings are invalid, or ``out`` holds another run.
        DataError: the data is invalid.
        StoreError: another process writes to ``out``.
        EditError: a file cannot be written.
    """
    protocol = protocol or ProtocolSettings()
    label, base = load_method(method, METHOD_FOLDER)
    chosen = make_method(base.name, _fields(base) | {"seed": protocol.seed} | dict(settings or {}))
    folder = Path(out)
    distributed.from_main(lambda: _check_folder(folder, fresh=fresh))
    loaded = load_requests(
        data, task, limit=limit, seed=protocol.seed or None, skip_bad=skip_bad,
        unrelated=unrelated, unrelated_per_record=unrelated_per_record, **(options or {}),
    )  # fmt: skip
    # a format given by name is recorded as such, not as its task
    task = loaded.format if task and canonical_task(task) == loaded.format else loaded.task
    run: dict[str, Any] = {
        "label": label, "method": chosen.name, "settings": chosen.settings(), "task": task, "format": loaded.format,
        "data": Path(loaded.path).name if loaded.path else "", "data_sha256": loaded.sha256,
        "options": _named(loaded.options), "skipped": loaded.bad_count, "records": len(loaded.requests),
        "protocol": protocol.name, "batch_size": protocol.batch_size, "checkpoints": list(protocol.checkpoints),
        "seed": protocol.seed, "replies": replies, "generation": vars(protocol.generation), "model": Path(model).name or model,
        "dtype": dtype,
    }  # fmt: skip
    if protocol.name != "batched":
        del run["batch_size"]
    if protocol.name != "sequential_final":
        del run["checkpoints"]
    run["versions"] = library_versions("peft", "pyreft", "pyvene", "numpy", "tokenizers")
    finished = None if fresh else distributed.from_main(lambda: _finished(folder, run))
    if finished is not None:
        logger.info("%s is finished; give --fresh to run it again", folder)
        return finished
    with _only_writer(folder, fresh=fresh):
        base_model, tokenizer = load_model(model, device=device, dtype=dtype)
        fingerprints = distributed.gather(lambda: model_fingerprint(base_model))
        run["fingerprint"] = fingerprints[0]
        if len(set(fingerprints)) > 1:
            other = next(k for k, found in enumerate(fingerprints) if found != fingerprints[0])
            raise ConfigError(
                f"{model!r} is a different model on rank {other} than on rank 0; give all processes the same one"
            )
        distributed.from_main(lambda: _begin(folder / "run.json", run))
        store = BaselineCache(None if cache == "none" else Path(cache) if cache else default_cache_folder())
        scorer = Scorer(base_model, tokenizer, cache=store, replies=replies, fingerprint=run["fingerprint"])
        run_protocol(scorer, chosen, loaded.requests, protocol, folder, progress=progress)
        peaks = distributed.gather(peak_memory_mib)
        return distributed.from_main(lambda: _finish(folder, run, max(peaks)))


def _begin(path: Path, run: Mapping[str, Any]) -> None:
    if path.is_file():
        _compare(path, _read(path), run)
    _write(path, run)


def _finish(folder: Path, run: Mapping[str, Any], peak: float) -> dict[str, Any]:
    with open(folder / "timings.jsonl", "ab") as file:
        file.write(dump_line({"peak_memory_mib": peak}))
    machine = machine_facts() | {"processes": distributed.world_size()}
    summary = make_summary(dict(run), folder, machine=machine)
    _write(folder / "summary.json", summary)
    return summary


@contextlib.contextmanager
def _only_writer(folder: Path, *, fresh: bool) -> Iterator[None]:
    """Lock the folder against a second run; with ``fresh``, then delete the files of an earlier one."""
    with contextlib.ExitStack() as held:

        def lock() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(FolderLock(folder, _LOCK))
            if fresh:
                for name in _FILES:
                    (folder / name).unlink(missing_ok=True)

        distributed.from_main(lock)
        yield


def _check_folder(folder: Path, *, fresh: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {str(folder)!r} is a file; give a folder")
    if fresh and folder.is_dir():
        strange = [p.name for p in folder.iterdir() if p.name not in (*_FILES, _LOCK)]
        if strange:
            raise ConfigError(
                f"--fresh: {str(folder)!r} holds {strange[0]!r}, which no evaluation wrote; give another --out"
            )


def _finished(folder: Path, run: Mapping[str, Any]) -> dict[str, Any] | None:
    """The summary of this run if it is already finished."""
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = _read(path)
    _compare(path, summary.get("run", {}), run)
    return summary


def _compare(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    now = json.loads(json.dumps(now))
    for name, value in now.items():
        if before.get(name) != value:
            raise ConfigError(
                f"{path} belongs to another run: {name} was {_brief(before.get(name))} and is {_brief(value)} now; give "
                "another --out, or --fresh to delete it"
            )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 160 else text[:157] + "..."


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give another --out, or --fresh") from None
    return data if isinstance(data, dict) else {}


def _write(path: Path, data: Mapping[str, Any]) -> None:
    try:
        write_json(path, data)
    except OSError as error:
        raise EditError(f"{path} cannot be written: {error.strerror or error}") from error


def _fields(method: Any) -> dict[str, Any]:
    return {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}


def _named(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with paths cut to file names, so that results do not depend on the folder of the data."""
    named = dict(options)
    if isinstance(named.get("unrelated"), str):
        named["unrelated"] = Path(named["unrelated"]).name
    return json.loads(json.dumps(named))
