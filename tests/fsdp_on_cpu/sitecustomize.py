"""On PYTHONPATH of a test's processes: lets accelerate divide models over processes without accelerators.

It turns FSDP on for accelerators alone and would quietly run DDP on a CPU.
"""

import importlib.abc
import importlib.util
import sys


class _AfterAccelerate(importlib.abc.MetaPathFinder):
    """Changes `PartialState` once accelerate.state is imported, so that other processes start as quickly."""

    def find_spec(self, name, path=None, target=None):
        if name != "accelerate.state":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _patch(module)

        spec.loader.exec_module = exec_module
        return spec


def _patch(state):
    original = state.PartialState.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == state.DistributedType.MULTI_CPU:
            self.distributed_type = state.DistributedType.MULTI_GPU

    state.PartialState.__init__ = init


sys.meta_path.insert(0, _AfterAccelerate())
