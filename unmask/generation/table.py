"""The rows that run, as tensors with a line each: what a step reads and writes, and what the network is shown.

All of it is on the CPU. A step reads the tables as they are, and writes to them once it has succeeded.

Shapes: R rows, L columns of a row, S columns shown to the network, W columns of the widest current block.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Int
from torch import Tensor

from unmask.diffusion.rng import keyed_hash
from unmask.generation.policy import REMASK, Proposal
from unmask.generation.rows import LAST, State

NEVER = LAST // 2  # a step that does not come; a step may be added to it


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


class Columns(NamedTuple):
    """The columns of each row's current block."""

    index: Int[Tensor, "R W"]  # the first column in the place of those that a narrower block lacks
    in_block: Bool[Tensor, "R W"]  # True = a position to fill of the block; gaps have text between them


class Changes(NamedTuple):
    """What a step wrote: K positions, row by row."""

    row: Int[Tensor, "K"]  # index among the rows of the step
    position: Int[Tensor, "K"]  # in the canvas
    token: Int[Tensor, "K"]
    confidence: Tensor
    is_token: Bool[Tensor, "K"]  # False = masked again


class RowTable:
    """The tables of at most `max_rows` rows."""

    def __init__(self, max_rows: int, mask_token_id: int):
        self.mask_token_id = mask_token_id
        self.running: dict[int, State] = {}  # by line
        self.lines = list(range(max_rows))[::-1]  # free ones
        # By line and column.
        self.ids, self.block_of, self.model_block, self.offset, self.commit_step, self.canvas_index = (
            torch.zeros(max_rows, 0, dtype=torch.long) for _ in range(6)
        )
        self.masked, self.canvas, self.is_end = (torch.zeros(max_rows, 0, dtype=torch.bool) for _ in range(3))
        self.confidence, self.entropy = (torch.zeros(max_rows, 0) for _ in range(2))
        # By line. Of the current block: its number, step, first column, the column after its last, its
        # tokens, its steps, and the step from which on a forward pass computes the whole row.
        self.length, self.seed, self.num_forwards, self.block, self.step_of = (
            torch.zeros(max_rows, dtype=torch.long) for _ in range(5)
        )
        self.start, self.stop, self.size, self.steps_of, self.refresh_step = (
            torch.zeros(max_rows, dtype=torch.long) for _ in range(5)
        )
        self.region, self.cached_blocks, self.refresh = (
            torch.zeros(max_rows, dtype=torch.long) for _ in range(3)
        )
        self.first_end = torch.zeros(max_rows, dtype=torch.long)  # column of the first end token
        self.hides, self.remasks, self.keeps_prefix = (
            torch.zeros(max_rows, dtype=torch.bool) for _ in range(3)
        )

    def begin(self, state: State) -> None:
        """Write a row into a free line, at its first block."""
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
        self.refresh[line] = config.refresh_interval or NEVER
        self.region[line] = state.regions[0].start if state.regions else -1
        if state.sizes:
            self.begin_block(state, 0)

    def begin_block(self, state: State, number: int) -> None:
        """Go to a block of a row, and to its first step."""
        line = state.line
        self.block[line] = number
        self.step_of[line] = self.refresh_step[line] = 0
        self.start[line], self.stop[line] = state.windows[number]
        self.size[line], self.steps_of[line] = state.sizes[number], state.steps[number]

    def end(self, state: State) -> None:
        """Free the line of a row."""
        del self.running[state.line]
        self.lines.append(state.line)

    def states(self, rows: Int[Tensor, "R"]) -> list[State]:
        """What else is known of some rows."""
        return [self.running[line] for line in rows.tolist()]

    def in_order(self) -> Int[Tensor, "R"]:
        """The rows that run, those that look alike next to each other: attention takes them together."""
        rows = torch.tensor(list(self.running), dtype=torch.long)
        shown = torch.where(self.hides[rows], self.stop[rows], self.length[rows])
        return rows[(2 * shown + (self.step_of[rows] == 0)).argsort(stable=True)]

    def columns(self, rows: Int[Tensor, "R"]) -> Columns:
        """Find the columns of each current block."""
        start, stop = self.start[rows, None], self.stop[rows, None]
        index = start + torch.arange(int((stop - start).amax()))
        is_inside = index < stop
        index = torch.where(is_inside, index, start)
        return Columns(index, is_inside & (self.block_of[rows[:, None], index] == self.block[rows, None]))

    def is_whole(self, rows: Int[Tensor, "R"]) -> Bool[Tensor, "R"]:
        """Whether the next forward pass of a row with an approximate cache computes all of its tokens."""
        return self.step_of[rows] >= self.refresh_step[rows]

    def denoiser_input(
        self, rows: Int[Tensor, "R"], index: Int[Tensor, "R W"], candidates: Bool[Tensor, "R W"]
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
        needs[row, index[row, place]] = True
        has_region, states = self.region[rows, None] >= 0, self.states(rows)
        has_blocks = states[0].row.block is not None
        model_block = self.model_block[rows, :stop]
        if has_blocks:
            is_new = model_block >= self.cached_blocks[rows, None]
        else:
            # With an approximate cache only fresh rows are computed whole.
            current = block_of == block
            after = current.long().cumsum(dim=1) > 0
            is_new = torch.where(self.keeps_prefix[rows, None], current, after)
            is_new |= self.is_whole(rows)[:, None]
        inputs = DenoiserInput(
            ids=self.ids[rows, :stop],
            is_token=is_token,
            needs_logits=needs,
            is_computed=is_token & (is_new | ~has_region),
            region=self.region[rows],
            block=model_block if has_blocks else None,
        )
        guided = torch.tensor([state.is_guided for state in states]).nonzero()[:, 0]
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

    def write(
        self,
        rows: Int[Tensor, "R"],
        columns: Columns,
        proposal: Proposal,
        commit: Bool[Tensor, "R W"],
        remask: Bool[Tensor, "R W"],
    ) -> Changes:
        """Write down what a step decided; a position both committed and masked again is masked."""
        row, place = (commit | remask).nonzero(as_tuple=True)
        at = rows[row], columns.index[row, place]
        is_token = commit[row, place] & ~remask[row, place]
        token = torch.where(is_token, proposal.token[row, place], self.mask_token_id)
        self.ids[at], self.masked[at] = token, ~is_token
        self.confidence[at], self.entropy[at] = proposal.confidence[row, place], proposal.entropy[row, place]
        self.commit_step[at] = self.num_forwards[rows][row]
        ends = [tuple(state.row.config.eos_token_ids) for state in self.states(rows)]
        for group in alike(ends):
            mine = torch.isin(row, group)
            line, column = at[0][mine], at[1][mine]
            end = torch.tensor(ends[int(group[0])], dtype=torch.long)
            self.is_end[line, column] = is_token[mine] & torch.isin(token[mine], end)
        is_end = self.is_end[rows]
        self.first_end[rows] = torch.where(is_end.any(dim=1), is_end.to(torch.uint8).argmax(dim=1), LAST)
        return Changes(row, self.canvas_index[at], token, self.confidence[at], is_token)

    def advance(self, rows: Int[Tensor, "R"], asked: Bool[Tensor, "R"]) -> None:
        """Count a step, and the forward pass of those rows that were denoised."""
        step = self.step_of[rows]
        is_whole = asked & self.is_whole(rows)
        self.refresh_step[rows] = torch.where(is_whole, step + self.refresh[rows], self.refresh_step[rows])
        self.num_forwards[rows] += asked.long()
        self.step_of[rows] = step + 1

    def is_complete(self, rows: Int[Tensor, "R"], columns: Columns) -> Bool[Tensor, "R"]:
        """Whether each current block is filled, up to an end token.

        A remasking policy may mask a committed token again: only the steps complete its block.
        """
        is_open = self.masked[rows[:, None], columns.index] & columns.in_block
        is_open &= columns.index <= self.first_end[rows, None]
        is_last = self.step_of[rows] >= self.steps_of[rows]
        return torch.where(self.remasks[rows], is_last, ~is_open.any(dim=1))

    def first_masked(self, rows: Int[Tensor, "R"]) -> Int[Tensor, "R"]:
        """The first masked column of each row; its length if there is none."""
        masked = self.masked[rows]
        return torch.where(masked.any(dim=1), masked.to(torch.uint8).argmax(dim=1), self.length[rows])


def alike(keys: list[tuple[Any, ...]]) -> list[Int[Tensor, "n"]]:
    """Indices of the entries that are equal, group by group."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [torch.tensor(indices) for indices in groups.values()]
