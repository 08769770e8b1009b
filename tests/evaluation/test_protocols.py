"""Protocols: what is applied and asked when, and runs that are cut and go on."""

import json
import random

import pytest

from baft_intervention.data.load import case_indices
from baft_intervention.errors import ConfigError, DataError, EditError
from baft_intervention.evaluation import protocols
from baft_intervention.evaluation.edited import EditCost, EditedModel
from baft_intervention.evaluation.methods import Method, make_method
from baft_intervention.evaluation.protocols import Generation, ProtocolSettings, run_protocol, stages_of
from baft_intervention.evaluation.records import RecordFile, dump_line, read_lines
from baft_intervention.evaluation.scoring import Scorer
from baft_intervention.models.fingerprint import model_fingerprint
from baft_intervention.requests import EditRequest
from evaluation.helpers import make_requests
from tiny import tiny_model, tiny_tokenizer

FAST = {"layer": 2, "learning_rate": 2e-2, "steps": 3}
SHORT = Generation(fluency_tokens=6, margin=2)


def run(folder, protocol, requests=None, method=None, progress=False):
    model, tokenizer = tiny_model(), tiny_tokenizer()
    before = model_fingerprint(model)
    try:
        run_protocol(
            Scorer(model, tokenizer), method or make_method("ft-m", FAST), requests or make_requests(5), protocol, folder,
            progress=progress,
        )  # fmt: skip
    finally:
        assert model_fingerprint(model) == before
    return (folder / "records.jsonl").read_bytes()


class Watched(EditedModel):
    """Notes what happens, and edits nothing."""

    def __init__(self, model, tokenizer, log):
        super().__init__(model, tokenizer)
        self.log = log

    def apply(self, requests):
        self.log.append("+" + ",".join(r.id for r in requests))
        if any(r.id == "bad" for r in requests):
            raise EditError("no")
        return EditCost(1, 0.5, 2, 8)

    def reset(self):
        self.log.append("reset")

    def restore(self):
        self.log.append("restore")


class Watching(Method):
    name = "watching"

    def __init__(self, log):
        object.__setattr__(self, "log", log)

    def attach(self, model, tokenizer):
        return Watched(model, tokenizer, self.log)


def watch(tmp_path, protocol, requests, monkeypatch):
    log = []
    ask = protocols._Run._ask

    def noted(self, edited, stage, group):
        log.append("?" + ",".join(self.requests[i].id for i in group))
        return ask(self, edited, stage, group)

    monkeypatch.setattr(protocols._Run, "_ask", noted)
    run(tmp_path, protocol, requests, Watching(log))
    return log


def test_single_takes_each_edit_off(tmp_path, monkeypatch):
    log = watch(tmp_path, ProtocolSettings("single"), make_requests(2), monkeypatch)
    assert log == ["reset", "+r0", "?r0", "reset", "+r1", "?r1", "restore"]


def test_batched_asks_after_the_batch(tmp_path, monkeypatch):
    log = watch(tmp_path, ProtocolSettings("batched", batch_size=2), make_requests(3), monkeypatch)
    assert log == ["reset", "+r0,r1", "?r0,r1", "reset", "+r2", "?r2", "restore"]


def test_sequential_immediate_asks_right_after(tmp_path, monkeypatch):
    log = watch(tmp_path, ProtocolSettings("sequential_immediate"), make_requests(2), monkeypatch)
    assert log == ["+r0", "?r0", "+r1", "?r1", "restore"]


def test_sequential_final_asks_at_checkpoints_in_one_pass(tmp_path, monkeypatch):
    log = watch(tmp_path, ProtocolSettings("sequential_final", checkpoints=(1, 3, 100)), make_requests(4), monkeypatch)
    assert log == ["+r0", "?r0", "+r1", "+r2", "?r0,r1,r2", "+r3", "?r0,r1,r2,r3", "restore"]
    lines = list(read_lines(tmp_path / "records.jsonl"))
    assert [(r["checkpoint"], r["index"]) for r in lines] == [
        (1, 0),
        *((3, i) for i in range(3)),
        *((4, i) for i in range(4)),
    ]


def test_requests_of_one_case_are_applied_together(tmp_path, monkeypatch):
    plain = make_requests(5)
    requests = [
        EditRequest(r.prompt, r.target_new, id=r.id, case_id=c)
        for r, c in zip(plain, ("a", "a", "", "b", "b"), strict=True)
    ]
    assert case_indices(requests) == [(0, 1), (2,), (3, 4)]
    log = watch(tmp_path, ProtocolSettings("single"), requests, monkeypatch)
    assert [x for x in log if x[0] in "+?"] == ["+r0,r1", "?r0,r1", "+r2", "?r2", "+r3,r4", "?r3,r4"]
    assert [s.asked for s in stages_of(requests, ProtocolSettings("batched", batch_size=2))] == [(0, 1), (2,), (3, 4)]
    assert [s.checkpoint for s in stages_of(requests, ProtocolSettings("sequential_final", checkpoints=(1,)))] == [2, 5]


def test_a_failed_edit_is_recorded_and_the_run_goes_on(tmp_path, caplog):
    good = make_requests(2)
    requests = [good[0], EditRequest("He works as", "Leo", id="bad"), good[1]]
    run(tmp_path, ProtocolSettings("single"), requests, Watching([]))
    lines = list(read_lines(tmp_path / "records.jsonl"))
    assert [r["error"] for r in lines] == [None, "EditError: no", None]
    assert lines[1]["metrics"]["reliability"] is not None  # the unedited model's
    assert "no" in caplog.text


def test_a_model_that_cannot_be_scored_is_recorded(tmp_path, monkeypatch):
    def broken(self, edited, requests):
        raise EditError("the edited model's logits are not finite")

    monkeypatch.setattr(Scorer, "score", broken)
    run(tmp_path, ProtocolSettings("single", generation=SHORT), make_requests(2))
    lines = list(read_lines(tmp_path / "records.jsonl"))
    assert [(r["metrics"], r["error"].split(":")[0]) for r in lines] == [({}, "EditError")] * 2


def test_records_hold_metrics_probes_texts_and_costs(tmp_path):
    run(tmp_path, ProtocolSettings(generation=SHORT), make_requests(2))
    first, second = read_lines(tmp_path / "records.jsonl")
    assert {"reliability", "generality", "locality", "unrelated", "portability", "generation_em", "fluency"} <= set(
        first["metrics"]
    )
    assert len(first["probes"]) == 8
    assert set(first["generated"]) == {"The capital of Japan is", "So: The capital of Japan is"}
    assert (first["id"], first["index"], first["checkpoint"], first["error"]) == ("r0", 0, None, None)
    assert first["steps"] == 3
    assert first["trained_parameters"] == 32 * 64
    assert second["id"] == "r1"
    times = list(read_lines(tmp_path / "timings.jsonl"))
    assert {"setup_seconds", "edit_seconds", "score_seconds", "prior_seconds"} <= {k for t in times for k in t}
    assert not any("seconds" in k for k in first)


def test_generation_can_be_left_out(tmp_path):
    run(tmp_path, ProtocolSettings(generation=Generation(answers=False, fluency_tokens=0)), make_requests(1))
    [line] = read_lines(tmp_path / "records.jsonl")
    assert line["generated"] == {}
    assert not any(name.startswith("generation") or name == "fluency" for name in line["metrics"])


def test_fluency_on_every_nth_record(tmp_path):
    run(
        tmp_path,
        ProtocolSettings(generation=Generation(answers=False, fluency_tokens=8, fluency_every=2)),
        make_requests(4),
    )
    assert ["fluency" in r["metrics"] for r in read_lines(tmp_path / "records.jsonl")] == [True, False, True, False]


PROTOCOLS = {
    "single": ProtocolSettings("single", generation=SHORT),
    "batched": ProtocolSettings("batched", batch_size=2, generation=SHORT),
    "sequential_immediate": ProtocolSettings("sequential_immediate", generation=SHORT),
    "sequential_final": ProtocolSettings("sequential_final", checkpoints=(1, 3), generation=SHORT),
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_same_seed_same_bytes(tmp_path, name):
    assert run(tmp_path / "a", PROTOCOLS[name]) == run(tmp_path / "b", PROTOCOLS[name])


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_run_killed_at_three_moments_gives_the_same_file(tmp_path, name, monkeypatch):
    """Killed in the middle of a write, in the middle of training, and behind a group: always the same bytes at the end."""
    monkeypatch.setattr(protocols, "_GROUP", 2)
    whole = run(tmp_path / "whole", PROTOCOLS[name])
    folder = tmp_path / "cut"
    rng = random.Random(name)
    append, apply = RecordFile.append, type(make_method("ft-m", FAST).attach(tiny_model(), tiny_tokenizer())).apply

    class Killed(BaseException):
        pass

    def tear(self, records):
        if len(self) + len(records) <= wait:
            append(self, records)
            return
        data = b"".join(dump_line(r) for r in records)
        self._file.write(data[: rng.randrange(len(data))])
        self._file.flush()
        raise Killed

    def stop(self, requests):
        nonlocal wait
        if wait <= 0:
            raise Killed
        wait -= 1
        return apply(self, requests)

    for moment, patch in ((0, tear), (1, stop), (2, tear)):
        lines = (folder / "records.jsonl").read_bytes().count(b"\n") if folder.exists() else 0
        wait = rng.randrange(3) if patch is stop else min(lines + 1 + moment, whole.count(b"\n") - 1)
        with monkeypatch.context() as patched:
            if patch is stop:
                patched.setattr("baft_intervention.evaluation.methods.weights._FineTunedModel.apply", stop)
            else:
                patched.setattr(RecordFile, "append", tear)
            with pytest.raises(Killed):
                run(folder, PROTOCOLS[name])
        assert (folder / "records.jsonl").read_bytes() != whole
    assert run(folder, PROTOCOLS[name]) == whole
    assert run(folder, PROTOCOLS[name]) == whole  # a finished run has nothing to do


def test_applying_again_is_told_apart_in_the_times(tmp_path, monkeypatch):
    monkeypatch.setattr(protocols, "_GROUP", 1)
    protocol = PROTOCOLS["sequential_immediate"]
    run(tmp_path, protocol)
    path = tmp_path / "records.jsonl"
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:3]))
    (tmp_path / "timings.jsonl").unlink()
    run(tmp_path, protocol)
    again = [t["again"] for t in read_lines(tmp_path / "timings.jsonl") if "edit_seconds" in t]
    assert again == [True, True, True, False, False]


def test_a_file_of_another_run_is_not_continued(tmp_path):
    (tmp_path / "records.jsonl").write_bytes(b'{"checkpoint": 7, "index": 3}\n')
    with pytest.raises(DataError, match=r"records.jsonl:1: record \[7, 3\] where \[None, 0\] was expected"):
        run(tmp_path, ProtocolSettings())


def test_a_torn_line_in_the_middle_is_done_again_from_there(tmp_path):
    whole = run(tmp_path, PROTOCOLS["single"])
    lines = whole.splitlines(keepends=True)
    (tmp_path / "records.jsonl").write_bytes(lines[0] + b"\0\0\0\n" + lines[2])
    assert run(tmp_path, PROTOCOLS["single"]) == whole


def test_lines_are_rounded_and_sorted():
    assert (
        dump_line({"b": 1 / 3, "a": [1.0, None], "c": {"x": 1e-12 / 3}})
        == b'{"a": [1.0, null], "b": 0.33333333, "c": {"x": 3.3333333e-13}}\n'
    )
    with pytest.raises(ValueError):
        dump_line({"a": float("nan")})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "serial"}, "must be one of single"),
        ({"batch_size": 0}, "at least 1"),
        ({"checkpoints": (0,)}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ProtocolSettings(**settings)


def test_progress_shows_records(tmp_path, capsys):
    run(tmp_path, ProtocolSettings(generation=SHORT), make_requests(2), progress=True)
    assert "2/2" in capsys.readouterr().err


def test_multi_hop_is_asked_where_the_case_is_complete(tmp_path):
    from baft_intervention.requests import Probe

    hop = Probe("The name of the city is", "portability", ("Rome", "city"), group="multi_hop")
    requests = [
        EditRequest("He works as", "Leo", id="1", case_id="a"),
        EditRequest("He was", "Leo", id="2", case_id="a", probes=(hop,)),
    ]
    run(tmp_path, ProtocolSettings(generation=SHORT), requests)
    lines = list(read_lines(tmp_path / "records.jsonl"))
    assert "multi_hop" not in lines[0]["metrics"]
    assert lines[1]["metrics"]["multi_hop"] in (0.0, 1.0)
    assert json.dumps(lines[1]["generated"]).count("The name of the city is") == 1
