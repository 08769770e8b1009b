"""The relation encoder of a model: shipped for the built-in one, else trained once and cached.

Training takes the texts of :mod:`.relation_texts`, reads them with the model, and brings the same relation in other words
together and everything else apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..environment import cache_folder
from ..gates.relation_encoder import WINDOW, RelationEncoder, standardise
from ..models.fingerprint import model_fingerprint
from ..models.structure import hidden_size
from ..progress import progress_bar
from ..runtime.distributed import from_main, is_main
from ..runtime.representations import read_blocks
from .bank import without_hooks
from .relation_texts import RelationText, relation_texts
from .tensor_cache import digest, load_tensors, store_tensors

SHIPPED = Path(__file__).with_name("encoders")
_FORMAT = 2  # raise it when texts or training change: encoders are then trained again
_MOST_TOKENS = 160  # of a text; a longer one is cut off
_MOST_NUMBERS = 1.5e9  # of all tokens' states; of a wider model fewer relations are read
STEPS = 600
HELD_OUT = 12  # one relation in so many takes no part in the training, and calibrates


@dataclass(frozen=True)
class ReadTexts:
    """Texts with the representations of all of their tokens.

    Args:
        texts: N texts.
        states: ``(tokens, L, d)`` in half precision, text after text; standardised.
        lengths: ``(N,)`` tokens of each text.
        subject: ``(N,)`` column of the last token of the last mention of its subject; -1 where it is not found.
        mean, scale: ``(L, d)`` of the states before they were standardised.
    """

    texts: Sequence[RelationText]
    states: Tensor
    lengths: Tensor
    subject: Tensor
    mean: Tensor
    scale: Tensor

    @property
    def begins(self) -> Tensor:
        return self.lengths.cumsum(0) - self.lengths


def get_encoder(model: nn.Module, tokenizer: Any, layers: Sequence[int], *, cache: bool = True) -> RelationEncoder:
    """The encoder of a base model: the package's own, the cached one, or a new one.

    The model is read in eval mode and without hooks, so edits that act on it do not matter.

    Args:
        layers: the blocks that it reads, see :func:`~baft_intervention.gates.relation_encoder.read_layers`.
        cache: read and write ``encoders`` in :func:`~baft_intervention.environment.cache_folder`. A folder that cannot be
            written is logged, and the encoder is trained again next time.
    """
    name = f"{digest([_FORMAT, model_fingerprint(model), len(tokenizer), list(layers)])[:24]}.safetensors"
    folders = [SHIPPED, *([cache_folder() / "encoders"] if cache else [])]
    # all processes train the encoder or none does: a sharded model needs every one of them
    encoder = RelationEncoder()
    found = (load_tensors(folder / name, encoder.state_dict()) for folder in folders)
    state = from_main(lambda: next((each for each in found if each is not None), None))
    if state is None:
        with without_hooks(model):
            own = new_encoder(model, tokenizer, layers).state_dict()
        state = from_main(lambda: {n: t.half() for n, t in own.items()})
        if cache and is_main():
            store_tensors(folders[-1] / name, state)
    encoder.load_state_dict({n: t.float() for n, t in state.items()})
    return encoder


def new_encoder(model: nn.Module, tokenizer: Any, layers: Sequence[int], *, steps: int = STEPS) -> RelationEncoder:
    """Read the texts with the model and train an encoder on them."""
    width = hidden_size(model)
    texts = relation_texts(tokenizer)
    tokens = sum(min(len(tokenizer(text.text)["input_ids"]), _MOST_TOKENS) for text in texts[::50]) * 50
    share = min(1.0, _MOST_NUMBERS / (tokens * len(layers) * width))
    if share < 1.0:
        texts = relation_texts(tokenizer, limit=int(share * max(text.relation for text in texts)))
    with progress_bar(len(texts), "reading how people ask (once a model)", "text") as bar:
        read = read_texts(model, tokenizer, texts, layers, done=bar.update)
    encoder = RelationEncoder().build(width)
    encoder.mean, encoder.scale = read.mean, read.scale
    with progress_bar(steps, "training the relation encoder (once a model)", "step") as bar:
        train_encoder(encoder, read, steps=steps, done=bar.update)
    return encoder


@torch.no_grad()
def read_texts(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[RelationText],
    layers: Sequence[int],
    *,
    done: Callable[[int], object] = lambda rows: None,
) -> ReadTexts:
    """Read all tokens of the texts with the model."""
    rows, subject = [], []
    for text in texts:
        encoded = tokenizer(text.text, return_offsets_mapping=True)
        rows.append(list(encoded["input_ids"])[:_MOST_TOKENS])
        end = text.text.rfind(text.subject) + len(text.subject)
        ending = [i for i, (a, b) in enumerate(encoded["offset_mapping"][:_MOST_TOKENS]) if a < end <= b]
        subject.append(ending[-1] if text.subject and text.subject in text.text and ending else -1)
    lengths = torch.tensor([len(row) for row in rows])
    begins = lengths.cumsum(0) - lengths
    states = torch.empty(int(lengths.sum()), len(layers), hidden_size(model), dtype=torch.half)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for piece in (order[i : i + 256] for i in range(0, len(order), 256)):
        found = read_blocks(
            model,
            tokenizer,
            [rows[i] for i in piece],
            [range(len(rows[i])) for i in piece],
            sorted(set(layers)),
            done=done,
        )
        for k, i in enumerate(piece):
            for number, layer in enumerate(layers):
                # a text's first token is huge in many models, beyond half precision
                states[begins[i] : begins[i] + lengths[i], number] = found[layer][k].clamp(-6e4, 6e4).half()
    first = torch.zeros(len(states), dtype=torch.bool)
    first[begins] = True
    sample = states[~first][::7].float()
    mean, scale = sample.mean(0), sample.std(0) + 1e-3
    for piece in torch.arange(len(states)).split(20_000):
        states[piece] = standardise(states[piece], mean, scale).half()
    return ReadTexts(texts, states, lengths, torch.tensor(subject), mean, scale)


@torch.no_grad()
def encode_rows(
    model: nn.Module, tokenizer: Any, encoder: RelationEncoder, layers: Sequence[int], rows: Sequence[Sequence[int]]
) -> Tensor:
    """``z (N, k)`` at the last token of each row of ids."""
    found = read_blocks(model, tokenizer, rows, [range(len(row)) for row in rows], sorted(set(layers)))
    x = torch.stack([encoder.standardised(n, torch.cat(found[layer])) for n, layer in enumerate(layers)], 1)
    lengths = torch.tensor([len(row) for row in rows])
    return _encode(encoder, x, lengths, torch.arange(len(rows)), lengths - 1)[0]


def encode_at(
    encoder: RelationEncoder,
    read: ReadTexts,
    index: Tensor,
    rows: Tensor,
    columns: Tensor,
    *,
    dropout: float = 0.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``z (P, k)``, ``s (P,)`` and ``log q (P, W)`` at the tokens ``columns (P,)`` of the texts ``index[rows]``."""
    lengths, begins = read.lengths[index], read.begins[index]
    own = lengths.cumsum(0) - lengths  # where each text begins among those that are read here
    flat = torch.arange(int(lengths.sum())) - (own - begins).repeat_interleave(lengths)
    x = read.states[flat].float()
    if dropout:
        x = x * (torch.rand(x.shape, generator=generator) >= dropout) / (1.0 - dropout)
    return _encode(encoder, x, lengths, rows, columns)


def _encode(
    encoder: RelationEncoder, x: Tensor, lengths: Tensor, rows: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The encoder at the tokens ``columns (P,)`` of the texts ``rows (P,)``; ``x (tokens, L, d)`` standardised, text after text."""
    begins = (lengths.cumsum(0) - lengths)[rows]
    memory = torch.stack([encoder.memory(n, x[:, n]) for n in range(encoder.pooled)]).sum(0)
    y = x[begins + columns]
    glance = torch.stack([encoder.glance(n, y[:, n]) for n in range(encoder.pooled, x.shape[1])]).sum(0)
    age = torch.arange(min(WINDOW, int(lengths.max())))
    place = columns.unsqueeze(1) - age
    return encoder(glance, memory[begins.unsqueeze(1) + place.clamp(min=0)], age.float().expand_as(place), place > 0)


def train_encoder(
    encoder: RelationEncoder,
    read: ReadTexts,
    *,
    steps: int = 600,
    relations: int = 36,
    wordings: int = 6,
    learning_rate: float = 2e-3,
    temperature: float = 0.07,
    negative_weight: float = 1.5,
    dropout: float = 0.1,
    seed: int = 0,
    done: Callable[[int], object] = lambda steps: None,
) -> list[float]:
    """Train the encoder in place; returns the loss of each step.

    A step takes some wordings of some relations and minimises the supervised contrastive loss (Khosla et al. 2020, arXiv
    2004.11362) of the directions at their last tokens, with further negatives: the tokens just before the last ones and at
    random inside, the texts that nearly ask for these relations, general questions, and tokens of running texts. Beside it
    stand the cross-entropies of whether an answer begins and of the subject's place.
    """
    generator = torch.Generator().manual_seed(seed)
    label = torch.tensor([text.relation for text in read.texts])
    near = torch.tensor([text.near for text in read.texts])
    running = torch.tensor([text.running for text in read.texts])
    closed = torch.tensor([text.closed for text in read.texts])
    count = int(label.max()) + 1
    own = [(label == r).nonzero().flatten() for r in range(count)]
    nearly = [(near == r).nonzero().flatten() for r in range(count)]
    general = ((label < 0) & (near < 0) & ~running).nonzero().flatten()
    prose = running.nonzero().flatten()

    def some(pool: Tensor, number: int) -> Tensor:
        return pool[torch.randperm(len(pool), generator=generator)[:number]]

    taught = torch.tensor([r for r in range(count) if r % HELD_OUT])  # the others calibrate
    trained = [
        getattr(encoder, n) for n in ("value", "salience", "decay", "mix", "look", "bias", "query", "place", "recency")
    ]
    for tensor in trained:
        tensor.requires_grad_()
    optimiser = torch.optim.AdamW(trained, learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=steps, pct_start=0.15)
    losses = []
    for _ in range(steps):
        chosen = some(taught, relations).tolist()
        asked = torch.cat([some(own[r], wordings) for r in chosen])
        others = torch.cat([*(some(nearly[r], 4) for r in chosen), some(general, 16)])
        texts = some(prose, 12)
        index = torch.cat([asked, others, texts])
        n, ends = len(asked), len(asked) + len(others)
        last = read.lengths[index] - 1
        before = torch.cat([(last[:n] - k).clamp(min=1) for k in (1, 2, 3)])
        inside = 1 + (torch.rand(2 * n, generator=generator) * (last[:n].repeat(2) - 1)).long()
        inside = torch.minimum(inside, (last[:n].repeat(2) - 1).clamp(min=0))
        along = 1 + (torch.rand(len(texts) * 8, generator=generator) * (last[ends:].repeat(8) - 1)).long()
        rows = torch.cat([torch.arange(ends), torch.arange(n).repeat(5), torch.arange(ends, len(index)).repeat(8)])
        columns = torch.cat([last[:ends], before, inside, along])
        z, begins, places = encode_at(encoder, read, index, rows, columns, dropout=dropout, generator=generator)
        # near texts, general ones, one inner token of each text, prose: the others teach only where no answer begins
        apart = torch.cat([z[n:ends], z[-n - len(along) : -len(along)], z[-len(along) :: 2]])
        loss = _contrast(z[:n], apart, label[asked], temperature, negative_weight)
        answers = (torch.arange(len(z)) < n).float()
        answers[n:ends] = torch.nan  # a question with one more hop has an answer too
        answers[n:ends][closed[others]] = 0.0
        known = ~answers.isnan()
        weight = torch.where(answers[known] > 0, float((~known | (answers == 0)).sum() / n), 1.0)
        slots = (
            F.binary_cross_entropy_with_logits(begins[known], answers[known], weight, reduction="sum") / weight.sum()
        )
        loss = loss + slots
        subject = read.subject[index[:ends]]
        age = last[:ends] - subject
        known = (subject > 0) & (age < places.shape[1])
        picked = places[:ends][known].gather(1, age[known].unsqueeze(1))
        loss = loss - 0.5 * picked.mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
        done(1)
    for tensor in trained:
        tensor.requires_grad_(False)
    encoder.relations = relation_means(encoder, read, own)
    held_out = torch.cat(own[::HELD_OUT])
    ends = encode_at(encoder, read, held_out, torch.arange(len(held_out)), read.lengths[held_out] - 1)[1]
    encoder.least = torch.quantile(ends.detach(), 0.02).reshape(1)
    encoder.false_openings = false_openings(encoder, read, own[::HELD_OUT], nearly[::HELD_OUT], general)
    return losses


@torch.no_grad()
def false_openings(
    encoder: RelationEncoder, read: ReadTexts, own: Sequence[Tensor], nearly: Sequence[Tensor], general: Tensor
) -> Tensor:
    """``(m,)`` cosines, ascending, of what must stay closed: a sample from relations that took no part in the training.

    The key of a relation is the mean direction of two of its texts, as an edit's is of its forms. Against it stand the texts that
    ask for another relation, that nearly ask for this one, and general questions: an even share of each.
    """

    def directions(index: Tensor) -> Tensor:
        return encode_at(encoder, read, index, torch.arange(len(index)), read.lengths[index] - 1)[0]

    asked, close, plain = [directions(i) for i in own], [directions(i) for i in nearly], directions(general)
    others = torch.cat(asked)
    owner = torch.arange(len(own)).repeat_interleave(torch.tensor([len(z) for z in asked]))
    found = []
    for r, (z, near) in enumerate(zip(asked, close, strict=True)):
        for pair in z[: len(z) // 2 * 2].view(-1, 2, z.shape[-1]):
            key = F.normalize(pair.mean(0), dim=0)
            found += [_even(against @ key) for against in (others[owner != r], near, plain) if len(against)]
    return torch.cat(found).sort().values if found else torch.linspace(-1.0, 1.0, 3)


def _even(values: Tensor, count: int = 16) -> Tensor:
    """``count`` of the values, at even distances."""
    return values[torch.linspace(0, len(values) - 1, count).long()]


def _contrast(z: Tensor, others: Tensor, label: Tensor, temperature: float, weight: float) -> Tensor:
    """The supervised contrastive loss of ``z (n, k)`` with labels ``(n,)`` and further negatives ``others (m, k)``."""
    same = (label[:, None] == label[None]).float().fill_diagonal_(0.0)
    pairs = (z @ z.mT / temperature).masked_fill(torch.eye(len(z), dtype=torch.bool), -1e9)
    against = z @ others.mT / temperature + math.log(weight)
    log_p = pairs - torch.cat([pairs, against], 1).logsumexp(1, keepdim=True)
    return -((log_p * same).sum(1) / same.sum(1).clamp(min=1.0)).mean()


@torch.no_grad()
def relation_means(encoder: RelationEncoder, read: ReadTexts, own: Sequence[Tensor]) -> Tensor:
    """``(m, k)`` the mean direction of each relation's texts."""
    means = []
    for index in own:
        z, _, _ = encode_at(encoder, read, index, torch.arange(len(index)), read.lengths[index] - 1)
        means.append(F.normalize(z.mean(0), dim=0))
    return torch.stack(means)
