"""The codebook as one page of HTML that fetches nothing: every image token, its phrases, its pictures, its use."""

from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

from distill.corpus.datasets.stage import dataset_lines
from distill.policy import page_policy
from distill.run import Run
from distill.tokens.bpe import image_text
from distill.tokens.image_tokens import Codebook, load_codes
from distill.vision.pictures import Box, thumbnail

PICTURES = 3
"""Of a token at most."""
SIDE = 56
"""Pixels of their longer side."""


@dataclass(frozen=True)
class Token:
    """used: how often the run's triplets mention it. pictures: files, and the part of each that shows it."""

    label: str
    code: int
    used: int
    phrases: list[str]
    pictures: list[tuple[Path, Box]]


def image_tokens(run: Run) -> list[Token]:
    """Every image token of a run, by its code. Raises MissingStage, CorruptFile."""
    run.require("tokenize")
    codebook = Codebook.load(run.tokenizer, run.settings.teacher)
    phrases: dict[int, list[str]] = defaultdict(list)
    for phrase, code in load_codes(run.tokenizer, codebook).items():
        phrases[code].append(phrase)
    pictures: dict[int, list[tuple[Path, Box]]] = defaultdict(list)
    known: dict[str, int] = {}
    for line in dataset_lines(run):
        for name, found in line.get("pictures", {}).items():
            for label, (x, y) in found.items():
                if label not in known:
                    known[label] = int(codebook.encode([label])[0])
                seen = (run.path / name, (x - 0.25, y - 0.25, x + 0.25, y + 0.25))
                if len(own := pictures[known[label]]) < PICTURES and seen not in own:
                    own.append(seen)
    return [
        Token(label, code, int(used), sorted(phrases[code]), pictures[code])
        for code, (label, used) in enumerate(zip(codebook.labels, codebook.counts, strict=True))
    ]


def gallery(name: str, tokens: list[Token]) -> bytes:
    """The page, UTF-8; those that are used most come first. Raises BadInput for a picture that can't be read."""
    most = max((token.used for token in tokens), default=1) or 1
    cards = "\n".join(_card(token, most) for token in sorted(tokens, key=lambda token: (-token.used, token.code)))
    used = sum(token.used > 0 for token in tokens)
    return PAGE.format(
        policy=page_policy(SCRIPT),
        style=STYLE,
        name=escape(name),
        count=len(tokens),
        used=used,
        cards=cards,
        script=SCRIPT,
    ).encode(errors="backslashreplace")


def _card(token: Token, most: int) -> str:
    images = "".join(
        f'<img alt="{escape(token.label)}" src="data:image/jpeg;base64,{thumbnail(path, SIDE, part)}">'
        for path, part in token.pictures
    )
    others = [phrase for phrase in token.phrases if phrase != token.label]
    said = escape(", ".join(others[:12])) + (f" … {len(others) - 12} more" if len(others) > 12 else "")
    words = escape(" ".join([token.label, *token.phrases]).lower())
    return (
        f'<li data-words="{words}" data-used="{token.used}"><h2>{escape(image_text(token.label))}</h2>'
        f'<p class="use" style="--p:{token.used / most:.4f}">{token.used:,} times, code {token.code}</p>'
        f"<p>{images}</p><p>{said}</p></li>"
    )


STYLE = """body{font:15px/1.4 system-ui,sans-serif;margin:1.5rem;color-scheme:light dark}
ul{display:grid;grid-template-columns:repeat(auto-fill,minmax(13rem,1fr));gap:.8rem;padding:0;list-style:none}
li{border:1px solid #8885;border-radius:.6rem;padding:.6rem .8rem;overflow-wrap:anywhere}
h2{font-size:1rem;margin:0}p{margin:.3rem 0 0;font-size:.85rem}img{margin-right:.3rem;border-radius:.3rem}
.use{background:linear-gradient(90deg,#5b8def66 calc(100% * var(--p)),transparent 0)}"""
SCRIPT = """const find = document.querySelector("#find"), cards = [...document.querySelectorAll("li")];
find.addEventListener("input", () => {
  const words = find.value.toLowerCase();
  for (const card of cards) card.hidden = !card.dataset.words.includes(words);
  document.querySelector("#shown").textContent = cards.filter((card) => !card.hidden).length;
});"""
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="{policy}"><title>Image tokens of {name}</title>
<style>{style}</style></head><body>
<h1>Image tokens of {name}</h1>
<p><label>Find <input id="find" type="search"></label>
<span id="shown">{count}</span> of {count}; {used} are used in dreams.</p>
<ul>
{cards}
</ul>
<script>{script}</script></body></html>
"""
