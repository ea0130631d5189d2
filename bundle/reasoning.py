"""`ImageTokenReasoningLLM`: the older model's interface, a thin face of runs, bundles and `DreamingReasoningLLM`."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bundle.export import Origin, describe_run, origin_of, write_bundle
from bundle.load import Student, load_dreaming
from bundle.manifest import NAME
from distill.config import Settings
from distill.dream.engine import ABOUT, WEIGHTS
from distill.dream.model import DreamingReasoningLLM
from distill.errors import BadInput
from distill.events import Listener, silent
from distill.run import Run, write_atomic


class ImageTokenReasoningLLM:
    """A student that is asked, distilled, exported and loaded in one place. A new one is untrained, and says so.

    device, enable_rl: as of `DreamingReasoningLLM`, which `model` is.
    """

    def __init__(
        self, device: str = "auto", enable_rl: bool = False, model: DreamingReasoningLLM | None = None
    ) -> None:
        self.device = device
        self.model = model or DreamingReasoningLLM(device=device, enable_rl=enable_rl)
        self._is(Origin("student"))

    def _is(self, origin: Origin) -> None:
        self._origin, self._known = origin, self._changes()

    def _changes(self) -> int:
        """How often its weights were written to."""
        return sum(weight._version for weight in self.model.parts.model.parameters())

    @classmethod
    def load_from_bundle(cls, bundle_dir: str | Path, device: str = "auto") -> "ImageTokenReasoningLLM":
        """From a bundle's folder, or a run's. Raises as `load_dreaming` does."""
        found = cls(device, model=load_dreaming(bundle_dir, device))
        found._is(origin_of(Path(bundle_dir)))
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
        self._is(describe_run(run, best(run)))
        return metrics

    def export_ollama_bundle(self, output_dir: str | Path, bundle_name: str, listen: Listener = silent) -> Path:
        """Write a bundle for `ollama create`, verified; its folder is output_dir/bundle_name, where nothing or another
        bundle may be. Raises as `export`."""
        if Path(bundle_name).name != bundle_name or not bundle_name:
            raise BadInput(f"bundle_name={bundle_name!r}: give a name, and the folder that it goes into as output_dir")
        parts, folder = self.model.parts, Path(output_dir) / bundle_name
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not (folder / NAME).is_file():
            raise BadInput(f"{folder}: holds something else than a bundle; give another name")
        origin = replace(self._origin, name=bundle_name)
        if self._changes() != self._known:  # of other weights than these
            extras = {name: path for name, path in origin.extras.items() if name not in (WEIGHTS, ABOUT)}
            origin = replace(origin, evaluation=None, extras=extras)
        folder.parent.mkdir(parents=True, exist_ok=True)
        student = Student(bundle_name, parts.model, parts.tokenizer, parts.system, parts.longest)
        settings = replace(Settings().export, system=parts.system)
        write_bundle(folder, student, settings, origin, listen)
        return folder
