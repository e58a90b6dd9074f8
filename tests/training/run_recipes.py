"""A program for tests under a launcher: train the recipes that it is given, one after another."""

import gc
import sys

from unimm.garbage import collect_seldom

if __name__ == "__main__":
    collect_seldom()
    import tests.training.toy  # noqa: F401  (makes the toy task known)
    from unimm.training.recipe import load_recipe
    from unimm.training.trainer import train

    for path in sys.argv[1:]:
        train(load_recipe(path), quiet=True)
        gc.freeze()  # what is imported now stays; DeepSpeed asks for whole collections whenever it shards
