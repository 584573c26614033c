"""The one exception that is the user's to mend."""


class BadInput(ValueError):
    """A wrong config, file or argument. Its message is one line: what, where, and a mend. Commands exit with 2."""
