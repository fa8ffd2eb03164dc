"""Trains the demo's tokenizer and policy on the generated conversations: `python sft.py --minutes 40`.

Writes an ordinary Hugging Face checkpoint (LLaMA shape, ChatML with Hermes tools). Conversations of similar length
stand side by side in one flat batch, so the linear layers see no padding to speak of and attention never crosses from
one conversation into the next; the loss is on assistant tokens only, and logits are computed only there. Matrices are
trained with Muon, the rest with AdamW; the learning rate follows the clock, so a budget in minutes holds anywhere.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import data
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[2] / "model" / "demo"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKS = ("<tools>", "</tools>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
CONTEXT = 2048
FAST = torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32  # what matrices are multiplied in


# --- tokenizer --------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int = 2048) -> Tokenizer:
    """Byte-level BPE with single digits; decodes what it encoded for any text. Ids 0…2 are `SPECIAL`."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(MARKS),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, directory: Path) -> None:
    """tokenizer.json and a tokenizer_config.json that carries the chat template."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "bos_token": None,
        "unk_token": None,
        "additional_special_tokens": ["<|im_start|>"],
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONTEXT,
        "chat_template": data.CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )


class Encoder:
    """Turns conversations into token ids and marks the ones that are targets."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.start, self.end = (tokenizer.token_to_id(token) for token in SPECIAL[1:])
        self.header = tokenizer.encode(
            data.render((), add_generation_prompt=True)
        ).ids  # what stands before each answer

    def targets(self, ids: list[int]) -> list[int]:
        """Positions whose next token is the assistant's: from each header's end to before the end-of-turn token."""
        width, positions, at = len(self.header), [], 0
        while at < len(ids):
            if ids[at : at + width] == self.header:
                at += width - 1
                while at + 1 < len(ids):
                    positions.append(at)
                    at += 1
                    if ids[at] == self.end:
                        break
            at += 1
        return positions

    def documents(
        self, conversations: Iterator[data.Conversation], block: int = 256
    ) -> Iterator[tuple[list[int], list[int]]]:
        """(ids, target positions) of each conversation that fits the context, cut after the last target."""
        while True:
            texts = [next(conversations).text() for _ in range(block)]
            for encoding in self.tokenizer.encode_batch(texts):
                if len(encoding.ids) <= CONTEXT:
                    positions = self.targets(encoding.ids)
                    yield encoding.ids[: positions[-1] + 2], positions


@dataclass(frozen=True)
class Flat:
    """Sequences side by side. `groups` lists (offset, B, T): B rows of length T that begin at `offset`."""

    ids: Tensor  # [N]
    positions: Tensor  # [N], place in the own sequence
    groups: tuple[tuple[int, int, int], ...]
    starts: tuple[int, ...]  # where each given sequence begins in ids, in the order given
    real: int  # tokens that are not padding


def flatten(sequences: list[list[int]], groups: int = 5, pad: int = 0) -> Flat:
    """Sorts by length and cuts into groups where the lengths jump, so that padding inside a group stays small."""
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    lengths = [len(sequences[i]) for i in order]
    cuts = _cuts(lengths, groups)
    ids: list[int] = []
    spans: list[tuple[int, int, int]] = []
    starts = [0] * len(sequences)
    for low, high in itertools.pairwise(cuts):
        width = lengths[high - 1]
        spans.append((len(ids), high - low, width))
        for i in order[low:high]:
            starts[i] = len(ids)
            ids += sequences[i] + [pad] * (width - len(sequences[i]))
    positions = torch.cat([torch.arange(width).repeat(rows) for _, rows, width in spans])
    return Flat(torch.tensor(ids), positions, tuple(spans), tuple(starts), sum(lengths))


def _cuts(lengths: list[int], groups: int) -> list[int]:
    """Boundaries of at most `groups` runs of sorted lengths with the least padding (exact, by dynamic programming)."""
    n = len(lengths)
    total = [0]
    for length in lengths:
        total.append(total[-1] + length)
    best = [[math.inf] * (n + 1) for _ in range(groups + 1)]
    back = [[0] * (n + 1) for _ in range(groups + 1)]
    best[0][0] = 0
    for g in range(1, groups + 1):
        for high in range(1, n + 1):
            for low in range(high):
                cost = best[g - 1][low] + lengths[high - 1] * (high - low) - (total[high] - total[low])
                if cost < best[g][high]:
                    best[g][high], back[g][high] = cost, low
    g = min(range(1, groups + 1), key=lambda g: (best[g][n], g))
    cuts = [n]
    while cuts[-1]:
        cuts.append(back[g][cuts[-1]])
        g -= 1
    return cuts[::-1]


# --- model ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The policy's shape: hidden width D, layers, query and key/value heads of width `head`, feed-forward width."""

    hidden: int = 256
    layers: int = 4
    heads: int = 8
    kv_heads: int = 2
    head: int = 32
    inner: int = 512
    vocab: int = 2048
    theta: float = 10000.0
    eps: float = 1e-5


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [N, H, head] by the angles of its positions, [N, 1, head]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int, int], ...]) -> Tensor:
        s = self.shape
        q = rotate(self.q_proj(x).view(-1, s.heads, s.head), cos, sin)
        k = rotate(self.k_proj(x).view(-1, s.kv_heads, s.head), cos, sin)
        v = self.v_proj(x).view(-1, s.kv_heads, s.head)
        mixed = []
        for at, rows, width in groups:
            span = slice(at, at + rows * width)
            parts = (t[span].view(rows, width, -1, s.head).transpose(1, 2) for t in (q, k, v))  # [B, H, T, head]
            out = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            mixed.append(out.transpose(1, 2).reshape(rows * width, -1))
        return self.o_proj(torch.cat(mixed))


class FeedForward(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, groups: tuple[tuple[int, int, int], ...]) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, groups)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """LLaMA without its head, with transformers' parameter names; forward gives the normed hidden states [N, D]."""

    def __init__(self, shape: Shape):
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.hidden, eps=shape.eps)
        frequencies = shape.theta ** (-torch.arange(0, shape.head, 2) / shape.head)
        angles = torch.outer(torch.arange(CONTEXT), frequencies).repeat(1, 2)  # [T, head]
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                scale = (2 * shape.layers) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(parameter, std=0.02 if "embed" in name else scale * parameter.shape[1] ** -0.5)

    def forward(self, flat: Flat) -> Tensor:
        x = self.embed_tokens(flat.ids)
        cos, sin = (table[flat.positions].unsqueeze(1) for table in (self.cos, self.sin))
        for layer in self.layers:
            x = layer(x, cos, sin, flat.groups)
        return self.norm(x)


# --- optimisation -----------------------------------------------------------------------------------------------------


class Muon:
    """Momentum whose matrices are orthogonalised by a quintic Newton-Schulz iteration (Jordan et al., 2024).

    Matrices of one shape are orthogonalised together, in bf16 where the CPU multiplies it. The step is scaled by
    sqrt(max(1, rows / columns)).
    """

    def __init__(self, parameters: list[Tensor], momentum: float = 0.95, weight_decay: float = 0.01):
        self.momentum, self.weight_decay = momentum, weight_decay
        self.shapes: dict[torch.Size, list[Tensor]] = {}
        for parameter in parameters:
            self.shapes.setdefault(parameter.shape, []).append(parameter)
        self.buffers = {shape: torch.zeros(len(same), *shape) for shape, same in self.shapes.items()}

    @torch.no_grad()
    def step(self, rate: float) -> None:
        for shape, same in self.shapes.items():
            gradient = torch.stack([parameter.grad for parameter in same])
            buffer = self.buffers[shape].lerp_(gradient, 1 - self.momentum)
            update = gradient.lerp(buffer, self.momentum)
            flip = shape[0] > shape[1]
            x = update.mT if flip else update
            x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(FAST)
            for _ in range(5):
                gram = x @ x.mT
                x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
            x = (x.mT if flip else x).float()
            scale = max(1.0, shape[0] / shape[1]) ** 0.5
            for parameter, direction in zip(same, x, strict=True):
                parameter.mul_(1 - rate * self.weight_decay).add_(direction, alpha=-rate * scale)


class Optimiser:
    """Muon for the matrices inside the layers, AdamW for embeddings, norms and heads; both follow one schedule."""

    def __init__(self, module: nn.Module, muon_rate: float, adam_rate: float):
        inner = [p for name, p in module.named_parameters() if p.ndim == 2 and "layers" in name]
        rest = [p for name, p in module.named_parameters() if not (p.ndim == 2 and "layers" in name)]
        self.muon_rate, self.adam_rate = muon_rate, adam_rate
        self.muon, self.adam = Muon(inner), torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.98), weight_decay=0.0)

    def step(self, scale: float) -> None:
        """One update at `scale` times the full rates; clears the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_rate * scale
        self.muon.step(self.muon_rate * scale)
        self.adam.step()
        for parameters in (*self.muon.shapes.values(), *(group["params"] for group in self.adam.param_groups)):
            for parameter in parameters:
                parameter.grad = None

    def state(self) -> dict[str, Any]:
        return {"muon": list(self.muon.buffers.values()), "adam": self.adam.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        self.muon.buffers = dict(zip(self.muon.buffers, state["muon"], strict=True))
        self.adam.load_state_dict(state["adam"])


def schedule(progress: float, warmup: float = 0.02, decay: float = 0.55) -> float:
    """Rate at `progress` in [0, 1]: up, level, then linearly to 0 over the last `decay`."""
    return max(0.0, min(progress / warmup, (1 - progress) / decay, 1.0))


class Progress:
    """One line on stderr, rewritten on a terminal and printed now and then elsewhere."""

    def __init__(self, every: float = 15.0):
        self.tty, self.every, self.last = sys.stderr.isatty(), every, -math.inf

    def show(self, done: float, text: str) -> None:
        now = time.monotonic()
        if now - self.last < (0.2 if self.tty else self.every) and done < 1:
            return
        self.last = now
        bar = "#" * round(30 * min(done, 1.0))
        start, end = ("\r" if self.tty else "", "" if self.tty and done < 1 else "\n")
        print(f"{start}[{bar:<30}] {text}", end=end, file=sys.stderr, flush=True)


# --- checkpoint -------------------------------------------------------------------------------------------------------


def hf_config(shape: Shape, **extra: Any) -> Any:
    """transformers' configuration of this shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=shape.eps,
        rope_parameters={"rope_type": "default", "rope_theta": shape.theta},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        dtype="bfloat16",
        **extra,
    )


def save_weights(tensors: dict[str, Tensor], directory: Path) -> None:
    """bf16 safetensors, written beside the old file and then moved over it."""
    rounded = {name: tensor.detach().to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}
    save_file(rounded, directory / "model.safetensors.new", metadata={"format": "pt"})
    (directory / "model.safetensors.new").chmod(0o644)
    (directory / "model.safetensors.new").replace(directory / "model.safetensors")


def save_policy(trunk: Trunk, tokenizer: Tokenizer, directory: Path) -> None:
    """The checkpoint that `AutoModelForCausalLM` and `AutoTokenizer` load."""
    save_tokenizer(tokenizer, directory)
    hf_config(trunk.shape, architectures=["LlamaForCausalLM"]).save_pretrained(directory)
    generation = {"do_sample": False, "eos_token_id": [2, 0], "pad_token_id": 0, "max_length": CONTEXT}
    (directory / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    save_weights({f"model.{name}": tensor for name, tensor in trunk.state_dict().items()}, directory)


def load_policy(directory: Path) -> tuple[Trunk, Tokenizer]:
    """What `save_policy` wrote, in fp32."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"], head=config["head_dim"], inner=config["intermediate_size"],
        vocab=config["vocab_size"],
    )  # fmt: skip
    trunk = Trunk(shape)
    weights = load_file(directory / "model.safetensors")
    trunk.load_state_dict(
        {name.removeprefix("model."): t.float() for name, t in weights.items() if name.startswith("model.")}
    )
    return trunk, Tokenizer.from_file(str(directory / "tokenizer.json"))


# --- training ---------------------------------------------------------------------------------------------------------


def next_token_loss(trunk: Trunk, documents: list[tuple[list[int], list[int]]]) -> tuple[Tensor, int]:
    """(mean cross-entropy over the targets of a batch, tokens in it)."""
    flat = flatten([ids for ids, _ in documents])
    at = torch.tensor([flat.starts[i] + p for i, (_, positions) in enumerate(documents) for p in positions])
    logits = trunk(flat)[at] @ trunk.embed_tokens.weight.T  # [targets, V]
    return F.cross_entropy(logits.float(), flat.ids[at + 1]), flat.real


def train(options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    begun = time.monotonic()
    step, tokens, spent, smooth, budget = 0, 0, 0.0, math.nan, options.minutes * 60

    def weights() -> tuple[int, ...]:  # long tool prompts come late: early on, short exercises teach more per second
        return data.LATE if spent / budget > options.late else data.EARLY

    if options.start:
        trunk, tokenizer = load_policy(options.start)
    else:
        stream = data.conversations(options.seed)
        if options.tokenizer:
            tokenizer = Tokenizer.from_file(str(options.tokenizer))
        else:
            tokenizer = train_tokenizer((next(stream).text() for _ in range(options.corpus)), options.vocab)
        shape = Shape(
            options.hidden,
            options.layers,
            options.hidden // 32,
            options.kv_heads,
            32,
            options.inner,
            tokenizer.get_vocab_size(),
        )
        trunk = Trunk(shape)
    encoder = Encoder(tokenizer)
    documents = encoder.documents(data.conversations(options.seed, weights))
    optimiser = Optimiser(trunk, options.muon_rate, options.adam_rate)
    state_file = options.out.with_name(options.out.name + ".state.pt")
    if options.resume and state_file.exists():
        state = torch.load(state_file, weights_only=True)
        trunk.load_state_dict(state["trunk"])
        optimiser.load(state["optimiser"])
        step, tokens, spent = state["step"], state["tokens"], state["spent"]
        documents = encoder.documents(data.conversations(options.seed + step, weights))
    progress = Progress()
    begun_here, saved = time.monotonic() - spent, time.monotonic()
    print(
        json.dumps({"shape": asdict(trunk.shape), "parameters": sum(p.numel() for p in trunk.parameters())}),
        file=sys.stderr,
    )
    while (spent := time.monotonic() - begun_here) < budget:
        batch: list[tuple[list[int], list[int]]] = []
        while sum(len(ids) for ids, _ in batch) < options.batch_tokens:
            batch.append(next(documents))
        with torch.autocast("cpu", FAST, enabled=FAST is torch.bfloat16):
            loss, count = next_token_loss(trunk, batch)
        loss.backward()
        optimiser.step(schedule(spent / budget))
        step, tokens = step + 1, tokens + count
        value = loss.item()
        smooth = value if math.isnan(smooth) else 0.98 * smooth + 0.02 * value
        progress.show(
            spent / budget,
            f"step {step} loss {smooth:.4f} {tokens / max(spent, 1e-9):.0f} tok/s {tokens / 1e6:.2f} Mtok",
        )
        if time.monotonic() - saved > 60 * options.save_minutes:
            saved = time.monotonic()
            save_policy(trunk, tokenizer, options.out)
            state = {
                "trunk": trunk.state_dict(),
                "optimiser": optimiser.state(),
                "step": step,
                "tokens": tokens,
                "spent": spent,
            }
            torch.save(state, state_file)
    save_policy(trunk, tokenizer, options.out)
    state_file.unlink(missing_ok=True)
    report = {"steps": step, "tokens": tokens, "loss": round(smooth, 4), "seconds": round(time.monotonic() - begun, 1)}
    if options.evaluate:
        from evaluate import evaluate_policy

        report["held_out"] = evaluate_policy(options.out, count=options.evaluate)
    return report


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo's tokenizer and policy.")
    parser.add_argument("--out", type=Path, default=DEMO / "policy", help="checkpoint directory")
    parser.add_argument("--minutes", type=float, default=40.0, help="training time; the learning rate follows it")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=2)
    parser.add_argument("--inner", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--corpus", type=int, default=20000, help="conversations the tokenizer is trained on")
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json instead of training one")
    parser.add_argument("--start", type=Path, help="go on from the weights of this checkpoint, with its tokenizer")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--late", type=float, default=0.5, help="share of the time after which long tool prompts come")
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.004)
    parser.add_argument("--save-minutes", type=float, default=3.0, help="time between checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint's state file")
    parser.add_argument(
        "--evaluate", type=int, default=60, help="held-out prompts per kind and language at the end; 0: none"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny run that ends within a minute")
    options = parser.parse_args(arguments)
    if options.smoke:
        options.minutes, options.corpus, options.layers, options.evaluate = 0.2, 1000, 2, 4
    return options


def main(arguments: list[str] | None = None) -> None:
    print(json.dumps(train(parse(arguments))))


if __name__ == "__main__":
    main()
