"""Evaluate an edited model with lm-evaluation-harness, on its tasks or your own.

    from lm_eval import simple_evaluate
    from baft_intervention.integrations.lm_eval import make_lm

    lm = make_lm(editor, batch_size=16)
    simple_evaluate(lm, tasks=["arc_easy"])
    with editor.enabled(False):
        simple_evaluate(lm, tasks=["arc_easy"])  # the unedited model, for comparison

The harness scores an answer by feeding context and answer as one sequence. The default gate finds out itself where an edit
acts, so the harness's own class for transformers models does. A gate that acts at positions must know where the context ends:
for it, the class here says so. Without, the edits would not act in multiple-choice tasks, and any harm would be hidden.

``pip install 'baft_intervention[harness]'`` installs the harness.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..editor.editor import BaftEditor
from ..errors import ConfigError
from ..models.tokenization import pad_rows, pad_token_id

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, ids of the context, ids of the answer


def make_lm(editor: BaftEditor, *, batch_size: int = 8, **options: Any) -> Any:
    """The editor's model as an ``lm_eval.api.model.LM`` that answers with the edits while they are enabled.

    Args:
        editor: model, tokenizer and edits; later edits take effect too.
        batch_size: sequences per batch.
        **options: arguments of ``lm_eval.models.huggingface.HFLM``: ``max_length``, ``add_bos_token``, …

    Raises:
        ConfigError: the batch size is below 1.
        ImportError: the harness is not installed.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size!r}; it must be a whole number of at least 1")
    from lm_eval.models import huggingface  # pyright: ignore[reportMissingImports]

    transformers_lm: Any = huggingface.HFLM

    class EditedLM(transformers_lm):
        def _loglikelihood_tokens(
            self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> list[tuple[float, bool]]:
            found = answer_log_probs(
                editor, [(c, a) for _, c, a in requests], batch_size=batch_size, max_length=self.max_length
            )
            for (texts, _, _), answer in zip(requests, found, strict=True):
                if texts is not None:  # None for a piece of a longer text
                    self.cache_hook.add_partial("loglikelihood", texts, answer)
            return found

    device = str(next(editor.model.parameters()).device)
    lm = transformers_lm if editor.config.reads_tokens else EditedLM
    return lm(
        pretrained=editor.model, tokenizer=editor.tokenizer, backend="causal", device=device, batch_size=batch_size, **options
    )  # fmt: skip


@torch.no_grad()
def answer_log_probs(
    editor: BaftEditor, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], *, batch_size: int, max_length: int
) -> list[tuple[float, bool]]:
    """``(log p(answer | context), whether the answer is the greedy one)`` for each pair.

    The logarithm is natural and summed over the answer's tokens.

    Args:
        editor: the model and its edits; those of a gate that acts at positions act in the contexts.
        pairs: token ids of context and answer, neither empty.
        batch_size: sequences per batch; the longest are scored first.
        max_length: tokens that the model reads; a longer sequence loses its beginning.
    """
    found: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
    device = next(editor.model.parameters()).device
    for begin in range(0, len(order), batch_size):
        batch = order[begin : begin + batch_size]
        whole = [[*pairs[i][0], *pairs[i][1]][-(max_length + 1) :] for i in batch]
        rows = [ids[:-1] for ids in whole]  # the last token of an answer is never an input
        lengths = [max(1, len(ids) - len(pairs[i][1])) for i, ids in zip(batch, whole, strict=True)]
        ids, mask = pad_rows(rows, pad_token_id(editor.tokenizer))
        with editor.adapter.prompts(lengths):
            logits = editor.model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        for k, i in enumerate(batch):
            answer = torch.tensor(whole[k][lengths[k] :], device=device)
            scores = logits[k, lengths[k] - 1 : len(rows[k])].float().log_softmax(-1)  # (n, V)
            likely = float(scores.gather(1, answer[:, None]).sum())
            found[i] = likely, bool((scores.argmax(-1) == answer).all())
    return found
