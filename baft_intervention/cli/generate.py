"""``baft generate``: ask an edited or an unedited model."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError
from .console import OK, Output
from .options import MODEL_HELP, add_chat, add_command, add_device, number_between, whole


def add(commands: Any) -> None:
    """The options of ``baft generate``."""
    parser = add_command(
        commands,
        "generate",
        run,
        summary="ask an edited (or an unedited) model",
        description="Continues each prompt, greedily unless --sample or --beams is given. Prompts come from --prompt, from a file\n"
        "with one a line, or from standard input.",
        example='  baft generate --adapter japan --prompt "The capital city of Japan is" --prompt "Sushi comes from"\n'
        "  baft generate --adapter japan --prompts questions.txt --compare --json\n"
        '  echo "The capital of France is" | baft generate --model smollm2-135m',
    )
    parser.add_argument("--adapter", metavar="DIR", help="an adapter folder, written by baft edit")
    parser.add_argument(
        "--model", metavar="M", help=f"unedited: {MODEL_HELP}; with --adapter: where its base model is now"
    )
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt; may be given several times")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts, one a line; - is standard input")
    add_chat(parser)
    parser.add_argument("--compare", action="store_true", help="show the unedited model's answer beside the edited one")
    parser.add_argument("--max-new-tokens", type=whole(1), default=32, metavar="N", help="default: 32")
    parser.add_argument("--batch-size", type=whole(1), default=32, metavar="N", help="prompts at once; default: 32")
    decoding = parser.add_argument_group("decoding")
    decoding.add_argument("--sample", action="store_true", help="draw tokens instead of taking the likeliest")
    above_zero = number_between(0.0, float("inf"), "a number above 0")
    decoding.add_argument("--temperature", type=above_zero, metavar="T", help="with --sample; default: 1")
    share = number_between(0.0, 1.0, "a number above 0, at most 1")
    decoding.add_argument("--top-p", type=share, metavar="P", help="with --sample: only the likeliest tokens of mass P")
    decoding.add_argument("--beams", type=whole(1), metavar="N", help="beam search with N beams")
    decoding.add_argument(
        "--count", type=whole(1), default=1, metavar="N", help="N answers a prompt (with --sample or --beams)"
    )
    decoding.add_argument("--seed", type=whole(0, 2**63), default=0, metavar="N", help="of --sample; default: 0")
    add_device(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the answer to each prompt."""
    import torch

    from .adapters import check_system, conversation, open_editor, read_prompts

    if args.adapter is None and args.model is None:
        raise ConfigError("give --adapter DIR (an edited model) or --model M (an unedited one)")
    check_system(args)
    if args.compare and args.adapter is None:
        raise ConfigError("--compare shows the unedited model beside the edited one; it needs --adapter")
    prompts = read_prompts(args.prompt or [], args.prompts)
    options = _decoding(args)
    asked: list[Any] = [conversation(prompt, args.system) for prompt in prompts] if args.chat else prompts
    editor = open_editor(args)

    def ask() -> list[list[str]]:
        torch.manual_seed(args.seed)
        found: list[Any] = editor.generate(
            asked, max_new_tokens=args.max_new_tokens, batch_size=args.batch_size, **options
        )
        return [texts if isinstance(texts, list) else [texts] for texts in found]

    answers = ask()
    unedited: list[list[str]] | None = None
    if args.compare:
        with editor.enabled(False):
            unedited = ask()
    results = []
    for i, prompt in enumerate(prompts):
        result: dict[str, Any] = {"prompt": prompt, "texts": answers[i]}
        if unedited is not None:
            result |= {"unedited": unedited[i], "same": unedited[i] == answers[i]}
        results.append(result)
    out.result(
        {
            "base_model": editor.model_name,
            "adapter": args.adapter,
            "edits": len(editor.edits),
            "options": {"max_new_tokens": args.max_new_tokens, "seed": args.seed, **options},
            "results": results,
        }
    )
    if unedited is not None:
        rows = [
            (prompt, old, new, "same" if old == new else "changed")
            for i, prompt in enumerate(prompts)
            for old, new in zip(unedited[i], answers[i], strict=True)
        ]
        out.table(("prompt", "unedited", "edited", ""), rows, mark=3)
    else:
        out.table(
            ("prompt", "answer"), [(p, text) for p, texts in zip(prompts, answers, strict=True) for text in texts]
        )
    return OK


def _decoding(args: argparse.Namespace) -> dict[str, Any]:
    if not args.sample and (args.temperature is not None or args.top_p is not None):
        raise ConfigError("--temperature and --top-p change how tokens are drawn; give --sample with them")
    if args.count > 1 and not args.sample and (args.beams or 1) < args.count:
        raise ConfigError(f"--count {args.count} answers a prompt need --sample, or --beams of at least as many")
    options: dict[str, Any] = {"do_sample": bool(args.sample)}
    if args.sample:
        options |= {"temperature": args.temperature or 1.0, "top_p": args.top_p or 1.0, "top_k": 0}
    if args.beams is not None:
        options["num_beams"] = args.beams
    if args.count > 1:
        options["num_return_sequences"] = args.count
    return options
