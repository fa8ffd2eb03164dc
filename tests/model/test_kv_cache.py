"""Pages of several models in one buffer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from checkpoints import write_checkpoint

from tandem.model.config import ModelConfig, read_config
from tandem.model.kv_cache import KVCache

PAGE = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return read_config(write_checkpoint(tmp_path_factory.mktemp("kv") / "llama-gqa", "llama-gqa", tokenizer=False))


def filled(cache: KVCache, pages: list[int], value: int) -> None:
    for layer in cache.layers:
        for part in layer:
            if part is not None:
                part[pages] = value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_page_is_one_piece_that_holds_all_layers(config: ModelConfig, dtype: torch.dtype) -> None:
    size = KVCache.bytes_per_page(config, PAGE, dtype)
    memory = torch.zeros(3 * size + 512, dtype=torch.uint8)
    cache = KVCache(config, 3, PAGE, dtype, memory=memory[256:])
    filled(cache, [1], 1)
    touched = memory.nonzero().flatten()
    assert touched.min() >= 256 + size and touched.max() < 256 + 2 * size
    values = 2 * config.layers * config.kv_heads * PAGE * (config.head_size * dtype.itemsize)
    scales = 2 * config.layers * config.kv_heads * PAGE * 2 if dtype == torch.int8 else 0
    assert values + scales <= size <= values + scales + 2 * PAGE * config.head_size
    places = [part.data_ptr() for layer in cache.layers for part in layer if part is not None]
    assert len(set(places)) == len(places)
    for layer in cache.layers:
        assert layer.k.shape == (3, config.kv_heads, PAGE, config.head_size) and layer.k.dtype == dtype
        assert (layer.k_scale is not None) == (dtype == torch.int8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_a_copied_page_is_equal_in_every_layer_and_no_other_changes(config: ModelConfig, dtype: torch.dtype) -> None:
    cache = KVCache(config, 4, PAGE, dtype)
    for page in range(4):
        filled(cache, [page], page)
    cache.copy_pages(torch.tensor([3, 1]), torch.tensor([0, 2]))
    for layer in cache.layers:
        for part in layer:
            if part is not None:
                assert [part[page].unique().tolist() for page in range(4)] == [[3], [1], [1], [3]]


def test_models_with_other_pages_share_a_buffer(config: ModelConfig) -> None:
    """Each in pages of the buffer's that the other does not use."""
    wide, narrow = config, replace(config, layers=config.layers + 1, kv_heads=1)
    memory = torch.empty(1 << 16, dtype=torch.uint8)
    one, two = (
        KVCache(
            each, len(memory) // KVCache.bytes_per_page(each, PAGE, torch.float32), PAGE, torch.float32, "cpu", memory
        )
        for each in (wide, narrow)
    )
    half = len(memory) // 2
    ones = list(range(half // KVCache.bytes_per_page(wide, PAGE, torch.float32)))
    twos = list(range(-(-half // KVCache.bytes_per_page(narrow, PAGE, torch.float32)), two.pages))
    filled(one, ones, 1)
    filled(two, twos, 2)
    assert all((part[ones] == 1).all() for layer in one.layers for part in layer[:2])
    assert all((part[twos] == 2).all() for layer in two.layers for part in layer[:2])
