"""The denoising loop: masks of a canvas, replaced by tokens over a number of forwards, block by block.

The engine knows nothing of networks. It asks a `Denoiser` for the logits of the masked positions of the
current block, samples a token for each, lets a policy say which to commit, and goes on until nothing is
masked. Each row stands at a step and in a block of its own, and its noise is keyed by (seed, position, step),
so a row's answer does not depend on the rest of the batch.

Shapes: B batch, R rows at work, L columns, S columns shown to the network, M positions asked for, V
vocabulary, C columns of a canvas appended to a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.utils.generic import ModelOutput

from unmask.diffusion.attention import token_positions
from unmask.diffusion.rng import keyed_hash
from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.policy import Draft, Move, Remask, share_steps
from unmask.generation.sampling import Sampled, as_processor, sample, suppress, uniforms
from unmask.generation.stop import as_criterion

_LAST = torch.iinfo(torch.long).max


class View(NamedTuple):
    """What the network is asked at one forward."""

    ids: Int[Tensor, "R S"]
    is_token: Bool[Tensor, "R S"]
    """True = a token that may be seen; False = padding, and masks of later blocks."""
    where: Bool[Tensor, "R S"]
    """Positions whose logits are wanted."""
    rows: Int[Tensor, "R"]
    """The slot of each row in the caches."""
    block: Int[Tensor, "R S"] | None = None
    """Blocks of a block-causal model: a token sees its own and earlier ones. None = it sees every token."""
    compute: Bool[Tensor, "R S"] | None = None
    """Positions to compute and to keep keys and values of, against those kept of the others; None = compute
    all and keep nothing."""


Denoiser = Callable[[View], Iterable[Tensor]]
"""View -> aligned logits of the M positions of `where`, in row-major order, in chunks (m, V)."""


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate` returns.

    Attributes:
        sequences: prompt and response (B, P + C); padding after the first end token of a response.
        tokens_per_forward: response tokens, the end token included, over the forwards a row took (B,).
        num_forwards: denoising forwards each row took part in (B,); those that only fill a cache not counted.
        commit_step: step, from 0, that committed each canvas token (B, C); -1 after the end of a response.
            This and what follows only with `return_trace`.
        confidence: the model's probability of each committed token when it was committed (B, C).
        entropy: the model's entropy there and then, in nats (B, C).
        states: the canvas after each step of a row (B, steps, C); where a row took fewer, the last one again.
        disagreement: share of the positions asked for at which the approximate cache wrote another token
            than the exact forward (B,); only with `check_cache`.
    """

    sequences: Int[Tensor, "B L"] | None = None
    tokens_per_forward: Float[Tensor, "B"] | None = None
    num_forwards: Int[Tensor, "B"] | None = None
    commit_step: Int[Tensor, "B C"] | None = None
    confidence: Float[Tensor, "B C"] | None = None
    entropy: Float[Tensor, "B C"] | None = None
    states: Int[Tensor, "B F C"] | None = None
    disagreement: Float[Tensor, "B"] | None = None


def respond(
    denoiser: Denoiser,
    input_ids: Int[Tensor, "B P"],
    is_token: Bool[Tensor, "B P"],
    config: DiffusionGenerationConfig,
    *,
    block: Int[Tensor, "B L"] | None = None,
    cached: bool = False,
    streamer: Any | None = None,
    logits_processor: Any | None = None,
    stopping_criteria: Any | None = None,
) -> DiffusionGenerationOutput:
    """Fill a canvas of `config.max_new_tokens` masks after each prompt.

    Args:
        denoiser: the model, see `Denoiser`.
        input_ids: prompts, padded on any side.
        is_token: True = token, False = padding.
        config: settings, `mask_token_id` filled in.
        block: blocks of prompt and canvas as a block-causal model was trained on (B, P + C).
        cached: whether the denoiser keeps keys and values of blocks that are done.
        streamer: receives the prompt by `put`, each draft by `put_draft` where it has one, and the
            response by `put`, as transformers' diffusion streamers expect; a batch of one.
        logits_processor: see `unmask.generation.sampling.as_processor`.
        stopping_criteria: see `unmask.generation.stop.as_criterion`; asked about a row's ids up to its first
            mask.

    Raises:
        UnmaskError: fewer steps than blocks, a policy that commits nothing, or logits that are no numbers.
    """
    length, canvas_length = input_ids.shape[1], config.max_new_tokens
    assert config.mask_token_id is not None
    masks = input_ids.new_full((len(input_ids), canvas_length), config.mask_token_id)
    canvas = torch.cat([torch.zeros_like(is_token), torch.ones_like(masks, dtype=torch.bool)], dim=1)
    ids = torch.cat([input_ids, masks], dim=1)
    engine = Engine(
        denoiser,
        ids,
        torch.cat([is_token, canvas[:, length:]], dim=1),
        canvas,
        config,
        block=block,
        cached=cached,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
    )
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for _ in engine.steps():
        if streamer is not None and hasattr(streamer, "put_draft"):
            streamer.put_draft(engine.ids[:, length:].cpu())
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_ids or [0])[0]
    kept = engine.kept()[:, length:]
    ids[:, length:] = torch.where(kept, engine.ids[:, length:], pad)
    if streamer is not None:
        streamer.put(ids[:, length:][kept].cpu())
        streamer.end()
    return engine.output(ids, kept, slice(length, None))


class Engine:
    """Replaces the masks of a canvas; `steps` does the work and yields after each step.

    Args:
        canvas: True = a position to fill, which must hold a mask token.
        Others as in `respond`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        ids: Int[Tensor, "B L"],
        is_token: Bool[Tensor, "B L"],
        canvas: Bool[Tensor, "B L"],
        config: DiffusionGenerationConfig,
        *,
        block: Int[Tensor, "B L"] | None = None,
        cached: bool = False,
        logits_processor: Any | None = None,
        stopping_criteria: Any | None = None,
    ):
        self.denoiser, self.config = denoiser, config
        self.processor, self.criterion = as_processor(logits_processor), as_criterion(stopping_criteria)
        self.ids, self.is_token, self.canvas = ids.clone(), is_token, canvas
        self.model_block, self.cached = block, cached
        self.policy = config.make_policy()
        self.remasks = isinstance(self.policy, Remask)
        batch, device = len(ids), ids.device
        self.place = (canvas.long().cumsum(dim=1) - 1).clamp(min=0)  # index within the canvas
        if block is None:
            number = self.place // (config.block_length or max(1, ids.shape[1]))
        else:
            self.first_block = torch.where(canvas, block, _LAST).amin(dim=1)
            number = block - self.first_block[:, None]
        self.block_of = torch.where(canvas, number, -1)
        self.sizes, self.steps_of = self._schedule()
        self.positions = token_positions(is_token)
        self.eos = torch.tensor(config.eos_token_ids, dtype=torch.long, device=device)
        assert config.mask_token_id is not None
        self.mask_token_id = config.mask_token_id
        forbidden = {config.mask_token_id, *(config.suppress_tokens or [])} - set(config.eos_token_ids)
        self.forbidden = torch.tensor(sorted(forbidden), device=device)
        self.seed = self._seeds(batch)

        self.masked = canvas.clone()
        self.block = torch.zeros(batch, dtype=torch.long, device=device)
        self.step = torch.zeros_like(self.block)  # within the block
        self.written = torch.zeros_like(self.block)  # blocks of the model whose keys and values are kept
        self.num_forwards = torch.zeros_like(self.block)
        self.limit = torch.full_like(self.block, _LAST)  # of the canvas, by the stopping criteria
        self.read = torch.zeros_like(self.block)  # tokens that the criteria have seen
        self.commit_step = torch.full_like(ids, -1)
        self.confidence = torch.zeros(ids.shape, device=device)
        self.entropy = torch.zeros_like(self.confidence)
        self.states: list[tuple[Tensor, Tensor]] = []
        self.differing = torch.zeros(batch, 2, device=device)  # other tokens, tokens compared

    def steps(self) -> Iterable[None]:
        """Work until every row is done; one denoising step of all rows at work at a time."""
        while len(rows := self._rows_at_work()) > 0:
            if self.cached:
                self._write_finished(rows)
            for group in self._groups(rows):
                self._advance(group)
            if self.config.return_trace:
                self.states.append((rows, self.ids[rows]))
            self._stop(rows)
            yield

    def kept(self) -> Bool[Tensor, "B L"]:
        """Positions of the canvas that belong to the answer: committed, none after an end."""
        return self._before_end() & ~self.masked & self.canvas & (self.place < self.limit[:, None])

    def output(self, sequences: Tensor, kept: Tensor, columns: slice) -> DiffusionGenerationOutput:
        """Make what `generate` returns; `kept` and the trace are those of `columns`."""
        trace = self.config.return_trace
        return DiffusionGenerationOutput(
            sequences=sequences,
            tokens_per_forward=kept.sum(dim=1) / self.num_forwards.clamp(min=1),
            num_forwards=self.num_forwards,
            commit_step=torch.where(kept, self.commit_step[:, columns], -1) if trace else None,
            confidence=torch.where(kept, self.confidence[:, columns], 0.0) if trace else None,
            entropy=torch.where(kept, self.entropy[:, columns], 0.0) if trace else None,
            states=self._states(columns) if trace else None,
            disagreement=self.differing[:, 0] / self.differing[:, 1].clamp(min=1)
            if self.config.check_cache
            else None,
        )

    def _schedule(self) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
        """Count the tokens of each block and share the steps out."""
        blocks = max(1, int(self.block_of.amax()) + 1) if self.block_of.numel() else 1
        sizes = self.block_of.new_zeros(len(self.block_of), blocks)
        sizes.scatter_add_(1, self.block_of.clamp(min=0), self.canvas.long())
        shared = []
        for row in sizes.tolist():
            taken = [size for size in row if size]
            steps = share_steps(min(self.config.steps or sum(taken), sum(taken)), taken) if taken else []
            shared.append(steps + [1] * (blocks - len(steps)))
        return sizes, torch.tensor(shared, device=sizes.device).view(len(sizes), blocks)

    def _seeds(self, batch: int) -> Int[Tensor, "B"]:
        seed = torch.as_tensor(self.config.seed, dtype=torch.long, device=self.ids.device).reshape(-1)
        if len(seed) not in (1, batch):
            raise UnmaskError(
                f"seed must be one number, or one for each of the {batch} rows; got {len(seed)}."
            )
        return keyed_hash(seed).expand(batch)

    def _before_end(self) -> Bool[Tensor, "B L"]:
        """Positions before or at the first committed end token of each row: those still worth denoising."""
        ended = torch.isin(self.ids, self.eos) & self.canvas & ~self.masked
        return ended.cumsum(dim=1) - ended.long() == 0

    def _rows_at_work(self) -> Int[Tensor, "R"]:
        """Find the rows that are not done, and move those on whose block is."""
        if self.remasks:  # what is committed may be masked again: only the steps end a block
            over = self.step >= self.steps_of.gather(1, self._block_index())[:, 0]
            self.block, self.step = self.block + over.long(), torch.where(over, 0, self.step)
            alive = (self.block_of >= self.block[:, None]).any(dim=1)
        else:
            self.open = self.masked & self._before_end()
            current = torch.where(self.open, self.block_of, _LAST).amin(dim=1)
            alive = current < _LAST
            moved = alive & (current != self.block)
            self.step = torch.where(moved, 0, self.step)
            self.block = torch.where(alive, current, self.block)
        return (alive & (self.limit == _LAST)).nonzero()[:, 0]

    def _block_index(self) -> Int[Tensor, "B 1"]:
        return self.block.clamp(max=self.sizes.shape[1] - 1)[:, None]

    def _view(self, rows: Tensor, where: Tensor) -> View:
        """Show the rows up to the last column that one of them may see."""
        is_token = self.is_token[rows]
        if self.model_block is not None or self.config.canvas == "growing":
            is_token = is_token & (self.block_of[rows] <= self.block[rows, None])
        columns = torch.arange(is_token.shape[1], device=rows.device)
        stop = int((is_token * (columns + 1)).amax())
        block = None if self.model_block is None else self.model_block[rows, :stop]
        return View(self.ids[rows, :stop], is_token[:, :stop], where[:, :stop], rows, block)

    def _views(self, view: View) -> list[View]:
        """The view, and with guidance also the one without the prompt."""
        if not self.config.guidance_scale:
            return [view]
        hidden = view.is_token & ~self.canvas[view.rows, : view.ids.shape[1]]
        ids = view.ids.masked_fill(hidden, self.mask_token_id)
        return [view, view._replace(ids=ids, rows=view.rows + len(self.ids))]

    def _write_finished(self, rows: Tensor) -> None:
        """Let the cache keep what is final: the prompt at first, then each block that is done."""
        assert self.model_block is not None
        now = self.first_block[rows] + self.block[rows]
        rows = rows[behind := self.written[rows] < now]
        if len(rows) == 0:
            return
        now = now[behind]
        block = self.model_block[rows]
        final = (block >= self.written[rows, None]) & (block < now[:, None]) & self.is_token[rows]
        self.written[rows] = now
        if final.any():
            view = self._view(rows, torch.zeros_like(final))
            view = view._replace(compute=final[:, : view.ids.shape[1]])
            for one in self._views(view):
                for _ in self.denoiser(one):
                    pass

    def _groups(self, rows: Tensor) -> list[tuple[Tensor, bool]]:
        """Split the rows into those computed whole and those against an approximate cache."""
        if self.config.approximate_cache is None:
            return [(rows, True)]
        step, interval = self.step[rows], self.config.refresh_interval
        fresh = step == 0 if interval is None else step % interval == 0
        return [(rows[flag], whole) for flag, whole in ((fresh, True), (~fresh, False)) if flag.any()]

    def _compute(self, view: View, whole: bool) -> Tensor | None:
        """Which positions of a view are computed; None = all, without a cache."""
        rows = view.rows
        if self.cached:
            assert view.block is not None
            return view.is_token & (view.block == (self.first_block[rows] + self.block[rows])[:, None])
        if self.config.approximate_cache is None:
            return None
        if whole:
            return view.is_token
        block = self.block_of[rows, : view.ids.shape[1]]
        current = block == self.block[rows, None]
        if self.config.approximate_cache == "dual":
            return current
        return view.is_token & (current.long().cumsum(dim=1) > 0)

    def _advance(self, group: tuple[Tensor, bool]) -> None:
        """Take one step of some rows: forward, sample, choose, commit."""
        rows, whole = group
        in_block = self.block_of[rows] == self.block[rows, None]
        where = in_block & (self.masked[rows] if self.remasks else self.open[rows])
        view = self._view(rows, where)
        sampled = self._sample(view._replace(compute=self._compute(view, whole)), whole)

        def spread(values: Tensor, before: Tensor) -> Tensor:
            return before.clone().masked_scatter(where, values.to(before.dtype))

        index = self._block_index()[rows]
        step, steps = self.step[rows], self.steps_of[rows].gather(1, index)[:, 0]
        committed = in_block & ~self.masked[rows]
        target = (step + 1) * self.sizes[rows].gather(1, index)[:, 0] // steps
        confidence = spread(sampled.confidence, self.confidence[rows])
        entropy = spread(sampled.entropy, self.entropy[rows])
        draft = Draft(
            candidates=where,
            token=spread(sampled.token, self.ids[rows]),
            confidence=confidence,
            margin=spread(sampled.margin, torch.zeros_like(confidence)),
            entropy=entropy,
            committed=committed,
            quota=(target - committed.sum(dim=1)).clamp(min=1),
            step=step,
            steps=steps,
            seed=self.seed[rows],
            position=self.positions[rows],
        )
        move = self.policy(draft)
        if not isinstance(move, Move):
            move = Move(move)
        commit = move.commit & where
        if not self.remasks and not commit.any(dim=1).all():
            raise UnmaskError("the policy committed no token of some row; it must commit one at least.")
        self.ids[rows] = torch.where(commit, draft.token, self.ids[rows])
        self.confidence[rows] = torch.where(commit, confidence, self.confidence[rows])
        self.entropy[rows] = torch.where(commit, entropy, self.entropy[rows])
        self.commit_step[rows] = torch.where(commit, self.num_forwards[rows, None], self.commit_step[rows])
        self.masked[rows] = self.masked[rows] & ~commit
        if move.remask is not None:
            again = move.remask & committed
            self.masked[rows] = self.masked[rows] | again
            self.ids[rows] = self.ids[rows].masked_fill(again, self.mask_token_id)
        self.num_forwards[rows] += where.any(dim=1).long()
        self.step[rows] += 1

    def _sample(self, view: View, whole: bool) -> Sampled:
        """Ask the network and draw a token for each position asked for."""
        row, column = view.where.nonzero(as_tuple=True)
        if len(row) == 0:
            none = self.confidence.new_zeros(0)
            return Sampled(none.long(), none, none, none)
        views = self._views(view)
        parts = self._parts(views, row, column)
        if self.config.check_cache and not whole:
            exact = self._parts([one._replace(compute=None) for one in views], row, column)
            other = (parts.token != exact.token).float()
            both = torch.stack([other, torch.ones_like(other)], dim=1)
            self.differing.index_add_(0, view.rows[row], both)
        return parts

    def _parts(self, views: list[View], row: Tensor, column: Tensor) -> Sampled:
        config, parts, start = self.config, [], 0
        for logits, *without in zip(*map(self.denoiser, views), strict=True):
            stop = start + len(logits)
            rows, at = views[0].rows[row[start:stop]], column[start:stop]
            if without:
                logits = logits + config.guidance_scale * (logits - without[0])
            logits = suppress(logits, self.forbidden)
            early = self.place[rows, at] < config.min_new_tokens
            if early.any():
                logits[early] = suppress(logits[early], self.eos)
            raw = None
            if self.processor is not None:
                raw, logits = logits, self.processor(self.ids[rows], logits.clone())
            uniform = None
            if config.temperature > 0:
                uniform = uniforms(self.seed[rows], self.positions[rows, at], self.num_forwards[rows])
            part = sample(logits, uniform, config.temperature or 1.0, config.top_k, config.top_p, raw)
            if part.confidence.isnan().any():
                raise UnmaskError(
                    "the model's logits are not numbers (NaN or infinite), or leave no token possible; check"
                    " its weights and dtype."
                )
            parts.append(part)
            start = stop
        return Sampled(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def _stop(self, rows: Tensor) -> None:
        """Ask the stopping criteria about every new token that no mask stands before."""
        if self.criterion is None:
            return
        for row in rows.tolist():
            columns = self.canvas[row].nonzero()[:, 0]
            masked = self.masked[row, columns].nonzero()[:, 0]
            prefix = int(masked[0]) if len(masked) else len(columns)
            given = self.is_token[row]
            for length in range(int(self.read[row]) + 1, prefix + 1):
                seen = given & (torch.arange(len(given), device=given.device) <= columns[length - 1])
                ids, start = self.ids[row, seen][None], int(seen[: columns[0]].sum())
                if self.criterion(ids, start):
                    self.limit[row] = length
                    break
            self.read[row] = prefix

    def _states(self, columns: slice) -> Int[Tensor, "B F C"]:
        frames: list[list[Tensor]] = [[] for _ in range(len(self.ids))]
        for rows, ids in self.states:
            for row, state in zip(rows.tolist(), ids, strict=True):
                frames[row].append(state[columns])
        most = max(map(len, frames), default=0)
        last = [row[-1] if row else self.ids[index, columns] for index, row in enumerate(frames)]
        filled = [[*row, *[end] * (max(1, most) - len(row))] for row, end in zip(frames, last, strict=True)]
        return torch.stack([torch.stack(row) for row in filled])
