"""`tintype serve`: a model behind OpenAI's images API."""

from __future__ import annotations

import argparse
import json
from typing import Any

from tintype.commands.loading import add_loading, load
from tintype.errors import BackendUnavailable, RequestError


def register(subparsers: Any) -> None:
    """Add the command."""
    from tintype.cli import add_common

    parser = subparsers.add_parser("serve", help="answer requests of OpenAI's images API")
    parser.add_argument(
        "model", nargs="?", default="postcard", help="what `tintype generate -m` takes"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 is every network, to which nothing is secret"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes any that is free")
    parser.add_argument(
        "--queue", type=int, default=16, metavar="N", help="requests that may wait for their turn"
    )
    add_loading(parser)
    add_common(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal says to stop."""
    if options.queue < 0:
        raise RequestError(f"--queue {options.queue} is below 0; 0 lets no request wait")
    try:
        from tintype.serving.server import address_of, listen, make_server
    except ImportError as error:
        raise BackendUnavailable(
            f'serve needs {error.name}, which is absent; install it with: pip install "tintype[serve]"'
        ) from error
    with listen(options.host, options.port) as listener:
        pipeline = load(options)
        told = {
            "model": pipeline.name,
            "backend": pipeline.family.backend.name,
            "url": address_of(listener),
        }
        line = json.dumps(told) if options.json else "{model} on {backend} at {url}".format(**told)
        make_server(pipeline, options.queue, lambda: print(line, flush=True)).run([listener])
