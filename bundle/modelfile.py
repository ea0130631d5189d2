"""The Modelfile, and the same settings for Ollama's API."""

from string import Template
from typing import Any

from distill.errors import BadInput
from distill.teacher.licenses import License
from distill.teacher.names import fitting_name
from distill.tokens.chat import STOP, go_template, modelfiles


def ollama_settings(system: str, temperature: float, context: int) -> dict[str, Any]:
    """What /api/create is told besides the files."""
    parameters = {"stop": list(STOP), "temperature": temperature, "num_ctx": context}
    return {"template": go_template(), "system": system, "parameters": parameters}


def license_text(license: License, sees: str = "") -> str:
    """What Ollama is told of a licence: its text, or its name and where it is found; "" where neither is known. sees:
    whose the encoder in its mmproj.gguf is, which has terms of its own."""
    text = license.text if '"""' not in license.text else ""  # which a Modelfile can't quote
    text = text or (f"{license} {license.link}".rstrip() if license.name else "")
    return "\n\n".join(filter(None, [text, seeing(sees)]))


def seeing(sees: str) -> str:
    return f"mmproj.gguf, which it sees pictures with: {sees}" if sees else ""


def render_modelfile(name: str, model: str, settings: dict[str, Any], license: str = "") -> str:
    """A Modelfile for `ollama create NAME -f Modelfile`. `model` is resolved relative to the Modelfile."""
    if '"""' in settings["system"]:
        raise BadInput('export.system: holds """, which a Modelfile can\'t quote; use other quotation marks')
    parameters = settings["parameters"]
    text = Template((modelfiles() / "student.modelfile").read_text(encoding="utf-8")).substitute(
        name=fitting_name(name),
        model=model,
        template=settings["template"],
        system=f'SYSTEM """{settings["system"]}"""\n' if settings["system"] else "",
        stop="\nPARAMETER stop ".join(parameters["stop"]),
        temperature=parameters["temperature"],
        context=parameters["num_ctx"],
    )
    terms = f'\nLICENSE """{license}"""\n' if license else ""
    return text.rstrip("\n") + "\n" + terms
