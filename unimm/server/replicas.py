"""`unimm serve --ray`: the same application in several processes of Ray Serve, as many as the load asks for.

Each replica has its own model and engine. Ray's proxy listens, gives each request to a replica that has little to do,
and passes on what it streams. A replica that dies takes only its own requests with it, and Ray starts another.
"""

from __future__ import annotations

import dataclasses
import math
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from unimm.clusters import connected, import_ray
from unimm.errors import UserError
from unimm.server.app import create_app
from unimm.server.connections import listen
from unimm.server.run import SIGNALS
from unimm.server.service import Service
from unimm.server.settings import ServerSettings

if TYPE_CHECKING:
    from fastapi import FastAPI

    from unimm.pipeline import UniMM

APPLICATION = "unimm"
LOGGING = {"log_level": "WARNING", "enable_access_log": False}
LOOKS = 0.2  # seconds between two looks at whether a replica has loaded its model


@dataclasses.dataclass(frozen=True)
class ReplicaSettings:
    """How many replicas there are, and what each has.

    Attributes:
        least: replicas when there is little to do.
        most: replicas that may be started under load.
        ongoing: requests that one replica has on average when another is started.
        cpus: cores of each; a whole number is also its number of threads.
        gpus: GPUs of each; a fraction lets several share one.
        address: of a cluster, such as auto or ray://head:10001; None: Ray is started on this machine, and ended after.

    Raises:
        UserError: a value makes no sense.
    """

    least: int = 1
    most: int = 1
    ongoing: int = 16
    cpus: float = 1
    gpus: float = 0
    address: str | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise UserError(
                f"--replicas: {self.least}:{self.most}; give a number of at least 1, or LEAST:MOST"
            )
        if self.ongoing < 1:
            raise UserError(f"--ongoing: {self.ongoing}; give a whole number of at least 1")
        if not (math.isfinite(self.cpus) and self.cpus > 0):
            raise UserError(f"--replica-cpus: {self.cpus:g}; give a number of cores above 0")
        if not (math.isfinite(self.gpus) and self.gpus >= 0):
            raise UserError(f"--replica-gpus: {self.gpus:g}; give a number of GPUs, 0 for none")


def serve_replicas(
    settings: ServerSettings,
    replicas: ReplicaSettings,
    load: Callable[[], UniMM],
    on_ready: Callable[[str], None],
) -> None:
    """Serve a model by replicas until told to stop.

    Args:
        settings: of the server; what it says of a queue and of limits holds for each replica.
        replicas: how many, and what each has.
        load: gives the model, in the process of a replica; has to be picklable.
        on_ready: called with the address once the first replicas answer.

    Raises:
        UserError: Ray is not installed or has not the resources, the port is taken, or the model cannot be loaded.
    """
    ray = import_ray("--ray", "serve")
    port = _free_port(settings)
    with connected(ray, replicas.address, "--ray-address"), _told() as told:
        _check_resources(ray, replicas)
        proxies = "HeadOnly" if replicas.address is None else "EveryNode"
        try:
            ray.serve.start(
                proxy_location=proxies,
                http_options={"host": settings.host, "port": port},
                logging_config=LOGGING,
            )
            application = _deployment(ray.serve, settings, replicas, load).bind()
            try:
                handle = ray.serve.run(
                    application, name=APPLICATION, route_prefix="/", logging_config=LOGGING
                )
            except RuntimeError as error:
                raise _mistake(ray.serve, error) from None
            on_ready(f"http://{settings.host}:{port}")
            told.wait()
            # What comes now is refused; a replica that dies meanwhile has nothing left to wait for.
            handle.broadcast("drain").results(return_exceptions=True)
        finally:
            if replicas.address is not None:  # else Ray ends with all that is its
                ray.serve.delete(APPLICATION)


def _deployment(
    serve: Any, settings: ServerSettings, replicas: ReplicaSettings, load: Callable[[], UniMM]
) -> Any:
    """The deployment, whose replicas load the model before they take a request."""

    def build() -> FastAPI:
        return build_app(settings, load, replicas.cpus)

    scaling: dict[str, Any] = {"num_replicas": replicas.least}
    if replicas.most > replicas.least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": replicas.least,
                "max_replicas": replicas.most,
                "target_ongoing_requests": replicas.ongoing,
            }
        }
    return serve.deployment(
        name="model",
        max_ongoing_requests=settings.max_connections,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        graceful_shutdown_timeout_s=settings.shutdown_timeout,
        max_constructor_retry_count=1,
        **scaling,
    )(serve.ingress(build)(Replica))


class Replica:
    """One copy of the model behind the application; Ray Serve makes it."""

    app: FastAPI

    def check_health(self) -> None:
        """Have Ray start another in its place if the engine has ended.

        Raises:
            RuntimeError: it has.
        """
        state = self.app.state.service.worker.state
        if state != "ready":
            raise RuntimeError(f"the engine is {state}")

    async def drain(self) -> None:
        """Refuse requests from now on; return when those that run have ended, or at the limit."""
        await self.app.state.service.drain()


def build_app(settings: ServerSettings, load: Callable[[], UniMM], cpus: float) -> FastAPI:
    """Load the model and return the application around it.

    Args:
        settings: of the server.
        load: gives the model.
        cpus: cores that there are for it.

    Raises:
        BaseException: the model cannot be loaded.
    """
    import torch

    torch.set_num_threads(max(1, int(cpus)))
    service = Service(settings, load)
    service.worker.start()
    while service.worker.state == "loading":
        time.sleep(LOOKS)
    if service.worker.error is not None:
        raise service.worker.error
    app = create_app(service)
    app.state.service = service
    return app


@contextmanager
def _told() -> Iterator[threading.Event]:
    """Give an event that Ctrl-C and SIGTERM set."""
    told = threading.Event()
    before = {number: signal.signal(number, lambda *_: told.set()) for number in SIGNALS}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _free_port(settings: ServerSettings) -> int:
    """The port, if it is free here; Ray would only say that its proxy did not start."""
    with listen(settings.host, settings.port) as found:
        return int(found.getsockname()[1])


def _check_resources(ray: Any, replicas: ReplicaSettings) -> None:
    """Refuse replicas that would wait for ever."""
    there = ray.cluster_resources()
    for name, each in (("CPU", replicas.cpus), ("GPU", replicas.gpus)):
        if each * replicas.least > there.get(name, 0):
            option = f"--replica-{name.lower()}s"
            raise UserError(
                f"{option}: {replicas.least} replicas of {each:g}, but the cluster has {there.get(name, 0):g}"
            )


def _mistake(serve: Any, error: RuntimeError) -> Exception:
    """The mistake of a user that Ray tells of in the traceback of a replica; else the error, with what is told."""
    application = serve.status().applications.get(APPLICATION)
    deployments = {} if application is None else application.deployments
    told = "\n".join(deployment.message for deployment in deployments.values())
    found = re.findall(r"unimm\.errors\.\w+: (.+)", told)
    return UserError(found[-1].strip()) if found else RuntimeError(f"{error}\n{told}")
