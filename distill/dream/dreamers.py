"""The two who can dream, drafting engine and decoding backbone, and what either leaves: image tokens, and a record.

Shape legend: one prompt; P prompt positions, H hidden of the backbone, S paths, T steps, 3 roles (what, action,
result), D = 512, N images.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from distill.dream.engine import Drafted, DreamEngine, drafted_dreams
from distill.dream.generator import Dreams
from distill.dream.graph_reasoner import DreamGraphReasoner, Reasoned, graph_edges
from distill.dream.output_decoder import Instead, Speaker
from distill.dream.policy import Choice
from distill.dream.pretrained import Parts
from distill.dream.record import ROLES, Branch, DreamRecord, Edge
from distill.errors import BadInput
from distill.mining.triplets import LENSES
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.chat import Dream, Triple, dream_places

WAKING = 4
"""Places in the context that a dream leaves: for its closing tag between two line breaks, and one token to say."""

Watch = Callable[[list[Branch]], None]
"""Gets all paths as far as they are, after each step that forms."""


@dataclass
class Dreamt:
    """One prompt's dreaming.

    dream   what the backbone reads, lens → steps; None: it dreamed nothing
    image   makes (1, 3, D) embeddings of the outcome's what, action and result; None: there is nothing to see
    vectors (S, T, 3, D) embeddings of the steps, T as many as the longest path lives, where there is an engine
    choice  of paths, where a policy made it
    """

    dream: Dream | None = None
    branches: list[Branch] = field(default_factory=list[Branch])
    edges: list[Edge] = field(default_factory=list[Edge])
    image: Callable[[], Tensor] | None = None
    vectors: NDArray[Any] | None = None
    choice: Choice | None = None


def instead(tokenizer: StudentTokenizer) -> Instead:
    """Of a dream's draft, what is still expected after a token that came where `ids` were: after another image token,
    the rest; after one too many, all; after another lens or tag, what stood behind it."""

    def left(token: int, ids: list[int]) -> list[int]:
        if tokenizer.image_code(token) is not None:
            return ids[tokenizer.image_code(ids[0]) is not None :]
        return ids[ids.index(token) + 1 :] if token in ids else []

    return left


@torch.inference_mode()
def draft(
    parts: Parts,
    states: Tensor,
    guide: Sequence[int],
    watch: Watch | None = None,
    seed: int | None = None,
) -> Dreamt:
    """The engine's dream of a prompt's states (1, P, H), in one pass.

    guide: up to three codes that each path begins with. Its `dream` holds the paths that the graph keeps; of a guided
    dream the best of each lens, whatever its score: who guides wants it read. seed: of a policy that draws.
    """
    engine = parts.engine
    assert engine is not None
    forced = torch.tensor(list(guide), device=states.device) if guide else None
    source = "guided engine path" if guide else "engine path"
    keep_above = 0.0 if guide else parts.config.keep_above

    def on_step(step: int, dreams: Dreams) -> None:
        assert watch is not None
        watch(_drafted_branches(parts, dreams, None, keep_above, source))

    drafted: Drafted = engine(states.float(), None, None, forced, on_step if watch else None, whole=False)
    live, choice = drafted.dreams.live(), None
    if parts.policy is not None and not guide:
        logits, choice = parts.policy.choose(drafted, keep_above, seed)
        drafted = replace(drafted, reasoned=replace(drafted.reasoned, score_logits=logits))
    return Dreamt(
        drafted_dreams(drafted, keep_above=keep_above)[0],
        _drafted_branches(parts, drafted.dreams, drafted.reasoned, keep_above, source),
        graph_edges(drafted.reasoned, live),
        partial(engine.decoder.image, drafted.reasoned.embedding),
        drafted.dreams.embeddings[0].float().cpu().numpy(),
        choice,
    )


def _drafted_branches(
    parts: Parts, dreams: Dreams, reasoned: Reasoned | None, keep_above: float, source: str
) -> list[Branch]:
    """The paths; before the graph has seen them, all are unjudged."""
    codes, live = dreams.codes()[0].tolist(), dreams.live()
    sure = dreams.logits[0].float().softmax(-1).amax(-1).tolist()
    lengths, gates = live[0].sum(-1).tolist(), dreams.gates[0].tolist()
    kept, scores, importance = [True] * len(codes), [0.0] * len(codes), None
    if reasoned is not None:
        kept = DreamGraphReasoner.arbitrate(reasoned, live, keep_above)[0].tolist()
        scores, importance = reasoned.scores[0].tolist(), reasoned.node_importance[0].tolist()
    return [
        Branch(
            lens=LENSES[path % len(LENSES)],
            steps=[
                parts.step(codes[path][t], sure[path][t], importance[path][t] if importance else 0.0)
                for t in range(lengths[path])
            ],
            score=scores[path] if lengths[path] else 0.0,
            kept=kept[path],
            provenance=f"{source} {path + 1}",
            gates=dict(zip(LENSES, gates[path], strict=True)),
        )
        for path in range(len(codes))
    ]


@dataclass
class Written:
    """What a backbone wrote between its think tags, and how sure it was of each token (0 to 1)."""

    ids: list[int] = field(default_factory=list[int])
    sure: list[float] = field(default_factory=list[float])

    def add(self, id: int, sure: float) -> None:
        self.ids.append(id)
        self.sure.append(sure)


def decode(parts: Parts, speaker: Speaker, watch: Watch | None = None) -> Written:
    """The dream that a backbone writes after a prompt, as it would in Ollama but for the speaker's grammar.

    It is woken (its think tag closed) where the context ends.
    """
    tokenizer = parts.tokenizer
    for _ in (tokenizer.think_id, tokenizer.newline_id):
        speaker.take()
    written = Written()
    while speaker.room > WAKING:
        token = speaker.peek()
        if token != tokenizer.end_think_id:
            written.add(token, speaker.probability(token))
        speaker.take()
        if token == tokenizer.end_think_id:
            speaker.take()  # its line break
            return written
        _show(parts, written, watch, "backbone")
    speaker.read([tokenizer.newline_id, tokenizer.end_think_id, tokenizer.newline_id])
    return written


def check_room(parts: Parts, speaker: Speaker, count: int) -> None:
    """Raises BadInput where so many tokens of a dream leave none for an answer."""
    if speaker.room <= count:
        text = f"with its dream it fills a context of {parts.model.config.context}, and leaves no room for an answer"
        raise BadInput(f"prompt: {text}; shorten it")


def decode_guided(parts: Parts, speaker: Speaker, guide: Sequence[int], watch: Watch | None = None) -> Written:
    """A backbone's dream whose every path begins with `guide` (codes), the lenses opened for it in their order.

    A path ends where the backbone would go on with anything but an image token, or is full. Raises BadInput where it
    leaves no room for an answer.
    """
    tokenizer = parts.tokenizer
    forced = [int(tokenizer.image_ids[code]) for code in guide]
    written, around = Written(), [tokenizer.think_id, tokenizer.newline_id]
    check_room(parts, speaker, len(around))
    speaker.read(around)
    for lens_id in tokenizer.lens_ids:
        head = [lens_id, *forced]
        check_room(parts, speaker, len(head) + WAKING - 1)
        speaker.read(head)
        for id in head:
            written.add(id, 1.0)
        for _ in range(3 * parts.longest - len(forced)):
            token = speaker.peek()
            if tokenizer.image_code(token) is None:
                break
            check_room(parts, speaker, WAKING)
            written.add(token, speaker.probability(token))
            speaker.take()
            _show(parts, written, watch, "guided backbone")
    speaker.read([tokenizer.newline_id, tokenizer.end_think_id, tokenizer.newline_id])
    return written


def _show(parts: Parts, written: Written, watch: Watch | None, source: str) -> None:
    """Tell the watcher when another step is whole."""
    if watch is None or parts.tokenizer.image_code(written.ids[-1]) is None:
        return
    places = dream_places(parts.tokenizer, written.ids)
    if any(steps and steps[-1][-1] == len(written.ids) - 1 for steps in places.values()):
        watch(_written_branches(parts, written, places, None, source))


def read_dream(parts: Parts, written: Written, states: Tensor, source: str = "backbone") -> Dreamt:
    """What is known of a dream that the backbone wrote after a prompt of these states (1, P, H).

    Where there is an engine, its graph reasons over the image tokens as if it had drafted them; the backbone has
    read all paths already, so none is set aside. Without one, steps that follow each other are joined, and the
    outcome is the last step of the causal path, or else of the longest.
    """
    places = dream_places(parts.tokenizer, written.ids)
    codes = {lens: [parts.codes(written.ids, step) for step in steps] for lens, steps in places.items()}
    if parts.engine is None or not any(codes.values()):
        branches = _written_branches(parts, written, places, None, source)
        return Dreamt(codes, branches, _chain_edges(branches), _outcome(parts, codes))
    vectors, reasoned, live = _reason(parts.engine, codes, states)
    branches = _written_branches(parts, written, places, reasoned, source)
    image = partial(parts.engine.decoder.image, reasoned.embedding)
    return Dreamt(codes, branches, graph_edges(reasoned, live), image, vectors[0].float().cpu().numpy())


@torch.inference_mode()
def _reason(engine: DreamEngine, codes: Dream, states: Tensor) -> tuple[Tensor, Reasoned, Tensor]:
    """Vectors (1, S, T, 3, D) of a dream of codes, what the engine's graph says of it, and which steps (1, S, T) there
    are."""
    longest = max(map(len, codes.values()))
    table = torch.zeros((1, len(LENSES), longest, 3), dtype=torch.long)
    live = torch.zeros((1, len(LENSES), longest), dtype=torch.bool)
    for path, lens in enumerate(LENSES):
        if steps := codes[lens]:
            table[0, path, : len(steps)] = torch.tensor(steps)
            live[0, path, : len(steps)] = True
    table, live = table.to(states.device), live.to(states.device)
    encoded = engine.input_tokenizer(states.float(), None)
    vectors = engine.generator.centroids[table] * live[..., None, None]
    return vectors, engine.reasoner(vectors, live, encoded.triplet), live


def _written_branches(
    parts: Parts,
    written: Written,
    places: dict[str, list[tuple[int, int, int]]],
    reasoned: Reasoned | None,
    source: str,
) -> list[Branch]:
    scores = [0.0] * len(LENSES) if reasoned is None else reasoned.scores[0].tolist()
    importance = None if reasoned is None else reasoned.node_importance[0].tolist()
    return [
        Branch(
            lens=lens,
            steps=[
                parts.step(
                    parts.codes(written.ids, step),
                    [written.sure[place] for place in step],
                    importance[path][t] if importance else 0.0,
                )
                for t, step in enumerate(places[lens])
            ],
            score=scores[path] if places[lens] else 0.0,
            kept=True,
            provenance=source,
        )
        for path, lens in enumerate(LENSES)
    ]


def _chain_edges(branches: Sequence[Branch]) -> list[Edge]:
    return [
        Edge((path, source), (path, target), "temporal", 0.0)
        for path, branch in enumerate(branches)
        for source, target in pairwise(range(len(branch.steps)))
    ]


def _outcome(parts: Parts, codes: Dream) -> Callable[[], Tensor] | None:
    """Makes (1, 3, D): centroids of the outcome's image tokens."""
    chain: list[Triple] = codes["causal"] or max(codes.values(), key=len)
    if not chain or parts.codebook is None:
        return None
    centroids = parts.codebook.centroids[list(chain[-1])]
    return lambda: torch.from_numpy(centroids).unsqueeze(0).to(parts.device)


def graph_data(record: DreamRecord) -> dict[str, Any]:
    """A record's graph as plain data: nodes and edges, each node named "path/step"."""
    nodes = [
        {
            "id": f"{path}/{t}",
            "path": path,
            "step": t,
            "lens": branch.lens,
            **{role: slot.label for role, slot in zip(ROLES, step.slots, strict=True)},
            "importance": step.importance,
            "kept": branch.kept,
        }
        for path, branch in enumerate(record.branches)
        for t, step in enumerate(branch.steps)
    ]
    edges = [
        {
            "source": "/".join(map(str, edge.source)),
            "target": "/".join(map(str, edge.target)),
            "kind": edge.kind,
            "importance": edge.importance,
        }
        for edge in record.edges
    ]
    return {"num_nodes": len(nodes), "num_edges": len(edges), "nodes": nodes, "edges": edges}
