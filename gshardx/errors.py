"""Exceptions that are the user's to mend, and the exit codes of commands that they end."""


class BadInput(ValueError):
    """A wrong config, file or argument. Its message is one line: what, where, and a mend."""

    exit_code = 2


class OthersMissing(BadInput):
    """The other processes of a command are not there, or no longer: the same command may succeed later."""

    exit_code = 3
