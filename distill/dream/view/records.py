"""Records as they are looked at: which path won, and the file of JSON that they are kept in."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from distill.dream.record import Branch, DreamRecord
from distill.errors import BadInput, CorruptFile

VERSION = 1
"""Of the JSON file. A reader of one version refuses the others."""


def arbitrated(branch: Branch) -> bool:
    """Whether anybody judged the path: what the backbone decodes itself, it reads unjudged, with a score of 0."""
    return branch.score > 0 or not branch.kept


def winner(record: DreamRecord) -> int | None:
    """The number of the branch with the highest score among those that the backbone read; None where none won."""
    kept = [i for i, branch in enumerate(record.branches) if branch.kept and branch.steps and arbitrated(branch)]
    return max(kept, key=lambda i: record.branches[i].score, default=None)


def read_json(path: Path) -> list[DreamRecord]:
    """Records of an exported file. Raises BadInput, CorruptFile."""
    try:
        value = json.loads(path.read_bytes())
        if value["format"] != "dreams":
            raise ValueError("another format")
        if value["version"] != VERSION:
            raise BadInput(f"{path}: written as version {value['version']}, read here is {VERSION}; export it again")
        return [DreamRecord.from_json(record) for record in value["dreams"]]
    except OSError as error:
        raise BadInput(f"{path}: can't read it: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CorruptFile(f"{path}: not a file of dreams; `dream watch … --export FILE.json` writes one") from error


def to_json(records: Iterable[DreamRecord]) -> dict[str, Any]:
    """What an exported file holds."""
    return {"format": "dreams", "version": VERSION, "dreams": [record.to_json() for record in records]}


def to_bytes(records: Iterable[DreamRecord]) -> bytes:
    text = json.dumps(to_json(records), ensure_ascii=False, indent=1)
    # Half a surrogate pair, as a broken argument of a command may hold, becomes JSON's own escape for it.
    return f"{text}\n".encode(errors="backslashreplace")
