"""What `tandem serve` was told, parsed from its words once; errors name the flag, the value and what would do."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

from .api.options import ApiOptions
from .engine.options import DEMO, NULL, Dtype, EngineOptions, ModelSpec, OptionsError
from .engine.request import PoolingMode, Role

METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"  # prometheus-client's name; the supervisor sets it for its workers
LogLevel = Literal["debug", "info", "warning", "error"]
SPEC_KEYS = ("role", "dtype", "kv", "alias", "chat_template", "max_model_len", "weight", "pooling")
LATER_KEYS = ("quantization", "kv_dtype", "revision")
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
        del about["api"]["api_keys"]
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

    The paths `null` and `null:5` are no directories: `ModelSpec.path`.
    """
    head, *settings = text.split(",")
    name, equals, path = head.partition("=")
    if not equals or Path(head).exists():
        name, path = (NULL if head.startswith(NULL + ":") else Path(head).resolve().name), head
    if not name or not path:
        raise OptionsError(f"model {text!r}: NAME=PATH or PATH is needed before the first comma")
    given: dict[str, str] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key in LATER_KEYS:
            raise OptionsError(f"model {name}: {key}= is not supported yet; leave it out")
        if key not in SPEC_KEYS:
            near = get_close_matches(key, SPEC_KEYS, 1)
            hint = f"did you mean {near[0]}=?" if near else "there are " + ", ".join(f"{known}=" for known in SPEC_KEYS)
            raise OptionsError(f"model {name}: unknown key {key!r} in {text!r}; {hint}")
        if not value or key in given:
            raise OptionsError(f"model {name}: {key}= needs one value in {text!r}")
        given[key] = value
    limit = given.get("max_model_len")
    spec = ModelSpec(
        name=name,
        path=path if path.partition(":")[0] == NULL else _directory(name, path),
        role=_choice(name, "role", given.get("role"), get_args(Role)),
        dtype=_choice(name, "dtype", given.get("dtype", "auto"), get_args(Dtype)),
        aliases=tuple(alias for alias in given.get("alias", "").split("|") if alias),
        kv_share=_share(name, given["kv"]) if "kv" in given else None,
        weight=_weight(name, given["weight"]) if "weight" in given else 1.0,
        max_model_len=None if limit is None else parse_quantity(limit, f"model {name}: max_model_len="),
        chat_template=given.get("chat_template"),
        pooling=_choice(name, "pooling", given.get("pooling"), get_args(PoolingMode)),
    )
    assert spec.step_seconds >= 0  # or it has said what is wrong with it
    return spec


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


def _directory(name: str, path: str) -> str:
    if (Path(path) / "config.json").is_file():
        return str(Path(path).resolve())
    if Path(path).is_dir():
        raise OptionsError(f"model {name}: {path} has no config.json; give the directory of a Hugging Face checkpoint")
    if Path(path).exists():
        raise OptionsError(f"model {name}: {path} is a file; give the directory of a Hugging Face checkpoint")
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path):
        raise OptionsError(
            f"model {name}: there is no directory {path}. If it is a Hugging Face hub id: these are not taken yet; "
            f"run `hf download {path} --local-dir {path.rpartition('/')[2]}` and give that directory"
        )
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
