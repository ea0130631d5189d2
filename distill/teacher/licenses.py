"""Whose model it is: the licence that a teacher's file, server or folder names, and a short name for its text."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self, cast

OTHER = "other"
"""The short name of a licence that has none."""

HEADING = 600
"""Characters of a licence's text in which its name stands."""

KNOWN: dict[str, str] = {
    r"apache license.{0,20}version 2\.0": "apache-2.0",
    r"llama (\d(?:\.\d)?) (?:version .{0,40})?(?:community )?licen[sc]e": r"llama\1",
    r"gemma terms of use": "gemma",
    r"qwen research license": "qwen-research",
    r"tongyi qianwen license": "tongyi-qianwen",
    r"deepseek license": "deepseek",
    r"openrail": "openrail",
    r"gnu affero general public license version 3": "agpl-3.0",
    r"gnu general public license version (\d)": r"gpl-\1.0",
    r"attribution-noncommercial 4\.0|cc.by.nc.4\.0": "cc-by-nc-4.0",
    r"attribution-sharealike 4\.0|cc.by.sa.4\.0": "cc-by-sa-4.0",
    r"attribution 4\.0|cc.by.4\.0": "cc-by-4.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"redistribution and use in source and binary forms": "bsd-3-clause",
}
"""What the heading holds (lower case, white space as one blank) → the name that Hugging Face gives the licence."""


@dataclass(frozen=True)
class License:
    """name: short, as Hugging Face writes it (`apache-2.0`, `llama3.2`, `other`); "" where nobody says. title: of a
    licence without a short name. link and text: "" where not given."""

    name: str = ""
    title: str = ""
    link: str = ""
    text: str = ""

    def __str__(self) -> str:
        known = self.title if self.name == OTHER and self.title else self.name
        return known or "unknown"

    def to_json(self) -> dict[str, str]:
        """Only what is known."""
        return {key: value for key, value in asdict(self).items() if value}

    @classmethod
    def from_json(cls, value: Mapping[str, str] | None) -> Self:
        """From `to_json`; unknown where None."""
        return cls(**(value or {}))

    @classmethod
    def of_text(cls, text: str) -> Self:
        """By what stands in its first lines."""
        text = text.strip()
        if not text:
            return cls()
        heading = " ".join(text[:HEADING].lower().split())
        for pattern, name in KNOWN.items():
            if found := re.search(pattern, heading):
                return cls(found.expand(name), text=text)
        return cls(OTHER, title=text.splitlines()[0].strip()[:80], text=text)

    @classmethod
    def of_metadata(cls, fields: Mapping[str, Any]) -> Self:
        """From a GGUF's `general.license`, `.license.name` and `.license.link`."""
        name, title, link = (str(fields.get(f"general.license{part}") or "") for part in ("", ".name", ".link"))
        if not name and title:
            name = OTHER
        return cls(name.strip().lower(), title.strip(), link.strip())

    @classmethod
    def of_ollama(cls, show: Mapping[str, Any]) -> Self:
        """From an answer of /api/show: the file's own word, and the text that came with the model."""
        said, text = cls.of_metadata(show.get("model_info") or {}), cls.of_text(str(show.get("license") or ""))
        if said.name in ("", OTHER) and not said.title:
            return text if text.name else said
        return cls(said.name, said.title, said.link, text.text)

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """From the front matter of a model card (README.md) and a LICENSE beside the weights."""
        text = _read(folder / "LICENSE") or _read(folder / "LICENSE.txt")
        card = _front_matter(folder / "README.md")
        name, title, link = (str(card.get(key) or "") for key in ("license", "license_name", "license_link"))
        found = cls.of_text(text)
        return cls(name.lower(), title, link, found.text) if name else found

    @classmethod
    def of_weights(cls, path: Path) -> Self:
        """Of a GGUF or a folder of safetensors. Raises as `read_metadata` does."""
        from distill.teacher.gguf_file import read_metadata

        return cls.of_folder(path) if path.is_dir() else cls.of_metadata(read_metadata(path))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _front_matter(path: Path) -> dict[str, Any]:
    """The YAML between two lines of --- at the beginning of a file; {} where there is none that can be read."""
    import yaml

    found = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", _read(path), re.DOTALL)
    if not found:
        return {}
    try:
        value = yaml.safe_load(found[1])
    except yaml.YAMLError:  # a card that can't be read says nothing
        return {}
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}
