"""Prints the estimated and the measured peak of a training step of each recipe on the command line, as JSON.

The peak is that of the resident set, which /proc/self/clear_refs sets back, above what the process had before
the model; each large tensor is a mapping of its own (MALLOC_MMAP_THRESHOLD_), given back when it is freed.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch

from unmask import byte_tokenizer
from unmask.config import Recipe, recipe_from_dict
from unmask.diffusion.corrupt import corrupt
from unmask.diffusion.objective import Objective
from unmask.training.build import build_model
from unmask.training.memory import estimate
from unmask.training.metrics import peak_memory
from unmask.training.optim import make_optimizers
from unmask.training.parallel import Processes, SharedModel, batch_plan

GROUP = Processes(0, 1, torch.device("cpu"))


def clear_peak() -> int:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(GROUP.device)


def take_two_steps(recipe: Recipe) -> int:
    model = build_model(recipe, byte_tokenizer())
    estimated = estimate(recipe, model, 1, recipe.data.block_size, "cpu")["peak"]
    shared = SharedModel(model, recipe, GROUP)
    optimizers = make_optimizers(recipe, model, shared.parameters)
    micro, accumulation = batch_plan(recipe, 1)
    everything = Objective(eps=0.9999)  # every token is masked
    for step in range(2):
        if step:
            clear_peak()
        for _ in range(accumulation):
            ids = torch.randint(0, 256, (micro, recipe.data.block_size))
            inputs = model.prepare(ids)
            shared.loss(inputs, corrupt(inputs, everything), everything, 1.0).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return estimated


def main() -> None:
    torch.set_num_threads(1)
    peaks = []
    trees = json.loads(sys.argv[1])
    take_two_steps(recipe_from_dict(trees[0]))  # what libraries allocate once
    for tree in trees:
        before = clear_peak()
        estimated = take_two_steps(recipe_from_dict(tree))
        peaks.append((estimated, peak_memory(GROUP.device) - before))
    print(json.dumps(peaks))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
