"""Services that a run's numbers go to: Weights & Biases, and trackio, which stays on this machine unless told.

The extra `trackers` brings both. A run has one name with them for as long as its folder is there, so a resumed one is
the same run there too.
"""

from __future__ import annotations

import importlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unimm.files import atomic_write, open_regular

if TYPE_CHECKING:
    from unimm.training.recipe import BaseRecipe

ID_FILE = "tracker-id"


class Tracker:
    """One of a recipe's trackers, with this run open in it.

    Args:
        name: `wandb` or `trackio`.
        recipe: whose run; its folder keeps the run's name.

    Raises:
        UserError: the package is missing, or the service does not take the run.
    """

    def __init__(self, name: str, recipe: BaseRecipe) -> None:
        try:
            self._service: Any = importlib.import_module(name)
        except ImportError:
            message = f"needs {name}; install it with: pip install 'unimm[trackers]'"
            raise recipe.error("logging.trackers", message) from None
        output = Path(recipe.output)
        run = _run_id(output)
        own = {"id": run, "dir": str(output)} if name == "wandb" else {}  # trackio knows a run by its name
        try:
            self._service.init(
                project=recipe.logging.project,
                name=f"{output.name}-{run}",
                config=recipe.model_dump(mode="json"),
                resume="allow",
                **own,
            )
        except Exception as error:  # each has errors of its own: no key, no network, no such project
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise recipe.error("logging.trackers", f"{name} does not take the run ({reason})") from None

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Send the numbers of a line."""
        self._service.log(dict(numbers), step=step)

    def close(self) -> None:
        """Send what is left, and end the run there."""
        self._service.finish()


def _run_id(output: Path) -> str:
    """A random name of the run, the same when it is resumed."""
    path = output / ID_FILE
    if not path.exists():
        with atomic_write(path) as temporary:
            temporary.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    with open_regular(path) as file:
        return file.read().decode("utf-8", "replace").strip()
