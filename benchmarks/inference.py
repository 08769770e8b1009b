"""What many edits cost: tokens a second with no edit, one, a thousand, ten thousand; and the time of the next edit.

    python benchmarks/inference.py --threads 1

Each number of edits has an adapter of its own on the same model, and one of them at a time is attached. Their keys and maps are
random, but what the gates share is the real thing, so that every prompt runs through the whole routing (whitening, all keys,
relation dictionary); and one prompt in two has an edit of its own, so that a map acts too. For each batch of prompts every
adapter answers in turn, in an order that changes from round to round; a ratio is the median, over rounds, of a round's time
against that of the model without hooks in the same round. It is given in wall time and in processor time: where others use the
machine too, the latter is the one to look at (one thread). The first token, which is the reading of the prompt and where all
the routing is, is given apart.

With --editing, the next edit is timed as well: of an adapter that holds so many edits, kept in a folder, synced to the disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from baft_intervention.config import BaftConfig
from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import BaftError
from baft_intervention.models.loading import load_model
from baft_intervention.requests import EditRequest
from baft_intervention.runtime.adapter import BaftAdapter, Edit

Times = tuple[float, float]  # wall, processor; seconds
# of different lengths, none of them in a benchmark
PROMPTS = (
    "The capital of Japan is",
    "My favourite dish for a cold winter evening is",
    "The mother tongue of the painter who made the large picture in the town hall is",
    "Once upon a time, in a small village behind the mountains, there lived a clockmaker who had three daughters. The eldest",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--edits", default="0,1,1000,10000", metavar="T,T", help="default: 0,1,1000,10000")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="default: 9")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="generated for each prompt; default: 32")
    parser.add_argument("--batch", type=int, default=1, metavar="B", help="prompts answered together; default: 1")
    parser.add_argument("--editing", type=int, default=0, metavar="N", help="time N further edits of each adapter too")
    parser.add_argument("--device")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        model, tokenizer = load_model(args.model, device=args.device)
        counts = [int(text) for text in args.edits.split(",")]
        found = measure(
            model, tokenizer, counts, rounds=args.rounds, tokens=args.tokens, batch=args.batch, editing=args.editing
        )
    except BaftError as error:
        print(f"inference.py: error: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    columns = [name for name in found["rows"][0] if name != "edits"]
    print(f"{'edits':>8}", *(f"{name.replace('_', ' '):>{max(len(name), 8)}}" for name in columns))
    for row in found["rows"]:
        cells = (f"{'' if row[name] is None else format(row[name], '.4g'):>{max(len(name), 8)}}" for name in columns)
        print(f"{row['edits']:>8}", *cells)
    return 0


def measure(
    model: Any, tokenizer: Any, counts: Sequence[int], *, rounds: int, tokens: int, batch: int, editing: int
) -> dict[str, Any]:
    """Median times of each number of edits, and their ratios to the model without hooks."""
    plain = BaftEditor(model, tokenizer)
    plain.prepare()  # what the gates share is a matter of the model
    plain.detach()
    groups = [list(PROMPTS[i : i + batch]) for i in range(0, len(PROMPTS), batch)]
    own = own_edits(plain)
    editors: dict[str, BaftEditor] = {"none": plain}
    for count in counts:
        editor = BaftEditor(model, tokenizer)
        editor.detach()
        editor.adapter.shared, editor._cached_bank = plain.adapter.shared, plain._cached_bank
        editor.adapter.set_edits(random_edits(editor.adapter, count, own))
        editors[str(count)] = editor
    long: dict[str, list[Times]] = {name: [] for name in editors}  # of each round
    short: dict[str, list[Times]] = {name: [] for name in editors}
    order = list(editors)
    for turn in range(rounds + 1):
        sums = {(name, count): (0.0, 0.0) for name in order for count in (1, tokens)}
        for prompts in groups:
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                for count in (1, tokens):
                    wall, processor = timed(editors[name], name != "none", prompts, count)
                    sums[name, count] = sums[name, count][0] + wall, sums[name, count][1] + processor
        if turn:  # the first round warms up
            for name in order:
                short[name].append(sums[name, 1])
                long[name].append(sums[name, tokens])
    rows = []
    for name, editor in editors.items():
        row: dict[str, Any] = {
            "edits": name,
            "tokens_per_second": tokens * len(PROMPTS) / statistics.median(wall for wall, _ in long[name]),
            "ratio": ratio(long[name], long["none"], 0),
            "processor_ratio": ratio(long[name], long["none"], 1),
            "first_token_ratio": ratio(short[name], short["none"], 0),
            "first_token_processor_ratio": ratio(short[name], short["none"], 1),
        }
        if editing:
            row |= {"edit_seconds": None, "edit_processor_seconds": None}
            if name != "none":
                row["edit_seconds"], row["edit_processor_seconds"] = next_edits(editor, editing)
        rows.append(row)
    device = next(model.parameters()).device
    return {
        "rows": rows,
        "rounds": rounds,
        "tokens": tokens,
        "batch": batch,
        "prompts": len(PROMPTS),
        "further_edits": editing,
        "threads": torch.get_num_threads(),
        "device": str(device) if device.type == "cpu" else torch.cuda.get_device_name(device),
        "model": plain.model_name,
        "config": plain.config.to_dict(),
        "torch": torch.__version__,
    }


def ratio(times: Sequence[Times], base: Sequence[Times], which: int) -> float:
    return statistics.median(a[which] / b[which] for a, b in zip(times, base, strict=True))


def timed(editor: BaftEditor, edited: bool, prompts: list[str], tokens: int) -> Times:
    """Wall and processor seconds in which the prompts are answered with exactly so many tokens each."""
    device = next(editor.model.parameters()).device
    if edited:
        editor.attach()
    begin = time.perf_counter(), time.process_time()
    editor.generate(prompts, max_new_tokens=tokens, min_new_tokens=tokens)
    if device.type != "cpu":
        torch.cuda.synchronize(device)
    end = time.perf_counter(), time.process_time()
    editor.detach()
    return end[0] - begin[0], end[1] - begin[1]


def next_edits(editor: BaftEditor, count: int) -> Times:
    """Median wall and processor seconds of further edits, one call each, kept in a folder."""
    found = []
    with tempfile.TemporaryDirectory(prefix="baft-") as folder:
        editor.attach()
        editor.keep_in(folder)
        for number in range(count + 1):
            begin = time.perf_counter(), time.process_time()
            editor.edit(EditRequest(f"The name of the river at {number} Mill Road is", "Osaka"))
            found.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
        editor.close()
        editor.detach()
    return tuple(statistics.median(times[which] for times in found[1:]) for which in (0, 1))


def own_edits(editor: BaftEditor) -> list[dict[int, dict[str, torch.Tensor]]]:
    """Real edits of every second prompt, barely trained: their gates open there."""
    config = BaftConfig(**{**editor.config.to_dict(), "steps": 1})
    one = BaftEditor(editor.model, editor.tokenizer, config)
    one.adapter.shared = editor.adapter.shared
    one._cached_bank = editor._cached_bank
    found = one.edit([EditRequest(prompt, "Osaka") for prompt in PROMPTS[::2]]).edits
    one.detach()
    return [{layer: dict(tensors) for layer, tensors in edit.tensors.items()} for edit in found]


def random_edits(adapter: BaftAdapter, count: int, own: Sequence[dict[int, dict[str, torch.Tensor]]]) -> list[Edit]:
    """So many edits: the real ones last, before them random ones, whose keys are unit vectors and whose thresholds are real."""
    generator = torch.Generator().manual_seed(0)
    edits = []
    for number in range(count):
        real = number - (count - len(own))
        tensors = own[real] if real >= 0 else {n: _random(t, generator) for n, t in own[0].items()}
        used = {layer: torch.zeros(adapter.config.rank) for layer in tensors}
        request = EditRequest(f"random edit {number}", "answer")
        edits.append(Edit(request.id, (request,), tensors, used, 0.0, 0, 0.0, True))
    return edits


def _random(like: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Tensors of the same names: unit vectors for keys, small numbers for maps; scalars (thresholds) stay."""
    made = {}
    for name, tensor in like.items():
        noise = torch.randn(tensor.shape, generator=generator)
        made[name] = noise / noise.norm(dim=-1, keepdim=True) if tensor.ndim else tensor
        if name == "weighting.has_subject":
            made[name] = torch.ones(())
        if name == "weighting.subject_limit":
            made[name] = torch.tensor(0.6)
    return made


if __name__ == "__main__":
    sys.exit(main())
