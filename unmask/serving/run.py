"""Load the models and serve them."""

from __future__ import annotations

import json
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from unmask.data.tokenizer import check_vocabulary, load_tokenizer
from unmask.errors import UnmaskError, UnmaskWarning
from unmask.generation.config import DiffusionGenerationConfig
from unmask.io import reason
from unmask.model.bf16 import place_for_inference
from unmask.model.checkpoint import ADAPTER_CONFIG, fingerprint, is_adapter, load_model, read_config
from unmask.model.config import FIELDS
from unmask.serving.rows import Served
from unmask.serving.scheduler import Scheduler

LOCAL = ("127.0.0.1", "::1", "localhost")


def load_models(
    name: str, adapters: Mapping[str, str] | None = None
) -> tuple[list[Served], Callable[[Served], None]]:
    """Load a checkpoint, and LoRA adapters that share its weights.

    Args:
        adapters: folders of adapters by the names that requests give them.

    Returns:
        The models, the checkpoint first; and a function that puts a model's adapters in place.

    Raises:
        UnmaskError: as `load_model`; and adapters that were trained on other weights or another attention.
    """
    model: Any = load_model(name)
    place_for_inference(model)
    tokenizer = load_tokenizer(name)
    check_vocabulary(tokenizer, model.config, name)
    created = int(time.time())
    models = [
        Served(
            name,
            model,
            tokenizer,
            DiffusionGenerationConfig.from_generic(model.generation_config),
            created=created,
        )
    ]
    if not adapters:
        return models, lambda served: None
    if is_adapter(name):
        raise UnmaskError(
            f"--adapter: {name} has adapters itself; serve its base, or merge it (unmask merge)."
        )
    from peft import PeftModel

    weights, with_adapters, learns_mask = fingerprint(model), None, set()
    for number, (served_as, folder) in enumerate(adapters.items()):
        if served_as == name or not served_as:
            raise UnmaskError(
                f"--adapter: the name {served_as!r} is the model's own, or empty; give another."
            )
        if not is_adapter(folder):
            raise UnmaskError(
                f"--adapter: {folder} is not a folder of LoRA adapters: it has no {ADAPTER_CONFIG}."
            )
        values = read_config(folder)
        own_config = json.loads((Path(folder).expanduser() / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        for key in (key for key in FIELDS if key != "noise_eps"):  # which is of the training alone
            if key in values and values[key] != getattr(model.config, key, None):
                raise UnmaskError(
                    f"--adapter: {folder} was trained with {key} = {values[key]}, {name} has"
                    f" {getattr(model.config, key, None)}; serve it alone."
                )
        if values.get("base_fingerprint") not in (None, weights):
            raise UnmaskError(
                f"--adapter: {folder} was trained on other weights than those of {name}; serve it alone."
            )
        learns_mask.add(bool(own_config.get("trainable_token_indices")))
        if len(learns_mask) > 1:
            raise UnmaskError(
                "--adapter: adapters with lora.learn_mask and without it cannot be served together."
            )
        try:
            if with_adapters is None:
                with_adapters = PeftModel.from_pretrained(model, folder, adapter_name=str(number))
            else:
                with_adapters.load_adapter(folder, str(number))
        except Exception as error:  # damaged weights, or those of another rank
            raise UnmaskError(f"--adapter: {folder} cannot be put into {name}: {error}.") from error
        own = load_tokenizer(folder)
        check_vocabulary(own, model.config, folder)
        config = DiffusionGenerationConfig.from_generic(DiffusionGenerationConfig.from_pretrained(folder))
        models.append(Served(served_as, model, own, config, adapter=str(number), created=created))
    assert with_adapters is not None
    model.eval()
    return models, Adapters(with_adapters)


class Adapters:
    """Puts the adapters of a model in place, or none for the model itself."""

    def __init__(self, with_adapters: Any):
        self.model, self.active = with_adapters, ""

    def __call__(self, served: Served) -> None:
        """Put them in place before a forward pass."""
        if served.adapter == self.active:
            return
        if served.adapter is None:
            self.model.base_model.disable_adapter_layers()
        else:
            self.model.base_model.enable_adapter_layers()
            self.model.set_adapter(served.adapter, inference_mode=True)
        self.active = served.adapter


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before a model is loaded."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise UnmaskError(
            f"--port: {host}:{port} cannot be listened on: {reason(error)}; name another one."
        ) from error


def serve(
    name: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    adapters: Mapping[str, str] | None = None,
    max_batch_tokens: int = 65536,
    queue: int = 256,
) -> None:
    """Serve a checkpoint until SIGTERM or SIGINT; requests that run then are finished.

    Prints one line on the standard error when it listens, with the address.

    Raises:
        UnmaskError: the extra `serve` is not installed, or as `load_models`.
    """
    try:
        import uvicorn

        from unmask.serving.app import REQUEST_SECONDS, Server, make_app
    except ImportError as error:
        raise UnmaskError(f"unmask serve needs {error.name}: pip install 'unmask[serve]'.") from error
    if host not in LOCAL and api_key is None:
        message = f"anybody who reaches {host}:{port} can use the model; set --api-key, or --host 127.0.0.1."
        warnings.warn(message, UnmaskWarning, stacklevel=2)
    check_port(host, port)
    models, activate = load_models(name, adapters)
    scheduler = Scheduler(max_tokens=max_batch_tokens, queue=queue, activate=activate)
    app = make_app(Server(models, scheduler, api_key))

    class Announced(uvicorn.Server):
        """Says where it listens as soon as it does: the port may have been left to the system."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            at = self.servers[0].sockets[0].getsockname()[1]
            address = f"[{host}]:{at}" if ":" in host else f"{host}:{at}"
            print(f"serving {name} at http://{address} (Ctrl-C ends it)", file=sys.stderr, flush=True)

    # uvicorn repeats the signal that ended it: drained, the process ends as any other.
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=int(REQUEST_SECONDS),
        server_header=False,
    )
    Announced(config).run()
