"""The model card: README.md of a bundle, a pure function of what is known about it."""

import json
import re
from collections.abc import Mapping

from bundle.manifest import Manifest
from bundle.modelfile import seeing
from distill.backbone.model import BackboneConfig
from distill.report.tables import markdown_table
from distill.teacher.licenses import OTHER, License
from distill.teacher.names import fitting_name
from distill.turns import opening

CARD = """\
{front}# {title}

A small student that dreams before it answers. Its dream is a row of image tokens such as `⟨a ball⟩⟨release⟩⟨falls⟩`,
(what, action, result) triplets along four lenses; then it answers. Distilled from {teacher}.

## Run it
Ollama shows the dream as thinking; `--think=false` turns it off.

    ollama create {name} -f Modelfile
    ollama run {name}
{folder}
transformers:

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(".")
    model = AutoModelForCausalLM.from_pretrained(".")
    chat = [{{"role": "user", "content": {question}}}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    print(tokenizer.decode(model.generate(**inputs, max_new_tokens=128)[0]))

The toolchain that made it, in this folder: `dream chat .`, `dream install .`, `dream verify .`

## What it is
{facts}

## How well it does
{evaluation}

## Limits
- It is as small as it looks: it knows what its teacher said about its prompts, and makes up the rest.
- It inherits its teacher's mistakes and biases.
- A dream tells what the student associates; it is no explanation of how it came to its answer.
- Prompt and answer together fit {context} tokens.

## Licence
{licence}

## Files
{files}
"""

FOLDER = """
Use `model.gguf`, as the Modelfile does. Of the safetensors in this folder (`FROM .`) Ollama doesn't know how this
tokenizer splits words: it would read other tokens than the student was trained with, without a word.
"""

HUGGING_FACE = re.compile(
    r"apache-2\.0|mit|unknown|gemma|llama[234]|llama3\.[123]|cc-by(-nc)?(-sa|-nd)?-4\.0|cc0-1\.0|openrail|[al]?gpl-3\.0|"
    r"gpl-2\.0|bsd-[23]-clause|bigscience-openrail-m|bigcode-openrail-m"
)
"""Licences that Hugging Face knows by name; to it others are `other`, and are named beside that."""

ABOUT = {
    "LICENSE": "the terms of the weights",
    "model.gguf": "the student for Ollama and llama.cpp",
    "mmproj.gguf": "what it sees pictures with, beside model.gguf",
    "Modelfile": "for `ollama create`",
    "model.safetensors": "the weights in float32",
    "config.json": "the architecture, for transformers",
    "generation_config.json": "how transformers samples",
    "tokenizer.json": "the vocabulary",
    "tokenizer_config.json": "special tokens and the chat template",
    "dream_tokenizer.json": "where the vocabulary comes from",
    "codebook.safetensors": "the image tokens' places in concept space",
    "codebook.json": "the image tokens' labels",
    "engine.safetensors": "the dream engine, which drafts a whole dream in one pass (read by the toolchain)",
    "engine.json": "the dream engine's sizes, and the codebook that it belongs to",
    "knowledge.graphml": "the graph of all triplets that were mined",
    "retrieval.safetensors": "what finds in that graph what an answer needs",
    "training_prompts.json": "hashes of the training prompts, to tell whether a question was among them",
}


def render_card(
    manifest: Manifest, config: BackboneConfig, parameters: int, files: Mapping[str, int], table: list[list[str]]
) -> str:
    """Markdown. files: name → bytes. table: the evaluation's rows, heading first, or []."""
    source = manifest.provenance
    teacher = source.get("teacher", {}).get("name") or "a teacher"
    facts = {
        "parameters": f"{parameters / 1e6:.1f} M",
        "layers × width": f"{config.layers} × {config.hidden} ({config.architecture.capitalize()} architecture)",
        "vocabulary": f"{config.vocab_size} tokens, of them {source.get('image_tokens', 0)} image tokens",
        "context": f"{config.context} tokens",
        "model.gguf": manifest.dtype,
        "bits per byte of held-out answers": _bits(manifest),
        "teacher": f"{teacher} {source.get('teacher', {}).get('digest', '')}".strip(),
        "prompts": ", ".join(source.get("prompts", [])) or "not recorded",
        "run, checkpoint": f"{source.get('run', '')}, {source.get('checkpoint', '')}",
    }
    license = License.from_json(source.get("license"))
    question = opening((manifest.verification_prompts or ["What happens when you drop a ball?"])[0])
    return CARD.format(
        front=front_matter(license) if source.get("began_as") else "",
        licence=_terms(manifest, license, "LICENSE" in files),
        title=manifest.name,
        name=fitting_name(manifest.name),
        teacher=teacher,
        folder="" if source.get("importable", True) else FOLDER,
        question=json.dumps(question, ensure_ascii=False),
        facts="\n".join(f"- {key}: {value}" for key, value in facts.items() if value),
        evaluation=markdown_table(table) if table else "It was not evaluated.",
        context=config.context,
        files="\n".join(
            f"- `{name}` ({megabytes(size)}){': ' + ABOUT[name] if name in ABOUT else ''}"
            for name, size in files.items()
        ),
    )


def front_matter(license: License) -> str:
    """The card's head, by which Hugging Face knows the licence of inherited weights."""
    name = license.name or "unknown"
    known = HUGGING_FACE.fullmatch(name)
    lines = {"license": name} if known else {"license": OTHER, "license_name": str(license)}
    lines |= {"license_link": license.link} if license.link else {}
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in lines.items()), "---\n\n"])


def _terms(manifest: Manifest, license: License, whole: bool) -> str:
    """Whose weights these are, and under which terms they, or the teacher, are given."""
    sees = seeing(manifest.provenance.get("sees", ""))
    return "\n\n".join(filter(None, [_own_terms(manifest, license, whole), sees]))


def _own_terms(manifest: Manifest, license: License, whole: bool) -> str:
    teacher, began = manifest.provenance.get("teacher", {}), manifest.provenance.get("began_as")
    if began is None:
        return "What its weights began as was not recorded."
    if began:
        whose = teacher.get("name") or "its teacher" if began == "teacher" else began
        where = " (whole in `LICENSE`)" if whole else f" ({license.link})" if license.link else ""
        unknown = ", which is unknown: find out its terms before you pass them on."
        terms = f": {license}{where}." if license.name else unknown
        return f"Its weights began as those of {whose}, and carry its licence{terms}"
    text = "Its weights began from chance: none of another model are in it."
    if teacher.get("is_model"):
        told = License.from_json(teacher.get("license"))
        text += f" The licence of its teacher, {teacher.get('name')}: {told}. Some licences have terms for models that "
        text += "learn from a model's answers."
    return text


def _bits(manifest: Manifest) -> str:
    """What verification measured; "" where there were no answers to measure on."""
    found = manifest.parity
    if "shipped_bits_per_byte" not in found:
        return ""
    return (
        f"{found['shipped_bits_per_byte']:.3f} by model.gguf, {found['bits_per_byte']:.3f} in float32 "
        f"({found['scored']} answers, without a dream)"
    )


def megabytes(size: int) -> str:
    """Of a file, for people."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
