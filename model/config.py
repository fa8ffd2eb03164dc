"""What a decoder is, read from a checkpoint's config.json. How a family reads its own fields stands in its file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from .errors import CheckpointError
from .fields import Fields
from .pooling import Pooling, PoolingMode, ScorePooling, read_pooling
from .quantization import SchemeName
from .rotary import Rope

LAST = ScorePooling()
HeadKind = Literal["lm", "score", "value", "embed"]


@dataclass(frozen=True)
class ScoreConfig:
    """A head that gives scores or values: matrices with a ReLU between each two."""

    format: str = "score"  # its name in `head_formats`
    layers: tuple[str, ...] = ("score",)  # what the checkpoint calls the matrices
    inner: tuple[int, ...] = ()  # outputs of all of them but the last
    bias: bool = False  # the checkpoint must have a bias of each; else it may
    pooling: ScorePooling = LAST
    mean: float = 0.0  # the checkpoint's own scale of its scores: (score - mean) / std. The head does not apply it
    std: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one decoder. What a family does not have keeps its default."""

    architecture: str
    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    context: int  # most tokens of one sequence
    norm_eps: float
    dtype: str  # "float32" | "bfloat16" | "float16": what the checkpoint says of itself
    labels: int  # outputs of the head that gives scores or values; 0: a language model or an embedding model
    end_ids: tuple[int, ...]  # of config.json and generation_config.json
    tied: bool  # the language model's head is the embedding
    activation: str
    gated: bool = False  # the MLP has three matrices: activation(gate) · up, then down
    pooling: Pooling | None = None  # of an embedding model
    score: ScoreConfig = ScoreConfig()  # where there are labels
    values: bool = False  # the head is read at every token: a value model
    rope: Rope | None = None
    local_rope: Rope | None = None  # Gemma 3: of the layers with a window
    windows: tuple[int | None, ...] = ()  # sliding window of each layer in tokens
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    attention_scales: tuple[float, ...] = ()  # of each layer, where it is not head_size ** -0.5
    attention_softcap: float | None = None  # see ops.paged_attention
    logit_softcap: float | None = None
    head_bias: bool = False  # of the language model's head
    fused: bool = False  # Phi-3: the checkpoint has q, k and v in one matrix, and gate and up
    embedding_size: int | None = None  # OPT: of an embedding and of what the head reads, where not hidden_size
    norm_affine: bool = True  # the norms have weights
    norm_first: bool = True  # OPT: norms stand before attention and MLP, not behind
    final_norm: bool = True
    residual_after_norm: bool = False  # BLOOM: residuals start from the normalised states
    parallel: bool = False  # attention and MLP read the same residual
    parallel_norms: int = 1  # Falcon: of a parallel layer; with 2 attention and MLP have one each
    alibi: bool = False  # Falcon: instead of rotation
    scheme: SchemeName = "none"  # in which the checkpoint has its matrices

    @property
    def kind(self) -> HeadKind:
        if self.pooling is not None:
            return "embed"
        return "value" if self.values else "score" if self.labels else "lm"

    @property
    def generates(self) -> bool:
        """Whether it has a language model's head."""
        return self.kind == "lm"

    @property
    def pools(self) -> PoolingMode | None:
        """How all rows of a text become the one that the head reads; None: it reads rows as they are."""
        if self.pooling is not None:
            return self.pooling.mode
        return "mean" if self.kind == "score" and self.score.pooling.mode == "mean" else None

    @property
    def output_size(self) -> int:
        """What the head reads of a row."""
        return self.embedding_size or self.hidden_size


def read_config(path: str | Path, *, embedding: bool = False, pooling: PoolingMode | None = None) -> ModelConfig:
    """The decoder that the checkpoint in directory `path` describes.

    It embeds if its architecture has no head, or, with `embedding`, has a language model's, which is then left out;
    `pooling` says how, instead of the checkpoint. A head that gives scores is taken for transformers' own: which one it
    is only the tensors say (`read_checkpoint`).

    Raises CheckpointError that names what is missing or, with its value, the field that is not supported.
    """
    from .compressed_tensors import read_scheme  # what reads tensors builds on this module, as do
    from .registry import read_architecture  # the families that it lists

    fields = Fields.read(checkpoint_file(Path(path), "config.json"))
    scheme = read_scheme(fields)
    fields.only("is_encoder_decoder", False)
    fields.only("add_cross_attention", False)
    fields.only("is_causal", True)
    name, entry = read_architecture(fields)
    scores, own = entry.head in ("score", "value"), name in (fields.strings("architectures") or [])
    labels = read_labels(fields) if scores and own else int(scores)  # foreign classes have one output
    config = entry.family.configure(fields, name, labels)
    config = replace(config, values=entry.head == "value", scheme=scheme)
    if entry.head == "none" or (embedding and entry.head == "lm"):
        return replace(config, pooling=read_pooling(Path(path), pooling))
    return config


def checkpoint_file(directory: Path, name: str) -> Path:
    """The path of a file that a model directory must have."""
    if not directory.exists():
        raise CheckpointError(f"{directory} does not exist: give the directory of a Hugging Face checkpoint")
    if not directory.is_dir():
        raise CheckpointError(f"{directory} is a file: give the directory of a Hugging Face checkpoint")
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{directory} is not a model: it has no {name}")
    return path


def read_labels(fields: Fields) -> int:
    """How many outputs a *ForSequenceClassification has; 2 where the config does not say, as in transformers."""
    names = fields.object("id2label").values
    return len(names) if names else fields.integer("num_labels", default=2)


def read_dtype(fields: Fields) -> str:
    given = fields.get("dtype", fields.get("torch_dtype", "float32"))
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    if given not in ("float32", "bfloat16", "float16"):
        raise fields.error(name, "'float32' or 'bfloat16' or 'float16'")
    return given


def read_end_ids(fields: Fields) -> tuple[int, ...]:
    """`eos_token_id` of config.json and of the generation_config.json beside it."""
    ids = set(fields.token_ids("eos_token_id"))
    beside = fields.path.with_name("generation_config.json")
    if beside.exists():
        ids.update(Fields.read(beside).token_ids("eos_token_id"))
    return tuple(sorted(ids))
