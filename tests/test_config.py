"""Settings: checked when made, the same after YAML and JSON, and errors that name the field."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from baft_intervention import BaftConfig
from baft_intervention.errors import ConfigError
from baft_intervention.models.structure import find_blocks, hidden_size

OTHER = BaftConfig(
    rank=3, layers=(4, -1), positions="f1+l2", weighting="mlp", weighting_options={"hidden": 5, "initial_weight": 0.25},
    allocation="joint",
    init="identity", schedule="constant", learning_rate=3e-3, weight_decay=0.1, steps=7,
    loss_target=0.5, ending="!", append_eos=True, ending_coefficient=0.6, augmentations=2,
    locality_coefficient=0.5, output_coefficient=0.75, balance_coefficient=0.25,
    max_grad_norm=2.0, seed=11, engine="reference",
)  # fmt: skip


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.json"])
@pytest.mark.parametrize("config", [BaftConfig(), OTHER], ids=["defaults", "all else"])
def test_a_file_gives_back_the_settings(tmp_path: Path, config: BaftConfig, name: str) -> None:
    config.save(tmp_path / name)
    assert BaftConfig.from_file(tmp_path / name) == config
    assert BaftConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    if name.endswith("json"):
        json.loads((tmp_path / name).read_text())


def test_the_test_has_no_setting_at_its_default() -> None:
    defaults = BaftConfig()
    for field in dataclasses.fields(BaftConfig):
        assert getattr(OTHER, field.name) != getattr(defaults, field.name), field.name


def test_settings_are_frozen_and_hold_copies() -> None:
    options = {"hidden": 3}
    config = BaftConfig(weighting="mlp", weighting_options=options)
    options["hidden"] = 0
    assert config.weighting_options == {"hidden": 3}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_an_empty_file_is_the_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n")
    assert BaftConfig.from_file(tmp_path / "a.yaml") == BaftConfig()
    (tmp_path / "b.yaml").write_text("rank: 4\nlearning_rate: 1\nlayers: 3\n")
    assert BaftConfig.from_file(tmp_path / "b.yaml") == BaftConfig(rank=4, learning_rate=1.0, layers=(3,))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 0}, "rank is 0; it must be a whole number of at least 1"),
        ({"rank": 1.5}, "rank is 1.5"),
        ({"rank": True}, "rank is True"),
        ({"steps": 0}, "steps is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "1e-2"}, "learning_rate is '1e-2'"),
        ({"max_grad_norm": 0}, "max_grad_norm is 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must be a number of at least 0"),
        ({"loss_target": float("inf")}, "loss_target is inf"),
        ({"locality_coefficient": -1}, "locality_coefficient is -1"),
        ({"output_coefficient": -1}, "output_coefficient is -1"),
        ({"balance_coefficient": False}, "balance_coefficient is False"),
        ({"allocation": "each"}, "allocation is 'each'; it must be one of per_edit, joint"),
        ({"init": "zero"}, "init is 'zero'; it must be one of identity, random"),
        ({"engine": "fast"}, "engine is 'fast'"),
        ({"append_eos": 1}, "append_eos is 1; it must be true or false"),
        ({"ending": " ."}, "ending is ' .'; it must be a text without spaces"),
        ({"ending": None}, "ending is None; it must be a text"),
        ({"layers": []}, r"layers is \[\]"),
        ({"layers": "20"}, "layers is '20'"),
        ({"layers": [1, "2"]}, "layers has '2'"),
        ({"layers": [True]}, "layers has True"),
        ({"weighting": "gate"}, "weighting is 'gate'; known networks"),
        ({"weighting": "linear", "weighting_options": {"hidden": 3}}, "do not fit the weighting 'linear'"),
        ({"weighting_options": 3}, "weighting_options is 3; it must be a mapping"),
        ({"weighting": "cosine", "allocation": "joint"}, "allocation is 'joint', but the edits of weighting 'cosine'"),
    ],
)
def test_a_value_out_of_range_is_named(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BaftConfig(**changes)
    with pytest.raises(ConfigError, match=f"^here: .*{match}"):
        BaftConfig.from_dict(changes, where="here: ")


def test_a_position_rule_is_checked_too() -> None:
    with pytest.raises(ConfigError, match="positions is 'first'; it must be one of last"):
        BaftConfig(positions="first")
    with pytest.raises(ConfigError, match="here: positions is 'first'"):
        BaftConfig.from_dict({"positions": "first"}, where="here: ")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("rnak: 3", "unknown setting 'rnak'; known settings: rank, layers"),
        ("- rank", "settings must be an object of fields, got list"),
        ("rank: [", "cannot be read as YAML or JSON"),
        ("!!python/object/apply:os.getcwd []", "cannot be read as YAML or JSON"),
        ("rank: 0", "rank is 0"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, match: str) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"bad.yaml: {match}"):
        BaftConfig.from_file(file)


def test_a_missing_or_binary_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        BaftConfig.from_file(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match=r"binary\.yaml: cannot be read"):
        BaftConfig.from_file(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("layers", "count", "expected"),
    [
        (None, 30, (27,)),
        (None, 1, (0,)),
        (None, 4, (3,)),
        ((20,), 30, (20,)),
        ((-1, 3), 30, (3, 29)),
        ((5, 2), 6, (2, 5)),
    ],
)
def test_layers_are_resolved(layers: tuple[int, ...] | None, count: int, expected: tuple[int, ...]) -> None:
    assert BaftConfig(layers=layers).resolved_layers(count) == expected


@pytest.mark.parametrize(
    ("layers", "match"),
    [((30,), "layers has 30; this model has blocks 0 to 29"), ((-31,), "has -31"), ((29, -1), "a block occurs twice")],
)
def test_a_block_that_the_model_has_not_is_named(layers: tuple[int, ...], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        BaftConfig(layers=layers).resolved_layers(30)


def test_every_field_has_a_check_and_says_whether_it_is_part_of_an_adapters_identity() -> None:
    for field in dataclasses.fields(BaftConfig):
        assert set(field.metadata) == {"check", "identity"}, field.name
    assert BaftConfig.identity_fields() == ("rank", "layers", "positions", "weighting", "weighting_options")


def test_fields_of_earlier_versions_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    """What ``adapter.json`` holds as ``config`` in adapters of version 0.1.0."""
    old = {
        **BaftConfig(rank=3).to_dict(),
        "bases": "free",
        "bank_size": 256,
        "order": "auto",
        "mini_batch": 0,
        "epochs": 0,
    }
    assert BaftConfig.from_dict(old) == BaftConfig(rank=3)
    assert not caplog.records
    other = {**old, "bases": "orthogonal", "bank_size": 0, "order": "depth", "mini_batch": 4}
    assert BaftConfig.from_dict(other, where="here: ") == BaftConfig(rank=3)
    assert "here: setting 'bases' is no longer there; its value 'orthogonal' is ignored" in caplog.text
    with pytest.raises(TypeError, match="bases"):
        BaftConfig(bases="free")  # pyright: ignore[reportCallIssue]


def test_what_follows_from_the_settings() -> None:
    assert BaftConfig(weighting="cosine").needs_bank
    assert not BaftConfig(weighting="linear").needs_bank
    assert str(BaftConfig(weighting="linear", positions="f1+l2").rule) == "f1+l2"
    assert str(BaftConfig(weighting="linear").rule) == "last"
    assert BaftConfig().reads_tokens
    with pytest.raises(ConfigError, match="positions is 'last', but the gate 'fact' decides itself where an edit acts"):
        BaftConfig(positions="last")


def test_the_defaults_of_a_model_are_written_out(any_model) -> None:
    config = BaftConfig.for_model(any_model, steps=7)
    blocks = len(find_blocks(any_model))
    assert config.layers == BaftConfig().resolved_layers(blocks)
    assert config.rank == min(BaftConfig().rank, hidden_size(any_model))
    assert config.steps == 7
    with pytest.raises(ConfigError, match="this model has blocks 0 to"):
        BaftConfig.for_model(any_model, layers=(blocks,))


def test_the_default_gate_of_earlier_versions_is_refused_with_a_way_out():
    with pytest.raises(ConfigError, match="japan: weighting is 'subject_relation'.*edit again.*adapter.json"):
        BaftConfig.from_dict({"weighting": "subject_relation", "positions": "last"}, where="japan: ")
