"""The chat format: how a conversation and a dream are written as tokens.

    <|im_start|>user
    What happens when you drop a ball?<|im_end|>
    <|im_start|>assistant
    <think>
    ⟨spatial⟩⟨a ball⟩⟨release⟩⟨falls⟩⟨temporal⟩⟨causal⟩⟨abstract⟩
    </think>
    It falls.<|im_end|>

The student writes everything after `assistant` itself. `think=False` writes an empty pair of tags for it.
`render`, `JINJA` (chat_template.py; transformers, llama.cpp) and `go_template` (Ollama) say the same; tests compare
their ids.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NotRequired, TypedDict

from distill.tokens.bpe import END, END_THINK, START, THINK, StudentTokenizer, image_text
from distill.tokens.shown import show
from distill.turns import turns

STOP = (END,)
"""Stop strings. The end token alone: a model that opens a turn of its own has ended its own before."""


class Message(TypedDict):
    """A turn. `thinking` is the dream of an assistant's turn, as text; only that of the last turn is read."""

    role: str
    content: str
    thinking: NotRequired[str]


PICTURE = "\ufffc"
"""Stands in a text for a picture that is read itself; not written by any template."""

Triple = tuple[int, int, int]
"""Codes of the image tokens of (what, action, result)."""

Dream = dict[str, list[Triple]]
"""Lens → the steps of its chain; what is written or read as tokens has the lenses in the tokenizer's order."""


def render(messages: Sequence[Message], think: bool | None = None, add_generation_prompt: bool = True) -> str:
    """The conversation as text, ready for the student's turn.

    A last turn of the assistant is left open, to be gone on with, after its dream if it has one; what was dreamed
    before earlier turns isn't read, as in training. `think` None and True are the same: it dreams.
    Without `add_generation_prompt` every turn is closed and none opened.
    """
    text = ""
    for i, message in enumerate(messages):
        assistant = message["role"] == "assistant"
        thinking = message.get("thinking", "") if assistant and i == len(messages) - 1 else ""
        dream = f"{THINK}\n{thinking}\n{END_THINK}\n" if thinking else ""
        is_open = assistant and i == len(messages) - 1 and add_generation_prompt
        text += f"{START}{message['role']}\n{dream}{message['content']}" + ("" if is_open else f"{END}\n")
    if messages and messages[-1]["role"] != "assistant" and add_generation_prompt:
        text += f"{START}assistant\n" + (f"{THINK}\n{END_THINK}\n" if think is False else "")
    return text


@cache
def modelfiles() -> Path:
    """The folder of templates for Ollama: of the checkout, or of the installed wheel."""
    root = Path(__file__).parents[2]
    checkout = root / "Modelfiles"
    return checkout if checkout.is_dir() else root / "bundle" / "_modelfiles"


def go_template() -> str:
    """The TEMPLATE of an Ollama Modelfile."""
    return (modelfiles() / "chat.gotmpl").read_text(encoding="utf-8").removesuffix("\n")


def prompt_ids(tokenizer: StudentTokenizer, prompt: str, think: bool | None = None, system: str = "") -> list[int]:
    """Ids of a question, or of a conversation that ends in one (distill/turns.py), up to where the student goes on.
    Image tokens typed by a user steer it, those of pictures that it names are put in their place."""
    said = turns(show(prompt, tokenizer.shown), system)
    return tokenizer.encode(render([Message(role=role, content=text) for role, text in said], think), special=True)


def picture_ids(tokenizer: StudentTokenizer, text: str, pictures: Sequence[Iterable[int]]) -> list[int]:
    """Ids of a rendered text, each picture's in the place of its PICTURE. What stands between is encoded by itself, as
    llama.cpp does."""
    first, *rest = (tokenizer.encode(part, special=True) for part in text.split(PICTURE, len(pictures)))
    return first + [id for picture, part in zip(pictures, rest, strict=True) for id in (*picture, *part)]


def with_context(prompt: str, triples: Iterable[tuple[str, str, str]]) -> str:
    """The prompt and, on a line of their own, the image tokens of triplets that are known of it; each once."""
    known = "".join(image_text(label) for triple in dict.fromkeys(triples) for label in triple)
    return f"{prompt}\n{known}" if known else prompt


def dream_ids(tokenizer: StudentTokenizer, dream: Mapping[str, Sequence[Triple]]) -> list[int]:
    """The dream's tokens: each lens in order, each followed by the codes of its steps, without think tags. No tokens
    where no lens has a step: that is no dream."""
    ids: list[int] = []
    if not any(dream.values()):
        return ids
    for lens, lens_id in zip(tokenizer.lenses, tokenizer.lens_ids, strict=True):
        ids += [lens_id, *(int(tokenizer.image_ids[code]) for step in dream.get(lens, ()) for code in step)]
    return ids


def think_ids(tokenizer: StudentTokenizer, dream: Mapping[str, Sequence[Triple]] | None) -> list[int]:
    """All that stands between the assistant's header and the answer; None is the empty dream of `think=False`."""
    return think_block(tokenizer, [] if dream is None else dream_ids(tokenizer, dream))


def think_block(tokenizer: StudentTokenizer, dream: Sequence[int]) -> list[int]:
    """The same around a dream's ids; none are the empty dream."""
    newline = tokenizer.newline_id
    return [tokenizer.think_id, newline, *dream, *([newline] if dream else []), tokenizer.end_think_id, newline]


def with_steps(dream: Dream | None) -> Dream | None:
    """The dream, or None where no lens has a step."""
    return dream if dream and any(dream.values()) else None


def dream_places(tokenizer: StudentTokenizer, ids: Sequence[int]) -> dict[str, list[tuple[int, int, int]]]:
    """Lens → where in `ids` the three image tokens of each of its steps stand; see `parse_dream`."""
    places: dict[str, list[int]] = {lens: [] for lens in tokenizer.lenses}
    lens = None
    for place, id in enumerate(ids):
        if id == tokenizer.end_think_id:
            break
        if id in tokenizer.lens_ids:
            lens = tokenizer.lenses[tokenizer.lens_ids.index(id)]
            del places[lens][len(places[lens]) // 3 * 3 :]
        elif lens is not None and tokenizer.image_code(id) is not None:
            places[lens].append(place)
    return {lens: list(zip(*[iter(found)] * 3, strict=False)) for lens, found in places.items()}


def parse_dream(tokenizer: StudentTokenizer, ids: Sequence[int]) -> Dream:
    """The dream in what a student wrote. It may have written anything: text between image tokens is passed over,
    a step with codes missing is dropped, a lens opened twice goes on, and the dream ends at `</think>`."""
    first = int(tokenizer.image_ids[0]) if len(tokenizer.image_ids) else 0
    return {
        lens: [(ids[what] - first, ids[action] - first, ids[result] - first) for what, action, result in steps]
        for lens, steps in dream_places(tokenizer, ids).items()
    }
