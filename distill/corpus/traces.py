"""The trace store: everything the teacher said, in one SQLite file that survives a kill at any moment.

Responses are content-addressed: asking the same teacher the same prompt with the same options again is free.
The store may hold more than the run asks for now (other options, more prompts); what belongs to the present
question is *selected*, and only that is read by later stages.
"""

import hashlib
import json
import os
import sqlite3
import zlib
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

from distill.corpus.pack_targets import logical_bytes, pack_targets, unpack_targets
from distill.errors import BadInput, CorruptFile, DistillError, MissingStage, RunMismatch
from distill.teacher.protocol import GenerateOptions, Response, TeacherInfo, TeacherTokenizer

FORMAT = 2
"""PRAGMA user_version of the schema below. Format 1 has one answer a prompt and no column `sample`."""
APPLICATION_ID = 0x44524D54  # "DRMT"
_SCHEMA = """
CREATE TABLE teacher (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    info TEXT NOT NULL,         -- TeacherInfo as JSON
    tokenizer BLOB              -- TeacherTokenizer as JSON, zlib; NULL where it can't be read
);
CREATE TABLE responses (
    key TEXT PRIMARY KEY,       -- SHA-256 of teacher, template, prompt and options
    prompt TEXT NOT NULL,
    held_out INTEGER,           -- 0, 1, or NULL: not selected
    text TEXT NOT NULL,
    done_reason TEXT NOT NULL,
    options TEXT NOT NULL,      -- GenerateOptions as JSON
    tokens INTEGER NOT NULL,
    soft INTEGER NOT NULL,      -- tokens with soft targets
    targets BLOB,               -- pack_targets.py; NULL where there are none
    checksum INTEGER NOT NULL,  -- CRC-32 of prompt, text, done_reason, options and targets
    timings TEXT NOT NULL,      -- seconds, which `model` answered, and HOW; JSON, no part of the content
    sample INTEGER NOT NULL DEFAULT 0  -- which of the prompt's answers; the options' seed tells them apart
);
"""
_THINKING = """
thinking (                      -- apart, so that a store without it is one of the same format
    key TEXT PRIMARY KEY,
    thinking TEXT NOT NULL,     -- before the answer of that key
    thought BLOB,               -- its targets, as the answer's
    thought_tokens INTEGER NOT NULL,
    thought_checksum INTEGER NOT NULL
)
"""
HOW = ("context", "soft")
"""How a response was asked for, where not as usual: in `teacher.context` tokens; with targets that could be read."""
_SAYS = "TRIM(text, CHAR(9, 10, 13, 32)) <> ''"
_SELECTED = "SELECT 1 FROM responses WHERE key = ? AND held_out IS NOT NULL"
_OF_THINKING = "thinking, thought, thought_checksum"
_CONTENT = f"key, prompt, held_out, text, done_reason, options, targets, checksum, timings, {_OF_THINKING}"
_THERE = "responses LEFT JOIN thinking USING (key)"


@dataclass(frozen=True)
class Trace:
    """One prompt with its response. `key` is `TraceStore.key`, `teacher` the teacher's digest, `sample` which of the
    prompt's answers it is."""

    key: str
    prompt: str
    held_out: bool
    response: Response
    options: GenerateOptions
    teacher: str
    sample: int = 0


@dataclass(frozen=True)
class TraceStats:
    """Counts over the selected responses. `bytes_per_token` is text and packed targets together."""

    prompts: int
    responses: int
    held_out: int
    tokens: int
    soft_tokens: int
    bytes_per_token: float
    done_reasons: dict[str, int]
    thinking: int = 0
    """Responses that were thought about before."""
    thinking_tokens: int = 0


class TraceStore:
    """Opens, or makes, a trace database; a context manager. One thread writes; many processes may read.

    Raises MissingStage for a file that isn't there (readonly), CorruptFile for one that is no sound database,
    BadInput for one that isn't ours or of another format, and DistillError for a full disk.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        self.path = path
        self._info: TeacherInfo | None = None
        if readonly and not (path.exists() and path.stat().st_size):
            raise MissingStage(f"{path}: no traces there; run `dream capture {path.parent}` first")
        with self._errors():
            path.parent.mkdir(parents=True, exist_ok=True)
            mode = "ro" if readonly else "rwc"
            may_write = os.access(path.parent, os.W_OK, effective_ids=os.access in os.supports_effective_ids)
            if readonly and not may_write and not path.with_name(f"{path.name}-wal").exists():
                mode += "&immutable=1"  # SQLite would make files beside it, and nobody can be writing
            where = f"{path.resolve().as_uri()}?mode={mode}"
            self._db = sqlite3.connect(where, uri=True, isolation_level=None, timeout=30, check_same_thread=False)
        try:
            with self._errors():
                self._prepare(readonly)
        except BaseException:
            self._db.close()
            raise

    def _prepare(self, readonly: bool) -> None:
        if not readonly and not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
            # One transaction, so that a kill leaves an empty database or a whole schema.
            self._db.executescript(
                f"PRAGMA journal_mode = WAL; BEGIN; {_SCHEMA}"
                f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {FORMAT}; COMMIT;"
            )
        application = self._db.execute("PRAGMA application_id").fetchone()[0]
        version = self._db.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION_ID:
            raise BadInput(f"{self.path}: is an SQLite database, but not one of traces; move it away")
        self._sample = "sample" if version > 1 else "0"
        if version not in (1, FORMAT):
            raise BadInput(
                f"{self.path}: has trace format {version}, this version reads {FORMAT}; "
                "capture into another --name, or use the dreaming-student that wrote it"
            )
        if not readonly:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.execute(f"CREATE TABLE IF NOT EXISTS {_THINKING}")
            if version == 1:
                column = "ALTER TABLE responses ADD COLUMN sample INTEGER NOT NULL DEFAULT 0"
                self._db.executescript(f"BEGIN IMMEDIATE; {column}; PRAGMA user_version = {FORMAT}; COMMIT;")
                self._sample = "sample"
        elif not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'thinking'").fetchone():
            self._db.execute("PRAGMA temp_store = MEMORY")
            self._db.execute(f"CREATE TEMP TABLE {_THINKING}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @contextmanager
    def _errors(self) -> Generator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = str(error)
            if "full" in reason:
                raise DistillError(
                    f"{self.path}: the disk is full; free some space and run it again, nothing captured is lost"
                ) from error
            corrupt = "malformed" in reason or "decode" in reason
            if isinstance(error, sqlite3.OperationalError) and not corrupt:
                raise DistillError(f"{self.path}: can't use it: {reason}") from error
            raise CorruptFile(f"{self.path}: is no sound trace database ({reason}); delete it to start over") from error
        except OSError as error:
            raise DistillError(f"{self.path}: can't use it: {error.strerror}") from error

    # Who was asked.
    def put_teacher(self, info: TeacherInfo, tokenizer: TeacherTokenizer | None) -> None:
        """Say whose traces these are. Raises RunMismatch where they are another teacher's already."""
        with self._errors():
            row = self._db.execute("SELECT info FROM teacher").fetchone()
        if row is not None:
            there = TeacherInfo(**json.loads(row[0]))
            if (there.digest, there.template_digest) != (info.digest, info.template_digest):
                what = "template of " if there.digest == info.digest else ""
                raise RunMismatch(
                    f"{self.path}: holds answers of {what}{there.spec} (digest {there.digest[:12]}), not of "
                    f"{info.spec} (digest {info.digest[:12]}); use another --name"
                )
        # `asdict` would copy each token: seconds.
        told = None if tokenizer is None else {part.name: getattr(tokenizer, part.name) for part in fields(tokenizer)}
        packed = None if told is None else zlib.compress(json.dumps(told).encode())
        with self._errors():
            self._db.execute(
                "INSERT OR REPLACE INTO teacher VALUES (1, ?, ?)", (json.dumps(asdict(info), default=str), packed)
            )
        self._info = info

    def teacher(self) -> TeacherInfo:
        """Whose traces these are. Raises MissingStage where nobody was asked yet."""
        if self._info is None:
            with self._errors():
                row = self._db.execute("SELECT info FROM teacher").fetchone()
            if row is None:
                raise MissingStage(f"{self.path}: no teacher was asked yet; run `dream capture {self.path.parent}`")
            self._info = TeacherInfo(**json.loads(row[0]))
        return self._info

    def tokenizer(self) -> TeacherTokenizer | None:
        """The teacher's vocabulary, or None where it can't be read."""
        with self._errors():
            row = self._db.execute("SELECT tokenizer FROM teacher").fetchone()
        if row is None or row[0] is None:
            return None
        try:
            value: dict[str, Any] = json.loads(zlib.decompress(row[0]))
        except (zlib.error, ValueError) as error:
            text = f"{self.path}: the teacher's tokenizer is altered; delete the file and capture"
            raise CorruptFile(text) from error
        value["extra_stop_ids"] = tuple(value["extra_stop_ids"])
        return TeacherTokenizer(**value)

    # What it said.
    @staticmethod
    def key(info: TeacherInfo, prompt: str, options: GenerateOptions) -> str:
        """Hex SHA-256 of all that an answer depends on."""
        what = [info.digest, info.template_digest, prompt, options.spelled()]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def has(self, key: str, limit: int = 0, soft: bool = False, context: int = 0, again: bool = False) -> bool:
        """Whether there is a response with a text, selected or not. limit: tokens that it might have had: then one that
        ended before them, though not by itself, in another context, is none; where its tokens aren't known it is one.
        soft: one without targets is none, unless they were asked for in vain, and aren't to be asked for again."""
        cut = "done_reason = 'length' AND tokens BETWEEN 1 AND ? - 1"
        told = f"{_SAYS} AND NOT ({cut} AND IFNULL(json_extract(timings, '$.context'), 0) <> ?)"
        in_vain = "" if again else " OR json_extract(timings, '$.soft')"
        told += f" AND (targets IS NOT NULL{in_vain})" if soft else ""
        with self._errors():
            asked = self._db.execute(f"SELECT 1 FROM responses WHERE key = ? AND {told}", (key, limit, context))
            return asked.fetchone() is not None

    def put(self, trace: Trace, chosen: bool = True, context: int = 0, soft: bool = False) -> None:
        """Store a response and select it if `chosen`, else leave what is selected; it survives a kill from then on.
        context, soft: `HOW`."""
        response = trace.response
        options = json.dumps(trace.options.spelled(), sort_keys=True)
        packed, thought = (None if t is None else pack_targets(t) for t in (response.tokens, response.thought))
        how = {"model": response.model, "context": context, "soft": soft}
        row = (
            trace.key,
            trace.prompt,
            int(trace.held_out) if chosen else None,
            response.text,
            response.done_reason,
            options,
            0 if response.tokens is None else len(response.tokens),
            0 if response.tokens is None else int(response.tokens.soft.sum()),
            packed,
            _checksum(trace.prompt, response.text, response.done_reason, options, packed=packed),
            json.dumps(response.timings | {name: value for name, value in how.items() if value}),
            trace.sample,
        )
        checksum = _checksum(response.thinking, packed=thought)
        before = (trace.key, response.thinking, thought, len(response.thought or ()), checksum)
        with self._errors(), self._db:  # both or none
            self._db.execute("BEGIN IMMEDIATE")
            if not chosen and self._db.execute(_SELECTED, (trace.key,)).fetchone():
                return
            self._db.execute(f"INSERT OR REPLACE INTO responses VALUES ({', '.join('?' * len(row))})", row)
            self._db.execute("DELETE FROM thinking WHERE key = ?", (trace.key,))
            if response.thinking:
                self._db.execute("INSERT INTO thinking VALUES (?, ?, ?, ?, ?)", before)

    def select(self, wanted: Mapping[str, bool]) -> int:
        """Select what has these keys (key → held out) and a text, and nothing else; says how many those are."""
        with self._errors():
            self._db.execute("BEGIN IMMEDIATE")
            self._db.execute("UPDATE responses SET held_out = NULL")
            marks = ((int(held), key) for key, held in wanted.items())
            self._db.executemany(f"UPDATE responses SET held_out = ? WHERE key = ? AND {_SAYS}", marks)
            self._db.execute("COMMIT")
            return int(self._db.execute("SELECT COUNT(held_out) FROM responses").fetchone()[0])

    def selected(self) -> dict[str, bool]:
        """Key → held out of all that is selected."""
        with self._errors():
            rows = self._db.execute("SELECT key, held_out FROM responses WHERE held_out IS NOT NULL")
            return {key: bool(held_out) for key, held_out in rows}

    def left_out(self) -> int:
        """How many responses are not selected."""
        with self._errors():
            return int(self._db.execute("SELECT COUNT(*) FROM responses WHERE held_out IS NULL").fetchone()[0])

    def get(self, key: str) -> Trace:
        """One trace, selected or not (then as not held out). Raises KeyError, or CorruptFile where altered."""
        with self._errors():
            row = self._db.execute(f"SELECT {_CONTENT}, {self._sample} FROM {_THERE} WHERE key = ?", (key,)).fetchone()
        if row is None:
            raise KeyError(key)
        return self._trace(row)

    def traces(
        self, held_out: bool | None = None, first: bool = False, between: Sequence[str] = (), soft: bool = True
    ) -> Generator[Trace]:
        """The selected traces by key, an order that doesn't depend on when they came. first: of each prompt the first
        answer alone. between: the first key and the last. soft: with the targets. Raises CorruptFile."""
        chosen = "" if held_out is None else f"AND held_out = {int(held_out)}"
        chosen += " AND key BETWEEN ? AND ?" if between else ""
        if first:  # SQLite takes a bare column from the row that holds the least
            side = "IS NOT NULL" if held_out is None else f"= {int(held_out)}"  # a prompt is on one side alone
            least = f"SELECT key, MIN({self._sample}) FROM responses WHERE held_out {side} GROUP BY prompt"
            chosen += f" AND key IN (SELECT key FROM ({least}))"
        for row in self._rows(chosen, between):
            yield self._trace(row, soft)

    def ranges(self, size: int) -> Iterator[tuple[str, str]]:
        """First and last key of so many selected traces at a time, as they come by key."""
        with self._errors():
            keys = self._db.execute("SELECT key FROM responses WHERE held_out IS NOT NULL ORDER BY key")
            while some := keys.fetchmany(size):
                yield some[0][0], some[-1][0]

    def answers(self, held_out: bool | None = None) -> Iterator[tuple[str, str, str]]:
        """(key, prompt, answer) of the selected traces by key; faster than `traces`, for it reads no targets and checks
        no checksums."""
        chosen = "" if held_out is None else f"AND held_out = {int(held_out)}"
        rows = f"SELECT key, prompt, text FROM responses WHERE held_out IS NOT NULL {chosen} ORDER BY key"
        with self._errors():
            yield from iter(self._db.execute(rows).fetchone, None)

    def alternatives(self) -> int:
        """Of a token at most, as pack_targets.py tells, in what is trained on."""
        with self._errors():
            most = self._db.execute("SELECT MAX(HEX(SUBSTR(targets, 2, 1))) FROM responses WHERE held_out = 0")
            return int(most.fetchone()[0] or "0", 16)

    def asked(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(key, prompt, options) of all traces that say something, selected or not."""
        with self._errors():
            rows = self._db.execute(f"SELECT key, prompt, options FROM responses WHERE {_SAYS}")
            yield from ((key, prompt, json.loads(options)) for key, prompt, options in rows)

    def _rows(self, condition: str = "", values: Sequence[str] = ()) -> Iterator[tuple[Any, ...]]:
        rows = f"SELECT {_CONTENT}, {self._sample} FROM {_THERE} WHERE held_out IS NOT NULL {condition} ORDER BY key"
        with self._errors():  # an interrupted reading that is dropped late would close its cursor: it has none
            yield from iter(self._db.execute(rows, values).fetchone, None)

    def _trace(self, row: tuple[Any, ...], unpack: bool = True) -> Trace:
        key, prompt, held_out, text, done_reason, options, targets, checksum, timings, *before, sample = row
        thinking, thought, also = before
        sound = checksum == _checksum(prompt, text, done_reason, options, packed=targets)
        if not sound or (thinking is not None and also != _checksum(thinking, packed=thought)):
            raise CorruptFile(f"{self.path}: response {key[:12]} was altered; delete the file and capture again")
        try:
            blobs = (targets, thought) if unpack else (None, None)
            tokens, thought = (None if blob is None else unpack_targets(blob) for blob in blobs)
        except CorruptFile as error:
            text = f"{self.path}: response {key[:12]}: {error}; delete the file and capture again"
            raise CorruptFile(text) from error
        seconds = json.loads(timings)
        model, *_ = (seconds.pop(name, "") for name in ("model", *HOW))
        response = Response(text, tokens, done_reason, seconds, thinking or "", thought, model)
        asked = GenerateOptions(**json.loads(options))
        return Trace(key, prompt, bool(held_out), response, asked, self.teacher().digest, sample)

    # What there is.
    def content_digest(self) -> str:
        """Hex SHA-256 of the selected content: of neither timings nor the order in which it came."""
        digest = hashlib.sha256()
        for *content, packed, _, _, thinking, thought, _, _ in self._rows():
            for what, targets in ((content, packed), (thinking, thought)):
                if what is not None:
                    digest.update(json.dumps(what).encode())
                    digest.update(hashlib.sha256(b"" if targets is None else logical_bytes(targets)).digest())
        return digest.hexdigest()

    def stats(self, whole: bool = False) -> TraceStats:
        """Counted by SQLite, without reading the targets. whole: over all responses, as while they are gathered."""
        counted = _SAYS if whole else "held_out IS NOT NULL"
        with self._errors():
            prompts, responses, held_out, tokens, soft, size, thinking, thought = self._db.execute(
                "SELECT COUNT(DISTINCT prompt), COUNT(*), TOTAL(held_out), TOTAL(tokens), TOTAL(soft), "
                "TOTAL(LENGTH(CAST(text AS BLOB)) + COALESCE(LENGTH(targets), 0)), "
                f"COUNT(thinking), TOTAL(thought_tokens) FROM {_THERE} WHERE {counted}"
            ).fetchone()
            reasons = self._db.execute(
                f"SELECT done_reason, COUNT(*) FROM responses WHERE {counted} GROUP BY 1 ORDER BY 1"
            ).fetchall()
        counts = int(held_out), int(tokens), int(soft)
        mean = size / tokens if tokens else 0.0
        return TraceStats(prompts, responses, *counts, mean, dict(reasons), thinking, int(thought))


def _checksum(*words: str, packed: bytes | None) -> int:
    return zlib.crc32(packed or b"", zlib.crc32("\0".join(words).encode()))
