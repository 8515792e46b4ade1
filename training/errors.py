"""What can go wrong for reasons that a user can mend; the command line shows the message alone."""


class DataError(ValueError):
    """Images that cannot be found or read, or do not suffice."""


class RunError(RuntimeError):
    """A run folder that cannot be used, or a file in it that cannot be read."""


class TrainingError(RuntimeError):
    """A training that went wrong."""
