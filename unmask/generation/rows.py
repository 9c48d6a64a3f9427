"""What the engine knows of a row: what is to be filled, how far it is, and what is told of it.

Shapes: L columns of a row, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.policy import Policy, share_steps
from unmask.generation.pool import Region

LAST = torch.iinfo(torch.long).max  # after every column


class Row(NamedTuple):
    """What is to be filled."""

    ids: Int[Tensor, "L"]  # tokens alone, without padding; the mask token in the canvas
    canvas: Bool[Tensor, "L"]  # True = a position to fill
    config: DiffusionGenerationConfig  # settings, `mask_token_id` filled in
    block: Int[Tensor, "L"] | None = None  # blocks as a block-causal model was trained on
    logits_processors: Sequence[Callable[..., Tensor]] = ()  # of (ids (m, L), logits (m, V))
    # Functions of (ids (1, n), None); transformers' own also get `prompt_length`. Asked about the ids up to
    # each token that is final, as are all before it.
    stopping_criteria: Sequence[Callable[..., Any]] = ()


@dataclass(frozen=True)
class Answer:
    """The tokens of a finished row, the end token included."""

    ids: list[int]
    commit_step: list[int]
    """Denoising step, from 0, that committed each token."""
    num_forwards: int
    """Denoising steps."""
    confidence: list[float] = field(default_factory=list)
    """With `return_trace`: the model's probability of each token and its entropy (nats) at that step."""
    entropy: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """What one forward pass did to one row; positions are counted from the start of its canvas."""

    slot: int
    """The row, see `Engine.add_row`."""
    length: int = 0
    """Positions of the canvas."""
    positions: list[int] = field(default_factory=list)
    """Positions committed."""
    confidence: list[float] = field(default_factory=list)
    """The model's probabilities of their tokens, if the settings ask for them."""
    tokens: list[int] = field(default_factory=list)
    """Ids of those tokens."""
    remasked: list[int] = field(default_factory=list)
    """Positions masked again."""
    num_final: int = 0
    """Leading tokens of the answer that can no longer change."""
    answer: Answer | None = None
    """What was written, once the row has ended."""
    error: Exception | None = None
    """Why it ended without one."""

    @property
    def done(self) -> bool:
        """Whether the row has ended."""
        return self.answer is not None or self.error is not None

    def apply(self, canvas: list[int], mask_token_id: int) -> None:
        """Change a canvas as the step did; before the first step it is masks alone, `length` of them."""
        for position, token in zip(self.positions, self.tokens, strict=True):
            canvas[position] = token
        for position in self.remasked:
            canvas[position] = mask_token_id


@dataclass(eq=False)
class State:
    """A row with what does not fit a table."""

    row: Row
    slot: int
    decides: tuple[Any, ...]  # settings of the decision, by which rows are put together
    samples: tuple[Any, ...]  # settings of the draw
    policy: Policy
    sizes: list[int]  # tokens of the canvas in each block
    steps: list[int]  # denoising steps of each block
    windows: list[tuple[int, int]]  # columns of each block, from and to
    columns: Tensor  # of the canvas
    block_of: Tensor
    offset: Tensor
    first_block: int  # of the canvas, as the model counts them
    forbidden: tuple[Tensor, Tensor]  # ids that are never written, and those with the end tokens
    line: int = -1  # in the tables
    regions: list[Region] = field(default_factory=list)  # of the cache; with guidance a second one
    keys: list[bytes] = field(default_factory=list)  # names of its complete blocks, by content
    limit: int = LAST  # length of the answer, by the stopping criteria
    tested: int = 0  # tokens that the criteria have been asked about
    drafts: bool = False  # whether what is committed may be masked again while its block is not complete

    @property
    def is_guided(self) -> bool:
        """Whether the network sees it twice, the second time with the prompt masked."""
        return self.row.config.guidance_scale > 0

    @property
    def places(self) -> int:
        """Places of the cache that it needs."""
        config = self.row.config
        is_cached = config.approximate_cache is not None if self.row.block is None else config.use_cache
        return len(self.row.ids) * (1 + self.is_guided) if is_cached else 0


def prepare(row: Row, slot: int) -> State:
    """Divide a canvas into blocks and its steps over them.

    Raises:
        UnmaskError: fewer steps than blocks, or a seed that is not one number.
    """
    config = row.config
    if not isinstance(config.seed, int):
        raise UnmaskError(f"seed must be one number for one row; got {config.seed!r}.")
    ends = set(config.eos_token_ids)
    never = {*(config.suppress_tokens or ()), *(config.unused_tokens or ()), cast(int, config.mask_token_id)}
    forbidden = torch.tensor(sorted(never - ends)), torch.tensor(sorted(never | ends))
    columns = row.canvas.nonzero()[:, 0]
    index = (row.canvas.long().cumsum(dim=0) - 1).clamp(min=0)
    first_block = 0 if row.block is None else int(row.block[columns[:1]].sum())
    if row.block is None:
        number, part_of = index // (config.block_length or max(1, len(index))), row.canvas
    else:
        number, part_of = row.block - first_block, torch.ones_like(row.canvas)
    sizes = number[columns].bincount().tolist()
    steps = share_steps(min(config.steps or len(columns), len(columns)), sizes) if sizes else []
    bounds = pairwise([0, *accumulate(sizes)])
    windows = [(int(columns[start]), int(columns[stop - 1]) + 1) for start, stop in bounds]
    return State(
        row,
        slot,
        _deciding(config),
        _sampling(row),
        config.make_policy(),
        sizes,
        steps,
        windows,
        columns,
        torch.where(row.canvas, number, -1),
        _offsets(number, part_of),
        first_block,
        forbidden,
    )


def _deciding(config: DiffusionGenerationConfig) -> tuple[Any, ...]:
    """The settings that a decision depends on."""
    policy = id(config.policy) if callable(config.policy) else config.policy_name  # it may have no hash
    own = config.alg_temp, config.threshold, config.factor, config.entropy_bound, config.eta
    ends = tuple(config.eos_token_ids) if config.defer_end else None
    return policy, *own, ends, config.sub_block_length, config.first_token_alone


def _sampling(row: Row) -> tuple[Any, ...]:
    """The settings that a draw depends on; logits processors are a row's own."""
    config = row.config
    ids = (*config.eos_token_ids,), (*(config.suppress_tokens or ()),), (*(config.unused_tokens or ()),)
    own = id(row) if row.logits_processors else None
    filters = config.temperature, config.top_k, config.top_p, config.guidance_scale
    return *filters, config.min_new_tokens, ids, own, config.figures


def _offsets(number: Int[Tensor, "L"], part_of: Bool[Tensor, "L"]) -> Int[Tensor, "L"]:
    """Index each position within its block, which may begin in the prompt."""
    group = torch.where(part_of, number - number.amin(), 0) if len(number) else number
    index = part_of.long().cumsum(dim=0)
    first = torch.full_like(index, LAST)
    first.scatter_reduce_(0, group, torch.where(part_of, index, LAST), "amin")
    return index - first.gather(0, group)
