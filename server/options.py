"""What `tandem serve` was told, parsed from its words once; errors name the flag, the value and what would do."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from .api.options import ApiOptions
from .engine.options import DEMO, NULL, Dtype, EngineOptions, HeadDtype, KVDtype, ModelSpec, OptionsError, Scheme
from .engine.request import PoolingMode, Role, ScorePoolingMode
from .snapshots import HUB_ID, snapshot
from .text.reasoning import PARSERS as REASONING_PARSERS
from .text.tools.formats import FORMATS as TOOL_FORMATS

METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's name; the supervisor sets it for its workers
LogLevel = Literal["debug", "info", "warning", "error"]
PARSER_KEYS = ("tool_call_parser", "reasoning_parser")
OWN_KEYS = ("role", "dtype", "kv", "alias", "chat_template", "max_model_len", "weight", "revision", "pooling", "trunk")
PRECISION_KEYS = ("quantization", "lm_head", "kv_dtype")
SPEC_KEYS = (*OWN_KEYS, *PRECISION_KEYS, *PARSER_KEYS)
POOLINGS = tuple(dict.fromkeys((*get_args(PoolingMode), *get_args(ScorePoolingMode))))
TOOL_CALL_PARSERS = (*TOOL_FORMATS, "none")
BASE_OF = "base-of:"
UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class ServeOptions:
    models: tuple[ModelSpec, ...]
    engine: EngineOptions
    api: ApiOptions
    host: str
    port: int  # 0: a free one
    api_workers: int
    drain_seconds: float
    log_level: LogLevel
    access_log: bool

    def shown(self) -> dict[str, Any]:
        """As JSON, without the keys."""
        about = asdict(self)
        for name in ("api_keys", "admin_keys"):
            del about["api"][name]
        return about


@dataclass(frozen=True, slots=True)
class StartWorker:
    """The supervisor's first message to an API worker."""

    directory: str  # the run directory: the link's sockets lie there
    number: int  # no other worker of this server ever has it
    descriptors: tuple[int, ...]  # listening sockets
    options: ServeOptions


def has_gpu() -> bool:
    """Whether NVIDIA's driver runs here; says nothing of torch, which is not imported for it."""
    return Path("/proc/driver/nvidia/version").exists()


def parse_quantity(text: str, flag: str) -> int:
    """`8192`, `8k` (8,000), `8K` (8,192), `1.5G` (bytes or tokens; lower case counts in thousands, as in vLLM)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgtKMGT]?)(?:i?B)?", text.strip())
    value = float(match[1]) * UNITS.get(match[2], 1) if match else 0.0
    if value < 1 or value != int(value):
        given = f"{flag}{text}" if flag.endswith("=") else f"{flag} {text}"
        raise OptionsError(f"{given}: a whole number above 0 is needed, such as 8192, 8k (8,000) or 8K (8,192)")
    return int(value)


def parse_model(text: str) -> ModelSpec:
    """`[NAME=]PATH[,key=value…]`. Raises OptionsError naming what is wrong; the directory must hold a config.json.

    A path that is not there and reads like a hub id is one: its files are fetched unless they are cached, and the model
    is called by the id. The paths `null` and `null:5` are no directories: `ModelSpec.path`. `NAME=base-of:OTHER` and
    `NAME[=PATH],trunk=OTHER` have the weights of another hosted model: of these PATH, if any, holds the value head.
    """
    head, *settings = text.split(",")
    name, path = _name_and_path(text, head, any(setting.startswith("trunk=") for setting in settings))
    given = _settings(name, text, settings)
    base_of = path.removeprefix(BASE_OF) if path.startswith(BASE_OF) else None
    if base_of is not None and (not base_of or "trunk" in given):
        raise OptionsError(f"model {name}: {BASE_OF}OTHER names one hosted model, and trunk= is for value models")
    limit = given.get("max_model_len")
    spec = ModelSpec(
        name=name,
        path=_place(name, path, given),
        role=_choice(name, "role", given.get("role"), get_args(Role)),
        dtype=_choice(name, "dtype", given.get("dtype", "auto"), get_args(Dtype)),
        aliases=tuple(alias for alias in given.get("alias", "").split("|") if alias),
        kv_share=_share(name, given["kv"]) if "kv" in given else None,
        weight=_weight(name, given["weight"]) if "weight" in given else 1.0,
        max_model_len=None if limit is None else parse_quantity(limit, f"model {name}: max_model_len="),
        chat_template=given.get("chat_template"),
        pooling=_choice(name, "pooling", given.get("pooling"), POOLINGS),
        base_of=base_of,
        trunk=given.get("trunk"),
        quantization=_choice(name, "quantization", given.get("quantization", "auto"), get_args(Scheme)),
        lm_head=_choice(name, "lm_head", given.get("lm_head", "auto"), get_args(HeadDtype)),
        kv_dtype=_choice(name, "kv_dtype", given.get("kv_dtype", "auto"), get_args(KVDtype)),
        tool_call_parser=_choice(name, "tool_call_parser", given.get("tool_call_parser"), TOOL_CALL_PARSERS),
        reasoning_parser=_choice(name, "reasoning_parser", given.get("reasoning_parser"), tuple(REASONING_PARSERS)),
    )
    assert spec.step_seconds >= 0  # or it has said what is wrong with it
    return spec


def parse_adapter(text: str) -> tuple[str, str]:
    """`NAME=PATH` of `--lora-modules`. Raises OptionsError."""
    name, _, path = text.partition("=")
    if not name or not path or not Path(path).is_dir():
        raise OptionsError(f"--lora-modules {text}: NAME=PATH is needed, PATH being the directory of a LoRA adapter")
    return name, str(Path(path).resolve())


def bundled_models() -> tuple[ModelSpec, ...]:
    """The policy and the reward model that come with Tandem."""
    specs = (
        ModelSpec("tandem-demo", str(DEMO / "policy"), role="policy"),
        ModelSpec("tandem-demo-reward", str(DEMO / "reward"), role="reward"),
    )
    for spec in specs:
        if not Path(spec.path).is_dir():
            raise OptionsError(f"the bundled model {spec.path} is not there; give a model: tandem serve PATH")
    return specs


def read_config_file(path: Path, known: dict[str, str]) -> dict[str, Any]:
    """Values by parameter from a YAML file whose keys are flags without dashes; `known`: flag name -> parameter."""
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise OptionsError(f"--config {path}: {' '.join(str(error).split())}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise OptionsError(f"--config {path}: keys and values are needed, such as `port: 8000`")
    values: dict[str, Any] = {}
    for key, value in content.items():  # pyright: ignore[reportUnknownVariableType]  # YAML is untyped until here
        name = str(key).replace("_", "-").removeprefix("--")  # pyright: ignore[reportUnknownArgumentType]
        if name not in known:
            near = get_close_matches(name, known, 1)
            raise OptionsError(f"--config {path}: unknown key {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
        values[known[name]] = value
    return values


def _name_and_path(text: str, head: str, trunk: bool) -> tuple[str, str]:
    """What stands before the first comma. With a `trunk` that may be a name alone."""
    name, equals, path = head.partition("=")
    if trunk and not equals and not Path(head).exists() and not HUB_ID.fullmatch(head):
        return head, ""
    if not equals or Path(head).exists():
        name, path = ("" if head.startswith(BASE_OF) else _own_name(head)), head
    if not name or not path:
        raise OptionsError(f"model {text!r}: NAME=PATH or PATH is needed before the first comma")
    return name, path


def _settings(name: str, text: str, settings: list[str]) -> dict[str, str]:
    given: dict[str, str] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in SPEC_KEYS:
            near = get_close_matches(key, SPEC_KEYS, 1)
            hint = f"did you mean {near[0]}=?" if near else "there are " + ", ".join(f"{known}=" for known in SPEC_KEYS)
            raise OptionsError(f"model {name}: unknown key {key!r} in {text!r}; {hint}")
        if not value or key in given:
            raise OptionsError(f"model {name}: {key}= needs one value in {text!r}")
        given[key] = value
    return given


def _own_name(path: str) -> str:
    if path.startswith(NULL + ":"):
        return NULL
    return path if HUB_ID.fullmatch(path) and not Path(path).exists() else Path(path).resolve().name


def _place(name: str, path: str, given: dict[str, str]) -> str:
    """The directory that a path means; empty for a model that has the weights of another one and no files."""
    if path.partition(":")[0] == NULL:
        return path
    if "revision" not in given and (not path or path.startswith(BASE_OF)):
        return ""
    if "trunk" in given and Path(path).is_dir():  # it need not hold more than a head
        return str(Path(path).resolve())
    return _directory(name, path, given.get("revision"))


def _directory(name: str, path: str, revision: str | None) -> str:
    if HUB_ID.fullmatch(path) and not Path(path).exists():
        return snapshot(path, revision)
    if revision is not None:
        raise OptionsError(f"model {name}: revision={revision} is for hub ids, and {path} is none")
    if (Path(path) / "config.json").is_file():
        return str(Path(path).resolve())
    if Path(path).is_dir():
        raise OptionsError(f"model {name}: {path} has no config.json; give the directory of a Hugging Face checkpoint")
    if Path(path).exists():
        raise OptionsError(f"model {name}: {path} is a file; give the directory of a Hugging Face checkpoint")
    raise OptionsError(f"model {name}: there is no directory {path}")


def _choice(name: str, key: str, value: str | None, allowed: tuple[str, ...]) -> Any:
    if value is not None and value not in allowed:
        raise OptionsError(f"model {name}: {key}={value}: one of {', '.join(allowed)}")
    return value


def _share(name: str, value: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)%", value)
    if match is None or not 0 < float(match[1]) <= 100:
        raise OptionsError(f"model {name}: kv={value}: a percentage above 0% and up to 100%, such as kv=60%")
    return float(match[1]) / 100


def _weight(name: str, value: str) -> float:
    try:
        weight = float(value)
    except ValueError:
        weight = 0.0
    if not 0 < weight < 1e6:
        raise OptionsError(f"model {name}: weight={value}: a number above 0")
    return weight
