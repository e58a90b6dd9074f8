"""Ray: whether it is installed, and a cluster to use for a while."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from typing import Any

from unimm.errors import UserError

OBJECT_STORE = 128 * 2**20  # bytes, where Ray is started here; nothing large goes through it


def import_ray(key: str, *parts: str) -> Any:
    """Return Ray.

    Args:
        key: what asks for it, as errors call it.
        parts: of it that are needed, such as `data`.

    Raises:
        UserError: it is not installed.
    """
    # Nothing is told to others unless the user wants it.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        for part in parts:
            importlib.import_module(f"ray.{part}")
        return importlib.import_module("ray")
    except ImportError as error:
        raise UserError(f"{key}: ray needs {error.name}; install it with: pip install 'unimm[ray]'") from None


@contextlib.contextmanager
def connected(ray: Any, address: str | None, key: str) -> Iterator[None]:
    """Use a cluster, or Ray on this machine alone, all of whose processes end with the block.

    Args:
        ray: the package.
        address: of a cluster; None: on this machine.
        key: what gave the address, as errors call it.

    Raises:
        UserError: there is no cluster at that address.
    """
    given: dict[str, Any] = {"logging_level": "error", "log_to_driver": False}
    if address is None:
        given |= {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    else:
        given |= {"address": address}
    try:
        ray.init(**given)
    except Exception as error:  # Ray raises plain ones too, as where a busy machine starts it too slowly
        where = "ray" if address is None else f"{key}: {address}"
        raise UserError(f"{where}: Ray did not start: {' '.join(str(error).split())[:200]}") from None
    try:
        yield
    finally:
        ray.shutdown()
