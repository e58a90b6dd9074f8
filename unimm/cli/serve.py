"""`unimm serve`: the options of the server, and the call behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unimm.cli.commands import Options, command
from unimm.cli.model import load
from unimm.cli.options import FOLDER, INTEGER, NUMBER, POSITIVE, model_options
from unimm.console import say
from unimm.errors import UserError, UserNote

if TYPE_CHECKING:
    from unimm.server.settings import ServerSettings

RAY_OPTIONS = ("replicas", "ongoing", "replica_cpus", "replica_gpus", "ray_address")


@command("serve", "serve a model behind OpenAI's routes", lambda document: None)
@click.option(
    "--host", default="127.0.0.1", metavar="ADDRESS", help="0.0.0.0: all (default: this machine alone)"
)
@click.option("--port", type=INTEGER, default=8000, metavar="N", help="0: any (default: 8000)")
@click.option("--model-name", metavar="NAME", help="what clients call the model (default: as --model)")
@click.option("--api-key", metavar="KEY", envvar="UNIMM_API_KEY", help="clients bring it (or: UNIMM_API_KEY)")
@click.option("--server-name", multiple=True, metavar="NAME", help="a host name that leads here; *: any")
@click.option("--allow-origin", multiple=True, metavar="URL", help="a page elsewhere that may use the server")
@click.option(
    "--allow-host",
    multiple=True,
    metavar="HOST",
    help="where images and videos may be fetched from by http(s)",
)
@click.option("--media-path", type=FOLDER, metavar="DIR", help="below it, file: URLs may name images, videos")
@click.option("--max-body", type=POSITIVE, metavar="BYTES", help="of a request (default: 32 MiB)")
@click.option("--max-image-pixels", type=POSITIVE, metavar="N", help="of an image sent (default: 32,000,000)")
@click.option("--max-images", type=POSITIVE, metavar="N", help="of a request (default: 16)")
@click.option("--max-n", type=POSITIVE, metavar="N", help="answers or drawings of a request (default: 16)")
@click.option("--max-tokens", type=POSITIVE, metavar="N", help="of an answer (default: the context's room)")
@click.option("--max-waiting", type=POSITIVE, metavar="N", help="in the queue; more get 429 (default: 256)")
@click.option("--max-connections", type=POSITIVE, metavar="N", help="that are open (default: 512)")
@click.option("--request-timeout", type=NUMBER, metavar="S", help="seconds of a request (default: 600)")
@click.option("--shutdown-timeout", type=NUMBER, metavar="S", help="seconds at SIGTERM (default: 30)")
@click.option("--batch-size", type=POSITIVE, metavar="N", help="drawings that run at once (default: 64)")
@click.option(
    "--votes", type=FOLDER, metavar="DIR", help="where votes on two drawings are kept (default: no voting)"
)
@click.option("--voter", metavar="NAME", help="kept with each vote (default: the login)")
@click.option("--ray", is_flag=True, help="replicas by Ray Serve, on this machine or a cluster")
@click.option("--replicas", metavar="N", help="or LEAST:MOST, by the load (with --ray; default: 1)")
@click.option(
    "--ongoing", type=POSITIVE, metavar="N", help="requests of a replica that call for another (default: 16)"
)
@click.option("--replica-cpus", type=NUMBER, metavar="N", help="cores of a replica (default: 1)")
@click.option(
    "--replica-gpus", type=NUMBER, metavar="N", help="GPUs of a replica, or a part of one (default: 0)"
)
@click.option("--ray-address", metavar="URL", help="of a cluster, such as auto (default: Ray starts here)")
@click.option("--log-words", is_flag=True, help="let the log hold prompts and answers")
@model_options
def serve(options: Options) -> Any:
    """Serve a model until Ctrl-C or SIGTERM."""
    try:
        from unimm.server.run import ModelServer
    except ImportError as error:
        raise UserError(f"serve: needs {error.name}; install it with: pip install 'unimm[serve]'") from None
    from unimm.server.settings import ServerSettings

    given = {
        "max_pixels": options.max_image_pixels,
        "server_names": options.server_name,
        "allow_origins": options.allow_origin,
        "allow_hosts": options.allow_host,
        "model_name": options.model_name or model_name(options.model),
        "media_path": None if options.media_path is None else Path(options.media_path),
    }
    names = {field.name for field in dataclasses.fields(ServerSettings)} - given.keys()
    given |= {name: getattr(options, name) for name in names - {"max_side"}}
    settings = ServerSettings(**{name: value for name, value in given.items() if value is not None})

    if options.ray:
        return _serve_replicas(settings, options)
    for name in RAY_OPTIONS:
        if getattr(options, name) is not None:
            raise UserError(f"--{name.replace('_', '-')}: is for --ray; add it")

    def load_model() -> Any:
        um = _load(options)
        say(f"serving {settings.model_name} at {server.url} (Ctrl-C ends)")
        return um

    warnings.simplefilter("ignore", UserNote)  # of other people's images
    with contextlib.ExitStack() as opened:
        server = ModelServer(settings, load_model)
        if options.votes is not None:
            from unimm.cli.preferences import voter_name
            from unimm.preferences.vote.duels import Duels, add_votes
            from unimm.preferences.vote.votes import Votes

            path = Path(options.votes) / "votes.jsonl"
            votes = opened.enter_context(Votes(path, {"model": settings.model_name}))
            if votes.note:
                say(votes.note)
            add_votes(server.app, server.service, Duels(votes, voter_name(options.voter)))
        server.serve()
    return {"served": settings.model_name}


def _load(options: Options) -> Any:
    """Load the model, here or in a replica."""
    um = load(options)
    um.batch_size = options.batch_size or um.batch_size
    return um


def _serve_replicas(settings: ServerSettings, options: Options) -> Any:
    """Serve by Ray."""
    from unimm.server.replicas import ReplicaSettings, serve_replicas

    if options.votes is not None:
        raise UserError("--votes: replicas do not share a file of votes; serve without --ray")
    least, colon, most = (options.replicas or "1").partition(":")
    if not (least.isdecimal() and least.isascii()) or (colon and not (most.isdecimal() and most.isascii())):
        raise UserError(f"--replicas: {options.replicas!r}; give a number, or LEAST:MOST")
    given = {
        "ongoing": options.ongoing,
        "cpus": options.replica_cpus,
        "gpus": options.replica_gpus,
        "address": options.ray_address,
    }
    replicas = ReplicaSettings(
        int(least), int(most or least), **{name: value for name, value in given.items() if value is not None}
    )
    if options.model is not None and Path(options.model).is_dir():
        options.model = os.path.abspath(options.model)  # wherever a replica stands
    load_replica = functools.partial(_load, options)
    serve_replicas(
        settings,
        replicas,
        load_replica,
        lambda url: say(f"serving {settings.model_name} at {url} (Ctrl-C ends)"),
    )
    return {"served": settings.model_name}


def model_name(source: str | None) -> str:
    """Return what clients call a model: its hub id, or the last part of its folder."""
    if source is None:
        return "embedded"
    return Path(source).resolve().name if Path(source).is_dir() else source.partition("@")[0]
