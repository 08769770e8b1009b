"""A GGUF file becomes a folder that load_model takes."""

import pytest
import torch
import transformers

from baft_intervention.models.embedded import gguf_file
from baft_intervention.models.loading import load_model
from benchmarks.test_benchmarks import script


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="reads GGUF files as transformers 5 does")
def test_a_gguf_file_is_the_model_that_it_was_made_of(smollm2, tmp_path, capsys):
    path, _ = gguf_file("smollm2-135m")  # it has no output matrix: the embeddings serve
    assert script("from_gguf").main([str(path), "--out", str(tmp_path / "m")]) == 0
    assert "llama, 30 blocks of 576" in capsys.readouterr().out
    model, tokenizer = load_model(str(tmp_path / "m"))
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        found, expected = model(**prompt).logits, smollm2[0](**prompt).logits
    assert torch.allclose(found, expected, atol=1e-3)


def test_a_file_that_is_not_there_is_named(tmp_path, capsys):
    assert script("from_gguf").main([str(tmp_path / "no.gguf"), "--out", str(tmp_path)]) == 2
    assert "there is no file" in capsys.readouterr().err
