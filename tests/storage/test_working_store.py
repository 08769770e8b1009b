"""A folder of edits that survives: kills, cuts, flipped bits, full disks, two writers. Nothing committed is lost, nothing
corrupt is loaded, nothing is half-applied."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pickle
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baft_intervention.editor.editor import BaftEditor
from baft_intervention.errors import AdapterError, ConfigError, EditError, StoreError
from baft_intervention.requests import EditRequest
from baft_intervention.runtime.call_state import hook_block
from baft_intervention.storage.edit_log import HEADER_BYTES, encode, read_log
from baft_intervention.storage.exchange import read_directory
from baft_intervention.storage.locking import FolderLock
from baft_intervention.storage.working_store import Store, write_directory
from edits import BANK, FACTS, FRANCE, LEO, PROMPTS, TOWER, adapter_bytes, config, logits, tiny_editor, unchanged
from store_worker import request
from tiny import tiny_model, tiny_tokenizer

WORKER = Path(__file__).parents[1] / "store_worker.py"
SEALED = ["adapter.json", "adapter.safetensors"]


def editor_of(**changes: Any) -> BaftEditor:
    return tiny_editor(tiny_model("llama"), tiny_tokenizer(), **changes)


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def ids(folder: Path) -> list[str]:
    return [edit["id"] for edit in read_directory(folder)[1]["edits"]]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "adapter.lock"}


def loaded(folder: Path) -> BaftEditor:
    editor = editor_of()
    editor.load_adapter(folder)
    return editor


@pytest.fixture
def kept(tmp_path):
    """An editor whose edits live in a folder, and the folder."""
    editor = editor_of()
    editor.keep_in(tmp_path / "edits")
    yield editor, tmp_path / "edits"
    editor.close()


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """A folder as a killed process leaves it: no edit in the snapshot, three in the log."""
    folder = tmp_path_factory.mktemp("three") / "edits"
    editor = editor_of()
    editor.keep_in(folder)
    for fact in FACTS:
        editor.edit(fact)
    editor.close()
    return folder


@pytest.fixture
def copy(three, tmp_path) -> Path:
    """A copy of it to spoil."""
    place = tmp_path / "copy"
    place.mkdir()
    for name, data in contents(three).items():
        (place / name).write_bytes(data)
    return place


# ------------------------------------------------------------------------------------------ what is committed is there


def test_an_edit_is_on_the_disk_before_edit_returns(kept):
    editor, folder = kept
    for count, fact in enumerate(FACTS, 1):
        editor.edit(fact)
        assert ids(folder) == [f.id for f in FACTS[:count]]
    assert adapter_bytes(loaded(folder)) == adapter_bytes(editor)
    editor.undo("leo")
    assert ids(folder) == ["france", "tower"]
    assert adapter_bytes(loaded(folder)) == adapter_bytes(editor)


def test_every_edit_of_one_call_is_committed_as_it_is_finished(tmp_path, tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", engine="reference")  # one after the other
    editor.keep_in(tmp_path / "a")
    seen = []
    handle = hook_block(tiny_llama.model.layers[0], lambda _hidden: seen.append(tuple(ids(tmp_path / "a"))))
    editor.edit([FRANCE, LEO])
    handle.remove()
    assert list(dict.fromkeys(seen)) == [(), ("france",)]  # while the first, and while the second was trained
    assert ids(tmp_path / "a") == ["france", "leo"]


def test_a_later_value_of_a_prompt_wins_on_disk_in_one_step(kept, monkeypatch):
    editor, folder = kept
    editor.edit([FRANCE, LEO])
    records = len(read_log(folder / "adapter.log").records)
    editor.edit(dataclasses.replace(FRANCE, target_new="city", id="again"))
    assert len(read_log(folder / "adapter.log").records) == records + 1  # there is no moment with both, or with none
    assert ids(folder) == ["leo", "again"]
    assert adapter_bytes(loaded(folder)) == adapter_bytes(editor)


@pytest.mark.parametrize("taken", ["france", "leo", "tower"])
def test_undo_leaves_the_bytes_of_an_adapter_that_never_had_the_edit(tmp_path, taken):
    one, other = editor_of(), editor_of()
    one.keep_in(tmp_path / "one")
    other.keep_in(tmp_path / "other")
    for fact in FACTS:
        one.edit(fact)
        if fact.id != taken:
            other.edit(fact)
    one.generate(list(PROMPTS), max_new_tokens=1)  # the stacks are built
    one.undo(taken)
    for prompt in PROMPTS:
        assert torch.equal(logits(one.model, one.tokenizer, prompt), logits(other.model, other.tokenizer, prompt))
    for editor in (one, other):
        editor.compact()
        editor.close()
    assert names(tmp_path / "one") == SEALED
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


def test_a_folder_is_gone_on_with_as_if_it_had_never_been_closed(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    for fact in FACTS:
        with BaftEditor.open(tmp_path / "edits", tmp_path / "base", config(), bank_texts=BANK) as editor:
            editor.edit(fact)
    whole = BaftEditor.from_pretrained(tmp_path / "base", config(), bank_texts=BANK)
    whole.edit(FACTS[0])
    whole.edit(FACTS[1])
    whole.edit(FACTS[2])
    again = BaftEditor.from_pretrained(tmp_path / "edits")
    assert adapter_bytes(again) == adapter_bytes(whole)
    with BaftEditor.open(tmp_path / "edits") as editor:  # its base model is known
        editor.undo("leo")
    assert ids(tmp_path / "edits") == ["france", "tower"]
    with pytest.raises(AdapterError, match="rank = 4, but this editor has 3"):
        BaftEditor.open(tmp_path / "edits", config=config(rank=3))
    with pytest.raises(ConfigError, match="holds no adapter yet; name the model"):
        BaftEditor.open(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_compacted_folder_is_an_adapter_of_two_files(kept):
    editor, folder = kept
    editor.edit(FACTS)
    before = adapter_bytes(loaded(folder))
    editor.compact()
    assert names(folder) == ["adapter.json", "adapter.lock", "adapter.safetensors"]
    assert adapter_bytes(loaded(folder)) == before
    editor.undo("leo")
    editor.save_pretrained(folder)
    editor.close()
    assert names(folder) == SEALED
    assert ids(folder) == ["france", "tower"]


def test_a_log_that_is_mostly_about_edits_that_are_gone_is_compacted_by_itself(tmp_path, monkeypatch):
    monkeypatch.setattr("baft_intervention.editor.editor._SLACK", 0)
    editor, log = editor_of(weighting="constant", steps=1), tmp_path / "a" / "adapter.log"
    editor.keep_in(tmp_path / "a")
    sizes = []
    for i in range(10):
        editor.edit(dataclasses.replace(FRANCE, target_new=("Japan", "city")[i % 2], id=f"edit-{i}"))
        sizes.append(log.stat().st_size if log.exists() else 0)
    assert ids(tmp_path / "a") == ["edit-9"]
    assert sizes.count(0) > 1
    assert max(sizes) < 3 * editor.adapter.stored_bytes()
    for i in range(10):  # nothing of this is gone
        editor.edit(EditRequest(f"The name of number {i} is", "city"))
    assert log.stat().st_size > 9 * editor.adapter.stored_bytes() / 11


def test_an_editor_with_edits_takes_an_empty_folder_and_no_other(tmp_path, three):
    editor = editor_of()
    editor.edit(FRANCE)
    with unchanged(editor), pytest.raises(StoreError, match="this editor has 1 edits of its own; give another folder"):
        editor.keep_in(three)
    editor.keep_in(tmp_path / "a")
    assert ids(tmp_path / "a") == ["france"]
    with pytest.raises(StoreError, match="are already kept in .*a;"):
        editor.keep_in(tmp_path / "b")
    editor.close()
    assert names(tmp_path / "a") == SEALED


def test_loading_another_adapter_replaces_what_is_in_the_folder(kept, three):
    editor, folder = kept
    editor.edit(dataclasses.replace(TOWER, id="own"))
    editor.load_adapter(three)
    assert ids(folder) == ["france", "leo", "tower"]


# ------------------------------------------------------------------------------------------ what fails is not applied


def test_a_failing_call_leaves_folder_and_editor_as_they_were(tmp_path, tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", engine="reference")  # one after the other
    editor.keep_in(tmp_path / "a")
    editor.edit([TOWER, dataclasses.replace(LEO, target_new="capital", id="old leo")])
    before, seen = contents(tmp_path / "a"), []

    def spoil(hidden):
        seen.append(tuple(ids(tmp_path / "a")))
        return hidden * float("nan") if "france" in seen[-1] else None

    handle = hook_block(tiny_llama.model.layers[0], spoil)
    state = adapter_bytes(editor)
    with pytest.raises(EditError, match="edit 'leo'.*the loss is nan"):
        editor.edit([FRANCE, LEO])
    handle.remove()
    assert ("tower", "old leo", "france") in seen  # the first was on the disk
    assert contents(tmp_path / "a") == before
    assert adapter_bytes(editor) == state
    editor.edit(LEO)  # and it goes on
    assert ids(tmp_path / "a") == ["tower", "leo"]


def test_an_interrupt_keeps_the_finished_edits_on_disk_too(tmp_path, tiny_llama, tokenizer):
    editor = tiny_editor(tiny_llama, tokenizer, weighting="constant", engine="reference")
    editor.keep_in(tmp_path / "a")
    editor.edit(dataclasses.replace(LEO, target_new="capital", id="old leo"))

    def interrupt(*_):
        if "france" in [edit.id for edit in editor.edits]:
            raise KeyboardInterrupt

    handle = tiny_llama.model.layers[0].register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        editor.edit([FRANCE, LEO, TOWER])
    handle.remove()
    assert ids(tmp_path / "a") == [edit.id for edit in editor.edits] == ["old leo", "france"]


def test_an_interrupt_between_disk_and_memory_leaves_the_same_in_both(kept, monkeypatch):
    editor, folder = kept
    real = editor.adapter.add

    def interrupted(edit):
        if edit.id == "leo":  # it is on the disk by now
            raise KeyboardInterrupt
        real(edit)

    monkeypatch.setattr(editor.adapter, "add", interrupted)
    with pytest.raises(KeyboardInterrupt):
        editor.edit(FACTS)
    assert ids(folder) == [edit.id for edit in editor.edits] == ["france"]


def _full(*_args: Any) -> Any:
    raise OSError(errno.ENOSPC, "No space left on device")


class _Disk:
    """``os.write`` on a disk with so many bytes left: it writes what fits, then fails."""

    def __init__(self, left: int):
        self.left, self._write = left, os.write

    def __call__(self, file: int, data: Any) -> int:
        if self.left <= 0:
            _full()
        written = self._write(file, bytes(data[: self.left]))
        self.left -= written
        return written


@pytest.mark.parametrize("change", ["edit", "undo"])
@pytest.mark.parametrize(
    ("call", "disk"), [("write", _Disk(0)), ("write", _Disk(10)), ("write", _Disk(100)), ("fsync", _full)]
)
def test_a_full_disk_commits_nothing_and_loses_nothing(kept, monkeypatch, change, call, disk):
    editor, folder = kept
    editor.edit([FRANCE, LEO])
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, disk)
        with unchanged(editor), pytest.raises(StoreError, match=r"adapter.log: .*No space left.*not committed"):
            editor.edit(TOWER) if change == "edit" else editor.undo("leo")
    assert contents(folder) == before
    editor.edit(TOWER)  # somebody has made room
    assert ids(folder) == ["france", "leo", "tower"]
    assert adapter_bytes(loaded(folder)) == adapter_bytes(editor)


def test_what_could_not_even_be_cut_off_again_is_dropped(kept, monkeypatch, caplog):
    editor, folder = kept
    editor.edit([FRANCE, LEO])
    real = os.ftruncate

    def refuse(file: int, length: int) -> None:
        if os.fstat(file).st_size != length:
            raise OSError(errno.EIO, "Input/output error")
        real(file, length)

    monkeypatch.setattr(os, "write", _Disk(500))
    monkeypatch.setattr(os, "ftruncate", refuse)
    with unchanged(editor), pytest.raises(StoreError, match="not committed"):
        editor.edit(TOWER)
    monkeypatch.undo()
    assert ids(folder) == ["france", "leo"]
    assert "is cut off (500 of" in caplog.text
    editor.edit(TOWER)
    assert ids(folder) == ["france", "leo", "tower"]


@pytest.mark.parametrize(("call", "at"), [("fsync", 1), ("fsync", 2), ("fsync", 3), ("replace", 1)])
def test_compacting_on_a_full_disk_leaves_snapshot_and_log(kept, monkeypatch, call, at):
    editor, folder = kept
    editor.edit([FRANCE, LEO])
    editor.undo("france")
    state, real, calls = adapter_bytes(editor), getattr(os, call), []

    def fail(*args):
        calls.append(args)
        return _full() if len(calls) >= at else real(*args)

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(AdapterError, match="cannot be written.*No space left"):
        editor.compact()
    monkeypatch.undo()
    assert names(folder) == ["adapter.json", "adapter.lock", "adapter.log", "adapter.safetensors"]
    assert adapter_bytes(loaded(folder)) == state
    editor.edit(TOWER)
    editor.compact()
    assert ids(folder) == ["leo", "tower"]


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_trained(tmp_path, three, monkeypatch):
    real = os.open

    def refuse(path, flags, *args, **kwargs):
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, flags, *args, **kwargs)

    before = contents(three)
    monkeypatch.setattr(os, "open", refuse)
    editor = editor_of()
    with unchanged(editor), pytest.raises(StoreError, match="cannot be written to: Read-only file system; make it"):
        editor.keep_in(three)
    editor.load_adapter(three)  # reading needs no writing
    assert len(editor.edits) == 3
    monkeypatch.undo()
    assert contents(three) == before
    (tmp_path / "file").write_text("text")
    with pytest.raises(AdapterError, match="is a file"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="cannot be written to"):
        Store(tmp_path / "file" / "below")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a read-only folder")
def test_a_read_only_folder(copy):
    copy.chmod(0o555)
    with pytest.raises(StoreError, match="cannot be written to: Permission denied"):
        editor_of().keep_in(copy)
    copy.chmod(0o755)


# ------------------------------------------------------------------------------------------ two writers


def test_a_second_writer_is_refused_with_the_firsts_process_id(kept):
    editor, folder = kept
    editor.edit(FRANCE)
    before = contents(folder)
    second = editor_of()
    message = f"is open for writing in process {os.getpid()}; wait for it, or give another folder"
    with unchanged(second), pytest.raises(StoreError, match=message):
        second.keep_in(folder)
    second.edit(LEO)
    with pytest.raises(StoreError, match=message):
        second.save_pretrained(folder)
    assert contents(folder) == before
    assert adapter_bytes(loaded(folder)) == adapter_bytes(editor)  # readers are welcome
    editor.edit(LEO)
    editor.close()
    third = editor_of()
    third.keep_in(folder)
    assert [edit.id for edit in third.edits] == ["france", "leo"]
    third.close()


def test_a_writer_in_another_process_is_named_and_its_kill_frees_the_folder(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from baft_intervention.storage.locking import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[1])); print('locked', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        try:
            with pytest.raises(StoreError, match=f"in process {process.pid};"):
                FolderLock(tmp_path)
        finally:
            process.kill()
    assert names(tmp_path) == ["adapter.lock"]  # left behind, and worth nothing
    with FolderLock(tmp_path):
        pass
    assert names(tmp_path) == []


def test_a_lock_on_a_file_that_its_holder_removed_is_none(tmp_path, monkeypatch):
    """A second writer has opened the file, then the first lets go and a third comes: the second must not lock the old one."""
    import fcntl

    first, third, real = FolderLock(tmp_path), [], fcntl.flock

    def late(file, how):
        if not third:
            third.append(None)
            first.release()
            third[0] = FolderLock(tmp_path)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StoreError, match=f"in process {os.getpid()};"):
        FolderLock(tmp_path)
    third[0].release()


# ------------------------------------------------------------------------------------------ cuts and flipped bits


def test_a_log_cut_anywhere_gives_its_whole_records_and_says_what_it_dropped(three, copy, caplog):
    log = copy / "adapter.log"
    data = log.read_bytes()
    starts = [record.offset for record in read_log(log).records]
    whole = adapter_bytes(loaded(three))
    for length in sorted(
        {
            *starts,
            *(s + 1 for s in starts),
            *(s + HEADER_BYTES for s in starts),
            len(data) - 1,
            *range(0, len(data), 611),
        }
    ):
        log.write_bytes(data[:length])
        ends = [*starts[1:], len(data)]
        there = sum(end <= length for end in ends[1:])  # record 0 names the snapshot
        caplog.clear()
        assert ids(copy) == ["france", "leo", "tower"][:there]
        if length not in (0, *ends):
            assert (
                f"adapter.log: the last record, at byte {max(s for s in starts if s <= length)}, is cut off"
                in caplog.text
            )
    editor = editor_of()
    log.write_bytes(data[:-1])
    editor.keep_in(copy)
    assert [edit.id for edit in editor.edits] == ["france", "leo"]
    editor.edit(TOWER)  # over what was dropped
    editor.close()
    assert adapter_bytes(loaded(copy)) == whole


def test_zeros_that_a_power_cut_left_at_the_end_are_dropped(copy, caplog):
    with open(copy / "adapter.log", "ab") as file:
        file.write(bytes(5000))
    assert ids(copy) == ["france", "leo", "tower"]
    assert "is cut off (only zeros were written)" in caplog.text


def _regions(log: Path) -> dict[str, int]:
    """A byte in each region of each record of a log."""
    found = {}
    for record in read_log(log).records:
        payload = record.offset + HEADER_BYTES
        head = int.from_bytes(log.read_bytes()[payload : payload + 8], "little")
        places = {"mark": 0, "number": 4, "length": 12, "length, high": 19, "digest": 30, "crc": 53}
        for name, at in places.items():
            found[f"record {record.number}: {name}"] = record.offset + at
        found[f"record {record.number}: header length"] = payload
        found[f"record {record.number}: header"] = payload + 8 + head // 2
        if record.tensors:
            found[f"record {record.number}: tensors"] = payload + 8 + head + 100
    return found


def test_a_flipped_bit_in_any_region_of_the_log_is_an_error_that_names_the_place_and_the_mend(copy):
    log, editor = copy / "adapter.log", editor_of()
    data, regions = log.read_bytes(), _regions(copy / "adapter.log")
    offsets = [record.offset for record in read_log(log).records]
    assert len(offsets) == 4
    assert len(regions) == 4 * 8 + 3
    editor.edit(TOWER)
    with unchanged(editor):
        for region, at in regions.items():
            log.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
            offset = max(o for o in offsets if o <= at)
            with pytest.raises(StoreError, match=f"from byte {offset} to .* is damaged.*nothing was loaded") as caught:
                editor.load_adapter(copy)
            assert str(log) in str(caught.value), region
            assert f"baft recover --adapter {copy} --out NEW" in str(caught.value), region
            with pytest.raises(StoreError, match="is damaged"):
                Store(copy)
            assert log.read_bytes()[at] == data[at] ^ 1, f"{region}: evidence was destroyed"
    log.write_bytes(data)
    editor.load_adapter(copy)


@pytest.mark.parametrize("name", ["adapter.json", "adapter.safetensors"])
def test_a_flipped_bit_anywhere_in_the_snapshot_is_refused(copy, name):
    with Store(copy) as store:
        state, description = read_directory(copy)
        store.seal(state, description)
    data, chance = (copy / name).read_bytes(), random.Random(0)
    editor = editor_of()
    editor.edit(TOWER)
    with unchanged(editor):
        for at in sorted(chance.sample(range(len(data)), 60)):
            (copy / name).write_bytes(data[:at] + bytes([data[at] ^ (1 << chance.randrange(7))]) + data[at + 1 :])
            with contextlib.suppress(ValueError):  # a bit of white space in JSON may change nothing that is said
                if json.loads((copy / name).read_bytes()) == json.loads(data):
                    continue
            with pytest.raises((AdapterError, ConfigError)):
                editor.load_adapter(copy)


def test_each_of_two_damaged_neighbours_is_named_by_its_number(copy):
    log = copy / "adapter.log"
    data, records = bytearray(log.read_bytes()), read_log(log).records
    for record in records[1:3]:
        data[record.offset + HEADER_BYTES + 100] ^= 1
    log.write_bytes(bytes(data))
    contents = read_log(log)
    assert [record.number for record in contents.records] == [0, 3]
    assert [text.split(", ")[0] for text in contents.damage] == ["record 1", "record 2"]


def test_a_record_that_is_taken_out_or_put_twice_is_missed(copy):
    log = copy / "adapter.log"
    data = log.read_bytes()
    starts = [*(record.offset for record in read_log(log).records), len(data)]
    parts = [data[a:b] for a, b in itertools.pairwise(starts)]
    log.write_bytes(b"".join([parts[0], parts[1], parts[3]]))
    with pytest.raises(StoreError, match=f"record 2 is missing: byte {starts[2]} holds record 3"):
        read_directory(copy)
    log.write_bytes(b"".join([parts[0], parts[1], parts[1], parts[2], parts[3]]))
    with pytest.raises(StoreError, match="record 2 is missing: byte [0-9]+ holds record 1"):
        read_directory(copy)


def test_a_log_beside_another_snapshot_is_refused(copy, tmp_path):
    editor = editor_of()
    editor.edit(TOWER)
    other = editor.save_pretrained(tmp_path / "other")
    (other / "adapter.log").write_bytes((copy / "adapter.log").read_bytes())
    with pytest.raises(StoreError, match=r"does not belong to the adapter.json beside it"):
        read_directory(other)


def test_what_is_whole_can_be_recovered(copy, tmp_path, caplog):
    log = copy / "adapter.log"
    data = bytearray(log.read_bytes())
    second = read_log(log).records[2].offset
    data[second + 500] ^= 4
    log.write_bytes(bytes(data))
    with pytest.raises(StoreError, match="record 2, from byte .* 3 other records are intact"):
        read_directory(copy)
    state, description = read_directory(copy, recover=True)
    assert "record 2, from byte" in caplog.text
    assert "the changes it held are lost" in caplog.text
    write_directory(tmp_path / "new", state, description)
    one, other = loaded(tmp_path / "new"), editor_of()
    for fact in (FRANCE, TOWER):
        other.edit(fact)
    assert adapter_bytes(one) == adapter_bytes(other)
    assert log.read_bytes() == bytes(data)


HOSTILE = {
    "no change": {"snapshots": 1},
    "a list": [1, 2],
    "an edit that is not there": {"remove": ["paris"], "add": []},
    "an edit that is there": {"remove": [], "add": [{"id": "france"}]},
    "an edit without tensors": {"remove": [], "add": [{"id": "new"}]},
    "an edit without a name": {"remove": [], "add": [{}]},
    "names that are none": {"remove": 3, "add": None},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_record_that_makes_no_sense_is_refused_whatever_its_checksum(copy, name):
    log = copy / "adapter.log"
    log.write_bytes(log.read_bytes() + encode(4, HOSTILE[name], {}))
    editor = editor_of()
    with unchanged(editor), pytest.raises(AdapterError, match="adapter"):
        editor.load_adapter(copy)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((1, 4, 32), torch.nan), "not finite"),
        (torch.zeros(1, 2, 32), "do not fit together"),
        (None, "do not fit"),
    ],
)
def test_tensors_of_a_record_are_checked_like_those_of_a_snapshot(copy, tensor, message):
    log = copy / "adapter.log"
    last = read_log(log).records[-1]
    tensors = dict(last.tensors)
    if tensor is None:
        del tensors["layers.3.edits.rotation"]
    else:
        tensors["layers.3.edits.rotation"] = tensor
    log.write_bytes(log.read_bytes()[: last.offset] + encode(last.number, last.change, tensors))
    editor = editor_of()
    with unchanged(editor), pytest.raises(AdapterError, match=message):
        editor.load_adapter(copy)


def test_nothing_is_unpickled(copy, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a pickle was read")

    for module, name in ((torch, "load"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    assert len(loaded(copy).edits) == 3
    (copy / "adapter.log").write_bytes(b"\x80\x04\x95" + bytes(200) + b".")
    with pytest.raises(StoreError, match="is damaged"):
        read_directory(copy)


def test_a_log_that_is_a_link_is_refused(copy, tmp_path):
    (copy / "adapter.log").rename(tmp_path / "elsewhere.log")
    (copy / "adapter.log").symlink_to(tmp_path / "elsewhere.log")
    with pytest.raises(AdapterError, match=r"adapter.log is a link"):
        read_directory(copy)


# ------------------------------------------------------------------------------------------ dying at every moment


class Death(BaseException):
    """Stands for the end of the process: nothing that the library does afterwards reaches the disk."""


def _dies_at(monkeypatch, moment: int, calls: list[str]) -> None:
    """Count the calls that change the disk; at ``moment`` and from then on they fail, a write after the half of it."""
    for module, name in (
        (os, "write"),
        (os, "fsync"),
        (os, "ftruncate"),
        (os, "replace"),
        (os, "rename"),
        (os, "unlink"),
        (Path, "unlink"),
    ):
        real = getattr(module, name)

        def call(*args, _real=real, _name=name, **kwargs):
            calls.append(_name)
            if len(calls) == moment + 1 and _name == "write":
                _real(args[0], bytes(args[1][: len(args[1]) // 2]))
            if len(calls) > moment:
                raise Death
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, call)


def test_dying_before_or_in_any_write_leaves_the_edits_before_or_after(three, tmp_path, monkeypatch):
    """Not by chance but at each call that reaches the disk: of an edit, an undo, and a compaction."""
    steps = {
        "edit": (
            lambda e: e.edit(dataclasses.replace(FRANCE, target_new="city", id="again")),
            ["leo", "tower", "again"],
        ),
        "undo": (lambda e: e.undo("leo"), ["france", "tower"]),
        "compact": (lambda e: e.compact(), ["france", "leo", "tower"]),
    }
    for name, (step, after) in steps.items():
        moment, finished = 0, False
        while not finished:
            place = tmp_path / f"{name}-{moment}"
            place.mkdir()
            for file, data in contents(three).items():
                (place / file).write_bytes(data)
            editor, calls = editor_of(), []
            editor.keep_in(place)
            with monkeypatch.context() as patch:
                _dies_at(patch, moment, calls)
                try:
                    step(editor)
                    finished = len(calls) <= moment
                except Death:
                    pass
            editor._store._lock.release()  # as the kernel does
            found = ids(place)
            assert found in (["france", "leo", "tower"], after), f"{name}, moment {moment}: {found}"
            again = editor_of()
            again.keep_in(place)
            assert [edit.id for edit in again.edits] == found
            again.edit(dataclasses.replace(TOWER, target_new="city", id="last"))
            again.compact()
            again.close()
            assert names(place) == SEALED
            assert ids(place) == [i for i in found if i != "tower"] + ["last"]
            moment += 1
        assert moment > 2
        assert found == after


def _histories(begin: int, there: dict[int, str]) -> Iterator[dict[int, str]]:
    """What the worker's folder holds before its first step and after each: number of the edit -> its prompt, in order."""
    yield dict(there)
    for number in itertools.count(begin):
        prompt = request(number).prompt
        there = {n: p for n, p in there.items() if p != prompt} | {number: prompt}
        yield there
        if number % 7 == 6:
            there = {n: p for n, p in there.items() if n != number}
            yield there
        if number % 5 == 4:
            yield there


def _kill_at_random(folder: Path, kills: int, chance: random.Random) -> int:
    """Start the worker and kill it, again and again: what it said is committed is there, and at most one step more.

    Returns how many steps were on the disk that the worker had not yet told of.
    """
    ahead, there = 0, {}
    for _ in range(kills):
        with subprocess.Popen(
            [sys.executable, str(WORKER), str(folder), "1000"], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        ) as process:  # fmt: skip
            lines = [process.stdout.readline() for _ in range(chance.randrange(1, 12))]
            time.sleep(chance.random() * 0.05)
            process.kill()
            lines += process.stdout.readlines()
        assert lines[0] == "open\n"
        told = len(lines) - 1
        states = list(itertools.islice(_histories(1 + max(there, default=-1), there), told + 2))
        found = [int(name.removeprefix("edit-")) for name in ids(folder)] if (folder / "adapter.json").exists() else []
        assert found in (list(states[told]), list(states[told + 1])), f"told of {told} steps"
        there = states[told] if found == list(states[told]) else states[told + 1]
        ahead += there is not states[told]
    editor, other = (tiny_editor(tiny_model("llama"), tiny_tokenizer(), weighting="cosine", steps=2) for _ in range(2))
    editor.keep_in(folder)
    for number in there:
        other.edit(request(number))
    expected = other.adapter.state()
    assert editor.adapter.state().keys() == expected.keys()
    for name, tensor in editor.adapter.state().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=1e-4)
    editor.close()
    return ahead


def test_kills_at_random_moments_lose_at_most_the_edit_in_work(tmp_path):
    _kill_at_random(tmp_path / "edits", 2, random.Random())


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_fifty_kills_at_random_moments(tmp_path):
    _kill_at_random(tmp_path / "edits", 50, random.Random())
