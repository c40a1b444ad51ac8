"""Store which keys kvpress keeps, for the tests on machines without it.

`python tests/evals/kvpress_keys.py`, where requirements-peers.txt is installed, writes kvpress_keys.json beside this file:
for each plan the positions that kvpress's press of the same settings keeps, per layer and KV head, of 90 different tokens.
"""

from __future__ import annotations

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

FILE = Path(__file__).with_suffix(".json")
TESTS = Path(__file__).resolve().parent.parent
KEPT, TOKENS = 58, 90
SNAP = {"window_size": 8, "kernel_size": 13}
# our plan: kvpress's class and settings; and the class of a press inside it
PRESSES = {
    f"snapkv:budget={KEPT},window=8,kernel=13,pool=avg": ("SnapKVPress", SNAP, None),
    f"streaming:budget={KEPT}": ("StreamingLLMPress", {}, None),
    f"tova:budget={KEPT}": ("TOVAPress", {}, None),
    f"knorm:budget={KEPT}": ("KnormPress", {}, None),
    f"keydiff:budget={KEPT}": ("KeyDiffPress", {}, None),
    f"expected:budget={KEPT}": ("ExpectedAttentionPress", {}, None),
    # 2 sinks, 24 tokens without a next partition, and 8 of each of 4 partitions
    f"lagkv:budget={KEPT},sink=2,lag=16": ("LagKVPress", {"n_sink": 2, "lag_size": 16}, None),
    f"adakv:budget={KEPT},window=8,kernel=13,pool=avg": ("AdaKVPress", {}, ("SnapKVPress", SNAP)),
}


def prompt() -> list[int]:
    """TOKENS different tokens, so that no two keys are alike."""
    import torch

    return torch.randperm(96, generator=torch.Generator().manual_seed(3))[:TOKENS].tolist()


def main() -> int:
    sys.path[:0] = [str(TESTS.parent), str(TESTS)]
    import kvpress
    import torch
    from tiny import write_seeded

    from evals.peers import Net

    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_seeded(path, model_type="llama", architectures=["LlamaForCausalLM"])
        net, ids, ratio = Net(str(path), torch.float32, torch.device("cpu")), prompt(), 1 - (KEPT + 0.5) / TOKENS
        net.start(ids)
        dense = [layer.keys[0].clone() for layer in net.cache.layers]
        for plan, (name, settings, inner) in PRESSES.items():
            if inner:
                press = getattr(kvpress, name)(
                    getattr(kvpress, inner[0])(compression_ratio=ratio, **inner[1]), **settings
                )
            else:
                press = getattr(kvpress, name)(compression_ratio=ratio, **settings)
            net.start(ids, press=press)
            layers = zip(net.net.model.layers, net.cache.layers, dense, strict=True)
            found[plan] = [kept(layer.self_attn, cache.keys[0], whole, inner) for layer, cache, whole in layers]
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    FILE.write_text(json.dumps({"made_with": versions, "kept": found}) + "\n", encoding="utf-8")
    print(f"wrote {FILE.name} with {versions}")
    return 0


def kept(attention, keys, whole, inner) -> list[list[int]]:
    """Positions per KV head. kvpress's Ada-KV frees nothing: it remembers which keys to hide."""
    import torch

    if inner:
        _, heads, hidden = attention.masked_key_indices
        return [sorted(set(range(TOKENS)) - set(hidden[heads == h].tolist())) for h in range(len(whole))]
    distance = torch.cdist(keys, whole, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(-1).values.max() < 1e-6
    return [sorted(row.tolist()) for row in distance.argmin(-1)]


if __name__ == "__main__":
    sys.exit(main())
