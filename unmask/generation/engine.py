"""The denoising loop: masks of a canvas, replaced by tokens over a number of steps, block by block.

The engine knows nothing of networks. It asks a `Denoiser` for the logits of the masked positions of the
current block, samples a token for each, lets a policy choose which to commit, and repeats until nothing is
masked. Each row has its own step and block, and its noise is keyed by (seed, position, step), so a row's
answer does not depend on the rest of the batch.

Shapes: B batch, R rows not yet done, L columns, S columns shown to the network, M positions whose logits are
needed, V vocabulary, C columns of a canvas appended to a prompt, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.utils.generic import ModelOutput

from unmask.diffusion.attention import token_positions
from unmask.diffusion.rng import keyed_hash
from unmask.errors import UnmaskError
from unmask.generation.config import DiffusionGenerationConfig
from unmask.generation.policy import REMASK, Decision, Proposal, share_steps
from unmask.generation.sampling import Sampled, as_functions, sample, suppress_, uniforms

_LAST = torch.iinfo(torch.long).max


class DenoiserInput(NamedTuple):
    """What the network is given in one forward pass."""

    ids: Int[Tensor, "R S"]
    is_token: Bool[Tensor, "R S"]  # True = may be attended to; False = padding, and masks of later blocks
    needs_logits: Bool[Tensor, "R S"]
    slots: Int[Tensor, "R"]  # the row of each row in the caches
    # Blocks of a block-causal model: a token attends to its own and earlier ones. None = to every token.
    block: Int[Tensor, "R S"] | None = None
    # True = compute this position and cache its keys and values; the others are read from the cache. None =
    # compute all and cache nothing.
    is_computed: Bool[Tensor, "R S"] | None = None


Denoiser = Callable[[DenoiserInput], Iterable[Tensor]]
"""-> aligned logits of the M positions of `needs_logits`, in row-major order, in chunks (m, V) that the engine
may change."""


@dataclass
class DiffusionGenerationOutput(ModelOutput):
    """What `generate` returns; a denoising step that only fills a cache is not counted."""

    # Prompt and response (B, P + C); padding after the first end token of a response.
    sequences: Int[Tensor, "B L"] | None = None
    # Response tokens, the end token included, per denoising step of the row.
    tokens_per_forward: Float[Tensor, "B"] | None = None
    num_forwards: Int[Tensor, "B"] | None = None  # denoising steps of each row
    # With `return_trace`: the step, from 0, that committed each canvas token, -1 after the end of a response;
    # the model's probability of the token and its entropy (nats) at that step; and the canvas after each step
    # of a row, of which rows with fewer steps repeat their last.
    commit_step: Int[Tensor, "B C"] | None = None
    confidence: Float[Tensor, "B C"] | None = None
    entropy: Float[Tensor, "B C"] | None = None
    states: Int[Tensor, "B F C"] | None = None


def generate_canvas(
    denoiser: Denoiser,
    input_ids: Int[Tensor, "B P"],
    is_token: Bool[Tensor, "B P"],
    config: DiffusionGenerationConfig,
    *,
    streamer: Any | None = None,
    **options: Any,
) -> DiffusionGenerationOutput:
    """Fill a canvas of `config.max_new_tokens` masks after each prompt; see `Engine`.

    Args:
        input_ids: prompts, padded on any side; is_token True = token, False = padding.
        config: settings, `mask_token_id` filled in.
        streamer: receives the prompt by `put`, each draft by `put_draft` if it has that method, and the
            response by `put`, like transformers' diffusion streamers; for a batch of one.

    Raises:
        UnmaskError: fewer steps than blocks, a policy that commits nothing, or logits that are NaN.
    """
    length = input_ids.shape[1]
    assert config.mask_token_id is not None
    masks = input_ids.new_full((len(input_ids), config.max_new_tokens), config.mask_token_id)
    ids = torch.cat([input_ids, masks], dim=1)
    is_token = torch.cat([is_token, torch.ones_like(masks, dtype=torch.bool)], dim=1)
    canvas = (torch.arange(ids.shape[1], device=ids.device) >= length).expand(ids.shape)
    engine = Engine(denoiser, ids, is_token, canvas, config, **options)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    for _ in engine.steps():
        if streamer is not None and hasattr(streamer, "put_draft"):
            streamer.put_draft(engine.ids[:, length:].cpu())
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_ids or [0])[0]
    in_answer = engine.in_answer()[:, length:]
    ids[:, length:] = torch.where(in_answer, engine.ids[:, length:], pad)
    if streamer is not None:
        streamer.put(ids[:, length:][in_answer].cpu())
        streamer.end()
    return engine.output(ids, in_answer, slice(length, None))


class Engine:
    """Replaces the masks of a canvas; `steps` does the work and yields after each step.

    Args:
        is_token: True = token, False = padding.
        canvas: True = a position to fill; its id must be the mask token.
        block: blocks of the tokens as a block-causal model was trained on.
        cached: whether the denoiser caches keys and values of completed blocks.
        logits_processor: functions of (ids (M, L) of each position's row, logits (M, V)), or one.
        stopping_criteria: functions of (ids (1, n), None), or one; those of transformers' class also get
            `prompt_length`. Asked about a row's ids up to each token that is final, as are all before it.
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
        assert config.mask_token_id is not None
        self.denoiser, self.config, self.mask_token_id = denoiser, config, config.mask_token_id
        self.processors = LogitsProcessorList(as_functions("logits_processor", logits_processor))
        self.criteria = as_functions("stopping_criteria", stopping_criteria)
        self.ids, self.is_token, self.canvas = ids.clone(), is_token, canvas
        self.model_block, self.cached = block, cached
        self.policy, self.remasks = config.make_policy(), config.policy_name in REMASK
        self.with_margin = callable(config.policy) or config.policy_name == "topk_margin"
        self.drafts = False  # whether what is committed may be masked again while its block is not complete
        batch, device = len(ids), ids.device
        self.canvas_index = (canvas.long().cumsum(dim=1) - 1).clamp(min=0)
        if block is None:
            number = self.canvas_index // (config.block_length or max(1, ids.shape[1]))
        else:
            self.first_block = torch.where(canvas, block, _LAST).amin(dim=1)
            number = block - self.first_block[:, None]
        self.block_of = torch.where(canvas, number, -1)
        self.offset = self._offsets(is_token, number)
        self.sizes, self.steps_of = self._schedule()
        self.positions = token_positions(is_token)
        self.eos = torch.tensor(config.eos_token_ids, dtype=torch.long, device=device)
        never = {config.mask_token_id, *(config.suppress_tokens or []), *(config.unused_tokens or [])}
        self.forbidden = torch.tensor(sorted(never - set(config.eos_token_ids)), device=device)
        seed = torch.as_tensor(config.seed, dtype=torch.long, device=device).reshape(-1)
        if len(seed) not in (1, batch):
            raise UnmaskError(
                f"seed must be one number, or one for each of the {batch} rows; got {len(seed)}."
            )
        self.seed = keyed_hash(seed).expand(batch)

        self.masked = canvas.clone()
        self.block = torch.zeros(batch, dtype=torch.long, device=device)
        self.step = torch.zeros_like(self.block)  # within the block
        self.cached_blocks = torch.zeros_like(self.block)  # blocks of the model that are in the cache
        self.num_forwards = torch.zeros_like(self.block)
        self.limit = torch.full_like(self.block, _LAST)  # length of the answer, by the stopping criteria
        self.tested = torch.zeros_like(self.block)  # tokens that the criteria have been asked about
        self.commit_step = torch.full_like(ids, -1)
        self.confidence = torch.zeros(ids.shape, device=device)
        self.entropy = torch.zeros_like(self.confidence)
        self.states: list[Tensor] = []

    def steps(self) -> Iterable[None]:
        """Work until every row is done, one denoising step of all unfinished rows at a time."""
        while len(rows := self._unfinished_rows()) > 0:
            if self.cached:
                self._cache_completed_blocks(rows)
            # With an approximate cache only fresh rows are computed whole.
            step, interval = self.step[rows], self.config.refresh_interval
            fresh = step == 0 if interval is None else step % interval == 0
            fresh |= self.config.approximate_cache is None
            for group, is_fresh in ((rows[fresh], True), (rows[~fresh], False)):
                if len(group):
                    self._advance(group, is_fresh)
            if self.config.return_trace:
                self.states.append(self.ids.clone())
            yield

    def in_answer(self) -> Bool[Tensor, "B L"]:
        """True = a position of the canvas that belongs to the answer: committed, and not after an end."""
        return self._before_end() & ~self.masked & self.canvas & (self.canvas_index < self.limit[:, None])

    def output(self, sequences: Tensor, in_answer: Tensor, columns: slice) -> DiffusionGenerationOutput:
        """Make what `generate` returns; `in_answer` and the trace are those of `columns`."""
        output = DiffusionGenerationOutput(
            sequences=sequences,
            tokens_per_forward=in_answer.sum(dim=1) / self.num_forwards.clamp(min=1),
            num_forwards=self.num_forwards,
        )
        if self.config.return_trace:
            output.commit_step = torch.where(in_answer, self.commit_step[:, columns], -1)
            output.confidence = torch.where(in_answer, self.confidence[:, columns], 0.0)
            output.entropy = torch.where(in_answer, self.entropy[:, columns], 0.0)
            output.states = torch.stack(self.states or [self.ids], dim=1)[:, :, columns]
        return output

    def _schedule(self) -> tuple[Int[Tensor, "B N"], Int[Tensor, "B N"]]:
        """Count the tokens of each block and divide the steps over the blocks."""
        sizes = self.block_of.new_zeros(len(self.block_of), max(1, int(self.block_of.amax()) + 1))
        sizes.scatter_add_(1, self.block_of.clamp(min=0), self.canvas.long())
        steps_of = torch.ones_like(sizes)
        for row, counts in enumerate(sizes.tolist()):
            used = [count for count in counts if count]
            if used:
                shares = share_steps(min(self.config.steps or sum(used), sum(used)), used)
                steps_of[row, : len(used)] = torch.tensor(shares)
        return sizes, steps_of

    def _offsets(self, is_token: Tensor, number: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
        """Index each position within its block, which may begin in the prompt."""
        part_of = self.canvas if self.model_block is None else is_token
        group = torch.where(part_of, number - number.amin(dim=1, keepdim=True), 0)
        index = part_of.long().cumsum(dim=1)
        first = torch.full_like(index, _LAST)
        first.scatter_reduce_(1, group, torch.where(part_of, index, _LAST), "amin")
        return index - first.gather(1, group)

    def _of_block(self, table: Int[Tensor, "B N"]) -> Int[Tensor, "B"]:
        """The entry of each row's current block; that of the last block for rows that are done."""
        return table.gather(1, self.block.clamp(max=table.shape[1] - 1)[:, None])[:, 0]

    def _before_end(self) -> Bool[Tensor, "B L"]:
        """Positions before or at the first committed end token of each row: those still worth denoising."""
        ended = torch.isin(self.ids, self.eos) & self.canvas & ~self.masked
        return ended.cumsum(dim=1) - ended.long() == 0

    def _unfinished_rows(self) -> Int[Tensor, "R"]:
        """Find the rows that are not done, and start the next block of those whose block is complete."""
        before_end = self._before_end()
        self.open = self.masked & before_end
        if self.remasks:  # a committed token may be masked again: only the steps complete a block
            complete = self.step >= self._of_block(self.steps_of)
        else:
            complete = ~(self.open & (self.block_of == self.block[:, None])).any(dim=1)
        self.block, self.step = self.block + complete.long(), torch.where(complete, 0, self.step)
        unfinished = ((self.block_of >= self.block[:, None]) & before_end).any(dim=1)
        if self.criteria:
            final = ~self.masked
            if self.drafts:
                final &= (self.block_of < self.block[:, None]) | ~unfinished[:, None]
            self._apply_criteria(final)
        return (unfinished & (self.limit == _LAST)).nonzero()[:, 0]

    def _input(self, rows: Tensor, needs_logits: Tensor) -> DenoiserInput:
        """Show the rows up to the last column that one of them may attend to."""
        is_token = self.is_token[rows]
        if self.model_block is not None or self.config.canvas == "growing":
            is_token = is_token & (self.block_of[rows] <= self.block[rows, None])
        columns = torch.arange(is_token.shape[1], device=rows.device)
        stop = int((is_token * (columns + 1)).amax())
        block = None if self.model_block is None else self.model_block[rows, :stop]
        return DenoiserInput(self.ids[rows, :stop], is_token[:, :stop], needs_logits[:, :stop], rows, block)

    def _with_guidance(self, inputs: DenoiserInput) -> list[DenoiserInput]:
        """The input, and with guidance also the one whose prompt is masked."""
        if not self.config.guidance_scale:
            return [inputs]
        is_prompt = inputs.is_token & ~self.canvas[inputs.slots, : inputs.ids.shape[1]]
        ids = inputs.ids.masked_fill(is_prompt, self.mask_token_id)
        return [inputs, inputs._replace(ids=ids, slots=inputs.slots + len(self.ids))]

    def _cache_completed_blocks(self, rows: Tensor) -> None:
        """Cache keys and values of what is final: the prompt at first, then each completed block."""
        assert self.model_block is not None
        current = self.first_block[rows] + self.block[rows]
        rows = rows[behind := self.cached_blocks[rows] < current]
        current, block = current[behind], self.model_block[rows]
        final = (block >= self.cached_blocks[rows, None]) & (block < current[:, None]) & self.is_token[rows]
        self.cached_blocks[rows] = current
        if final.any():
            inputs = self._input(rows, torch.zeros_like(final))
            inputs = inputs._replace(is_computed=final[:, : inputs.ids.shape[1]])
            for guided in self._with_guidance(inputs):
                list(self.denoiser(guided))

    def _computed(self, inputs: DenoiserInput, is_fresh: bool) -> Tensor | None:
        """Which positions are computed; None = all, without a cache."""
        rows = inputs.slots
        if self.cached:
            assert inputs.block is not None
            return inputs.is_token & (inputs.block == (self.first_block[rows] + self.block[rows])[:, None])
        if self.config.approximate_cache is None:
            return None
        current = self.block_of[rows, : inputs.ids.shape[1]] == self.block[rows, None]
        if self.config.approximate_cache == "prefix":
            current = inputs.is_token & (current.long().cumsum(dim=1) > 0)
        return inputs.is_token if is_fresh else current

    def _advance(self, rows: Tensor, is_fresh: bool) -> None:
        """Take one step of some rows: forward pass, sample, decide, commit."""
        in_block = self.block_of[rows] == self.block[rows, None]
        candidates = in_block & (self.masked[rows] if self.remasks else self.open[rows])
        candidates = self._restricted(candidates, rows)
        inputs = self._input(rows, candidates)
        sampled = self._sample(inputs._replace(is_computed=self._computed(inputs, is_fresh)))

        def scatter(values: Tensor, elsewhere: Tensor) -> Tensor:
            return elsewhere.clone().masked_scatter(candidates, values.to(elsewhere.dtype))

        step, steps = self.step[rows], self._of_block(self.steps_of)[rows]
        committed = in_block & ~self.masked[rows]
        target = (step + 1) * self._of_block(self.sizes)[rows] // steps
        confidence = scatter(sampled.confidence, self.confidence[rows])
        proposal = Proposal(
            candidates=candidates,
            token=scatter(sampled.token, self.ids[rows]),
            confidence=confidence,
            margin=scatter(sampled.margin, torch.zeros_like(confidence)),
            entropy=scatter(sampled.entropy, self.entropy[rows]),
            committed=committed,
            quota=(target - committed.sum(dim=1)).clamp(min=1),
            share=target - step * self._of_block(self.sizes)[rows] // steps,
            step=step,
            steps=steps,
            seed=self.seed[rows],
            position=self.positions[rows],
        )
        decision = self.policy(self._with_ends_last(proposal) if self.config.defer_end else proposal)
        if isinstance(decision, Decision):
            self.drafts = True
        else:
            decision = Decision(decision)
        commit = decision.commit & candidates
        if not self.remasks and not commit.any(dim=1).all():
            raise UnmaskError("the policy committed no token of some row; it must commit one at least.")
        self.ids[rows] = torch.where(commit, proposal.token, self.ids[rows])
        self.confidence[rows] = torch.where(commit, confidence, self.confidence[rows])
        self.entropy[rows] = torch.where(commit, proposal.entropy, self.entropy[rows])
        self.commit_step[rows] = torch.where(commit, self.num_forwards[rows, None], self.commit_step[rows])
        self.masked[rows] = self.masked[rows] & ~commit
        if decision.remask is not None:
            remask = decision.remask & committed
            self.masked[rows] = self.masked[rows] | remask
            self.ids[rows] = self.ids[rows].masked_fill(remask, self.mask_token_id)
        self.num_forwards[rows] += candidates.any(dim=1).long()
        self.step[rows] += 1

    def _restricted(self, candidates: Bool[Tensor, "R L"], rows: Tensor) -> Bool[Tensor, "R L"]:
        """The candidates of the first group that is not complete, and at first a block's first token alone."""
        offset = self.offset[rows]
        if self.config.sub_block_length is not None:
            group = torch.where(candidates, offset // self.config.sub_block_length, _LAST)
            candidates = candidates & (group == group.amin(dim=1, keepdim=True))
        if self.config.first_token_alone:
            first = candidates & (offset == 0)
            candidates = torch.where(first.any(dim=1, keepdim=True), first, candidates)
        return candidates

    def _with_ends_last(self, proposal: Proposal) -> Proposal:
        """Let end tokens seem the least likely to the policy, so that it commits them when nothing else is left."""
        end = torch.isin(proposal.token, self.eos) & proposal.candidates
        return proposal._replace(
            confidence=proposal.confidence.masked_fill(end, -1.0),
            margin=proposal.margin.masked_fill(end, -1.0),
            entropy=proposal.entropy.masked_fill(end, torch.inf),
        )

    def _sample(self, inputs: DenoiserInput) -> Sampled:
        """Run the network and draw a token for each position whose logits are needed."""
        config, start = self.config, 0
        row, column = inputs.needs_logits.nonzero(as_tuple=True)
        none = self.confidence.new_zeros(0)
        chunks = [Sampled(none.long(), none, none, none)]
        guided = self._with_guidance(inputs) if len(row) else []
        for logits, *unconditional in zip(*map(self.denoiser, guided), strict=True):
            part = slice(start, start + len(logits))
            rows, columns, start = inputs.slots[row[part]], column[part], part.stop
            if unconditional:
                logits = logits + config.guidance_scale * (logits - unconditional[0])
            suppress_(logits, self.forbidden)
            early = self.canvas_index[rows, columns] < config.min_new_tokens
            if early.any():
                logits[early] = suppress_(logits[early], self.eos)
            raw = None
            if self.processors:
                ids: Any = self.ids[rows]
                raw, logits = logits, self.processors(ids, cast(Any, logits.clone()))
            uniform = None
            if config.temperature > 0:
                uniform = uniforms(self.seed[rows], self.positions[rows, columns], self.num_forwards[rows])
            drawn = (uniform, config.temperature or 1.0, config.top_k, config.top_p, raw)
            chunks.append(sample(logits, *drawn, with_margin=self.with_margin))
        return Sampled(*(torch.cat(field) for field in zip(*chunks, strict=True)))

    def _apply_criteria(self, final: Bool[Tensor, "B L"]) -> None:
        """Ask the stopping criteria about every new token that is final, as are all before it."""
        for row in (self.limit == _LAST).nonzero()[:, 0].tolist():
            columns = self.canvas[row].nonzero()[:, 0]
            prompt = self.ids[row, self.is_token[row] & ~self.canvas[row]]
            length = int(final[row, columns].long().cumprod(dim=0).sum())
            for count in range(int(self.tested[row]) + 1, length + 1):
                ids: Any = torch.cat([prompt, self.ids[row, columns[:count]]])[None]
                answers = (
                    criterion(ids, None, prompt_length=len(prompt))
                    if isinstance(criterion, StoppingCriteria)
                    else criterion(ids, None)
                    for criterion in self.criteria
                )
                if any(bool(torch.as_tensor(answer).all()) for answer in answers):
                    self.limit[row] = count
                    break
            self.tested[row] = length
