"""Adapters on the Hugging Face hub: push one with a model card, fetch one by its id.

``huggingface_hub`` does the transfer, and handles tokens, caching, endpoints (``HF_ENDPOINT``) and offline mode. A fetched
adapter passes the same checks as a local folder. No code from a repository is run.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..models.loading import hub_answers
from ..requests import EditRequest
from .exchange import DESCRIPTION, LOG, TENSORS

CARD = "README.md"
_SHOWN = 20  # how many edits a card lists one by one
_HUB_NAMES = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}  # hub ids of the built-in models


def is_repo_id(name: str) -> bool:
    """Whether ``name`` has the form of a repository id, ``user/name``, and is not an existing path."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None and not Path(name).exists()


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


@contextlib.contextmanager
def fetched_adapter(repo_id: str, *, revision: str | None = None) -> Iterator[Path | None]:
    """Context manager that gives a temporary folder with a repository's adapter, or None if it holds no adapter.

    The files are copied out of the hub's cache, because the cache consists of links and an adapter folder may not contain any.

    Raises:
        AdapterError: the repository has an ``adapter.json``, but its tensors cannot be fetched.
    """
    api = _api()
    # without a network, look in the cache only: each download would retry for half a minute
    options = {"revision": revision, "local_files_only": not hub_answers(repo_id, DESCRIPTION, revision)}
    try:
        found = {DESCRIPTION: api.hf_hub_download(repo_id, DESCRIPTION, **options)}
    except (OSError, ValueError):  # the hub's errors: no such file, no such repository, not in the cache
        yield None
        return
    try:
        found[TENSORS] = api.hf_hub_download(repo_id, TENSORS, **options)
    except (OSError, ValueError) as error:
        raise AdapterError(f"{repo_id}: {TENSORS} cannot be fetched: {_first_line(error)}") from error
    with contextlib.suppress(OSError, ValueError):  # there is a log only if an editor had the folder open at upload
        found[LOG] = api.hf_hub_download(repo_id, LOG, **options)
    with tempfile.TemporaryDirectory(prefix="baft-") as folder:
        for name, source in found.items():
            shutil.copyfile(source, Path(folder) / name)
        try:
            yield Path(folder)
        except AdapterError as error:
            raise AdapterError(str(error).replace(folder, repo_id)) from error


def push_folder(
    folder: Path,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    message: str = "Upload adapter",
) -> str:
    """Upload an adapter folder and its card as one commit; create the repository if it does not exist.

    Returns:
        URL of the commit.

    Raises:
        AdapterError: the hub cannot be reached or refuses the upload.
    """
    api = _api()
    try:
        api.create_repo(repo_id, private=private, token=token, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, token=token, revision=revision, commit_message=message,
            allow_patterns=[TENSORS, DESCRIPTION, CARD],
        )  # fmt: skip
    except Exception as error:  # the HTTP client's errors differ between versions of huggingface_hub
        raise AdapterError(f"{repo_id}: the adapter cannot be pushed: {_first_line(error)}") from error
    return str(commit.commit_url)


def _first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def model_card(
    description: Mapping[str, Any],
    requests: Sequence[EditRequest],
    repo_id: str,
    *,
    license: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """The text of a model card: the edits, their base model, how to load them, and measured results.

    Args:
        description: contents of ``adapter.json``.
        requests: the requests of all edits, in order.
        repo_id: repository that will hold the adapter.
        license: the hub's identifier of a licence. Without one, the card says "Not stated".
        metrics: names and values to report, e.g. from a summary of ``baft evaluate``.
    """
    from huggingface_hub import ModelCardData

    base, config, edits = description["base_model"], description["config"], description["edits"]
    name = str(base["name"])
    name = _HUB_NAMES.get(name, name)
    public = name if is_repo_id(name) else None
    data = ModelCardData(
        base_model=public, license=license, library_name="baft_intervention",
        tags=["knowledge-editing", "baft", "representation-fine-tuning"], metrics=sorted(metrics) if metrics else None,
    )  # fmt: skip
    reached = sum(bool(edit["reached"]) for edit in edits)
    shown_base = name if public else Path(name).name  # of a local folder, the name without its path
    lines = [
        "---", data.to_yaml(), "---", "", f"# {_plain(repo_id)}", "",
        f"{len(requests)} edited fact{'s' * (len(requests) != 1)} of `{_plain(shown_base)}`, by basis-level representation "
        "fine-tuning (BaFT, [arXiv 2503.00306](https://arxiv.org/abs/2503.00306)). The base model's weights are unchanged: the "
        "edits are small maps on the output of one or a few of its blocks, and each can be undone.",
        "", "## Use", "", "```python", "import baft_intervention as baft", "",
        f'editor = baft.BaftEditor.from_pretrained("{_plain(repo_id)}")', 'editor.generate("…")', "```", "",
        "The adapter loads only on a base model with exactly the weights that the edits were made for.",
        "", "## Edits", "", "| prompt | new answer | subject |", "|---|---|---|",
        *(f"| {_cell(r.question)} | {_cell(r.target_new)} | {_cell(r.subject or '')} |" for r in requests[:_SHOWN]),
    ]  # fmt: skip
    if len(requests) > _SHOWN:
        lines += ["", f"… and {len(requests) - _SHOWN} more, in `{DESCRIPTION}`."]
    lines += [
        "", "## Settings and results", "", "| | |", "|---|---|",
        *(f"| {key} | `{_plain(str(config[key]))}` |" for key in ("weighting", "rank", "positions", "seed")),
        f"| blocks | `{', '.join(map(str, description['layers']))}` |",
        f"| edits whose target is reached | {reached} of {len(edits)} |",
        *(f"| {_cell(key)} | {value:g} |" for key, value in (metrics or {}).items()),
    ]  # fmt: skip
    if not metrics:
        lines += [
            "",
            "No other metric was given. `baft evaluate` measures reliability, generality, locality and portability.",
        ]
    lines += ["", "## Licence", "", f"{license or 'Not stated'}. The base model has a licence of its own.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """One line, without characters that could end a code span or a fence."""
    return " ".join(text.split()).replace("`", "'").replace('"', "'")


def _cell(text: str) -> str:
    """The text of one table cell, with its markup escaped."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("[", "\\[")
    return text.replace("|", "\\|")
