"""What can go wrong because of the world, as opposed to because of a bug.

Every error here reaches the user as one line, `Error: …`, and exit code 1. The message names the thing
(file, flag, field, model) and the remedy. A bug keeps its traceback: raise `assert` or let it fail.
"""

from pathlib import Path


class DistillError(Exception):
    """Base of every error that a user can mend."""


class BadInput(DistillError):
    """A file, flag or field holds something unusable."""


class NothingHeldOut(BadInput):
    """A run has no question that its student wasn't trained on."""


class CorruptFile(DistillError):
    """A file that we wrote, or were given, is cut short or altered."""


class RunMismatch(DistillError):
    """A run folder, checkpoint or tokenizer was made by another configuration."""


class MissingStage(DistillError):
    """A stage was asked for before the one that it reads from."""


class TeacherError(DistillError):
    """A teacher gave no usable answer."""


class TeacherUnavailable(TeacherError):
    """No server answers at the teacher's address, or not within the time-out."""


class PromptRefused(TeacherError):
    """The teacher takes no such prompt, at whichever host and however often it is asked: it is too long."""


class AnswerBroken(TeacherError):
    """The server broke its reply off: what came before is no answer."""


class ModelNotFound(TeacherError):
    """The server, or the disk, has no model of that name."""


class MissingDependency(DistillError):
    """An optional package or program is not installed."""


class ParityError(DistillError):
    """An exported bundle does not answer as the student it was made from."""


def unwritable(path: Path, error: OSError) -> DistillError:
    """That a file can't be written: the disk is full, or ours it isn't."""
    return DistillError(f"{path}: can't write it: {error.strerror} (free some space, or check the rights)")
