"""The errors that `mtx` shows to its users, and the exit code each one ends the process with.

Invariant: whatever a user can cause ends in one of these, as a short message without a traceback; anything else is a
bug of ours and keeps its traceback (exit code 1).
"""


class UserError(Exception):
    """A mistake in what the user gave: says what, where, what was allowed and how to mend it. Exit code 2."""

    exit_code = 2


class DivergedError(UserError):
    """The run diverged and its tries are used up. Exit code 3."""

    exit_code = 3


class PreemptedError(UserError):
    """The run was asked to stop; everything is saved and the same command goes on. Exit code 4."""

    exit_code = 4


class CheckpointError(UserError):
    """Checkpoints exist and none of them verifies. Exit code 5."""

    exit_code = 5


class StalledError(UserError):
    """A process of the run hung, was lost or computes wrongly. Start again from the last checkpoint. Exit code 6."""

    exit_code = 6
