"""Our own layout, read as a family's: `config.json` holds a `UniMMConfig`, and names are those of modules."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from unimm.families.family import Family
from unimm.families.keymap import KeyMap, Rule
from unimm.families.source import Checkpoint
from unimm.families.templates import saved_conversation
from unimm.models.configuration import UniMMConfig

KEY_MAP = KeyMap(rules=(Rule("{rest}", "{rest}"),), tied=("decoder.lm_head.weight",))


class Own(Family):
    """Folders that `UniMM.save` and conversions write; models write themselves, so there is no writer."""

    name, title = "unimm", "unimm"

    def parts(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Return the configuration as it stands, `conversation` and `sampling` too."""
        return copy.deepcopy(checkpoint.document)

    def conversation(self, checkpoint: Checkpoint, parts: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return the configuration's conversation, or that of a template put into the folder."""
        return saved_conversation(checkpoint, UniMMConfig(**copy.deepcopy(dict(parts))))

    def key_map(self, layout: str, config: UniMMConfig) -> KeyMap:
        """Return the map that changes nothing."""
        return KEY_MAP


FAMILY = Own()
