"""A teacher's own weights, read for a student to begin with, or for our engine to run."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from distill.backbone.model import Backbone, BackboneConfig, assemble
from distill.backbone.weights import Stored, layer_of
from distill.errors import BadInput
from distill.teacher.memory import available_memory
from distill.teacher.protocol import TeacherTokenizer


@dataclass(frozen=True)
class Source:
    """A model that weights can be read from; nothing but its description is read yet.

    config: of the whole model, its context the one that it was trained with. license: its short name, "" where nothing
    says. stored: its tensors, by the names of `Backbone.state_dict()`; tied weights once.
    """

    path: Path
    config: BackboneConfig
    license: str
    stored: Mapping[str, Stored]
    read_tokenizer: Callable[[], TeacherTokenizer]

    @cached_property
    def tokenizer(self) -> TeacherTokenizer:
        """Its vocabulary. Raises BadInput where it is of a kind that we don't know, CorruptFile for a broken file."""
        return self.read_tokenizer()

    @property
    def parameters(self) -> int:
        """Tied weights once."""
        return sum(math.prod(tensor.shape) for tensor in self.stored.values())

    def weights(self, layers: Collection[int] | None = None) -> dict[str, Tensor]:
        """Tensors in float32, by the names of `Backbone.state_dict()`; tied weights once.

        layers: numbers of those to read (each keeps its number), beside what belongs to no layer; None: all.
        Raises BadInput where a layer isn't there or memory is too small, CorruptFile for a broken file.
        """
        if layers is not None and (strange := sorted(set(layers) - set(range(self.config.layers)))):
            raise BadInput(f"{self.path}: has layers 0 to {self.config.layers - 1}, no {strange[0]}")
        chosen = {
            name: tensor
            for name, tensor in self.stored.items()
            if layers is None or (layer := layer_of(name)) is None or layer in layers
        }
        self._check_memory(4 * sum(math.prod(tensor.shape) for tensor in chosen.values()))
        return {name: tensor.read() for name, tensor in chosen.items()}

    def _check_memory(self, needed: int) -> None:
        found = available_memory()
        if found is not None and needed > found:
            raise BadInput(
                f"{self.path}: its weights need {needed / 1e9:.1f} GB of memory, and {found / 1e9:.1f} GB are free; "
                "close other programs, keep fewer of its layers, or take a smaller teacher"
            )

    def backbone(self, context: int = 0) -> Backbone:
        """The whole model. context: places to make room for, at most those it was trained with; 0: all of them.

        Raises as `weights` does.
        """
        config = replace(self.config, context=min(context or self.config.context, self.config.context))
        return assemble(config, self.weights())
