"""The relation encoder: what the text asks for at a token, and of whom, as vectors in which wording matters little."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WINDOW = 64  # tokens that the encoder looks back
POOLED_DEPTHS = (0.2, 0.4, 0.6)
LATE_DEPTHS = (0.8, 0.9)


def read_layers(edited: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """The blocks that the encoder reads, the pooled ones first; none above the lowest edited one."""
    return tuple(min(round(depth * num_layers), *edited) for depth in (*POOLED_DEPTHS, *LATE_DEPTHS))


def standardise(h: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """``(h - mean) / scale`` (..., d), scaled to length ``sqrt(d)``; fp32."""
    return F.normalize((h.float() - mean) / scale, dim=-1) * h.shape[-1] ** 0.5


class RelationEncoder(nn.Module):
    """``z (k,)``, the relation whose object the next token would begin, and the place of its subject.

    A language model knows at a token what it is about to say, but hardly how the question was put: at "?" the words of the
    question are only faintly there. So the encoder looks back, as one small attention layer:

        x_s = blocks of the lower half at token s,          y_t = two late blocks at token t,
        p_t = sum_s softmax_s(a.x_s - lambda (t - s)) V x_s        for each head, over the WINDOW tokens up to t,
        [u_t, s_t] = W y_t + P p_t + b,        z_t = u_t / |u_t|,
        q_t(s) = softmax_s(Q y_t . K x_s / sqrt(m) - mu (t - s)),

    ``a`` learns which words matter ("capital", not "the" or a name), ``lambda`` how far back. ``s_t`` is the logit that an answer
    begins behind token t at all, and ``q_t(s)`` how likely token s ends the name that is asked about. All inputs are
    standardised and have length ``sqrt(d)``.

    The encoder is trained once a model, contrastively (``training/relation_training.py``): the same relation asked of other
    subjects in other words must be near, everything else far: other relations, yes-or-no and two-hop questions about this one,
    general questions about the subject, and the inside of texts, where nothing is about to be stated.

    A text's first token is left out of the sums: it holds no content, and its representation is huge.

    The tensors are empty until :meth:`build` or a saved state gives them a shape.

    Attributes:
        relations: ``(m, k)`` mean directions of the training's relations, by which a gate says what a text asks instead.
        false_openings: ``(n,)`` cosines, ascending, of keys to what they must stay closed to, from relations held out.
        least: ``(1,)`` the smallest ``s`` at which an answer is taken to begin: two in a hundred of theirs are below it.
    """

    _DIMS: ClassVar[dict[str, int]] = {
        "mean": 2, "scale": 2, "value": 3, "salience": 3, "decay": 1, "mix": 2, "look": 3, "bias": 1, "query": 3, "place": 3,
        "recency": 1, "relations": 2, "false_openings": 1, "least": 1,
    }  # fmt: skip
    mean: Tensor
    scale: Tensor
    value: Tensor
    salience: Tensor
    decay: Tensor
    mix: Tensor
    look: Tensor
    bias: Tensor
    query: Tensor
    place: Tensor
    recency: Tensor
    relations: Tensor
    false_openings: Tensor
    least: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name, dims in self._DIMS.items():
            self.register_buffer(name, torch.zeros((0,) * dims))

    def build(
        self, embed_dim: int, *, heads: int = 4, width: int = 256, size: int = 256, pointer: int = 32, seed: int = 0
    ) -> RelationEncoder:
        """Give the tensors their shapes and random values."""
        pooled, late = len(POOLED_DEPTHS), len(LATE_DEPTHS)
        generator = torch.Generator().manual_seed(seed)

        def uniform(*shape: int, inputs: int) -> Tensor:
            return (2 * torch.rand(shape, generator=generator) - 1) * inputs**-0.5

        self.mean = torch.zeros(pooled + late, embed_dim)
        self.scale = torch.ones(pooled + late, embed_dim)
        self.value = uniform(pooled, width, embed_dim, inputs=pooled * embed_dim)
        self.salience = torch.zeros(pooled, heads, embed_dim)
        self.decay = torch.linspace(-4.0, -2.0, heads)  # log lambda
        self.mix = uniform(size + 1, width, inputs=width)
        self.look = uniform(late, size + 1, embed_dim, inputs=late * embed_dim)
        self.bias = torch.zeros(size + 1)
        self.query = uniform(late, pointer, embed_dim, inputs=late * embed_dim)
        self.place = uniform(pooled, pointer, embed_dim, inputs=pooled * embed_dim)
        self.recency = torch.tensor([-4.0])  # log mu
        self.relations = torch.zeros(0, size)
        self.false_openings = torch.linspace(-1.0, 1.0, 3)
        self.least = torch.tensor([-1e4])
        return self

    def threshold(self, rate: float) -> float:
        """The cosine that a share ``rate`` of what must stay closed exceeds."""
        return float(torch.quantile(self.false_openings, 1.0 - rate))

    @property
    def pooled(self) -> int:
        """The number of pooled blocks; the others are late."""
        return len(self.value)

    def check(self, embed_dim: int, size: int) -> None:
        """Check that saved tensors fit together, so that they fail when they are loaded rather than in use.

        Raises:
            ValueError: they do not, or the encoder is empty.
        """
        pooled, late = len(POOLED_DEPTHS), len(LATE_DEPTHS)
        heads, width, pointer = self.decay.shape[0], self.mix.shape[1], self.query.shape[1]
        wanted = {
            "mean": (pooled + late, embed_dim), "scale": (pooled + late, embed_dim), "value": (pooled, width, embed_dim),
            "salience": (pooled, heads, embed_dim), "mix": (size + 1, width),
            "look": (late, size + 1, embed_dim), "bias": (size + 1,),
            "query": (late, pointer, embed_dim), "place": (pooled, pointer, embed_dim), "recency": (1,),
        }  # fmt: skip
        for name, shape in wanted.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"the encoder's {name} has shape {tuple(getattr(self, name).shape)}; it must be {shape}"
                )
        if not heads or width % heads or self.relations.shape[1:] != (size,):
            raise ValueError(
                f"the encoder has {heads} heads of {width} values and relations {tuple(self.relations.shape)}"
            )

    def standardised(self, number: int, h: Tensor) -> Tensor:
        """The output ``h (..., d)`` of block ``read_layers()[number]``, standardised, of length ``sqrt(d)``."""
        return standardise(h, self.mean[number], self.scale[number])

    def memory(self, number: int, x: Tensor) -> Tensor:
        """What a token leaves for later ones, from block ``number``: ``x (..., d) -> (..., heads + m + width)``.

        The parts of the pooled blocks add up.
        """
        return torch.cat([x @ w[number].mT for w in (self.salience, self.place, self.value)], dim=-1)

    def glance(self, number: int, x: Tensor) -> Tensor:
        """The token's own part, from block ``number``: ``x (..., d) -> (..., k + 1 + m)``; the parts of the late blocks add up."""
        late = number - self.pooled
        return torch.cat([x @ self.look[late].mT, x @ self.query[late].mT], dim=-1)

    def forward(self, glance: Tensor, memory: Tensor, age: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``z (..., k)``, ``s (...)`` and ``log q (..., W)`` from the token's own part and the memory of the tokens up to it.

        Args:
            glance: ``(..., k + 1 + m)``, summed over late blocks.
            memory: ``(..., W, heads + m + width)``, summed over pooled blocks.
            age: ``(..., W)``, how many tokens ago each was; 0 is the token itself.
            seen: ``(..., W)`` bool, False where there is no token to look at.
        """
        heads, pointer = self.decay.shape[0], self.query.shape[1]
        salience, place, value = memory.split([heads, pointer, self.mix.shape[1]], dim=-1)
        own, query = glance.split([self.mix.shape[0], pointer], dim=-1)
        logits = salience - self.decay.exp() * age.unsqueeze(-1)  # (..., W, heads)
        weights = logits.masked_fill(~seen.unsqueeze(-1), -1e9).softmax(-2) * seen.unsqueeze(-1)
        pooled = torch.einsum("...wh,...whv->...hv", weights, value.unflatten(-1, (heads, -1))).flatten(-2)
        found = own + pooled @ self.mix.mT + self.bias
        asked = (place @ query.unsqueeze(-1)).squeeze(-1) / pointer**0.5 - self.recency.exp() * age
        return F.normalize(found[..., :-1], dim=-1), found[..., -1], asked.masked_fill(~seen, -1e9).log_softmax(-1)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any, **kwargs: Any) -> None:
        for name in self._DIMS:
            saved, own = state_dict.get(prefix + name), getattr(self, name)
            if saved is not None and saved.shape != own.shape:
                setattr(self, name, torch.empty_like(saved, device=own.device))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
