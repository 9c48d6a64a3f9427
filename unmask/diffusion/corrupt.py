"""The forward process: how much noise (`masking_rate`), which tokens it takes (`transition`), both (`corrupt`).

Absorbing-state diffusion: at time t every maskable token has become the mask token with probability t
(Sahoo et al., "Simple and Effective Masked Diffusion Language Models", arXiv:2406.07524, eq. 1 with
alpha_t = 1 - t; Nie et al., LLaDA, arXiv:2502.09992, eq. 7).

The corruptions of the CoDA recipe leave every maskable token masked with exactly the recorded `t`:

  S1  a random number of a document's first maskable tokens becomes context: not masked, not counted;
  S2  a document is cut after a random number of maskable tokens: the rest becomes padding;
  S3  masks come in cells: a grid of cells of k tokens with a random phase, each masked as a whole when its own
      uniform, which is independent of the phase, is below t.

Shapes: B batch, L sequence, D documents of a row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from unmask.diffusion.attention import (
    BlockAnchor,
    Layout,
    block_index,
    count_by_document,
    per_position,
    row_layout,
)
from unmask.diffusion.objective import Objective
from unmask.diffusion.rng import (
    STREAM_CELLS,
    STREAM_CUT,
    STREAM_MASK,
    STREAM_SEED,
    STREAM_STRATA,
    STREAM_TIME,
    keyed_below,
    keyed_hash,
    keyed_uniform,
)
from unmask.errors import UnmaskError

NO_MASK_TOKEN = (
    "the model has no mask token: set model.config.mask_token_id, or make the checkpoint with"
    " `unmask convert`, which adds one to the tokenizer."
)
_GOLDEN = round((math.sqrt(5) - 1) / 2 * 2**24)  # multiples of the golden ratio modulo 1 are spread evenly
_SILVER = round((math.sqrt(2) - 1) * 2**24)  # and so are these, also together with those


class ForwardInputs(NamedTuple):
    """A batch, checked and laid out: what `model.prepare` returns."""

    input_ids: Int[Tensor, "B L"]
    targets: Int[Tensor, "B L"]
    """The ids to predict: the labels if there were some. Where nothing is maskable they are not looked at."""
    layout: Layout
    maskable: Bool[Tensor, "B L"]
    """True where a token may be masked: not padding, not source, not ignored by its label."""
    source: Bool[Tensor, "B L"] | None
    """True = source token, masked only where an objective's `source_share` is below 1."""
    mask_token_id: int | None
    block_length: int | None
    """Tokens of a block in a block-causal model; None = bidirectional."""
    padded: bool
    """Whether some column is padding."""
    packed: bool
    """Whether rows have several documents."""
    block_anchor: BlockAnchor = "response"
    """Where blocks begin to be counted, see `block_index`."""

    def block_index(self, layout: Layout, maskable: Bool[Tensor, "B L"]) -> Int[Tensor, "B L"] | None:
        """Number the blocks of a block-causal model; None for a bidirectional one."""
        if self.block_length is None:
            return None
        return block_index(layout, maskable, self.block_length, self.block_anchor)


class Noised(NamedTuple):
    """What the forward process made of a batch."""

    x_t: Int[Tensor, "B L"]
    """The corrupted ids."""
    is_masked: Bool[Tensor, "B L"]
    """True where this draw replaced the token, recorded when drawn: never `x_t == mask_token_id`."""
    t: Float[Tensor, "B L"]
    """The masking probability in force at each position, in (0, 1]."""
    maskable: Bool[Tensor, "B L"]
    """True where a token could have been masked: the supervised tokens. S1 and S2 leave fewer."""
    layout: Layout
    """Documents and positions; `layout.is_token` is False where S2 made padding."""
    seed: Int[Tensor, "B L"]
    """Noise seed of each token's document; 0 where torch's generator drew."""
    block: Int[Tensor, "B L"] | None
    """Block of each token within its document, for block diffusion."""

    def complement(self, inputs: ForwardInputs) -> Noised:
        """Mask the other maskable tokens instead, each with probability 1 - t."""
        assert inputs.mask_token_id is not None
        is_masked = self.maskable & ~self.is_masked
        x_t = torch.where(is_masked, inputs.mask_token_id, inputs.input_ids)
        return self._replace(x_t=x_t, is_masked=is_masked, t=1 - self.t)


def example_seeds(
    seed: int, sample_ids: Int[Tensor, "..."], epoch: Int[Tensor, "..."] | int
) -> Int[Tensor, "..."]:
    """Derive the `noise_seed` of each sample from the run's seed, its id and its epoch."""
    return keyed_hash(seed, STREAM_SEED, sample_ids, epoch)


def low_discrepancy(seed: int, step: int, place: Int[Tensor, "..."], total: int) -> Float[Tensor, "..."]:
    """Spread the uniforms of one optimizer step evenly over [0, 1): `(place / total + u) mod 1`.

    Each is uniform, and together they hit every interval of length 1 / total once (Kingma et al., "Variational
    Diffusion Models", arXiv:2107.00630, app. I.1), which lowers the variance of the loss. The noise of a sample
    then depends on its place in the global batch.

    Args:
        seed: seed of the run.
        step: the optimizer step; all its samples share one u.
        place: index of each sample among the `total` samples of the step.
    """
    shift = keyed_uniform(torch.tensor(seed, device=place.device), STREAM_STRATA, step)
    return (place.float() / total + shift) % 1.0


def document_strata(strata: Float[Tensor, "B"], documents: int) -> Float[Tensor, "B D"]:
    """Give each document of a packed row its own stratum: that of the row, shifted by d silver ratios.

    Shifted by golden ones, as blocks are, block b + 1 would share its rate with block b of the next document.
    """
    return _shifted(strata[:, None], torch.arange(documents, device=strata.device), _SILVER)


def masking_rate(uniform: Float[Tensor, "..."], objective: Objective) -> Float[Tensor, "..."]:
    """Map a uniform s in [0, 1) to the masking rate t in [eps, 1], in [eps, 1 - eps] if complementary.

    linear: t = s (MDLM's log-linear, LLaDA's). cosine: t = sin(pi s / 2), more of the draws at high rates
    (Shi et al., MD4, arXiv:2406.04329, table 1). Both are stretched to start at eps.
    """
    eps = objective.eps
    if objective.complementary:
        return eps + (1 - 2 * eps) * uniform
    if objective.schedule == "linear":
        return eps + (1 - eps) * uniform
    first = math.asin(eps) / (math.pi / 2)
    return torch.sin(math.pi / 2 * (first + (1 - first) * uniform)).clamp(eps, 1.0)


def transition(
    x_0: Int[Tensor, "B L"],
    sigma: Float[Tensor, "..."] | float,
    maskable_mask: Bool[Tensor, "B L"],
    mask_token_id: int,
    *,
    noise_seed: Int[Tensor, "B"] | Int[Tensor, "B L"] | None = None,
    positions: Int[Tensor, "B L"] | None = None,
) -> Noised:
    """Replace each maskable token by the mask token with probability sigma, and nothing else.

    Args:
        x_0: clean ids.
        sigma: masking probability in [0, 1]: a number, one a row (B,) or (B, 1), or one a position (B, L).
        maskable_mask: True where a token may be masked.
        noise_seed: int64 seeds, one a row or one a position; position i is then masked by a hash of
            (seed, `positions[i]`). Without it torch's generator draws.
        positions: index of each token within its example, independent of padding; the column by default.
            Tokens of one seed and one index are masked together.

    Returns:
        `Noised`, with the layout of rows of one document without padding.

    Raises:
        ValueError: `maskable_mask` has another shape than `x_0`.

    Examples:
        >>> x_0 = torch.tensor([[5, 6, 7]])
        >>> transition(x_0, 1.0, torch.tensor([[False, True, True]]), mask_token_id=9).x_t
        tensor([[5, 9, 9]])
    """
    if maskable_mask.shape != x_0.shape:
        raise ValueError(
            f"maskable_mask must have shape (batch, seq) = {tuple(x_0.shape)};"
            f" got {tuple(maskable_mask.shape)}."
        )
    t = torch.as_tensor(sigma if isinstance(sigma, Tensor) else float(sigma), device=x_0.device)
    t = (t[:, None] if t.dim() == 1 else t).expand(x_0.shape)
    layout = row_layout(torch.ones_like(maskable_mask))
    if noise_seed is None:
        seed = torch.zeros_like(x_0)
        uniform = torch.rand(x_0.shape, device=x_0.device)
    else:
        seed = (noise_seed if noise_seed.dim() == 2 else noise_seed[:, None]).expand(x_0.shape)
        uniform = keyed_uniform(seed, STREAM_MASK, layout.position if positions is None else positions)
    is_masked = (uniform < t) & maskable_mask
    x_t = torch.where(is_masked, mask_token_id, x_0)
    return Noised(x_t, is_masked, t, maskable_mask, layout, seed, None)


def corrupt(
    inputs: ForwardInputs,
    objective: Objective,
    noise_seed: Int[Tensor, "..."] | None = None,
    strata: Float[Tensor, "..."] | None = None,
) -> Noised:
    """Draw everything random of a training step for a batch: S1, S2, the rates t, and the masks.

    Args:
        inputs: the batch, from `model.prepare`.
        noise_seed: int64, one a row (B,) or one a document (B, D); all of a document's draws are functions
            of its seed and of positions within it. Without it seeds come from torch's generator.
        strata: uniforms from `low_discrepancy`, shaped like `noise_seed`, that replace the keyed ones t is
            made of; block b of a document takes its stratum shifted by b golden ratios.

    Raises:
        UnmaskError: the model has no mask token.
    """
    if inputs.mask_token_id is None:
        raise UnmaskError(NO_MASK_TOKEN)
    layout, maskable, source = inputs.layout, inputs.maskable, inputs.source
    seed = _position_seeds(layout, noise_seed)
    # 1. Source tokens beyond the conditioned share are learnt like the response.
    if source is not None and objective.source_share < 1:
        before, count = _rank(layout, source)
        maskable = maskable | (source & (before >= (count * objective.source_share).floor()))
    # 2. S1 and S2, of which a document takes at most one: both keep at least one maskable token.
    p_prefix, p_cut = objective.prefix_probability, objective.truncate_probability
    if p_prefix or p_cut:
        before, count = _rank(layout, maskable)
        kind = keyed_uniform(seed, STREAM_CUT, 0)
        kept = 1 + keyed_below(count - 1, seed, STREAM_CUT, 1)
        possible = count > 1
        context = possible & (kind < p_prefix) & (before < kept)
        cut = possible & (p_prefix <= kind) & (kind < p_prefix + p_cut) & (before >= kept)
        maskable = maskable & ~context & ~cut
        layout = layout._replace(is_token=layout.is_token & ~cut)
    # 3. The rate: one a document, or one a block.
    block = inputs.block_index(layout, maskable)
    if strata is None:
        uniform = keyed_uniform(seed, STREAM_TIME, *(() if block is None else (block,)))
    else:
        uniform = per_position(layout, strata)
        if block is not None:
            uniform = _shifted(uniform, block, _GOLDEN)
    t = masking_rate(uniform, objective)
    # 4. The masks: token by token, or (S3) cell by cell.
    unit = layout.position
    if objective.block_masking_probability:
        in_cells = keyed_uniform(seed, STREAM_CELLS, 0) < objective.block_masking_probability
        sizes = torch.tensor(objective.mask_block_sizes, device=seed.device)
        size = sizes[keyed_below(len(sizes), seed, STREAM_CELLS, 1)]
        phase = keyed_below(size, seed, STREAM_CELLS, 2)
        unit = torch.where(in_cells, (unit + phase) // size, unit)
    noised = transition(inputs.input_ids, t, maskable, inputs.mask_token_id, noise_seed=seed, positions=unit)
    return noised._replace(layout=layout, block=block)


def _position_seeds(layout: Layout, noise_seed: Int[Tensor, "..."] | None) -> Int[Tensor, "B L"]:
    """Spread seeds of rows (B,) or documents (B, D) over positions; from torch's generator if None."""
    document = layout.document
    if noise_seed is None:
        noise_seed = torch.randint(-(2**63), 2**63 - 1, document.shape, device=document.device)
    seed = per_position(layout, noise_seed)
    if noise_seed.dim() == 1:  # the further documents of a row get their own seeds
        seed = torch.where(document == 0, seed, keyed_hash(seed, STREAM_SEED, document))
    return seed


def _shifted(uniform: Tensor, times: Tensor, ratio: int) -> Tensor:
    """Add multiples of a ratio modulo 1, which are exact in 24 bits."""
    return (uniform + (times * ratio & (2**24 - 1)) * 2.0**-24) % 1.0


def _rank(layout: Layout, flag: Tensor) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Count the flagged tokens of each token's document: those before it, and all."""
    total = count_by_document(layout, flag)
    before = flag.cumsum(dim=1) - flag.long()
    return before - per_position(layout, total.cumsum(dim=1) - total), per_position(layout, total)
