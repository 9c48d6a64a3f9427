"""The denoising loop: rows come and go, and each forward pass takes every row one step further.

A row is a prompt with a canvas of masks, its own settings and its own seed. At each step the engine asks a
`Denoiser` for the logits of the masked positions of every row's current block, draws a token for each, lets
each row's policy choose which to commit, and says in an `Event` what became of the row. It knows nothing of
networks. Noise is keyed by (seed, position, step), so that an answer depends on the row alone.

The bookkeeping is on the CPU, in the tables of `table.py`; of a network's device it asks once a step for the
tokens drawn.

Shapes: R rows, W columns of the widest current block, M positions whose logits are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteria

from unmask.errors import UnmaskError
from unmask.generation.policy import REMASK, Decision, Proposal, with_ends_last
from unmask.generation.pool import KeyPool
from unmask.generation.rows import LAST, Answer, Event, Row, State, prepare
from unmask.generation.sampling import Group, Logits, Sampled, draw, uniforms
from unmask.generation.table import Changes, Columns, DenoiserInput, RowTable, alike


class Denoiser(Protocol):
    """A network, or a table in its place."""

    def __call__(self, inputs: DenoiserInput) -> Logits:
        """Compute aligned logits of the M positions of `needs_logits`, in row-major order."""
        ...

    def copy_keys(self, source: int, target: int, count: int) -> None:
        """Copy what the cache holds in `count` places from `source` on."""
        ...


class _Step(NamedTuple):
    """What a step decided, before any of it is written."""

    columns: Columns
    asked: Bool[Tensor, "R"]  # True = denoised by a forward pass
    proposal: Proposal
    commit: Bool[Tensor, "R W"]
    remask: Bool[Tensor, "R W"]


class _Outcome(NamedTuple):
    """What a step did to a row, which is not yet told."""

    state: State
    is_complete: bool  # its current block
    first_masked: int  # column
    change: dict[str, Any]  # fields of `Event`


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
        self.table = RowTable(max_rows, mask_token_id)
        self.last_slot = -1
        # Of the step that is being told: a stopping criterion may be interrupted, and the rest is told after.
        self.outcomes: deque[_Outcome] = deque()
        self.events: list[Event] = []

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
        for state in [state for state in self.table.running.values() if state.slot == slot]:
            self._leave(state)

    @property
    def num_rows(self) -> int:
        """Rows that run or wait."""
        return len(self.table.running) + len(self.waiting)

    def steps(self) -> Iterator[list[Event]]:
        """Work until no row is left; yields after each forward pass what it did, an event for each row.

        Rows may be added and dropped between two of them, and afterwards `steps` may be called again. What
        the caller does with the events, and how soon, changes no answer.
        """
        while self.num_rows:
            yield self.step()

    def step(self) -> list[Event]:
        """Let waiting rows begin, and make one forward pass; see `steps`.

        An exception that ends no row, such as a KeyboardInterrupt, may leave it; the next call does the rest.
        """
        if not self.outcomes:
            self._admit()
            if self.table.running:
                self._advance(self.table.in_order())
        self._tell()
        events, self.events = self.events, []
        return events

    def _admit(self) -> None:
        """Let rows begin, first come first served, as long as there is room; those with no canvas end."""
        while self.waiting and self.table.lines:
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
            self.table.begin(state)
            if source is not None:
                self.denoiser.copy_keys(source.start, state.regions[0].start, source.ends[known - 1])
                self.table.cached_blocks[state.line] = known
            if not state.sizes:
                self.events.append(Event(state.slot, answer=Answer([], [], 0)))
                self._leave(state)

    def _leave(self, state: State) -> None:
        self.table.end(state)
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

    def _advance(self, rows: Int[Tensor, "R"]) -> None:
        """Take one step of some rows; where that fails, of each alone, so that one harms no other."""
        try:
            with torch.no_grad():
                step = self._decide(rows)
        except Exception as error:
            if len(rows) > 1:
                for row in rows.split(1):
                    self._advance(row)
            else:
                [state] = self.table.states(rows)
                self._leave(state)
                self.events.append(Event(state.slot, error=error))
            return
        self._commit(rows, step)

    def _decide(self, rows: Int[Tensor, "R"]) -> _Step:
        """Forward pass, draw and decision of some rows; the tables stay as they are."""
        table = self.table
        columns = table.columns(rows)
        index, in_block = columns
        at, states = (rows[:, None], index), table.states(rows)
        masked = table.masked[at] & in_block
        may_change = table.remasks[rows, None] | (index <= table.first_end[rows, None])
        groups = alike([state.decides for state in states])
        candidates = self._restricted(masked & may_change, table.offset[at], states, groups)
        asked = candidates.any(dim=1)
        token, confidence, entropy = table.ids[at], table.confidence[at], table.entropy[at]
        margin = torch.zeros_like(confidence)
        if asked.any():
            sampled = self._sample(rows[asked], index[asked], candidates[asked])
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
        step, steps, size = table.step_of[rows], table.steps_of[rows], table.size[rows]
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
            seed=table.seed[rows],
            position=index,
        )
        commit, remask = torch.zeros_like(candidates), torch.zeros_like(candidates)
        for group in groups:
            state = states[int(group[0])]
            config = state.row.config
            part = Proposal(*(values[group] for values in proposal))
            ends = torch.tensor(config.eos_token_ids)
            decision = state.policy(with_ends_last(part, ends) if config.defer_end else part)
            if not isinstance(decision, Decision):
                decision = Decision(decision)
            else:
                self._note_drafts([states[index] for index in group.tolist()], decision, part)
            chosen = decision.commit & part.candidates
            if config.policy_name not in REMASK and not chosen.any(dim=1).all():
                raise UnmaskError("the policy committed no token of some row; it must commit one at least.")
            commit[group] = chosen
            if decision.remask is not None:
                remask[group] = decision.remask & part.committed
        return _Step(columns, asked, proposal, commit, remask)

    def _note_drafts(self, states: list[State], decision: Decision, proposal: Proposal) -> None:
        """Note which rows may be masked again: those whose policy returned a `Decision` at their first step.

        Raises:
            UnmaskError: another row is masked again, whose tokens were said to be final.
        """
        again = [False] * len(states)
        if decision.remask is not None:
            again = (decision.remask & proposal.committed).any(dim=1).tolist()
        for state, is_masked_again in zip(states, again, strict=True):
            state.drafts |= int(self.table.num_forwards[state.line]) == 0
            if is_masked_again and not state.drafts:
                raise UnmaskError(
                    "the policy masks a token again that was final; a policy that ever does so must return a"
                    " Decision from the first step on."
                )

    def _restricted(
        self, candidates: Bool[Tensor, "R W"], offset: Tensor, states: list[State], groups: list[Tensor]
    ) -> Bool[Tensor, "R W"]:
        """The candidates of the first group that is not complete, and at first a block's first token alone."""
        for group in groups:
            config, part = states[int(group[0])].row.config, candidates[group]
            if config.sub_block_length is not None:
                number = torch.where(part, offset[group] // config.sub_block_length, LAST)
                part = part & (number == number.amin(dim=1, keepdim=True))
            if config.first_token_alone:
                first = part & (offset[group] == 0)
                part = torch.where(first.any(dim=1, keepdim=True), first, part)
            if config.sub_block_length is not None or config.first_token_alone:
                candidates[group] = part
        return candidates

    def _sample(
        self, rows: Int[Tensor, "R"], index: Int[Tensor, "R W"], candidates: Bool[Tensor, "R W"]
    ) -> Sampled:
        """Run the network once, and draw a token for each candidate."""
        table = self.table
        inputs, guided = table.denoiser_input(rows, index, candidates)
        logits = self.denoiser(inputs)
        device = logits.device
        row, place = candidates.nonzero(as_tuple=True)
        column, line = index[row, place], rows[row]
        # The second copy of a guided row comes after all rows, with as many positions.
        is_second = torch.isin(row, guided)
        second = len(row) + is_second.long().cumsum(dim=0) - 1
        groups, states = [], table.states(rows)
        for group in alike([state.samples for state in states]):
            state = states[int(group[0])]
            config, mine = state.row.config, torch.isin(row, group).nonzero()[:, 0]
            early = table.canvas_index[line[mine], column[mine]] < config.min_new_tokens
            for part, forbidden in zip((mine[~early], mine[early]), state.forbidden, strict=True):
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
            uniform = uniforms(table.seed[line], column, table.num_forwards[line]).to(device)
        drawn = draw(logits, groups, uniform)
        # All at once, the only time that a step waits for the device; a float64 holds any id.
        token, *figures, valid = torch.stack([values.double() for values in drawn]).cpu()
        return Sampled(token.long(), *figures, valid=valid.bool())

    def _process(self, state: State) -> Callable[[Tensor, Tensor], Tensor]:
        """A function of (positions of the result, their logits) that calls the row's own logits processors."""
        processors: Any = LogitsProcessorList(state.row.logits_processors)

        def process(_: Tensor, logits: Tensor) -> Tensor:
            ids = self.table.ids[state.line, : len(state.row.ids)].clone().to(logits.device)  # to write into
            return processors(ids.expand(len(logits), -1), logits)

        return process

    def _commit(self, rows: Int[Tensor, "R"], step: _Step) -> None:
        """Write down what was decided."""
        table = self.table
        states, is_first = table.states(rows), step.asked & (table.step_of[rows] == 0)
        changes = table.write(rows, step.columns, step.proposal, step.commit, step.remask)
        for state, first in zip(states, is_first.tolist(), strict=True):
            if first and state.regions and state.row.block is not None:
                self._keep_blocks(state)
        table.advance(rows, step.asked)
        facts = table.is_complete(rows, step.columns).tolist(), table.first_masked(rows).tolist()
        self.outcomes += map(_Outcome, states, *facts, _by_row(changes, len(rows)))

    def _tell(self) -> None:
        """Make an event of each outcome, going on to the next block or ending the row where one is complete."""
        while self.outcomes:
            outcome = self.outcomes[0]
            if self.table.running.get(outcome.state.line) is outcome.state:  # not dropped since
                self.events.append(self._event(*outcome))
            self.outcomes.popleft()

    def _keep_blocks(self, state: State) -> None:
        """Note that everything before the current block has been computed, and may serve later rows."""
        line, block = state.line, state.row.block
        assert self.pool is not None and block is not None
        current = state.first_block + int(self.table.block[line])
        self.table.cached_blocks[line] = current
        if not state.is_guided:
            self._name_blocks(state, current, self.table.ids[line])
            ends = block.bincount().cumsum(dim=0)[:current].tolist()
            self.pool.name_blocks(state.regions[0], state.keys, ends)

    def _event(self, state: State, is_complete: bool, first_masked: int, change: dict[str, Any]) -> Event:
        """Tell what a step did, and end the row or its block if it is complete."""
        table, line = self.table, state.line
        first_end, number = int(table.first_end[line]), int(table.block[line]) + is_complete
        done = is_complete and (number == len(state.sizes) or state.windows[number][0] > first_end)
        stop = first_masked  # the column up to which all is final
        if state.drafts and not done:
            stop = min(stop, state.windows[number][0])
        num_final = int((state.columns < stop).sum())
        if first_end < LAST:
            num_final = min(num_final, int(table.canvas_index[line, first_end]) + 1)
        if state.row.stopping_criteria:
            try:
                self._ask_criteria(state, num_final)
            except Exception as error:  # harms no other row
                self._leave(state)
                return Event(state.slot, error=error)
            num_final, done = min(num_final, state.limit), done or state.limit < LAST
        if "confidence" not in state.row.config.figures:
            change = {**change, "confidence": []}
        event = Event(state.slot, len(state.columns), **change, num_final=num_final)
        if not done:
            if is_complete:
                table.begin_block(state, number)
            return event
        columns, trace = state.columns[:num_final], state.row.config.return_trace
        answer = Answer(
            table.ids[line, columns].tolist(),
            table.commit_step[line, columns].tolist(),
            int(table.num_forwards[line]),
            table.confidence[line, columns].tolist() if trace else [],
            table.entropy[line, columns].tolist() if trace else [],
        )
        self._leave(state)
        return replace(event, answer=answer)

    def _ask_criteria(self, state: State, num_final: int) -> None:
        """Ask the stopping criteria about every new token that is final, as are all before it."""
        prompt = state.row.ids[~state.row.canvas]
        for count in range(state.tested + 1, num_final + 1):
            ids: Any = torch.cat([prompt, self.table.ids[state.line, state.columns[:count]]])[None]
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


def _by_row(changes: Changes, count: int) -> list[dict[str, list[Any]]]:
    """Gather what was committed and masked again by row, as fields of `Event`."""
    names = ("positions", "tokens", "confidence", "remasked")
    found: list[dict[str, list[Any]]] = [{name: [] for name in names} for _ in range(count)]
    for row, *facts, is_token in zip(*(values.tolist() for values in changes), strict=True):
        if is_token:
            for name, fact in zip(names, facts, strict=False):
                found[row][name].append(fact)
        else:
            found[row]["remasked"].append(facts[0])
    return found
