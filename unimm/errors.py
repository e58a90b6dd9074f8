"""What a person using unimm can get wrong, said in one line.

The command line prints a `UserError` as `unimm: <line>` and exits with status 2; a `UserNote` is printed the
same way and the work goes on. Everything else that is raised is a fault of the program and keeps its
traceback.
"""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: one line naming the file, key or field and what would be right."""


class UserNote(UserWarning):
    """Something the user should know about their input, given through `warnings.warn`; the work goes on."""
