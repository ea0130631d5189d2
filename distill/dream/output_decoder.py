"""What comes out of a dreaming: text, written by the backbone, or three image embeddings, or both.

Shape legend: B prompts, 3 roles (what, action, result), D = 512, V vocabulary, H hidden of the backbone.
"""

import codecs
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.backbone.generate import Grammar, Sampler
from distill.backbone.model import Backbone
from distill.backbone.session import Session
from distill.dream.record import ROLES
from distill.student.sure import LONGEST, Trial
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.concepts import CONCEPT_DIM

if TYPE_CHECKING:
    from distill.tokens.image_tokens import Codebook

Part = Literal["thinking", "content"]

Instead = Callable[[int, list[int]], list[int]]
"""What may come after a token that came where other ids were expected."""
PATIENCE = 4
"""With a draft: while hits and these are twice its misses at least, what is left of it is read again after a miss. To
read several tokens at once costs a small student about twice as much as one."""


@dataclass(frozen=True)
class Sampling:
    """How text is drawn; temperature 0 is greedy, top_k 0 takes all. max_tokens counts the answer alone."""

    max_tokens: int = 256
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    seed: int = 0


class _Place(NamedTuple):
    """After one of the ids that were read ahead: logits (1, V), the grammar's state (1,), what is drawn there, and the
    probability of that."""

    id: int
    logits: Tensor
    state: Tensor
    drawn: int
    probability: float


class Speaker:
    """Draws one token after another from a session of one row: those that `stream` draws for the same seed.

    What was drawn can be looked at before it is read, so that whoever listens may go on otherwise.
    Raises BadInput for a sampling that is none.
    """

    def __init__(self, session: Session, sampling: Sampling) -> None:
        self.session = session
        self._grammar: Grammar | None = None
        self._states = torch.zeros(1, dtype=torch.long, device=session.model.cos.device)
        self.sampler = Sampler(sampling.temperature, sampling.top_k, sampling.top_p)
        self._uniforms = self.sampler.uniforms([sampling.seed], session.model.config.context)
        self._logits: Tensor | None = None
        self._next: int | None = None
        self._drawn = 0
        self.ids: list[int] = []
        """All that was read."""
        self._ahead: list[_Place] = []
        self._found: _Place | None = None
        self._instead: Instead | None = None
        self._hits = self._misses = 0

    def obey(self, grammar: Grammar) -> None:
        """From here on, what is drawn is held to a grammar; what is read counts as if it had been drawn."""
        self._forget()
        self._grammar, self._next, self._found = grammar, None, None
        self._states.fill_(grammar.start)

    def read(self, ids: Sequence[int], last: bool = False, as_drawn: bool = False) -> Tensor:
        """Read tokens that are given, not drawn. Their last hidden states (1, T, H), or the `last` of them alone.

        as_drawn: what comes next is drawn as if they had been. Raises BadInput past the context.
        """
        self._forget()
        states, self._logits = self.session.append(self._come(ids), last=last)
        self._drawn += len(ids) if as_drawn else 0
        return states

    def expect(self, ids: Sequence[int], instead: Instead) -> None:
        """Read ahead what may come, in one pass. What is drawn stays the same, but a token that comes as expected costs
        no pass of its own: speculative decoding (arXiv:2302.01318) with a draft that is a single guess, where to draw
        a token and compare is to accept the guess with the probability that it has."""
        self._instead, self._hits, self._misses = instead, 0, 0
        if ids := ids[: self.room]:
            self.peek()
            self._read_ahead(torch.tensor([ids], device=self.session.model.cos.device), ids)

    def _read_ahead(self, tokens: Tensor, ids: Sequence[int]) -> None:
        """Read tokens (1, T), of which the last, `ids`, may not come: what is drawn after each is found out at once."""
        _, logits = self.session.append(tokens, every=True)
        came, state = tokens.shape[1] - len(ids), self._states
        states = [state] * came
        for column in range(came, tokens.shape[1]):
            state = state if self._grammar is None else self._grammar.advance(state, tokens[:, column])
            states.append(state)
        drawn = self._draw(logits, torch.cat(states))
        sure = logits.float().softmax(-1).gather(1, drawn.unsqueeze(1)).squeeze(1)
        read: list[int] = tokens[0].tolist()
        self._ahead = list(map(_Place, read, logits.split(1), states, drawn.tolist(), sure.tolist()))
        if came:
            self._go_on()

    def _go_on(self) -> None:
        """To the next of the places that were found out."""
        self._found, self._next = self._ahead.pop(0), None
        self._logits, self._states = self._found.logits, self._found.state

    def _draw(self, logits: Tensor, states: Tensor) -> Tensor:
        """(T,) of logits (T, V): what comes at these places, which follow each other."""
        drawn = slice(self._drawn, self._drawn + len(logits))
        uniform = None if self._uniforms is None else self._uniforms[0, drawn, None].to(logits.device)
        return self.sampler.choose(self._grammar.mask(logits, states) if self._grammar else logits, uniform)

    def _forget(self) -> list[int]:
        """What was read ahead, now unread."""
        ids = [place.id for place in self._ahead]
        self.session.forget(len(ids))
        self._ahead = []
        return ids

    def _come(self, ids: Sequence[int]) -> Tensor:
        """(1, T) of tokens that come now: the grammar knows of them, and another is to be drawn."""
        tokens = torch.tensor([ids], device=self.session.model.cos.device)
        if self._grammar is not None:
            for column in range(len(ids)):
                self._states = self._grammar.advance(self._states, tokens[:, column])
        self._next = self._found = None
        self.ids += ids
        return tokens

    @property
    def room(self) -> int:
        """Tokens that still go into the context."""
        return self.session.model.config.context - self.session.lengths[0] + len(self._ahead)

    def peek(self) -> int:
        """The token that comes next."""
        if self._next is None:
            assert self._logits is not None, "nothing was read yet"
            self._next = self._found.drawn if self._found else int(self._draw(self._logits, self._states))
            self._drawn += 1
        return self._next

    def probability(self, token: int) -> float:
        """Of a token to come next, at temperature 1, among all that there are: the grammar aside."""
        if self._found and token == self._found.drawn:
            return self._found.probability
        assert self._logits is not None, "nothing was read yet"
        return float(self._logits[0].float().softmax(-1)[token])

    def take(self) -> int:
        """The token that comes next; now it is read."""
        token = self.peek()
        if self._ahead and self._ahead[0].id == token:
            self.ids.append(token)
            self._go_on()
            self._hits += 1
        elif self._ahead and self._instead:
            expected, later = self._forget(), list[int]()
            self._misses += 1
            if self._hits + PATIENCE >= 2 * self._misses:
                later = self._instead(token, expected)[: self.room - 1]
            now = self._come([token])
            self._read_ahead(torch.cat((now, now.new_tensor([later])), dim=1), later)
        else:
            self.read([token])
        return token

    def tokens(self, max_tokens: int, stop_ids: Sequence[int]) -> Iterator[int]:
        """Tokens up to a stop id, which is the last, or `max_tokens`, or the end of the context."""
        for count in range(1, min(max_tokens, self.room) + 1):
            token = self.peek()
            yield token
            if token in stop_ids or count == max_tokens or self.room <= 1:
                return
            self.take()


def is_sure(model: Backbone, ids: Sequence[int], sampling: Sampling, grammar: Grammar, end: int, sure: float) -> bool:
    """Whether the answer to ids that end in an empty dream can stand. grammar: of answers; end: what ends them."""
    length = min(model.config.context, len(ids) + LONGEST)
    speaker, trial = Speaker(Session(model, 1, length), sampling), Trial(sure)
    speaker.read(ids, last=True)
    speaker.obey(grammar)
    for token in speaker.tokens(LONGEST, [end]):
        if not trial.add(math.log(max(speaker.probability(token), 1e-300))):
            return False
        if token == end:
            return True
    return False


class Parts:
    """Tells dream and answer apart, token by token. opens: the very first token may open a dream."""

    def __init__(self, tokenizer: StudentTokenizer, opens: bool) -> None:
        self.tokenizer, self.thinking, self._opens = tokenizer, False, opens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def part(self) -> Part:
        return "thinking" if self.thinking else "content"

    def text(self, token: int) -> str | None:
        """What it prints: bytes of a character wait until it is whole. None: it is a tag, and another part begins."""
        opening, self._opens = self._opens and token == self.tokenizer.think_id, False
        if opening or (self.thinking and token == self.tokenizer.end_think_id):
            self.thinking = opening
            self._decoder.reset()
            return None
        return self._decoder.decode(printed(self.tokenizer, token))


def printed(tokenizer: StudentTokenizer, token: int) -> bytes:
    """What a token prints; control tokens nothing, as in Ollama."""
    return b"" if tokenizer.pad_id <= token <= tokenizer.eos_id else tokenizer.token_bytes(token)


class Splitter(Parts):
    """Parts what a student writes, token by token, into dream and answer, as text.

    The line breaks around the tags belong to the format and are left out. Bytes of a character wait until it is
    whole; what is still waiting at the end was cut off and is dropped. answering: no dream can open any more.
    """

    def __init__(self, tokenizer: StudentTokenizer, answering: bool = False) -> None:
        super().__init__(tokenizer, opens=not answering)
        self.thought: list[int] = []
        self._fresh = True  # nothing printed yet in this part
        self._held = ""  # white space that may turn out to stand before a tag

    def push(self, token: int) -> tuple[Part, str] | None:
        """What can be shown now that `token` has come."""
        if (text := self.text(token)) is None:
            self._fresh, self._held = True, ""
            return None
        if self.thinking and printed(self.tokenizer, token):
            self.thought.append(token)
        text = self._held + text
        if self._fresh:
            text = text.lstrip()
        kept = text.rstrip()
        self._held = text[len(kept) :]
        if not kept:
            return None
        self._fresh = False
        return self.part, kept


class OutputDecoder(nn.Module):
    """Text by the backbone, and the image head: the graph's reasoning becomes the outcome's (what, action, result).

    A role's embedding is added to the reasoning, and a feed-forward correction, shared by the roles, to their sum:
    so three roles learn from every example, and an untrained head already points where the reasoning does.
    """

    def __init__(self, dim: int = CONCEPT_DIM) -> None:
        super().__init__()
        self.role = nn.Parameter(torch.randn(len(ROLES), dim) * dim**-0.5)
        self.norm = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 2 * dim)
        self.down = nn.Linear(2 * dim, dim)

    def image(self, reasoning: Tensor) -> Tensor:
        """(B, D) → (B, 3, D), each of length 1."""
        x = reasoning.unsqueeze(1) + self.role
        return F.normalize(x + self.down(F.gelu(self.up(self.norm(x)))), dim=-1)

    def forward(self, reasoning: Tensor) -> Tensor:
        return self.image(reasoning)

    @staticmethod
    def text(speaker: Speaker, tokenizer: StudentTokenizer, max_tokens: int) -> Iterator[str]:
        """The answer in pieces, once prompt and dream were read."""
        splitter = Splitter(tokenizer, answering=True)
        for token in speaker.tokens(max_tokens, [tokenizer.eos_id]):
            if piece := splitter.push(token):
                yield piece[1]


def image_labels(image: Tensor, codebook: "Codebook") -> list[tuple[str, str, str]]:
    """(B, 3, D) → the labels of the image tokens nearest to each prompt's what, action and result."""
    codes = codebook.nearest(image.detach().float().cpu().flatten(0, -2).numpy()).reshape(-1, len(ROLES))
    labels = codebook.labels
    return [(labels[what], labels[action], labels[result]) for what, action, result in codes.tolist()]
