"""The keep axis: name → policy with the paper's defaults. One line per method or short name."""

from nanokv.policies.base import Policy
from nanokv.policies.cascade import CascadingKV
from nanokv.policies.corm import CORM
from nanokv.policies.duo import DuoAttention
from nanokv.policies.expected import ExpectedAttention
from nanokv.policies.full import Full
from nanokv.policies.h2o import H2O
from nanokv.policies.keydiff import KeyDiff
from nanokv.policies.keyformer import Keyformer
from nanokv.policies.knorm import Knorm
from nanokv.policies.mikv import MiKV
from nanokv.policies.random import Random
from nanokv.policies.scissorhands import Scissorhands
from nanokv.policies.simlayer import SimLayerKV
from nanokv.policies.snapkv import SnapKV
from nanokv.policies.streaming import StreamingLLM
from nanokv.policies.tova import TOVA
from nanokv.policies.zipcache import ZipCache

POLICIES: dict[str, Policy] = {
    "full": Full(),
    "random": Random(),
    "streaming": StreamingLLM(),
    "snapkv": SnapKV(),
    "pyramidkv": SnapKV(layers="pyramid"),
    "adakv": SnapKV(heads="ada"),
    "chunkkv": SnapKV(select="chunk", kernel=1),
    "simlayer": SimLayerKV(),
    "h2o": H2O(),
    "tova": TOVA(),
    "keyformer": Keyformer(),
    "scissorhands": Scissorhands(),
    "corm": CORM(),
    "cascade": CascadingKV(),
    "duo": DuoAttention(),
    "knorm": Knorm(),
    "keydiff": KeyDiff(),
    "expected": ExpectedAttention(),
    "mikv": MiKV(),
    "zipcache": ZipCache(),
}
