"""The whole dreaming model: a prompt becomes a dream, the dream an answer.

Shape legend: B prompts, N images, 3 roles (what, action, result), D = 512.
"""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.backbone.device import pick_device
from distill.backbone.model import Backbone
from distill.config import DreamingConfig
from distill.dream.dreamers import Dreamt, graph_data
from distill.dream.dreaming import Dreaming, dream
from distill.dream.engine import DreamEngine
from distill.dream.feedback import Replies
from distill.dream.graph_reasoner import chains_of
from distill.dream.memory import Memory
from distill.dream.output_decoder import OutputDecoder, Sampling, image_labels
from distill.dream.policy import PolicyNetwork
from distill.dream.pretrained import KNOWLEDGE, SHAPES, Parts, load_parts, save_parts
from distill.dream.prompting import (
    OUTPUT_MODES,
    Asked,
    OutputMode,
    check,
    choice,
    images_of,
    pictures_of,
    prompts_of,
    triplets_of,
)
from distill.dream.reading import read_words
from distill.dream.record import DreamRecord
from distill.dream.view.viewer import DreamViewer, Format
from distill.errors import BadInput
from distill.knowledge.growing_graph import KnowledgeGraph
from distill.knowledge.retrieval import Attention
from distill.tokens.bpe import StudentTokenizer
from distill.tokens.image_tokens import Codebook
from distill.vision.album import Album, canvas, draw
from distill.vision.codebook import PictureCodebook
from distill.vision.pictures import thumbnail
from distill.vision.seeing import with_images

Image = tuple[Tensor, Tensor, Tensor]
"""(what, action, result), (B, 512) each, of length 1."""


class DreamingReasoningLLM:
    """Dreams in image tokens before it answers.

    Without parts it is an untrained nano student: all works, and nothing that it says means anything. A trained one
    comes from `load_pretrained`, or from `bundle.load.load_dreaming` for a run.

    device: "auto" takes the GPU where there is one; "cuda" without one falls back to the CPU with a warning.
    enable_dream_viewer: record every dream (so does the config's enable_visualization). enable_rl: it can learn
    from feedback, so it remembers what it said, and a policy draws which of its engine's paths are read. system: said
    before every prompt. knowledge: a graph that grows with every dream, as `remember` opens it. eyes: how it sees
    pictures. seed: of untrained weights.
    Raises RunMismatch for parts that don't fit each other, BadInput for a device or an output mode that there isn't.
    """

    def __init__(
        self,
        config: DreamingConfig | None = None,
        *,
        device: str = "auto",
        enable_dream_viewer: bool = False,
        enable_rl: bool = False,
        backbone: Backbone | None = None,
        tokenizer: StudentTokenizer | None = None,
        codebook: Codebook | None = None,
        engine: DreamEngine | None = None,
        knowledge: KnowledgeGraph | None = None,
        system: str = "",
        eyes: PictureCodebook | None = None,
        policy: PolicyNetwork | None = None,
        seed: int = 0,
    ) -> None:
        for name in SHAPES:
            if config is not None and getattr(config, name) < 1:
                raise BadInput(f"dreaming.{name}={getattr(config, name)}: must be at least 1")
        if config is not None and not 0 < config.sure <= 1:
            raise BadInput(f"dreaming.sure={config.sure:g}: must be above 0, and 1 at most (1: it always dreams)")
        if backbone is None and tokenizer is None:
            from distill.dream.starter import starter_parts

            warnings.warn("no student was given: this one is untrained, and what it says means nothing", stacklevel=2)
            parts = starter_parts(config or DreamingConfig(), seed)
            parts.system = system
        elif backbone is None or tokenizer is None:
            raise BadInput(
                "a student needs both its backbone and its tokenizer; give both, or none for an untrained one"
            )
        else:
            settings = config or (engine.config if engine is not None else DreamingConfig())
            parts = Parts(backbone, tokenizer, codebook, engine, settings, system, eyes)
        # An untrained backbone dreams of nothing, its engine does: with a policy over them, its paths are what is read.
        parts.policy = policy or (PolicyNetwork() if enable_rl or backbone is None else None)
        choice("dreaming.output_mode", parts.config.output_mode, OUTPUT_MODES)
        self.parts = parts.check("the student").to(pick_device(device))
        parts.model.eval()
        if parts.engine is not None:
            parts.engine.eval().laid_out()
        self.memory = Memory(knowledge)
        self.album: Album | None = None
        self._replies = Replies() if enable_rl else None
        self._viewer = DreamViewer() if enable_dream_viewer or parts.config.enable_visualization else None

    @property
    def config(self) -> DreamingConfig:
        return self.parts.config

    # Asking.

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        images: Any = None,
        output_mode: str | None = None,
        max_length: int = 256,
        temperature: float = 0.7,
        top_k: int = 40,
        top_p: float = 0.95,
        seed: int = 0,
        stream: bool = False,
        return_dreams: bool = False,
        watch_dreams: bool = False,
        dreamer: str | None = None,
        guide: str | None = None,
        dream: str | None = None,
        replace: Mapping[int, str] | None = None,
        attention: bool = False,
        retrieve: str = "",
        on_dream: Callable[[DreamRecord], None] | None = None,
        image_triplets: Any = None,
        picture: str | Path | None = None,
        painter: str = "",
    ) -> Any:
        """Dream of a prompt and answer it.

        prompt: one, or several (the i-th draws with `seed + i`, and results come as lists). images: embeddings (B, N,
        512), as tensor, array or list, of which the backbone reads the nearest image tokens, and the engine what it
        made of them; or pictures that one prompt is about: a list of paths, files' bytes or images of Pillow, or pixels
        (N, 3, H, W); image_triplets: [(what, action, result)], three pictures each. output_mode: "text" → str; "image"
        → (what, action, result), (B, 512) each, of length 1; "both" → {"text", "image"}; by default the config's.
        max_length: tokens of the answer, the dream not counted.
        temperature 0 is greedy; then top_k (0: all) and top_p. stream: an iterator over pieces of text.
        return_dreams: {"output", "labels" (of the image's three), "dreams" (a Branch a path), "graph_data",
        "record" (DreamRecord), "seconds", "dream_seconds"}. watch_dreams: draw the dream on the console while it forms.
        dreamer: "engine" drafts all paths in one pass, "backbone" decodes them token by token as in Ollama, "checked"
        dreams what "backbone" does, but the backbone checks the engine's draft in one pass and keeps what it agrees
        with; "none" answers at once; by default "checked" where there is an engine ("engine" for images, guided or
        with a policy), else "backbone", and none where it is so sure of its answer (`dreaming.sure`). guide: one to
        three image tokens, "⟨a ball⟩", that each path begins with. dream: read this one instead,
        "⟨causal⟩⟨ball⟩⟨fall⟩⟨ground⟩" or a record's `dream`; "none" is an empty one. replace: {3: "⟨water⟩"} puts image
        tokens in the place of those of the dream, own or given, with these numbers, before it is read. attention: note
        in the record's `words` what each word of the answer read, for one more forward pass. retrieve: put image tokens
        from the knowledge graph after the prompt; how they are found: "neighbourhood", "walk", "sample" or "attention",
        which is learned. on_dream: gets the dream as far as it is after each step that forms, and last the whole of it,
        before the answer begins. picture: a .png for a picture of one prompt's outcome: the nearest of the run's own,
        or what `painter`, a model of diffusers (folder or hub name), paints of its image tokens.
        Raises BadInput, one line, for whatever can't be done.
        """
        sampling = Sampling(max_length, temperature, top_k, top_p, seed)
        drawn, knows = picture is not None or bool(painter), bool(self.memory)
        asked = check(self.parts, sampling, output_mode, dreamer, guide, retrieve, knows, dream, replace, drawn)
        spares = dreamer is None and picture is None and on_dream is None and not watch_dreams
        how = {"attention": attention, "watch": watch_dreams, "on_dream": on_dream, "spares": spares}
        asked = dataclasses.replace(asked, **how, explore=self._replies is not None and temperature > 0)
        if drawn:
            if dreamer == "none":
                raise BadInput("picture: is of a dream, and dreamer='none' dreams nothing")
            asked = dataclasses.replace(asked, picture=canvas(picture, self.album, painter), painter=painter)
        pictures, triplets = pictures_of(images), triplets_of(image_triplets)
        if pictures or triplets:
            if not (prompt is None or isinstance(prompt, str)):
                raise BadInput("images: pictures go with one prompt; ask one after the other")
            if images is not None and not pictures:
                raise BadInput("images: embeddings and triplets of pictures don't go together; give either")
            asked = dataclasses.replace(asked, prompt=prompt or "")
            prompt, images = with_images(self.parts.eyes, prompt or "", pictures, triplets), None
            if return_dreams or self._viewer is not None:
                small = [thumbnail(one, 192) for one in chain(pictures, *triplets)]
                asked = dataclasses.replace(asked, pictures=small)
        seen = images_of(images)
        prompts = prompts_of(prompt, seen)
        several = not (prompt is None or isinstance(prompt, str)) or len(prompts) > 1
        if stream:
            if several or return_dreams or asked.mode != "text":
                raise BadInput("stream: gives the text of one prompt, piece by piece; leave it out for anything else")
            return self._stream(self._dream(prompts[0], seen, asked), asked)
        if several and picture is not None:
            raise BadInput("picture: is of one prompt's outcome; ask one after the other")
        found: list[dict[str, Any]] = []
        for i, one in enumerate(prompts):
            own = dataclasses.replace(asked, sampling=dataclasses.replace(sampling, seed=seed + i))
            found.append(self._answer(one, None if seen is None else seen[i : i + 1], own))
        self._save_knowledge()
        if return_dreams:
            return found if several else found[0]
        return _together([entry["output"] for entry in found], asked.mode, several)

    def _dream(self, prompt: str, images: Tensor | None, asked: Asked) -> Dreaming:
        how, seed = asked.retrieve, asked.sampling.seed
        known = self.memory.recall(self.parts, prompt, how, seed) if how else []
        return dream(self.parts, prompt, images, asked, known)

    def _stream(self, dreaming: Dreaming, asked: Asked) -> Iterator[str]:
        pieces: list[str] = []
        for piece in OutputDecoder.text(dreaming.speaker, self.parts.tokenizer, asked.sampling.max_tokens):
            pieces.append(piece)
            yield piece
        self._finish(dreaming, "".join(pieces), asked)
        self._save_knowledge()

    def _answer(self, prompt: str, images: Tensor | None, asked: Asked) -> dict[str, Any]:
        """One prompt's result, as `return_dreams` gives it."""
        dreaming = self._dream(prompt, images, asked)
        text, image, labels = "", None, None
        if asked.mode != "text":
            image = self._image(dreaming.dreamt)
            labels = image_labels(torch.stack(image, 1), self.parts.codebook) if self.parts.codebook else None
        if asked.mode != "image":
            text = "".join(OutputDecoder.text(dreaming.speaker, self.parts.tokenizer, asked.sampling.max_tokens))
        record = self._finish(dreaming, text, asked)
        both = {"text": text, "image": image}
        return {
            "output": both if asked.mode == "both" else both[asked.mode],
            "labels": labels[0] if labels else None,
            "dreams": record.branches,
            "graph_data": graph_data(record),
            "record": record,
            "seconds": time.monotonic() - dreaming.started,
            "dream_seconds": record.seconds,
        }

    def _image(self, dreamt: Dreamt) -> Image:
        if dreamt.image is None:
            better = (
                "train an engine (`dream train --phase all`)" if self.parts.engine is None else "use dreamer='engine'"
            )
            raise BadInput(f"output_mode: the student dreamed nothing that could be shown; give a guide, or {better}")
        with torch.inference_mode():
            what, action, result = dreamt.image().unbind(1)
        return what, action, result

    def _finish(self, dreaming: Dreaming, answer: str, asked: Asked) -> DreamRecord:
        """The whole record, given to those who collect dreams."""
        cut = asked.mode != "image" and dreaming.speaker.peek() != self.parts.tokenizer.eos_id
        record = dataclasses.replace(dreaming.record, answer=answer, cut=cut)
        if self._replies is not None and asked.mode != "image":
            self._replies.note(dreaming, dreaming.record.prompt if asked.prompt is None else asked.prompt)
        if asked.attention and answer and record.read:
            words = read_words(self.parts, dreaming.speaker, dreaming.question, dreaming.read)
            record = dataclasses.replace(record, words=words)
        if self._viewer is not None and record.dreamer != "none":
            self._viewer.record(record, dreaming.dreamt.vectors)
        if self.knowledge is not None:
            self.knowledge.add(chains_of(record))
        if asked.picture is not None:
            self._save_knowledge()  # whatever comes of the picture
            outcome = torch.stack(self._image(dreaming.dreamt), 1)
            draw(asked.picture, outcome, self.parts.codebook, self.album, asked.painter, asked.sampling.seed)
        return record

    def _save_knowledge(self) -> None:
        if self.knowledge is not None:
            self.knowledge.save()

    def learn_from_feedback(
        self, examples: Sequence[Mapping[str, Any]], num_epochs: int = 10, lr: float = 1e-5, beta: float = 0.04
    ) -> dict[str, float]:
        """Learn from what replies were worth: [{"prompt": …, "reward": …}], the reward of what was said last to that
        prompt; what was never asked is asked now (64 tokens). The more reward above the mean, the likelier it becomes.

        beta: how short its leash is. Returns avg_reward, avg_policy_loss, avg_value_loss and avg_kl, means over the
        epochs. Raises BadInput without enable_rl, and for examples that are none, or all worth the same.
        """
        if self._replies is None:
            raise BadInput("learn_from_feedback: make the model with enable_rl=True")
        ask = partial(self.generate, output_mode="text", max_length=64)
        return self._replies.learn(self.parts, examples, ask, num_epochs, lr, beta)

    # What was dreamed.

    def visualize_thinking(self, prompt: str, save_path: str | Path | None = None, **how: Any) -> dict[str, Any]:
        """One dreaming as plain data (DreamRecord.to_json, and graph_data); into a file by its suffix, if one is named.

        how: as for `generate`. Raises BadInput as it does, and for a suffix other than .json, .html and .png.
        """
        found = self.generate(prompt, return_dreams=True, **how)
        record: DreamRecord = found["record"]
        if save_path is not None:
            viewer = DreamViewer()
            viewer.record(record)
            viewer.export(Path(save_path))
        return {**record.to_json(), "graph_data": found["graph_data"]}

    def get_dream_viewer(self) -> DreamViewer:
        """All dreams recorded so far. Raises BadInput where none are recorded."""
        if self._viewer is None:
            raise BadInput("no dreams are recorded; make the model with enable_dream_viewer=True")
        return self._viewer

    def export_recorded_dreams(self, path: str | Path, format: Format = "json") -> Path:
        """Write the recorded dreams as json, html or png. Raises BadInput."""
        return self.get_dream_viewer().export(path, format)

    def visualize_dream_evolution(self, save_path: str | Path) -> Path:
        """A heatmap (PNG) of the recorded dreams. Raises BadInput."""
        return self.get_dream_viewer().export(save_path, "png")

    def remember(self, path: str | Path, max_nodes: int = 1000) -> "DreamingReasoningLLM":
        """Keep what is dreamed from now on in a knowledge graph of at most `max_nodes`, in the GraphML file `path`.

        It goes on from the file where there is one, and is saved after each call of `generate`.
        Warns where what is retrieved came from another. Raises BadInput, CorruptFile.
        """
        self.memory.grow(KnowledgeGraph(Path(path), max_nodes))
        return self

    def know(self, path: str | Path, learn: Callable[[], Attention] | None = None) -> "DreamingReasoningLLM":
        """Retrieve from the knowledge graph in a GraphML file, which stays as it is; it is read when first needed.

        learn: gives what retrieves by attention; by default retrieval.safetensors beside the graph is read.
        """
        self.memory = Memory(self.knowledge, Path(path), learn)
        return self

    @property
    def knowledge(self) -> KnowledgeGraph | None:
        """The graph that grows with every dream, where `remember` opened one."""
        return self.memory.grown

    # Folders.

    def save_pretrained(self, folder: str | Path) -> Path:
        """Publish a folder that `load_pretrained` reads, whole or not at all, with the graph of `know`, else that of
        `remember`. Raises BadInput, DistillError."""
        save_parts(self.parts, Path(folder), self.memory.graph(), self.memory.file)
        return Path(folder)

    @classmethod
    def load_pretrained(
        cls,
        folder: str | Path,
        device: str = "auto",
        *,
        engine: str | Path | None = None,
        config: DreamingConfig | None = None,
        enable_dream_viewer: bool = False,
        enable_rl: bool = False,
        system: str | None = None,
    ) -> "DreamingReasoningLLM":
        """From a folder of `save_pretrained`, a checkpoint or a bundle; its files are checked against their digests.

        engine: the folder of a dream engine that lies elsewhere. config, system: in the place of the folder's own.
        Raises BadInput, CorruptFile, RunMismatch.
        """
        folder = Path(folder)
        parts = load_parts(folder, pick_device(device), None if engine is None else Path(engine))
        model = cls(
            config or parts.config,
            device=str(parts.device),
            enable_dream_viewer=enable_dream_viewer,
            enable_rl=enable_rl,
            backbone=parts.model,
            tokenizer=parts.tokenizer,
            codebook=parts.codebook,
            engine=parts.engine,
            system=parts.system if system is None else system,
            eyes=parts.eyes,
            policy=parts.policy,
        )
        model.parts.steps, model.parts.facts = parts.steps, parts.facts
        if (folder / KNOWLEDGE).is_file():
            model.know(folder / KNOWLEDGE)
        return model


def _together(outputs: list[Any], mode: OutputMode, several: bool) -> Any:
    """Outputs of the prompts as `generate` returns them; images of several prompts become one batch."""
    if not several:
        return outputs[0]
    if mode == "text":
        return outputs
    images = [output["image"] if mode == "both" else output for output in outputs]
    batch = tuple(torch.cat(role) for role in zip(*images, strict=True))
    return {"text": [output["text"] for output in outputs], "image": batch} if mode == "both" else batch
