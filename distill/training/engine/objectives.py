"""What each phase of the dream engine's training minimizes, and how the frozen backbone reads the engine's dreams.

`input`   the prompt's states → the first triplet of its mined dream
`dream`   and all steps of all paths
`end`     and the answer's cross-entropy through the backbone, which paths and steps are right, and the outcome

The backbone's own weights never change. It reads image tokens; their embeddings carry the straight-through gradient
of the engine's distribution over codes, so that the answer says which codes would have served it better.

Shape legend: B prompts, P prompt positions, S paths, T steps, 3 roles, C codes, D = 512, H hidden, V vocabulary,
N image tokens of all dreams, A answer tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from distill.backbone.model import Backbone
from distill.dream.engine import Drafted, DreamEngine, drafted_dreams, prompt_states
from distill.dream.generator import straight_through
from distill.dream.graph_reasoner import DreamGraphReasoner
from distill.dream.input_tokenizer import Encoded
from distill.mining.triplets import LENSES
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import dream_places, think_ids
from distill.training.engine.data import DreamBatch, DreamData, first_triplets, outcomes
from distill.training.engine.losses import DreamTargets, cosine_loss, engine_loss, importance_loss, score_loss

WEIGHTS = {"dreams": 1.0, "input": 0.2, "answer": 0.2, "score": 0.5, "importance": 0.2, "image": 0.5}
"""Of each part in the last phase. The second has the dreams and the input of these, the first the input alone."""
ANSWERS = 8
"""Prompts of a batch whose answer the backbone reads: reading is what costs, and the rest of the phase is cheap."""
CHUNK = 512
"""Answer positions projected to the vocabulary at once."""
KEPT_BYTES = 256 * 2**20
"""Prompt states kept in memory at most; more are computed anew with each batch."""
KEPT_ROWS = 64


class PromptStates:
    """The frozen backbone's states of prompts. They never change, so where they fit they are computed once.

    That is done in an order of its own, as the last bits of a state may depend on what shares its batch.
    """

    def __init__(self, backbone: Backbone, data: DreamData) -> None:
        self.backbone = backbone
        self.kept: dict[int, Tensor] = {}
        if int(data.lengths.sum()) * backbone.config.hidden * 4 > KEPT_BYTES:
            return
        order = data.usable[data.lengths.argsort(kind="stable")]
        for start in range(0, len(order), KEPT_ROWS):
            chosen = order[start : start + KEPT_ROWS].tolist()
            states, real = prompt_states(backbone, [data.documents.prompt(i).tolist() for i in chosen])
            self.kept |= {i: row[seen] for i, row, seen in zip(chosen, states, real, strict=True)}

    def of(self, batch: DreamBatch) -> tuple[Tensor, Tensor]:
        """States (B, P, H) and what is real (B, P)."""
        if not self.kept:
            return prompt_states(self.backbone, batch.prompts)
        rows = [self.kept[int(i)] for i in batch.documents]
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        states = pad_sequence(rows, batch_first=True)
        return states, torch.arange(states.shape[1], device=states.device) < lengths[:, None]


def targets_of(batch: DreamBatch, paths: int) -> DreamTargets:
    """The true chain of each path: its lens's. Paths of one lens have the same."""
    lens = [path % len(LENSES) for path in range(paths)]
    codes = batch.codes[:, lens]
    return DreamTargets(codes, batch.phrases[:, lens], codes[..., 0] >= 0)


# The phases.
def phase_loss(
    phase: str,
    engine: DreamEngine,
    reader: "Reader",
    batch: DreamBatch,
    states: tuple[Tensor, Tensor],
) -> dict[str, Tensor]:
    """The parts of a phase's loss, each a scalar, and `total`."""
    if phase == "input":
        first = input_loss(engine, engine.input_tokenizer(*states), batch)
        return {"total": first, "input": first}
    targets = targets_of(batch, engine.generator.paths)
    if phase == "dream":
        encoded = engine.input_tokenizer(*states)
        parts = engine_loss(engine.generator(encoded), targets)
        first = input_loss(engine, encoded, batch)
        return {**parts, "total": parts["total"] + WEIGHTS["input"] * first, "input": first}
    drafted = engine(*states)
    parts = engine_loss(drafted.dreams, targets)
    more = {
        "input": input_loss(engine, drafted.encoded, batch),
        "answer": reader.answer_loss(drafted, batch),
        "score": score_loss(drafted, targets),
        "importance": importance_loss(drafted, targets),
        "image": image_loss(engine, drafted, batch),
    }
    total = WEIGHTS["dreams"] * parts["total"] + torch.stack([WEIGHTS[k] * v for k, v in more.items()]).sum()
    return {**parts, **more, "total": total}


def input_loss(engine: DreamEngine, encoded: Encoded, batch: DreamBatch) -> Tensor:
    """The first triplet's cosine distance to the true phrases, and its codes' cross-entropy."""
    codes, phrases = first_triplets(batch)
    logits = engine.generator.scale.detach() * (encoded.triplet @ engine.generator.centroids.T)
    return cosine_loss(encoded.triplet, phrases, codes >= 0) + F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def image_loss(engine: DreamEngine, drafted: Drafted, batch: DreamBatch) -> Tensor:
    """Mean cosine distance of the image head's triplet to the outcome's phrases."""
    codes, phrases = outcomes(batch)
    return cosine_loss(engine.decoder.image(drafted.reasoned.embedding), phrases, codes >= 0)


# The answer, through the backbone.
@dataclass(frozen=True)
class Slots:
    """Image tokens whose embeddings are given: rows, columns (N,) in the texts, values (N, H)."""

    rows: Tensor
    columns: Tensor
    values: Tensor


class Reader:
    """The frozen backbone as a judge of dreams: how likely the true answers are once it has read them."""

    def __init__(self, backbone: Backbone, tokenizer: StudentTokenizer) -> None:
        self.backbone, self.tokenizer = backbone, tokenizer
        images = torch.from_numpy(tokenizer.image_ids).long().to(backbone.cos.device)
        self.table = backbone.model.embed_tokens.weight[images].detach()  # (C, H)

    def answer_loss(self, drafted: Drafted, batch: DreamBatch) -> Tensor:
        """Mean cross-entropy of the answers of the batch's first prompts after the engine's own dreams.

        The best path of every lens is read, whatever its score: otherwise most paths would never learn from it.
        """
        dreams = drafted_dreams(drafted, keep=False)[:ANSWERS]
        thinks = [think_ids(self.tokenizer, dream) for dream in dreams]
        slots = self._slots(drafted, thinks, [len(prompt) for prompt in batch.prompts])
        nats, tokens = self.read(batch.prompts[: len(dreams)], thinks, batch.answers[: len(dreams)], slots)
        return nats / max(tokens, 1)

    def _slots(self, drafted: Drafted, thinks: Sequence[list[int]], starts: Sequence[int]) -> Slots:
        """Where the codes of these think blocks stand in the texts, and what their embeddings are there."""
        keep = DreamGraphReasoner.arbitrate(drafted.reasoned, drafted.dreams.live(), 0.0).tolist()
        places: list[tuple[int, ...]] = []  # row, column, path, step, role
        for row, think in enumerate(thinks):
            paths = {LENSES[path % len(LENSES)]: path for path, kept in enumerate(keep[row]) if kept}
            for lens, steps in dream_places(self.tokenizer, think).items():
                for t, columns in enumerate(steps):
                    places += [(row, starts[row] + at, paths[lens], t, role) for role, at in enumerate(columns)]
        table = torch.tensor(places, dtype=torch.long, device=self.table.device).reshape(-1, 5)
        rows, columns, path, step, role = table.unbind(1)
        return Slots(rows, columns, straight_through(drafted.dreams.logits[rows, path, step, role], self.table))

    def read(
        self,
        prompts: Sequence[list[int]],
        thinks: Sequence[list[int]],
        answers: Sequence[list[int]],
        slots: Slots | None = None,
    ) -> tuple[Tensor, int]:
        """Cross-entropy of the answers in nats, summed, and their tokens. What passes the context is left out."""
        device, context = self.table.device, self.backbone.config.context
        texts = [
            (prompt + think + answer)[:context] for prompt, think, answer in zip(prompts, thinks, answers, strict=True)
        ]
        ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.long)
        asked = torch.zeros_like(ids, dtype=torch.bool)  # the next token is of the answer
        for row, text in enumerate(texts):
            ids[row, : len(text)] = torch.tensor(text)
            asked[row, len(prompts[row]) + len(thinks[row]) - 1 : len(text) - 1] = True
        ids, asked = ids.to(device), asked.to(device)
        embeds = self.backbone.model.embed_tokens(ids)
        if slots is not None:
            embeds = embeds.index_put((slots.rows, slots.columns), slots.values)
        hidden = self.backbone.hidden(ids, embeds=embeds)[:, :-1][asked[:, :-1]]
        labels = ids[:, 1:][asked[:, :-1]]
        parts = zip(hidden.split(CHUNK), labels.split(CHUNK), strict=True)
        return torch.stack([self._nats(*part) for part in parts]).sum(), len(labels)

    def _nats(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy; the logits (A, V) are made again on the way back instead of kept."""

        def nats(hidden: Tensor) -> Tensor:
            return F.cross_entropy(self.backbone.lm_head(hidden).float(), labels, reduction="sum")

        found = checkpoint(nats, hidden, use_reentrant=False) if hidden.requires_grad else nats(hidden)
        assert isinstance(found, Tensor)
        return found
