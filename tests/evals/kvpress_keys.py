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
HIDDEN = 1 - (KEPT - 1 / 12) / TOKENS  # of all 6 heads' tokens, which kvpress rounds together: 32 of 90
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
    f"expected:budget={KEPT},epsilon=0.01,heads=ada": ("AdaKVPress", {}, ("ExpectedAttentionPress", {"epsilon": 0.01})),
    f"critical:budget={KEPT},window=8,kernel=13,pool=avg": ("CriticalKVPress", {}, ("SnapKVPress", SNAP)),
    f"critical:budget={KEPT},window=8,kernel=13,pool=avg,heads=ada": ("CriticalAdaKVPress", {}, ("SnapKVPress", SNAP)),
    # three full blocks; kvpress lets the padding of one that is not full attend
    f"compactor:budget={KEPT},block=26,sketch=12,blend=0.5": (
        "CompactorPress",
        {"chunk_size": 26, "sketch_dimension": 12, "blending": 0.5},
        None,
    ),
    f"kvzip:budget={KEPT},piece=45": ("KVzipPress", {"chunk_size": 45, "compression_ratio": HIDDEN}, None),
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

    same_projection(kvpress.LeverageScorePress)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_seeded(path, model_type="llama", architectures=["LlamaForCausalLM"])
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        net, ids, ratio = Net(str(path), torch.float32, torch.device("cpu")), prompt(), 1 - (KEPT + 0.5) / TOKENS
        net.start(ids)
        dense = [layer.keys[0].clone() for layer in net.cache.layers]
        for plan, (name, settings, inner) in PRESSES.items():
            if inner:
                press = getattr(kvpress, name)(
                    getattr(kvpress, inner[0])(compression_ratio=ratio, **inner[1]), **settings
                )
            else:
                press = getattr(kvpress, name)(**{"compression_ratio": ratio, **settings})
            net.start(ids, press=press)
            layers = zip(net.net.model.layers, net.cache.layers, dense, strict=True)
            found[plan] = [kept(layer.self_attn, cache.keys[0], whole) for layer, cache, whole in layers]
    versions = {name: version(name) for name in ("kvpress", "transformers", "torch")}
    FILE.write_text(json.dumps({"made_with": versions, "kept": found}) + "\n", encoding="utf-8")
    print(f"wrote {FILE.name} with {versions}")
    return 0


def same_projection(press) -> None:
    """Let kvpress draw the projection of the keys that our seed 0 draws."""
    import torch

    scores = press.compute_leverage_scores

    def seeded(*args):
        torch.manual_seed(0)
        return scores(*args)

    press.compute_leverage_scores = staticmethod(seeded)


def kept(attention, keys, whole) -> list[list[int]]:
    """Positions per KV head. Where heads keep different numbers, kvpress frees nothing: it remembers which keys to hide."""
    import torch

    if getattr(attention, "masked_key_indices", None):
        _, heads, hidden = attention.masked_key_indices
        return [sorted(set(range(TOKENS)) - set(hidden[heads == h].tolist())) for h in range(len(whole))]
    distance = torch.cdist(keys, whole, compute_mode="donot_use_mm_for_euclid_dist")
    assert distance.min(-1).values.max() < 1e-6
    return [sorted(row.tolist()) for row in distance.argmin(-1)]


if __name__ == "__main__":
    sys.exit(main())
