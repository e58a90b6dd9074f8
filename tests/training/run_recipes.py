"""A program for tests under a launcher: train the recipes that it is given, one after another."""

import sys

import tests.training.toy  # noqa: F401  (makes the toy task known)
from unimm.training.recipe import load_recipe
from unimm.training.trainer import train

if __name__ == "__main__":
    for path in sys.argv[1:]:
        train(load_recipe(path), quiet=True)
