"""Several processes give what one gives: edits, the trainer, evaluation; models in several pieces; ranks that die.

The work is in ``distributed_worker.py``, whose functions run under torchrun on two ranks and here in one process.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import distributed_worker as worker
from baft_intervention.errors import ModelError
from baft_intervention.evaluation.protocols import stages_of
from baft_intervention.evaluation.records import read_lines
from baft_intervention.models.fingerprint import model_fingerprint
from baft_intervention.models.loading import load_model
from baft_intervention.models.structure import compute_device, is_sharded, split_reason
from baft_intervention.runtime import distributed
from baft_intervention.training.engine import make_engine
from baft_intervention.training.reference import ReferenceEngine
from edits import FRANCE, LEO, PROMPTS, config, tiny_editor
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.timeout(1200)  # starting processes takes its time on a crowded machine
HERE = Path(__file__).resolve().parents[1]
HAS_REFT = importlib.util.find_spec("pyreft") is not None
NAMES = ("stored", "joint", "summed", "failing", "sharded", "evaluated", *(["trainer"] if HAS_REFT else []))


def torchrun(folder: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """The worker on two ranks, each on one thread."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [*launcher, str(HERE / "distributed_worker.py"), str(folder), *names]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=900, check=False)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have done all of NAMES."""
    folder = tmp_path_factory.mktemp("two")
    run = torchrun(folder, *NAMES)
    assert run.returncode == 0, run.stderr[-3000:]
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As the ranks have it: more threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def ranks(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}.{rank}.pt", weights_only=False) for rank in range(2)]


def facts(value: Any) -> Any:
    """What is no tensor."""
    if isinstance(value, dict):
        return {key: facts(item) for key, item in value.items() if not isinstance(item, torch.Tensor)}
    return value


def check(two: list[dict[str, Any]], one: dict[str, Any], within: float = 1e-4) -> None:
    """Both ranks have the same bits; they are one process's to ``within``, and all else is equal."""
    flat = [worker.flat(found) for found in (*two, one)]
    assert flat[0].keys() == flat[1].keys() == flat[2].keys()
    for name, tensor in flat[2].items():
        assert torch.equal(flat[0][name], flat[1][name]), name
        assert torch.allclose(flat[0][name].float(), tensor.float(), rtol=0, atol=within), name
    assert facts(two[0]) == facts(two[1]) == facts(one)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_independent_edits_are_shared_out_and_rank_0_stores_them(both, tmp_path):
    two = ranks(both, "stored")
    assert two[0]["reported"] == ["france", "leo", "tower", "danielle", "country"]
    assert two[0]["ids"] == ["tower", "danielle", "country", "france"]
    check(two, worker.stored(tmp_path))
    for name in ("adapter", "copy"):
        editor = tiny_editor(tiny_model(), tiny_tokenizer())
        editor.load_adapter(both / name)
        assert [edit.id for edit in editor.edits] == two[0]["ids"]
        for key, tensor in editor.adapter.state().items():
            assert torch.equal(tensor, two[0]["state"][key]), key


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["joint", "summed"])
def test_one_edit_is_trained_by_all(both, tmp_path, name):
    check(ranks(both, name), getattr(worker, name)(tmp_path))


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_sharded_parameters_answer_as_whole_ones(both, tmp_path):
    two = ranks(both, "sharded")
    check(two, worker.sharded(tmp_path))
    assert two[0]["flags"]


@pytest.mark.slow
def test_an_error_on_one_rank_is_one_on_all_and_leaves_all_as_it_was(both):
    for rank, found in enumerate(ranks(both, "failing")):
        assert found["share"] == "this rank is out of order"
        assert ("another rank" in found["together"]) == (rank == 0)
        assert all(found[f"{way} {when}"] for way in ("share", "together") for when in ("left", "then"))


@pytest.mark.slow
@pytest.mark.reft
@pytest.mark.usefixtures("one_thread")
def test_the_trainer_takes_the_steps_of_one_process(both, tmp_path):
    two, one = ranks(both, "trainer"), worker.trainer(tmp_path)
    for name in ("whole", "accumulated"):
        losses = [found[name].pop("losses") for found in (*two, one)]
        assert losses[0] == pytest.approx(losses[2], abs=1e-3)  # they are rounded where they are logged
        saved = [found[name].pop("saved") for found in (*two, one)]
        assert saved[0] == saved[2] == ["interventions.safetensors"]
    check(two, one)


def lines(folder: Path) -> list[dict[str, Any]]:
    return list(read_lines(folder / "records.jsonl"))


def close(one: Any, other: Any, where: str = "") -> None:
    """Equal, numbers to 1e-4."""
    if isinstance(other, dict):
        assert one.keys() == other.keys(), where
        for key, value in other.items():
            close(one[key], value, f"{where}/{key}")
    elif isinstance(other, list):
        assert len(one) == len(other), where
        for i, value in enumerate(other):
            close(one[i], value, f"{where}/{i}")
    elif isinstance(other, float):
        assert one == pytest.approx(other, abs=1e-4), where
    else:
        assert one == other, where


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_records_are_those_of_one_process(both, tmp_path):
    worker.evaluated(tmp_path)
    for name, protocol in worker.PROTOCOLS.items():
        one, two = lines(tmp_path / name), lines(both / name)
        close(two, one)
        stages = stages_of(worker.make_requests(7), protocol)
        assert [record["index"] for record in two] == [i for stage in stages for i in stage.asked]
        times = list(read_lines(both / name / "timings.jsonl"))
        # each edit is counted once, though every rank makes it where the stream is one
        assert sum(t.get("edits", 0) for t in times) == 7
        assert sum(t.get("records", 0) for t in times if "score_seconds" in t) == len(one)


@pytest.mark.long
@pytest.mark.usefixtures("one_thread")
def test_a_rank_that_is_killed_costs_no_record(both, tmp_path):
    run = torchrun(tmp_path, "killed")
    assert run.returncode != 0
    assert f"Signal {signal.SIGKILL.value} " in run.stderr
    begun = lines(tmp_path / "killed" / "single")
    assert [record["index"] for record in begun] == [0, 1, 2, 3]  # two turns of two ranks
    worker.evaluated(tmp_path / "killed", "single")  # one process goes on
    close(lines(tmp_path / "killed" / "single"), lines(both / "single"))


# ------------------------------------------------------------------------------------------- one process


def test_one_process_is_all_there_is():
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    assert distributed.shard([1, 2, 3]) == [1, 2, 3]
    assert distributed.gather(lambda: 5) == [5]
    assert distributed.from_main(lambda: 5) == 5
    with distributed.processes():
        assert distributed.world_size() == 1


@pytest.mark.parametrize(("count", "world"), [(0, 2), (1, 2), (5, 2), (6, 4), (7, 3)])
def test_shares_come_together_in_order(count, world, monkeypatch):
    shares = []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(distributed, "world_size", lambda: world)
        shares.append(distributed.shard(list(range(count))))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert distributed.unshard(shares) == list(range(count))


# ------------------------------------------------------------------------------------------- models in several pieces


def offloaded(where: dict[str, Any], folder: Path, **options: Any) -> Any:
    """A tiny model of which accelerate has put parts elsewhere."""
    from accelerate import dispatch_model

    model = tiny_model()
    model.tie_weights()
    return dispatch_model(model, device_map=where, offload_dir=str(folder), force_hooks=True, **options)


DISK = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
DISK |= {f"model.layers.{n}": "cpu" if n < 2 else "disk" for n in range(4)}


@pytest.mark.parametrize("weighting", ["fact", "linear"])
def test_an_offloaded_model_is_edited_as_a_plain_one(tmp_path, caplog, weighting):
    pytest.importorskip("accelerate")
    changes = {"weighting": weighting, "layers": (1, 2), "engine": "auto"}
    plain = tiny_editor(tiny_model(), tiny_tokenizer(), **{**changes, "engine": "reference"})
    model = offloaded(DISK, tmp_path / "offload", main_device="cpu")
    assert split_reason(model) == "parts of it are offloaded"
    assert model_fingerprint(model) == model_fingerprint(plain.model)
    pieces = tiny_editor(model, tiny_tokenizer(), **changes)
    for editor in (plain, pieces):
        editor.edit([FRANCE, LEO])
    assert "offloaded; edits are trained by whole calls of it" in caplog.text
    for name, tensor in plain.adapter.state().items():
        assert torch.allclose(pieces.adapter.state()[name], tensor, atol=1e-5), name
    one, other = (editor.generate(list(PROMPTS), max_new_tokens=4) for editor in (plain, pieces))
    assert one == other
    assert all(p.requires_grad for p in model.parameters())
    pieces.save_pretrained(tmp_path / "adapter")
    plain.load_adapter(tmp_path / "adapter")  # made for the same weights
    assert [edit.id for edit in plain.edits] == ["france", "leo"]


def test_a_model_in_one_piece_keeps_the_fast_engine(caplog):
    model = tiny_model()
    assert split_reason(model) == ""
    assert not is_sharded(model)
    assert not isinstance(make_engine(model, tiny_tokenizer(), config(), (2,)), ReferenceEngine)
    assert caplog.text == ""


def test_a_model_without_values_is_refused():
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    with pytest.raises(ModelError, match="has no parameters with values; load the model with its weights"):
        compute_device(model)


def test_spread_loads_what_a_plain_load_does(tmp_path):
    pytest.importorskip("accelerate")
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, device="spread")
    assert model_fingerprint(model) == model_fingerprint(tiny_model())


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
@pytest.mark.parametrize("weighting", ["fact", "linear"])
def test_each_layers_part_lives_on_its_layers_device(tmp_path, weighting):
    pytest.importorskip("accelerate")
    far = "cuda:1" if torch.cuda.device_count() > 1 else "cpu"
    where = {name: far if name == "model.layers.3" else "cuda:0" for name in DISK}
    plain = tiny_editor(tiny_model(), tiny_tokenizer(), weighting=weighting, layers=(2, 3), engine="reference")
    pieces = tiny_editor(
        offloaded(where, tmp_path, main_device="cuda:0"), tiny_tokenizer(), weighting=weighting, layers=(2, 3)
    )  # fmt: skip
    for editor in (plain, pieces):
        editor.edit([FRANCE, LEO])
    assert plain.generate(list(PROMPTS), max_new_tokens=4) == pieces.generate(list(PROMPTS), max_new_tokens=4)
    assert {str(device) for _, device in pieces.adapter._stacks} >= {"cuda:0"}
