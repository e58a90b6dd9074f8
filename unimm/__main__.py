"""`python -m unimm`: the same as the `unimm` command."""

from __future__ import annotations

import sys

from unimm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
