"""`ImageTokenReasoningLLM`: the older model's interface, a thin face of runs, bundles and `DreamingReasoningLLM`."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bundle.export import Origin, describe_run, write_bundle
from bundle.load import Student, load_dreaming
from distill.config import Settings
from distill.dream.model import DreamingReasoningLLM
from distill.dream.pretrained import CODEBOOK
from distill.errors import BadInput
from distill.events import Listener, silent
from distill.run import Run, write_atomic
from distill.vision import SEEING


class ImageTokenReasoningLLM:
    """A student that is asked, distilled, exported and loaded in one place. A new one is untrained, and says so.

    device, enable_rl: as of `DreamingReasoningLLM`, which `model` is.
    """

    def __init__(
        self, device: str = "auto", enable_rl: bool = False, model: DreamingReasoningLLM | None = None
    ) -> None:
        self.device = device
        self.model = model or DreamingReasoningLLM(device=device, enable_rl=enable_rl)
        self._origin = Origin("student")

    @classmethod
    def load_from_bundle(cls, bundle_dir: str | Path, device: str = "auto") -> "ImageTokenReasoningLLM":
        """From a bundle's folder, or a run's. Raises as `load_dreaming` does."""
        found, folder = cls(device, model=load_dreaming(bundle_dir, device)), Path(bundle_dir)
        kept = {name: folder / name for name in (*CODEBOOK, *SEEING) if (folder / name).is_file()}
        found._origin = replace(found._origin, extras=kept)
        return found

    def generate(
        self,
        prompt: str,
        image_triplets: Any = None,
        max_new_tokens: int = 256,
        temperature: float = 0.7,
        stream: bool = False,
        **how: Any,
    ) -> str | Iterator[str]:
        """The answer, or with `stream` its pieces as they come. image_triplets: [(what, action, result)] in pictures.
        how: more of what `DreamingReasoningLLM.generate` takes."""
        asked = {"image_triplets": image_triplets, "max_length": max_new_tokens, "temperature": temperature}
        return self.model.generate(prompt, stream=stream, **asked, **how)

    def distill_from_ollama(
        self,
        prompts: Sequence[str],
        teacher_model: str,
        folder: str | Path = "",
        settings: Settings | None = None,
        listen: Listener = silent,
    ) -> dict[str, Any]:
        """Ask the teacher, mine its answers, train a student of them, and be it from now on. Returns what training says
        of it: steps, tokens, validation_loss and so on.

        folder: of the run, which goes on where it was stopped; "": a new one in the system's folder for such.
        settings: other than the defaults. Raises what the stages raise.
        """
        from distill.corpus.capture import capture
        from distill.knowledge.mine import mine
        from distill.training.checkpoint import best
        from distill.training.loop import train
        from distill.vision.tokenize import tokenize

        if not prompts:
            raise BadInput("prompts: none are given; the teacher is asked one at least")
        path = Path(folder or tempfile.mkdtemp(prefix="dream-"))
        asked = path / "prompts.jsonl"
        settings = settings or Settings()
        known = teacher_model.startswith(("ollama:", "embedded:", "openai:"))
        teacher = replace(settings.teacher, model=teacher_model if known else f"ollama:{teacher_model}")
        capturing = replace(settings.capture, prompts=[str(asked)])
        run = Run.create(path, replace(settings, teacher=teacher, capture=capturing))
        write_atomic(asked, "".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
        with run.working():
            for stage in (capture, mine, tokenize):
                stage(run, listen)
            metrics = train(run, listen)
        self.model = load_dreaming(run.path, self.device)
        self._origin = describe_run(run, best(run))
        return metrics

    def export_ollama_bundle(self, output_dir: str | Path, bundle_name: str, listen: Listener = silent) -> Path:
        """Write a bundle for `ollama create`, verified; its folder is output_dir/bundle_name. Raises as `export`."""
        parts, folder = self.model.parts, Path(output_dir) / bundle_name
        folder.parent.mkdir(parents=True, exist_ok=True)
        student = Student(bundle_name, parts.model, parts.tokenizer, parts.system, parts.config.dream_length)
        settings = replace(Settings().export, system=parts.system)
        write_bundle(folder, student, settings, replace(self._origin, name=bundle_name), listen)
        return folder
