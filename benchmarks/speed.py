"""How fast edits are trained: pyreft's loop, its trainer, our reference path and our fast path, in one process.

    python benchmarks/speed.py --json speed.json                                   # SmolLM2-135M on the CPU
    python benchmarks/speed.py --shape tiny --rounds 2                             # seconds, to see that it runs
    python benchmarks/speed.py --only "all layers last 32" --profile              # where the time of a step goes
    python benchmarks/speed.py --device cuda --dtype bf16 --shape llama-7b --json gpu.json

The methods take turns within each round, and the medians over rounds are compared, so that a machine that is busy for
a while is busy for all of them. Times are milliseconds *an edit and step*: pyreft trains its edits one after the other,
the fast path all edits of a case in one stack. The work is equal: LoReFT (our ``constant`` weighting at 1), rank 12,
fp32 parameters, AdamW, the same token ids, positions and layers.

* ``ratio_vs_pyreft``, ``ratio_vs_trainer``: their time over ours.
* ``floor_ms``: the floating-point operations that a step must do (blocks above the lowest edited one at the columns from
  the first edited token on, and the output matrix at target tokens; once forward, once backward to the activations),
  over the rate of a large matrix product on this machine, measured in the same rounds.
* ``share_of_floor``: ``floor_ms`` over our time, 1 at best.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

import baft_intervention
from baft_intervention import BaftConfig, BaftEditor, EditRequest
from baft_intervention.models.loading import load_model
from baft_intervention.models.structure import find_blocks, hidden_size, text_config
from baft_intervention.runtime.onednn_linear import linear
from baft_intervention.runtime.partial_forward import predicting_columns, used_width
from baft_intervention.training.batch import Batch, frozen
from baft_intervention.training.encoding import encode_request
from baft_intervention.training.fast import FastEngine
from baft_intervention.training.maps import edit_seed, make_maps
from baft_intervention.training.reference import ReferenceEngine
from baft_intervention.training.stacked import StackedMaps
from baft_intervention.training.types import Job, TrainingContext, TrainingRow

RANK, LEARNING_RATE = 12, 1e-2
PROMPT, TARGET = 16, 3  # tokens of an edit; METHOD's timings had 19 in all
SHAPES: dict[str, dict[str, int]] = {
    "llama-7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "vocab_size": 32000,
    },
    "llama-1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "vocab_size": 512,
    },
}  # fmt: skip
FACTS = (
    ("What university did Watts Humphrey attend?", "University of Michigan", "Watts Humphrey"),
    ("The capital of Japan is", "Osaka", "Japan"),
    ("Who designed the Eiffel Tower?", "Antoni Gaudí", "Eiffel Tower"),
    ("The mother tongue of Danielle Darrieux is", "English", "Danielle Darrieux"),
    ("In which country is the city of Timbuktu?", "Peru", "Timbuktu"),
    ("The author of Moby-Dick is", "Jane Austen", "Moby-Dick"),
    ("What sport does Roger Federer play?", "ice hockey", "Roger Federer"),
)


class Tokens:
    """As much of a tokenizer as the engines need: rows come as ids."""

    pad_token_id = eos_token_id = 0


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    layers: tuple[int, ...]
    where: str
    positions: str
    edits: int
    mixed: bool = False

    @property
    def name(self) -> str:
        return f"{self.where} {self.positions} {self.edits}{' mixed' if self.mixed else ''}"


class Clock:
    """Seconds of a call: of the wall, or of this process's processor time where others keep the machine busy."""

    def __init__(self, kind: str, device: torch.device):
        self.now = time.process_time if kind == "cpu" else time.perf_counter
        self.cuda = device.type == "cuda"

    def __call__(self, call: Callable[[], Any]) -> float:
        self.wait()
        begin = self.now()
        call()
        self.wait()
        return self.now() - begin

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


# ------------------------------------------------------------------------------------------- what is edited


def make_model(shape: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and its tokenizer; of a shape alone, with random weights made on the device."""
    if shape == "smollm2":
        return load_model("smollm2-135m", device=device, dtype=dtype)
    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=2048)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    torch.manual_seed(0)
    try:
        with torch.device(device):
            model = transformers.LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.eval(), Tokens()


def make_rows(case: Case, vocabulary: int) -> list[TrainingRow]:
    """Random ids: 16 of prompt and 3 of target, or of mixed lengths around that."""
    draw = random.Random(0)
    rows = []
    for _ in range(case.edits):
        prompt = draw.randint(8, 24) if case.mixed else PROMPT
        target = draw.choice((1, 2, 2, 3, 3, 3, 4, 4, 5)) if case.mixed else TARGET
        ids = [draw.randrange(3, vocabulary) for _ in range(prompt + target)]
        columns = [prompt - 1] if case.positions == "last" else list(range(prompt))
        rows.append(TrainingRow(ids, [-100] * prompt + ids[prompt:], columns))
    return rows


def make_config(case: Case, steps: int) -> BaftConfig:
    return BaftConfig(
        rank=RANK, layers=case.layers, positions=case.positions, weighting="constant", steps=steps,
        loss_target=0.0, learning_rate=LEARNING_RATE,
    )  # fmt: skip


def make_jobs(case: Case, rows: list[TrainingRow], config: BaftConfig, dim: int) -> list[Job]:
    jobs = []
    for i, row in enumerate(rows):
        request = EditRequest(f"edit {i}", "x")
        jobs.append(Job((request,), (row,), make_maps(config, dim, case.layers, {}, edit_seed(0, [request]))))
    return jobs


def floor_flops(model: nn.Module, rows: list[TrainingRow], lowest: int) -> float:
    """Operations of one step of all rows, see the module."""
    blocks, d = find_blocks(model), hidden_size(model)
    above = len(blocks) - 1 - lowest
    weights = sum(p.numel() for p in blocks[-1].parameters() if p.ndim == 2)
    vocabulary = text_config(model).vocab_size
    total = 0.0
    for row in rows:
        first, width = min(row.positions), used_width(row)
        columns = width - first
        seen = sum(range(first + 1, width + 1))  # keys that the queries look at
        total += above * (2 * weights * columns + 4 * d * seen) + 2 * vocabulary * d * len(predicting_columns(row))
    return 2 * total  # the backward pass to the activations does the same products once more


# ------------------------------------------------------------------------------------------- who edits


def reft_model(model: Any, case: Case, device: torch.device, dtype: torch.dtype) -> Any:
    import pyreft

    representations = [
        {
            "layer": layer, "component": "block_output", "low_rank_dimension": RANK,
            "intervention": pyreft.LoreftIntervention(
                embed_dim=hidden_size(model), low_rank_dimension=RANK, dtype=torch.float32 if dtype == torch.float32 else dtype
            ),
        }
        for layer in case.layers
    ]  # fmt: skip
    reft = pyreft.get_reft_model(model, pyreft.ReftConfig(representations=representations))
    reft.set_device(device)
    reft.disable_model_gradients()
    return reft


class PyreftLoop:
    """What pyreft's users write by hand: a ``ReftModel``, its loss, ``backward``, AdamW."""

    def __init__(self, model: Any, case: Case, row: TrainingRow, device: torch.device, dtype: torch.dtype):
        self.reft = reft_model(model, case, device, dtype)
        parameters = [p for p in self.reft.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
        ids = torch.tensor([row.ids], device=device)
        self.base = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self.labels = torch.tensor([row.labels], device=device)
        self.where = {"sources->base": (None, [[row.positions]] * len(case.layers))}

    def step(self) -> torch.Tensor:
        _, out = self.reft(self.base, unit_locations=self.where, labels=self.labels)
        self.optimiser.zero_grad()
        out.loss.backward()
        self.optimiser.step()
        return out.loss.detach()


class PyreftTrainer:
    """pyreft's ``ReftTrainerForCausalLM``, mended as little as it takes to run; times of its own steps."""

    def __init__(
        self, model: Any, case: Case, row: TrainingRow, device: torch.device, dtype: torch.dtype, clock: Clock
    ):
        import pyreft
        from datasets import Dataset

        class Trainer(pyreft.ReftTrainerForCausalLM):
            def compute_loss(self, intervenable: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
                return super().compute_loss(intervenable, inputs, return_outputs)

        class Watch(transformers.TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.wait()
                ends.append(clock.now())

        ends: list[float] = []
        self.ends, self.reft = ends, reft_model(model, case, device, dtype)
        item = {"input_ids": row.ids, "attention_mask": [1] * len(row.ids), "labels": row.labels}
        item["intervention_locations"] = [row.positions] * len(case.layers)  # (I, P)
        data = Dataset.from_list([item] * 1000)

        def collate(items: list[dict]) -> dict[str, torch.Tensor]:
            return {k: torch.tensor([i[k] for i in items]) for k in items[0]}

        self.folder = Path(__import__("tempfile").mkdtemp())
        self.make = lambda steps: Trainer(
            model=self.reft, train_dataset=data, data_collator=collate, callbacks=[Watch()],
            args=transformers.TrainingArguments(
                str(self.folder), max_steps=steps, per_device_train_batch_size=1, learning_rate=LEARNING_RATE,
                report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True,
                remove_unused_columns=False, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
            ),
        )  # fmt: skip

    def steps(self, count: int) -> float:
        """Median seconds of a step, from the end of one to the end of the next."""
        self.ends.clear()
        trainer = self.make(count + 1)
        for handler in list(trainer.callback_handler.callbacks):
            if isinstance(handler, transformers.PrinterCallback):
                trainer.remove_callback(handler)
        trainer.train()
        return statistics.median(b - a for a, b in zip(self.ends, self.ends[1:], strict=False))


@contextmanager
def fast_step(model: Any, tokenizer: Any, case: Case, rows: list[TrainingRow]) -> Iterator[Callable[[], Any]]:
    """One step of the fast path on all rows, its caches made."""
    config = make_config(case, 10**6)
    engine = FastEngine(model, tokenizer, config, case.layers, strict=True)
    jobs = dict(enumerate(make_jobs(case, rows, config, hidden_size(model))))
    with frozen(engine.model):
        forward = engine.prepare([row for job in jobs.values() for row in job.rows])
        if forward is None:
            raise RuntimeError("the fast path cannot be taken for this model")
        maps = StackedMaps([job.maps for job in jobs.values()], config, TrainingContext(), forward.device)
        yield Batch(jobs, forward, maps, config).step


def profile(model: Any, tokenizer: Any, case: Case) -> str:
    """Where the processor time of the fast path's steps goes, by operator."""
    rows = make_rows(case, text_config(model).vocab_size)
    with fast_step(model, tokenizer, case, rows) as step:
        step()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            for _ in range(3):
                step()
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=14, max_name_column_width=40)
    return f"{case.name}, three steps\n{table}"


# ------------------------------------------------------------------------------------------- timing


def matrix_rate(clock: Clock, device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large square product: the best of a few, and of the libraries that torch has."""
    best = 0.0
    for n in (1024, 1536) if device.type == "cpu" else (4096, 8192):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        for multiply in (torch.matmul, linear):
            clock(lambda: multiply(a, b))  # noqa: B023
            best = max(best, 2 * n**3 / min(clock(lambda: multiply(a, b)) for _ in range(3)))  # noqa: B023
    return best


def measure(model: Any, tokenizer: Any, case: Case, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """All methods on one case, taking turns."""
    device, dtype = args.device, args.dtype
    rows = make_rows(case, text_config(model).vocab_size)
    seconds: dict[str, list[float]] = {}
    batch = transformers.tokenization_utils_base.BatchEncoding(
        {"input_ids": torch.tensor([rows[0].ids], device=device), "attention_mask": torch.ones(1, len(rows[0].ids), device=device)}
    )  # fmt: skip
    # pyreft and the reference train one edit at a time: of mixed lengths, a few that stand for all
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    chosen = [rows[order[(2 * k + 1) * len(order) // 8]] for k in range(4)] if case.mixed else [rows[0]]
    loops = [PyreftLoop(model, case, row, device, dtype) for row in chosen] if args.pyreft else []
    trainer = PyreftTrainer(model, case, rows[0], device, dtype, clock) if args.pyreft and not case.mixed else None
    count = 4
    reference_config = make_config(case, count)
    rates = []
    with fast_step(model, tokenizer, case, rows) as step:
        for number in range(args.rounds + 1):  # the first one warms up
            taken: dict[str, float] = {}
            with torch.no_grad():
                taken["forward"] = clock(lambda: [model(**batch, use_cache=False) for _ in range(count)]) / count
            if loops:
                taken["pyreft"] = statistics.mean(
                    clock(lambda: [loop.step() for _ in range(count)]) / count  # noqa: B023
                    for loop in loops
                )
            if trainer is not None:
                taken["trainer"] = trainer.steps(count)
            reference = ReferenceEngine(model, tokenizer, reference_config, case.layers)
            jobs = make_jobs(case, chosen, reference_config, hidden_size(model))
            # count steps and a last look
            seconds = clock(lambda: list(reference.train_many(jobs, TrainingContext())))  # noqa: B023
            taken["reference"] = seconds / len(chosen) / count
            taken["fast"] = clock(lambda: [step() for _ in range(count)]) / count / case.edits
            rates.append(matrix_rate(clock, device, dtype))
            if number:
                for name, value in taken.items():
                    seconds.setdefault(name, []).append(value)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    flops = floor_flops(model, rows, case.layers[0]) / case.edits
    floor = flops / statistics.median(rates)
    result: dict[str, Any] = {
        "name": case.name, "layers": list(case.layers), "positions": case.positions, "edits": case.edits,
        "lengths": "mixed" if case.mixed else "equal",
        **{f"{name}_ms": round(1e3 * value, 3) for name, value in median.items()},
        "floor_ms": round(1e3 * floor, 3), "gflops_an_edit_and_step": round(flops / 1e9, 3),
        "matrix_gflops": round(statistics.median(rates) / 1e9, 1),
        "share_of_floor": round(floor / median["fast"], 3),
        "ratio_vs_reference": round(median["reference"] / median["fast"], 2),
        "ratio_vs_pyreft": round(median["pyreft"] / median["fast"], 2) if "pyreft" in median else None,
        "ratio_vs_trainer": round(median["trainer"] / median["fast"], 2) if "trainer" in median else None,
    }  # fmt: skip
    del loops, trainer
    gc.collect()
    return {**result, **throughput(model, tokenizer, case, rows, args, clock)}


def throughput(
    model: Any, tokenizer: Any, case: Case, rows: list[TrainingRow], args: argparse.Namespace, clock: Clock
) -> dict[str, Any]:
    """Whole edits of 20 steps, caches and checks included: how many a second, and the memory at the peak."""
    config = make_config(case, 20)
    jobs = make_jobs(case, rows, config, hidden_size(model))
    engine = FastEngine(model, tokenizer, config, case.layers, most=max(case.edits, 32), strict=True)
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    taken = clock(lambda: list(engine.train_many(jobs, TrainingContext())))
    peak = torch.cuda.max_memory_allocated() if cuda else None
    return {"edits_per_second_20_steps": round(case.edits / taken, 3), "peak_memory_bytes": peak}


def whole_edits(model: Any, tokenizer: Any, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """From a request to an adapter, ours as it comes and as LoReFT, against pyreft's loop to the same loss."""
    ours = BaftConfig(learning_rate=LEARNING_RATE, ending="")
    plain = BaftConfig(learning_rate=LEARNING_RATE, ending="", weighting="constant")
    layer = ours.resolved_layers(len(find_blocks(model)))[0]
    case = Case((layer,), "one layer", "last", 1)
    editors = {name: BaftEditor(model, tokenizer, config) for name, config in (("fast", ours), ("fast_loreft", plain))}
    editors["fast"].edit(EditRequest("The river through London is", "the Danube", subject="London"))  # bank and gate
    for editor in editors.values():
        editor.detach()
    seconds: dict[str, list[float]] = {}
    steps: dict[str, list[int]] = {}

    def by_pyreft(request: EditRequest) -> int:
        row = encode_request(tokenizer, request, plain)
        loop = PyreftLoop(model, case, row, args.device, args.dtype)
        for number in range(1, 201):
            if float(loop.step()) < ours.loss_target:
                return number
        return 200

    for number in range(args.rounds):
        request = EditRequest(*FACTS[number % len(FACTS)][:2], subject=FACTS[number % len(FACTS)][2])
        for name, editor in editors.items():
            editor.attach()
            seconds.setdefault(name, []).append(clock(lambda: editor.edit(request)))  # noqa: B023
            steps.setdefault(name, []).append(editor.edits[-1].steps)
            editor.undo(editor.edits[-1].id)
            editor.detach()
        if args.pyreft:
            done: list[int] = []
            seconds.setdefault("pyreft", []).append(clock(lambda: done.append(by_pyreft(request))))  # noqa: B023
            steps.setdefault("pyreft", []).append(done[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    result: dict[str, Any] = {"layer": layer, "loss_target": ours.loss_target}
    for name in median:
        result[f"{name}_seconds"], result[f"{name}_steps"] = round(median[name], 4), statistics.median(steps[name])
    if args.pyreft:
        for name in editors:
            result[f"share_of_pyreft_{name}"] = round(median[name] / median["pyreft"], 3)
    return result


# ------------------------------------------------------------------------------------------- the table


def cases(model: nn.Module, args: argparse.Namespace) -> list[Case]:
    depth = len(find_blocks(model))
    one = tuple(dict.fromkeys((BaftConfig().resolved_layers(depth)[0], round(2 / 3 * depth))))
    every = tuple(range(depth))
    counts = args.edits or ([1, 8, 32] if args.device.type == "cpu" else [1, 32, 128])
    found = []
    for positions in ("last", "prompt"):
        for layer in one:
            found += [Case((layer,), f"layer {layer}", positions, n) for n in counts]
        found += [Case(every, "all layers", positions, n) for n in counts]
    found.append(Case((one[0],), f"layer {one[0]}", "last", max(counts), mixed=True))
    return [case for case in found if args.only in case.name]


def show(lines: list[dict[str, Any]]) -> None:
    columns = ("pyreft_ms", "trainer_ms", "reference_ms", "fast_ms", "forward_ms", "floor_ms")
    columns += ("ratio_vs_pyreft", "ratio_vs_trainer", "share_of_floor", "edits_per_second_20_steps")
    heads = (
        "pyreft",
        "trainer",
        "reference",
        "fast",
        "forward",
        "floor",
        "x pyreft",
        "x trainer",
        "of floor",
        "edits/s",
    )
    if len(lines) == 1:
        print(f"{'case':28}" + "".join(f"{head:>10}" for head in heads), flush=True)
    line = lines[-1]
    print(f"{line['name']:28}" + "".join(f"{'' if line.get(c) is None else line[c]:>10}" for c in columns), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here, after each case")
    parser.add_argument(
        "--shape", choices=("smollm2", *SHAPES), default="smollm2", help="model; shapes have random weights"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of which medians are taken, after one to warm up")
    parser.add_argument("--edits", type=int, nargs="*", help="sizes of stacks; 1 8 32 on a CPU, 1 32 128 on a GPU")
    parser.add_argument("--only", default="", help="cases whose name contains this, e.g. 'last 1'")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, on a busy machine"
    )
    parser.add_argument("--profile", action="store_true", help="show where a step's time goes instead of measuring it")
    args = parser.parse_args()
    args.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    args.pyreft = all(importlib.util.find_spec(name) for name in ("pyreft", "pyvene", "datasets"))
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    transformers.utils.logging.set_verbosity_error()
    clock = Clock(args.clock, args.device)
    model, tokenizer = make_model(args.shape, args.device, args.dtype)
    cuda = args.device.type == "cuda"
    report: dict[str, Any] = {
        "shape": args.shape, "dtype": str(args.dtype).removeprefix("torch."), "clock": args.clock,
        "device": torch.cuda.get_device_name(args.device) if cuda else processor(), "threads": args.threads,
        "rounds": args.rounds, "prompt_tokens": PROMPT, "target_tokens": TARGET, "rank": RANK,
        "versions": {
            "baft_intervention": baft_intervention.__version__, "torch": torch.__version__,
            "transformers": transformers.__version__, "python": platform.python_version(),
        },
        "cases": [],
    }  # fmt: skip
    for case in cases(model, args):
        if args.profile:
            print(profile(model, tokenizer, case))
            continue
        report["cases"].append(measure(model, tokenizer, case, args, clock))
        show(report["cases"])
        save(report, args.json)
    if args.shape == "smollm2" and args.only in "whole edit" and not args.profile:
        report["whole_edit"] = whole_edits(model, tokenizer, args, clock)
        print(json.dumps(report["whole_edit"], indent=2))
        save(report, args.json)


def save(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
