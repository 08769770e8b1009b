"""``baft inspect``: see why an edit acts on a prompt, or does not."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import AdapterError
from .console import OK, Output, can_show, one_line
from .options import add_adapter, add_chat, add_command, add_device, whole


def add(commands: Any) -> None:
    """The options of ``baft inspect``."""
    parser = add_command(
        commands,
        "inspect",
        run,
        summary="see why an edit acts on a text, or does not",
        description="Shows, token by token, how much each basis of an edit acts on a text, and says in one line why: whether\n"
        "the text names its subject, whether it asks about this subject, and whether it is about to state its relation rather\n"
        "than another one.",
        example='  baft inspect --adapter japan --prompt "The currency of Japan is the"\n'
        '  baft inspect --adapter japan --prompt "What is Japan\'s capital?" --chat --generate 20\n'
        '  baft inspect --adapter japan --prompt "Japan\'s capital is" --png why.png',
    )
    add_adapter(parser)
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to look at")
    add_chat(parser)
    parser.add_argument(
        "--generate",
        type=whole(0),
        default=0,
        metavar="N",
        help="let the model continue by N tokens, and show them too",
    )
    parser.add_argument("--png", metavar="FILE", help="also draw the heat maps into this file")
    parser.add_argument(
        "--top", type=whole(1), default=3, metavar="N", help="show the N edits that fit best; default: 3"
    )
    add_device(parser)


def run(args: argparse.Namespace, out: Output) -> int:
    """Show the heat maps of the edits that fit the text best."""
    from ..analysis.figures import to_plain
    from ..analysis.inspection import ASCII, BLOCKS, heat_lines, inspect_prompt
    from .adapters import check_system, conversation, open_editor, read_prompts

    check_system(args)
    [prompt] = read_prompts([args.prompt], None)
    if args.png is not None:
        from ..analysis.plots import png_path

        png_path(args.png)  # refused here, before the model is loaded
    editor = open_editor(args)
    if not editor.edits:
        raise AdapterError(
            f"{args.adapter} holds no edit; add one with: baft edit --adapter {args.adapter} --edits FILE"
        )
    asked = conversation(prompt, args.system) if args.chat else prompt
    found = inspect_prompt(editor, asked, top=args.top, generate=args.generate)
    if args.png is not None:
        from ..analysis.plots import draw_inspection, save

        save(draw_inspection(found), args.png)
    out.say(f"edits that act on {found.prompt!r}: {len(found.acting)} of {found.total}", style="bold")
    shades = BLOCKS if can_show(BLOCKS) else ASCII
    for view in found.edits:
        out.say()
        out.say(one_line(f"{view.id}: {view.prompt} -> {view.target} (block {view.layer})"), style="bold")
        out.say(f"  {view.reason}", style="green" if view.acts else "yellow")
        for line, acts in heat_lines(found, view, shades=shades):
            out.say(line, style="bold green" if acts else "")
    out.say()
    steps = ("0", "to 1/4", "to 1/2", "to 3/4", "to 1")
    legend = ", ".join(f"{shade} {step}" for shade, step in zip(shades, steps, strict=True))
    if editor.config.reads_tokens:
        out.say(f"weights: {legend}; * marks where an edit begins to act, + the tokens of its answer")
    else:
        out.say(f"weights: {legend}; * marks the edited token, the others show what the weight would be")
    if args.png is not None:
        out.say(f"drawn in {args.png}")
    out.result({"adapter": args.adapter, "png": args.png, **to_plain(found)})
    return OK
