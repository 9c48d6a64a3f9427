"""Replicas of `unmask serve` as a Ray Serve deployment: as many as there are requests for.

    pip install 'unmask[serve,ray]'
    UNMASK_MODEL=outputs/demo/final serve run examples.ray_serve:deployment

Each replica is the whole server, with the same routes; Ray Serve spreads requests over them and starts more
when the requests that run and wait exceed `target_ongoing_requests` a replica.
"""

from __future__ import annotations

import os
from typing import Any

from ray import serve  # pyright: ignore[reportMissingImports]


class Application:
    """The ASGI application of a replica, made there: models do not travel between processes."""

    def __init__(self, model: str):
        self.model, self.made = model, None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request; the first is the replica's start."""
        if self.made is None:
            from unmask.serving.app import Server, make_app
            from unmask.serving.run import load_models
            from unmask.serving.scheduler import Scheduler

            models, activate = load_models(self.model)
            self.made: Any = make_app(Server(models, Scheduler(activate=activate)))
        await self.made(scope, receive, send)


def deploy(model: str, most: int = 8) -> Any:
    """Make the deployment, of 1 to `most` replicas."""
    scaling = {"min_replicas": 1, "max_replicas": most, "target_ongoing_requests": 32}

    @serve.deployment(name="unmask", autoscaling_config=scaling, max_ongoing_requests=256)
    @serve.ingress(Application(model))
    class Replica:
        pass

    made: Any = Replica
    return made.bind()


if model := os.environ.get("UNMASK_MODEL"):
    deployment = deploy(model)
