"""Every setting, its default and its meaning, in one tree. Nothing else in the project holds a default."""

from dataclasses import dataclass, field
from pathlib import Path

from distill.address import Address


@dataclass
class TeacherSettings:
    """Who is asked."""

    model: str = "embedded:smollm2"
    """`ollama:NAME`, `openai:NAME`, `embedded:smollm2` or `embedded:/path/model.gguf`."""
    weights: str = ""
    """The teacher's own GGUF or folder of safetensors; empty: the embedded one's, or the file that Ollama names."""
    hosts: list[Address] = field(default_factory=list[Address])
    """Servers that share the work; empty: $OLLAMA_HOST, $OPENAI_BASE_URL or the default. Passwords aren't kept."""
    timeout: float = 300.0
    """Seconds that one request may take, queueing included."""
    context: int = 0
    """Tokens of a prompt and its answer (num_ctx), never cut; 0: Ollama's choice, embedded enough for the longest."""
    retries: int = 5
    """Times that a request is sent again after a fault of the server or the network."""
    in_flight: int = 0
    """Requests kept in flight per host; 0: found out while capturing."""
    threads: int = 0
    """CPU threads of the embedded engine; 0: as many as there are cores that nothing else keeps busy."""
    engine: str = "auto"
    """What runs the embedded teacher: `torch` (many prompts at once), `llama.cpp`, or `auto`: a short trial decides."""
    think: str = "auto"
    """Whether it thinks first: `true`, `false`, `auto` (where it can, but for a run begun without), `low` to `high`."""
    thinking_tokens: int = 1024
    """Tokens that it may think at most, besides `capture.max_tokens`."""


@dataclass
class RuntimeSettings:
    """Where the work is done, and who answers for a preview model: `--teacher openai:` and its name."""

    cluster: str = ""
    """Machines that ask, mine and train cells: `local`, `auto`, HOST:PORT or ray://HOST:PORT (docs/cluster.md)."""
    enable_gpt51_codex_preview: bool = True
    """Whether it is asked first; false: the fallback answers everything."""
    preview_model: str = "gpt-5.1-codex"
    fallback_model: str = "gpt-5.1"
    """Answers where the preview is off, refuses or has no room."""


@dataclass
class CaptureSettings:
    """What it is asked, and how it samples."""

    prompts: list[str] = field(default_factory=lambda: ["everyday"])
    """Prompt files, folders of rows, `hf:USER/NAME`, or names of the sets that ship with us."""
    answers: str = "teacher"
    """Whose are learned: `teacher`, or `given`: those beside the prompts, as hard labels; nobody is asked."""
    turns: str = "last"
    """Which questions of a conversation are asked, after the turns before them: the `last`, or `all`."""
    limit: int = 0
    """Prompts taken at most, spread evenly over the set; 0: all."""
    samples: int = 1
    """Answers to each prompt, each with a seed of its own: only a dream can tell which of them comes."""
    held_out: float = 0.1
    """Share of prompts, by hash of the prompt, that is never trained on."""
    max_tokens: int = 96
    """Of an answer, its end included; what is longer is cut there."""
    temperature: float = 0.7
    """At which the teacher answers, with the two below."""
    top_k: int = 40
    top_p: float = 0.95
    top_logprobs: int = 20
    """Likeliest tokens kept at each position; Ollama gives at most 20."""
    system: str = ""
    """System message for the teacher; the student is trained with it too."""
    gathered: bool = False
    """Ask nothing: what `dream gather` keeps of others' questions is what was captured."""
    minutes: float = 0.0
    """Stop asking after so many minutes and go on with what is there; 0: no limit."""
    dataset: str = ""
    """`causal-world`, `hearsay-world`, `conceptnet`; pictured `emoji-scenes`, `coco`, `visual-genome`: no teacher."""
    dataset_files: str = ""
    """A folder or file that a dataset is made of; empty: emoji are fetched."""
    dataset_size: int = 24000
    """Training questions of a dataset, at most."""


@dataclass
class MineSettings:
    """How triplets are found."""

    miner: str = "syntax"
    """`syntax` (dependency parse) or `teacher` (the teacher itself, with a JSON schema)."""
    choose: str = "rarity"
    """What the syntax miner keeps: `rarity` (what tells most), `likelihood` (by the teacher; seconds each) or `all`."""
    minutes: float = 10.0
    """What choosing by likelihood may take; what is left then is chosen by rarity. 0: no limit."""
    steps: int = 5
    """Triplets a lens at most, of those chosen."""
    details: bool = False
    """Read what is no event, too: what things are like, what they have, what can't be pictured. Dreams tell more."""
    processes: int = 0
    """That read answers at once, mining, tokenizing and packing, about 150 MB each; 0: as many as cores. They find the
    same."""
    graph_nodes: int = 10000
    """Nodes kept in knowledge.graphml, the most important first."""


@dataclass
class TokenizeSettings:
    """How text and dreams become ids."""

    kind: str = "auto"
    """`aligned` (the teacher's BPE, cut down), `sentencepiece`, or `auto`: aligned where it can be."""
    vocab_size: int = 8192
    """Tokens in all at most, image tokens included; aligned keeps what the corpus needs even past it."""
    vocab_most: int = 32768
    """Tokens in all, whatever the corpus needs: its rarest are left out then, and spelled in smaller ones."""
    image_tokens: int = 1024
    """Codebook size at most; 4,096 is the bound. More tell more of an answer, and need more answers to be learned."""
    lenses: list[str] = field(default_factory=lambda: ["spatial", "temporal", "causal", "abstract"])
    """The paths of a dream in the order in which it has them: a later one can build on what is dreamed before it."""
    encoder: str = "local"
    """`local` (needs no download), `ollama:MODEL` (its /api/embed) or `clip:FOLDER` (pictures share its space)."""


@dataclass
class ImageTokenizerConfig:
    """How pictures are seen."""

    backbone: str = "clip"
    """`clip`, `dinov2` (fetched without a hub), `resnet`, `lite` (needs no weights) or `patch` (deprecated)."""
    weights: str = ""
    """A folder of transformers' (config.json, model.safetensors), or a name on the hub; empty: the backbone's usual."""
    embedding_dim: int = 512
    """Numbers in a picture's embedding; 0: as many as the backbone has."""
    patch_size: int = 16
    """Pixels of a patch's side, of `patch` alone; other backbones have their own."""
    image_size: int = 0
    """Pixels of a picture's side as it is seen; 0: the backbone's own. Smaller is quicker."""


@dataclass
class StudentSettings:
    """Who learns."""

    init: str = "teacher"
    """`teacher` (its weights where they can be read, else chance), `chance`, or a model's folder or GGUF."""
    layers: int = 0
    """Layers; 0: all of the teacher's, or the preset's. `dream sizes` shows what each number costs."""
    ffn: int = 0
    """Neurons of each feed-forward; 0: a third of the teacher's, or the preset's."""
    heads: int = 0
    """Heads of each attention; 0: all of the teacher's, or the preset's."""
    measure_seconds: float = 60.0
    """What choosing the teacher's layers, and their heads and neurons, may take each, about."""
    image_rows: str = "apart"
    """How image tokens begin: `apart` (as their labels, moved away from words), `label` (near them), or `untied`."""
    preset: str = ""
    """Sizes from chance: `nano` (its default), `micro`, `small`, `large`. It or one of the next two means chance."""
    hidden: int = 0
    """Size of its states; 0, here and below: the preset's."""
    kv_heads: int = 0
    context: int = 512
    """Positions of a packed row, and the most that a student reads at once."""

    @property
    def model(self) -> Path | None:
        """The folder or file of another model that it begins as; None: as its teacher, or from chance."""
        return None if self.init in ("", "chance", "teacher") else Path(self.init)


@dataclass
class TrainSettings:
    """How it learns."""

    steps: int = 1000
    """Optimizer steps; `minutes` stands in their place where it isn't 0."""
    minutes: float = 0.0
    """Train so long instead of for `steps`; 0: by steps."""
    batch_rows: int = 8
    """Packed rows of `student.context` tokens in one optimizer step."""
    micro_rows: int = 0
    """Rows of them that are in memory at once, gradients being summed over the others; 0: all."""
    recompute: bool = False
    """Keep only what enters each layer, and compute the rest anew for the gradients: a third slower, in less memory."""
    lr: float = 0.0
    """Peak of the learning rate; 0: 0.002 from chance, 0.0003 for an inherited student."""
    min_lr: float = 0.0
    """Learning rate at the end."""
    warmup: float = 0.05
    """First share of the training, of its steps or its minutes, over which the learning rate rises."""
    schedule: str = "wsd"
    """`wsd` (constant, then linear decay over the last fifth) or `cosine`."""
    optimizer: str = "auto"
    """`adamw`, `muon` (orthogonalized momentum, for matrices), or `auto`: muon from chance, adamw where inherited."""
    weight_decay: float = 0.05
    average: float = 0.0
    """Ship a mean of the weights along the training: their mean age, as a share of the training so far; 0: the last."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    clip: float = 1.0
    """Length that gradients are cut to."""
    soft_weight: float = 0.8
    """`a` in a·KL + (1 − a)·cross-entropy; 0: hard labels only."""
    told: bool = False
    """Soft targets after a mined dream find its words likelier: the teacher, which read none, didn't."""
    dream_weight: float = 1.0
    """What a token of a mined dream weighs in the loss, where one of its answer weighs 1."""
    strict: float = 4.0
    """What probability of tokens that a reply's grammar forbids costs besides, in nats: no mask runs in Ollama."""
    noise: float = 0.03
    """Share of the answers' tokens that are read as others, so that words follow a slip of the student's own, too."""
    match: float = 0.0
    """Weight of the distance between an inherited student's hidden states and its teacher's; 0: not computed."""
    dreams: bool = True
    """False: the same student, without any dream."""
    pause: bool = False
    """A control: as many pause tokens, which say nothing, in the place of each dream (arXiv:2310.02226)."""
    empty_dreams: float = 0.25
    """Share of examples whose dream is empty, so that `think: false` works."""
    drafts_from: float = 0.7
    """Share of training after which some dreams are the student's own; 1: never."""
    drafts_share: float = 0.3
    """Share of dreams, from then on, that are the student's own."""
    bottleneck: float = 0.0
    """Share of mined dreams whose answers read the dream and not the question, at the beginning of the training."""
    prompt_dropout: float = 0.0
    """Share of a question's tokens that are blank before a mined dream, at the beginning of the training."""
    unread_until: float = 0.5
    """Share of training after which no question is hidden: both have fallen to 0 by then, linearly."""
    gaps: float = 0.0
    """Share of documents whose positions have gaps of random sizes: order is learned, and no distance or count."""
    stutter: float = 0.0
    """Share of mined dreams in which some steps are said twice: when to end is learned, and not by counting steps."""
    retrieve: str = ""
    """Put what others say of a prompt after it, as image tokens: `neighbourhood`, `walk`, `sample`, `attention`."""
    retrieve_limit: int = 4
    """Triplets put after a prompt at most."""
    precision: str = "auto"
    """`auto` (a short trial decides), `float32` or `bfloat16`."""
    compile: str = "auto"
    """`auto` (the trial decides), `always` or `never`."""
    device: str = "auto"
    """`auto`, `cpu` or `cuda`."""
    checkpoint_every: int = 200
    """Steps between checkpoints, of which the best on validation answers is shipped."""
    keep_last: int = 2
    """Newest checkpoints that stay, beside the best and the first."""
    validate_every: int = 100
    """Steps between measurements on validation answers, beside those of checkpoints."""
    log_every: int = 10
    processes: int = 1
    """Processes that train together (torch.distributed): each reads its share of a batch's rows."""
    shard: str = "auto"
    """Whether each of them holds a part of the student (FSDP2): `always`, `never`, or `auto` (large ones, on GPUs)."""


@dataclass
class RedreamSettings:
    """How a trained student's own dreams take the place of mined ones (`dream redream`)."""

    samples: int = 8
    """Dreams sampled for each training answer, beside the one that it has."""
    prior: float = 1.0
    """What a dream's own likelihood counts beside its answer's; 1: the likeliest dream, given the answer, is chosen."""
    minutes: float = 0.0
    """Stop after so many minutes: answers that weren't come to keep their dreams; 0: no limit."""


@dataclass
class SeeSettings:
    """How a trained student learns to read pictures themselves, as Ollama shows them (`dream see`)."""

    steps: int = 0
    """Optimizer steps; 0: it reads image tokens in their place, natively."""
    image_size: int = 112
    """Pixels of a side to which pictures are brought; each 14 × 14 of them take a token of the context."""


@dataclass
class PolishSettings:
    """How a trained student learns from what its teacher would have said after its own words (`dream polish`)."""

    rounds: int = 0
    """Of answering and learning; 0: as many as `minutes` allow."""
    minutes: float = 10.0
    answers: int = 64
    """The student's own, in each round, sampled at `temperature`."""
    temperature: float = 0.5
    teachers_share: float = 0.5
    """Share of the steps that learn from the teacher's own answers, as training did; 1: no own ones, to compare."""
    beta: float = 0.5
    """Of the divergence to its teacher: 0 is forward KL, 0.5 Jensen-Shannon's, 1 reverse KL."""
    lr: float = 1e-4
    prompts: list[str] = field(default_factory=list[str])
    """Sets and files whose prompts it answers beside those of training: nobody has to have answered them."""
    through: str = "auto"
    """The teacher's `weights`, its `server` (any teacher that can be asked), or `auto`: its weights where they are."""


@dataclass
class DreamingConfig:
    """The dream engine: drafts the whole dream in one pass, beside the backbone that could decode it."""

    num_dream_sequences: int = 4
    """Paths dreamed at once; path k is of lens k mod 4."""
    dream_length: int = 5
    """Steps of a path at most."""
    graph_reasoning_hops: int = 3
    """Rounds of attention over the graph of all steps."""
    output_mode: str = "text"
    """`text`, `image` (the outcome's what, action and result) or `both`."""
    enable_visualization: bool = False
    """Record every dream, for the viewer."""
    input_steps: int = 200
    """Optimizer steps of the first phase: prompts to (what, action, result)."""
    dream_steps: int = 1500
    """Of the second phase: all steps of all paths; 0: no engine is trained."""
    end_steps: int = 300
    """Of the last phase: engine, graph and output together, through the frozen backbone."""
    epochs: int = 12
    """Passes over the prompts that a phase makes at most (the last a third of it); 0: all steps."""
    batch: int = 32
    """Prompts in one optimizer step."""
    lr: float = 2e-3
    keep_above: float = 0.5
    """Least score, 0 to 1, of a path that the backbone is given to read."""
    sure: float = 1.0
    """An answer of which it is so sure without a dream stands, and nothing is dreamed; 1: it always dreams."""
    checkpoint_every: int = 200


@dataclass
class EvaluateSettings:
    """How well it learned."""

    prompts: int = 64
    """Held-out prompts used at most; 0: all."""
    dreams: int = 4
    """K: dreams sampled per prompt for the marginal likelihood of an answer; 0: not measured."""
    temperature: float = 0.7
    """At which a target's own answers are sampled."""
    max_tokens: int = 96
    baselines: list[str] = field(default_factory=list[str])
    """Any of `hard` (hard labels only) and `nodream` (no dreams), trained at equal tokens."""
    bootstrap: int = 2000
    """Resamples of the prompts behind each interval."""


@dataclass
class ExportSettings:
    """What is shipped."""

    dtype: str = "f16"
    """Of model.gguf: `f32`, `f16`, `bf16`, `q8_0`, `q5_1`, `q5_0`, `q4_1` or `q4_0`."""
    system: str = ""
    """System message in the Modelfile; empty: `capture.system`, which the student was trained with."""
    temperature: float = 0.7
    """That the Modelfile names."""
    context: int = 0
    """Context window told to Ollama; 0: the one trained with."""


@dataclass
class Settings:
    """All of them. `seed` reaches every stage that draws."""

    seed: int = 0
    """Of all that is drawn."""
    teacher: TeacherSettings = field(default_factory=TeacherSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    capture: CaptureSettings = field(default_factory=CaptureSettings)
    mine: MineSettings = field(default_factory=MineSettings)
    tokenize: TokenizeSettings = field(default_factory=TokenizeSettings)
    vision: ImageTokenizerConfig = field(default_factory=ImageTokenizerConfig)
    student: StudentSettings = field(default_factory=StudentSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    redream: RedreamSettings = field(default_factory=RedreamSettings)
    see: SeeSettings = field(default_factory=SeeSettings)
    polish: PolishSettings = field(default_factory=PolishSettings)
    dreaming: DreamingConfig = field(default_factory=DreamingConfig)
    evaluate: EvaluateSettings = field(default_factory=EvaluateSettings)
    export: ExportSettings = field(default_factory=ExportSettings)

    @property
    def source(self) -> str:
        """Who answered: the teacher's name, or the dataset's; `given` where answers stood beside the prompts."""
        given = "given" if self.capture.answers == "given" else self.teacher.model
        return f"dataset:{self.capture.dataset}" if self.capture.dataset else given
