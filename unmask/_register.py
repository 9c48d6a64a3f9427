"""Make transformers' Auto classes know diffusion checkpoints, without importing transformers.

Importing transformers takes seconds and `import unmask` must not. So nothing is imported here: once
somebody imports the Auto classes, each of our model types is entered there with a stand-in that imports
the real classes when the first checkpoint of that type is opened (and they then take its place).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPES = ("unmask_qwen3", "unmask_qwen2", "unmask_llama")
_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _stand_in(model_type: str) -> Any:
    def real() -> Any:
        from unmask.model.families import MODEL_CLASSES  # registers the real classes

        return MODEL_CLASSES[model_type].config_class

    class StandIn:
        """Stands for a config class of unmask until it is needed."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real()(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return real().from_dict(*args, **kwargs)

        @classmethod
        def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
            return real().from_pretrained(*args, **kwargs)

    StandIn.model_type = model_type  # type: ignore[attr-defined]
    return StandIn


def _enter(auto_config: Any) -> None:
    for model_type in MODEL_TYPES:
        if model_type not in auto_config.CONFIG_MAPPING:
            auto_config.CONFIG_MAPPING.register(model_type, _stand_in(model_type))


class _FollowedLoader(Loader):
    """The module's own loader, and then our entries."""

    def __init__(self, loader: Loader):
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _enter(module)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == _AUTO_CONFIG else None
        if spec is not None and spec.loader is not None:
            spec.loader = _FollowedLoader(spec.loader)
        return spec


def enter_auto_classes() -> None:
    """Enter our model types into the Auto classes: now if they are imported, else when they are."""
    if _AUTO_CONFIG in sys.modules:
        _enter(sys.modules[_AUTO_CONFIG])
    else:
        sys.meta_path.insert(0, _Finder())
