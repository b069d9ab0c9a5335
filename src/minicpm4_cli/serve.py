"""Serve a model to OpenAI clients, with transformers' own server.

minicpm4 serve
minicpm4 serve --model ./MiniCPM4-8B --sparse --host 0.0.0.0 --port 8080
curl localhost:8000/v1/completions -H 'Content-Type: application/json' -d '{"model": "any", "prompt": "It was"}'
"""

import argparse
import sys
import time
from contextlib import contextmanager

from .loading import Loaded, add_model_arguments, load, parse_sparse, quiet

REQUIREMENTS = ("fastapi", "uvicorn", "openai", "pydantic")
# A long prompt runs through the model in pieces of this many tokens, so that its memory stays small.
_PREFILL_CHUNK = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `minicpm4 serve`."""
    add_model_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    parse_sparse(args.sparse)  # before the wait for torch
    check_requirements("serve")
    check_address(args.host, args.port)
    with quiet():
        loaded = load(args)
        url = f"http://{args.host}:{args.port}/v1"
        print(f"Serving {loaded.name} at {url}; any model name is answered by it. Ctrl-C stops.", file=sys.stderr)
        with one_model_server(loaded) as serve:
            serve(host=args.host, port=args.port)
    return 0


def check_requirements(command: str) -> None:
    """Raises `ImportError` where transformers' server lacks a package."""
    from importlib.util import find_spec

    missing = [name for name in REQUIREMENTS if find_spec(name) is None]
    if missing:
        raise ImportError(
            f"`minicpm4 {command}` needs {' and '.join(missing)}, not installed here; run `pip install "
            "'minicpm4-hf[serve]'`."
        )


def check_address(host: str, port: int) -> None:
    """Raises where a server could not listen there: `ValueError` for a bad port, `OSError` for a taken one."""
    import socket

    if not 1 <= port <= 65535:
        raise ValueError(f"`--port` must be between 1 and 65535, got {port}.")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(
            f"Cannot listen on {host} port {port} ({reason}); choose another `--host` or `--port`."
        ) from error


class AnyName(str):
    """The name of the one model; equal to every name, so that the server accepts whatever a client calls it."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True

    def __ne__(self, other):
        return False


@contextmanager
def one_model_server(loaded: Loaded):
    """transformers' `Serve` class, whose models come from `loaded` while the context lasts.

    By itself it loads classes of transformers' own only, and lists what is in the Hub cache, failing where there is
    none.
    """
    from transformers.cli.serve import Serve
    from transformers.cli.serving import model_manager

    original = model_manager.ModelManager
    loaded.model.generation_config.prefill_chunk_size = _PREFILL_CHUNK

    class OneModelManager(original):
        def __init__(self, **kwargs):
            super().__init__(**{**kwargs, "force_model": None})
            self.force_model = AnyName(loaded.name)

        @staticmethod
        def process_model_name(model_id: str) -> str:
            return loaded.name

        def load_model_and_processor(self, *args, **kwargs):
            return loaded.model, loaded.tokenizer

        async def load_model_streaming(self, *args, **kwargs):
            yield 'data: {"status": "ready", "cached": true}\n\n'

        def get_gen_models(self, cache_dir: str | None = None) -> list[dict]:
            return [{"id": loaded.name, "object": "model", "created": int(time.time()), "owned_by": "minicpm4-hf"}]

        def shutdown(self) -> None:
            """The one model stays."""

    def serve(**options):
        return Serve(device=str(loaded.model.device), log_level="error", **options)

    model_manager.ModelManager = OneModelManager  # where `Serve` looks it up
    try:
        yield serve
    finally:
        model_manager.ModelManager = original
