"""Shim over the old data code until the data stage lands."""
from __future__ import annotations
from typing import Any, NamedTuple
import numpy as np
from unmask.data.manifest import fingerprint as tokenizer_fingerprint  # noqa
from unmask.training.dataset import load_data as _load, run_tokenizer, RunData  # noqa
from unmask.training.feed import source_names

class Unit(NamedTuple):
    row: Any
    epoch: int
    place: int

class Steps:
    def __init__(self, data, rank, ranks): self.data, self.rank, self.ranks, self.cache = data, rank, ranks, {}
    def at(self, step):
        r=self.data._recipe; n=len(self.data.rows); B=r.global_batch_size; units=[]
        for place in range(self.rank,B,self.ranks):
            k=step*B+place; e=k//n
            if e not in self.cache: self.cache={e: np.random.default_rng([r.seed,e]).permutation(n)}
            units.append(Unit(self.data.rows[int(self.cache[e][k%n])], e, place))
        return units
    def state_dict(self): return {}
    def load_state_dict(self,s): pass
    def counts(self): return []

def load_data(recipe, tokenizer):
    d=_load(recipe, tokenizer)
    d._recipe=recipe; d.source_names=source_names(recipe)
    d.steps=lambda rank=0,ranks=1,workers=0: Steps(d,rank,ranks)
    return d
