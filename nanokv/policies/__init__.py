"""The keep axis: name → policy with the paper's defaults. One line per method or short name."""

from nanokv.contract import Policy
from nanokv.policies.full import Full
from nanokv.policies.random import Random
from nanokv.policies.simlayer import SimLayerKV
from nanokv.policies.snapkv import SnapKV
from nanokv.policies.streaming import StreamingLLM

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "random": Random(),
    "streaming": StreamingLLM(),
    "snapkv": SnapKV(),
    "simlayer": SimLayerKV(),
}
