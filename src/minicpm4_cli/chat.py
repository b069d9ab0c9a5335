"""Chat with a model in the terminal, with transformers' own chat.

minicpm4 chat
minicpm4 chat --model ./MiniCPM4-8B --sparse --system "You answer in one sentence."
minicpm4 chat --model openbmb/MiniCPM4-0.5B --temperature 0.7 --max-new-tokens 512
"""

import argparse
import logging
import time

from .generate import check_chat_template, check_sampling
from .loading import Loaded, add_model_arguments, load, parse_sparse, positive_int, quiet
from .serve import check_requirements, one_model_server

_START_SECONDS = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of `minicpm4 chat`."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    parser.add_argument("--max-new-tokens", type=positive_int, default=256, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: the checkpoint's)")
    parser.add_argument(
        "--top-p", type=float, help="sample among this share of probability (default: the checkpoint's)"
    )


def run(args: argparse.Namespace) -> int:
    """Start a server in this process and chat with it."""
    parse_sparse(args.sparse)  # before the wait for torch
    check_sampling(args.temperature, args.top_p)
    check_requirements("chat")
    with quiet():
        loaded = load(args)
        check_chat_template(loaded.tokenizer)
        logging.disable(logging.WARNING)  # the server's log would run through the conversation
        try:
            converse(loaded, generate_flags(loaded.model.generation_config, args), args.system)
        except EOFError:  # end of a piped conversation, or Ctrl-D
            print()
        finally:
            logging.disable(logging.NOTSET)
    return 0


def converse(loaded: Loaded, flags: list[str], system_prompt: str | None) -> None:
    """Run transformers' chat, which is a client of transformers' server: here one of this process."""
    from transformers.cli.chat import Chat

    port = free_port()
    with one_model_server(loaded) as serve:
        server = serve(host="127.0.0.1", port=port, non_blocking=True)
        try:
            wait_until_started(server)
            Chat(
                loaded.name, f"http://127.0.0.1:{port}", generate_flags=flags, system_prompt=system_prompt, user="you"
            )
        finally:
            server.kill_server()


def generate_flags(defaults, args: argparse.Namespace) -> list[str]:
    """The generation settings in the form that transformers' chat takes them."""
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    for name, value in sampling.items():
        sampling[name] = getattr(defaults, name) if value is None else value
    asked = args.temperature is not None or args.top_p is not None
    do_sample = args.temperature != 0 and (asked or bool(defaults.do_sample))
    flags = [f"max_new_tokens={args.max_new_tokens}", f"do_sample={do_sample}"]
    if do_sample:
        flags += [f"{name}={value}" for name, value in sampling.items() if value is not None]
    return flags


def free_port() -> int:
    """A port of the loopback address that nobody uses."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_started(server) -> None:
    """Return once `server` listens.

    Raises:
        OSError: it does not within `_START_SECONDS`.
    """
    for _ in range(_START_SECONDS * 20):
        if server.server.started:
            return
        time.sleep(0.05)
    raise OSError(f"The chat's server did not start within {_START_SECONDS} s; try `minicpm4 serve` to see why.")
