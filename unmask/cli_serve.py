"""`unmask serve`: a model behind OpenAI's routes."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from unmask.cli_generate import hide_progress_bars
from unmask.cli_options import Model
from unmask.errors import UnmaskError


def serve(
    model: Model,
    port: Annotated[int, Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    host: Annotated[str, Option(help="Address to listen on; by default this machine alone.")] = "127.0.0.1",
    api_key: Annotated[
        str | None,
        Option(envvar="UNMASK_API_KEY", help="Key that every request must bring.", show_default=False),
    ] = None,
    adapter: Annotated[
        list[str] | None,
        Option(metavar="NAME=FOLDER", help="LoRA adapters to serve as the model NAME; repeatable."),
    ] = None,
    max_batch_tokens: Annotated[
        int, Option(min=1, help="Tokens of prompts and canvases that run at once.")
    ] = 65536,
    queue: Annotated[int, Option(min=1, help="Requests that may wait; another gets status 429.")] = 256,
) -> None:
    """Serve a model: OpenAI's /v1/chat/completions and /v1/completions, a playground, metrics.

    Every request has its own decoding settings, and an answer does not depend
    on the load. SIGTERM finishes what runs. docs/serving.md has the fields.
    """
    adapters: dict[str, str] = {}
    for one in adapter or []:
        name, equals, folder = one.partition("=")
        if not equals or not name or not folder or name in adapters:
            raise UnmaskError(f"--adapter: expected NAME=FOLDER, each NAME once; got {one!r}.")
        adapters[name] = folder
    if api_key == "":
        raise UnmaskError("--api-key must not be empty.")
    hide_progress_bars(model)
    from unmask.serving.run import serve as run

    run(
        model,
        host=host,
        port=port,
        api_key=api_key,
        adapters=adapters,
        max_batch_tokens=max_batch_tokens,
        queue=queue,
    )
