"""What several processes do together, and one process alone: the same functions for both, run by ``test_distributed.py``.

    torchrun --nproc_per_node 2 tests/distributed_worker.py FOLDER NAME...

calls the functions of these names on each rank and saves what they give in ``FOLDER/NAME.RANK.pt``.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from torch import Tensor

from baft_intervention import EditRequest
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import EditError
from baft_intervention.evaluation import protocols
from baft_intervention.evaluation.methods import make_method
from baft_intervention.evaluation.protocols import Generation, ProtocolSettings, run_protocol
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.models.fingerprint import model_fingerprint
from baft_intervention.models.structure import find_blocks
from baft_intervention.runtime import distributed
from baft_intervention.runtime.partial_forward import WholeModel
from edits import FACTS, FRANCE, LEO, PROMPTS, TOWER, leave_encoders_untrained, logits, tiny_editor
from evaluation.helpers import make_requests
from tiny import tiny_model, tiny_tokenizer

MORE = (
    EditRequest("The mother tongue of Danielle is", "Japan", subject="Danielle", id="danielle"),
    EditRequest("The name of the country of Leo is", "city", subject="Leo", id="country"),
)
JOINT = {"allocation": "joint", "weighting": "linear", "locality_coefficient": 0.5, "balance_coefficient": 0.1}
leave_encoders_untrained(setattr, Path(tempfile.mkdtemp()))


def _editor(model: Any = None, **changes: Any) -> BaftEditor:
    return tiny_editor(model or tiny_model(), tiny_tokenizer(), **changes)


def _of(editor: BaftEditor) -> dict[str, Any]:
    """What an editor holds and how its model answers."""
    answers = torch.stack([logits(editor.model, editor.tokenizer, prompt) for prompt in PROMPTS])
    found = {name: [getattr(edit, name) for edit in editor.edits] for name in ("id", "steps", "reached")}
    losses = torch.tensor([edit.loss for edit in editor.edits])
    return {"ids": found.pop("id"), "state": editor.adapter.state(), "losses": losses, "logits": answers, **found}


def stored(folder: Path) -> dict[str, Any]:
    """Independent edits into a folder, one of them undone, one superseded, others behind them."""
    editor = _editor()
    editor.keep_in(folder / "adapter")
    report = editor.edit([*FACTS, *MORE])
    editor.undo("leo")
    again = editor.edit(EditRequest(FRANCE.prompt, "city", subject="France", id="france"))
    found = _of(editor) | {"reported": [e.id for e in report.edits], "replaced": again.replaced}
    editor.close()
    editor.save_pretrained(folder / "copy")
    return found


def joint(_folder: Path) -> dict[str, Any]:
    """Three requests in one edit, by both engines: two rows on one rank, one on the other."""
    found = {}
    for engine in ("auto", "reference"):
        editor = _editor(engine=engine, **JOINT)
        editor.edit([FRANCE, LEO, TOWER])
        found[engine] = _of(editor)
    return found


def summed(_folder: Path) -> dict[str, Any]:
    """Edits that are trained one after another: those that add up."""
    found = {}
    editor = _editor(balance_coefficient=0.1, weighting="linear")
    editor.edit([FRANCE, LEO])
    found["sum"] = _of(editor)
    return found


def failing(_folder: Path) -> dict[str, Any]:
    """An error on the last rank alone, in a share and in an edit of all; afterwards everything goes on."""
    last = distributed.rank() == distributed.world_size() - 1
    found: dict[str, Any] = {}
    for name, changes in (("share", {}), ("together", JOINT)):
        editor = _editor(engine="reference", **changes)
        before = _of(editor)
        losses = WholeModel.losses

        def broken(*args: Any, losses: Any = losses) -> Any:
            if last:
                raise EditError("this rank is out of order")
            return losses(*args)

        WholeModel.losses = broken
        try:
            editor.edit([FRANCE, LEO])
        except EditError as error:
            found[name] = str(error)
        finally:
            WholeModel.losses = losses
        found[f"{name} left"] = _same(before, _of(editor))
        editor.edit([FRANCE, LEO])
        found[f"{name} then"] = editor.edits[0].reached
    return found


def _same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one["ids"] == other["ids"] and torch.equal(one["logits"], other["logits"])


def trainer(folder: Path) -> dict[str, Any]:
    """BaftTrainer with batches of four in all, in one go and accumulated."""
    import pyreft
    from transformers import TrainingArguments

    import baft_intervention as baft

    requests = [*FACTS, *MORE, EditRequest("Who is she?", "the mother of Danielle"), *make_requests(2)]  # 8
    found: dict[str, Any] = {}
    for name, accumulation in (("whole", 1), ("accumulated", 2)):
        torch.manual_seed(0)
        intervention = baft.BasisWeightedLoReFTIntervention(embed_dim=32, low_rank_dimension=4)
        where = {"layer": 2, "component": "block_output", "low_rank_dimension": 4, "intervention": intervention}
        model = pyreft.get_reft_model(tiny_model(), pyreft.ReftConfig(representations=[where]))
        size = 4 // distributed.world_size() // accumulation
        args = TrainingArguments(
            str(folder / f"trainer-{name}"), num_train_epochs=3, per_device_train_batch_size=size, learning_rate=2e-2,
            gradient_accumulation_steps=accumulation, use_cpu=True, disable_tqdm=True, save_strategy="no",
            logging_steps=1, report_to="none",
        )  # fmt: skip
        module = baft.make_edit_data_module(tiny_tokenizer(), requests, num_interventions=1)
        bank = {2: torch.randn(20, 32, generator=torch.Generator().manual_seed(1))}
        own = baft.BaftTrainer(
            model, args, tokenizer=tiny_tokenizer(), bank=bank, locality_coefficient=0.1, **module
        )  # fmt: skip
        own.train()
        losses = [entry["loss"] for entry in own.state.log_history if "loss" in entry]
        found[name] = {"parameters": {n: p.detach() for n, p in model.named_parameters()}, "losses": losses}
        own.save_model()
        found[name]["saved"] = sorted(p.name for p in (folder / f"trainer-{name}").rglob("*.safetensors"))
    return found


def sharded(_folder: Path) -> dict[str, Any]:
    """An editor of a model whose parameters are cut in pieces by FSDP; the plain model in one process."""
    model = tiny_model()
    if distributed.world_size() > 1:
        from torch.distributed.fsdp import fully_shard

        for block in find_blocks(model):
            fully_shard(block)
        fully_shard(model)
    found: dict[str, Any] = {"fingerprint": model_fingerprint(model)}
    for weighting in ("fact", "linear"):
        editor = _editor(model, weighting=weighting)
        editor.edit([FRANCE, LEO])
        found[weighting] = _of(editor) | {"answers": editor.generate(list(PROMPTS), max_new_tokens=4)}
        editor.detach()
    found["flags"] = all(p.requires_grad for p in model.parameters())
    return found


CONFIG = {"rank": 4, "learning_rate": 0.05, "steps": 6}
PROTOCOLS = {
    "single": ProtocolSettings("single", generation=Generation(fluency_tokens=6, margin=2)),
    "batched": ProtocolSettings("batched", batch_size=2),
    "sequential_immediate": ProtocolSettings("sequential_immediate"),
    "sequential_final": ProtocolSettings("sequential_final", checkpoints=(2,)),
}


def evaluated(folder: Path, *names: str) -> dict[str, Any]:
    """Every protocol on seven records, with this library's editor."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    for name in names or PROTOCOLS:
        method = make_method("baft", {"config": CONFIG})
        run_protocol(Scorer(model, tokenizer), method, make_requests(7), PROTOCOLS[name], folder / name, progress=False)
    return {}


def killed(folder: Path) -> None:
    """As ``evaluated``, one record a turn; the last rank dies, without a word, at its third edit."""
    protocols._TURNS = 1
    edit, count, dies = BaftEditor.edit, [0], not distributed.is_main()

    def dying(self: BaftEditor, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if dies and count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return edit(self, *args, **kwargs)

    BaftEditor.edit = dying
    evaluated(folder / "killed", "single")


def main(folder: str, *names: str) -> None:
    torch.set_num_threads(1)
    with distributed.processes():
        for name in names:
            found = globals()[name](Path(folder))
            torch.save(found, Path(folder) / f"{name}.{distributed.rank()}.pt")


def flat(value: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in nested dicts, by their paths."""
    if isinstance(value, Tensor):
        return {name: value}
    inside = value.items() if isinstance(value, dict) else ()
    return {path: tensor for key, item in inside for path, tensor in flat(item, f"{name}/{key}").items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
