"""The denoising loop: rows come and go, and each forward pass takes every row one step further.

A row is a prompt with a canvas of masks, its own settings and its own seed. At each step the engine asks a
`Denoiser` for the logits of the masked positions of every row's current block, draws a token for each, lets
each row's policy choose which to commit, and says in an `Event` what became of the row. It knows nothing of
networks. Noise is keyed by (seed, position, step), so that an answer depends on the row alone.

The bookkeeping is on the CPU, in tables with a line for each running row; of a network's device it asks
once a step for the tokens drawn.

Shapes: R rows, L columns of a row, S columns shown to the network, W columns of the widest current block,
M positions whose logits are needed, N blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.diffusion.rng import keyed_hash
from unmask.errors import UnmaskError
from unmask.generation.policy import REMASK, Decision, Proposal
from unmask.generation.pool import KeyPool
from unmask.generation.rows import LAST, Answer, Event, Row, State, prepare
from unmask.generation.sampling import Group, Logits, Sampled, draw, uniforms


class DenoiserInput(NamedTuple):
    """What the network is given in one forward pass, on the CPU."""

    ids: Int[Tensor, "R S"]
    is_token: Bool[Tensor, "R S"]  # True = may be attended to; False = padding, and masks of later blocks
    needs_logits: Bool[Tensor, "R S"]
    is_computed: Bool[Tensor, "R S"]  # the keys and values of other tokens are in the cache
    # Where the row's region of the cache begins; -1 = it has none, and computes all of its tokens.
    region: Int[Tensor, "R"]
    # Blocks of a block-causal model: a token attends to its own and earlier ones. None = to every token.
    block: Int[Tensor, "R S"] | None = None


class Denoiser(Protocol):
    """A network, or a table in its place."""

    def __call__(self, inputs: DenoiserInput) -> Logits:
        """Compute aligned logits of the M positions of `needs_logits`, in row-major order."""
        ...

    def copy_keys(self, source: int, target: int, count: int) -> None:
        """Copy what the cache holds in `count` places from `source` on."""
        ...


class _Change(NamedTuple):
    """What a step changed in a row, see `Event`."""

    positions: list[int]
    tokens: list[int]
    confidence: list[float]
    remasked: list[int]


class Engine:
    """Fills the canvases of rows that are added at any time.

    Args:
        mask_token_id: the id of a mask.
        max_rows: rows that run at once; others wait for their turn, in the order they came.
        pool: places of the denoiser's cache; a row waits until there are enough. None = nothing is cached.
    """

    def __init__(
        self, denoiser: Denoiser, mask_token_id: int, *, max_rows: int = 64, pool: KeyPool | None = None
    ):
        if max_rows < 1:
            raise UnmaskError(f"max_rows must be 1 or more; got {max_rows}.")
        self.denoiser, self.mask_token_id, self.pool = denoiser, mask_token_id, pool
        self.waiting: deque[State] = deque()
        self.running: dict[int, State] = {}  # by line
        self.lines = list(range(max_rows))[::-1]  # free ones
        self.last_slot = -1
        # By line and column.
        self.ids, self.block_of, self.model_block, self.offset, self.commit_step, self.canvas_index = (
            torch.zeros(max_rows, 0, dtype=torch.long) for _ in range(6)
        )
        self.masked, self.canvas, self.is_end = (torch.zeros(max_rows, 0, dtype=torch.bool) for _ in range(3))
        self.confidence, self.entropy = (torch.zeros(max_rows, 0) for _ in range(2))
        # By line. Of the current block: its number, step, first column, the column after its last, its
        # tokens and its steps.
        self.length, self.seed, self.num_forwards, self.block, self.step_of = (
            torch.zeros(max_rows, dtype=torch.long) for _ in range(5)
        )
        self.start, self.stop, self.size, self.steps_of, self.region = (
            torch.zeros(max_rows, dtype=torch.long) for _ in range(5)
        )
        self.cached_blocks, self.refresh = (torch.zeros(max_rows, dtype=torch.long) for _ in range(2))
        self.first_end = torch.zeros(max_rows, dtype=torch.long)  # column of the first end token
        self.hides, self.remasks, self.keeps_prefix = (
            torch.zeros(max_rows, dtype=torch.bool) for _ in range(3)
        )

    # Rows.

    def add_row(self, row: Row) -> int:
        """Take a row in; it starts with one of the next forward passes.

        Returns:
            Its slot: a number that its events carry and no other row ever has.

        Raises:
            UnmaskError: fewer steps than blocks, a seed that is not one number, or a row that needs more
                places than the cache has.
        """
        self.last_slot += 1
        state = prepare(row, self.last_slot)
        size = state.places
        if size and (self.pool is None or size > self.pool.size):
            raise UnmaskError(
                f"a row of {len(row.ids)} tokens needs {size} places of the cache, which has"
                f" {0 if self.pool is None else self.pool.size}; give it more, or set use_cache = False."
            )
        self.waiting.append(state)
        return state.slot

    def drop(self, slot: int) -> None:
        """Let a row go, finished or not, before the next forward pass; a slot that has ended is ignored."""
        self.waiting = deque(state for state in self.waiting if state.slot != slot)
        for state in [state for state in self.running.values() if state.slot == slot]:
            self._leave(state)

    @property
    def num_rows(self) -> int:
        """Rows that run or wait."""
        return len(self.running) + len(self.waiting)

    def steps(self) -> Iterator[list[Event]]:
        """Work until no row is left; yields after each forward pass what it did, an event for each row.

        Rows may be added and dropped between two of them, and afterwards `steps` may be called again. What
        the caller does with the events, and how soon, changes no answer.
        """
        while self.num_rows:
            yield self.step()

    def step(self) -> list[Event]:
        """Let waiting rows begin, and make one forward pass; see `steps`."""
        events = self._admit()
        if lines := list(self.running):
            rows = torch.tensor(lines)
            # Rows that look alike next to each other: attention takes them together.
            shown = torch.where(self.hides[rows], self.stop[rows], self.length[rows])
            rows = rows[(2 * shown + (self.step_of[rows] == 0)).argsort(stable=True)]
            events += self._advance(rows)
        return events

    def _admit(self) -> list[Event]:
        """Let rows begin, first come first served, as long as there is room; returns those with no canvas."""
        events = []
        while self.waiting and self.lines:
            state = self.waiting[0]
            size, keys, source, known = state.places, [], None, 0
            if size:
                assert self.pool is not None
                if state.row.block is not None and not state.is_guided:
                    self._name_blocks(state, state.first_block, state.row.ids)
                    keys = state.keys[:-1]  # the last predicts the first token, for which it is computed
                if (taken := self.pool.take(size, keys)) is None:
                    break
                region, source, known = taken
                state.regions.append(region)
            self.waiting.popleft()
            self._begin(state)
            if source is not None:
                self.denoiser.copy_keys(source.start, state.regions[0].start, source.ends[known - 1])
                self.cached_blocks[state.line] = known
            if not state.sizes:
                events.append(Event(state.slot, answer=Answer([], [], 0)))
                self._leave(state)
        return events

    def _begin(self, state: State) -> None:
        """Write a row into the tables."""
        line, row, config = self.lines.pop(), state.row, state.row.config
        state.line, length = line, len(row.ids)
        self.running[line] = state
        if (more := length - self.ids.shape[1]) > 0:
            for name in (
                *("ids", "block_of", "model_block", "offset", "commit_step", "canvas_index"),
                *("masked", "canvas", "is_end", "confidence", "entropy"),
            ):
                setattr(self, name, F.pad(getattr(self, name), (0, more)))
        for table, values in (
            (self.ids, row.ids),
            (self.block_of, state.block_of),
            (self.offset, state.offset),
            (self.masked, row.canvas),
            (self.canvas, row.canvas),
            (self.canvas_index, row.canvas.long().cumsum(dim=0) - 1),
            (self.model_block, 0 if row.block is None else row.block),
        ):
            table[line, :length] = values
            table[line, length:] = 0
        self.is_end[line], self.commit_step[line] = False, -1
        self.confidence[line], self.entropy[line] = 0.0, 0.0
        self.length[line], self.first_end[line] = length, LAST
        self.seed[line] = keyed_hash(int(config.seed))  # type: ignore[arg-type]
        self.num_forwards[line] = self.cached_blocks[line] = 0
        self.hides[line] = row.block is not None or config.canvas == "growing"
        self.remasks[line] = config.policy_name in REMASK
        self.keeps_prefix[line] = config.approximate_cache == "dual"
        self.refresh[line] = config.refresh_interval or LAST
        self.region[line] = state.regions[0].start if state.regions else -1
        if state.sizes:
            self._begin_block(state, 0)

    def _begin_block(self, state: State, number: int) -> None:
        line = state.line
        self.block[line], self.step_of[line] = number, 0
        self.start[line], self.stop[line] = state.windows[number]
        self.size[line], self.steps_of[line] = state.sizes[number], state.steps[number]

    def _leave(self, state: State) -> None:
        del self.running[state.line]
        self.lines.append(state.line)
        for region in state.regions:
            assert self.pool is not None
            self.pool.give_back(region)

    def _name_blocks(self, state: State, count: int, ids: Tensor) -> None:
        """Name the first `count` blocks by their content and that of all before them."""
        assert state.row.block is not None
        while len(state.keys) < count:
            block = ids[: len(state.row.block)][state.row.block == len(state.keys)]
            before = state.keys[-1] if state.keys else b""
            state.keys.append(sha256(before + block.numpy().tobytes()).digest())

    # A step.

    def _advance(self, rows: Int[Tensor, "R"]) -> list[Event]:
        """Take one step of some rows; where that fails, of each alone, so that one harms no other."""
        try:
            with torch.no_grad():
                step = self._decide(rows)
        except Exception as error:
            if len(rows) > 1:
                return [event for row in rows.split(1) for event in self._advance(row)]
            state = self.running[int(rows)]
            self._leave(state)
            return [Event(state.slot, error=error)]
        return self._commit(rows, *step)

    def _decide(self, rows: Int[Tensor, "R"]) -> tuple[Tensor, Tensor, Proposal, Tensor, Tensor]:
        """Forward pass, draw and decision of some rows; the tables stay as they are.

        Returns:
            Columns of each current block (R, W), which rows were denoised, the proposal, and which of its
            positions are committed and masked again.
        """
        start, stop = self.start[rows, None], self.stop[rows, None]
        columns = start + torch.arange(int((stop - start).amax()))
        inside = columns < stop
        columns = torch.where(inside, columns, start)
        at = (rows[:, None], columns)
        in_block = inside & (self.block_of[at] == self.block[rows, None])
        masked = self.masked[at] & in_block
        may_change = self.remasks[rows, None] | (columns <= self.first_end[rows, None])
        groups = _alike([self.running[row].decides for row in rows.tolist()])
        candidates = self._restricted(masked & may_change, rows, columns, groups)
        asked = candidates.any(dim=1)
        token, confidence, entropy = self.ids[at], self.confidence[at], self.entropy[at]
        margin = torch.zeros_like(confidence)
        if asked.any():
            sampled = self._sample(rows[asked], columns[asked], candidates[asked])
            if not sampled.valid.all():
                raise UnmaskError(
                    "the model's logits, or those that logits_processor returned, are NaN or infinite, or"
                    " allow no token; check the weights and their dtype."
                )
            token.masked_scatter_(candidates, sampled.token)
            for values, drawn in (
                (confidence, sampled.confidence),
                (entropy, sampled.entropy),
                (margin, sampled.margin),
            ):
                values.masked_scatter_(candidates, drawn.to(values.dtype))
        committed = in_block & ~masked
        step, steps, size = self.step_of[rows], self.steps_of[rows], self.size[rows]
        target = (step + 1) * size // steps
        proposal = Proposal(
            candidates=candidates,
            token=token,
            confidence=confidence,
            margin=margin,
            entropy=entropy,
            committed=committed,
            quota=(target - committed.sum(dim=1)).clamp(min=1),
            share=target - step * size // steps,
            step=step,
            steps=steps,
            seed=self.seed[rows],
            position=columns,
        )
        commit, remask = torch.zeros_like(candidates), torch.zeros_like(candidates)
        for group in groups:
            state = self.running[int(rows[group[0]])]
            config = state.row.config
            part = Proposal(*(values[group] for values in proposal))
            ends = torch.tensor(config.eos_token_ids)
            decision = state.policy(_with_ends_last(part, ends) if config.defer_end else part)
            if not isinstance(decision, Decision):
                decision = Decision(decision)
            else:
                self._note_drafts(rows[group], decision, part)
            chosen = decision.commit & part.candidates
            if config.policy_name not in REMASK and not chosen.any(dim=1).all():
                raise UnmaskError("the policy committed no token of some row; it must commit one at least.")
            commit[group] = chosen
            if decision.remask is not None:
                remask[group] = decision.remask & part.committed
        return columns, asked, proposal, commit, remask

    def _note_drafts(self, rows: Tensor, decision: Decision, proposal: Proposal) -> None:
        """Note which rows may be masked again: those whose policy returned a `Decision` at their first step.

        Raises:
            UnmaskError: another row is masked again, whose tokens were said to be final.
        """
        again = [False] * len(rows)
        if decision.remask is not None:
            again = (decision.remask & proposal.committed).any(dim=1).tolist()
        for row, is_masked_again in zip(rows.tolist(), again, strict=True):
            state = self.running[row]
            state.drafts |= int(self.num_forwards[row]) == 0
            if is_masked_again and not state.drafts:
                raise UnmaskError(
                    "the policy masks a token again that was final; a policy that ever does so must return a"
                    " Decision from the first step on."
                )

    def _restricted(
        self, candidates: Bool[Tensor, "R W"], rows: Tensor, columns: Tensor, groups: list[Tensor]
    ) -> Bool[Tensor, "R W"]:
        """The candidates of the first group that is not complete, and at first a block's first token alone."""
        for group in groups:
            config = self.running[int(rows[group[0]])].row.config
            offset, part = self.offset[rows[group, None], columns[group]], candidates[group]
            if config.sub_block_length is not None:
                number = torch.where(part, offset // config.sub_block_length, LAST)
                part = part & (number == number.amin(dim=1, keepdim=True))
            if config.first_token_alone:
                first = part & (offset == 0)
                part = torch.where(first.any(dim=1, keepdim=True), first, part)
            if config.sub_block_length is not None or config.first_token_alone:
                candidates[group] = part
        return candidates

    def _sample(self, rows: Tensor, columns: Tensor, candidates: Bool[Tensor, "R W"]) -> Sampled:
        """Run the network once, and draw a token for each candidate."""
        inputs, guided = self._input(rows, columns, candidates)
        logits = self.denoiser(inputs)
        device = logits.device
        row, place = candidates.nonzero(as_tuple=True)
        column, line = columns[row, place], rows[row]
        # The second copy of a guided row comes after all rows, with as many positions.
        is_second = torch.isin(row, guided)
        second = len(row) + is_second.long().cumsum(dim=0) - 1
        groups, states = [], [self.running[index] for index in rows.tolist()]
        for group in _alike([state.samples for state in states]):
            state = states[int(group[0])]
            config, index = state.row.config, torch.isin(row, group).nonzero()[:, 0]
            early = self.canvas_index[line[index], column[index]] < config.min_new_tokens
            for part, forbidden in zip((index[~early], index[early]), state.forbidden, strict=True):
                if len(part):
                    groups.append(
                        Group(
                            index=part.to(device),
                            source=part.to(device),
                            temperature=config.temperature,
                            top_k=config.top_k,
                            top_p=config.top_p,
                            forbidden=forbidden,
                            process=self._process(state) if state.row.logits_processors else None,
                            unconditional=second[part].to(device) if config.guidance_scale else None,
                            guidance_scale=config.guidance_scale,
                            figures=config.figures,
                        )
                    )
        uniform = None
        if any(group.temperature for group in groups):
            uniform = uniforms(self.seed[line], column, self.num_forwards[line]).to(device)
        drawn = draw(logits, groups, uniform)
        # All at once, the only time that a step waits for the device; a float64 holds any id.
        token, *figures, valid = torch.stack([values.double() for values in drawn]).cpu()
        return Sampled(token.long(), *figures, valid=valid.bool())

    def _process(self, state: State) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (positions of the result, their logits) that calls the row's own logits processors."""
        processors: Any = LogitsProcessorList(state.row.logits_processors)

        def process(_: Tensor, logits: Tensor) -> Tensor:
            ids = self.ids[state.line, : len(state.row.ids)].clone().to(logits.device)  # to write into
            return processors(ids.expand(len(logits), -1), logits)

        return process

    def _input(
        self, rows: Tensor, columns: Tensor, candidates: Bool[Tensor, "R W"]
    ) -> tuple[DenoiserInput, Tensor]:
        """Show the rows up to the last column that one of them may attend to, guided rows twice.

        Returns:
            Also the indices of the rows whose second copy, with the prompt masked, stands at the end.
        """
        length = int(self.length[rows].amax())
        block_of, block = self.block_of[rows, :length], self.block[rows, None]
        column = torch.arange(length)
        is_token = column < self.length[rows, None]
        is_token &= ~self.hides[rows, None] | (block_of <= block)
        stop = int((is_token * (column + 1)).amax())
        is_token, block_of = is_token[:, :stop], block_of[:, :stop]
        needs = torch.zeros_like(is_token)
        row, place = candidates.nonzero(as_tuple=True)
        needs[row, columns[row, place]] = True
        has_region, has_blocks = (
            self.region[rows, None] >= 0,
            self.running[int(rows[0])].row.block is not None,
        )
        model_block = self.model_block[rows, :stop]
        if has_blocks:
            is_new = model_block >= self.cached_blocks[rows, None]
        else:
            # With an approximate cache only fresh rows are computed whole.
            current = block_of == block
            after = current.long().cumsum(dim=1) > 0
            is_new = torch.where(self.keeps_prefix[rows, None], current, after)
            is_new |= (self.step_of[rows] % self.refresh[rows] == 0)[:, None]
        inputs = DenoiserInput(
            ids=self.ids[rows, :stop],
            is_token=is_token,
            needs_logits=needs,
            is_computed=is_token & (is_new | ~has_region),
            region=self.region[rows],
            block=model_block if has_blocks else None,
        )
        is_guided = torch.tensor([self.running[index].is_guided for index in rows.tolist()])
        guided = is_guided.nonzero()[:, 0]
        if len(guided):
            prompt = is_token[guided] & ~self.canvas[rows[guided], :stop]
            region = self.region[rows[guided]]
            inputs = DenoiserInput(
                ids=torch.cat([inputs.ids, inputs.ids[guided].masked_fill(prompt, self.mask_token_id)]),
                is_token=torch.cat([is_token, is_token[guided]]),
                needs_logits=torch.cat([needs, needs[guided]]),
                is_computed=torch.cat([inputs.is_computed, inputs.is_computed[guided]]),
                region=torch.cat(
                    [inputs.region, torch.where(region < 0, -1, region + self.length[rows[guided]])]
                ),
                block=None if inputs.block is None else torch.cat([inputs.block, inputs.block[guided]]),
            )
        return inputs, guided

    def _commit(
        self, rows: Tensor, columns: Tensor, asked: Tensor, proposal: Proposal, commit: Tensor, remask: Tensor
    ) -> list[Event]:
        """Write down what was decided, go on to the next block or end where one is complete, and tell."""
        row, place = (commit | remask).nonzero(as_tuple=True)
        at = rows[row], columns[row, place]
        kept = commit[row, place] & ~remask[row, place]
        token = torch.where(kept, proposal.token[row, place], self.mask_token_id)
        self.ids[at], self.masked[at] = token, ~kept
        self.confidence[at], self.entropy[at] = proposal.confidence[row, place], proposal.entropy[row, place]
        self.commit_step[at] = self.num_forwards[rows][row]
        states = [self.running[index] for index in rows.tolist()]
        for group in _alike([tuple(state.row.config.eos_token_ids) for state in states]):
            ends = torch.tensor(states[int(group[0])].row.config.eos_token_ids, dtype=torch.long)
            mine = torch.isin(row, group)
            line, column = at[0][mine], at[1][mine]
            self.is_end[line, column] = kept[mine] & torch.isin(token[mine], ends)
        is_end = self.is_end[rows]
        self.first_end[rows] = torch.where(is_end.any(dim=1), is_end.to(torch.uint8).argmax(dim=1), LAST)
        is_first = (asked & (self.step_of[rows] == 0)).tolist()
        for state in (state for state, first in zip(states, is_first, strict=True) if first):
            if state.regions and state.row.block is not None:
                self._keep_blocks(state)
        self.num_forwards[rows] += asked.long()
        self.step_of[rows] += 1

        # A remasking policy may mask a committed token again: only the steps complete its block.
        in_block = (columns < self.stop[rows, None]) & (columns >= self.start[rows, None])
        in_block &= self.block_of[rows[:, None], columns] == self.block[rows, None]
        is_open = self.masked[rows[:, None], columns] & in_block
        is_open &= columns <= self.first_end[rows, None]
        complete = torch.where(
            self.remasks[rows], self.step_of[rows] >= self.steps_of[rows], ~is_open.any(dim=1)
        )
        confidence = self.confidence[at]
        changed = self._changes(row, self.canvas_index[at], token, kept, confidence, len(rows))
        masked = self.masked[rows]
        first_masked = torch.where(masked.any(dim=1), masked.to(torch.uint8).argmax(dim=1), self.length[rows])
        events = []
        facts = zip(states, complete.tolist(), first_masked.tolist(), changed, strict=True)
        for state, is_complete, column, change in facts:
            events.append(self._event(state, is_complete, column, change))
        return events

    def _changes(
        self, row: Tensor, position: Tensor, token: Tensor, kept: Tensor, confidence: Tensor, count: int
    ) -> list[_Change]:
        """Gather what was committed and masked again by row."""
        changes = [_Change([], [], [], []) for _ in range(count)]
        facts = (values.tolist() for values in (row, position, token, kept, confidence))
        for index, where, what, is_token, probability in zip(*facts, strict=True):
            change = changes[index]
            if is_token:
                change.positions.append(where)
                change.tokens.append(what)
                change.confidence.append(probability)
            else:
                change.remasked.append(where)
        return changes

    def _keep_blocks(self, state: State) -> None:
        """Note that everything before the current block has been computed, and may serve later rows."""
        line, block = state.line, state.row.block
        assert self.pool is not None and block is not None
        current = state.first_block + int(self.block[line])
        self.cached_blocks[line] = current
        if not state.is_guided:
            self._name_blocks(state, current, self.ids[line])
            ends = block.bincount().cumsum(dim=0)[:current].tolist()
            self.pool.name_blocks(state.regions[0], state.keys, ends)

    def _event(self, state: State, is_complete: bool, first_masked: int, change: _Change) -> Event:
        """Tell what a step did, and end the row or its block if it is complete."""
        line, first_end = state.line, int(self.first_end[state.line])
        number, done = int(self.block[line]), False
        if is_complete:
            number += 1
            done = number == len(state.sizes) or state.windows[number][0] > first_end
            if not done:
                self._begin_block(state, number)
        stop = first_masked  # the column up to which all is final
        if state.drafts and not done:
            stop = min(stop, state.windows[number][0])
        num_final = int((state.columns < stop).sum())
        if first_end < LAST:
            num_final = min(num_final, int(self.canvas_index[line, first_end]) + 1)
        if state.row.stopping_criteria:
            try:
                self._ask_criteria(state, num_final)
            except Exception as error:  # harms no other row
                self._leave(state)
                return Event(state.slot, error=error)
            num_final, done = min(num_final, state.limit), done or state.limit < LAST
        if "confidence" not in state.row.config.figures:
            change = change._replace(confidence=[])
        event = Event(state.slot, len(state.columns), **change._asdict(), num_final=num_final)
        if not done:
            return event
        columns, trace = state.columns[:num_final], state.row.config.return_trace
        answer = Answer(
            self.ids[line, columns].tolist(),
            self.commit_step[line, columns].tolist(),
            int(self.num_forwards[line]),
            self.confidence[line, columns].tolist() if trace else [],
            self.entropy[line, columns].tolist() if trace else [],
        )
        self._leave(state)
        return replace(event, answer=answer)

    def _ask_criteria(self, state: State, num_final: int) -> None:
        """Ask the stopping criteria about every new token that is final, as are all before it."""
        prompt = state.row.ids[~state.row.canvas]
        for count in range(state.tested + 1, num_final + 1):
            ids: Any = torch.cat([prompt, self.ids[state.line, state.columns[:count]]])[None]
            answers = (
                criterion(ids, None, prompt_length=len(prompt))
                if isinstance(criterion, StoppingCriteria)
                else criterion(ids, None)
                for criterion in state.row.stopping_criteria
            )
            if any(bool(torch.as_tensor(answer).all()) for answer in answers):
                state.limit = count
                break
        state.tested = num_final


def _alike(keys: list[tuple[Any, ...]]) -> list[Int[Tensor, "n"]]:
    """Indices of the entries that are equal, group by group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [torch.tensor(indices) for indices in groups.values()]


def _with_ends_last(proposal: Proposal, ends: Int[Tensor, "E"]) -> Proposal:
    """Let end tokens seem the least likely to the policy, so that it commits them when nothing else is left."""
    end = torch.isin(proposal.token, ends) & proposal.candidates
    return proposal._replace(
        confidence=proposal.confidence.masked_fill(end, -1.0),
        margin=proposal.margin.masked_fill(end, -1.0),
        entropy=proposal.entropy.masked_fill(end, torch.inf),
    )
