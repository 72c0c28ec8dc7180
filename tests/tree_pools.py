"""Small pools of prefix trees whose keys tell token, position and layer."""

from __future__ import annotations

import torch

from dlm_fast.ops import TreeKVPool


def make_pool(**options) -> TreeKVPool:
    settings = {"num_layers": 2, "key_heads": 2, "width": 3, "page": 4, **options}
    return TreeKVPool(**settings)


def key_of(token_ids, position_ids, layer):
    """Keys that tell the token, its position and the layer: [T, 2, 3]."""
    base = token_ids * 1000 + position_ids + 0.25 * layer
    return base[:, None, None] + torch.arange(6).view(2, 3) * 1e-2


def fill(pool, slots, token_ids, position_ids):
    for layer in range(pool.num_layers):
        key = key_of(token_ids.to(pool.dtype), position_ids, layer).to(pool.dtype)
        pool.write(layer, slots, key, -key)


def put(pool, node, tokens):
    """Appends and writes."""
    start = pool.node(node).start + pool.node(node).length
    slots = pool.append([node], tokens)
    fill(pool, slots, torch.tensor(tokens), start + torch.arange(len(tokens)))


def root_of(pool, tokens):
    node = pool.alloc()
    put(pool, node, tokens)
    return node


def check_path(pool, node, tokens):
    assert pool.path_tokens(node) == tokens
    slots = pool.path_slots(node)
    assert len(set(slots.tolist())) == len(tokens)
    expected = torch.tensor(tokens), torch.arange(len(tokens))
    for layer in range(pool.num_layers):
        key, value = pool.read(layer, slots)
        truth = key_of(expected[0].to(pool.dtype), expected[1], layer).to(pool.dtype)
        assert torch.equal(key, truth) and torch.equal(value, -truth)


def pages_of(pool, node):
    facts = pool.node(node)
    if not facts.length or facts.is_evicted:
        return 0
    return len({slot // pool.page for slot in pool.slots(node).tolist()})
